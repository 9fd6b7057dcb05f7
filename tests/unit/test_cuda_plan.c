/* Memory plans for a GPU need none; a build without CUDA says what it lacks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "kernels/registry.h"

static void plans_without_a_gpu(void **state) {
  (void)state;
  struct mt_backend be;
  struct mt_limits l = {.tokens = 64,
                        .rows = 128,
                        .hidden = 64,
                        .ffn = 96,
                        .experts = 4,
                        .top_k = 2,
                        .vocab = 512,
                        .heads = 4,
                        .kv_heads = 2,
                        .head_dim = 16,
                        .act = MT_BF16};
  if (mt_backend_cuda_plan(&be, false) == MT_EUNSUPPORTED) {
    assert_non_null(strstr(mt_error_message(), "CUDA=1"));
    return;
  }
  size_t few = be.workspace_bytes(&be, &l);
  l.tokens *= 64, l.rows *= 64;
  assert_true(few > 0);
  assert_true(be.workspace_bytes(&be, &l) > few);
  mt_backend_destroy(&be);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(plans_without_a_gpu)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
