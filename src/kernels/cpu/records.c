/* Rows that travel in 8 bits: a record each, one block of a row at a time. */
#include "base/fp8.h"
#include "kernels/cpu/cpu.h"

enum { BLOCK_MOST = 128 };

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* As an integer: a NaN is larger than all numbers, so it stays. */
static float largest(const float *x, int64_t n) {
  uint32_t top = 0;
  float amax;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, &x[i], 4);
    u &= 0x7fffffffu;
    top = u > top ? u : top;
  }
  memcpy(&amax, &top, 4);
  return amax;
}

static void pack_row(const struct mt_pack_rows_args *a, int64_t row, uint8_t *to) {
  int64_t b = mt_q_block(a->format), cols = a->x.dim[1], blocks = mt_q_blocks(a->format, cols);
  for (int64_t c = 0; c < cols; c += b) {
    float buffer[BLOCK_MOST];
    int64_t n = least(b, cols - c);
    struct mt_tensor part = mt_cols(&a->x, c, n);
    const float *x = cpu_read(&part, row, n, buffer);
    float amax = largest(x, n);
    uint8_t byte = a->format == MT_Q_FP8 ? mt_fp8_scale(amax) : mt_e8m0_scale(amax);
    float by = mt_e8m0_inverse(byte);
    to[cols + c / b] = byte;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[c + i] = mt_f32_to_e4m3(x[i] * by);
  }
  memset(to + cols + blocks, 0, (size_t)(mt_q_record_bytes(a->format, cols) - cols - blocks));
}

mt_err mt_cpu_pack_rows(struct mt_backend *be, const struct mt_pack_rows_args *a) {
  MT_TRY(mt_check_pack_rows(a));
  MT_TRY(mt_cpu_format("pack_rows", &a->x));
  int64_t bytes = mt_q_record_bytes(a->format, a->x.dim[1]);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < a->row_count; r++) {
    int64_t source = a->row_source ? a->row_source[r] : r;
    if (source >= 0) pack_row(a, a->row_source ? source / a->top_k : r, a->records + r * bytes);
  }
  return MT_OK;
}

mt_err mt_cpu_unpack_rows(struct mt_backend *be, const struct mt_unpack_rows_args *a) {
  float number[256];
  MT_TRY(mt_check_unpack_rows(a));
  MT_TRY(mt_cpu_format("unpack_rows", &a->xs));
  for (int i = 0; i < 256; i++) number[i] = mt_e4m3_to_f32((uint8_t)i);
  int64_t b = mt_q_block(a->format), cols = a->xs.dim[1];
  int64_t bytes = mt_q_record_bytes(a->format, cols);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < a->xs.dim[0]; r++) {
    const uint8_t *from = a->records + (a->source ? a->source[r] : r) * bytes;
    for (int64_t c = 0; c < cols; c += b) {
      float buffer[BLOCK_MOST], scale = mt_e8m0_to_f32(from[cols + c / b]);
      int64_t n = least(b, cols - c);
      struct mt_tensor part = mt_cols(&a->xs, c, n);
      float *to = cpu_target(&part, r, buffer);
      for (int64_t i = 0; i < n; i++) to[i] = number[from[c + i]] * scale;
      cpu_write(&part, r, n, to);
    }
  }
  return MT_OK;
}
