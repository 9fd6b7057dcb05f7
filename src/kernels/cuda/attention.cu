/* Attention. Formulas: docs/math.md, "Attention". */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_attention_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_attention_fwd(struct mt_backend *be,
                                        const struct mt_attention_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_attention_fwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: attention_fwd");
}

extern "C" mt_err mt_cuda_attention_bwd(struct mt_backend *be,
                                        const struct mt_attention_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_attention_bwd(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: attention_bwd");
}

extern "C" mt_err mt_cuda_attention_cache(struct mt_backend *be,
                                          const struct mt_attention_cache_args *a) {
  (void)be;
  MT_TRY(mt_check_attention_cache(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: attention_cache");
}

extern "C" void mt_cuda_attention_free(struct mt_cuda_attention *attention) {
  (void)attention;
}
