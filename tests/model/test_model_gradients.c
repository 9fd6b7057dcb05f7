/* The whole model's backward in float64 against central differences, for every parameter and every
 * way through the blocks; and the fast backend against the reference on the same model. */
#include "model/small.h"

static double total_loss(struct mt_model *m, const struct mt_batch *b) {
  struct mt_loss loss;
  OK(mt_model_eval_pass(m, b, &loss));
  return loss.cross_entropy_sum / b->target_count + m->options.aux_coef * loss.aux +
         m->options.z_coef * loss.z;
}

static void check_differences(struct mt_config config, struct mt_model_options options) {
  struct small_model s;
  struct small_batch batch;
  struct mt_loss loss;
  options.training = true;
  small_open(&s, "ref", "fp64", &config, options);
  small_batch(&batch, config.vocab, 1);
  struct mt_pass pass = {
      .batch = &batch.b, .loss_scale = 1.0 / batch.b.target_count, .aux_weight = 1};
  OK(mt_model_train_pass(&s.m, &pass, &loss));
  /* float32 scalars of the interface (loss scale, aux coefficient) round at 6e-8. */
  const double h = 1e-5, tolerance = 3e-7;
  for (int i = 0; i < s.m.params.count; i++) {
    struct mt_param *p = &s.m.params.row[i];
    int64_t n = mt_param_count(p);
    double *w = p->compute.data, *g = p->grad.data, *d = malloc((size_t)n * sizeof *d);
    struct mt_rng r = mt_rng_make(77, (uint64_t)i);
    double along = 0, size = 0;
    for (int64_t k = 0; k < n; k++) {
      d[k] = mt_rng_normal(&r);
      along += d[k] * g[k];
      size += g[k] * g[k];
    }
    double side[2];
    for (int sign = 0; sign < 2; sign++) {
      for (int64_t k = 0; k < n; k++) w[k] += (sign ? -2 : 1) * h * d[k];
      side[sign] = total_loss(&s.m, &batch.b);
    }
    for (int64_t k = 0; k < n; k++) w[k] += h * d[k];
    double difference = (side[0] - side[1]) / (2 * h);
    double error = fabs(difference - along) / (sqrt(size) + 1e-3);
    if (!(error < tolerance) || !(size > 0)) {
      fail_msg("%s: difference %.9g, gradient %.9g, error %.2g", p->name, difference, along, error);
    }
    free(d);
  }
  small_close(&s);
}

static void every_way_through_the_blocks(void **state) {
  (void)state;
  for (int experts = MT_EXPERTS_LOOP; experts <= MT_EXPERTS_FUSED; experts++) {
    for (int blocks = MT_BLOCKS_UNFUSED; blocks <= MT_BLOCKS_FUSED; blocks++) {
      struct mt_model_options o = {.experts = (enum mt_experts_strategy)experts,
                                   .blocks = (enum mt_blocks_strategy)blocks};
      check_differences(small_config(), o);
    }
  }
}

static void auxiliary_loss(void **state) {
  (void)state;
  struct mt_model_options o = {
      .experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .aux_coef = 0.5};
  check_differences(small_config(), o);
  o.z_coef = 0.2;
  check_differences(small_config(), o);
  o.aux_coef = 0;
  check_differences(small_config(), o);
}

static void tied_head_and_window(void **state) {
  (void)state;
  struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED};
  struct mt_config c = small_config();
  c.tied_head = true;
  c.layer[0].window = 3;
  c.layer[1].renormalize = false;
  c.top_k = 3;
  check_differences(c, o);
}

static void one_choice_and_no_groups(void **state) {
  (void)state;
  struct mt_model_options o = {.experts = MT_EXPERTS_LOOP, .blocks = MT_BLOCKS_FUSED};
  struct mt_config c = small_config();
  c.experts = 2;
  c.top_k = 1;
  c.kv_heads = c.heads;
  c.layer[0].renormalize = c.layer[1].renormalize = false;
  check_differences(c, o);
}

/* Relative L2 distance of all gradients of two models from the reference's. */
static double gradient_distance(const struct mt_model *x, const struct mt_model *ref) {
  double d = 0, n = 0;
  for (int i = 0; i < x->params.count; i++) {
    const float *g = x->params.row[i].grad.data;
    const double *r = ref->params.row[i].grad.data;
    for (int64_t k = 0; k < mt_param_count(&x->params.row[i]); k++) {
      d += ((double)g[k] - r[k]) * ((double)g[k] - r[k]);
      n += r[k] * r[k];
    }
  }
  return sqrt(d / n);
}

struct agreement {
  double distance, with_a_bug; /* of the gradients; the bug: one expert's scaled */
  double loss;                 /* relative */
};

