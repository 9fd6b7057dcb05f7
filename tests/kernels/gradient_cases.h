/* One case an operation that learns: its forward as a function of leaves, its backward beside it,
 * for differences.h to compare. `way` chooses among optional arguments and routings. */
#ifndef TESTS_KERNELS_GRADIENT_CASES_H
#define TESTS_KERNELS_GRADIENT_CASES_H

#include "kernels/differences.h"

struct size {
  int t, valid, h, f, e, k, v, g, r, d, sequences, window;
};

static const struct size sizes[] = {
    /* t valid h f  e  k  v  g  r  d seq win */
    {1, 1, 3, 2, 1, 1, 5, 1, 1, 2, 1, 0},
    {7, 5, 6, 5, 3, 2, 9, 1, 3, 4, 2, 0},
    {13, 13, 8, 7, 5, 3, 11, 2, 2, 6, 4, 3},
    {12, 10, 5, 9, 4, 1, 17, 3, 1, 8, 3, 2},
};
enum { SIZES = sizeof sizes / sizeof *sizes, WAYS = 6 };

/* The float32 scalars of the interface are the same numbers in forward and backward, so that only
 * h^2 and cancellation remain. */
static const double tolerance = 1e-8;

/* Where the gradient must be added to known values, otherwise overwrites NaN. */
static char mode_of(int accumulate) {
  return accumulate ? 'r' : 'n';
}

static int32_t *random_ids(struct probe *p, int n, int below) {
  int32_t *v = own(p, (size_t)n * sizeof *v);
  for (int i = 0; i < n; i++) v[i] = (int32_t)mt_rng_below(&p->rng, (uint32_t)below);
  return v;
}

static int32_t *one(struct probe *p, int32_t value) {
  int32_t *v = own(p, sizeof *v);
  *v = value;
  return v;
}

/* Cotangent [rows, cols], zero from row `valid` on, where backward reads nothing. */
static struct mt_tensor cotangent(struct probe *p, int64_t rows, int64_t cols, int64_t valid) {
  struct mt_tensor c = mat(p, 'r', rows, cols);
  zero_rows_from(&c, valid);
  return c;
}

struct plan {
  int32_t *offsets, *row_source, *token_row;
  int rows;
};

/* Way 0: expert 0 gets nothing; 1: the last expert gets everything; 2: some choices are -1. */
static struct plan plan_of(struct probe *p, const struct size *z, int way) {
  int n = z->t * z->k;
  int32_t *index = own(p, (size_t)n * sizeof *index);
  for (int i = 0; i < n; i++) {
    int first = z->e > z->k ? 1 : 0, spread = (i / z->k * 7 + i % z->k) % (z->e - first);
    index[i] = way % 3 == 1 ? z->e - 1 : first + spread;
    if (i / z->k >= z->valid || (way % 3 == 2 && i % 4 == 1)) index[i] = -1;
  }
  struct plan r = {.offsets = own(p, (size_t)(z->e + 1) * 4),
                   .row_source = own(p, (size_t)n * 4),
                   .token_row = own(p, (size_t)n * 4)};
  struct mt_permute_plan_args a = {.index = index,
                                   .token_count = z->t,
                                   .top_k = z->k,
                                   .expert_count = z->e,
                                   .offsets = r.offsets,
                                   .row_source = r.row_source,
                                   .token_row = r.token_row};
  apply_permute_plan(p, &a);
  r.rows = r.offsets[z->e];
  return r;
}

static void case_embed(struct probe *p, const struct size *z, int way) {
  int acc = way & 1;
  int32_t *ids = random_ids(p, z->t, z->v);
  struct mt_embed_fwd_args f = {
      .ids = ids, .table = mat(p, 'r', z->v, z->h), .out = mat(p, 'n', z->t, z->h)};
  struct mt_embed_bwd_args b = {.ids = ids,
                                .valid_count = one(p, z->valid),
                                .dout = mat(p, 'r', z->t, z->h),
                                .dtable = mat(p, mode_of(acc), z->v, z->h),
                                .accumulate = acc};
  struct mt_tensor c = mat(p, 'z', z->t, z->h);
  copy(&c, &b.dout);
  zero_rows_from(&c, z->valid);
  leaf(p, "table", f.table, b.dtable, acc);
  output(p, f.out, c);
  apply_embed_bwd(p, &b);
  differences(p, "embed", apply_embed_fwd, &f);
}

