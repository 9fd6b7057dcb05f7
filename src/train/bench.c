/* `moetune bench`: a whole training step of a random model on random tokens, as a rate of model
 * FLOPs, beside the rate that oneDNN's dnnl_sgemm alone reaches in the same run. */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <oneapi/dnnl/dnnl.h>

#include "base/rng.h"
#include "kernels/registry.h"
#include "train/commands.h"
#include "train/session.h"
#include "train/step.h"

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, ascending);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

/* The yardstick: oneDNN's n x n x n product on all threads, in turns with the steps, so that what
 * else the machine does falls on both. */
enum { SGEMM_N = 2048 };
struct yardstick {
  float *a, *b, *c;
};

static void yardstick_free(struct yardstick *y) {
  free(y->a);
  free(y->b);
  free(y->c);
}

static mt_err yardstick_make(struct yardstick *y) {
  size_t n = (size_t)SGEMM_N * SGEMM_N;
  *y = (struct yardstick){malloc(sizeof(float) * n), malloc(sizeof(float) * n),
                          malloc(sizeof(float) * n)};
  if (!y->a || !y->b || !y->c) return mt_fail(MT_ENOMEM, "sgemm buffers");
  for (size_t i = 0; i < n; i++) y->a[i] = y->b[i] = (float)(i % 7) - 3;
  return MT_OK;
}

static double yardstick_ms(struct yardstick *y, int threads) {
  omp_set_num_threads(threads);
  double begin = mt_now_s();
  dnnl_sgemm('N', 'N', SGEMM_N, SGEMM_N, SGEMM_N, 1.0f, y->a, SGEMM_N, y->b, SGEMM_N, 0.0f, y->c,
             SGEMM_N);
  return (mt_now_s() - begin) * 1e3;
}

static mt_err random_model(struct mt_model *m, struct mt_backend *be,
                           const struct mt_bench_options *o) {
  struct mt_config c = {.model_type = "mixtral",
                        .hidden = o->hidden,
                        .ffn = o->ffn,
                        .layers = o->layers,
                        .heads = o->heads,
                        .kv_heads = o->kv_heads,
                        .head_dim = o->heads ? o->hidden / o->heads : 0,
                        .experts = o->expert_count,
                        .top_k = o->top_k,
                        .vocab = o->vocab,
                        .rms_eps = 1e-5,
                        .rope_theta = 1e6};
  const struct mt_recipe *recipe = mt_recipe_find(o->precision);
  int64_t tokens = (int64_t)o->batch_size * o->max_seq_length;
  struct mt_model_options mo = {.experts = (enum mt_experts_strategy)o->experts,
                                .blocks = (enum mt_blocks_strategy)o->blocks,
                                .training = true,
                                .token_capacity = tokens,
                                .sequence_capacity = o->batch_size};
  struct mt_params params;
  if (!recipe) return mt_fail(MT_EUNSUPPORTED, "no precision '%s'", o->precision);
  for (int l = 0; l < o->layers && l < MT_MAX_LAYERS; l++) c.layer[l].renormalize = true;
  MT_TRY(mt_config_check(&c));
  MT_TRY(mt_params_build(&c, &params));
  MT_TRY(mt_model_create(m, &c, &params, recipe, be, &mo));
  for (int i = 0; i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    struct mt_rng rng = mt_rng_make(o->seed, (uint64_t)i);
    float *w = p->master.data;
    for (int64_t k = 0; k < mt_param_count(p); k++) {
      w[k] = p->rank == 1 ? 1.0f : (float)((mt_rng_uniform(&rng) - 0.5) * 0.07);
    }
    if (p->compute.data != w) {
      mt_dtype_convert(p->compute.data, p->compute.dtype, w, MT_F32, (size_t)mt_param_count(p));
    }
  }
  return MT_OK;
}

static mt_err random_batch(struct mt_batch *b, const struct mt_bench_options *o) {
  struct mt_rng rng = mt_rng_make(o->seed, 1u << 20);
  int n = o->max_seq_length;
  int32_t *ids = malloc((size_t)n * sizeof *ids);
  uint8_t *learn = malloc((size_t)n);
  mt_err err = MT_ENOMEM;
  if (!ids || !learn) {
    mt_fail(err, "random tokens");
    goto done;
  }
  MT_GO(mt_batch_create(b, o->batch_size * n, o->batch_size));
  mt_batch_begin(b);
  for (int s = 0; s < o->batch_size; s++) {
    for (int i = 0; i < n; i++)
      ids[i] = (int32_t)mt_rng_below(&rng, (uint32_t)o->vocab), learn[i] = 1;
    MT_GO(mt_batch_add(b, &(struct mt_sample){ids, learn, n, s + 1}));
  }
done:
  free(ids);
  free(learn);
  return err;
}

