/* The CUDA backend beside the CPU one at sizes where its kernels run as in earnest: wide accesses,
 * several blocks, tiles, chunks and lists. Same seeds, so the same inputs; outputs are poisoned. */
#include "gpu/gpu.h"
#include "kernels/bed.h"

enum { MOST_OUTPUTS = 16 };

/* What a property leaves to be compared. */
struct outputs {
  const char *name[MOST_OUTPUTS];
  double *v[MOST_OUTPUTS], slack[MOST_OUTPUTS];
  int64_t n[MOST_OUTPUTS];
  int count;
};

static void keep_values(struct outputs *o, const char *name, double *v, int64_t n, double slack) {
  assert_true(o->count < MOST_OUTPUTS);
  o->name[o->count] = name;
  o->v[o->count] = v;
  o->n[o->count] = n;
  o->slack[o->count++] = slack;
}

static void keep(struct bed *b, struct outputs *o, const char *name, struct mt_tensor t,
                 double slack) {
  keep_values(o, name, values(b, &t), mt_count(&t), slack);
}

/* Integers must be equal: no slack. */
static void keep_ints(struct bed *b, struct outputs *o, const char *name, const int32_t *d,
                      int64_t n) {
  int32_t *h = read_ints(b, d, n);
  double *v = host_mem(b, (size_t)n * sizeof *v);
  for (int64_t i = 0; i < n; i++) v[i] = h[i];
  keep_values(o, name, v, n, 0);
}

static void open_wide(struct bed *b, const char *backend, const char *recipe) {
  bed_open(b, backend, recipe);
  b->be.mem_free(&b->be, b->dev[0], b->dev_bytes[0]);
  b->dev_count = 0;
  struct mt_limits l = {.tokens = 8192,
                        .rows = 65536,
                        .hidden = 8192,
                        .ffn = 16384,
                        .experts = 512,
                        .top_k = 16,
                        .vocab = 262144,
                        .heads = 32,
                        .kv_heads = 8,
                        .head_dim = 128,
                        .act = b->recipe->act};
  b->be.workspace_size_bytes = b->be.workspace_bytes(&b->be, &l);
  b->be.workspace = dev_mem(b, b->be.workspace_size_bytes);
}

static void beside_cpu(void (*property)(struct bed *b, struct outputs *o)) {
  static const char *const recipes[] = {"fp32", "bf16"};
  for (int i = 0; i < 2; i++) {
    struct bed gpu, cpu;
    struct outputs got = {.count = 0}, want = {.count = 0};
    open_wide(&gpu, "cuda", recipes[i]);
    open_wide(&cpu, "cpu", recipes[i]);
    property(&cpu, &want);
    property(&gpu, &got);
    assert_int_equal(got.count, want.count);
    for (int k = 0; k < got.count; k++) {
      if (got.slack[k] == 0) {
        expect_same(&gpu, got.name[k], got.v[k], want.v[k], got.n[k]);
      } else {
        expect_close(&gpu, got.name[k], got.v[k], want.v[k], got.n[k], got.slack[k]);
      }
    }
    bed_close(&cpu);
    bed_close(&gpu);
  }
}

#define BESIDE_CPU(name)                                                                           \
  static void test_##name(void **state) {                                                          \
    (void)state;                                                                                   \
    beside_cpu(name);                                                                              \
  }

static void norms_at(struct bed *b, struct outputs *o, int t, int h) {
  struct mt_tensor x = act(b, normals(b, (int64_t)t * h, 1), t, h), sum = act(b, NULL, t, h);
  struct mt_tensor res = act(b, normals(b, (int64_t)t * h, 1), t, h), y = act(b, NULL, t, h);
  struct mt_tensor w = filled(b, mt_vec(NULL, b->recipe->act, h), normals(b, h, 1));
  struct mt_tensor rstd = stat_vec(b, NULL, t), dw = filled(b, mt_vec(NULL, MT_F32, h), NULL);
  DO(b, rmsnorm_fwd, .x = x, .residual = res, .weight = w, .eps = 1e-5f, .sum = sum, .y = y,
     .rstd = rstd);
  keep(b, o, "sum", sum, 1);
  keep(b, o, "y", y, 1.5);
  keep(b, o, "rstd", rstd, 1);
  DO(b, rmsnorm_bwd, .dy = res, .x = sum, .weight = w, .rstd = rstd, .dresidual = x, .dx = x,
     .dweight = dw);
  keep(b, o, "dx", x, 1.5);
  keep(b, o, "dweight", dw, 2);
}

