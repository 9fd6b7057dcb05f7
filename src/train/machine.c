#include "train/machine.h"

#include <stdio.h>
#include <string.h>

#include "train/bench.h"
#include "train/session.h"
#include "train/step.h"

/* Measured within training steps on H100 (docs/benchmarks.md, "Where the step goes"): the product
 * of 8192 cubed at 700 TFLOP/s in turns with the steps, a copy at 2.85 TB/s. H200 has the same
 * multiprocessors and limit of power and 4.8 TB/s for 3.35: a copy at H100's share of paper, and
 * products at what its own steps leave for them, as its memory takes more of the power. B300 has
 * 2500 dense bf16 TFLOP/s for 989 and 8 TB/s for 3.35 on paper: both at H100's shares. 8-bit
 * products are twice as fast as bf16's where the chip has them (Hopper FP8, Blackwell MXFP8), else
 * they are made in bf16. fp32 is what the CUDA cores do. A link has 80% of the paper's 450 and 900
 * GB/s each way, a network port of 400 and 800 Gbit/s 90%; neither has been measured. */
static const struct mt_machine table[] = {
    {.name = "h100",
     .bf16_flops = 700e12,
     .fp32_flops = 45e12,
     .fp8_flops = 1400e12,
     .mxfp8_flops = 700e12,
     .copy_bytes = 2.85e12,
     .link_bytes = 360e9,
     .network_bytes = 45e9,
     .call_s = 20e-6,
     .peer_s = 1e-6,
     .launch_s = 3e-6,
     .host_ranks = 8,
     .memory_share = 0.5},
    {.name = "h200",
     .bf16_flops = 660e12,
     .fp32_flops = 45e12,
     .fp8_flops = 1320e12,
     .mxfp8_flops = 660e12,
     .copy_bytes = 4.08e12,
     .link_bytes = 360e9,
     .network_bytes = 45e9,
     .call_s = 20e-6,
     .peer_s = 1e-6,
     .launch_s = 3e-6,
     .host_ranks = 8,
     .memory_share = 0.5},
    {.name = "b300",
     .bf16_flops = 1770e12,
     .fp32_flops = 50e12,
     .fp8_flops = 1770e12,
     .mxfp8_flops = 3540e12,
     .copy_bytes = 6.8e12,
     .link_bytes = 720e9,
     .network_bytes = 90e9,
     .call_s = 20e-6,
     .peer_s = 1e-6,
     .launch_s = 3e-6,
     .host_ranks = 8,
     .memory_share = 0.5},
};

/* From the operations of 2 x 8192 tokens on H100 in the same tables (26 November 2026; qlinear's in
 * "FP8 products"); those that are not named reach the roofline. */
static const struct {
  const char *op;
  double share;
} gpu_shares[] = {
    {"attention_fwd", 0.74}, {"attention_bwd", 0.64},     {"head_loss", 0.915},
    {"rmsnorm_bwd", 0.69},   {"combine_bwd", 0.76},       {"router_fwd", 0.45},
    {"router_bwd", 0.45},    {"experts_down_dgrad", 1.0}, {"experts_up_fwd", 1.02},
    {"linear_fwd", 1.12},    {"linear_dgrad", 1.08},      {"linear_wgrad", 1.08},
    {"adamw", 1.04},         {"qlinear_fwd", 0.955},      {"qlinear_dgrad", 0.925},
    {"qlinear_wgrad", 0.63},
};

static void default_shares(struct mt_machine *m) {
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    m->share[i] = 1;
    for (size_t k = 0; k < sizeof gpu_shares / sizeof *gpu_shares; k++) {
      if (strcmp(mt_op_name(i), gpu_shares[k].op) == 0) m->share[i] = gpu_shares[k].share;
    }
  }
}

mt_err mt_machine_find(const char *name, struct mt_machine *out) {
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    if (strcmp(table[i].name, name) != 0) continue;
    *out = table[i];
    default_shares(out);
    return MT_OK;
  }
  return mt_fail(MT_EINVAL, "no machine '%s' (there are: h100, h200, b300, this)", name);
}

double mt_machine_flops(const struct mt_machine *m, enum mt_dtype act) {
  return act == MT_BF16 ? m->bf16_flops : m->fp32_flops;
}

static double roofline(const struct mt_machine *m, double flops_per_s, struct mt_work w) {
  double products = w.flops / flops_per_s, memory = w.bytes / m->copy_bytes;
  return products > memory ? products + m->memory_share * memory
                           : memory + m->memory_share * products;
}

