#include "model/buckets.h"

#include <stdlib.h>

int64_t mt_bucket_part(int64_t n, int ranks, int i, int64_t *count) {
  int64_t each = mt_bucket_round((n + ranks - 1) / ranks), begin = each * i < n ? each * i : n;
  *count = n - begin < each ? n - begin : each;
  return begin;
}

static bool in_class(const struct mt_params *p, int row, enum mt_sync sync) {
  return p->row[row].sync == sync && p->row[row].learns;
}

/* Rows [row, end) that may share buckets: of one layer. Outside of the layers each is alone: they
 * are ready far apart. */
static int group_end(const struct mt_params *p, int row, enum mt_sync sync) {
  int layer = p->row[row].layer, end = row + 1;
  while (layer >= 0 && end < p->count && p->row[end].layer == layer) end++;
  while (!in_class(p, end - 1, sync)) end--;
  return end;
}

/* Cuts [begin, end) of a class's stretch, where rows [first, last] lie; returns how many buckets.
 * out NULL: only counts. */
static int cut(const struct mt_params *p, const struct mt_buckets *b, int first, int last,
               int64_t end, int64_t most, struct mt_bucket *out) {
  enum mt_sync sync = p->row[first].sync;
  int n = 0;
  for (int64_t at = b->at[first]; at < end; at += most, n++) {
    struct mt_bucket k = {.sync = sync, .layer = p->row[first].layer, .begin = at};
    k.count = end - at < most ? end - at : most;
    k.first = last;
    for (int i = first; out && i <= last; i++) {
      bool here = in_class(p, i, sync) && b->at[i] < at + k.count &&
                  b->at[i] + mt_param_count(&p->row[i]) > at;
      if (here && i < k.first) k.first = i;
      if (here) k.last = i;
    }
    if (out) out[n] = k;
  }
  return n;
}

static int list(const struct mt_params *p, const struct mt_buckets *b, int64_t most,
                struct mt_bucket *out) {
  int n = 0;
  for (int sync = 0; sync < MT_SYNC_COUNT; sync++) {
    for (int row = 0; row < p->count; row++) {
      if (!in_class(p, row, (enum mt_sync)sync)) continue;
      int last = group_end(p, row, (enum mt_sync)sync) - 1;
      int64_t end = b->at[last] + mt_bucket_round(mt_param_count(&p->row[last]));
      n += cut(p, b, row, last, end, most, out ? out + n : NULL);
      row = last;
    }
  }
  return n;
}

mt_err mt_buckets_build(const struct mt_params *p, const struct mt_sharers *sharers, int64_t most,
                        struct mt_buckets *out) {
  *out = (struct mt_buckets){.at = calloc((size_t)p->count + 1, sizeof *out->at)};
  if (!out->at) return mt_fail(MT_ENOMEM, "buckets of %d parameters", p->count);
  for (int i = 0; i < p->count; i++) {
    enum mt_sync sync = p->row[i].sync;
    out->at[i] = out->total[sync];
    if (p->row[i].learns) out->total[sync] += mt_bucket_round(mt_param_count(&p->row[i]));
  }
  most = mt_bucket_round(most > 0 ? most : 1);
  out->count = list(p, out, most, NULL);
  out->item = calloc((size_t)out->count + 1, sizeof *out->item);
  if (!out->item) {
    mt_buckets_free(out);
    return mt_fail(MT_ENOMEM, "buckets of %d parameters", p->count);
  }
  list(p, out, most, out->item);
  for (int i = 0; i < out->count; i++) {
    struct mt_bucket *k = &out->item[i];
    int ranks = sharers->count[k->sync] > 1 ? sharers->count[k->sync] : 1;
    k->own = mt_bucket_part(k->count, ranks, sharers->index[k->sync], &k->owned);
    k->state = out->owned[k->sync];
    out->owned[k->sync] += k->owned;
  }
  return MT_OK;
}

void mt_buckets_free(struct mt_buckets *b) {
  free(b->item);
  free(b->at);
  *b = (struct mt_buckets){0};
}

bool mt_buckets_run(const struct mt_buckets *b, const struct mt_params *p, int row, int64_t from,
                    int64_t *begin, int64_t *count, int64_t *state) {
  const struct mt_param *r = &p->row[row];
  int64_t low = b->at[row] + from, high = b->at[row] + mt_param_count(r);
  for (int i = 0; r->learns && low < high && i < b->count; i++) {
    const struct mt_bucket *k = &b->item[i];
    int64_t at = k->begin + k->own, end = at + k->owned;
    if (k->sync != r->sync || end <= low || at >= high || k->owned == 0) continue;
    int64_t first = at > low ? at : low;
    *begin = first - b->at[row];
    *count = (end < high ? end : high) - first;
    *state = k->state + first - at;
    return true;
  }
  return false;
}
