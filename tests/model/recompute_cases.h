/* Gradients to the bit, whatever backward computes again, in every way through blocks and experts.
 */
#ifndef TESTS_MODEL_RECOMPUTE_CASES_H
#define TESTS_MODEL_RECOMPUTE_CASES_H

#include "model/small.h"

enum { WAYS = 6, MODES = 3, LAYERS = 3 };

static struct mt_model_options way_of(int way, int recompute) {
  return (struct mt_model_options){.experts = (enum mt_experts_strategy)(way % 3),
                                   .blocks = (enum mt_blocks_strategy)(way / 3),
                                   .recompute = (enum mt_recompute)recompute,
                                   .aux_coef = 0.02,
                                   .z_coef = 0.01,
                                   .training = true};
}

static struct mt_config deep_config(bool eight_bits) {
  struct mt_config c = eight_bits ? small_8bit_config() : small_config();
  c.layers = LAYERS;
  for (int l = 0; l < LAYERS; l++) c.layer[l].renormalize = true;
  return c;
}

/* Two micro-batches, the second added to the first, on activations that begin as NaN throughout. */
static void run_backward(struct small_model *s) {
  struct small_batch b;
  struct mt_loss loss;
  size_t bytes = s->m.activations.capacity_bytes;
  void *garbage = malloc(bytes);
  assert_non_null(garbage);
  memset(garbage, 0xff, bytes);
  OK(s->be.upload(&s->be, s->m.activations.base, garbage, bytes));
  OK(s->be.sync(&s->be));
  free(garbage);
  for (int i = 0; i < 2; i++) {
    small_batch(&b, s->m.config.vocab, (uint64_t)i + 1);
    struct mt_pass pass = {
        .batch = &b.b, .loss_scale = 0.05, .aux_weight = 0.5, .accumulate = i > 0};
    OK(mt_model_train_pass(&s->m, &pass, &loss));
    assert_true(isfinite(loss.cross_entropy_sum));
  }
}

static void *host_copy(struct small_model *s, const struct mt_tensor *t) {
  void *raw = malloc(mt_bytes(t));
  assert_non_null(raw);
  OK(s->be.download(&s->be, raw, t->data, mt_bytes(t)));
  return raw;
}

static void same_gradients(struct small_model *a, struct small_model *b, const char *what) {
  for (int i = 0; i < a->m.params.count; i++) {
    const struct mt_param *p = &a->m.params.row[i];
    void *x = host_copy(a, &p->grad), *y = host_copy(b, &b->m.params.row[i].grad);
    if (memcmp(x, y, mt_bytes(&p->grad)) != 0) fail_msg("%s: %s differs", what, p->name);
    free(x);
    free(y);
  }
}

static inline void gradients_are_the_same_on(const char *backend) {
  static const char *const recipes[] = {"fp32",  "bf16", "bf16-states",
                                        "mxfp8", "fp8",  "fp8-states"};
  for (int way = 0; way < WAYS; way++) {
    for (int r = 0; r < 6; r++) {
      struct mt_config c = deep_config(r >= 3);
      struct small_model kept;
      small_open(&kept, backend, recipes[r], &c, way_of(way, MT_RECOMPUTE_NONE));
      run_backward(&kept);
      for (int mode = MT_RECOMPUTE_MLP; mode < MODES; mode++) {
        struct small_model again;
        char what[64];
        snprintf(what, sizeof what, "%s %s, way %d, recompute %d", backend, recipes[r], way, mode);
        small_open(&again, backend, recipes[r], &c, way_of(way, mode));
        run_backward(&again);
        same_gradients(&kept, &again, what);
        small_close(&again);
      }
      small_close(&kept);
    }
  }
}

#endif
