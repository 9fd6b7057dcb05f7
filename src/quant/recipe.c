#include "quant/recipe.h"

static const struct mt_recipe recipes[] = {
    /* name, precision, states, act, stat, grad, state, pad, 8 bits, widths, op: 16 units of the
       last place for fp32 (sums of some hundred products), one and a half for bf16 (each output is
       rounded once, inputs are the same), two where what is kept is rounded at random; sum;
       cosines.
     */
    {"fp32", "fp32", "fp32", MT_F32, MT_F32, MT_F32, MT_F32, 8, MT_Q_NONE, 1, 2e-6, 0, 0, 0},
    {"bf16", "bf16", "fp32", MT_BF16, MT_F32, MT_F32, MT_F32, 16, MT_Q_NONE, 1, 6e-3, 0, 0, 0},
    {"bf16-states", "bf16", "bf16", MT_BF16, MT_F32, MT_BF16, MT_BF16, 16, MT_Q_NONE, 1, 8e-3, 0, 0,
     0},
    /* 16 bytes: what Hopper's and the copy engines' rows begin at; a last block may be short. */
    {"fp8", "fp8", "fp32", MT_BF16, MT_F32, MT_F32, MT_F32, 16, MT_Q_FP8, 16, 6e-3, 6e-4, 0.97,
     0.99},
    {"mxfp8", "mxfp8", "fp32", MT_BF16, MT_F32, MT_F32, MT_F32, 16, MT_Q_MXFP8, 32, 6e-3, 0, 0.97,
     0.99},
    /* The rounding of what is kept comes on top of what 8 bits cost, and is smaller. */
    {"fp8-states", "fp8", "bf16", MT_BF16, MT_F32, MT_BF16, MT_BF16, 16, MT_Q_FP8, 16, 8e-3, 6e-4,
     0.97, 0.99},
    {"mxfp8-states", "mxfp8", "bf16", MT_BF16, MT_F32, MT_BF16, MT_BF16, 16, MT_Q_MXFP8, 32, 8e-3,
     0, 0.97, 0.99},
    {"fp64", "fp64", "fp32", MT_F64, MT_F64, MT_F64, MT_F64, 1, MT_Q_NONE, 1, 1e-12, 0, 0, 0},
};

const struct mt_recipe *mt_recipe_find(const char *name) {
  for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++) {
    if (strcmp(recipes[i].name, name) == 0) return &recipes[i];
  }
  return NULL;
}

const struct mt_recipe *mt_recipe_choose(const char *precision, const char *states) {
  for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++) {
    const struct mt_recipe *r = &recipes[i];
    if (strcmp(r->precision, precision) == 0 && strcmp(r->states, states) == 0) return r;
  }
  return NULL;
}
