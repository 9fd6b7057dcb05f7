/* config.json: what is read, what is refused, and that the refusal names the key. */
#include "hf/config.h"
#include "temp_dir.h"

static const char base[] =
    "\"model_type\":\"mixtral\",\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":"
    "2,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"num_local_experts\":8,"
    "\"num_experts_per_tok\":2,\"vocab_size\":512";

static mt_err parse(const char *more, struct mt_config *c) {
  char text[2048];
  snprintf(text, sizeof text, "{%s%s%s}", base, *more ? "," : "", more);
  return mt_hf_config_parse(text, strlen(text), "config.json", c, NULL);
}

static void spellings(void **state) {
  (void)state;
  struct mt_config c;
  OK(parse("\"rope_theta\":1000000.0,\"head_dim\":null,\"sliding_window\":null", &c));
  assert_true(c.rope_theta == 1e6);
  assert_int_equal(c.head_dim, 16);
  assert_int_equal(c.layer[1].window, 0);
  assert_true(c.layer[1].renormalize);
  OK(parse("\"rope_parameters\":{\"rope_theta\":5000,\"rope_type\":\"default\"},\"head_dim\":32,"
           "\"sliding_window\":7,\"tie_word_embeddings\":true,\"eos_token_id\":[5,6]",
           &c));
  assert_true(c.rope_theta == 5000);
  assert_int_equal(c.head_dim, 32);
  assert_int_equal(c.layer[0].window, 7);
  assert_true(c.tied_head);
  assert_int_equal(c.eos_id, 5);
  assert_int_equal(c.bos_id, -1);
  /* MixtralConfig's defaults, and a theta that stands outside of parameters that have none. */
  OK(parse("", &c));
  assert_true(c.rope_theta == 1e6);
  OK(parse("\"rope_theta\":500,\"rope_parameters\":{\"rope_type\":\"default\"}", &c));
  assert_true(c.rope_theta == 500);
  static const char *const heads[] = {"\"num_key_value_heads\":2", "\"num_key_value_heads\":null",
                                      ""};
  static const int kv_heads[] = {2, 16, 8};
  for (int i = 0; i < 3; i++) {
    char text[512];
    snprintf(text, sizeof text,
             "{\"model_type\":\"mixtral\",\"hidden_size\":64,\"intermediate_size\":96,"
             "\"num_hidden_layers\":2,\"num_attention_heads\":16,\"num_local_experts\":8,"
             "\"num_experts_per_tok\":2,\"vocab_size\":512%s%s}",
             *heads[i] ? "," : "", heads[i]);
    OK(mt_hf_config_parse(text, strlen(text), "config.json", &c, NULL));
    assert_int_equal(c.kv_heads, kv_heads[i]);
  }
}

static void refusals(void **state) {
  (void)state;
  static const struct {
    const char *more;
    mt_err err;
    const char *names;
  } cases[] = {
      {"\"rope_scaling\":{\"type\":\"linear\"}", MT_EUNSUPPORTED, "rope_scaling"},
      {"\"rope_parameters\":{\"rope_type\":\"yarn\"}", MT_EUNSUPPORTED, "yarn"},
      {"\"hidden_act\":\"gelu\"", MT_EUNSUPPORTED, "hidden_act"},
      {"\"rms_norm_eps\":\"x\"", MT_EFORMAT, "rms_norm_eps"},
      {"\"rms_norm_eps\":-1", MT_ESHAPE, "rms_norm_eps"},
      {"\"head_dim\":7", MT_ESHAPE, "head_dim"},
      {"\"head_dim\":99999999999", MT_ESHAPE, "head_dim"},
      {"\"tie_word_embeddings\":1", MT_EFORMAT, "tie_word_embeddings"},
      {"\"vocab_size\":512", MT_EFORMAT, "duplicate"},
      {"\"router_aux_loss_coef\":-0.1", MT_ESHAPE, "router_aux_loss_coef"},
  };
  struct mt_config c;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    FAILS(parse(cases[i].more, &c), cases[i].err, cases[i].names);
    assert_non_null(strstr(mt_error_message(), "config.json"));
  }
  const char *whole[][2] = {
      {"{\"model_type\":\"llama\"}", "'llama' is not supported"},
      {"{}", "'model_type' is missing"},
      {"{\"model_type\":\"mixtral\"}", "'hidden_size' is missing"},
      {"[]", "no JSON object"},
      {"{\"a\":\"\xff\"}", "config.json"},
      {"{", "config.json"},
  };
  for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
    mt_err err = mt_hf_config_parse(whole[i][0], strlen(whole[i][0]), "config.json", &c, NULL);
    assert_int_not_equal(err, MT_OK);
    if (!strstr(mt_error_message(), whole[i][1])) fail_msg("'%s'", mt_error_message());
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(spellings), cmocka_unit_test(refusals)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