/* The gradients of a sum that is used twice meet by the same operation. */
static void case_add(struct probe *p, const struct size *z, int way) {
  struct mt_tensor x = mat(p, 'r', z->t, z->h), c0 = mat(p, 'r', z->t, z->h);
  struct mt_add_args f = {.a = x, .b = mat(p, 'r', z->t, z->h), .y = mat(p, 'n', z->t, z->h)};
  if (way & 1) f.b = x;
  struct mt_add_args b = {.a = c0, .b = c0, .y = mat(p, 'n', z->t, z->h)};
  leaf(p, "a", f.a, way & 1 ? b.y : c0, 0);
  if (!(way & 1)) leaf(p, "b", f.b, c0, 0);
  output(p, f.y, c0);
  apply_add(p, &b);
  differences(p, "add", apply_add, &f);
}

static void case_rmsnorm(struct probe *p, const struct size *z, int way) {
  int acc = way & 1, beside = way >> 1 & 1, in_place = way >> 2 & 1;
  struct mt_rmsnorm_fwd_args f = {.x = mat(p, 'r', z->t, z->h),
                                  .weight = vec(p, 'r', z->h),
                                  .eps = 0.05f,
                                  .sum = mat(p, 'n', z->t, z->h),
                                  .y = mat(p, 'n', z->t, z->h),
                                  .rstd = vec(p, 'n', z->t)};
  if (beside) f.residual = mat(p, 'r', z->t, z->h);
  apply_rmsnorm_fwd(p, &f);
  struct mt_rmsnorm_bwd_args b = {.dy = mat(p, 'r', z->t, z->h),
                                  .x = f.sum,
                                  .weight = f.weight,
                                  .rstd = f.rstd,
                                  .dx = mat(p, 'n', z->t, z->h),
                                  .dweight = vec(p, mode_of(acc), z->h),
                                  .accumulate = acc};
  struct mt_tensor dsum = mat(p, beside ? 'r' : 'z', z->t, z->h);
  output(p, f.y, b.dy);
  output(p, f.sum, dsum);
  if (in_place) copy(&b.dx, &dsum), b.dresidual = b.dx;
  if (!in_place && beside) b.dresidual = dsum;
  leaf(p, "weight", f.weight, b.dweight, acc);
  leaf(p, "x", f.x, b.dx, 0);
  if (beside) leaf(p, "residual", f.residual, b.dx, 0);
  apply_rmsnorm_bwd(p, &b);
  differences(p, "rmsnorm", apply_rmsnorm_fwd, &f);
}

/* Rows past the last group take no part; their gradient keeps what it holds. */
static void case_linear_grouped(struct probe *p, const struct size *z, int way) {
  int acc = way / 3, rows = z->t * z->k;
  struct plan plan = plan_of(p, z, way);
  struct mt_linear_fwd_args f = {.x = sliced(p, 'r', rows, z->h),
                                 .w = cube(p, 'r', z->e, z->f, z->h),
                                 .y = sliced(p, 'n', rows, z->f),
                                 .offsets = plan.offsets};
  struct mt_tensor dy = cotangent(p, rows, z->f, plan.rows);
  struct mt_linear_dgrad_args d = {.dy = dy,
                                   .w = f.w,
                                   .dx = mat(p, mode_of(acc), rows, z->h),
                                   .offsets = plan.offsets,
                                   .accumulate = acc};
  zero_rows_from(&d.dx, plan.rows);
  struct mt_linear_wgrad_args w = {.dy = dy,
                                   .x = f.x,
                                   .dw = cube(p, mode_of(acc), z->e, z->f, z->h),
                                   .offsets = plan.offsets,
                                   .accumulate = acc};
  leaf(p, "x", f.x, d.dx, acc);
  leaf(p, "w", f.w, w.dw, acc);
  output(p, f.y, dy);
  apply_linear_dgrad(p, &d);
  apply_linear_wgrad(p, &w);
  differences(p, "linear, grouped", apply_linear_fwd, &f);
}

