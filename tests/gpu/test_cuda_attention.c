/* Attention on the GPU where the operation cases are too small to reach: tiles that cross the
 * diagonal and the window's edge, ragged packed sequences, many sequences, long caches. Against the
 * float64 reference, into poisoned outputs, with NaN in the padding of the inputs.
 *   test_cuda_attention [SHAPE]: that packed shape alone (for compute-sanitizer) */
#include "gpu/gpu.h"
#include "kernels/compare.h"

struct shape {
  const char *name;
  int t, g, r, d, window;
  int sequences; /* of the lengths below, then repeated lengths */
  int lengths[8];
  double slack; /* of the recipe's tolerance, which is for sums of some hundred terms */
};

static const struct shape shapes[] = {
    {"ragged-64", 700, 1, 4, 64, 0, 5, {1, 257, 0, 300, 100}, 1},
    {"ragged-128", 700, 1, 4, 128, 0, 5, {300, 1, 129, 0, 128}, 1},
    {"window-64", 700, 1, 2, 64, 100, 4, {333, 63, 1, 300}, 1},
    {"window-128", 700, 1, 2, 128, 65, 3, {460, 64, 65}, 1},
    {"narrow-128", 300, 1, 2, 128, 1, 2, {200, 64}, 1},
    {"two-groups-80", 330, 2, 3, 80, 0, 2, {200, 129}, 1},
    {"two-groups-24", 330, 2, 1, 24, 40, 3, {0, 200, 129}, 1},
    {"unaligned-12", 100, 2, 2, 12, 0, 2, {70, 20}, 1},
    {"tiles-128", 1800, 1, 2, 128, 0, 4, {520, 0, 385, 801}, 1},
    {"tiles-104", 1400, 1, 3, 104, 200, 3, {640, 399, 300}, 1},
    {"tiles-72", 1100, 1, 1, 72, 0, 3, {513, 127, 430}, 1},
    {"long-128", 1300, 1, 1, 128, 0, 1, {1290}, 2},
    {"short-128", 1100, 1, 4, 128, 0, 150, {9, 1, 17, 0, 3, 12, 5, 8}, 1},
    {"many", 3300, 1, 1, 8, 0, 1500, {1, 2, 0, 3, 5, 1, 3, 2}, 1},
    {"all-padding", 70, 1, 2, 64, 0, 3, {0}, 1},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static const char *only;

static bool wanted(const char *name) {
  return !only || strcmp(only, name) == 0;
}

#define SCALE(d) (1.0f / sqrtf((float)(d)))

static void open_case(struct bench_case *c, struct mt_backend *be, const char *backend,
                      const char *recipe, const struct shape *z, int64_t tokens) {
  OK(mt_backend_create(be, backend, 2));
  *c = (struct bench_case){.be = be, .recipe = mt_recipe_find(recipe), .rng = mt_rng_make(77, 5)};
  OK(mt_backend_ref_create(&c->ref_be));
  struct mt_limits l = {.tokens = tokens,
                        .rows = tokens,
                        .hidden = 64,
                        .ffn = 64,
                        .experts = 4,
                        .top_k = 2,
                        .vocab = 64,
                        .heads = (int64_t)z->g * z->r,
                        .kv_heads = z->g,
                        .head_dim = z->d,
                        .act = c->recipe->act};
  be->workspace_size_bytes = be->workspace_bytes(be, &l);
  OK(be->mem_alloc(be, be->workspace_size_bytes, &be->workspace));
}

static void close_case(struct bench_case *c) {
  release_all(c);
  c->be->mem_free(c->be, c->be->workspace, c->be->workspace_size_bytes);
  mt_backend_destroy(c->be);
}

static struct dual_ints lengths_of(struct bench_case *c, const struct shape *z) {
  int32_t *v = own(c, (size_t)(z->sequences + 1) * sizeof *v);
  for (int i = 0; i < z->sequences; i++) v[i + 1] = v[i] + z->lengths[i % 8];
  assert_true(v[z->sequences] <= z->t);
  return ints(c, z->sequences + 1, v);
}

/* NaN in the rows from `first` on. */
static void poison_rows(struct bench_case *c, struct dual *x, int64_t first) {
  struct mt_tensor rows = mt_rows(&x->dev, first, x->dev.dim[0] - first);
  void *bits = own(c, mt_bytes(&rows));
  memset(bits, 0xff, mt_bytes(&rows));
  OK(c->be->upload(c->be, rows.data, bits, mt_bytes(&rows)));
  double *v = x->ref.data;
  for (int64_t i = first * x->dev.dim[1]; i < mt_count(&x->dev); i++) v[i] = NAN;
}

static void expect_zero_rows(struct bench_case *c, const struct dual *x, int64_t first) {
  struct mt_tensor rows = mt_rows(&x->dev, first, x->dev.dim[0] - first);
  unsigned char *bits = own(c, mt_bytes(&rows)), any = 0;
  OK(c->be->download(c->be, bits, rows.data, mt_bytes(&rows)));
  for (size_t i = 0; i < mt_bytes(&rows); i++) any |= bits[i];
  if (any) fail_msg("%s: padding is not zero", x->name);
}

static struct dual tensor(struct bench_case *c, const char *name, enum mt_dtype dtype, char mode,
                          int64_t rows, int64_t columns) {
  return dual(c, name, dtype, mode, 1, rows, columns, 0);
}

struct packed {
  struct dual qkv, out, lse, dout, dqkv;
  struct dual_ints cu;
};

static void run_packed(struct bench_case *c, const struct shape *z, const struct packed *x,
                       bool on_ref) {
  struct mt_attention_fwd_args f = {.qkv = on_ref ? x->qkv.ref : x->qkv.dev,
                                    .cu_seqlens = on_ref ? x->cu.ref : x->cu.dev,
                                    .sequence_count = z->sequences,
                                    .kv_heads = z->g,
                                    .q_per_kv = z->r,
                                    .head_dim = z->d,
                                    .window = z->window,
                                    .scale = SCALE(z->d),
                                    .out = on_ref ? x->out.ref : x->out.dev,
                                    .lse = on_ref ? x->lse.ref : x->lse.dev};
  struct mt_attention_bwd_args b = {.fwd = f,
                                    .dout = on_ref ? x->dout.ref : x->dout.dev,
                                    .dqkv = on_ref ? x->dqkv.ref : x->dqkv.dev};
  struct mt_backend *be = on_ref ? &c->ref_be : c->be;
  OK(be->ops.attention_fwd(be, &f));
  OK(be->ops.attention_bwd(be, &b));
}

static struct packed make_packed(struct bench_case *c, const struct shape *z) {
  enum mt_dtype act = c->recipe->act, stat = c->recipe->stat;
  int64_t heads = (int64_t)z->g * z->r, width = (int64_t)z->g * (z->r + 2) * z->d;
  struct packed x = {.qkv = tensor(c, "qkv", act, 'r', z->t, width),
                     .out = tensor(c, "out", act, 'n', z->t, heads * z->d),
                     .lse = tensor(c, "lse", stat, 'n', z->t, heads),
                     .dout = tensor(c, "dout", act, 'r', z->t, heads * z->d),
                     .dqkv = tensor(c, "dqkv", act, 'n', z->t, width),
                     .cu = lengths_of(c, z)};
  poison_rows(c, &x.qkv, x.cu.ref[z->sequences]);
  poison_rows(c, &x.dout, x.cu.ref[z->sequences]);
  return x;
}

/* Returns the bits of the outputs; compares them unless `again`. */
static uint64_t packed_case(const char *backend, const char *recipe, const struct shape *z,
                            bool again, int *failures) {
  struct mt_backend be;
  struct bench_case c;
  open_case(&c, &be, backend, recipe, z, z->t);
  struct packed x = make_packed(&c, z);
  int64_t valid = x.cu.ref[z->sequences];
  run_packed(&c, z, &x, false);
  if (!again) run_packed(&c, z, &x, true);
  expect(&c, &x.out);
  expect(&c, &x.lse);
  expect(&c, &x.dqkv);
  expect_zero_rows(&c, &x.out, valid);
  expect_zero_rows(&c, &x.lse, valid);
  expect_zero_rows(&c, &x.dqkv, valid);
  double tolerance = c.recipe->op_tolerance * z->slack;
  if (!again && !(c.worst <= tolerance)) {
    print_error("%s %s %s: %s is off by %.3g of %.1g\n", backend, recipe, z->name, c.worst_name,
                c.worst, tolerance);
    (*failures)++;
  } else if (!again) {
    print_message("  %-13s %s %-13s worst error %.2e of %.0e\n", backend, recipe, z->name, c.worst,
                  c.recipe->op_tolerance);
  }
  uint64_t bits = c.bits;
  close_case(&c);
  return bits;
}

struct cache_shape {
  int t, start, g, r, d, window;
};

static const struct cache_shape cache_shapes[] = {
    {1, 0, 1, 1, 8, 0},       {1, 700, 2, 4, 128, 0},  {3, 1000, 1, 7, 64, 0},
    {1, 2000, 2, 2, 80, 500}, {15, 60, 1, 12, 128, 9}, {16, 77, 2, 4, 128, 0},
    {200, 100, 1, 2, 64, 70}, {129, 0, 1, 3, 16, 0},   {5, 90, 2, 2, 12, 0},
};

static uint64_t cache_case(const char *backend, const char *recipe, const struct cache_shape *k,
                           bool again, int *failures) {
  struct mt_backend be;
  struct bench_case c;
  struct shape z = {.g = k->g, .r = k->r, .d = k->d};
  open_case(&c, &be, backend, recipe, &z, k->t);
  enum mt_dtype act = c.recipe->act;
  int64_t heads = (int64_t)k->g * k->r, room = k->start + k->t + 3;
  struct dual qkv = tensor(&c, "qkv", act, 'r', k->t, (heads + 2 * k->g) * k->d);
  struct dual keys = tensor(&c, "k", act, 'r', room, (int64_t)k->g * k->d);
  struct dual values = tensor(&c, "v", act, 'r', room, (int64_t)k->g * k->d);
  struct dual out = tensor(&c, "out", act, 'n', k->t, heads * k->d);
  poison_rows(&c, &keys, k->start + k->t);
  poison_rows(&c, &values, k->start + k->t);
  for (int on_ref = 0; on_ref < (again ? 1 : 2); on_ref++) {
    struct mt_attention_cache_args a = {.qkv = on_ref ? qkv.ref : qkv.dev,
                                        .k = on_ref ? keys.ref : keys.dev,
                                        .v = on_ref ? values.ref : values.dev,
                                        .start = k->start,
                                        .kv_heads = k->g,
                                        .q_per_kv = k->r,
                                        .head_dim = k->d,
                                        .window = k->window,
                                        .scale = SCALE(k->d),
                                        .out = on_ref ? out.ref : out.dev};
    struct mt_backend *on = on_ref ? &c.ref_be : c.be;
    OK(on->ops.attention_cache(on, &a));
  }
  expect(&c, &out);
  if (!again && !(c.worst <= c.recipe->op_tolerance)) {
    print_error("%s %s cache of %d + %d, head dimension %d: off by %.3g\n", backend, recipe,
                k->start, k->t, k->d, c.worst);
    (*failures)++;
  }
  uint64_t bits = c.bits;
  close_case(&c);
  return bits;
}

static void all(const char *backend, const char *recipe) {
  int failures = 0;
  for (int i = 0; i < SHAPES; i++) {
    if (!wanted(shapes[i].name)) continue;
    uint64_t bits = packed_case(backend, recipe, &shapes[i], false, &failures);
    if (packed_case(backend, recipe, &shapes[i], true, &failures) != bits) {
      print_error("%s %s %s differs from run to run\n", backend, recipe, shapes[i].name);
      failures++;
    }
  }
  for (size_t i = 0; i < sizeof cache_shapes / sizeof *cache_shapes && !only; i++) {
    uint64_t bits = cache_case(backend, recipe, &cache_shapes[i], false, &failures);
    if (cache_case(backend, recipe, &cache_shapes[i], true, &failures) != bits) {
      print_error("%s %s cache %d differs from run to run\n", backend, recipe, (int)i);
      failures++;
    }
  }
  assert_int_equal(failures, 0);
}

/* Sizes at which the reference would take minutes, blocks take many tiles each, and a mistake in
 * handing them out shows: the chip's own kernels against the portable ones. */
static const struct shape large[] = {
    {"large-128", 4500, 4, 4, 128, 0, 5, {2048, 1, 1300, 0, 1000}, 1},
    {"large-window-128", 4500, 4, 4, 128, 1000, 2, {4000, 444}, 1},
    {"large-tiles-128", 9000, 2, 4, 128, 0, 7, {1000, 3000, 77, 1900, 0, 1500, 1500}, 1},
    {"large-window-96", 6000, 2, 1, 96, 777, 3, {2999, 130, 2500}, 1},
    {"large-64", 3000, 2, 8, 64, 0, 2, {2222, 700}, 1},
};

/* Blocks come to their tiles in another order in every run. */
static void same_bits_again(struct bench_case *c, const struct shape *z, const struct packed *x) {
  size_t bytes = mt_bytes(&x->dqkv.dev);
  unsigned char *first = own(c, bytes), *next = own(c, bytes);
  OK(c->be->download(c->be, first, x->dqkv.dev.data, bytes));
  for (int i = 0; i < 20; i++) {
    run_packed(c, z, x, false);
    OK(c->be->download(c->be, next, x->dqkv.dev.data, bytes));
    if (memcmp(first, next, bytes)) fail_msg("%s: run %d has other bits", z->name, i);
  }
}

static void kernels_agree(void **state) {
  (void)state;
  static const char *const names[2] = {"cuda", "cuda-portable"};
  for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
    if (!wanted(large[i].name)) continue;
    struct mt_backend be[2];
    struct bench_case c[2];
    struct packed x[2];
    for (int n = 0; n < 2; n++) {
      open_case(&c[n], &be[n], names[n], "bf16", &large[i], large[i].t);
      x[n] = make_packed(&c[n], &large[i]);
      run_packed(&c[n], &large[i], &x[n], false);
    }
    same_bits_again(&c[0], &large[i], &x[0]);
    struct dual *const pairs[3][2] = {
        {&x[0].out, &x[1].out}, {&x[0].lse, &x[1].lse}, {&x[0].dqkv, &x[1].dqkv}};
    for (int n = 0; n < 3; n++) { /* the second's numbers become what is expected of the first */
      const struct dual *from = pairs[n][1];
      void *raw = own(&c[0], mt_bytes(&from->dev));
      OK(be[1].download(&be[1], raw, from->dev.data, mt_bytes(&from->dev)));
      mt_dtype_convert(pairs[n][0]->ref.data, MT_F64, raw, from->dev.dtype,
                       (size_t)mt_count(&from->dev));
      expect(&c[0], pairs[n][0]);
    }
    print_message("  %-16s the kernels differ by %.2e of %.0e\n", large[i].name, c[0].worst,
                  c[0].recipe->op_tolerance);
    if (!(c[0].worst <= c[0].recipe->op_tolerance)) fail_msg("%s", c[0].worst_name);
    for (int n = 0; n < 2; n++) close_case(&c[n]);
  }
}

static void native_fp32(void **state) {
  (void)state;
  all("cuda", "fp32");
}

static void native_bf16(void **state) {
  (void)state;
  all("cuda", "bf16");
}

static void portable_fp32(void **state) {
  (void)state;
  all("cuda-portable", "fp32");
}

static void portable_bf16(void **state) {
  (void)state;
  all("cuda-portable", "bf16");
}

int main(int argc, char **argv) {
  if (argc > 1) only = argv[1];
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(kernels_agree), cmocka_unit_test(native_fp32),
      cmocka_unit_test(native_bf16),   cmocka_unit_test(portable_fp32),
      cmocka_unit_test(portable_bf16),
  };
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
