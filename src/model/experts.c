/* What the experts do with rows that lie in their order; shapes in acts.h. */
#include "model/experts.h"

static enum mt_qformat format_of(const struct mt_moe *o) {
  return o->m->acts.moe_format;
}

/* Operand i of the room, empty. */
static struct mt_operand operand(const struct mt_moe *o, int i) {
  return (struct mt_operand){.format = format_of(o), .memory = o->m->acts.moe_operand[i]};
}

mt_err mt_experts_gather(struct mt_moe *o, int64_t begin, int64_t rows) {
  if (o->m->acts.options.over_ranks) return MT_OK;
  return o->be->ops.dispatch_fwd(
      o->be, &(struct mt_dispatch_fwd_args){.x = o->xn,
                                            .row_source = o->route.row_source + begin,
                                            .top_k = o->route.top_k,
                                            .xs = mt_rows(&o->xs, begin, rows)});
}

/* What is under way goes on while products run. */
static mt_err advance(struct mt_moe *o) {
  struct mt_exchange *x = &o->m->exchange;
  return x->advance ? x->advance(x) : MT_OK;
}

/* Routing probabilities of some rows, where there are any. */
static struct mt_tensor prob_rows(const struct mt_tensor *t, int64_t begin, int64_t rows) {
  if (!t->data) return *t;
  return mt_vec((char *)t->data + (size_t)begin * mt_dtype_bytes(t->dtype), t->dtype, rows);
}

/* SwiGLU inside its neighbours: the grouped products that it stands between, or quantizing. */
static bool joined(const struct mt_moe *o, const struct mt_moe_span *s) {
  const struct mt_model_options *m = &o->m->options;
  if (format_of(o) != MT_Q_NONE) return m->experts == MT_EXPERTS_FUSED;
  return s->groups.offsets && (m->experts == MT_EXPERTS_FUSED || m->blocks == MT_BLOCKS_FUSED);
}

bool mt_experts_quantize_rows(const struct mt_moe *o) {
  return format_of(o) != MT_Q_NONE && o->m->options.experts == MT_EXPERTS_FUSED &&
         !o->m->acts.options.over_ranks;
}

/* An operand of dispatched rows: gathered from `tokens`, or (already in expert order) `rows`. */
static mt_err routed_operand(struct mt_moe *o, const struct mt_moe_span *s, struct mt_tensor tokens,
                             struct mt_tensor rows, int sides, struct mt_operand *out) {
  struct mt_row_groups g = s->groups;
  bool gathered = mt_experts_quantize_rows(o);
  if (gathered) {
    g.row_source = o->route.row_source;
    g.top_k = o->route.top_k;
  }
  *out = operand(o, 0);
  return mt_operand_make(o->be, out, gathered ? tokens : rows, s->rows, sides, &g);
}

static const int32_t *row_count(const struct mt_moe_span *s) {
  return s->groups.offsets ? s->groups.offsets + s->groups.count : NULL;
}

mt_err mt_experts_up_forward(struct mt_moe *o, const struct mt_moe_span *s) {
  struct mt_operand x;
  MT_TRY(routed_operand(o, s, o->xn, mt_rows(&o->xs, s->begin, s->rows), MT_SIDE_ROW, &x));
  return mt_product_forward(o->be, &x, &s->w1, mt_rows(&o->gu, s->begin, s->rows));
}

/* SwiGLU of gate_up as down's operand; h is its memory where that is no 8-bit one. */
static mt_err middle_forward(struct mt_moe *o, const struct mt_moe_span *s,
                             struct mt_operand *out) {
  struct mt_tensor gu = mt_rows(&o->gu, s->begin, s->rows), h = mt_rows(&o->h, s->begin, s->rows);
  struct mt_tensor prob = prob_rows(&o->row_prob, s->begin, s->rows);
  *out = operand(o, 2);
  if (joined(o, s)) {
    mt_operand_shape(out, s->rows, h.dim[1], MT_SIDE_ROW, &s->groups);
    return o->be->ops.swiglu_quantize_fwd(
        o->be, &(struct mt_swiglu_quantize_fwd_args){.gate_up = gu,
                                                     .row_prob = prob,
                                                     .offsets = s->groups.offsets,
                                                     .padded = s->groups.padded,
                                                     .group_count = s->groups.count,
                                                     .h = out->q});
  }
  MT_TRY(o->be->ops.swiglu_fwd(
      o->be, &(struct mt_swiglu_fwd_args){
                 .gate_up = gu, .row_prob = prob, .row_count = row_count(s), .h = h}));
  return mt_operand_make(o->be, out, h, s->rows, MT_SIDE_ROW, &s->groups);
}

mt_err mt_experts_forward(struct mt_moe *o, const struct mt_moe_span *s) {
  struct mt_tensor ys = mt_rows(&o->ys, s->begin, s->rows);
  struct mt_tensor rows = mt_rows(&o->h, s->begin, s->rows);
  struct mt_operand h = operand(o, 2);
  if (joined(o, s) && format_of(o) == MT_Q_NONE) {
    MT_TRY(mt_linear_experts_up(o->be, &(struct mt_experts_up_fwd_args){
                                           .x = mt_rows(&o->xs, s->begin, s->rows),
                                           .w = s->w1.w,
                                           .offsets = s->groups.offsets,
                                           .row_prob = prob_rows(&o->row_prob, s->begin, s->rows),
                                           .gate_up = mt_rows(&o->gu, s->begin, s->rows),
                                           .h = rows}));
    MT_TRY(advance(o));
    return mt_linear_forward(o->be, rows, s->w2.w, ys, s->groups.offsets);
  }
  MT_TRY(mt_experts_up_forward(o, s));
  MT_TRY(advance(o));
  MT_TRY(middle_forward(o, s, &h));
  return mt_product_forward(o->be, &h, &s->w2, ys);
}

