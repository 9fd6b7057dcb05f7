/* What ranks add up, and the order of what they have sent. */
#include <string.h>

#include "kernels/ref/ref.h"

mt_err mt_ref_arrival_plan(struct mt_backend *be, const struct mt_arrival_plan_args *a) {
  (void)be;
  MT_TRY(mt_check_arrival_plan(a));
  int32_t row = 0;
  for (int e = 0; e < a->expert_count; e++) {
    a->offsets[e] = row;
    for (int i = 0; i < a->rank_count; i++) {
      const int32_t *sent = a->sent + (int64_t)i * (a->expert_count + 1);
      int32_t arrived = 0;
      for (int p = 0; p < i; p++) {
        const int32_t *other = a->sent + (int64_t)p * (a->expert_count + 1);
        arrived += other[a->expert_count] - other[0];
      }
      for (int32_t n = sent[e]; n < sent[e + 1]; n++, row++) {
        if (row >= a->row_count) continue;
        a->order[row] = arrived + n - sent[0];
        a->back[arrived + n - sent[0]] = row;
      }
    }
  }
  a->offsets[a->expert_count] = row;
  return MT_OK;
}

mt_err mt_ref_aux_join(struct mt_backend *be, const struct mt_aux_join_args *a) {
  (void)be;
  MT_TRY(mt_check_aux_join(a));
  int64_t n = a->aux_sums.dim[0];
  size_t record = mt_aux_record_bytes(n, a->aux_sums.dtype);
  memset(a->aux_sums.data, 0, mt_bytes(&a->aux_sums));
  memset(a->aux_count, 0, (size_t)(n - 1) * sizeof *a->aux_count);
  *a->valid_count = 0;
  for (int i = 0; i < a->rank_count; i++) {
    char *at = (char *)(uintptr_t)a->records + record * (size_t)i;
    struct mt_tensor sums = mt_vec(at, a->aux_sums.dtype, n);
    const int32_t *count = (const int32_t *)(const void *)(at + mt_bytes(&sums));
    for (int64_t e = 0; e < n; e++)
      ref_put(&a->aux_sums, e, ref_at(&a->aux_sums, e) + ref_at(&sums, e));
    for (int64_t e = 0; e < n - 1; e++) a->aux_count[e] += count[e];
    *a->valid_count += count[n - 1];
  }
  return MT_OK;
}

mt_err mt_ref_parts_sum(struct mt_backend *be, const struct mt_parts_sum_args *a) {
  (void)be;
  MT_TRY(mt_check_parts_sum(a));
  for (int64_t i = 0; i < a->out.dim[0]; i++) {
    double sum = ref_get(&a->parts, 0, i);
    for (int64_t p = 1; p < a->parts.dim[0]; p++) sum += ref_get(&a->parts, p, i);
    ref_put(&a->out, i, a->accumulate ? ref_at(&a->out, i) + sum : sum);
  }
  return MT_OK;
}
