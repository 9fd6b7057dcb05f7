/* `moetune bench`: a whole training step of a random model on random tokens, as a rate of model
 * FLOPs, beside the rate that a dense product alone reaches in the same run. */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <oneapi/dnnl/dnnl.h>

#include "base/rng.h"
#include "kernels/registry.h"
#include "train/commands.h"
#include "train/profile.h"
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

/* The yardstick of a device: on the CPU oneDNN's dnnl_sgemm of 2048 cubed on all threads, on a GPU
 * the backend's own dense product of 8192 cubed in the recipe's format. It takes turns with the
 * steps, so that what else the machine does falls on both. */
struct yardstick {
  struct mt_backend *be;
  int64_t n;
  struct mt_tensor a, b, c;
};

static bool on_gpu(const struct mt_backend *be) {
  return strncmp(be->name, "cuda", 4) == 0;
}

static void yardstick_free(struct yardstick *y) {
  struct mt_tensor *t[] = {&y->a, &y->b, &y->c};
  for (int i = 0; i < 3; i++) {
    if (t[i]->data) y->be->mem_free(y->be, t[i]->data, mt_bytes(t[i]));
  }
}

static mt_err yardstick_make(struct yardstick *y, struct mt_backend *be,
                             const struct mt_recipe *recipe) {
  *y = (struct yardstick){.be = be, .n = on_gpu(be) ? 8192 : 2048};
  enum mt_dtype dtype = on_gpu(be) ? recipe->act : MT_F32;
  struct mt_tensor *t[] = {&y->a, &y->b, &y->c};
  size_t count = (size_t)(y->n * y->n), bytes = count * mt_dtype_bytes(dtype);
  float *values = malloc(count * sizeof *values);
  mt_err err = values ? MT_OK : mt_fail(MT_ENOMEM, "operands of a product");
  struct mt_rng rng = mt_rng_make(1, 1);
  for (size_t i = 0; values && i < count; i++) values[i] = (float)mt_rng_uniform(&rng) - 0.5f;
  for (int i = 0; !err && i < 3; i++) {
    *t[i] = mt_mat(NULL, dtype, y->n, y->n);
    err = be->mem_alloc(be, bytes, &t[i]->data);
  }
  if (!err && dtype != MT_F32) mt_dtype_convert(values, dtype, values, MT_F32, count);
  for (int i = 0; !err && i < 3; i++) err = be->upload(be, t[i]->data, values, bytes);
  if (!err) err = be->sync(be);
  free(values);
  return err;
}

static mt_err yardstick_ms(struct yardstick *y, double *ms) {
  MT_TRY(y->be->sync(y->be));
  double begin = mt_now_s();
  if (on_gpu(y->be)) {
    MT_TRY(y->be->ops.linear_fwd(y->be,
                                 &(struct mt_linear_fwd_args){.x = y->a, .w = y->b, .y = y->c}));
    MT_TRY(y->be->sync(y->be));
  } else {
    omp_set_num_threads(y->be->thread_count);
    dnnl_sgemm('N', 'N', y->n, y->n, y->n, 1.0f, y->a.data, y->n, y->b.data, y->n, 0.0f, y->c.data,
               y->n);
  }
  *ms = (mt_now_s() - begin) * 1e3;
  return MT_OK;
}

/* Bytes a second of y = a + b over the yardstick's matrices, the median of several. */
static mt_err copy_rate(struct yardstick *y, double *bytes_per_s) {
  enum { RUNS = 9 };
  double seconds[RUNS];
  for (int i = 0; i < RUNS; i++) {
    MT_TRY(y->be->stamp(y->be, 0));
    MT_TRY(y->be->ops.add(y->be, &(struct mt_add_args){.a = y->a, .b = y->b, .y = y->c}));
    MT_TRY(y->be->stamp(y->be, 1));
    MT_TRY(y->be->stamp_read(y->be, 0, 1, &seconds[i]));
  }
  *bytes_per_s = 3.0 * (double)mt_bytes(&y->a) / median(seconds, RUNS);
  return MT_OK;
}

/* count values in a format to elements [at, at + count) of a form. */
static mt_err put_values(struct mt_backend *be, const struct mt_tensor *form, int64_t at,
                         const void *values, size_t count) {
  size_t item = mt_dtype_bytes(form->dtype);
  return be->upload(be, (char *)form->data + (size_t)at * item, values, count * item);
}

/* Random weights in all forms; one random block again and again, since billions of random numbers
 * would take longer than what is measured. */