static void report(const struct mt_bench_options *o, const struct mt_model *m, double ms,
                   double sgemm) {
  double tokens = (double)o->batch_size * o->max_seq_length;
  double flops = tokens * mt_model_flops_per_token(&m->config, o->max_seq_length);
  double rate = flops / ms * 1e-6;
  int steps = (int)o->train_steps;
  if (o->json) {
    printf("{\"step_ms\": %.3f, \"tokens_per_s\": %.1f, \"model_gflops\": %.1f, \"sgemm_gflops\": "
           "%.1f, \"share\": %.4f, \"threads\": %d, \"phase_ms\": {",
           ms, tokens / ms * 1e3, rate, sgemm, rate / sgemm, m->be->thread_count);
    for (int p = 0; p < MT_PHASE_COUNT; p++) {
      printf("%s\"%s\": %.3f", p ? ", " : "", mt_phase_name((enum mt_phase)p),
             m->phase_s[p] * 1e3 / steps);
    }
    printf("}}\n");
    return;
  }
  printf("model       hidden %d, ffn %d, %d experts, top-%d, %d layers, vocabulary %d, %s\n",
         o->hidden, o->ffn, o->expert_count, o->top_k, o->layers, o->vocab, o->precision);
  printf("work        %d x %d tokens, %.1f GFLOP a step, %d threads\n", o->batch_size,
         o->max_seq_length, flops * 1e-9, m->be->thread_count);
  printf("step        %.1f ms (median of %d), %.0f tokens/s\n", ms, steps, tokens / ms * 1e3);
  for (int p = 0; p < MT_PHASE_COUNT; p++) {
    double part = m->phase_s[p] * 1e3 / steps;
    if (part > 0)
      printf("  %-20s %8.1f ms  %4.1f%%\n", mt_phase_name((enum mt_phase)p), part, 100 * part / ms);
  }
  printf("model rate  %.1f GFLOP/s\n"
         "dnnl_sgemm  %.1f GFLOP/s (%d x %d x %d, median of %d in turns with the steps)\n"
         "share       %.1f%%\n",
         rate, sgemm, SGEMM_N, SGEMM_N, SGEMM_N, steps, 100 * rate / sgemm);
}

mt_err mt_bench_run(const struct mt_bench_options *o) {
  struct mt_backend be;
  struct mt_model m = {0};
  struct mt_batch b = {0};
  struct mt_optimizer opt = {0};
  struct yardstick yard = {0};
  double *ms = NULL, *sgemm = NULL;
  mt_err err;
  struct mt_optimizer_options oo = {.lr = 1e-5,
                                    .beta1 = 0.9,
                                    .beta2 = 0.95,
                                    .eps = 1e-8,
                                    .weight_decay = 0.1,
                                    .clip = 1.0,
                                    .schedule = MT_SCHEDULE_CONSTANT};
  MT_TRY(mt_backend_create(&be, "cpu", o->threads));
  MT_GO(random_model(&m, &be, o));
  MT_GO(random_batch(&b, o));
  MT_GO(mt_optimizer_create(&opt, &m, &oo));
  MT_GO(yardstick_make(&yard));
  ms = calloc((size_t)o->train_steps + 1, sizeof *ms);
  sgemm = calloc((size_t)o->train_steps + 1, sizeof *sgemm);
  if (!ms || !sgemm) {
    err = mt_fail(MT_ENOMEM, "%lld steps", (long long)o->train_steps);
    goto done;
  }
  struct mt_batch *micro[] = {&b};
  for (int64_t i = 0; i < o->warmup_steps + o->train_steps; i++) {
    struct mt_step_result r;
    double begin = mt_now_s();
    if (i == o->warmup_steps) memset(m.phase_s, 0, sizeof m.phase_s);
    MT_GO(mt_step_run(&m, &opt, micro, 1, &r));
    double step_ms = (mt_now_s() - begin) * 1e3, yard_ms = yardstick_ms(&yard, be.thread_count);
    if (i < o->warmup_steps) continue;
    ms[i - o->warmup_steps] = step_ms;
    sgemm[i - o->warmup_steps] = yard_ms;
  }
  double n = SGEMM_N, yard_ms = median(sgemm, (int)o->train_steps);
  report(o, &m, median(ms, (int)o->train_steps), 2 * n * n * n / yard_ms * 1e-6);
done:
  yardstick_free(&yard);
  free(sgemm);
  free(ms);
  if (opt.model) mt_optimizer_destroy(&opt);
  mt_batch_destroy(&b);
  if (m.be) mt_model_destroy(&m);
  mt_backend_destroy(&be);
  return err;
}
