/* Training in 8 bits on a backend beside the CPU's, in the same recipe: the same formats and
 * blocks, sums in other orders. A number that falls to the other side of a rounding moves by a
 * 16th, so that the two are as far apart as the recipe lets a gradient be from float32's, at most.
 */
#ifndef TESTS_MODEL_EIGHT_BIT_CASES_H
#define TESTS_MODEL_EIGHT_BIT_CASES_H

#include "model/small.h"
#include "quant/recipe.h"
#include "train/step.h"

enum { EIGHT_BIT_STEPS = 6 };

/* What a run was: losses a token, norms, and the first step's gradients one after another. */
struct eight_bit_run {
  double loss[EIGHT_BIT_STEPS], norm[EIGHT_BIT_STEPS];
  double *gradient;
  int64_t begin[64];
  int count;
};

static void eight_bit_gradients(struct small_model *s, struct eight_bit_run *run) {
  int64_t all = 0;
  assert_true(s->m.params.count < 64);
  run->count = s->m.params.count;
  for (int i = 0; i < run->count; i++) {
    run->begin[i] = all;
    all += mt_param_count(&s->m.params.row[i]);
  }
  run->begin[run->count] = all;
  run->gradient = malloc((size_t)all * sizeof(double));
  for (int i = 0; i < run->count; i++) {
    const struct mt_tensor *g = &s->m.params.row[i].grad;
    void *raw = malloc(mt_bytes(g));
    OK(s->be.download(&s->be, raw, g->data, mt_bytes(g)));
    assert_int_equal(
        mt_dtype_convert(run->gradient + run->begin[i], MT_F64, raw, g->dtype, (size_t)mt_count(g)),
        0);
    free(raw);
  }
}

/* Of every 8-bit weight, of the experts' in each, one block's scale is doubled. */
static void eight_bit_plant(struct small_model *s) {
  for (int i = 0; i < s->m.params.count; i++) {
    struct mt_qtensor *q = &s->m.params.row[i].q;
    if (q->format == MT_Q_NONE) continue;
    for (int side = 0; side < 2; side++) {
      union {
        uint8_t byte;
        float number;
      } x = {0};
      size_t bytes = q->format == MT_Q_FP8 ? sizeof x.number : 1;
      for (int64_t g = 0; g < (q->rank == 3 ? q->dim[0] : 1); g++) { /* some have no token */
        struct mt_qtensor one = q->rank == 3 ? mt_q_slice(q, g) : *q;
        void *scale = side ? one.col_scale : one.row_scale;
        if (!scale || (side && !one.col)) continue;
        OK(s->be.download(&s->be, &x, scale, bytes));
        if (bytes == 1)
          x.byte++;
        else
          x.number *= 2;
        OK(s->be.upload(&s->be, scale, &x, bytes));
      }
    }
  }
}

/* Matrices as an initialisation would have them: small_weights' are so large that attention turns
 * on single roundings. But for the router's: its choices are then apart by more than those. */
static void eight_bit_weights(struct mt_model *m) {
  for (int i = 0; i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    struct mt_tensor *forms[] = {&p->compute, &p->master};
    for (int f = 0; f < 2 && p->rank > 1 && p->kind != MT_PARAM_ROUTER; f++) {
      if (!forms[f]->data || (f == 1 && forms[1]->data == forms[0]->data)) continue;
      size_t n = (size_t)mt_count(forms[f]);
      void *raw = malloc(n * sizeof(double));
      double *x = malloc(n * sizeof *x);
      OK(m->be->download(m->be, raw, forms[f]->data, mt_bytes(forms[f])));
      mt_dtype_convert(x, MT_F64, raw, forms[f]->dtype, n);
      for (size_t k = 0; k < n; k++) x[k] *= 0.25;
      mt_dtype_convert(raw, forms[f]->dtype, x, MT_F64, n);
      OK(m->be->upload(m->be, forms[f]->data, raw, mt_bytes(forms[f])));
      free(raw), free(x);
    }
  }
  OK(mt_model_quantize_weights(m));
}

