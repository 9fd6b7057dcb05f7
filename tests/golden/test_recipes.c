/* Training in 8 bits beside float32: every parameter's gradient at the first step, on the small
 * Mixtral of the fixtures (64 and 96 wide: FP8's last blocks are short there, half a block and
 * three quarters of one), of the whole step and of backward by itself, and that the recipe's bounds
 * see one block's wrong scale. */
#include "golden/rounded_apart.h"

static const char *const recipes[] = {"mxfp8", "fp8"};

static double cosine(const double *a, const double *b, int64_t n) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < n; i++) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  return ab / sqrt(aa * bb);
}

/* The choices of a run, by call of router_fwd: noted by the first, imposed on others. */
static struct mt_ops right;
static struct {
  int32_t index[8][1024];
  int calls, moved, chosen;
  bool noted;
} routes;

static mt_err routed(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  int64_t k = a->prob.dim[1], n = a->x.dim[0] * k;
  int32_t *noted = routes.index[routes.calls++];
  MT_TRY(right.router_fwd(be, a));
  assert_true(routes.calls <= 8 && n <= 1024);
  if (!routes.noted) {
    memcpy(noted, a->index, (size_t)n * sizeof *noted);
    return MT_OK;
  }
  for (int64_t t = 0; t < a->x.dim[0]; t++) {
    const float *z = (const float *)a->logits.data + t * a->logits.ld;
    float *prob = (float *)a->prob.data + t * a->prob.ld, sum = 0;
    for (int64_t i = 0; i < k && noted[t * k] >= 0; i++) {
      bool same = false;
      for (int64_t j = 0; j < k; j++) same |= a->index[t * k + j] == noted[t * k + i];
      routes.moved += !same, routes.chosen++;
      sum += prob[i] = expf(z[noted[t * k + i]] - z[noted[t * k]]);
    }
    for (int64_t i = 0; i < k && noted[t * k] >= 0; i++) prob[i] /= sum;
  }
  memcpy(a->index, noted, (size_t)n * sizeof *noted);
  return MT_OK;
}

struct gradients {
  int count;
  double *of[64];
};

static struct gradients gradients_of(const char *recipe, struct mt_model_options options,
                                     void (*prepare)(struct golden *g)) {
  struct golden g = {.dir = MT_SOURCE_DIR "/tests/golden/mixtral-tiny"};
  struct bounds b = {.backend = "cpu", .recipe = recipe};
  struct mt_step_result r;
  struct mt_batch *micro[] = {&g.batch};
  struct gradients all = {0};
  open_case(&g, &b, options);
  right = g.be.ops;
  g.be.ops.router_fwd = routed;
  routes.calls = routes.moved = routes.chosen = 0;
  OK(mt_model_quantize_weights(&g.m));
  if (prepare) prepare(&g);
  OK(mt_step_gradients(&g.m, micro, 1, &r));
  all.count = g.m.params.count;
  assert_true(all.count <= 64);
  for (int i = 0; i < all.count; i++) all.of[i] = mirror(&g, &g.m.params.row[i].grad);
  close_case(&g);
  return all;
}

static void free_gradients(struct gradients *g) {
  for (int i = 0; i < g->count; i++) free(g->of[i]);
}

/* The least cosine over all parameters, and whose it is. */
static double least_cosine(const char *recipe, struct mt_model_options options,
                           void (*prepare)(struct golden *g), char name[48]) {
  struct mt_model_options plain = {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED};
  routes.noted = false;
  struct gradients want = gradients_of("fp32", plain, NULL);
  routes.noted = true;
  struct gradients got = gradients_of(recipe, options, prepare);
  struct mt_hf_checkpoint h;
  struct mt_params p;
  double least = 1;
  OK(mt_hf_open(MT_SOURCE_DIR "/tests/golden/mixtral-tiny/model", &h));
  OK(mt_params_build(&h.config, NULL, &p));
  for (int i = 0; i < p.count; i++) {
    double c = cosine(got.of[i], want.of[i], mt_param_count(&p.row[i]));
    if (getenv("MOETUNE_SHOW")) print_message("    %-20s %.5f\n", p.row[i].name, c);
    if (c >= least) continue;
    least = c;
    snprintf(name, 48, "%s", p.row[i].name);
  }
  mt_params_free(&p);
  mt_hf_close(&h);
  free_gradients(&want);
  free_gradients(&got);
  return least;
}

static void gradients_point_where_float32s_do(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) {
    for (int experts = MT_EXPERTS_LOOP; experts <= MT_EXPERTS_FUSED; experts++) {
      struct mt_model_options o = {.experts = (enum mt_experts_strategy)experts,
                                   .blocks = MT_BLOCKS_FUSED};
      char name[48] = "";
      double c = least_cosine(recipes[i], o, NULL, name);
      double bound = mt_recipe_find(recipes[i])->grad_cosine;
      print_message("  %-6s experts %d: least cosine %.4f of %s; %d of %d choices would differ\n",
                    recipes[i], experts, c, name, routes.moved, routes.chosen);
      if (!(c > bound)) fail_msg("%s: cosine %.4f of %s", recipes[i], c, name);
    }
  }
}

/* Planted: in every operand of activations or gradients, the first block of each copy has its scale
 * doubled. */
