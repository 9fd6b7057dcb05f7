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

/* Rows of a class that share buckets, as backward comes to them: in the table's order, reversed. */
struct rows {
  int first, last, number, place;
  int layers; /* so far */
};

/* The group behind g, of which number is -1 and first the table's end to begin with. */
static bool next_rows(const struct mt_params *p, enum mt_sync sync, struct rows *g) {
  int last = g->first - 1;
  while (last >= 0 && !in_class(p, last, sync)) last--;
  if (last < 0) return false;
  int layer = p->row[last].layer;
  g->first = g->last = last;
  g->number++;
  for (int i = last - 1; layer >= 0 && i >= 0; i--) {
    if (in_class(p, i, sync) && p->row[i].layer == layer) g->first = i;
  }
  if (layer >= 0)
    g->place = MT_PLACE_LAYERS + g->layers++ % 2;
  else
    g->place = p->row[last].kind == MT_PARAM_FINAL_NORM ? MT_PLACE_NORM : MT_PLACE_ENDS;
  return true;
}

/* A place is as large as the largest group that has it. */
static void lay_ring(const struct mt_params *p, struct mt_buckets *b, enum mt_sync sync) {
  int64_t size[MT_PLACE_COUNT] = {0}, begin[MT_PLACE_COUNT] = {0};
  for (struct rows g = {.first = p->count, .number = -1}; next_rows(p, sync, &g);) {
    int64_t n = b->at[g.last] + mt_bucket_round(mt_param_count(&p->row[g.last])) - b->at[g.first];
    if (n > size[g.place]) size[g.place] = n;
  }
  for (int i = 0; i < MT_PLACE_COUNT; i++) {
    begin[i] = b->ring[sync];
    b->ring[sync] += size[i];
  }
  for (struct rows g = {.first = p->count, .number = -1}; next_rows(p, sync, &g);) {
    for (int i = g.first; i <= g.last; i++)
      b->ring_at[i] = begin[g.place] + b->at[i] - b->at[g.first];
    for (int i = 0; i < b->count; i++) {
      struct mt_bucket *k = &b->item[i];
      if (k->sync != sync || k->first < g.first || k->last > g.last) continue;
      k->group = g.number;
      k->place = g.place;
    }
  }
}

mt_err mt_buckets_build(const struct mt_params *p, const struct mt_sharers *sharers, int64_t most,
                        struct mt_buckets *out) {
  size_t rows = (size_t)p->count + 1;
  *out = (struct mt_buckets){.at = calloc(rows, sizeof *out->at),
                             .ring_at = calloc(rows, sizeof *out->ring_at)};
  if (!out->at || !out->ring_at) {
    mt_buckets_free(out);
    return mt_fail(MT_ENOMEM, "buckets of %d parameters", p->count);
  }
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
  for (int sync = 0; sync < MT_SYNC_COUNT; sync++) lay_ring(p, out, (enum mt_sync)sync);
  return MT_OK;
}

void mt_buckets_free(struct mt_buckets *b) {
  free(b->item);
  free(b->at);
  free(b->ring_at);
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
