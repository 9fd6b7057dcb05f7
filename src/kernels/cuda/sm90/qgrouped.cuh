/* Products of FP8 operands on Hopper's tensor cores; sums as backend/ops.h wants them of qlinear_*.
 */
#ifndef MT_KERNELS_CUDA_SM90_QGROUPED_CUH
#define MT_KERNELS_CUDA_SM90_QGROUPED_CUH

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* All elements e4m3, depth contiguous and without gaps; scales float32. G groups by offsets on the
 * device, or one of all rows where those are NULL.
 *   rows   c[r,:] = a[r,:] b[g]^T (+ c)   a [m,k], a_scale [ceil(k/128), a_scale_ld] of row;
 *                                         b [G,n,k], b_scale [G, ceil(n/128), ceil(k/128)];
 *                                         c bf16 [m,n]; rows past offsets[G] are not written
 *   wgrad  c[g] = a_g b_g^T (+ c)         a [m,k], a_scale [k/128, m]; b [n,k], b_scale [k/128, n];
 *                                         group g is columns [offsets[g], offsets[g+1]) of a and b,
 *                                         whole blocks of 128; c bf16 or float32 [G,m,n]
 * accumulate: + c, each element by one writer. Deterministic; asynchronous on the backend's stream.
 * Errors: MT_EDEVICE. */
struct mt_cuda_qgrouped {
  bool wgrad;
  const int32_t *offsets; /* device [groups+1] */
  int groups;
  int64_t m, n, k;
  const uint8_t *a, *b;
  const float *a_scale, *b_scale;
  int64_t a_scale_ld;
  void *c;
  int64_t ldc;
  enum mt_dtype c_dtype;
  int accumulate;
  double *sumsq; /* device [1] (=) sum of squares of c as it is then, or NULL; needs ..._sums */
};
/* False where it does not take this shape or format, or memory that is not aligned to 16 bytes. */
bool mt_cuda_qgrouped_sm90_fits(const struct mt_cuda_qgrouped *p);
/* The same, and whether the backend uses Hopper's kernels. */
bool mt_cuda_qgrouped_sm90_takes(const struct mt_backend *be, const struct mt_cuda_qgrouped *p);
/* Whether it also makes the sum of squares. */
bool mt_cuda_qgrouped_sm90_sums(const struct mt_backend *be, const struct mt_cuda_qgrouped *p);
mt_err mt_cuda_qgrouped_sm90(struct mt_backend *be, const struct mt_cuda_qgrouped *p);

#ifdef __cplusplus
}
#endif

#endif
