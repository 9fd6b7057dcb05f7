/* Products of the experts together with SwiGLU: the product, then swiglu.cu's pass over its result.
 */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "backend/experts.h"
}

extern "C" mt_err mt_cuda_experts_up_fwd(struct mt_backend *be,
                                         const struct mt_experts_up_fwd_args *a) {
  MT_TRY(mt_check_experts_up_fwd(a));
  struct mt_linear_fwd_args product = mt_experts_up_product(a);
  struct mt_swiglu_fwd_args swiglu = mt_experts_up_swiglu(a);
  MT_TRY(mt_cuda_linear_fwd(be, &product));
  return mt_cuda_swiglu_fwd(be, &swiglu);
}

extern "C" mt_err mt_cuda_experts_down_dgrad(struct mt_backend *be,
                                             const struct mt_experts_down_dgrad_args *a) {
  MT_TRY(mt_check_experts_down_dgrad(a));
  struct mt_linear_dgrad_args product = mt_experts_down_product(a);
  struct mt_swiglu_bwd_args swiglu = mt_experts_down_swiglu(a);
  MT_TRY(mt_cuda_linear_dgrad(be, &product));
  return mt_cuda_swiglu_bwd(be, &swiglu);
}
