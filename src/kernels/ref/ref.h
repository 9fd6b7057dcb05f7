/* The reference backend: what every operation means, in float64 and plain loops, one thread. Reads
 * and writes any storage format; never fast. */
#ifndef MT_KERNELS_REF_REF_H
#define MT_KERNELS_REF_REF_H

#include "backend/check.h"
#include "backend/device.h"

static inline double ref_at(const struct mt_tensor *t, int64_t offset) {
  switch (t->dtype) {
  case MT_F64:
    return ((const double *)t->data)[offset];
  case MT_F32:
    return (double)((const float *)t->data)[offset];
  default:
    return (double)mt_bf16_to_f32(((const uint16_t *)t->data)[offset]);
  }
}

static inline void ref_put(const struct mt_tensor *t, int64_t offset, double x) {
  switch (t->dtype) {
  case MT_F64:
    ((double *)t->data)[offset] = x;
    break;
  case MT_F32:
    ((float *)t->data)[offset] = (float)x;
    break;
  default:
    ((uint16_t *)t->data)[offset] = mt_f32_to_bf16((float)x);
    break;
  }
}

static inline double ref_get(const struct mt_tensor *t, int64_t row, int64_t col) {
  return ref_at(t, row * t->ld + col);
}

static inline void ref_set(const struct mt_tensor *t, int64_t row, int64_t col, double x) {
  ref_put(t, row * t->ld + col, x);
}

/* accumulate 0: =, 1: += */
static inline void ref_acc(const struct mt_tensor *t, int64_t row, int64_t col, double x,
                           int accumulate) {
  ref_set(t, row, col, accumulate ? ref_get(t, row, col) + x : x);
}

/* x rounded to t's storage format. */
static inline double ref_round(const struct mt_tensor *t, double x) {
  if (t->dtype == MT_F64) return x;
  return t->dtype == MT_F32 ? (double)(float)x : (double)mt_bf16_to_f32(mt_f32_to_bf16((float)x));
}

#define X(op) mt_err mt_ref_##op(struct mt_backend *be, const struct mt_##op##_args *a);
MT_OP_LIST(X)
#undef X

#endif
