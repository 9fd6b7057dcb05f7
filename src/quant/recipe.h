/* Precision recipes: rows of a table. What a recipe stores, how rows are padded, and how far a
 * computation in it may lie from the float64 reference (one place for every tolerance). */
#ifndef MT_QUANT_RECIPE_H
#define MT_QUANT_RECIPE_H

#include "backend/qtensor.h"
#include "base/dtype.h"

struct mt_recipe {
  const char *name;        /* of the row */
  const char *precision;   /* the choices that select it: --precision and */
  const char *states;      /* --optim-state */
  enum mt_dtype act;       /* activations and the weights that operations read */
  enum mt_dtype stat;      /* norms' statistics, router, losses */
  enum mt_dtype grad;      /* parameter gradients */
  enum mt_dtype state;     /* master weights (the weights themselves where this is act), moments */
  int pad_multiple;        /* a packed row is padded to this */
  enum mt_qformat qformat; /* operands of the products in 8 bits; MT_Q_NONE: none */
  int width_multiple;      /* what is contracted over is a multiple of this */
  /* One operation against ref on the same rounded inputs: max|d| / max|ref|. */
  double op_tolerance;
  /* A product of 8-bit operands on tensor cores of their own, before its output is rounded:
   * Hopper's cut what they add at some 14 bits, 128 products at a time. 0: no such product. */
  double sum_tolerance;
  /* A parameter's gradient beside that of float32, from the same weights: cosine at least. 0: held
   * to op_tolerance's order instead. */
  double grad_cosine;
  /* The same where backward's operands alone are in 8 bits. */
  double backward_cosine;
};

/* Parts of a model that a recipe may have in 8 bits, as bits: the projections of the attention,
 * both products of the experts. */
enum { MT_8BIT_ATTENTION = 1, MT_8BIT_EXPERTS = 2 };
static inline bool mt_eight_bits(const struct mt_recipe *r, unsigned part, unsigned skipped) {
  return r->qformat != MT_Q_NONE && !(part & skipped);
}

/* NULL when there is none of this name. "fp64" runs on the reference alone. */
const struct mt_recipe *mt_recipe_find(const char *name);
/* NULL when there is no such precision, or not with these states. */
const struct mt_recipe *mt_recipe_choose(const char *precision, const char *states);

#endif
