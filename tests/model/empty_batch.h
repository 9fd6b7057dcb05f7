/* A micro-batch without a token, with rows of padding and with none: as the first of a step it
 * leaves every gradient zero, as a further one what is there, and its losses are nothing. */
#ifndef TESTS_MODEL_EMPTY_BATCH_H
#define TESTS_MODEL_EMPTY_BATCH_H

#include "model/small.h"
#include "quant/recipe.h"

static void *gradient_bytes(struct small_model *s, const struct mt_param *p) {
  void *raw = malloc(mt_bytes(&p->grad));
  assert_non_null(raw);
  OK(s->be.download(&s->be, raw, p->grad.data, mt_bytes(&p->grad)));
  return raw;
}

static void empty_batch(const char *backend, const char *recipe, int experts, int blocks,
                        int rows) {
  struct small_model s;
  struct small_batch b, none;
  struct mt_loss loss;
  struct mt_config c =
      mt_recipe_find(recipe)->qformat == MT_Q_NONE ? small_config() : small_8bit_config();
  struct mt_model_options o = {.experts = (enum mt_experts_strategy)experts,
                               .blocks = (enum mt_blocks_strategy)blocks,
                               .aux_coef = 0.1,
                               .z_coef = 0.1,
                               .training = true};
  small_open(&s, backend, recipe, &c, o);
  small_batch(&b, c.vocab, 1);
  small_batch(&none, c.vocab, 1);
  none.b.token_count = rows;
  none.b.valid_count = none.b.target_count = 0;
  memset(none.ids, 0, sizeof none.ids);
  memset(none.positions, 0, sizeof none.positions);
  memset(none.cu, 0, sizeof none.cu);
  for (int i = 0; i < SMALL_TOKENS; i++) none.labels[i] = MT_IGNORE;
  struct mt_pass pass = {.batch = &b.b, .loss_scale = 0.1, .aux_weight = 1};
  void *was[64];
  assert_true(s.m.params.count <= 64);
  OK(mt_model_train_pass(&s.m, &pass, &loss));
  for (int i = 0; i < s.m.params.count; i++) was[i] = gradient_bytes(&s, &s.m.params.row[i]);
  pass.batch = &none.b;
  for (int accumulate = 1; accumulate >= 0; accumulate--) {
    pass.accumulate = accumulate;
    OK(mt_model_train_pass(&s.m, &pass, &loss));
    assert_true(loss.cross_entropy_sum == 0 && loss.aux == 0 && loss.z == 0);
    for (int i = 0; i < s.m.params.count; i++) {
      const struct mt_param *p = &s.m.params.row[i];
      unsigned char *now = gradient_bytes(&s, p), any = 0;
      bool same = memcmp(now, was[i], mt_bytes(&p->grad)) == 0;
      /* -0 is a zero, too */
      for (size_t k = 0; k < mt_bytes(&p->grad); k++) any |= now[k] & 0x7f;
      if (accumulate ? !same : any != 0)
        fail_msg("%s %s experts %d blocks %d, %d rows: %s's gradient %s", backend, recipe, experts,
                 blocks, rows, p->name, accumulate ? "is another" : "is not zero");
      free(now);
    }
  }
  for (int i = 0; i < s.m.params.count; i++) free(was[i]);
  small_close(&s);
}

static void empty_batches(const char *backend, const char *recipe) {
  for (int experts = 0; experts < 3; experts++) {
    for (int blocks = 0; blocks < 2; blocks++) {
      empty_batch(backend, recipe, experts, blocks, 0);
      empty_batch(backend, recipe, experts, blocks, SMALL_TOKENS);
    }
  }
}

#endif
