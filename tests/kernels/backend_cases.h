/* One case an operation: fresh random inputs of a size, run on the backend under test and on ref,
 * outputs compared. `acc` is the second way: += for =, with optional arguments, in place. */
#ifndef TESTS_KERNELS_BACKEND_CASES_H
#define TESTS_KERNELS_BACKEND_CASES_H

#include "kernels/compare.h"
#include "kernels/sizes.h"

#define ACT          c->recipe->act
#define STAT         c->recipe->stat
#define GRAD         kept_type(c, c->recipe->grad)
#define STATE        kept_type(c, c->recipe->state)
#define A(n, m, ...) dual(c, n, ACT, m, __VA_ARGS__)
#define S(n, m, ...) dual(c, n, STAT, m, __VA_ARGS__)
#define G(n, m, ...) dual(c, n, GRAD, m, __VA_ARGS__)
/* Runs op on both; fields are set by the caller in `dev` and `ref`. */
#define RUN(op)                                                                                    \
  do {                                                                                             \
    OK(c->be->ops.op(c->be, &dev));                                                                \
    if (!c->bits_only) OK(c->ref_be.ops.op(&c->ref_be, &ref));                                     \
  } while (0)
#define ARGS(op, ...)                                                                              \
  struct mt_##op##_args dev, ref;                                                                  \
  memset(&dev, 0, sizeof dev);                                                                     \
  memset(&ref, 0, sizeof ref);                                                                     \
  __VA_ARGS__
#define T(field, x) (dev.field = (x).dev, ref.field = (x).ref)
#define N(field, x) (dev.field = ref.field = (x))

static struct dual_ints random_ids(struct bench_case *c, int n, int below) {
  int32_t *v = own(c, (size_t)n * sizeof *v);
  for (int i = 0; i < n; i++) v[i] = (int32_t)mt_rng_below(&c->rng, (uint32_t)below);
  return ints(c, n, v);
}

static struct dual_ints one(struct bench_case *c, int32_t value) {
  return ints(c, 1, &value);
}

/* Cuts valid rows into sequences, one of them empty where there are three. */
static struct dual_ints lengths(struct bench_case *c, const struct size *z) {
  int32_t *v = own(c, (size_t)(z->sequences + 1) * sizeof *v);
  for (int i = 0; i <= z->sequences; i++)
    v[i] = (int32_t)((int64_t)z->valid * i * i / (z->sequences * z->sequences));
  if (z->sequences == 3) v[1] = 0;
  return ints(c, z->sequences + 1, v);
}

/* Random routing: expert 0 gets nothing where there are several, padding is -1. */
static struct dual_ints routing(struct bench_case *c, const struct size *z) {
  int32_t *v = own(c, (size_t)(z->t * z->k) * sizeof *v);
  for (int t = 0; t < z->t; t++) {
    for (int k = 0; k < z->k; k++) {
      int first = z->e > z->k ? 1 : 0, span = z->e - first;
      v[t * z->k + k] =
          t >= z->valid ? -1 : first + (int)((uint32_t)(t * 7 + k + (t / 3)) % (uint32_t)span);
    }
  }
  return ints(c, (int64_t)z->t * z->k, v);
}

struct plan {
  struct dual_ints index, offsets, row_source, token_row;
  int rows;
};

static struct plan plan_of(struct bench_case *c, const struct size *z) {
  struct plan p = {.index = routing(c, z)};
  p.offsets = ints(c, z->e + 1, NULL);
  p.row_source = ints(c, (int64_t)z->t * z->k, NULL);
  p.token_row = ints(c, (int64_t)z->t * z->k, NULL);
  struct mt_permute_plan_args a = {.index = p.index.dev,
                                   .token_count = z->t,
                                   .top_k = z->k,
                                   .expert_count = z->e,
                                   .offsets = p.offsets.dev,
                                   .row_source = p.row_source.dev,
                                   .token_row = p.token_row.dev};
  OK(c->be->ops.permute_plan(c->be, &a));
  a.index = p.index.ref, a.offsets = p.offsets.ref, a.row_source = p.row_source.ref,
  a.token_row = p.token_row.ref;
  OK(c->ref_be.ops.permute_plan(&c->ref_be, &a));
  p.rows = p.offsets.ref[z->e];
  return p;
}