static void case_linear_dense(struct probe *p, const struct size *z, int way) {
  int acc = way & 1;
  struct mt_linear_fwd_args f = {.x = sliced(p, 'r', z->t, z->h),
                                 .w = mat(p, 'r', z->f, z->h),
                                 .y = sliced(p, 'n', z->t, z->f)};
  struct mt_tensor dy = sliced(p, 'r', z->t, z->f);
  struct mt_linear_dgrad_args d = {
      .dy = dy, .w = f.w, .dx = mat(p, mode_of(acc), z->t, z->h), .accumulate = acc};
  struct mt_linear_wgrad_args w = {
      .dy = dy, .x = f.x, .dw = mat(p, mode_of(acc), z->f, z->h), .accumulate = acc};
  leaf(p, "x", f.x, d.dx, acc);
  leaf(p, "w", f.w, w.dw, acc);
  output(p, f.y, dy);
  apply_linear_dgrad(p, &d);
  apply_linear_wgrad(p, &w);
  differences(p, "linear, dense", apply_linear_fwd, &f);
}

/* An operation that changes its tensor in place, made a function of another tensor. */
struct in_place {
  struct mt_tensor from, to;
  void *args;
};

static void rope_of_copy(struct probe *p, void *args) {
  struct in_place *x = args;
  copy(&x->to, &x->from);
  apply_rope(p, x->args);
}

static int64_t qkv_width(const struct size *z) {
  return (int64_t)z->g * (z->r + 2) * z->d;
}

static void case_rope(struct probe *p, const struct size *z, int way) {
  double *inv_freq = own(p, (size_t)z->d * sizeof *inv_freq);
  for (int i = 0; i < z->d / 2; i++) inv_freq[i] = pow(100.0, -2.0 * i / z->d);
  struct mt_rope_table_args table = {.positions = random_ids(p, z->t, way ? 50 : 5000),
                                     .inv_freq = inv_freq,
                                     .cos = mat(p, 'n', z->t, z->d / 2),
                                     .sin = mat(p, 'n', z->t, z->d / 2)};
  apply_rope_table(p, &table);
  struct mt_rope_args f = {.qkv = mat(p, 'n', z->t, qkv_width(z)),
                           .cos = table.cos,
                           .sin = table.sin,
                           .kv_heads = z->g,
                           .q_per_kv = z->r,
                           .head_dim = z->d};
  struct mt_rope_args b = f;
  b.qkv = mat(p, 'r', z->t, qkv_width(z));
  b.inverse = 1;
  struct in_place forward = {mat(p, 'r', z->t, qkv_width(z)), f.qkv, &f};
  leaf(p, "qkv", forward.from, b.qkv, 0);
  output(p, f.qkv, b.qkv);
  apply_rope(p, &b);
  differences(p, "rope", rope_of_copy, &forward);
}

/* Packed sequences, the second of three or more empty, with padding behind where there is any. */
static void case_attention(struct probe *p, const struct size *z, int way) {
  int64_t width = (int64_t)z->g * z->r * z->d;
  int32_t *cu = own(p, (size_t)(z->sequences + 1) * sizeof *cu);
  for (int i = 0; i <= z->sequences; i++) cu[i] = z->valid * i / z->sequences;
  if (z->sequences > 2) cu[2] = cu[1];
  struct mt_attention_fwd_args f = {.qkv = mat(p, 'r', z->t, qkv_width(z)),
                                    .cu_seqlens = cu,
                                    .sequence_count = z->sequences,
                                    .kv_heads = z->g,
                                    .q_per_kv = z->r,
                                    .head_dim = z->d,
                                    .window = way & 1 ? 0 : z->window,
                                    .scale = 1 / sqrtf((float)z->d),
                                    .out = mat(p, 'n', z->t, width),
                                    .lse = mat(p, 'n', z->t, (int64_t)z->g * z->r)};
  apply_attention_fwd(p, &f);
  struct mt_attention_bwd_args b = {
      .fwd = f, .dout = mat(p, 'r', z->t, width), .dqkv = mat(p, 'n', z->t, qkv_width(z))};
  leaf(p, "qkv", f.qkv, b.dqkv, 0);
  output(p, f.out, b.dout);
  apply_attention_bwd(p, &b);
  /* The differences overwrite out and lse, which backward has read by now. */
  differences(p, "attention", apply_attention_fwd, &f);
}

