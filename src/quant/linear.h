/* The linear layer by precision recipe: y = x w^T with its dgrad and wgrad, dense (w rank 2) or
 * grouped over experts (w rank 3, offsets on the device). Shapes and semantics are those of
 * linear_fwd, linear_dgrad and linear_wgrad in backend/ops.h.
 *
 * What a recipe adds happens behind these calls: where a weight is held in 8 bits, what it meets is
 * quantized too, into memory that the caller set aside (mt_operand_bytes), and the product is
 * qlinear_*. Above this header a format is only ever passed on. */
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

/* ---- by recipe ---- */

/* A weight in the forms that it has: in 8 bits where q.format is not MT_Q_NONE, else w. */
struct mt_weight_forms {
  struct mt_tensor w;
  struct mt_qtensor q;
};
/* Matrix i of a grouped weight. */
struct mt_weight_forms mt_weight_slice(const struct mt_weight_forms *w, int64_t i);

/* How an operand's rows fall into groups, all device memory; all zero: one group. padded is needed
 * where there are 8 bits (pad_offsets makes it). */
struct mt_row_groups {
  const int32_t *offsets, *padded; /* [count+1] */
  int count;
  const int32_t *row_source; /* the rows are gathered on the way, as quantize says, or NULL */
  int top_k;
};

/* The copies of an operand that a product reads: MT_SIDE_ROW fwd's x and dgrad's dy, MT_SIDE_COL
 * both operands of wgrad. */
enum { MT_SIDE_ROW = 1, MT_SIDE_COL = 2, MT_SIDE_BOTH = 3 };

/* Activations or a gradient, [rows, cols], as products take them. format and memory are the
 * caller's; x is read where format is MT_Q_NONE. */
struct mt_operand {
  enum mt_qformat format;
  void *memory; /* aligned to 256, mt_operand_bytes */
  struct mt_tensor x;
  struct mt_qtensor q;
  struct mt_row_groups groups;
};

/* Bytes of those copies of so many rows in at most so many groups; 0 for MT_Q_NONE. */
size_t mt_operand_bytes(enum mt_qformat format, int64_t rows, int64_t cols, int64_t groups,
                        int sides);

/* o->q (=) an empty operand of this shape in o->memory, for an operation that fills it. groups
 * NULL: one. */
void mt_operand_shape(struct mt_operand *o, int64_t rows, int64_t cols, int sides,
                      const struct mt_row_groups *groups);
/* o becomes x in the recipe's format: quantized into o->memory, or x itself, which must then live
 * as long (and rows are not gathered). rows: of o, x's but where they are gathered. */
mt_err mt_operand_make(struct mt_backend *be, struct mt_operand *o, struct mt_tensor x,
                       int64_t rows, int sides, const struct mt_row_groups *groups);

/* y (=). */
mt_err mt_product_forward(struct mt_backend *be, const struct mt_operand *x,
                          const struct mt_weight_forms *w, struct mt_tensor y);
/* dx (=). */
mt_err mt_product_dgrad(struct mt_backend *be, const struct mt_operand *dy,
                        const struct mt_weight_forms *w, struct mt_tensor dx);
/* As mt_linear_wgrad. */
mt_err mt_product_wgrad(struct mt_backend *be, const struct mt_operand *dy,
                        const struct mt_operand *x, struct mt_tensor dw, int accumulate,
                        double *sumsq);

/* A weight's 8-bit forms: the bytes of its copies, and *q (=) the view of them in memory (which may
 * be NULL while a plan is made). dim and rank as the weight's. */
size_t mt_qweight_bytes(enum mt_qformat format, int rank, const int64_t *dim, int sides);
void mt_qweight_shape(struct mt_qtensor *q, enum mt_qformat format, int rank, const int64_t *dim,
                      int sides, void *memory);

#endif
