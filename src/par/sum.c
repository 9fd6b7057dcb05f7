#include "par/sum.h"

#include <stdlib.h>

void mt_sum_places(int64_t *numbers, const struct mt_comm *c, int64_t n, struct mt_parts *parts,
                   struct mt_parts *places) {
  size_t ranks = (size_t)c->size;
  int64_t *count = numbers, *start = count + ranks, *in_count = start + ranks,
          *in_start = in_count + ranks;
  for (int i = 0; i < c->size; i++) start[i] = mt_bucket_part(n, c->size, i, &count[i]);
  for (int p = 0; p < c->size; p++) {
    in_count[p] = count[c->rank];
    in_start[p] = p * count[c->rank];
  }
  *parts = (struct mt_parts){count, start};
  *places = (struct mt_parts){in_count, in_start};
}

static mt_err cut(struct mt_sum *s, const struct mt_comm *c, int64_t n, struct mt_parts *parts,
                  struct mt_parts *places) {
  if (s->numbers_size < c->size) {
    free(s->numbers);
    s->numbers = calloc(4 * (size_t)c->size, sizeof *s->numbers);
    s->numbers_size = s->numbers ? c->size : 0;
    if (!s->numbers) return mt_fail(MT_ENOMEM, "parts of %d ranks", c->size);
  }
  mt_sum_places(s->numbers, c, n, parts, places);
  return MT_OK;
}

static mt_err reserve(struct mt_sum *s, size_t need) {
  if (s->parts_bytes >= need) return MT_OK;
  s->be->mem_free(s->be, s->parts, s->parts_bytes);
  s->parts = NULL;
  s->parts_bytes = 0;
  MT_TRY(s->be->mem_alloc(s->be, need, &s->parts));
  s->parts_bytes = need;
  return MT_OK;
}

mt_err mt_sum_scatter(struct mt_sum *s, struct mt_comm *c, void *grad, enum mt_dtype dtype,
                      int64_t n, int64_t *own, int64_t *owned) {
  struct mt_parts parts, places;
  size_t item = mt_dtype_bytes(dtype);
  *own = 0;
  *owned = n;
  if (c->size == 1) return MT_OK;
  MT_TRY(cut(s, c, n, &parts, &places));
  *own = parts.start[c->rank];
  *owned = parts.count[c->rank];
  MT_TRY(reserve(s, (size_t)c->size * (size_t)*owned * item));
  MT_TRY(mt_comm_all_to_all(c, grad, parts, s->parts, places, item, NULL));
  if (*owned == 0) return MT_OK;
  struct mt_parts_sum_args a = {.parts = mt_mat(s->parts, dtype, c->size, *owned),
                                .out = mt_vec((char *)grad + (size_t)*own * item, dtype, *owned)};
  return s->be->ops.parts_sum(s->be, &a);
}

mt_err mt_sum_gather(struct mt_sum *s, struct mt_comm *c, void *grad, enum mt_dtype dtype,
                     int64_t n) {
  return mt_sum_gather_run(s, c, grad, dtype, n, 0, n);
}

static int64_t within(int64_t x, int64_t count) {
  return x < 0 ? 0 : x > count ? count : x;
}

mt_err mt_sum_gather_run(struct mt_sum *s, struct mt_comm *c, void *buf, enum mt_dtype dtype,
                         int64_t n, int64_t from, int64_t count) {
  struct mt_parts parts, places;
  if (c->size == 1) return MT_OK;
  MT_TRY(cut(s, c, n, &parts, &places));
  for (int p = 0; p < c->size; p++) {
    int64_t begin = within(parts.start[p] - from, count);
    s->numbers[p] = within(parts.start[p] + parts.count[p] - from, count) - begin;
    s->numbers[c->size + p] = begin;
  }
  return mt_comm_all_gather(c, buf, parts, mt_dtype_bytes(dtype), NULL);
}

mt_err mt_sum_bucket(struct mt_sum *s, struct mt_comm *c, void *grad, enum mt_dtype dtype,
                     int64_t n, int64_t *own, int64_t *owned) {
  MT_TRY(mt_sum_scatter(s, c, grad, dtype, n, own, owned));
  return mt_sum_gather(s, c, grad, dtype, n);
}

void mt_sum_free(struct mt_sum *s) {
  if (s->be) s->be->mem_free(s->be, s->parts, s->parts_bytes);
  free(s->numbers);
  *s = (struct mt_sum){0};
}