static void case_embed_fwd(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct dual_ints ids = random_ids(c, z->t, z->v);
  struct dual table = A("table", 'r', 1, z->v, z->h, 0), out = A("out", 'n', 1, z->t, z->h, 0);
  ARGS(embed_fwd, T(table, table); T(out, out); dev.ids = ids.dev; ref.ids = ids.ref;)
  RUN(embed_fwd);
  expect(c, &out);
}

static void case_embed_bwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual_ints ids = random_ids(c, z->t, z->v), valid = one(c, z->valid);
  struct dual dout = A("dout", 'r', 1, z->t, z->h, 0);
  struct dual dtable = G("dtable", acc ? 'r' : 'n', 1, z->v, z->h, 0);
  ARGS(embed_bwd, T(dout, dout); T(dtable, dtable); N(accumulate, acc); dev.ids = ids.dev;
       ref.ids = ids.ref; dev.valid_count = valid.dev; ref.valid_count = valid.ref;)
  RUN(embed_bwd);
  expect(c, &dtable);
}

static void case_add(struct bench_case *c, const struct size *z, int acc) {
  struct dual a = A("a", 'r', 1, z->t, z->h, 0), b = A("b", 'r', 1, z->t, z->h, 0);
  struct dual y = acc ? a : A("y", 'n', 1, z->t, z->h, 0);
  ARGS(add, T(a, a); T(b, b); T(y, y);)
  RUN(add);
  expect(c, &y);
}

static void case_rmsnorm_fwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual x = A("x", 'r', 1, z->t, z->h, 0), res = A("residual", 'r', 1, z->t, z->h, 0);
  struct dual w = A("weight", 'r', 1, z->h, 0, 0), y = A("y", 'n', 1, z->t, z->h, 0);
  struct dual sum = A("sum", 'n', 1, z->t, z->h, 0), rstd = S("rstd", 'n', 1, z->t, 0, 0);
  ARGS(rmsnorm_fwd, T(x, x); T(weight, w); T(y, y); T(rstd, rstd); N(eps, 1e-5f);)
  if (acc) T(residual, res), T(sum, sum);
  RUN(rmsnorm_fwd);
  expect(c, &y);
  expect(c, &rstd);
  if (!acc) return;
  /* bf16: the reference's float64 sum is not rounded where the backend's is. */
  expect(c, &sum);
}

static void case_rmsnorm_bwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual x = A("x", 'r', 1, z->t, z->h, 0), dy = A("dy", 'r', 1, z->t, z->h, 0);
  struct dual w = A("weight", 'r', 1, z->h, 0, 0), rstd = S("rstd", 'r', 1, z->t, 0, 0);
  struct dual dres = A("dresidual", 'r', 1, z->t, z->h, 0);
  struct dual dx = acc ? dres : A("dx", 'n', 1, z->t, z->h, 0);
  struct dual dw = G("dweight", acc ? 'r' : 'n', 1, z->h, 0, 0);
  ARGS(rmsnorm_bwd, T(x, x); T(dy, dy); T(weight, w); T(rstd, rstd); T(dx, dx); T(dweight, dw);
       N(accumulate, acc);)
  if (acc) T(dresidual, dres);
  RUN(rmsnorm_bwd);
  expect(c, &dx);
  expect(c, &dw);
}

/* Grouped when acc is odd: the linear cases run four ways. */
static void linear_shapes(struct bench_case *c, const struct size *z, int grouped, struct plan *p,
                          struct dual *x, struct dual *w, struct dual *y, char xm, char wm, char ym,
                          enum mt_dtype wtype) {
  int rows = z->t;
  if (grouped) {
    *p = plan_of(c, z);
    rows = z->t * z->k;
  }
  *x = A("x", xm, 1, rows, z->h, 0);
  *y = A("y", ym, 1, rows, z->f, 0);
  *w = grouped ? dual(c, "w", wtype, wm, 1, z->e, z->f, z->h)
               : dual(c, "w", wtype, wm, 1, z->f, z->h, 0);
}

