/* Spaces, arrays and blocks from the inside. */
#ifndef MT_API_BLOCKS_H
#define MT_API_BLOCKS_H

#include "backend/device.h"
#include "moetune/blocks.h"
#include "quant/recipe.h"

enum { MT_RECIPE_DEPTH = 16, MT_BLOCK_WEIGHTS = 3 };

struct mt_space {
  struct mt_backend be;
  struct mt_limits limits; /* the largest yet; the workspace is for them */
  const struct mt_recipe *recipe[MT_RECIPE_DEPTH + 1];
  int depth;          /* recipe[depth] is in force */
  enum mt_dtype full; /* parameters, gradients, probabilities */
};

struct mt_array {
  struct mt_space *s;
  enum mt_array_kind kind;
  struct mt_tensor t;
  size_t size_bytes;
  uint64_t version; /* how often the host has written it */
};

static inline const struct mt_recipe *mt_space_recipe(const struct mt_space *s) {
  return s->recipe[s->depth];
}

/* Workspace for what a block of these sizes launches: rows of at most `width` columns. */
mt_err mt_space_reserve(struct mt_space *s, const struct mt_limits *l);

/* *a (=) an array of this shape, the old one where it has the format and the room. */
mt_err mt_array_ensure(struct mt_space *s, struct mt_array **a, enum mt_dtype dtype, int rank,
                       int64_t d0, int64_t d1, int64_t d2);
mt_err mt_array_ensure_ints(struct mt_space *s, struct mt_array **a, int64_t n);

/* Whether `a` is of this space, dtype and shape. Errors: MT_EINVAL, MT_ESHAPE naming `what`. */
mt_err mt_array_check(const struct mt_array *a, const struct mt_space *s, const char *what,
                      enum mt_dtype dtype, int rank, int64_t d0, int64_t d1);

/* A parameter: its value and gradient in full precision, and a copy in an activation format. */
struct mt_weight {
  struct mt_array *value, *grad, *rounded;
  uint64_t rounded_version;
};
mt_err mt_weight_create(struct mt_space *s, struct mt_weight *w, int rank, int64_t d0, int64_t d1,
                        int64_t d2, double fill);
void mt_weight_free(struct mt_weight *w);
/* As operations under this recipe read it. */
mt_err mt_weight_compute(struct mt_weight *w, const struct mt_recipe *r, struct mt_tensor *out);

struct mt_block_kind {
  const char *name;
  mt_err (*forward)(struct mt_block *b, const struct mt_array *x, struct mt_array *y);
  mt_err (*backward)(struct mt_block *b, const struct mt_array *dy, struct mt_array *dx,
                     struct mt_array *drow_scale, int accumulate);
  void (*release)(struct mt_block *b); /* what it holds beside weights; or NULL */
  bool needs_offsets, takes_scale;
};

struct mt_block {
  const struct mt_block_kind *kind;
  struct mt_space *s;
  int in, out, groups;
  struct mt_weight weight[MT_BLOCK_WEIGHTS];
  int weight_count;
  bool owned; /* by a sequence */
  /* Of the last forward, for backward. */
  const struct mt_recipe *recipe; /* NULL: there was none */
  const struct mt_array *x;
  struct mt_rows_info info;
};

extern const struct mt_block_kind mt_kind_grouped_linear, mt_kind_scaled_swiglu, mt_kind_sequence;

/* Tensor of an array that may be NULL. */
static inline struct mt_tensor mt_array_tensor(const struct mt_array *a) {
  return a ? a->t : (struct mt_tensor){0};
}
static inline const int32_t *mt_array_ints(const struct mt_array *a) {
  return a ? a->t.data : NULL;
}

#endif
