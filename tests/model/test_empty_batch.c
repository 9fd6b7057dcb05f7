/* Batches without a token on ref and cpu. */
#include "model/empty_batch.h"

static void on_reference(void **state) {
  (void)state;
  empty_batches("ref", "fp64");
}

static void on_cpu(void **state) {
  static const char *const recipes[] = {"fp32", "bf16", "bf16-states", "fp8", "mxfp8-states"};
  (void)state;
  for (int i = 0; i < 5; i++) empty_batches("cpu", recipes[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(on_reference), cmocka_unit_test(on_cpu)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
