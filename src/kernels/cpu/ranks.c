/* What ranks add up, and the order of what they have sent. */
#include "kernels/cpu/cpu.h"

/* Rows before those of sender i and expert e: of earlier senders and, of its own, experts. */
static int32_t arrived_before(const struct mt_arrival_plan_args *a, int i, int e) {
  int64_t wide = a->expert_count + 1;
  int32_t rows = 0;
  for (int p = 0; p < i; p++) rows += a->sent[p * wide + a->expert_count] - a->sent[p * wide];
  return rows + a->sent[i * wide + e] - a->sent[i * wide];
}

mt_err mt_cpu_arrival_plan(struct mt_backend *be, const struct mt_arrival_plan_args *a) {
  (void)be;
  MT_TRY(mt_check_arrival_plan(a));
  int32_t row = 0;
  for (int e = 0; e < a->expert_count; e++) {
    a->offsets[e] = row;
    for (int i = 0; i < a->rank_count; i++) {
      const int32_t *sent = a->sent + (int64_t)i * (a->expert_count + 1) + e;
      int32_t from = arrived_before(a, i, e), rows = sent[1] - sent[0];
      for (int32_t n = 0; n < rows && row + n < a->row_count; n++) {
        a->order[row + n] = from + n;
        a->back[from + n] = row + n;
      }
      row += rows;
    }
  }
  a->offsets[a->expert_count] = row;
  return MT_OK;
}

mt_err mt_cpu_aux_join(struct mt_backend *be, const struct mt_aux_join_args *a) {
  (void)be;
  MT_TRY(mt_check_aux_join(a));
  MT_TRY(mt_cpu_format("aux_join", &a->aux_sums));
  int64_t n = a->aux_sums.dim[0];
  size_t record = mt_aux_record_bytes(n, MT_F32), sums = mt_bytes(&a->aux_sums);
  float *sum = a->aux_sums.data;
  memset(sum, 0, sums);
  memset(a->aux_count, 0, (size_t)(n - 1) * sizeof *a->aux_count);
  *a->valid_count = 0;
  for (int i = 0; i < a->rank_count; i++) {
    const char *at = (const char *)a->records + record * (size_t)i;
    const float *one = (const float *)(const void *)at;
    const int32_t *count = (const int32_t *)(const void *)(at + sums);
    for (int64_t e = 0; e < n; e++) sum[e] += one[e];
    for (int64_t e = 0; e < n - 1; e++) a->aux_count[e] += count[e];
    *a->valid_count += count[n - 1];
  }
  return MT_OK;
}

mt_err mt_cpu_parts_sum(struct mt_backend *be, const struct mt_parts_sum_args *a) {
  enum { WIDTH = 1024 };
  MT_TRY(mt_check_parts_sum(a));
  /* Only pieces of rows go through a buffer, however wide these are. */
  struct mt_tensor piece = mt_vec(NULL, a->out.dtype, WIDTH);
  MT_TRY(mt_cpu_format("parts_sum", &piece));
  int64_t n = a->out.dim[0];
  struct mt_tensor result = mt_mat(a->out.data, a->out.dtype, 1, n);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t at = 0; at < n; at += WIDTH) {
    float buffer[WIDTH], sum[WIDTH];
    int64_t width = n - at < WIDTH ? n - at : WIDTH;
    for (int64_t p = 0; p < a->parts.dim[0]; p++) {
      struct mt_tensor part = mt_cols(&a->parts, at, width);
      const float *x = cpu_read(&part, p, width, buffer);
      for (int64_t i = 0; i < width; i++) sum[i] = p ? sum[i] + x[i] : x[i];
    }
    if (a->accumulate) {
      struct mt_tensor old = mt_cols(&result, at, width);
      const float *x = cpu_read(&old, 0, width, buffer);
      for (int64_t i = 0; i < width; i++) sum[i] = x[i] + sum[i];
    }
    if (a->out.dtype == MT_F32) {
      memcpy((float *)a->out.data + at, sum, (size_t)width * sizeof *sum);
    } else {
      uint16_t *out = (uint16_t *)a->out.data + at;
      for (int64_t i = 0; i < width; i++) out[i] = mt_f32_to_bf16(sum[i]);
    }
  }
  return MT_OK;
}
