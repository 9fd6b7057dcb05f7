/* What is counted without running is what runs: arenas of a built model, and the operations, FLOPs
 * and bytes that a profile of real steps sees. */
#include "model/recompute_cases.h"
#include "train/plan.h"
#include "train/step.h"

static void no_padding(struct small_batch *s, int vocab) {
  small_batch(s, vocab, 1);
  s->b.valid_count = s->cu[3] = SMALL_TOKENS;
  for (int i = 0; i < SMALL_TOKENS; i++) s->labels[i] = 1;
  s->b.target_count = SMALL_TOKENS;
}

static void count(const struct small_model *s, const struct mt_params *params,
                  const struct mt_machine *machine, struct mt_count *out,
                  struct mt_profile *profile) {
  struct mt_mesh mesh;
  OK(mt_mesh_make(&s->m.config, 1, 0, 1, 1, &mesh));
  const struct mt_count_options o = {.config = &s->m.config,
                                     .params = params,
                                     .recipe = s->m.recipe,
                                     .backend = &s->be,
                                     .model = s->m.options,
                                     .mesh = &mesh,
                                     .rows = (int64_t)SMALL_TOKENS * s->m.config.top_k,
                                     .machine = machine,
                                     .sequence_length = 8};
  OK(mt_count_step(&o, out, profile));
}

static void step_profile(struct small_model *s, struct mt_profile *p) {
  const struct mt_optimizer_options oo = {.lr = 1e-4,
                                          .beta1 = 0.9,
                                          .beta2 = 0.99,
                                          .eps = 1e-8,
                                          .clip = 1,
                                          .schedule = MT_SCHEDULE_CONSTANT};
  struct mt_optimizer opt;
  struct mt_step_queue q;
  struct mt_step_result r;
  struct small_batch b;
  struct mt_batch *batch = &b.b;
  no_padding(&b, s->m.config.vocab);
  OK(mt_optimizer_create(&opt, &s->m, &oo));
  OK(mt_step_queue_create(&q, &opt, false));
  mt_profile_begin(p, &s->be, 8);
  OK(mt_step_run(&q, &batch, 1, &r));
  OK(mt_profile_end(p));
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&opt);
}

/* Which experts of a loop have rows is the data's: then calls may be fewer, and weights read. */
static void same_rows(const struct mt_profile *counted, const struct mt_profile *ran, bool loop) {
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    const struct mt_profile_row *c = &counted->row[i], *r = &ran->row[i];
    bool same = c->flops == r->flops && (c->calls > 0) == (r->calls > 0);
    if (!loop) same &= c->calls == r->calls && c->bytes == r->bytes;
    if (!same) {
      fail_msg("%s: counted %lld calls, %.17g FLOPs, %.17g bytes; ran %lld, %.17g, %.17g",
               mt_op_name(i), (long long)c->calls, c->flops, c->bytes, (long long)r->calls,
               r->flops, r->bytes);
    }
  }
}

static void counted_is_what_runs(void **state) {
  (void)state;
  static const char *const recipes[] = {"fp32", "bf16", "bf16-states"};
  struct mt_config c = deep_config(false);
  struct mt_machine machine;
  OK(mt_machine_find("h100", &machine));
  for (int way = 0; way < WAYS; way++) {
    for (int r = 0; r < 3; r++) {
      for (int mode = 0; mode < MODES; mode++) {
        struct small_model s;
        struct mt_params params;
        struct mt_count counted;
        struct mt_profile without = {0}, with = {0};
        small_open(&s, "cpu", recipes[r], &c, way_of(way, mode));
        OK(mt_params_build(&c, NULL, &params));
        count(&s, &params, &machine, &counted, &without);
        struct mt_memory taken = mt_model_memory(&s.m);
        assert_memory_equal(&counted.arenas, &taken, sizeof taken);
        assert_int_equal(counted.rows_bytes, 0);
        step_profile(&s, &with);
        same_rows(&without, &with, s.m.options.experts == MT_EXPERTS_LOOP);
        mt_params_free(&params);
        small_close(&s);
      }
    }
  }
}

/* Products alone, attention's backward as the formula has it (four, of which five are counted). */
static void flops_are_the_formula(void **state) {
  (void)state;
  struct mt_config c = deep_config(false);
  struct mt_machine machine;
  struct small_model s;
  struct mt_params params;
  struct mt_count counted;
  struct mt_profile p = {0};
  double flops = 0;
  OK(mt_machine_find("h100", &machine));
  small_open(&s, "cpu", "fp32", &c, way_of(WAYS - 1, 0));
  OK(mt_params_build(&c, NULL, &params));
  count(&s, &params, &machine, &counted, &p);
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    bool router = strncmp(mt_op_name(i), "router", 6) == 0;
    bool backward = strcmp(mt_op_name(i), "attention_bwd") == 0;
    flops += router ? 0 : backward ? 0.8 * p.row[i].flops : p.row[i].flops;
  }
  double want = SMALL_TOKENS * mt_model_flops_per_token(&c, 8);
  if (!(fabs(flops - want) <= 1e-12 * want)) fail_msg("%.17g FLOPs, not %.17g", flops, want);
  mt_params_free(&params);
  small_close(&s);
}

/* A machine of twice the rates takes half the time. */
static void time_follows_the_machine(void **state) {
  (void)state;
  struct mt_config c = deep_config(false);
  struct mt_machine slow, fast;
  struct small_model s;
  struct mt_params params;
  struct mt_count a, b;
  OK(mt_machine_find("h100", &slow));
  fast = slow;
  fast.fp32_flops *= 2;
  fast.copy_bytes *= 2;
  fast.launch_s /= 2;
  small_open(&s, "cpu", "fp32", &c, way_of(WAYS - 1, 0));
  OK(mt_params_build(&c, NULL, &params));
  count(&s, &params, &slow, &a, NULL);
  count(&s, &params, &fast, &b, NULL);
  assert_true(a.first_s > 0 && fabs(a.first_s / b.first_s - 2) < 1e-9);
  assert_true(a.update_s > 0 && fabs(a.update_s / b.update_s - 2) < 1e-9);
  assert_true(a.ends_s > 0 && a.ends_s < a.first_s);
  assert_true(a.more.bytes > a.first.bytes); /* gradients are read before they are written */
  assert_int_equal(mt_machine_find("abacus", &slow), MT_EINVAL);
  assert_non_null(strstr(mt_error_message(), "'abacus'"));
  mt_params_free(&params);
  small_close(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(counted_is_what_runs),
      cmocka_unit_test(flops_are_the_formula),
      cmocka_unit_test(time_follows_the_machine),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