static mt_err random_weights(struct mt_model *m, uint64_t seed) {
  enum { BLOCK = (1 << 20) + 7 };
  float *values = malloc(BLOCK * sizeof *values);
  uint16_t *rounded = malloc(BLOCK * sizeof *rounded);
  mt_err err = values && rounded ? MT_OK : mt_fail(MT_ENOMEM, "random weights");
  for (int i = 0; !err && i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    struct mt_rng rng = mt_rng_make(seed, (uint64_t)i);
    int64_t n = mt_param_count(p);
    for (int64_t k = 0; k < BLOCK && k < n; k++) {
      values[k] = p->rank == 1 ? 1.0f : (float)((mt_rng_uniform(&rng) - 0.5) * 0.07);
    }
    bool narrow = p->compute.data && p->compute.dtype != MT_F32, wide = p->master.dtype == MT_F32;
    if (narrow) mt_dtype_convert(rounded, p->compute.dtype, values, MT_F32, BLOCK);
    for (int64_t at = 0; !err && at < n; at += BLOCK) {
      size_t count = (size_t)(n - at < BLOCK ? n - at : BLOCK);
      if (wide) err = put_values(m->be, &p->master, at, values, count);
      if (!err && narrow) err = put_values(m->be, &p->compute, at, rounded, count);
    }
  }
  if (!err) err = mt_model_quantize_weights(m);
  if (!err) err = m->be->sync(m->be);
  free(values);
  free(rounded);
  return err;
}

