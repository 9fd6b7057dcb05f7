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

/* What brings 8-bit operands back to bf16 has memory only where a chip needs it: Hopper's own FP8
 * products take every shape that the recipe lets through. */
static void native_products_need_no_memory(void **state) {
  (void)state;
  static const struct {
    int capability; /* 0: portable */
    enum mt_qformat format;
    enum mt_dtype act;
    int hidden, ffn, heads; /* 1: as in the limits of a room without them */
    bool needs;
  } rows[] = {
      {90, MT_Q_FP8, MT_BF16, 4096, 14336, 4, false},
      {90, MT_Q_FP8, MT_BF16, 4112, 1040, 4, false},
      {90, MT_Q_FP8, MT_BF16, 4096, 1, 4, false},
      {90, MT_Q_FP8, MT_BF16, 4096, 14336, 1, false},
      {90, MT_Q_FP8, MT_F32, 4096, 14336, 4, true},
      {90, MT_Q_MXFP8, MT_BF16, 4096, 14336, 4, true},
      {80, MT_Q_FP8, MT_BF16, 4096, 14336, 4, true},
      {0, MT_Q_FP8, MT_BF16, 4096, 14336, 4, true},
      {100, MT_Q_FP8, MT_BF16, 4096, 14336, 4, true},
      {100, MT_Q_MXFP8, MT_BF16, 4096, 14336, 4, true},
  };
  struct mt_backend be;
  if (mt_backend_cuda_plan(&be, false) == MT_EUNSUPPORTED) skip();
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    struct mt_limits l = {.tokens = 16384,
                          .rows = 32768,
                          .hidden = rows[i].hidden,
                          .ffn = rows[i].ffn,
                          .experts = 8,
                          .top_k = 2,
                          .vocab = 512,
                          .heads = rows[i].heads,
                          .kv_heads = rows[i].heads / 2 + rows[i].heads % 2,
                          .head_dim = 8,
                          .act = rows[i].act,
                          .qformat = rows[i].format};
    be.capability = rows[i].capability;
    size_t all = be.workspace_bytes(&be, &l);
    /* The least that bringing back would take: both operands of the weight gradients. */
    size_t back = (size_t)(l.rows * (2 * l.ffn + l.hidden)) * 2;
    if ((all >= back) != rows[i].needs)
      fail_msg("row %zu: %zu bytes, bringing back takes %zu", i, all, back);
  }
  mt_backend_destroy(&be);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(plans_without_a_gpu),
                                     cmocka_unit_test(native_products_need_no_memory)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
