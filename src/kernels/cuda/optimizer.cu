/* Norm of all gradients and AdamW. Formulas: docs/math.md, "AdamW and clipping". */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_optimizer_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_sumsq(struct mt_backend *be, const struct mt_sumsq_args *a) {
  (void)be;
  MT_TRY(mt_check_sumsq(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: sumsq");
}

extern "C" mt_err mt_cuda_adamw(struct mt_backend *be, const struct mt_adamw_args *a) {
  (void)be;
  MT_TRY(mt_check_adamw(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: adamw");
}
