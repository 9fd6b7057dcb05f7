/* Steps of many ranks on the CPU. */
#include "dist/steps_cases.h"

static void steps_float64(void **state) {
  (void)state;
  steps_on_every_mesh("fp64", (struct near){1e-10, 1e-10, 1e-10, true, true});
}

static void steps_float32(void **state) {
  (void)state;
  steps_on_every_mesh("fp32", (struct near){1e-5, 1e-5, 1e-4, true, true});
}

static void steps_cut_over_the_ranks(void **state) {
  (void)state;
  cut_steps_on_every_mesh(
      (const char *const[]){"bf16", "bf16-states", "fp8", "fp8-states", "mxfp8"}, 5);
}

static void other_weights(void **state) {
  (void)state;
  other_weights_are_seen("fp32");
  other_weights_are_seen("bf16");
  other_weights_are_seen("fp8");
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(other_weights), cmocka_unit_test(steps_float64),
    cmocka_unit_test(steps_float32), cmocka_unit_test(steps_cut_over_the_ranks)};
DIST_MAIN(tests)
