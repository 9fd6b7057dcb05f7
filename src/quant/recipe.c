#include "quant/recipe.h"

static const struct mt_recipe recipes[] = {
    /* name, act, stat, grad, pad, op: 16 units of the last place for fp32 (sums of some hundred
       products), one and a half for bf16 (each output is rounded once, inputs are the same). */
    {"fp32", MT_F32, MT_F32, MT_F32, 8, 2e-6},
    {"bf16", MT_BF16, MT_F32, MT_F32, 16, 6e-3},
    {"fp64", MT_F64, MT_F64, MT_F64, 1, 1e-12},
};

const struct mt_recipe *mt_recipe_find(const char *name) {
  for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++) {
    if (strcmp(recipes[i].name, name) == 0) return &recipes[i];
  }
  return NULL;
}