static struct eight_bit_run eight_bit_train(const char *backend, const char *recipe,
                                            enum mt_experts_strategy experts, bool plant,
                                            void (*prepare)(struct mt_backend *be)) {
  struct small_model s;
  struct small_batch b;
  struct mt_optimizer o;
  struct mt_step_queue q;
  struct mt_step_result r;
  struct eight_bit_run run = {.count = 0};
  struct mt_config c = small_8bit_config();
  struct mt_model_options mo = {
      .experts = experts, .blocks = MT_BLOCKS_FUSED, .aux_coef = 0.01, .training = true};
  struct mt_optimizer_options oo = {.lr = 5e-4,
                                    .beta1 = 0.9,
                                    .beta2 = 0.95,
                                    .eps = 1e-8,
                                    .clip = 1,
                                    .schedule = MT_SCHEDULE_CONSTANT};
  struct mt_batch *micro[] = {&b.b};
  small_batch(&b, c.vocab, 1);
  small_open(&s, backend, recipe, &c, mo);
  eight_bit_weights(&s.m);
  if (prepare) prepare(&s.be);
  if (plant) eight_bit_plant(&s);
  OK(mt_step_gradients(&s.m, micro, 1, &r));
  eight_bit_gradients(&s, &run);
  OK(mt_optimizer_create(&o, &s.m, &oo));
  OK(mt_step_queue_create(&q, &o, true));
  for (int step = 0; step < EIGHT_BIT_STEPS; step++) {
    OK(mt_step_run(&q, micro, 1, &r));
    run.loss[step] = r.loss;
    run.norm[step] = r.grad_norm;
  }
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
  small_close(&s);
  return run;
}

/* The least cosine of any parameter's gradient, 1 where both are nothing. */
static double eight_bit_cosine(const struct eight_bit_run *a, const struct eight_bit_run *b) {
  double least = 1;
  for (int i = 0; i < a->count; i++) {
    double ab = 0, aa = 0, bb = 0;
    for (int64_t k = a->begin[i]; k < a->begin[i + 1]; k++) {
      double x = a->gradient[k], y = b->gradient[k];
      assert_false(isnan(x) || isnan(y));
      ab += x * y, aa += x * x, bb += y * y;
    }
    double c = aa == 0 && bb == 0 ? 1 : ab / sqrt(aa * bb);
    least = isnan(c) ? -1 : fmin(least, c);
  }
  return least;
}

/* Losses of all steps: the largest difference, of the first's size. */
static double eight_bit_losses(const struct eight_bit_run *a, const struct eight_bit_run *b) {
  double worst = 0;
  for (int i = 0; i < EIGHT_BIT_STEPS; i++) {
    double d = fabs(a->loss[i] - b->loss[i]) / b->loss[0];
    worst = isnan(d) ? INFINITY : fmax(worst, d);
  }
  return worst;
}

/* The backend's run, prepared so, beside the CPU's, whose gradients have `bound` as their least
 * cosine; and that a planted scale is seen. */
static void trains_as_the_cpu(const char *backend, const char *recipe, double bound,
                              void (*prepare)(struct mt_backend *be)) {
  const double losses = 0.03;
  for (int i = MT_EXPERTS_LOOP; i <= MT_EXPERTS_FUSED; i++) {
    enum mt_experts_strategy experts = (enum mt_experts_strategy)i;
    struct eight_bit_run want = eight_bit_train("cpu", recipe, experts, false, NULL);
    struct eight_bit_run got = eight_bit_train(backend, recipe, experts, false, prepare);
    struct eight_bit_run bad = eight_bit_train(backend, recipe, experts, true, prepare);
    double c = eight_bit_cosine(&got, &want), d = eight_bit_losses(&got, &want);
    double planted = eight_bit_cosine(&bad, &want);
    print_message("  %-13s %-6s experts %d: cosine %.4f (planted %.4f), losses %.1e apart, "
                  "from %.3f to %.3f\n",
                  backend, recipe, i, c, planted, d, got.loss[0], got.loss[EIGHT_BIT_STEPS - 1]);
    if (!(c > bound)) fail_msg("%s %s experts %d: cosine %.4f", backend, recipe, i, c);
    if (!(d < losses)) fail_msg("%s %s experts %d: losses %.3g apart", backend, recipe, i, d);
    if (planted > bound) fail_msg("%s %s: a doubled scale passed", backend, recipe);
    assert_true(got.loss[EIGHT_BIT_STEPS - 1] < 0.9 * got.loss[0]);
    free(want.gradient), free(got.gradient), free(bad.gradient);
  }
}

#endif