static void norms(struct bed *b, struct outputs *o) {
  norms_at(b, o, 700, 4096); /* more rows than blocks */
  norms_at(b, o, 37, 8200);  /* more than one tile of columns */
}

static void router_at(struct bed *b, struct outputs *o, int t, int valid, int h, int e, int k) {
  struct mt_tensor x = act(b, normals(b, (int64_t)t * h, 1), t, h);
  struct mt_tensor w = act(b, normals(b, (int64_t)e * h, 2 / sqrt(h)), e, h);
  struct mt_tensor logits = stat(b, NULL, t, e), prob = stat(b, NULL, t, k);
  struct mt_tensor aux = stat_vec(b, normals(b, e, 1), e), dlogits = stat(b, NULL, t, e);
  struct mt_tensor dx = act(b, normals(b, (int64_t)t * h, 0.1), t, h), dw = grad(b, NULL, e, h);
  int32_t *index = ints(b, NULL, (int64_t)t * k), *load = ints(b, NULL, e);
  int32_t *count = ints(b, NULL, e), *n = one(b, valid);
  struct mt_tensor z_sum = stat_vec(b, normals(b, 1, 1), 1);
  DO(b, router_fwd, .x = x, .w = w, .valid_count = n, .renormalize = 1, .logits = logits,
     .prob = prob, .index = index, .aux_prob = aux, .aux_count = count, .load = load,
     .z_sum = z_sum);
  keep(b, o, "logits", logits, b->recipe->act == MT_F32 ? 2 : 1);
  keep(b, o, "prob", prob, 4);
  keep(b, o, "aux_prob", aux, 2);
  keep(b, o, "z_sum", z_sum, 2);
  keep_ints(b, o, "index", index, (int64_t)t * k);
  keep_ints(b, o, "load", load, e);
  struct mt_tensor z_grad = stat_vec(b, normals(b, 1, 0.1), 1);
  DO(b, router_bwd, .x = x, .w = w, .valid_count = n, .renormalize = 1, .logits = logits,
     .prob = prob, .index = index, .dprob = stat(b, normals(b, (int64_t)t * k, 1), t, k),
     .aux_grad = stat_vec(b, normals(b, e, 0.1), e), .z_grad = z_grad, .dlogits = dlogits, .dx = dx,
     .accumulate_dx = 1, .dw = dw);
  keep(b, o, "dx", dx, 2);
  keep(b, o, "dw", dw, 8);
}

static void router(struct bed *b, struct outputs *o) {
  router_at(b, o, 3001, 2950, 1024, 8, 2);
  router_at(b, o, 300, 290, 4096, 128, 8);
}

static void router_of_most_experts(struct bed *b, struct outputs *o) {
  router_at(b, o, 130, 127, 264, 512, 16);
}

static int32_t *routing(struct bed *b, int t, int k, int e) {
  int32_t *v = host_mem(b, sizeof *v * (size_t)t * (size_t)k);
  for (int i = 0; i < t; i++) {
    int first = (int)mt_rng_below(&b->rng, (uint32_t)e);
    for (int s = 0; s < k; s++) v[i * k + s] = i % 11 == 5 ? -1 : (first + s) % e;
  }
  return ints(b, v, (int64_t)t * k);
}

