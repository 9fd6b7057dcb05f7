/* RMSNorm with residual add. Formulas: docs/math.md, "RMSNorm". */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_norm_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_rmsnorm_fwd(struct mt_backend *be, const struct mt_rmsnorm_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_rmsnorm_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: rmsnorm_fwd");
}

extern "C" mt_err mt_cuda_rmsnorm_bwd(struct mt_backend *be, const struct mt_rmsnorm_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_rmsnorm_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: rmsnorm_bwd");
}
