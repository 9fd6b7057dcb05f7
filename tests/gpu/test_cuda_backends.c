/* Every operation of the CUDA backend against the float64 reference, with the kernels of the chip
 * at hand and with the portable ones. */
#include "gpu/gpu.h"
#include "kernels/against.h"

static void native_fp32(void **state) {
  (void)state;
  against_reference("cuda", "fp32");
}

static void native_bf16(void **state) {
  (void)state;
  against_reference("cuda", "bf16");
}

static void native_bf16_states(void **state) {
  (void)state;
  against_reference("cuda", "bf16-states");
}

static void portable_bf16_states(void **state) {
  (void)state;
  against_reference("cuda-portable", "bf16-states");
}

static void portable_fp32(void **state) {
  (void)state;
  against_reference("cuda-portable", "fp32");
}

static void portable_bf16(void **state) {
  (void)state;
  against_reference("cuda-portable", "bf16");
}

static void tolerances_reject_a_planted_bug(void **state) {
  (void)state;
  rejects_a_planted_bug("cuda");
}

static void bits_repeat(void **state) {
  (void)state;
  repeats_its_bits("cuda");
  repeats_its_bits("cuda-portable");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(native_fp32),        cmocka_unit_test(native_bf16),
      cmocka_unit_test(portable_fp32),      cmocka_unit_test(portable_bf16),
      cmocka_unit_test(native_bf16_states), cmocka_unit_test(portable_bf16_states),
      cmocka_unit_test(bits_repeat),        cmocka_unit_test(tolerances_reject_a_planted_bug),
  };
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