struct routing {
  struct mt_router_fwd_args router;
  struct mt_aux_loss_args aux;
  struct mt_tensor other_prob; /* what another layer left in the sums */
  const int32_t *other_count;
  double other_z;
};

static void route(struct probe *p, void *args) {
  struct routing *r = args;
  copy(&r->router.aux_prob, &r->other_prob);
  for (int64_t i = 0; i < r->other_prob.dim[0]; i++) r->router.aux_count[i] = r->other_count[i];
  if (r->router.z_sum.data) *at(&r->router.z_sum, 0) = r->other_z;
  apply_router_fwd(p, &r->router);
  apply_aux_loss(p, &r->aux);
}

/* The auxiliary losses of two layers: this one and one whose sums are given. */
static void case_router(struct probe *p, const struct size *z, int way) {
  int acc = way & 1, renormalize = way >> 1 & 1, with_aux = way >> 2 == 0, with_z = way % 3 != 1;
  float *coef = own(p, sizeof *coef), *z_coef = own(p, sizeof *z_coef);
  *coef = 0.7f;
  *z_coef = 0.4f;
  int32_t *valid = one(p, z->valid), *count = own(p, (size_t)z->e * sizeof *count);
  struct routing r = {
      .other_prob = vec(p, 'r', z->e), .other_count = random_ids(p, z->e, 9), .other_z = 2.5};
  r.router = (struct mt_router_fwd_args){.x = mat(p, 'r', z->t, z->h),
                                         .w = mat(p, 'r', z->e, z->h),
                                         .valid_count = valid,
                                         .renormalize = renormalize,
                                         .logits = mat(p, 'n', z->t, z->e),
                                         .prob = mat(p, 'n', z->t, z->k),
                                         .index = own(p, (size_t)(z->t * z->k) * 4),
                                         .aux_prob = vec(p, 'n', z->e),
                                         .aux_count = count,
                                         .load = own(p, (size_t)z->e * 4)};
  r.aux = (struct mt_aux_loss_args){.aux_prob = r.router.aux_prob,
                                    .aux_count = count,
                                    .valid_count = valid,
                                    .layer_count = 2,
                                    .coef = coef,
                                    .loss = vec(p, 'n', 1),
                                    .grad = vec(p, 'n', z->e)};
  if (with_z) {
    r.router.z_sum = r.aux.z_sum = vec(p, 'n', 1);
    r.aux.z_coef = z_coef;
    r.aux.z_loss = vec(p, 'n', 1);
    r.aux.z_grad = vec(p, 'n', 1);
  }
  route(p, &r);
  struct mt_router_bwd_args b = {.x = r.router.x,
                                 .w = r.router.w,
                                 .valid_count = valid,
                                 .renormalize = renormalize,
                                 .logits = r.router.logits,
                                 .prob = r.router.prob,
                                 .index = r.router.index,
                                 .dprob = mat(p, 'r', z->t, z->k),
                                 .dlogits = mat(p, 'n', z->t, z->e),
                                 .dx = mat(p, mode_of(!acc), z->t, z->h),
                                 .accumulate_dx = !acc,
                                 .dw = mat(p, mode_of(acc), z->e, z->h),
                                 .accumulate = acc};
  struct mt_tensor dloss = vec(p, 'z', 1), dz = vec(p, 'z', 1);
  if (with_aux) {
    b.aux_grad = r.aux.grad;
    *at(&dloss, 0) = (double)*coef;
  }
  if (with_z) {
    b.z_grad = r.aux.z_grad;
    *at(&dz, 0) = (double)*z_coef;
    output(p, r.aux.z_loss, dz);
  }
  leaf(p, "x", b.x, b.dx, !acc);
  leaf(p, "w", b.w, b.dw, acc);
  output(p, r.router.prob, b.dprob);
  output(p, r.aux.loss, dloss);
  apply_router_bwd(p, &b);
  differences(p, "router", route, &r);
}