static void permutation_at(struct bed *b, struct outputs *o, int t, int k, int e, int h) {
  int64_t r = (int64_t)t * k;
  int32_t *offsets = ints(b, NULL, e + 1), *source = ints(b, NULL, r), *row = ints(b, NULL, r);
  DO(b, permute_plan, .index = routing(b, t, k, e), .token_count = t, .top_k = k, .expert_count = e,
     .offsets = offsets, .row_source = source, .token_row = row);
  keep_ints(b, o, "offsets", offsets, e + 1);
  keep_ints(b, o, "row_source", source, r);
  keep_ints(b, o, "token_row", row, r);
  struct mt_tensor x = act(b, normals(b, (int64_t)t * h, 1), t, h), y = act(b, NULL, t, h);
  struct mt_tensor xs = act(b, normals(b, r * h, 1), r, h), prob = stat(b, normals(b, r, 1), t, k);
  struct mt_tensor dprob = stat(b, normals(b, r, 1), t, k);
  DO(b, combine_bwd, .dy = x, .ys = xs, .row_source = source, .prob = prob, .top_k = k, .dys = xs,
     .dprob = dprob);
  keep(b, o, "dys", xs, 1);
  keep(b, o, "dprob", dprob, 2);
  DO(b, combine_fwd, .ys = xs, .token_row = row, .prob = prob, .top_k = k, .y = y);
  keep(b, o, "combined", y, 1.5);
  DO(b, dispatch_fwd, .x = y, .row_source = source, .top_k = k, .xs = xs);
  DO(b, dispatch_bwd, .dxs = xs, .token_row = row, .top_k = k, .dx = y, .accumulate = 1);
  keep(b, o, "dx", y, 2);
}

static void permutation(struct bed *b, struct outputs *o) {
  permutation_at(b, o, 5000, 2, 8, 264);
  permutation_at(b, o, 1500, 8, 128, 136);
}

/* Dense products so large that an algorithm is looked for at the first: each time the same bits. */
static void large_products(struct bed *b, struct outputs *o) {
  enum { T = 1100, N = 3072, K = 3200, TIMES = 3 };
  struct mt_tensor x = act(b, normals(b, T * K, 1), T, K),
                   w = act(b, normals(b, N * K, 0.02), N, K);
  struct mt_tensor dy = act(b, normals(b, T * N, 1), T, N);
  double *y0 = NULL, *dx0 = NULL, *dw0 = NULL;
  for (int i = 0; i < TIMES; i++) {
    struct mt_tensor y = act(b, NULL, T, N), dx = act(b, NULL, T, K), dw = grad(b, NULL, N, K);
    DO(b, linear_fwd, .x = x, .w = w, .y = y);
    DO(b, linear_dgrad, .dy = dy, .w = w, .dx = dx);
    DO(b, linear_wgrad, .dy = dy, .x = x, .dw = dw);
    if (i == 0) {
      y0 = values(b, &y), dx0 = values(b, &dx), dw0 = values(b, &dw);
      continue;
    }
    expect_same(b, "y", values(b, &y), y0, T * N);
    expect_same(b, "dx", values(b, &dx), dx0, T * K);
    expect_same(b, "dw", values(b, &dw), dw0, N * K);
  }
  keep_values(o, "y", y0, T * N, 4); /* sums over thousands */
  keep_values(o, "dx", dx0, T * K, 4);
  keep_values(o, "dw", dw0, N * K, 4);
}
BESIDE_CPU(large_products)

static void table_gradient(struct bed *b, struct outputs *o) {
  enum { T = 3000, V = 50, H = 1032 };
  int32_t *ids = host_mem(b, sizeof *ids * T);
  for (int t = 0; t < T; t++) ids[t] = t % 3 ? 7 : (int32_t)mt_rng_below(&b->rng, V);
  struct mt_tensor dtable = grad(b, NULL, V, H);
  for (int acc = 0; acc < 2; acc++) {
    DO(b, embed_bwd, .ids = ints(b, ids, T), .valid_count = one(b, T - 9),
       .dout = act(b, normals(b, T * H, 1), T, H), .dtable = dtable, .accumulate = acc);
    keep(b, o, "dtable", dtable, 4);
  }
}

static void swiglu(struct bed *b, struct outputs *o) {
  enum { R = 300, ROWS = 250, F = 14336 };
  struct mt_tensor gu = act(b, normals(b, R * 2 * F, 4), R, 2 * F), h = act(b, NULL, R, F);
  struct mt_tensor dh = act(b, normals(b, R * F, 1), R, F), dprob = stat_vec(b, NULL, R);
  struct mt_tensor prob = stat_vec(b, normals(b, R, 1), R);
  int32_t *rows = one(b, ROWS);
  DO(b, swiglu_fwd, .gate_up = gu, .row_prob = prob, .row_count = rows, .h = h);
  keep(b, o, "h", mt_rows(&h, 0, ROWS), 1.5);
  double *rest = values(b, &h);
  for (int64_t i = (int64_t)ROWS * F; i < (int64_t)R * F; i++) assert_true(isnan(rest[i]));
  DO(b, swiglu_bwd, .dh = dh, .gate_up = gu, .row_prob = prob, .row_count = rows, .dgate_up = gu,
     .h = dh, .drow_prob = dprob);
  keep(b, o, "dgate_up", gu, 1.5);
  keep(b, o, "h again", dh, 1.5);
  keep_values(o, "drow_prob", values(b, &dprob), ROWS, 4);
}

