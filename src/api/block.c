/* What blocks share, and the plain ones: norm, grouped linear, scaled SwiGLU. */
#include <math.h>
#include <stdlib.h>

#include "api/block_impl.h"

mt_err mt_block_make(struct mt_space *s, const struct mt_block_kind *kind, size_t size_bytes,
                     int64_t in, int64_t out, int64_t groups, struct mt_block **b) {
  enum { MOST = 1 << 24 };
  if (in < 1 || out < 1 || groups < 1 || in > MOST || out > MOST || groups > 65536) {
    return mt_fail(MT_EINVAL, "%s: %lld to %lld columns, %lld groups", kind->name, (long long)in,
                   (long long)out, (long long)groups);
  }
  *b = calloc(1, size_bytes);
  if (!*b) return mt_fail(MT_ENOMEM, "%s", kind->name);
  **b = (struct mt_block){
      .kind = kind, .s = s, .in = (int)in, .out = (int)out, .groups = (int)groups};
  return MT_OK;
}

void mt_block_release(struct mt_block *b) {
  if (!b) return;
  if (b->kind->release) b->kind->release(b);
  for (int i = 0; i < b->weight_count; i++) mt_weight_free(&b->weight[i]);
  free(b);
}

void mt_block_free(mt_block *b) {
  if (b && !b->owned) mt_block_release(b);
}

static mt_err check_info(const struct mt_block *b, int64_t rows, const struct mt_rows_info *i) {
  const struct mt_block_kind *k = b->kind;
  if (k->needs_offsets && !i->offsets) return mt_fail(MT_EINVAL, "%s needs offsets", k->name);
  if (i->offsets && (k->needs_offsets || k->takes_scale))
    MT_TRY(mt_array_check(i->offsets, b->s, "offsets", MT_I32, 1, (int64_t)b->groups + 1, 1));
  if (i->row_scale && k->takes_scale)
    MT_TRY(mt_array_check(i->row_scale, b->s, "row_scale", b->s->full, 1, rows, 1));
  return MT_OK;
}

mt_err mt_block_forward(mt_block *b, const mt_array *x, const struct mt_rows_info *info,
                        mt_array *y) {
  const struct mt_recipe *r = mt_space_recipe(b->s);
  const struct mt_rows_info none = {0};
  int64_t rows = x ? x->t.dim[0] : 0;
  MT_TRY(mt_array_check(x, b->s, "x", r->act, 2, rows, b->in));
  MT_TRY(mt_array_check(y, b->s, "y", r->act, 2, rows, b->out));
  MT_TRY(check_info(b, rows, info ? info : &none));
  MT_TRY(mt_space_reserve(
      b->s,
      &(struct mt_limits){.rows = rows, .hidden = b->in, .ffn = b->out, .experts = b->groups}));
  b->info = info ? *info : none;
  b->x = x;
  b->recipe = r;
  mt_err err = b->kind->forward(b, x, y);
  if (err) b->recipe = NULL;
  return err;
}

mt_err mt_block_backward(mt_block *b, const mt_array *dy, mt_array *dx, mt_array *drow_scale,
                         int accumulate) {
  if (!b->recipe) return mt_fail(MT_EINVAL, "%s: backward without a forward", b->kind->name);
  int64_t rows = b->x->t.dim[0];
  MT_TRY(mt_array_check(dy, b->s, "dy", b->recipe->act, 2, rows, b->out));
  MT_TRY(mt_array_check(dx, b->s, "dx", b->recipe->act, 2, rows, b->in));
  if (dx == dy || dx == b->x) return mt_fail(MT_EINVAL, "dx is an input of the block");
  if (drow_scale) {
    bool takes = b->kind->takes_scale || b->kind == &mt_kind_sequence;
    if (!takes || !b->info.row_scale)
      return mt_fail(MT_EINVAL, "%s had no row_scale to give a gradient", b->kind->name);
    MT_TRY(mt_array_check(drow_scale, b->s, "drow_scale", b->s->full, 1, rows, 1));
  }
  return b->kind->backward(b, dy, dx, drow_scale, accumulate != 0);
}

/* ---- norm ---- */

struct norm {
  struct mt_block b;
  double eps;
  struct mt_array *rstd;
};

static mt_err norm_forward(struct mt_block *b, const struct mt_array *x, struct mt_array *y) {
  struct norm *n = (struct norm *)b;
  struct mt_tensor w;
  MT_TRY(mt_weight_compute(&b->weight[0], b->recipe, &w));
  MT_TRY(mt_array_ensure(b->s, &n->rstd, b->s->full, 1, x->t.dim[0], 1, 1));
  return b->s->be.ops.rmsnorm_fwd(
      &b->s->be, &(struct mt_rmsnorm_fwd_args){
                     .x = x->t, .weight = w, .eps = (float)n->eps, .y = y->t, .rstd = n->rstd->t});
}

