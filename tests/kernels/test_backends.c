/* Every operation of the CPU backend against the float64 reference; and the proof that the
 * tolerances see a bug. */
#include "kernels/against.h"

static void cpu_fp32(void **state) {
  (void)state;
  against_reference("cpu", "fp32");
}

static void cpu_bf16(void **state) {
  (void)state;
  against_reference("cpu", "bf16");
}

static void cpu_bf16_states(void **state) {
  (void)state;
  against_reference("cpu", "bf16-states");
}

#ifndef __SANITIZE_ADDRESS__
/* The reference on float32 storage: what the harness itself must accept. */
static void ref_fp32(void **state) {
  (void)state;
  against_reference("ref", "fp32");
}

static void tolerances_reject_a_planted_bug(void **state) {
  (void)state;
  rejects_a_planted_bug("cpu");
}

static void bits_repeat(void **state) {
  (void)state;
  repeats_its_bits("cpu");
}
#endif

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(cpu_fp32),        cmocka_unit_test(cpu_bf16),
      cmocka_unit_test(cpu_bf16_states),
#ifndef __SANITIZE_ADDRESS__ /* which looks at memory, ten times as slowly: once is enough */
      cmocka_unit_test(ref_fp32),        cmocka_unit_test(tolerances_reject_a_planted_bug),
      cmocka_unit_test(bits_repeat),
#endif
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