static void case_aux_loss(struct probe *p, const struct size *z, int way) {
  float *coef = own(p, sizeof *coef);
  *coef = 0.3f;
  struct mt_aux_loss_args f = {.aux_prob = vec(p, 'r', z->e),
                               .aux_count = random_ids(p, z->e, 50),
                               .valid_count = one(p, z->valid),
                               .layer_count = 1 + way,
                               .coef = coef,
                               .loss = vec(p, 'n', 1),
                               .grad = vec(p, 'n', z->e)};
  struct mt_tensor c = vec(p, 'z', 1);
  *at(&c, 0) = (double)*coef;
  leaf(p, "aux_prob", f.aux_prob, f.grad, 0);
  output(p, f.loss, c);
  apply_aux_loss(p, &f);
  differences(p, "aux_loss", apply_aux_loss, &f);
}

static void case_dispatch(struct probe *p, const struct size *z, int way) {
  int acc = way / 3, rows = z->t * z->k;
  struct plan plan = plan_of(p, z, way);
  struct mt_dispatch_fwd_args f = {.x = mat(p, 'r', z->t, z->h),
                                   .row_source = plan.row_source,
                                   .top_k = z->k,
                                   .xs = mat(p, 'n', rows, z->h)};
  struct mt_dispatch_bwd_args b = {.dxs = mat(p, 'n', rows, z->h),
                                   .token_row = plan.token_row,
                                   .top_k = z->k,
                                   .dx = mat(p, mode_of(acc), z->t, z->h),
                                   .accumulate = acc};
  struct mt_tensor c = cotangent(p, rows, z->h, plan.rows);
  for (int64_t i = 0; i < (int64_t)plan.rows * z->h; i++) *at(&b.dxs, i) = *at(&c, i);
  leaf(p, "x", f.x, b.dx, acc);
  output(p, f.xs, c);
  apply_dispatch_bwd(p, &b);
  differences(p, "dispatch", apply_dispatch_fwd, &f);
}

static void case_combine(struct probe *p, const struct size *z, int way) {
  int weighted = way < 3 || way == 5, in_place = way & 1, rows = z->t * z->k;
  struct plan plan = plan_of(p, z, way);
  struct mt_combine_fwd_args f = {.ys = mat(p, 'r', rows, z->h),
                                  .token_row = plan.token_row,
                                  .top_k = z->k,
                                  .y = mat(p, 'n', z->t, z->h)};
  if (weighted) f.prob = mat(p, 'r', z->t, z->k);
  struct mt_combine_bwd_args b = {.dy = mat(p, 'r', z->t, z->h),
                                  .ys = f.ys,
                                  .row_source = plan.row_source,
                                  .prob = f.prob,
                                  .top_k = z->k,
                                  .dys = mat(p, 'n', rows, z->h)};
  if (weighted) b.dprob = mat(p, 'z', z->t, z->k); /* choices without a row keep their zero */
  if (in_place) copy(&b.dys, &f.ys), b.ys = b.dys;
  if (!weighted) b.ys = (struct mt_tensor){0};
  zero_rows_from(&b.dys, plan.rows);
  leaf(p, "ys", f.ys, b.dys, 0);
  if (weighted) leaf(p, "prob", f.prob, b.dprob, 0);
  output(p, f.y, b.dy);
  apply_combine_bwd(p, &b);
  differences(p, "combine", apply_combine_fwd, &f);
}

struct expert_loop {
  struct mt_scatter_add_args all;
  struct plan plan;
  struct mt_tensor before; /* what y holds first */
  int experts;
};

static void scatter_by_expert(struct probe *p, void *args) {
  struct expert_loop *l = args;
  copy(&l->all.y, &l->before);
  for (int e = 0; e < l->experts; e++) {
    int32_t first = l->plan.offsets[e];
    struct mt_scatter_add_args a = l->all;
    a.ys = mt_rows(&l->all.ys, first, l->plan.offsets[e + 1] - first);
    a.row_source = l->plan.row_source + first;
    apply_scatter_add(p, &a);
  }
}

