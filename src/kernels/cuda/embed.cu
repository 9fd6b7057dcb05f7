/* Embedding lookup, its gradient, and the residual add. */
#include "kernels/cuda/device.cuh"

extern "C" mt_err mt_cuda_embed_fwd(struct mt_backend *be, const struct mt_embed_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_embed_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: embed_fwd");
}

extern "C" mt_err mt_cuda_embed_bwd(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_embed_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: embed_bwd");
}

extern "C" mt_err mt_cuda_add(struct mt_backend *be, const struct mt_add_args *a) {
  (void)be;
  MT_TRY(mt_check_add(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: add");
}
