/* Training in 8 bits on a GPU, with the chip's own products of such operands where it has them and
 * with those that every GPU has, beside the CPU's. */
#include "gpu/gpu.h"
#include "model/eight_bit_cases.h"

static void native_fp8(void **state) {
  (void)state;
  trains_as_the_cpu("cuda", "fp8", NULL);
  trains_as_the_cpu("cuda", "fp8-states", NULL);
}
static void native_mxfp8(void **state) {
  (void)state;
  trains_as_the_cpu("cuda", "mxfp8", NULL);
  trains_as_the_cpu("cuda", "mxfp8-states", NULL);
}
static void portable_fp8(void **state) {
  (void)state;
  trains_as_the_cpu("cuda-portable", "fp8", NULL);
}
static void portable_mxfp8(void **state) {
  (void)state;
  trains_as_the_cpu("cuda-portable", "mxfp8", NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(native_fp8),
      cmocka_unit_test(native_mxfp8),
      cmocka_unit_test(portable_fp8),
      cmocka_unit_test(portable_mxfp8),
  };
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
