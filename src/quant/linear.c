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

struct mt_weight_forms mt_weight_slice(const struct mt_weight_forms *w, int64_t i) {
  struct mt_weight_forms s = {.w = mt_slice(&w->w, i)};
  if (w->q.format != MT_Q_NONE) s.q = mt_q_slice(&w->q, i);
  return s;
}

/* Parts of one piece of memory, each aligned to 256; without memory they are only counted. */
struct cutter {
  char *base;
  size_t used;
};
static void *cut(struct cutter *c, int64_t bytes) {
  void *p = c->base ? c->base + c->used : NULL;
  c->used += ((size_t)bytes + 255) / 256 * 256;
  return p;
}

static size_t cut_operand(struct mt_qtensor *q, enum mt_qformat format, int64_t rows, int64_t cols,
                          int64_t groups, int sides, void *memory) {
  struct cutter c = {memory, 0};
  int64_t blocks = mt_q_blocks(format, cols), p = mt_q_col_rows(rows, groups);
  *q = (struct mt_qtensor){.format = format, .rank = 2, .dim = {rows, cols, 1}};
  if (sides & MT_SIDE_ROW) {
    q->scale_ld = (rows + 3) / 4 * 4;
    q->row = cut(&c, rows * cols);
    q->row_scale = cut(&c, format == MT_Q_FP8 ? 4 * blocks * q->scale_ld : rows * blocks);
  }
  if (sides & MT_SIDE_COL) {
    q->col_rows = p;
    q->col = cut(&c, p * cols);
    q->col_scale = cut(&c, p / mt_q_block(format) * cols * (format == MT_Q_FP8 ? 4 : 1));
  }
  return c.used;
}

size_t mt_operand_bytes(enum mt_qformat format, int64_t rows, int64_t cols, int64_t groups,
                        int sides) {
  struct mt_qtensor q;
  return format == MT_Q_NONE ? 0 : cut_operand(&q, format, rows, cols, groups, sides, NULL);
}

void mt_operand_shape(struct mt_operand *o, int64_t rows, int64_t cols, int sides,
                      const struct mt_row_groups *groups) {
  o->groups = groups ? *groups : (struct mt_row_groups){.count = 1};
  (void)cut_operand(&o->q, o->format, rows, cols, o->groups.count, sides, o->memory);
}

mt_err mt_operand_make(struct mt_backend *be, struct mt_operand *o, struct mt_tensor x,
                       int64_t rows, int sides, const struct mt_row_groups *groups) {
  o->x = x;
  o->groups = groups ? *groups : (struct mt_row_groups){.count = 1};
  if (o->format == MT_Q_NONE) return MT_OK;
  mt_operand_shape(o, rows, x.dim[1], sides, groups);
  return be->ops.quantize(be, &(struct mt_quantize_args){.x = x,
                                                         .row_source = o->groups.row_source,
                                                         .top_k = o->groups.top_k,
                                                         .offsets = o->groups.offsets,
                                                         .padded = o->groups.padded,
                                                         .group_count = o->groups.count,
                                                         .q = o->q});
}

mt_err mt_product_forward(struct mt_backend *be, const struct mt_operand *x,
                          const struct mt_weight_forms *w, struct mt_tensor y) {
  const int32_t *offsets = x->groups.offsets;
  if (x->format == MT_Q_NONE) return mt_linear_forward(be, x->x, w->w, y, offsets);
  return be->ops.qlinear_fwd(
      be, &(struct mt_qlinear_fwd_args){.x = x->q, .w = w->q, .y = y, .offsets = offsets});
}

mt_err mt_product_dgrad(struct mt_backend *be, const struct mt_operand *dy,
                        const struct mt_weight_forms *w, struct mt_tensor dx) {
  const int32_t *offsets = dy->groups.offsets;
  if (dy->format == MT_Q_NONE) return mt_linear_dgrad(be, dy->x, w->w, dx, offsets);
  return be->ops.qlinear_dgrad(
      be, &(struct mt_qlinear_dgrad_args){.dy = dy->q, .w = w->q, .dx = dx, .offsets = offsets});
}

mt_err mt_product_wgrad(struct mt_backend *be, const struct mt_operand *dy,
                        const struct mt_operand *x, struct mt_tensor dw, int accumulate,
                        double *sumsq) {
  const int32_t *offsets = dy->groups.offsets;
  if (dy->format == MT_Q_NONE)
    return mt_linear_wgrad(be, dy->x, x->x, dw, offsets, accumulate, sumsq);
  if (!dw.data) return MT_OK;
  return be->ops.qlinear_wgrad(be, &(struct mt_qlinear_wgrad_args){.dy = dy->q,
                                                                   .x = x->q,
                                                                   .dw = dw,
                                                                   .offsets = offsets,
                                                                   .padded = dy->groups.padded,
                                                                   .accumulate = accumulate,
                                                                   .sumsq = sumsq});
}

static size_t cut_weight(struct mt_qtensor *q, enum mt_qformat format, int rank, const int64_t *dim,
                         int sides, void *memory) {
  struct cutter c = {memory, 0};
  bool square = format == MT_Q_FP8;
  int64_t g = rank == 3 ? dim[0] : 1, n = dim[rank - 2], k = dim[rank - 1];
  int64_t tall = mt_q_blocks(format, n), wide = mt_q_blocks(format, k);
  *q = (struct mt_qtensor){.format = format, .weight = true, .rank = rank, .dim = {1, 1, 1}};
  for (int i = 0; i < rank; i++) q->dim[i] = dim[i];
  if (sides & MT_SIDE_ROW) {
    q->row = cut(&c, g * n * k);
    q->row_scale = cut(&c, g * (square ? 4 * tall * wide : n * wide));
  }
  if (sides & MT_SIDE_COL) {
    q->col = cut(&c, g * n * k);
    q->col_scale = cut(&c, g * (square ? 4 * tall * wide : tall * k));
  }
  return c.used;
}

size_t mt_qweight_bytes(enum mt_qformat format, int rank, const int64_t *dim, int sides) {
  struct mt_qtensor q;
  return format == MT_Q_NONE ? 0 : cut_weight(&q, format, rank, dim, sides, NULL);
}

void mt_qweight_shape(struct mt_qtensor *q, enum mt_qformat format, int rank, const int64_t *dim,
                      int sides, void *memory) {
  (void)cut_weight(q, format, rank, dim, sides, memory);
}