static void case_linear_fwd(struct bench_case *c, const struct size *z, int grouped) {
  struct plan p;
  struct dual x, w, y;
  linear_shapes(c, z, grouped, &p, &x, &w, &y, 'r', 'r', 'n', ACT);
  ARGS(linear_fwd, T(x, x); T(w, w); T(y, y);)
  if (grouped) dev.offsets = p.offsets.dev, ref.offsets = p.offsets.ref;
  RUN(linear_fwd);
  expect(c, &y);
}

static void case_linear_dgrad(struct bench_case *c, const struct size *z, int grouped) {
  for (int acc = 0; acc < 2; acc++) {
    struct plan p;
    struct dual dx, w, dy;
    linear_shapes(c, z, grouped, &p, &dx, &w, &dy, acc ? 'r' : 'n', 'r', 'r', ACT);
    ARGS(linear_dgrad, T(dx, dx); T(w, w); T(dy, dy); N(accumulate, acc);)
    if (grouped) dev.offsets = p.offsets.dev, ref.offsets = p.offsets.ref;
    RUN(linear_dgrad);
    expect(c, &dx);
  }
}

static void case_linear_wgrad(struct bench_case *c, const struct size *z, int grouped) {
  for (int acc = 0; acc < 2; acc++) {
    struct plan p;
    struct dual x, dw, dy;
    linear_shapes(c, z, grouped, &p, &x, &dw, &dy, 'r', acc ? 'r' : 'n', 'r', GRAD);
    ARGS(linear_wgrad, T(x, x); T(dw, dw); T(dy, dy); N(accumulate, acc);)
    if (grouped) dev.offsets = p.offsets.dev, ref.offsets = p.offsets.ref;
    struct dual sumsq = dual(c, "sumsq", MT_F64, 'n', 1, 1, 0, 0);
    dev.sumsq = sumsq.dev.data, ref.sumsq = sumsq.ref.data;
    RUN(linear_wgrad);
    expect(c, &dw);
    expect(c, &sumsq);
  }
}

static void case_router_fwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual x = A("x", 'r', 1, z->t, z->h, 0), w = A("w", 'r', 0.3, z->e, z->h, 0);
  struct dual logits = S("logits", 'n', 1, z->t, z->e, 0), prob = S("prob", 'n', 1, z->t, z->k, 0);
  struct dual aux = S("aux_prob", 'r', 1, z->e, 0, 0), z_sum = S("z_sum", 'r', 1, 1, 0, 0);
  struct dual_ints valid = one(c, z->valid), index = ints(c, (int64_t)z->t * z->k, NULL);
  struct dual_ints count = random_ids(c, z->e, 9), load = ints(c, z->e, NULL);
  ARGS(router_fwd, T(x, x); T(w, w); T(logits, logits); T(prob, prob); T(aux_prob, aux);
       N(renormalize, acc); dev.valid_count = valid.dev; ref.valid_count = valid.ref;
       dev.index = index.dev; ref.index = index.ref; dev.aux_count = count.dev;
       ref.aux_count = count.ref; dev.load = load.dev; ref.load = load.ref;)
  if (acc) T(z_sum, z_sum);
  RUN(router_fwd);
  expect(c, &logits);
  expect(c, &prob);
  expect(c, &aux);
  if (acc) expect(c, &z_sum);
  expect_ints(c, "index", &index);
  expect_ints(c, "aux_count", &count);
  expect_ints(c, "load", &load);
}

static void case_aux_loss(struct bench_case *c, const struct size *z, int acc) {
  struct dual z_sum = S("z_sum", 'r', 9, 1, 0, 0), z_loss = S("z_loss", 'n', 1, 1, 0, 0);
  struct dual z_grad = S("z_grad", 'n', 1, 1, 0, 0);
  struct dual prob = S("aux_prob", 'r', 1, z->e, 0, 0), loss = S("loss", 'n', 1, 1, 0, 0);
  struct dual grad = S("grad", 'n', 1, z->e, 0, 0);
  struct dual_ints count = random_ids(c, z->e, 50), valid = one(c, z->valid);
  const float small = 0.02f;
  struct dual_value coef = dual_value(c, &small, sizeof small);
  ARGS(aux_loss, T(aux_prob, prob); T(loss, loss); T(grad, grad); N(layer_count, 3); T(coef, coef);
       dev.aux_count = count.dev; ref.aux_count = count.ref; dev.valid_count = valid.dev;
       ref.valid_count = valid.ref;)
  if (acc) {
    T(z_sum, z_sum);
    T(z_loss, z_loss);
    T(z_grad, z_grad);
    T(z_coef, coef);
  }
  RUN(aux_loss);
  expect_scaled(c, &loss, 4); /* a sum of few terms of both signs */
  expect(c, &grad);
  if (!acc) return;
  expect(c, &z_loss);
  expect(c, &z_grad);
}

