/* The experts' own part of a MoE block (moe.c has the rest): gate_up, SwiGLU and down on rows that
 * lie in the experts' order, and back; dense for one expert, grouped over several. */
#ifndef MT_MODEL_EXPERTS_H
#define MT_MODEL_EXPERTS_H

#include "model/layers.h"
#include "quant/linear.h"

/* Everything one call works on, cut to the batch. */
struct mt_moe {
  struct mt_model *m;
  struct mt_backend *be;
  struct mt_layer_acts *l;
  const struct mt_view *v;
  struct mt_param *norm, *router, *gate_up, *down;
  struct mt_route route;
  struct mt_tensor xn, y, prob, gu, xs, ys, h;
  struct mt_tensor row_prob, drow_prob; /* NULL data: prob weighs the outputs instead */
};

/* Rows of one call, all of one chunk: of one expert, or of all (groups of them, device offsets). */
struct mt_moe_span {
  int64_t begin, rows;
  bool accumulate; /* to the weights' gradients */
  bool last;       /* chunk that has rows */
  struct mt_weight_forms w1, w2;
  struct mt_tensor dw1, dw2;
  struct mt_row_groups groups; /* offsets NULL: one expert */
};

/* xs (=) the tokens of rows [begin, begin+rows), unless they have been kept. */
mt_err mt_experts_gather(struct mt_moe *o, int64_t begin, int64_t rows);

/* Tokens are quantized straight from where they lie, both ways: xs is no tensor then, and no dys.
 */
bool mt_experts_quantize_rows(const struct mt_moe *o);

/* gate_up (=) from the tokens; and ys (=) from the tokens, gate_up on the way. */
mt_err mt_experts_up_forward(struct mt_moe *o, const struct mt_moe_span *s);
mt_err mt_experts_forward(struct mt_moe *o, const struct mt_moe_span *s);

/* In: ys holds dys, or dy is quantized on the way. h, drow_prob (=), down's gradient (acc); *dgu
 * (=) what the next two read, which is in gate_up's memory or its operand's. */
mt_err mt_experts_down_backward(struct mt_moe *o, const struct mt_moe_span *s, struct mt_tensor dy,
                                struct mt_operand *dgu);
/* gate_up's gradient (acc). dys has served: where the tokens are gathered again, it is into its
 * memory, xs and ys being one. */
mt_err mt_experts_up_wgrad(struct mt_moe *o, const struct mt_moe_span *s,
                           const struct mt_operand *dgu);
/* ys (=) the gradient of the tokens. */
mt_err mt_experts_up_dgrad(struct mt_moe *o, const struct mt_moe_span *s,
                           const struct mt_operand *dgu);

#endif
