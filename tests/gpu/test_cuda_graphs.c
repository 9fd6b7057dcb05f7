/* Replayed steps on a GPU are launched ones, to the bit; so is a run that was resumed; and what the
 * process holds besides the plan is bounded. */
#include "gpu/gpu.h"
#include "model/graph_cases.h"
#include "model/run_cases.h"

static void native_small(void **state) {
  (void)state;
  replay_gives_the_same_bits("cuda", NULL, false);
}

static void native_large(void **state) {
  (void)state;
  replay_gives_the_same_bits("cuda", NULL, true);
}

static void portable(void **state) {
  (void)state;
  replay_gives_the_same_bits("cuda-portable", NULL, true);
}

static void a_run_resumes_bit_for_bit(void **state) {
  (void)state;
  run_repeats_and_resumes("cuda", "bf16", "fp32");
  run_repeats_and_resumes("cuda", "bf16", "bf16");
  run_repeats_and_resumes("cuda", "fp8", "fp32");
}

/* Graphs, the driver's context and libraries: what no arena counts. Other processes on the device
 * count too, so that this may fail where it is shared. */
static void little_memory_beyond_the_plan(void **state) {
  (void)state;
  struct small_model s;
  struct course c = {0};
  struct course_options o = {
      .recipe = "bf16",
      .config = course_config(true),
      .model = {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true},
      .micro_count = COURSE_MICRO,
      .lengths = 3,
      .graphs = true};
  small_open(&s, "cuda", o.recipe, &o.config, o.model);
  size_t before = s.be.memory_used(&s.be);
  run_course(&s, &o, 0, COURSE_STEPS, &c);
  size_t after = s.be.memory_used(&s.be);
  struct mt_memory m = mt_model_memory(&s.m);
  size_t planned = m.parameters + m.gradients + m.optimizer + m.activations;
  print_message("  %.1f MiB before the first step, %.1f after the last, %.1f of them planned\n",
                (double)before / (1 << 20), (double)after / (1 << 20), (double)planned / (1 << 20));
  assert_true(after - planned < (size_t)3 << 29);
  small_close(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(native_small),
      cmocka_unit_test(native_large),
      cmocka_unit_test(portable),
      cmocka_unit_test(a_run_resumes_bit_for_bit),
      cmocka_unit_test(little_memory_beyond_the_plan),
  };
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
