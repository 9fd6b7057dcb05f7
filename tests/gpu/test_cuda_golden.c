/* The golden cases on a GPU: fp32 within the bounds of the CPU's, bf16 within those of the format.
 */
#include "golden/model_cases.h"
#include "gpu/gpu.h"

static const struct bounds native_fp32 = {"cuda", "fp32", 1e-5, 2e-5, 1e-5, 5e-6, 5e-5};
static const struct bounds portable_fp32 = {"cuda-portable", "fp32", 1e-5, 2e-5, 1e-5, 5e-6, 5e-5};
static const struct bounds native_bf16 = {"cuda", "bf16", GOLDEN_BF16};
static const struct bounds portable_bf16 = {"cuda-portable", "bf16", GOLDEN_BF16};

static void on_gpu_fp32(const char *dir) {
  every_way(dir, &native_fp32);
  every_way(dir, &portable_fp32);
}

static void on_gpu_bf16(const char *dir) {
  every_way(dir, &native_bf16);
  every_way(dir, &portable_bf16);
}

static void fp32_agrees(void **state) {
  (void)state;
  each_case(cases_at_least(), on_gpu_fp32);
}

static void bf16_agrees(void **state) {
  (void)state;
  each_case(cases_at_least(), on_gpu_bf16);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(fp32_agrees), cmocka_unit_test(bf16_agrees)};
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
