/* What backward computes again on a GPU is what forward had, to the bit. */
#include "gpu/gpu.h"
#include "model/recompute_cases.h"

static void native(void **state) {
  (void)state;
  gradients_are_the_same_on("cuda");
}

static void portable(void **state) {
  (void)state;
  gradients_are_the_same_on("cuda-portable");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(native), cmocka_unit_test(portable)};
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