static void spoil(const struct mt_qtensor *q) {
  if (q->format == MT_Q_FP8) {
    if (q->row) *(float *)q->row_scale *= 2;
    if (q->col) *(float *)q->col_scale *= 2;
    return;
  }
  if (q->row) ++*(uint8_t *)q->row_scale;
  if (q->col) ++*(uint8_t *)q->col_scale;
}
static mt_err spoiled_weight(struct mt_backend *be, const struct mt_quantize_weight_args *a) {
  MT_TRY(right.quantize_weight(be, a));
  spoil(&a->q);
  return MT_OK;
}
static mt_err spoiled(struct mt_backend *be, const struct mt_quantize_args *a) {
  MT_TRY(right.quantize(be, a));
  spoil(&a->q);
  return MT_OK;
}
static void spoil_rows(struct golden *g) {
  g->be.ops.quantize = spoiled;
}
static void spoil_weights(struct golden *g) {
  g->be.ops.quantize_weight = spoiled_weight;
  OK(mt_model_quantize_weights(&g->m));
}

static void a_scale_of_one_block_is_seen(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) {
    for (int which = 0; which < 2; which++) {
      struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED};
      char name[48] = "";
      double c = least_cosine(recipes[i], o, which ? spoil_weights : spoil_rows, name);
      print_message("  %-6s one block's scale doubled in %s: least cosine %.4f of %s\n", recipes[i],
                    which ? "weights" : "activations", c, name);
      if (c > mt_recipe_find(recipes[i])->grad_cosine) fail_msg("%s: it passed", recipes[i]);
    }
  }
}

/* The least cosine where of each weight's operands those of `rounded` are. */
static double apart_cosine(const char *recipe, const unsigned rounded[OF_COUNT],
                           void (*prepare)(struct golden *g), char name[48]) {
  struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED};
  memcpy(apart_state.rounded, rounded, sizeof apart_state.rounded);
  double c = least_cosine(recipe, o, prepare, name);
  forget_sources();
  return c;
}

static const unsigned no_operand[OF_COUNT] = {0};
static const unsigned every_operand[OF_COUNT] = {ROUND_ALL, ROUND_ALL, ROUND_ALL, ROUND_ALL};
enum { BACKWARD = ROUND_ALL & ~(FWD_X | FWD_W) };
static const unsigned backward_alone[OF_COUNT] = {BACKWARD, BACKWARD, BACKWARD, BACKWARD};

static void spoil_backward(struct golden *g) {
  g->be.ops.quantize = spoiled;
  round_apart(g);
}

/* What the whole step is off by is forward's rounding (docs/math.md, "Eight-bit blocks"). */
static void backwards_own_rounding_is_small(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) {
    const char *r = recipes[i];
    struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED};
    char name[48] = "", planted[48] = "";
    double bound = mt_recipe_find(r)->backward_cosine;
    /* Taken apart, the step is what it was. */
    double whole = least_cosine(r, o, NULL, name);
    double taken = apart_cosine(r, every_operand, round_apart, name);
    if (!(fabs(whole - taken) < 2e-3)) fail_msg("%s: %.5f in one, %.5f apart", r, whole, taken);
    double none = apart_cosine(r, no_operand, round_apart, name);
    if (!(none > 0.999)) fail_msg("%s: nothing is rounded, and the cosine is %.5f", r, none);
    double c = apart_cosine(r, backward_alone, round_apart, name);
    double bad = apart_cosine(r, backward_alone, spoil_backward, planted);
    print_message("  %-6s backward alone: least cosine %.4f of %s; a block's scale doubled: %.4f\n",
                  r, c, name, bad);
    if (!(c > bound)) fail_msg("%s: cosine %.4f of %s", r, c, name);
    if (bad > bound) fail_msg("%s: a doubled scale passed", r);
  }
}

/* The table of docs/math.md, where it is asked for. */
static void what_each_operand_costs(void **state) {
  (void)state;
  static const struct {
    const char *what;
    unsigned rounded[OF_COUNT];
  } rows[] = {
#define EVERYWHERE(m) {m, m, m, m}
      {"everything", EVERYWHERE(ROUND_ALL)},
      {"forward", EVERYWHERE(FWD_X | FWD_W)},
      {"forward's x", EVERYWHERE(FWD_X)},
      {"forward's w", EVERYWHERE(FWD_W)},
      {"forward of qkv", {FWD_X | FWD_W, 0, 0, 0}},
      {"forward of out", {0, FWD_X | FWD_W, 0, 0}},
      {"forward of gate and up", {0, 0, FWD_X | FWD_W, 0}},
      {"forward of down", {0, 0, 0, FWD_X | FWD_W}},
      {"dx's dy", EVERYWHERE(DGRAD_DY)},
      {"dx's w", EVERYWHERE(DGRAD_W)},
      {"dx", EVERYWHERE(DGRAD_DY | DGRAD_W)},
      {"dw's dy", EVERYWHERE(WGRAD_DY)},
      {"dw's x", EVERYWHERE(WGRAD_X)},
      {"dw", EVERYWHERE(WGRAD_DY | WGRAD_X)},
      {"backward", EVERYWHERE(BACKWARD)},
      {"all but qkv's forward", {BACKWARD, ROUND_ALL, ROUND_ALL, ROUND_ALL}},
      {"the experts alone", {0, 0, ROUND_ALL, ROUND_ALL}},
#undef EVERYWHERE
  };
  if (!getenv("MOETUNE_TABLE")) skip();
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    for (int r = 0; r < 2; r++) {
      char name[48] = "";
      double c = apart_cosine(recipes[r], rows[i].rounded, round_apart, name);
      print_message("  %-6s %-24s %.4f of %s\n", recipes[r], rows[i].what, c, name);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(gradients_point_where_float32s_do),
                                     cmocka_unit_test(a_scale_of_one_block_is_seen),
                                     cmocka_unit_test(backwards_own_rounding_is_small),
                                     cmocka_unit_test(what_each_operand_costs)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
