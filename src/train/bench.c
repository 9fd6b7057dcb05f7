/* `moetune bench`: a whole training step of a random model on random tokens, as a rate of model
 * FLOPs, beside the rate that a dense product alone reaches in the same run. */
#include "train/bench.h"

#include <stdio.h>
#include <stdlib.h>

#include "train/commands.h"
#include "train/profile.h"
#include "train/session.h"
#include "train/step.h"

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
  for (int l = 0; l < o->layers && l < MT_MAX_LAYERS; l++) c.layer[l].renormalize = true;
  MT_TRY(mt_device_skips(&o->device, &mo.skip_8bit));
  return mt_random_model(m, &c, recipe, be, &mo, o->seed);
}

/* Further steps with every operation timed. */
static mt_err operations(const struct mt_bench_options *o, struct mt_step_queue *q,
                         struct mt_batch *batch, struct mt_yardstick *y, double yard_ms) {
  enum { STEPS = 3 };
  struct mt_profile p;
  struct mt_ceilings c = {.flops_per_s =
                              2.0 * (double)y->n * (double)y->n * (double)y->n / (yard_ms * 1e-3)};
  MT_TRY(mt_yardstick_copy_rate(y, &c.bytes_per_s));
  MT_TRY(mt_profile_steps(&p, q, batch, o->max_seq_length, STEPS));
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
                   const double *phase_s, const struct mt_yardstick *y, double yard_ms) {
  const char *product = mt_bench_on_gpu(m->be) ? "product" : "dnnl_sgemm";
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
  if (mt_bench_on_gpu(m->be))
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
  struct mt_yardstick yard = {0};
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
  MT_GO(mt_random_batch(&b, 0, o->batch_size, o->max_seq_length, o->vocab, o->seed));
  MT_GO(mt_optimizer_create(&opt, &m, &oo));
  MT_GO(mt_step_queue_create(&q, &opt, mt_device_graphs(&o->device)));
  MT_GO(mt_yardstick_make(&yard, &be, recipe));
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
    MT_GO(mt_yardstick_ms(&yard, &turn_ms));
    if (i < o->warmup_steps) continue;
    ms[i - o->warmup_steps] = r.ms;
    for (int p = 0; p < MT_PHASE_COUNT; p++) phase_s[p] += r.phase_s[p];
    sgemm[i - o->warmup_steps] = turn_ms;
  }
  double yard_ms = mt_median(sgemm, (int)o->train_steps);
  report(o, &m, mt_median(ms, (int)o->train_steps), phase_s, &yard, yard_ms);
  if (o->ops) MT_GO(operations(o, &q, &b, &yard, yard_ms));
  if (o->json) printf("}\n");
done:
  mt_step_queue_destroy(&q);
  mt_yardstick_free(&yard);
  free(sgemm);
  free(ms);
  if (opt.model) mt_optimizer_destroy(&opt);
  mt_batch_destroy(&b);
  if (m.be) mt_model_destroy(&m);
  mt_backend_destroy(&be);
  return err;
}
