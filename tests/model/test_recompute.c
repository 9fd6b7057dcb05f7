/* What backward computes again must be what forward had, and memory falls as the plan says. */
#include "model/recompute_cases.h"

static void gradients_are_the_same_to_the_bit(void **state) {
  (void)state;
  gradients_are_the_same_on("cpu");
}

/* The plan of every combination is what a model takes, and each mode takes less than the one
 * before.
 */
static void memory_equals_the_plan(void **state) {
  (void)state;
  static const char *const recipes[] = {"fp32", "bf16", "bf16-states"};
  struct mt_config c = deep_config(false);
  for (int way = 0; way < WAYS; way++) {
    for (int r = 0; r < 3; r++) {
      size_t before = SIZE_MAX;
      for (int mode = 0; mode < MODES; mode++) {
        struct small_model s;
        struct mt_params params;
        struct mt_memory planned, taken;
        small_open(&s, "cpu", recipes[r], &c, way_of(way, mode));
        OK(mt_params_build(&c, NULL, &params));
        OK(mt_model_plan(&c, &params, s.m.recipe, &s.be, &s.m.options, &planned));
        taken = mt_model_memory(&s.m);
        assert_memory_equal(&planned, &taken, sizeof planned);
        assert_true(s.m.activations.used_bytes == s.m.activations.capacity_bytes);
        assert_true(taken.activations < before);
        before = taken.activations;
        mt_params_free(&params);
        small_close(&s);
      }
    }
  }
}

/* Two layers as wide as Mixtral 8x7B's and 16384 tokens with bf16 states: planned, not taken. The
 * workspace is another backend's; the head's chunk of 4096 rows in two formats is what a GPU's
 * largest part was when this was written. */
static size_t wide_workspace(const struct mt_backend *be, const struct mt_limits *l) {
  (void)be;
  return (size_t)(l->tokens < 4096 ? l->tokens : 4096) * (size_t)l->vocab * 6 + (64 << 20);
}

static void mixtral_width_fits(void **state) {
  (void)state;
  static const double most_gib[MODES] = {30, 28.2, 27.8};
  struct mt_config c = small_config();
  c.hidden = 4096, c.ffn = 14336, c.heads = 32, c.kv_heads = 8, c.head_dim = 128;
  c.experts = 8, c.vocab = 32000;
  struct mt_backend be = {.name = "wide", .workspace_bytes = wide_workspace};
  for (int mode = 0; mode < MODES; mode++) {
    struct mt_params params;
    struct mt_memory m;
    struct mt_model_options o = way_of(4, mode);
    o.token_capacity = 16384;
    o.sequence_capacity = 2;
    OK(mt_params_build(&c, NULL, &params));
    OK(mt_model_plan(&c, &params, mt_recipe_find("bf16-states"), &be, &o, &m));
    double all = (double)(m.parameters + m.gradients + m.optimizer + m.activations) / (1 << 30);
    print_message("  recompute %d: %.2f GiB, %.2f of them activations\n", mode, all,
                  (double)m.activations / (1 << 30));
    assert_true(all < most_gib[mode]);
    mt_params_free(&params);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients_are_the_same_to_the_bit),
      cmocka_unit_test(memory_equals_the_plan),
      cmocka_unit_test(mixtral_width_fits),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
