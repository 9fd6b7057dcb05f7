/* Linear layers: dense products through cuBLASLt, grouped ones through the kernels of grouped_*.cu.
 */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_linear_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_linear_fwd(struct mt_backend *be, const struct mt_linear_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_linear_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: linear_fwd");
}

extern "C" mt_err mt_cuda_linear_dgrad(struct mt_backend *be,
                                       const struct mt_linear_dgrad_args *a) {
  (void)be;
  MT_TRY(mt_check_linear_dgrad(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: linear_dgrad");
}

extern "C" mt_err mt_cuda_linear_wgrad(struct mt_backend *be,
                                       const struct mt_linear_wgrad_args *a) {
  (void)be;
  MT_TRY(mt_check_linear_wgrad(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: linear_wgrad");
}

extern "C" mt_err mt_cuda_gemm(struct mt_backend *be, const struct mt_cuda_product *p) {
  (void)be;
  (void)p;
  return mt_fail(MT_EUNSUPPORTED, "cuda: gemm");
}

extern "C" void mt_cuda_plans_free(struct mt_cuda_plans *plans) {
  (void)plans;
}
