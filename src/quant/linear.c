#include "quant/linear.h"

mt_err mt_linear_forward(struct mt_backend *be, struct mt_tensor x, struct mt_tensor w,
                         struct mt_tensor y, const int32_t *offsets) {
  return be->ops.linear_fwd(
      be, &(struct mt_linear_fwd_args){.x = x, .w = w, .y = y, .offsets = offsets});
}

mt_err mt_linear_dgrad(struct mt_backend *be, struct mt_tensor dy, struct mt_tensor w,
                       struct mt_tensor dx, const int32_t *offsets) {
  return be->ops.linear_dgrad(
      be, &(struct mt_linear_dgrad_args){.dy = dy, .w = w, .dx = dx, .offsets = offsets});
}

mt_err mt_linear_wgrad(struct mt_backend *be, struct mt_tensor dy, struct mt_tensor x,
                       struct mt_tensor dw, const int32_t *offsets, int accumulate, double *sumsq) {
  if (!dw.data) return MT_OK;
  return be->ops.linear_wgrad(be, &(struct mt_linear_wgrad_args){.dy = dy,
                                                                 .x = x,
                                                                 .dw = dw,
                                                                 .offsets = offsets,
                                                                 .accumulate = accumulate,
                                                                 .sumsq = sumsq});
}

mt_err mt_linear_experts_up(struct mt_backend *be, const struct mt_experts_up_fwd_args *a) {
  return be->ops.experts_up_fwd(be, a);
}

mt_err mt_linear_experts_down_dgrad(struct mt_backend *be,
                                    const struct mt_experts_down_dgrad_args *a) {
  return be->ops.experts_down_dgrad(be, a);
}