static void case_router_bwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual x = A("x", 'r', 1, z->t, z->h, 0), w = A("w", 'r', 0.3, z->e, z->h, 0);
  struct dual logits = S("logits", 'n', 1, z->t, z->e, 0), prob = S("prob", 'n', 1, z->t, z->k, 0);
  struct dual aux = S("aux_prob", 'z', 1, z->e, 0, 0),
              aux_grad = S("aux_grad", 'r', 0.1, z->e, 0, 0);
  struct dual dprob = S("dprob", 'r', 1, z->t, z->k, 0);
  struct dual dlogits = S("dlogits", 'n', 1, z->t, z->e, 0);
  struct dual dx = A("dx", acc ? 'r' : 'n', 1, z->t, z->h, 0);
  struct dual dw = G("dw", acc ? 'r' : 'n', 1, z->e, z->h, 0);
  struct dual_ints valid = one(c, z->valid), index = ints(c, (int64_t)z->t * z->k, NULL);
  struct dual_ints count = ints(c, z->e, NULL), load = ints(c, z->e, NULL);
  {
    ARGS(router_fwd, T(x, x); T(w, w); T(logits, logits); T(prob, prob); T(aux_prob, aux);
         N(renormalize, acc); dev.valid_count = valid.dev; ref.valid_count = valid.ref;
         dev.index = index.dev; ref.index = index.ref; dev.aux_count = count.dev;
         ref.aux_count = count.ref; dev.load = load.dev; ref.load = load.ref;)
    RUN(router_fwd);
  }
  ARGS(router_bwd, T(x, x); T(w, w); T(logits, logits); T(prob, prob); T(dprob, dprob);
       T(dlogits, dlogits); T(dx, dx); T(dw, dw); N(renormalize, acc); N(accumulate_dx, acc);
       N(accumulate, acc); dev.valid_count = valid.dev; ref.valid_count = valid.ref;
       dev.index = index.dev; ref.index = index.ref;)
  if (acc) T(aux_grad, aux_grad);
  struct dual z_grad = S("z_grad", 'r', 0.1, 1, 0, 0);
  if (acc) T(z_grad, z_grad);
  RUN(router_bwd);
  /* Differences of nearly equal probabilities, in float32 whatever the storage. */
  expect_scaled(c, &dlogits, c->recipe->act == MT_F32 ? 4 : 1);
  expect_scaled(c, &dx, 2);
  expect_scaled(c, &dw, 2);
}

static void case_permute_plan(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct plan p = plan_of(c, z);
  expect_ints(c, "offsets", &p.offsets);
  expect_ints(c, "row_source", &p.row_source);
  expect_ints(c, "token_row", &p.token_row);
}

/* Senders of uneven amounts; some send nothing for an expert, some nothing at all, and what they
 * count from is their own. `acc`: nobody sends anything. */
static void case_arrival_plan(struct bench_case *c, const struct size *z, int acc) {
  int ranks = z->r, wide = z->e + 1;
  int32_t *v = own(c, (size_t)(ranks * wide) * sizeof *v);
  int64_t rows = 0;
  for (int i = 0; i < ranks; i++) {
    v[i * wide] = 5 * i;
    for (int e = 0; e < z->e; e++) {
      int some = acc || (ranks > 2 && i == 1) ? 0 : (i * 5 + e * 3 + z->t) % 4 * (z->t / 3);
      v[i * wide + e + 1] = v[i * wide + e] + some;
      rows += some;
    }
  }
  struct dual_ints sent = ints(c, ranks * wide, v), offsets = ints(c, wide, NULL);
  struct dual_ints order = ints(c, rows + 3, NULL), back = ints(c, rows + 3, NULL);
  ARGS(arrival_plan, N(rank_count, ranks); N(expert_count, z->e); N(row_count, rows);
       dev.sent = sent.dev; ref.sent = sent.ref; dev.offsets = offsets.dev;
       ref.offsets = offsets.ref; dev.order = order.dev; ref.order = order.ref; dev.back = back.dev;
       ref.back = back.ref;)
  RUN(arrival_plan);
  expect_ints(c, "offsets", &offsets);
  expect_ints(c, "order", &order);
  expect_ints(c, "back", &back);
}

