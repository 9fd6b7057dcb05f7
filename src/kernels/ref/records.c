/* Rows that travel in 8 bits. */
#include "base/fp8.h"
#include "kernels/ref/ref.h"

mt_err mt_ref_pack_rows(struct mt_backend *be, const struct mt_pack_rows_args *a) {
  (void)be;
  MT_TRY(mt_check_pack_rows(a));
  int64_t b = mt_q_block(a->format), cols = a->x.dim[1];
  int64_t bytes = mt_q_record_bytes(a->format, cols);
  for (int64_t r = 0; r < a->row_count; r++) {
    if (a->row_source && a->row_source[r] < 0) continue;
    int64_t from = a->row_source ? a->row_source[r] / a->top_k : r;
    uint8_t *to = a->records + r * bytes;
    memset(to, 0, (size_t)bytes);
    for (int64_t c = 0; c < cols; c += b) {
      float amax = 0; /* a NaN stays */
      for (int64_t i = c; i < c + b && i < cols; i++) {
        float x = fabsf((float)ref_get(&a->x, from, i));
        if (isnan(x) || x > amax) amax = x;
      }
      uint8_t byte = a->format == MT_Q_FP8 ? mt_fp8_scale(amax) : mt_e8m0_scale(amax);
      to[cols + c / b] = byte;
      for (int64_t i = c; i < c + b && i < cols; i++)
        to[i] = mt_f32_to_e4m3((float)ref_get(&a->x, from, i) * mt_e8m0_inverse(byte));
    }
  }
  return MT_OK;
}

mt_err mt_ref_unpack_rows(struct mt_backend *be, const struct mt_unpack_rows_args *a) {
  (void)be;
  MT_TRY(mt_check_unpack_rows(a));
  int64_t b = mt_q_block(a->format), cols = a->xs.dim[1];
  for (int64_t r = 0; r < a->xs.dim[0]; r++) {
    const uint8_t *from =
        a->records + (a->source ? a->source[r] : r) * mt_q_record_bytes(a->format, cols);
    for (int64_t c = 0; c < cols; c++)
      ref_set(&a->xs, r, c, (double)mt_e4m3_to_f32(from[c]) * mt_e8m0_to_f32(from[cols + c / b]));
  }
  return MT_OK;
}