/* Its backward is combine_bwd over the slice of each expert. */
static void case_scatter(struct probe *p, const struct size *z, int way) {
  int rows = z->t * z->k, weighted = way < 4;
  struct expert_loop l = {
      .plan = plan_of(p, z, way % 2 ? 2 : 0), .before = mat(p, 'r', z->t, z->h), .experts = z->e};
  l.all = (struct mt_scatter_add_args){
      .ys = mat(p, 'r', rows, z->h), .top_k = z->k, .y = mat(p, 'n', z->t, z->h)};
  if (weighted) l.all.prob = mat(p, 'r', z->t, z->k);
  struct mt_tensor dy = mat(p, 'r', z->t, z->h), dys = mat(p, 'n', rows, z->h);
  struct mt_tensor dprob = mat(p, 'z', z->t, z->k);
  zero_rows_from(&dys, l.plan.rows);
  leaf(p, "ys", l.all.ys, dys, 0);
  if (weighted) leaf(p, "prob", l.all.prob, dprob, 0);
  leaf(p, "y", l.before, dy, 0);
  output(p, l.all.y, dy);
  for (int e = 0; e < z->e; e++) {
    int32_t first = l.plan.offsets[e], count = l.plan.offsets[e + 1] - first;
    struct mt_combine_bwd_args b = {.dy = dy,
                                    .ys = mt_rows(&l.all.ys, first, count),
                                    .row_source = l.plan.row_source + first,
                                    .prob = l.all.prob,
                                    .top_k = z->k,
                                    .dys = mt_rows(&dys, first, count),
                                    .dprob = dprob};
    apply_combine_bwd(p, &b);
  }
  differences(p, "scatter_add", scatter_by_expert, &l);
}

static void case_swiglu(struct probe *p, const struct size *z, int way) {
  int weighted = way & 1, in_place = way >> 1 & 1, counted = way >> 2;
  int64_t rows = counted ? z->valid : z->t;
  struct mt_swiglu_fwd_args f = {.gate_up = mat(p, 'r', z->t, 2 * z->f),
                                 .row_count = counted ? one(p, z->valid) : NULL,
                                 .h = mat(p, 'n', z->t, z->f)};
  if (weighted) f.row_prob = vec(p, 'r', z->t);
  struct mt_tensor c = cotangent(p, z->t, z->f, rows);
  struct mt_swiglu_bwd_args b = {.dh = mat(p, 'n', z->t, z->f),
                                 .gate_up = f.gate_up,
                                 .row_prob = f.row_prob,
                                 .row_count = f.row_count,
                                 .dgate_up = mat(p, 'z', z->t, 2 * z->f),
                                 .h = mat(p, 'n', z->t, z->f)};
  for (int64_t i = 0; i < rows * z->f; i++) *at(&b.dh, i) = *at(&c, i);
  for (int64_t i = 0; i < rows * 2 * z->f; i++) *at(&b.dgate_up, i) = NAN;
  if (in_place) {
    copy(&b.dgate_up, &f.gate_up), b.gate_up = b.dgate_up, b.h = b.dh;
  }
  if (weighted) b.drow_prob = vec(p, 'z', z->t);
  apply_swiglu_bwd(p, &b);
  zero_rows_from(&b.dgate_up, rows);
  apply_swiglu_fwd(p, &f);
  for (int64_t i = 0; i < rows * z->f; i++) { /* the recomputed h is the forward's */
    if (fabs(*at(&b.h, i) - *at(&f.h, i)) > 1e-14) p->worst = INFINITY;
  }
  leaf(p, "gate_up", f.gate_up, b.dgate_up, 0);
  if (weighted) leaf(p, "row_prob", f.row_prob, b.drow_prob, 0);
  output(p, f.h, c);
  differences(p, "swiglu", apply_swiglu_fwd, &f);
}

/* All of the grouped experts: gate and up, SwiGLU, down. */
struct experts {
  struct mt_experts_up_fwd_args up;
  struct mt_linear_fwd_args down;
};