/* Records differ in the width of their statistics. */
static void case_aux_join(struct bench_case *c, const struct size *z, int acc) {
  int ranks = acc ? z->r : 1, n = z->e + 1;
  struct dual sums = S("aux_sums", 'n', 1, n, 0, 0);
  struct dual_ints count = ints(c, z->e, NULL), valid = ints(c, 1, NULL);
  const enum mt_dtype stat[2] = {STAT, MT_F64};
  char *record[2];
  for (int s = 0; s < 2; s++) record[s] = own(c, (size_t)ranks * mt_aux_record_bytes(n, stat[s]));
  for (int i = 0; i < ranks; i++) {
    struct dual one = S("one", 'r', 1, n, 0, 0);
    for (int s = 0; s < 2; s++) {
      char *at = record[s] + (size_t)i * mt_aux_record_bytes(n, stat[s]);
      mt_dtype_convert(at, stat[s], one.ref.data, MT_F64, (size_t)n);
      int32_t *counts = (int32_t *)(void *)(at + (size_t)n * mt_dtype_bytes(stat[s]));
      for (int k = 0; k < n; k++) counts[k] = i * 1000 + k * 7 + 1;
    }
  }
  struct dual_value records =
      dual_value(c, record[0], (size_t)ranks * mt_aux_record_bytes(n, stat[0]));
  ARGS(aux_join, T(aux_sums, sums); N(rank_count, ranks); dev.records = records.dev;
       ref.records = record[1]; dev.aux_count = count.dev; ref.aux_count = count.ref;
       dev.valid_count = valid.dev; ref.valid_count = valid.ref;)
  RUN(aux_join);
  expect(c, &sums);
  expect_ints(c, "aux_count", &count);
  expect_ints(c, "valid_count", &valid);
}

/* Also of a width that 16 bytes do not divide. */
static void case_parts_sum(struct bench_case *c, const struct size *z, int acc) {
  for (int odd = 0; odd < 2; odd++) {
    int64_t n = (int64_t)z->h * z->f / 8 * 8 + (odd ? 3 : 0);
    struct dual parts = G("parts", 'r', 1, z->r + 1, n, 0);
    struct dual out = G("out", acc ? 'r' : 'n', 1, n, 0, 0);
    ARGS(parts_sum, T(parts, parts); T(out, out); N(accumulate, acc);)
    RUN(parts_sum);
    expect(c, &out);
  }
}

#define PLAN_ROWS   dev.row_source = p.row_source.dev, ref.row_source = p.row_source.ref
#define PLAN_TOKENS dev.token_row = p.token_row.dev, ref.token_row = p.token_row.ref

static void case_dispatch_fwd(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct plan p = plan_of(c, z);
  struct dual x = A("x", 'r', 1, z->t, z->h, 0), xs = A("xs", 'n', 1, z->t * z->k, z->h, 0);
  ARGS(dispatch_fwd, T(x, x); T(xs, xs); N(top_k, z->k); PLAN_ROWS;)
  RUN(dispatch_fwd);
  expect(c, &xs);
}

static void case_dispatch_bwd(struct bench_case *c, const struct size *z, int acc) {
  struct plan p = plan_of(c, z);
  struct dual dxs = A("dxs", 'r', 1, z->t * z->k, z->h, 0);
  struct dual dx = A("dx", acc ? 'r' : 'n', 1, z->t, z->h, 0);
  ARGS(dispatch_bwd, T(dxs, dxs); T(dx, dx); N(top_k, z->k); N(accumulate, acc); PLAN_TOKENS;)
  RUN(dispatch_bwd);
  expect(c, &dx);
}

