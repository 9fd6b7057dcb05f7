/* experts_up_fwd and experts_down_dgrad as the two operations that each stands for, for backends
 * (or shapes) that have nothing better. The gradient of h passes through the memory of h. */
#ifndef MT_BACKEND_EXPERTS_H
#define MT_BACKEND_EXPERTS_H

#include "backend/ops.h"

static inline struct mt_linear_fwd_args
mt_experts_up_product(const struct mt_experts_up_fwd_args *a) {
  struct mt_linear_fwd_args p = {.x = a->x, .w = a->w, .y = a->gate_up, .offsets = a->offsets};
  return p;
}

static inline struct mt_swiglu_fwd_args
mt_experts_up_swiglu(const struct mt_experts_up_fwd_args *a) {
  struct mt_swiglu_fwd_args s = {.gate_up = a->gate_up,
                                 .row_prob = a->row_prob,
                                 .row_count = a->offsets + a->w.dim[0],
                                 .h = a->h};
  return s;
}

static inline struct mt_linear_dgrad_args
mt_experts_down_product(const struct mt_experts_down_dgrad_args *a) {
  struct mt_linear_dgrad_args p = {
      .dy = a->dy, .w = a->w, .dx = a->h, .offsets = a->offsets, .accumulate = 0};
  return p;
}

static inline struct mt_swiglu_bwd_args
mt_experts_down_swiglu(const struct mt_experts_down_dgrad_args *a) {
  struct mt_swiglu_bwd_args s = {.dh = a->h,
                                 .gate_up = a->gate_up,
                                 .row_prob = a->row_prob,
                                 .row_count = a->offsets + a->w.dim[0],
                                 .dgate_up = a->dgate_up,
                                 .h = a->h,
                                 .drow_prob = a->drow_prob};
  return s;
}

#endif
