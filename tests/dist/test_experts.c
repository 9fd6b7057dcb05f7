/* Experts over ranks on the CPU. */
#include "dist/experts_cases.h"

static void gradients_float64(void **state) {
  (void)state;
  gradients_on_every_mesh("fp64", true, 1e-12, 1e-12);
}

static void gradients_float32(void **state) {
  (void)state;
  gradients_on_every_mesh("fp32", true, 2e-5, 2e-5);
}

static void gradients_eight_bits(void **state) {
  (void)state;
  gradients_in_eight_bits("mxfp8", 0.02, 1e-4);
  gradients_in_eight_bits("fp8", 0.02, 1e-4);
}

static void tokens_travel_in_eight_bits(void **state) {
  (void)state;
  dispatch_in_eight_bits_on_every_mesh("mxfp8");
  dispatch_in_eight_bits_on_every_mesh("fp8");
}

static void eight_bits_that_the_recipe_has_not_are_refused(void **state) {
  (void)state;
  struct mt_config c = config();
  struct mt_model_options o = {.dispatch = MT_DISPATCH_8BIT, .token_capacity = 8};
  struct mt_params params;
  struct mt_memory memory;
  OK(mt_params_build(&c, NULL, &params));
  assert_int_equal(mt_model_plan(&c, &params, mt_recipe_find("bf16"), &dist_be, &o, &memory),
                   MT_EUNSUPPORTED);
  assert_non_null(strstr(mt_error_message(), "--dispatch-precision 8bit with precision bf16: "));
  c.hidden = 96, c.ffn = 160, c.head_dim = 32;
  o.skip_8bit = MT_8BIT_EXPERTS;
  assert_int_equal(mt_model_plan(&c, &params, mt_recipe_find("mxfp8"), &dist_be, &o, &memory),
                   MT_EUNSUPPORTED);
  assert_non_null(strstr(mt_error_message(), "--fp8-skip experts"));
  mt_params_free(&params);
}

static void auxiliary_loss_is_of_all_tokens(void **state) {
  (void)state;
  auxiliary_loss_is_of_all("fp64", 1e-12);
}

static void a_shard_that_does_not_fit_is_refused(void **state) {
  (void)state;
  struct mt_config c = config();
  struct mt_comm self = mt_comm_self("expert");
  struct mt_shard half = {.expert_begin = EXPERTS / 2, .expert_end = EXPERTS};
  struct run mine;
  open_run(&mine, "fp32", expert_ways[0], &c, &half);
  assert_int_equal(mt_exchange_over(&mine.m, &self, &self), MT_EINVAL);
  assert_non_null(strstr(mt_error_message(), "experts 12 to 24 of 24"));
  close_run(&mine);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(gradients_float64),
    cmocka_unit_test(gradients_float32),
    cmocka_unit_test(gradients_eight_bits),
    cmocka_unit_test(tokens_travel_in_eight_bits),
    cmocka_unit_test(eight_bits_that_the_recipe_has_not_are_refused),
    cmocka_unit_test(auxiliary_loss_is_of_all_tokens),
    cmocka_unit_test(a_shard_that_does_not_fit_is_refused),
};
DIST_MAIN(tests)
