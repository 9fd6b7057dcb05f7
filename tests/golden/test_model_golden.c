/* The golden cases on ref and on the CPU. */
#include "golden/model_cases.h"

static const struct bounds cpu_bounds = {"cpu", "fp32", 1e-5, 2e-5, 1e-5, 5e-6, 5e-5};
static const struct bounds cpu_bf16_bounds = {"cpu", "bf16", GOLDEN_BF16};
/* Ten times closer, but for the norm: the fixture's own float32 steps leave 8e-7 there. */
static const struct bounds ref_bounds = {"ref", "fp64", 1e-6, 2e-6, 1e-6, 1e-6, 5e-6};

static void on_reference(const char *dir) {
  run_case(dir, &ref_bounds,
           (struct mt_model_options){.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED});
}

static void on_cpu(const char *dir) {
  every_way(dir, &cpu_bounds);
}

static void on_cpu_bf16(const char *dir) {
  every_way(dir, &cpu_bf16_bounds);
}

static void reference_agrees(void **state) {
  (void)state;
  each_case(cases_at_least(), on_reference);
}

static void cpu_agrees(void **state) {
  (void)state;
  each_case(cases_at_least(), on_cpu);
}

static void cpu_agrees_in_bf16(void **state) {
  (void)state;
  each_case(cases_at_least(), on_cpu_bf16);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(reference_agrees),
                                     cmocka_unit_test(cpu_agrees),
                                     cmocka_unit_test(cpu_agrees_in_bf16)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
