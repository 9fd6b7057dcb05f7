/* The linear layer by precision recipe: y = x w^T with its dgrad and wgrad, dense (w rank 2) or
 * grouped over experts (w rank 3, offsets on the device). Shapes and semantics are those of
 * linear_fwd, linear_dgrad and linear_wgrad in backend/ops.h; what a recipe adds (quantized copies,
 * scales, another GEMM) happens behind these calls. */
#ifndef MT_QUANT_LINEAR_H
#define MT_QUANT_LINEAR_H

#include "backend/device.h"

mt_err mt_linear_forward(struct mt_backend *be, struct mt_tensor x, struct mt_tensor w,
                         struct mt_tensor y, const int32_t *offsets);

/* dx (=). */
mt_err mt_linear_dgrad(struct mt_backend *be, struct mt_tensor dy, struct mt_tensor w,
                       struct mt_tensor dx, const int32_t *offsets);

/* dw (acc by accumulate), *sumsq (=) its sum of squares or NULL; does nothing when dw has no memory
 * (a frozen weight). */
mt_err mt_linear_wgrad(struct mt_backend *be, struct mt_tensor dy, struct mt_tensor x,
                       struct mt_tensor dw, const int32_t *offsets, int accumulate, double *sumsq);

/* All experts' products joined with SwiGLU, as experts_up_fwd and experts_down_dgrad. */
mt_err mt_linear_experts_up(struct mt_backend *be, const struct mt_experts_up_fwd_args *a);
mt_err mt_linear_experts_down_dgrad(struct mt_backend *be,
                                    const struct mt_experts_down_dgrad_args *a);

#endif