static void case_combine_fwd(struct bench_case *c, const struct size *z, int acc) {
  struct plan p = plan_of(c, z);
  struct dual ys = A("ys", 'r', 1, z->t * z->k, z->h, 0), y = A("y", 'n', 1, z->t, z->h, 0);
  struct dual prob = S("prob", 'r', 1, z->t, z->k, 0);
  ARGS(combine_fwd, T(ys, ys); T(y, y); N(top_k, z->k); PLAN_TOKENS;)
  if (acc) T(prob, prob);
  RUN(combine_fwd);
  expect(c, &y);
}

static void case_combine_bwd(struct bench_case *c, const struct size *z, int acc) {
  struct plan p = plan_of(c, z);
  struct dual dy = A("dy", 'r', 1, z->t, z->h, 0), ys = A("ys", 'r', 1, z->t * z->k, z->h, 0);
  struct dual prob = S("prob", 'r', 1, z->t, z->k, 0), dprob = S("dprob", 'n', 1, z->t, z->k, 0);
  struct dual dys = acc ? ys : A("dys", 'n', 1, z->t * z->k, z->h, 0);
  ARGS(combine_bwd, T(dy, dy); T(ys, ys); T(prob, prob); T(dys, dys); T(dprob, dprob);
       N(top_k, z->k); PLAN_ROWS;)
  RUN(combine_bwd);
  expect(c, &dys);
  expect(c, &dprob);
}

static void case_scatter_add(struct bench_case *c, const struct size *z, int acc) {
  struct size single = *z;
  single.k = 1; /* rows of one expert hold a token once */
  struct plan p = plan_of(c, &single);
  struct dual ys = A("ys", 'r', 1, z->t, z->h, 0), y = A("y", 'r', 1, z->t, z->h, 0);
  struct dual prob = S("prob", 'r', 1, z->t, 1, 0);
  ARGS(scatter_add, T(ys, ys); T(y, y); N(top_k, 1); PLAN_ROWS;)
  if (acc) T(prob, prob);
  RUN(scatter_add);
  expect(c, &y);
}

static void case_swiglu_fwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual gu = A("gate_up", 'r', 2, z->t, 2 * z->f, 0), h = A("h", 'n', 1, z->t, z->f, 0);
  struct dual prob = S("row_prob", 'r', 1, z->t, 0, 0);
  struct dual_ints rows = one(c, z->valid);
  ARGS(swiglu_fwd, T(gate_up, gu); T(h, h); dev.row_count = rows.dev; ref.row_count = rows.ref;)
  if (acc) T(row_prob, prob);
  RUN(swiglu_fwd);
  expect(c, &h);
}

static void case_swiglu_bwd(struct bench_case *c, const struct size *z, int acc) {
  struct dual gu = A("gate_up", 'r', 2, z->t, 2 * z->f, 0), dh = A("dh", 'r', 1, z->t, z->f, 0);
  struct dual prob = S("row_prob", 'r', 1, z->t, 0, 0), dprob = S("drow_prob", 'n', 1, z->t, 0, 0);
  /* In place where the model works in place. */
  struct dual dgu = acc ? gu : A("dgate_up", 'n', 1, z->t, 2 * z->f, 0);
  struct dual h = acc ? dh : A("h", 'n', 1, z->t, z->f, 0);
  struct dual_ints rows = one(c, z->valid);
  ARGS(swiglu_bwd, T(gate_up, gu); T(dh, dh); T(dgate_up, dgu); T(h, h); dev.row_count = rows.dev;
       ref.row_count = rows.ref;)
  if (!acc) T(row_prob, prob), T(drow_prob, dprob);
  RUN(swiglu_bwd);
  expect(c, &dgu);
  expect(c, &h);
  if (!acc) expect(c, &dprob);
}

/* Way 1: with row_prob. */
static void case_experts_up_fwd(struct bench_case *c, const struct size *z, int acc) {
  struct plan p = plan_of(c, z);
  int rows = z->t * z->k;
  struct dual x = A("x", 'r', 1, rows, z->h, 0), w = A("w", 'r', 0.3, z->e, 2 * z->f, z->h);
  struct dual prob = S("row_prob", 'r', 1, rows, 0, 0);
  struct dual gu = A("gate_up", 'n', 1, rows, 2 * z->f, 0), h = A("h", 'n', 1, rows, z->f, 0);
  ARGS(experts_up_fwd, T(x, x); T(w, w); T(gate_up, gu); T(h, h); dev.offsets = p.offsets.dev;
       ref.offsets = p.offsets.ref;)
  if (acc) T(row_prob, prob);
  RUN(experts_up_fwd);
  expect(c, &gu);
  expect_scaled(c, &h, ACT == MT_BF16 ? 1.5 : 4); /* of gate and up with their own errors */
}