static mt_err norm_backward(struct mt_block *b, const struct mt_array *dy, struct mt_array *dx,
                            struct mt_array *drow_scale, int accumulate) {
  struct norm *n = (struct norm *)b;
  struct mt_tensor w;
  (void)drow_scale;
  MT_TRY(mt_weight_compute(&b->weight[0], b->recipe, &w));
  return b->s->be.ops.rmsnorm_bwd(&b->s->be,
                                  &(struct mt_rmsnorm_bwd_args){.dy = dy->t,
                                                                .x = b->x->t,
                                                                .weight = w,
                                                                .rstd = n->rstd->t,
                                                                .dx = dx->t,
                                                                .dweight = b->weight[0].grad->t,
                                                                .accumulate = accumulate});
}

static void norm_release(struct mt_block *b) {
  mt_array_free(((struct norm *)b)->rstd);
}

static const struct mt_block_kind kind_norm = {
    .name = "norm", .forward = norm_forward, .backward = norm_backward, .release = norm_release};

mt_err mt_norm_create(mt_space *s, int width, double eps, mt_block **out) {
  struct mt_block *b = NULL;
  if (!(eps > 0 && eps < 1)) return mt_fail(MT_EINVAL, "norm: eps %g", eps);
  MT_TRY(mt_block_make(s, &kind_norm, sizeof(struct norm), width, width, 1, &b));
  ((struct norm *)b)->eps = eps;
  return mt_block_finish(b, mt_weight_create(s, &b->weight[b->weight_count++], 1, width, 1, 1, 1),
                         out);
}

mt_err mt_block_finish(struct mt_block *b, mt_err err, mt_block **out) {
  if (err)
    mt_block_release(b);
  else
    *out = b;
  return err;
}

/* ---- grouped linear ---- */

static mt_err grouped_forward(struct mt_block *b, const struct mt_array *x, struct mt_array *y) {
  struct mt_tensor w;
  MT_TRY(mt_weight_compute(&b->weight[0], b->recipe, &w));
  return mt_linear_forward(&b->s->be, x->t, w, y->t, mt_array_ints(b->info.offsets));
}

static mt_err grouped_backward(struct mt_block *b, const struct mt_array *dy, struct mt_array *dx,
                               struct mt_array *drow_scale, int accumulate) {
  struct mt_backend *be = &b->s->be;
  const int32_t *offsets = mt_array_ints(b->info.offsets);
  struct mt_tensor w;
  (void)drow_scale;
  MT_TRY(mt_weight_compute(&b->weight[0], b->recipe, &w));
  MT_TRY(mt_linear_wgrad(be, dy->t, b->x->t, b->weight[0].grad->t, offsets, accumulate, NULL));
  return mt_linear_dgrad(be, dy->t, w, dx->t, offsets);
}

const struct mt_block_kind mt_kind_grouped_linear = {.name = "grouped linear",
                                                     .forward = grouped_forward,
                                                     .backward = grouped_backward,
                                                     .needs_offsets = true};

mt_err mt_grouped_linear_create(mt_space *s, int groups, int in, int out_width, mt_block **out) {
  struct mt_block *b = NULL;
  MT_TRY(mt_block_make(s, &mt_kind_grouped_linear, sizeof *b, in, out_width, groups, &b));
  return mt_block_finish(
      b, mt_weight_create(s, &b->weight[b->weight_count++], 3, groups, out_width, in, 0), out);
}

/* ---- scaled SwiGLU ---- */

static const int32_t *row_count(const struct mt_block *b) {
  const int32_t *offsets = mt_array_ints(b->info.offsets);
  return offsets ? offsets + b->groups : NULL;
}

static mt_err swiglu_forward(struct mt_block *b, const struct mt_array *x, struct mt_array *y) {
  return b->s->be.ops.swiglu_fwd(
      &b->s->be, &(struct mt_swiglu_fwd_args){.gate_up = x->t,
                                              .row_prob = mt_array_tensor(b->info.row_scale),
                                              .row_count = row_count(b),
                                              .h = y->t});
}

static mt_err swiglu_backward(struct mt_block *b, const struct mt_array *dy, struct mt_array *dx,
                              struct mt_array *drow_scale, int accumulate) {
  (void)accumulate;
  return b->s->be.ops.swiglu_bwd(
      &b->s->be, &(struct mt_swiglu_bwd_args){.dh = dy->t,
                                              .gate_up = b->x->t,
                                              .row_prob = mt_array_tensor(b->info.row_scale),
                                              .row_count = row_count(b),
                                              .dgate_up = dx->t,
                                              .drow_prob = mt_array_tensor(drow_scale)});
}

const struct mt_block_kind mt_kind_scaled_swiglu = {.name = "scaled SwiGLU",
                                                    .forward = swiglu_forward,
                                                    .backward = swiglu_backward,
                                                    .takes_scale = true};

mt_err mt_scaled_swiglu_create(mt_space *s, int groups, int ffn, mt_block **out) {
  struct mt_block *b = NULL;
  MT_TRY(mt_block_make(s, &mt_kind_scaled_swiglu, sizeof *b, 2 * (int64_t)ffn, ffn, groups, &b));
  *out = b;
  return MT_OK;
}