static mt_err random_model(struct mt_model *m, struct mt_backend *be,
                           const struct mt_recipe *recipe, const struct mt_bench_options *o) {
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
  int64_t tokens = (int64_t)o->batch_size * o->max_seq_length;
  struct mt_model_options mo = {.experts = (enum mt_experts_strategy)o->experts,
                                .blocks = (enum mt_blocks_strategy)o->blocks,
                                .recompute = (enum mt_recompute)o->recompute,
                                .training = true,
                                .token_capacity = tokens,
                                .sequence_capacity = o->batch_size};
  struct mt_params params;
  for (int l = 0; l < o->layers && l < MT_MAX_LAYERS; l++) c.layer[l].renormalize = true;
  MT_TRY(mt_device_skips(&o->device, &mo.skip_8bit));
  MT_TRY(mt_config_check(&c));
  MT_TRY(mt_params_build(&c, NULL, &params));
  MT_TRY(mt_model_create(m, &c, &params, recipe, be, &mo));
  return random_weights(m, o->seed);
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

/* Further steps with every operation timed. */
static mt_err operations(const struct mt_bench_options *o, struct mt_step_queue *q,
                         struct mt_batch *batch, struct yardstick *y, double yard_ms) {
  enum { STEPS = 3 };
  struct mt_profile p;
  struct mt_ceilings c = {.flops_per_s =
                              2.0 * (double)y->n * (double)y->n * (double)y->n / (yard_ms * 1e-3)};
  MT_TRY(copy_rate(y, &c.bytes_per_s));
  mt_profile_begin(&p, q->model->be, o->max_seq_length);
  mt_err err = MT_OK;
  for (int i = 0; !err && i < STEPS; i++) {
    struct mt_step_result r;
    err = mt_step_run(q, &batch, 1, &r);
  }
  MT_TRY(mt_profile_end(&p));
  MT_TRY(err);
  if (o->json)
    printf(", \"copy_gb_per_s\": %.1f, \"ops\": {", c.bytes_per_s * 1e-9);
  else
    printf("copy        %.0f GB/s (read and written)\n\n", c.bytes_per_s * 1e-9);
  mt_profile_print(&p, STEPS, c, o->json);
  if (o->json) printf("}");
  return MT_OK;
}

static double gib(size_t bytes) {
  return (double)bytes / (1 << 30);
}

static void report(const struct mt_bench_options *o, const struct mt_model *m, double ms,
                   const double *phase_s, const struct yardstick *y, double yard_ms) {
  const char *product = on_gpu(m->be) ? "product" : "dnnl_sgemm";
  double n = (double)y->n, sgemm = 2 * n * n * n / yard_ms * 1e-6;
  double tokens = (double)o->batch_size * o->max_seq_length;
  double flops = tokens * mt_model_flops_per_token(&m->config, o->max_seq_length);
  double rate = flops / ms * 1e-6;
  int steps = (int)o->train_steps;
  struct mt_memory memory = mt_model_memory(m);
  if (o->json) {
    printf("{\"step_ms\": %.3f, \"tokens_per_s\": %.1f, \"model_gflops\": %.1f, \"sgemm_gflops\": "
           "%.1f, \"share\": %.4f, \"threads\": %d, \"phase_ms\": {",
           ms, tokens / ms * 1e3, rate, sgemm, rate / sgemm, m->be->thread_count);
    for (int p = 0; p < MT_PHASE_COUNT; p++) {
      printf("%s\"%s\": %.3f", p ? ", " : "", mt_phase_name((enum mt_phase)p),
             phase_s[p] * 1e3 / steps);
    }
    printf("}, \"memory_bytes\": %zu",
           memory.parameters + memory.gradients + memory.optimizer + memory.activations);
    return;
  }
  printf("model       hidden %d, ffn %d, %d experts, top-%d, %d layers, vocabulary %d, %s\n",
         o->hidden, o->ffn, o->expert_count, o->top_k, o->layers, o->vocab, m->recipe->name);
  printf("work        %d x %d tokens, %.1f GFLOP a step, ", o->batch_size, o->max_seq_length,
         flops * 1e-9);
  if (on_gpu(m->be))
    printf("%s\n", m->be->description);
  else
    printf("%d threads\n", m->be->thread_count);
  printf("step        %.1f ms (median of %d), %.0f tokens/s\n", ms, steps, tokens / ms * 1e3);
  for (int p = 0; p < MT_PHASE_COUNT; p++) {
    double part = phase_s[p] * 1e3 / steps;
    if (part > 0)
      printf("  %-20s %8.1f ms  %4.1f%%\n", mt_phase_name((enum mt_phase)p), part, 100 * part / ms);
  }
  printf("model rate  %.1f GFLOP/s\n"
         "%-11s %.1f GFLOP/s (%lld x %lld x %lld, median of %d in turns with the steps)\n"
         "share       %.1f%%\n",
         rate, product, sgemm, (long long)y->n, (long long)y->n, (long long)y->n, steps,
         100 * rate / sgemm);
  printf(
      "memory      %.2f GiB: parameters %.2f, gradients %.2f, optimizer %.2f, activations %.2f\n",
      gib(memory.parameters + memory.gradients + memory.optimizer + memory.activations),
      gib(memory.parameters), gib(memory.gradients), gib(memory.optimizer),
      gib(memory.activations));
}

mt_err mt_bench_run(const struct mt_bench_options *o) {
  struct mt_backend be;
  struct mt_model m = {0};
  struct mt_batch b = {0};
  struct mt_optimizer opt = {0};
  struct mt_step_queue q = {0};
  struct yardstick yard = {0};
  double phase_s[MT_PHASE_COUNT] = {0};
  double *ms = NULL, *sgemm = NULL;
  mt_err err;
  struct mt_optimizer_options oo = {.lr = 1e-5,
                                    .beta1 = 0.9,
                                    .beta2 = 0.95,
                                    .eps = 1e-8,
                                    .weight_decay = 0.1,
                                    .clip = 1.0,
                                    .schedule = MT_SCHEDULE_CONSTANT,
                                    .seed = o->seed};
  const struct mt_recipe *recipe;
  MT_TRY(mt_device_open(&o->device, &recipe, &be));
  MT_GO(random_model(&m, &be, recipe, o));
  MT_GO(random_batch(&b, o));
  MT_GO(mt_optimizer_create(&opt, &m, &oo));
  MT_GO(mt_step_queue_create(&q, &opt, mt_device_graphs(&o->device)));
  MT_GO(yardstick_make(&yard, &be, recipe));
  ms = calloc((size_t)o->train_steps + 1, sizeof *ms);
  sgemm = calloc((size_t)o->train_steps + 1, sizeof *sgemm);
  if (!ms || !sgemm) {
    err = mt_fail(MT_ENOMEM, "%lld steps", (long long)o->train_steps);
    goto done;
  }
  struct mt_batch *micro[] = {&b};
  for (int64_t i = 0; i < o->warmup_steps + o->train_steps; i++) {
    struct mt_step_result r;
    double turn_ms;
    MT_GO(mt_step_run(&q, micro, 1, &r));
    MT_GO(yardstick_ms(&yard, &turn_ms));
    if (i < o->warmup_steps) continue;
    ms[i - o->warmup_steps] = r.ms;
    for (int p = 0; p < MT_PHASE_COUNT; p++) phase_s[p] += r.phase_s[p];
    sgemm[i - o->warmup_steps] = turn_ms;
  }
  double yard_ms = median(sgemm, (int)o->train_steps);
  report(o, &m, median(ms, (int)o->train_steps), phase_s, &yard, yard_ms);
  if (o->ops) MT_GO(operations(o, &q, &b, &yard, yard_ms));
  if (o->json) printf("}\n");
done:
  mt_step_queue_destroy(&q);
  yardstick_free(&yard);
  free(sgemm);
  free(ms);
  if (opt.model) mt_optimizer_destroy(&opt);
  mt_batch_destroy(&b);
  if (m.be) mt_model_destroy(&m);
  mt_backend_destroy(&be);
  return err;
}