/* Way 1: in place, without the probabilities. */
static void case_experts_down_dgrad(struct bench_case *c, const struct size *z, int acc) {
  struct plan p = plan_of(c, z);
  int rows = z->t * z->k;
  struct dual dy = A("dy", 'r', 1, rows, z->h, 0), w = A("w", 'r', 0.3, z->e, z->h, z->f);
  struct dual gu = A("gate_up", 'r', 2, rows, 2 * z->f, 0);
  struct dual prob = S("row_prob", 'r', 1, rows, 0, 0);
  struct dual dgu = acc ? gu : A("dgate_up", 'n', 1, rows, 2 * z->f, 0);
  struct dual h = A("h", 'n', 1, rows, z->f, 0), dprob = S("drow_prob", 'n', 1, rows, 0, 0);
  ARGS(experts_down_dgrad, T(dy, dy); T(w, w); T(gate_up, gu); T(dgate_up, dgu); T(h, h);
       dev.offsets = p.offsets.dev; ref.offsets = p.offsets.ref;)
  if (!acc) T(row_prob, prob), T(drow_prob, dprob);
  RUN(experts_down_dgrad);
  expect_scaled(c, &dgu, ACT == MT_BF16 ? 1.5 : 2); /* of dh with its own error */
  expect(c, &h);
  if (!acc) expect(c, &dprob);
}

static void case_head_loss(struct bench_case *c, const struct size *z, int acc) {
  int32_t *labels = own(c, (size_t)z->t * sizeof *labels);
  for (int t = 0; t < z->t; t++) {
    bool target = t < z->valid && t % 3 != 1;
    labels[t] = target ? (int32_t)mt_rng_below(&c->rng, (uint32_t)z->v) : -100;
  }
  struct dual_ints label = ints(c, z->t, labels), correct = ints(c, z->t, NULL);
  struct dual x = A("x", 'r', 1, z->t, z->h, 0), w = A("w", 'r', 0.3, z->v, z->h, 0);
  struct dual loss = S("loss", 'n', 1, z->t, 0, 0), dx = A("dx", 'n', 1, z->t, z->h, 0);
  struct dual dw = G("dw", acc ? 'r' : 'n', 1, z->v, z->h, 0);
  const float quarter = 0.25f;
  struct dual_value scale = dual_value(c, &quarter, sizeof quarter);
  ARGS(head_loss, T(x, x); T(w, w); T(loss, loss); T(dx, dx); T(dw, dw); N(accumulate, acc);
       T(loss_scale, scale); dev.labels = label.dev; ref.labels = label.ref;
       dev.correct = correct.dev; ref.correct = correct.ref;)
  RUN(head_loss);
  expect(c, &loss);
  expect(c, &dx);
  expect(c, &dw);
  expect_ints(c, "correct", &correct);
}

static void case_tally(struct bench_case *c, const struct size *z, int acc) {
  struct dual_ints correct = random_ids(c, z->t, 2), load = random_ids(c, z->e, 900);
  struct dual_ints load_sums = random_ids(c, z->e, 900);
  struct dual loss = S("loss", 'r', 1, z->t, 0, 0), aux = S("aux", 'r', 1, 1, 0, 0);
  struct dual z_loss = S("z_loss", 'r', 1, 1, 0, 0);
  struct dual sums = dual(c, "sums", MT_F64, acc ? 'r' : 'n', 1, 4, 0, 0);
  const double share = 0.3;
  struct dual_value weight = dual_value(c, &share, sizeof share);
  ARGS(tally, T(loss, loss); T(aux, aux); T(aux_weight, weight); N(accumulate, acc);
       N(load_count, z->e); dev.correct = correct.dev; ref.correct = correct.ref;
       dev.load = load.dev; ref.load = load.ref; dev.load_sums = load_sums.dev;
       ref.load_sums = load_sums.ref; dev.sums = sums.dev.data; ref.sums = sums.ref.data;)
  if (acc) T(z_loss, z_loss);
  RUN(tally);
  expect(c, &sums);
  expect_ints(c, "load_sums", &load_sums);
}

