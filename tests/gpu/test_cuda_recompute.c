/* Passes on a GPU: what backward computes again is what forward had, to the bit; batches without a
 * token add nothing. */
#include "gpu/gpu.h"
#include "model/empty_batch.h"
#include "model/recompute_cases.h"

static void native(void **state) {
  (void)state;
  gradients_are_the_same_on("cuda");
}

static void portable(void **state) {
  (void)state;
  gradients_are_the_same_on("cuda-portable");
}

static void without_a_token(void **state) {
  static const char *const recipes[] = {"fp32", "bf16",       "bf16-states",
                                        "fp8",  "fp8-states", "mxfp8"};
  (void)state;
  for (int i = 0; i < 6; i++) {
    empty_batches("cuda", recipes[i]);
    empty_batches("cuda-portable", recipes[i]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(native), cmocka_unit_test(portable),
                                     cmocka_unit_test(without_a_token)};
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