static struct agreement cpu_beside_reference(struct mt_model_options o, const char *recipe,
                                             uint64_t seed, float bug) {
  struct mt_config config = small_config();
  struct small_batch batch;
  small_batch(&batch, config.vocab, seed);
  struct mt_pass pass = {
      .batch = &batch.b, .loss_scale = 1.0 / batch.b.target_count, .aux_weight = 1};
  struct small_model cpu, ref;
  struct mt_loss a, b;
  small_open(&cpu, "cpu", recipe, &config, o);
  small_open(&ref, "ref", "fp64", &config, o);
  for (int i = 0; i < ref.m.params.count; i++) { /* the same numbers, as the storage holds them */
    struct mt_param *p = &ref.m.params.row[i];
    mt_dtype_convert(p->compute.data, MT_F64, cpu.m.params.row[i].compute.data, cpu.m.recipe->act,
                     (size_t)mt_param_count(p));
  }
  for (int pass_no = 0; pass_no < 2; pass_no++) { /* the second adds to the first */
    pass.accumulate = pass_no;
    OK(mt_model_train_pass(&cpu.m, &pass, &a));
    OK(mt_model_train_pass(&ref.m, &pass, &b));
  }
  struct agreement out = {.distance = gradient_distance(&cpu.m, &ref.m)};
  out.loss = fmax(fabs(a.cross_entropy_sum - b.cross_entropy_sum) / b.cross_entropy_sum,
                  fabs(a.aux - b.aux) / b.aux);
  float *g = mt_params_find(&cpu.m.params, MT_PARAM_DOWN, 1)->grad.data;
  for (int64_t k = 0; k < 5 * 12 * 10; k++) g[k] *= bug;
  out.with_a_bug = gradient_distance(&cpu.m, &ref.m);
  small_close(&cpu);
  small_close(&ref);
  return out;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* In bf16 a token near a tie may be routed elsewhere, after which its gradients have nothing in
 * common: the median of several batches is what rounding alone does. */
static void cpu_against_reference(void **state) {
  (void)state;
  enum { BATCHES = 7 };
  for (int way = 0; way < 8; way++) {
    struct mt_model_options o = {.experts = (enum mt_experts_strategy)(way & 1),
                                 .blocks = (enum mt_blocks_strategy)(way >> 1 & 1),
                                 .aux_coef = 0.1,
                                 .z_coef = 0.05,
                                 .training = true};
    bool bf16 = way & 4;
    double tolerance = bf16 ? 3e-2 : 2e-6, distance[BATCHES], with_a_bug[BATCHES];
    for (int i = 0; i < BATCHES; i++) {
      struct agreement g =
          cpu_beside_reference(o, bf16 ? "bf16" : "fp32", (uint64_t)i + 4, bf16 ? 1.5f : 1.01f);
      distance[i] = g.distance;
      with_a_bug[i] = g.with_a_bug;
      if (!bf16) assert_true(g.distance < tolerance);
      assert_true(g.loss < tolerance);
    }
    qsort(distance, BATCHES, sizeof *distance, ascending);
    qsort(with_a_bug, BATCHES, sizeof *with_a_bug, ascending);
    double median = distance[BATCHES / 2];
    assert_true(with_a_bug[BATCHES / 2] > tolerance);
    if (!(median < tolerance)) fail_msg("way %d: gradients are off by %.2g", way, median);
  }
}

static void frozen_parameters(void **state) {
  (void)state;
  struct mt_config config = small_config();
  struct mt_params params;
  struct mt_backend be;
  struct mt_model m;
  struct small_batch batch;
  struct mt_loss loss;
  small_batch(&batch, config.vocab, 4);
  OK(mt_backend_create(&be, "cpu", 2));
  OK(mt_params_build(&config, NULL, &params));
  for (int i = 0; i < params.count; i++)
    params.row[i].learns = params.row[i].kind == MT_PARAM_ROUTER;
  struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .training = true,
                               .token_capacity = SMALL_TOKENS,
                               .sequence_capacity = SMALL_SEQUENCES};
  OK(mt_model_create(&m, &config, &params, mt_recipe_find("fp32"), &be, &o));
  small_weights(&m, 3);
  struct mt_pass pass = {.batch = &batch.b, .loss_scale = 1.0 / batch.b.target_count};
  OK(mt_model_train_pass(&m, &pass, &loss));
  assert_int_equal(m.lowest_learning, 0);
  for (int i = 0; i < m.params.count; i++) {
    struct mt_param *p = &m.params.row[i];
    assert_true(p->learns == (p->grad.data != NULL) && p->learns == (p->m.data != NULL));
  }
  /* Two routers of [5,12], each rounded up to a bucket's unit: gradient and two moments. */
  struct mt_memory memory = mt_model_memory(&m);
  assert_int_equal(memory.gradients, 2 * 512);
  assert_int_equal(memory.optimizer, 4 * 512);
  mt_model_destroy(&m);
  mt_backend_destroy(&be);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_way_through_the_blocks), cmocka_unit_test(auxiliary_loss),
      cmocka_unit_test(tied_head_and_window),         cmocka_unit_test(one_choice_and_no_groups),
      cmocka_unit_test(cpu_against_reference),        cmocka_unit_test(frozen_parameters),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
