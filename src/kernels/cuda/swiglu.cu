/* SwiGLU. Formulas: docs/math.md, "SwiGLU". */
#include "kernels/cuda/device.cuh"

extern "C" mt_err mt_cuda_swiglu_fwd(struct mt_backend *be, const struct mt_swiglu_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_swiglu_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: swiglu_fwd");
}

extern "C" mt_err mt_cuda_swiglu_bwd(struct mt_backend *be, const struct mt_swiglu_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_swiglu_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: swiglu_bwd");
}
