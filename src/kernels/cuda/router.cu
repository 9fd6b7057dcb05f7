/* Router. Formulas: docs/math.md, "Router" and "Auxiliary loss". */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_router_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_router_fwd(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_router_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: router_fwd");
}

extern "C" mt_err mt_cuda_aux_loss(struct mt_backend *be, const struct mt_aux_loss_args *a) {
  (void)be;
  MT_TRY(mt_check_aux_loss(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: aux_loss");
}

extern "C" mt_err mt_cuda_router_bwd(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_router_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: router_bwd");
}
