/* Tokens to experts and back. Formulas: docs/math.md, "Dispatch and combine". */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_permute_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_permute_plan(struct mt_backend *be,
                                       const struct mt_permute_plan_args *a) {
  (void)be;
  MT_TRY(mt_check_permute_plan(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: permute_plan");
}

extern "C" mt_err mt_cuda_dispatch_fwd(struct mt_backend *be,
                                       const struct mt_dispatch_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_dispatch_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: dispatch_fwd");
}

extern "C" mt_err mt_cuda_dispatch_bwd(struct mt_backend *be,
                                       const struct mt_dispatch_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_dispatch_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: dispatch_bwd");
}

extern "C" mt_err mt_cuda_combine_fwd(struct mt_backend *be, const struct mt_combine_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_combine_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: combine_fwd");
}

extern "C" mt_err mt_cuda_combine_bwd(struct mt_backend *be, const struct mt_combine_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_combine_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: combine_bwd");
}

extern "C" mt_err mt_cuda_scatter_add(struct mt_backend *be, const struct mt_scatter_add_args *a) {
  (void)be;
  MT_TRY(mt_check_scatter_add(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: scatter_add");
}