/* dx sums over the vocabulary, in another order on each backend. */
static void head_at(struct bed *b, struct outputs *o, int t, int64_t v, int h, double dx_slack) {
  int32_t *labels = host_mem(b, sizeof *labels * (size_t)t);
  for (int i = 0; i < t; i++) {
    labels[i] = i % 5 == 2 ? -100 : (int32_t)mt_rng_below(&b->rng, (uint32_t)v);
  }
  struct mt_tensor x = act(b, normals(b, (int64_t)t * h, 1), t, h), dx = act(b, NULL, t, h);
  struct mt_tensor w = act(b, normals(b, v * h, 2 / sqrt(h)), v, h), dw = grad(b, NULL, v, h);
  struct mt_tensor loss = stat_vec(b, NULL, t);
  int32_t *correct = ints(b, NULL, t);
  for (int acc = 0; acc < 2; acc++) {
    DO(b, head_loss, .x = x, .w = w, .labels = ints(b, labels, t),
       .loss_scale = one_float(b, 0.25f), .loss = loss, .correct = correct, .dx = dx, .dw = dw,
       .accumulate = acc);
  }
  keep(b, o, "loss", loss, 2);
  keep(b, o, "dx", dx, dx_slack);
  keep(b, o, "dw", dw, 2);
  keep_ints(b, o, "correct", correct, t);
}

static void head(struct bed *b, struct outputs *o) {
  head_at(b, o, 300, 32000, 256, 2);
}

static void head_in_chunks(struct bed *b, struct outputs *o) {
  head_at(b, o, 700, 262144 - 3, 16, 4); /* 512 rows a chunk, V no multiple of a vector */
}

/* Segments of one array: most start where no vector may. */
static void many_segments(struct bed *b, struct outputs *o) {
  enum { SEGMENTS = 151, N = SEGMENTS * 3000 };
  static const int sizes[] = {1, 8200, 3, 4096, 0, 77};
  double *v0 = normals(b, N, 1e-3);
  for (int i = 0; i < N; i++) v0[i] *= v0[i];
  struct mt_tensor w = filled(b, mt_vec(NULL, MT_F32, N), normals(b, N, 1));
  struct mt_tensor g = filled(b, mt_vec(NULL, MT_F32, N), normals(b, N, 1e-3));
  struct mt_tensor m = filled(b, mt_vec(NULL, MT_F32, N), normals(b, N, 1e-3));
  struct mt_tensor v = filled(b, mt_vec(NULL, MT_F32, N), v0);
  struct mt_tensor h = filled(b, mt_vec(NULL, MT_BF16, N), normals(b, N, 1));
  struct mt_tensor sum = filled(b, mt_vec(NULL, MT_F64, 1), NULL), list[SEGMENTS];
  struct mt_adamw_segment segments[SEGMENTS];
  int64_t at = 0;
  for (int i = 0; i < SEGMENTS; i++) {
    int64_t n = sizes[i % 6];
    assert_true(at + n <= N);
    list[i] = mt_vec((float *)g.data + at, MT_F32, n);
    segments[i] = (struct mt_adamw_segment){.master = mt_vec((float *)w.data + at, MT_F32, n),
                                            .grad = list[i],
                                            .m = mt_vec((float *)m.data + at, MT_F32, n),
                                            .v = mt_vec((float *)v.data + at, MT_F32, n),
                                            .decay = i % 2};
    if (i % 3) segments[i].compute = mt_vec((uint16_t *)h.data + at, MT_BF16, n);
    at += n;
  }
  DO(b, sumsq, .tensors = list, .tensor_count = SEGMENTS, .out = sum.data);
  DO(b, adamw, .segments = segments, .segment_count = SEGMENTS, .beta1 = 0.9, .beta2 = 0.95,
     .eps = 1e-8, .values = adamw_values(b, 0.01, 0.1, 3, 0), .clip = 0.5, .grad_sumsq = sum.data);
  keep(b, o, "sum", sum, 1);
  keep(b, o, "w", w, 1);
  keep(b, o, "m", m, 1);
  keep(b, o, "v", v, 1);
  struct mt_recipe coarse = *mt_recipe_find("bf16");
  keep(b, o, "rounded", h, coarse.op_tolerance / b->recipe->op_tolerance);
}