static void run_experts(struct probe *p, void *args) {
  struct experts *e = args;
  apply_experts_up_fwd(p, &e->up);
  apply_linear_fwd(p, &e->down);
}

static void case_experts(struct probe *p, const struct size *z, int way) {
  int weighted = way >= 3, in_place = way & 1, rows = z->t * z->k;
  struct plan plan = plan_of(p, z, way);
  struct experts e = {.up = {.x = mat(p, 'r', rows, z->h),
                             .w = cube(p, 'r', z->e, 2 * z->f, z->h),
                             .offsets = plan.offsets,
                             .gate_up = mat(p, 'n', rows, 2 * z->f),
                             .h = mat(p, 'n', rows, z->f)}};
  e.down = (struct mt_linear_fwd_args){.x = e.up.h,
                                       .w = cube(p, 'r', z->e, z->h, z->f),
                                       .y = mat(p, 'n', rows, z->h),
                                       .offsets = plan.offsets};
  if (weighted) e.up.row_prob = vec(p, 'r', rows);
  run_experts(p, &e);
  struct mt_tensor dy = cotangent(p, rows, z->h, plan.rows);
  struct mt_experts_down_dgrad_args b = {.dy = dy,
                                         .w = e.down.w,
                                         .offsets = plan.offsets,
                                         .gate_up = e.up.gate_up,
                                         .row_prob = e.up.row_prob,
                                         .dgate_up = mat(p, 'n', rows, 2 * z->f),
                                         .h = mat(p, 'n', rows, z->f)};
  if (in_place) copy(&b.dgate_up, &b.gate_up), b.gate_up = b.dgate_up;
  if (weighted) b.drow_prob = vec(p, 'z', rows);
  apply_experts_down_dgrad(p, &b);
  struct mt_linear_wgrad_args dw2 = {
      .dy = dy, .x = b.h, .dw = cube(p, 'n', z->e, z->h, z->f), .offsets = plan.offsets};
  struct mt_linear_wgrad_args dw1 = {.dy = b.dgate_up,
                                     .x = e.up.x,
                                     .dw = cube(p, 'n', z->e, 2 * z->f, z->h),
                                     .offsets = plan.offsets};
  struct mt_linear_dgrad_args dx = {
      .dy = b.dgate_up, .w = e.up.w, .dx = mat(p, 'z', rows, z->h), .offsets = plan.offsets};
  apply_linear_wgrad(p, &dw2);
  apply_linear_wgrad(p, &dw1);
  apply_linear_dgrad(p, &dx);
  leaf(p, "x", e.up.x, dx.dx, 0);
  leaf(p, "gate and up", e.up.w, dw1.dw, 0);
  leaf(p, "down", e.down.w, dw2.dw, 0);
  if (weighted) leaf(p, "row_prob", e.up.row_prob, b.drow_prob, 0);
  output(p, e.down.y, dy);
  differences(p, "experts", run_experts, &e);
}

static void case_head_loss(struct probe *p, const struct size *z, int way) {
  int acc = way & 1;
  int32_t *labels = random_ids(p, z->t, z->v);
  float *scale = own(p, sizeof *scale);
  struct mt_tensor c = vec(p, 'z', z->t);
  *scale = 0.37f;
  struct mt_head_loss_args f = {.x = mat(p, 'r', z->t, z->h),
                                .w = mat(p, 'r', z->v, z->h),
                                .labels = labels,
                                .loss_scale = scale,
                                .loss = vec(p, 'n', z->t)};
  struct mt_head_loss_args b = f;
  for (int t = 0; t < z->t; t++) {
    if (t >= z->valid || t % 3 == 1) labels[t] = -100;
    *at(&c, t) = (double)*scale; /* of ignored rows too: their loss is a constant */
  }
  b.dx = mat(p, 'n', z->t, z->h);
  b.dw = mat(p, mode_of(acc), z->v, z->h);
  b.accumulate = acc;
  leaf(p, "x", f.x, b.dx, 0);
  leaf(p, "w", f.w, b.dw, acc);
  output(p, f.loss, c);
  apply_head_loss(p, &b);
  differences(p, "head_loss", apply_head_loss, &f);
}

#endif