static void case_sumsq(struct bench_case *c, const struct size *z, int acc) {
  struct dual x = G("x", 'r', 1, z->t, z->h, 0), y = G("y", 'r', 1, z->e, z->f, z->h);
  struct dual out = dual(c, "out", MT_F64, 'n', 1, 1, 0, 0);
  struct mt_tensor dev_list[2] = {x.dev, y.dev}, ref_list[2] = {x.ref, y.ref};
  ARGS(sumsq, dev.tensors = dev_list; ref.tensors = ref_list; N(tensor_count, 2);
       dev.out = out.dev.data; ref.out = out.ref.data;)
  if (acc) {
    struct dual parts = dual(c, "parts", MT_F64, 'r', 1e3, 1500, 0, 0);
    dev.parts = parts.dev.data, ref.parts = parts.ref.data;
    N(part_count, z->t == 1 ? 1 : 1500);
  }
  RUN(sumsq);
  expect(c, &out);
}

static void case_adamw(struct bench_case *c, const struct size *z, int acc) {
  int64_t n = (int64_t)z->h * z->f + 3;
  bool copied = ACT != STATE && ACT == MT_BF16;
  struct mt_adamw_segment dev_seg[2], ref_seg[2];
  struct dual part[2][5];
  for (int i = 0; i < 2; i++) {
    part[i][0] = dual(c, "master", STATE, 'r', 1, n, 0, 0);
    part[i][1] = G("grad", 'r', 1e-3, n, 0, 0);
    part[i][2] = dual(c, "m", STATE, 'r', 1e-3, n, 0, 0);
    part[i][3] = dual(c, "v", STATE, 'r', 1e-3, n, 0, 0);
    part[i][4] = A("compute", 'n', 1, n, 0, 0);
    double *v = part[i][3].ref.data;
    for (int64_t k = 0; k < n; k++) v[k] = (double)(float)(v[k] * v[k]);
    void *raw = own(c, mt_bytes(&part[i][3].dev));
    mt_dtype_convert(raw, STATE, v, MT_F64, (size_t)n);
    mt_dtype_convert(v, MT_F64, raw, STATE, (size_t)n);
    OK(c->be->upload(c->be, part[i][3].dev.data, raw, mt_bytes(&part[i][3].dev)));
    for (int s = 0; s < 2; s++) {
      struct mt_adamw_segment *seg = s ? &ref_seg[i] : &dev_seg[i];
      *seg = (struct mt_adamw_segment){.master = s ? part[i][0].ref : part[i][0].dev,
                                       .grad = s ? part[i][1].ref : part[i][1].dev,
                                       .m = s ? part[i][2].ref : part[i][2].dev,
                                       .v = s ? part[i][3].ref : part[i][3].dev,
                                       .decay = i,
                                       .tensor = (uint32_t)i};
      if (copied) seg->compute = s ? part[i][4].ref : part[i][4].dev;
    }
  }
  struct dual norm = dual(c, "norm", MT_F64, 'z', 1, 1, 0, 0);
  double sumsq = acc ? 4.0 : 0.01;
  *(double *)norm.ref.data = sumsq;
  OK(c->be->upload(c->be, norm.dev.data, &sumsq, sizeof sumsq));
  struct mt_adamw_values third = mt_adamw_at(0.01, 0.9, 0.95, 0.1, 3, 77);
  struct dual_value values = dual_value(c, &third, sizeof third);
  ARGS(adamw, dev.segments = dev_seg; ref.segments = ref_seg; N(segment_count, 2); N(beta1, 0.9);
       N(beta2, 0.95); N(eps, 1e-8); T(values, values); N(clip, 1.0);
       dev.grad_sumsq = norm.dev.data; ref.grad_sumsq = norm.ref.data;)
  RUN(adamw);
  for (int i = 0; i < 2; i++) {
    for (int k = 0; k < (copied ? 5 : 4); k++) {
      if (k != 1) expect(c, &part[i][k]);
    }
  }
}

#include "kernels/attention_cases.h"
#include "kernels/quant_cases.h"

#endif