/* Given the same bits and the same norm, the same bits: in float32, and where what is kept is
 * rounded at random, also of parts of a parameter. Sizes and places where accesses are wide and
 * where they are not. */
static void updates_to_the_bit(struct bed *b, struct outputs *o) {
  enum { N = 200000 };
  static const int64_t sizes[] = {100000, 8192, 1, 7, 8, 8193, 33333};
  static const enum mt_dtype formats[] = {MT_F32, MT_BF16};
  double sumsq = 4;
  struct mt_tensor norm = filled(b, mt_vec(NULL, MT_F64, 1), &sumsq);
  for (int f = 0; f < 2; f++) {
    double *v0 = normals(b, N, 1e-3);
    for (int i = 0; i < N; i++) v0[i] *= v0[i];
    struct mt_tensor whole[4] = {filled(b, mt_vec(NULL, formats[f], N), normals(b, N, 0.02)),
                                 filled(b, mt_vec(NULL, formats[f], N), normals(b, N, 1e-3)),
                                 filled(b, mt_vec(NULL, formats[f], N), normals(b, N, 1e-3)),
                                 filled(b, mt_vec(NULL, formats[f], N), v0)};
    struct mt_adamw_segment segments[7];
    int64_t at = 0, item = (int64_t)mt_dtype_bytes(formats[f]);
    for (int i = 0; i < 7; i++) {
      struct mt_tensor part[4];
      for (int k = 0; k < 4; k++) {
        part[k] = mt_vec((char *)whole[k].data + at * item, formats[f], sizes[i]);
      }
      segments[i] = (struct mt_adamw_segment){.master = part[0],
                                              .grad = part[1],
                                              .m = part[2],
                                              .v = part[3],
                                              .decay = i % 2,
                                              .tensor = (uint32_t)(3 * i),
                                              .first = i % 3 * (128 + ((int64_t)1 << 36))};
      at += sizes[i];
    }
    for (int step = 1; step <= 3; step++) {
      DO(b, adamw, .segments = segments, .segment_count = 7, .beta1 = 0.9, .beta2 = 0.95,
         .eps = 1e-8, .values = adamw_values(b, 1e-3, 0.1, step, 0x123456789abcdefu), .clip = 1.0,
         .grad_sumsq = norm.data);
    }
    keep(b, o, "w", whole[0], 0);
    keep(b, o, "m", whole[2], 0);
    keep(b, o, "v", whole[3], 0);
  }
}