double mt_machine_seconds(const struct mt_machine *m, const struct mt_recipe *recipe, int op,
                          struct mt_work work) {
  double flops_per_s = mt_machine_flops(m, recipe->act);
  if (strncmp(mt_op_name(op), "qlinear", 7) == 0)
    flops_per_s = recipe->qformat == MT_Q_MXFP8 ? m->mxfp8_flops : m->fp8_flops;
  return m->launch_s + roofline(m, flops_per_s, work) / m->share[op];
}

struct sample {
  const struct mt_recipe *recipe;
  struct mt_backend be;
  struct mt_model model;
  struct mt_batch batch;
  struct mt_optimizer optimizer;
  struct mt_step_queue queue;
  struct mt_yardstick yard;
};

static void close_sample(struct sample *s) {
  mt_step_queue_destroy(&s->queue);
  mt_yardstick_free(&s->yard);
  if (s->optimizer.model) mt_optimizer_destroy(&s->optimizer);
  mt_batch_destroy(&s->batch);
  if (s->model.be) mt_model_destroy(&s->model);
  mt_backend_destroy(&s->be);
}

static mt_err open_sample(struct sample *s, const struct mt_config *c,
                          const struct mt_device_options *o, const struct mt_model_options *m,
                          int64_t tokens, int length) {
  struct mt_config one = *c;
  struct mt_model_options mo = *m;
  int samples = tokens > length ? (int)(tokens / length) : 1;
  one.layers = 1;
  mo.shard = mt_shard_whole(&one);
  mo.token_capacity = (int64_t)samples * length;
  mo.sequence_capacity = samples;
  mo.recompute = MT_RECOMPUTE_NONE;
  const struct mt_optimizer_options oo = {.lr = 1e-5,
                                          .beta1 = 0.9,
                                          .beta2 = 0.95,
                                          .eps = 1e-8,
                                          .clip = 1.0,
                                          .schedule = MT_SCHEDULE_CONSTANT};
  MT_TRY(mt_device_open(o, &s->recipe, &s->be));
  MT_TRY(mt_random_model(&s->model, &one, s->recipe, &s->be, &mo, 1));
  MT_TRY(mt_random_batch(&s->batch, 0, samples, length, c->vocab, 1));
  MT_TRY(mt_optimizer_create(&s->optimizer, &s->model, &oo));
  MT_TRY(mt_step_queue_create(&s->queue, &s->optimizer, false));
  return mt_yardstick_make(&s->yard, &s->be, s->recipe);
}

enum { WARMUP = 2, STEPS = 5 };

/* Rates of the yardstick and rows of the operations, in turns. */
static mt_err measure(struct sample *s, double length, struct mt_machine *m, struct mt_profile *p) {
  struct mt_batch *batch = &s->batch;
  struct mt_step_result r;
  double ms[STEPS], copies[STEPS];
  mt_err err = MT_OK;
  for (int i = 0; i < WARMUP; i++) MT_TRY(mt_step_run(&s->queue, &batch, 1, &r));
  mt_profile_begin(p, &s->be, length);
  for (int i = 0; !err && i < STEPS; i++) err = mt_step_run(&s->queue, &batch, 1, &r);
  MT_TRY(mt_profile_end(p));
  MT_TRY(err);
  for (int i = 0; i < STEPS; i++) {
    MT_TRY(mt_yardstick_ms(&s->yard, &ms[i]));
    MT_TRY(mt_yardstick_copy_rate(&s->yard, &copies[i]));
    MT_TRY(mt_step_run(&s->queue, &batch, 1, &r));
  }
  double n = (double)s->yard.n, flops = 2 * n * n * n / (mt_median(ms, STEPS) * 1e-3);
  m->bf16_flops = m->fp32_flops = m->fp8_flops = m->mxfp8_flops = flops;
  m->copy_bytes = mt_median(copies, STEPS);
  return MT_OK;
}

mt_err mt_machine_measure(const struct mt_config *c, const struct mt_device_options *o,
                          const struct mt_model_options *m, int64_t tokens, int length,
                          struct mt_machine *out) {
  struct mt_profile profile;
  struct sample s = {0};
  mt_err err;
  MT_TRY(mt_machine_find("h100", out));
  out->memory_share = out->launch_s = 0; /* the shares below have it all */
  MT_GO(open_sample(&s, c, o, m, tokens, length));
  MT_GO(measure(&s, length, out, &profile));
  snprintf(out->name, sizeof out->name, "this (%s)",
           s.be.description[0] ? s.be.description : s.be.name);
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    const struct mt_profile_row *r = &profile.row[i];
    struct mt_work w = {r->flops, r->bytes};
    double floor = roofline(out, out->bf16_flops, w);
    out->share[i] = r->calls && r->seconds > 0 && floor > 0 ? floor / r->seconds : 1;
  }
done:
  close_sample(&s);
  return err;
}