/* From dh, in h, to the gradient of gate and up and to h again, as the operands of what follows;
 * the former's memory is gate_up where that is no 8-bit one, the latter's h. */
static mt_err middle_backward(struct mt_moe *o, const struct mt_moe_span *s, struct mt_operand *dgu,
                              struct mt_operand *again) {
  struct mt_tensor gu = mt_rows(&o->gu, s->begin, s->rows), h = mt_rows(&o->h, s->begin, s->rows);
  struct mt_tensor prob = prob_rows(&o->row_prob, s->begin, s->rows);
  struct mt_tensor dprob = prob_rows(&o->drow_prob, s->begin, s->rows);
  *dgu = operand(o, 1);
  *again = operand(o, 2);
  if (joined(o, s)) {
    mt_operand_shape(dgu, s->rows, gu.dim[1], MT_SIDE_BOTH, &s->groups);
    mt_operand_shape(again, s->rows, h.dim[1], MT_SIDE_COL, &s->groups);
    return o->be->ops.swiglu_quantize_bwd(
        o->be, &(struct mt_swiglu_quantize_bwd_args){.dh = h,
                                                     .gate_up = gu,
                                                     .row_prob = prob,
                                                     .offsets = s->groups.offsets,
                                                     .padded = s->groups.padded,
                                                     .group_count = s->groups.count,
                                                     .dgate_up = dgu->q,
                                                     .h = again->q,
                                                     .drow_prob = dprob});
  }
  MT_TRY(o->be->ops.swiglu_bwd(o->be, &(struct mt_swiglu_bwd_args){.dh = h,
                                                                   .gate_up = gu,
                                                                   .row_prob = prob,
                                                                   .row_count = row_count(s),
                                                                   .dgate_up = gu,
                                                                   .h = h,
                                                                   .drow_prob = dprob}));
  MT_TRY(mt_operand_make(o->be, dgu, gu, s->rows, MT_SIDE_BOTH, &s->groups));
  return mt_operand_make(o->be, again, h, s->rows, MT_SIDE_COL, &s->groups);
}

/* The operands of everything that follows, from dys, which lies in ys (or, quantized on the way, is
 * the tokens' gradient dy). */
static mt_err down_backward(struct mt_moe *o, const struct mt_moe_span *s, struct mt_tensor dy,
                            struct mt_operand *dys, struct mt_operand *dgu, struct mt_operand *h) {
  struct mt_tensor ys = mt_rows(&o->ys, s->begin, s->rows);
  MT_TRY(routed_operand(o, s, dy, ys, MT_SIDE_BOTH, dys));
  if (joined(o, s) && format_of(o) == MT_Q_NONE) {
    struct mt_tensor gu = mt_rows(&o->gu, s->begin, s->rows);
    struct mt_tensor rows = mt_rows(&o->h, s->begin, s->rows);
    *dgu = operand(o, 1);
    *h = operand(o, 2);
    MT_TRY(mt_linear_experts_down_dgrad(
        o->be, &(struct mt_experts_down_dgrad_args){
                   .dy = ys,
                   .w = s->w2.w,
                   .offsets = s->groups.offsets,
                   .gate_up = gu,
                   .row_prob = prob_rows(&o->row_prob, s->begin, s->rows),
                   .dgate_up = gu,
                   .h = rows,
                   .drow_prob = prob_rows(&o->drow_prob, s->begin, s->rows)}));
    MT_TRY(mt_operand_make(o->be, dgu, gu, s->rows, MT_SIDE_BOTH, &s->groups));
    return mt_operand_make(o->be, h, rows, s->rows, MT_SIDE_COL, &s->groups);
  }
  MT_TRY(mt_product_dgrad(o->be, dys, &s->w2, mt_rows(&o->h, s->begin, s->rows)));
  return middle_backward(o, s, dgu, h);
}

/* Where all experts' gradients are made at once, their squares can be added up with the last of
 * them. */
static double *sumsq_of(const struct mt_param *w, const struct mt_moe_span *s) {
  return w->grad_summed && s->groups.offsets && s->last ? w->grad_sumsq : NULL;
}

mt_err mt_experts_down_backward(struct mt_moe *o, const struct mt_moe_span *s, struct mt_tensor dy,
                                struct mt_operand *dgu) {
  struct mt_operand dys, h;
  MT_TRY(down_backward(o, s, dy, &dys, dgu, &h));
  MT_TRY(advance(o));
  return mt_product_wgrad(o->be, &dys, &h, s->dw2, s->accumulate, sumsq_of(o->down, s));
}

mt_err mt_experts_up_wgrad(struct mt_moe *o, const struct mt_moe_span *s,
                           const struct mt_operand *dgu) {
  struct mt_operand x;
  if (!s->dw1.data) return MT_OK;
  if (!mt_experts_quantize_rows(o)) MT_TRY(mt_experts_gather(o, s->begin, s->rows));
  MT_TRY(routed_operand(o, s, o->xn, mt_rows(&o->xs, s->begin, s->rows), MT_SIDE_COL, &x));
  return mt_product_wgrad(o->be, dgu, &x, s->dw1, s->accumulate, sumsq_of(o->gate_up, s));
}

mt_err mt_experts_up_dgrad(struct mt_moe *o, const struct mt_moe_span *s,
                           const struct mt_operand *dgu) {
  return mt_product_dgrad(o->be, dgu, &s->w1, mt_rows(&o->ys, s->begin, s->rows));
}