/* Without rows nothing is launched on an empty grid, and what is summed over rows becomes zero. */
static void no_rows(struct bed *b, struct outputs *o) {
  enum { H = 64, E = 4, V = 40, K = 2 };
  struct mt_tensor x = act(b, NULL, 0, H), w = act(b, normals(b, V * H, 1), V, H);
  struct mt_tensor rw = mt_rows(&w, 0, E), table = grad(b, NULL, V, H), dw = grad(b, NULL, V, H);
  struct mt_tensor drw = grad(b, NULL, E, H), few = stat(b, NULL, 0, K),
                   logits = stat(b, NULL, 0, E);
  struct mt_tensor norm = filled(b, mt_vec(NULL, b->recipe->act, H), normals(b, H, 1));
  struct mt_tensor dnorm = filled(b, mt_vec(NULL, MT_F32, H), NULL), none = stat_vec(b, NULL, 0);
  struct mt_tensor aux = stat_vec(b, normals(b, E, 1), E);
  struct mt_tensor up = mt_cube(act(b, NULL, E * 2 * H, H).data, b->recipe->act, E, 2 * H, H);
  struct mt_tensor down = mt_cube(up.data, b->recipe->act, E, H, H);
  int32_t *n = one(b, 0), *load = ints(b, NULL, E), *offsets = ints(b, NULL, E + 1);
  int32_t *nothing = ints(b, NULL, 1), *count = ints(b, NULL, E);
  DO(b, embed_fwd, .ids = nothing, .table = w, .out = x);
  DO(b, embed_bwd, .ids = nothing, .valid_count = n, .dout = x, .dtable = table);
  DO(b, add, .a = x, .b = x, .y = x);
  DO(b, rmsnorm_fwd, .x = x, .weight = norm, .eps = 1e-5f, .y = x, .rstd = none);
  DO(b, rmsnorm_bwd, .dy = x, .x = x, .weight = norm, .rstd = none, .dx = x, .dweight = dnorm);
  DO(b, router_fwd, .x = x, .w = rw, .valid_count = n, .logits = logits, .prob = few,
     .index = nothing, .aux_prob = aux, .aux_count = count, .load = load);
  DO(b, router_bwd, .x = x, .w = rw, .valid_count = n, .logits = logits, .prob = few,
     .index = nothing, .dprob = few, .dlogits = logits, .dx = x, .dw = drw);
  DO(b, permute_plan, .index = nothing, .top_k = K, .expert_count = E, .offsets = offsets,
     .row_source = nothing, .token_row = nothing);
  DO(b, dispatch_fwd, .x = x, .row_source = nothing, .top_k = K, .xs = x);
  DO(b, dispatch_bwd, .dxs = x, .token_row = nothing, .top_k = K, .dx = x);
  DO(b, combine_fwd, .ys = x, .token_row = nothing, .prob = few, .top_k = K, .y = x);
  DO(b, combine_bwd, .dy = x, .ys = x, .row_source = nothing, .prob = few, .top_k = K, .dys = x,
     .dprob = few);
  DO(b, scatter_add, .ys = x, .row_source = nothing, .prob = few, .top_k = K, .y = x);
  DO(b, swiglu_fwd, .gate_up = act(b, NULL, 0, 2 * H), .h = x);
  DO(b, swiglu_bwd, .dh = x, .gate_up = act(b, NULL, 0, 2 * H), .dgate_up = act(b, NULL, 0, 2 * H),
     .h = x, .drow_prob = none);
  DO(b, experts_up_fwd, .x = x, .w = up, .offsets = offsets, .gate_up = act(b, NULL, 0, 2 * H),
     .h = x);
  DO(b, experts_down_dgrad, .dy = x, .w = down, .offsets = offsets,
     .gate_up = act(b, NULL, 0, 2 * H), .dgate_up = act(b, NULL, 0, 2 * H), .h = x,
     .drow_prob = none);
  DO(b, head_loss, .x = x, .w = w, .labels = nothing, .loss_scale = one_float(b, 1), .loss = none,
     .dx = x, .dw = dw);
  keep_values(o, "dtable", values(b, &table), V * H, 0);
  keep_values(o, "dweight", values(b, &dnorm), H, 0);
  keep_values(o, "router's dw", values(b, &drw), E * H, 0);
  keep_values(o, "head's dw", values(b, &dw), V * H, 0);
  keep_values(o, "aux_prob", values(b, &aux), E, 0);
  keep_ints(b, o, "load", load, E);
  keep_ints(b, o, "offsets", offsets, E + 1);
}

BESIDE_CPU(updates_to_the_bit)
BESIDE_CPU(no_rows)
BESIDE_CPU(norms)
BESIDE_CPU(router)
BESIDE_CPU(router_of_most_experts)
BESIDE_CPU(permutation)
BESIDE_CPU(table_gradient)
BESIDE_CPU(swiglu)
BESIDE_CPU(head)
BESIDE_CPU(head_in_chunks)
BESIDE_CPU(many_segments)

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_updates_to_the_bit),
      cmocka_unit_test(test_no_rows),
      cmocka_unit_test(test_norms),
      cmocka_unit_test(test_router),
      cmocka_unit_test(test_permutation),
      cmocka_unit_test(test_router_of_most_experts),
      cmocka_unit_test(test_large_products),
      cmocka_unit_test(test_table_gradient),
      cmocka_unit_test(test_swiglu),
      cmocka_unit_test(test_head),
      cmocka_unit_test(test_head_in_chunks),
      cmocka_unit_test(test_many_segments),
  };
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
