#include "train/ladder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/log.h"
#include "data/dataset.h"
#include "hf/checkpoint.h"
#include "kernels/registry.h"
#include "par/ranks.h"
#include "train/bench.h"
#include "train/session.h"
#include "train/step.h"

static const struct {
  int number;
  const char *what;
  enum mt_experts_strategy experts;
  enum mt_blocks_strategy blocks;
} rungs[] = {
    {0, "experts in a loop, blocks unfused", MT_EXPERTS_LOOP, MT_BLOCKS_UNFUSED},
    {1, "experts in a loop, blocks fused", MT_EXPERTS_LOOP, MT_BLOCKS_FUSED},
    {2, "experts grouped, blocks fused", MT_EXPERTS_GROUPED, MT_BLOCKS_FUSED},
    {3, "experts fused, in 8 bits", MT_EXPERTS_FUSED, MT_BLOCKS_FUSED},
};
enum { RUNGS = sizeof rungs / sizeof *rungs, PROFILED_STEPS = 3 };
_Static_assert((int)RUNGS <= (int)MT_LADDER_RUNGS, "a result for each");

/* What all rungs train. */
struct work {
  const struct mt_ladder_options *o;
  struct mt_hf_checkpoint checkpoint; /* where weights come from, unless they are random */
  struct mt_config config;
  struct mt_world *world; /* NULL: one rank */
};

struct climb {
  struct mt_mesh mesh;
  struct mt_ranks ranks;
  bool joined;
  struct mt_batch batch;
  const struct mt_recipe *recipe;
  struct mt_backend be;
  struct mt_model model;
  struct mt_optimizer optimizer;
  struct mt_step_queue queue;
};

static mt_err open_config(struct work *w) {
  const struct mt_ladder_options *o = w->o;
  if (o->model) {
    MT_TRY(mt_hf_open(o->model, &w->checkpoint));
    w->config = w->checkpoint.config;
    return MT_OK;
  }
  MT_TRY(mt_path_is_dir(o->random) ? mt_hf_config_load(o->random, &w->config, NULL)
                                   : mt_hf_config_load_file(o->random, &w->config, NULL));
  if (o->layers > w->config.layers) {
    return mt_fail(MT_EINVAL, "--layers %d is more than the %d of %s", o->layers, w->config.layers,
                   o->random);
  }
  if (o->layers > 0) w->config.layers = o->layers;
  return MT_OK;
}

static mt_err make_model(struct climb *c, const struct work *w,
                         const struct mt_model_options *options) {
  struct mt_params params;
  if (w->o->random)
    return mt_random_model(&c->model, &w->config, c->recipe, &c->be, options, w->o->seed);
  MT_TRY(mt_params_build(&w->config, w->world ? &options->shard : NULL, &params));
  mt_err err = mt_model_create(&c->model, &w->config, &params, c->recipe, &c->be, options);
  mt_params_free(&params);
  if (!err) err = mt_hf_load(&w->checkpoint, &c->model.params, &c->be);
  return err ? err : mt_model_quantize_weights(&c->model);
}

/* As many stages as there are ranks, or layers for. */
static int most_stages(int ranks, int layers) {
  int pp = ranks;
  while (pp > 1 && (pp > layers || ranks % pp != 0)) pp--;
  return pp;
}

/* Rung 0 has the layers in sequence over the ranks; the others are the mesh that is asked for. All
 * have the same samples in a step. */
static mt_err make_place(struct climb *c, const struct work *w, int number) {
  const struct mt_ladder_options *o = w->o;
  int size = w->world ? w->world->size : 1, rank = w->world ? w->world->rank : 0;
  int ep = number == 0 ? 1 : o->ep_size,
      pp = number == 0 ? most_stages(size, w->config.layers) : o->pp_size;
  MT_TRY(mt_mesh_make(&w->config, size, rank, ep, pp, &c->mesh));
  int samples = o->batch_size * size / mt_mesh_readers(&c->mesh);
  return mt_random_batch(&c->batch, samples * mt_mesh_reader(&c->mesh), samples, o->max_seq_length,
                         w->config.vocab, o->seed);
}

/* As --improvement has it: rung 3 is in 8 bits, whichever fit the device. */
static mt_err open_device(struct climb *c, const struct work *w, int number) {
  const struct mt_device_options *o = &w->o->device;
  struct mt_device_options d = *o;
  bool given = d.precision && strstr(d.precision, "fp8");
  if (number == 3 && !given) d.precision = mt_device_eight_bits(o);
  const char *states = d.optim_state ? d.optim_state : "fp32";
  if (number == 3 && !mt_recipe_choose(d.precision, states))
    return mt_fail(MT_EUNSUPPORTED, "no precision %s with --optim-state %s", d.precision, states);
  MT_TRY(mt_device_of_rank(w->world, &d));
  return mt_device_open(&d, &c->recipe, &c->be);
}

static mt_err make_climb(struct climb *c, const struct work *w, int k) {
  const struct mt_ladder_options *o = w->o;
  MT_TRY(make_place(c, w, rungs[k].number));
  struct mt_model_options mo = {.experts = rungs[k].experts,
                                .blocks = rungs[k].blocks,
                                .recompute = (enum mt_recompute)o->recompute,
                                .training = true,
                                .token_capacity = c->batch.token_count,
                                .sequence_capacity = c->batch.sequence_count,
                                .in_flight = 1};
  const struct mt_optimizer_options oo = {.lr = 1e-5,
                                          .beta1 = 0.9,
                                          .beta2 = 0.95,
                                          .eps = 1e-8,
                                          .weight_decay = 0.1,
                                          .clip = 1.0,
                                          .schedule = MT_SCHEDULE_CONSTANT,
                                          .seed = o->seed};
  MT_TRY(mt_device_skips(&o->device, &mo.skip_8bit));
  MT_TRY(open_device(c, w, rungs[k].number));
  if (w->world) mo.shard = mt_ranks_shard(&c->mesh);
  MT_TRY(make_model(c, w, &mo));
  MT_TRY(mt_optimizer_create(&c->optimizer, &c->model, &oo));
  return mt_step_queue_create(&c->queue, &c->optimizer, mt_device_graphs(&o->device));
}

static mt_err join(struct climb *c, struct mt_world *world) {
  if (!world) return MT_OK;
  MT_TRY(mt_ranks_open(&c->ranks, world, &c->mesh));
  c->joined = true;
  c->queue.ranks = &c->ranks;
  return mt_ranks_join(&c->ranks, &c->model);
}

static void end_climb(struct climb *c) {
  mt_step_queue_destroy(&c->queue);
  if (c->joined) mt_ranks_close(&c->ranks);
  if (c->optimizer.model) mt_optimizer_destroy(&c->optimizer);
  if (c->model.be) mt_model_destroy(&c->model);
  mt_backend_destroy(&c->be);
  mt_batch_destroy(&c->batch);
}

/* Further steps with every operation timed. */
static mt_err operations(struct climb *c, const struct mt_ladder_options *o, struct mt_rung *r) {
  struct mt_yardstick y = {0};
  double n, ms;
  mt_err err;
  MT_GO(mt_yardstick_make(&y, &c->be, c->recipe));
  MT_GO(mt_yardstick_ms(&y, &ms)); /* the first takes longer */
  MT_GO(mt_yardstick_ms(&y, &ms));
  n = (double)y.n;
  r->ceilings.flops_per_s = 2 * n * n * n / (ms * 1e-3);
  MT_GO(mt_yardstick_copy_rate(&y, &r->ceilings.bytes_per_s));
  MT_GO(mt_profile_steps(&r->ops, &c->queue, &c->batch, o->max_seq_length, PROFILED_STEPS));
done:
  mt_yardstick_free(&y);
  return err;
}

static mt_err measure(struct climb *c, struct work *w, struct mt_rung *r) {
  const struct mt_ladder_options *o = w->o;
  struct mt_batch *micro[] = {&c->batch};
  mt_err err = MT_OK;
  double *ms = calloc((size_t)o->train_steps, sizeof *ms);
  if (!ms) return mt_fail(MT_ENOMEM, "%lld steps", (long long)o->train_steps);
  for (int64_t i = 0; i < o->warmup_steps + o->train_steps; i++) {
    struct mt_step_result step;
    MT_GO(mt_step_run(&c->queue, micro, 1, &step));
    if (i == o->warmup_steps) r->loss = step.loss;
    if (i < o->warmup_steps) continue;
    ms[i - o->warmup_steps] = step.ms;
    for (int p = 0; p < MT_PHASE_COUNT; p++)
      r->phase_ms[p] += 1e3 * step.phase_s[p] / (double)o->train_steps;
  }
  double ranks = w->world ? w->world->size : 1, tokens = o->batch_size * ranks * o->max_seq_length;
  struct mt_memory m = mt_model_memory(&c->model);
  r->ms = mt_median(ms, (int)o->train_steps);
  r->tokens_per_s = tokens / r->ms * 1e3;
  r->tflops = r->tokens_per_s * mt_model_flops_per_token(&w->config, (double)o->max_seq_length) /
              ranks * 1e-12;
  r->memory_bytes = m.parameters + m.gradients + m.optimizer + m.activations;
  r->ran = true;
  if (o->ops) MT_GO(operations(c, o, r));
done:
  free(ms);
  return err;
}

static mt_err run_rung(struct work *w, int k, struct mt_ladder *out) {
  struct mt_rung *r = &out->rung[out->count++];
  struct climb c = {0};
  *r = (struct mt_rung){.number = rungs[k].number, .what = rungs[k].what, .precision = ""};
  mt_err err;
  err = mt_world_meet(w->world, make_climb(&c, w, k), NULL);
  if (!err) err = mt_world_meet(w->world, join(&c, w->world), NULL);
  bool alike = err || !w->world; /* what comes later may befall one rank alone */
  if (err) goto done;
  r->precision = c.recipe->precision;
  snprintf(out->device, sizeof out->device, "%s", c.be.description[0] ? c.be.description : "CPU");
  MT_GO(measure(&c, w, r));
  mt_info("rung %d   %.2f ms", r->number, r->ms);
done:
  if (alike && (err == MT_EUNSUPPORTED || err == MT_ENOMEM)) {
    snprintf(r->why, sizeof r->why, "%s", mt_error_message());
    mt_warn("rung %d did not run: %s", r->number, r->why);
    if (w->world) w->world->settled = false;
    err = MT_OK;
  }
  c.ranks.well = !err;
  end_climb(&c);
  return err;
}

mt_err mt_ladder_run(const struct mt_ladder_options *o, struct mt_ladder *out) {
  struct work w = {.o = o, .world = o->world && o->world->size > 1 ? o->world : NULL};
  mt_err err;
  bool any = false;
  *out = (struct mt_ladder){0};
  MT_GO(mt_world_meet(w.world, open_config(&w), NULL));
  struct mt_mesh mesh; /* what is asked for must be one before anything runs */
  out->config = w.config;
  out->ranks = w.world ? w.world->size : 1;
  MT_GO(mt_mesh_make(&w.config, out->ranks, 0, o->ep_size, o->pp_size, &mesh));
  for (int k = 0; k < RUNGS; k++) {
    MT_GO(run_rung(&w, k, out));
    any |= out->rung[k].ran;
  }
  if (!any) err = mt_fail(MT_EUNSUPPORTED, "no rung runs here: %s", out->rung[0].why);
done:
  mt_hf_close(&w.checkpoint);
  return err;
}

double mt_ladder_speedup(const struct mt_ladder *l, const struct mt_rung *r) {
  for (int i = 0; i < l->count; i++) {
    if (l->rung[i].ran) return l->rung[i].ms / r->ms;
  }
  return 1;
}

static mt_err print_json(const struct mt_ladder_options *o, const struct mt_ladder *l) {
  json_t *list = json_array();
  for (int i = 0; i < l->count; i++) {
    const struct mt_rung *r = &l->rung[i];
    json_t *one = json_pack("{s:i,s:s,s:s,s:b}", "rung", r->number, "what", r->what, "precision",
                            r->precision, "ran", r->ran);
    if (r->ran) {
      json_object_update_new(one,
                             json_pack("{s:f,s:f,s:f,s:f,s:I}", "step_ms", r->ms, "tokens_per_s",
                                       r->tokens_per_s, "model_tflops", r->tflops, "loss", r->loss,
                                       "memory_bytes", (json_int_t)r->memory_bytes));
      json_object_set_new(one, "speedup", json_real(mt_ladder_speedup(l, r)));
      json_t *phases = json_object();
      for (int p = 0; p < MT_PHASE_COUNT; p++)
        json_object_set_new(phases, mt_phase_name((enum mt_phase)p), json_real(r->phase_ms[p]));
      json_object_set_new(one, "phase_ms", phases);
    } else {
      json_object_set_new(one, "why", json_string(r->why));
    }
    json_array_append_new(list, one);
  }
  json_t *all = json_pack("{s:s,s:i,s:i,s:i,s:i,s:o}", "device", l->device, "ranks", l->ranks,
                          "layers", l->config.layers, "batch_size", o->batch_size, "max_seq_length",
                          o->max_seq_length, "rungs", list);
  char *text = mt_json_text(all, JSON_COMPACT | JSON_REAL_PRECISION(9));
  mt_err err = text ? MT_OK : mt_fail(MT_ENOMEM, "the ladder as JSON");
  if (!err) puts(text);
  free(text);
  json_decref(all);
  return err;
}

static void print_phases(const struct mt_ladder *l) {
  printf("\n%-22s", "ms of rank 0, rung");
  for (int i = 0; i < l->count; i++) printf(" %9d", l->rung[i].number);
  for (int p = 0; p < MT_PHASE_COUNT; p++) {
    double most = 0;
    for (int i = 0; i < l->count; i++) most = fmax(most, l->rung[i].phase_ms[p]);
    if (most == 0) continue;
    printf("\n  %-20s", mt_phase_name((enum mt_phase)p));
    for (int i = 0; i < l->count; i++) {
      if (l->rung[i].ran)
        printf(" %9.2f", l->rung[i].phase_ms[p]);
      else
        printf(" %9s", "-");
    }
  }
  printf("\n");
}

mt_err mt_ladder_print(const struct mt_ladder_options *o, const struct mt_ladder *l) {
  const struct mt_config *c = &l->config;
  if (o->json) return print_json(o, l);
  printf("model       hidden %d, ffn %d, %d experts, top-%d, %d layers, vocabulary %d\n"
         "work        %d x %d x %d tokens a step, %s; medians of %lld steps\n\n",
         c->hidden, c->ffn, c->experts, c->top_k, c->layers, c->vocab, l->ranks, o->batch_size,
         o->max_seq_length, l->device, (long long)o->train_steps);
  printf("%4s  %-34s %-9s %10s %8s %10s %8s %7s %9s\n", "rung", "how", "precision", "step ms",
         "speedup", "tokens/s", "TFLOP/s", "GiB", "loss");
  for (int i = 0; i < l->count; i++) {
    const struct mt_rung *r = &l->rung[i];
    if (!r->ran) {
      printf("%4d  %-34s did not run: %s\n", r->number, r->what, r->why);
      continue;
    }
    printf("%4d  %-34s %-9s %10.2f %7.2fx %10.0f %8.2f %7.2f %9.5f\n", r->number, r->what,
           r->precision, r->ms, mt_ladder_speedup(l, r), r->tokens_per_s, r->tflops,
           (double)r->memory_bytes / (1 << 30), r->loss);
  }
  print_phases(l);
  for (int i = 0; o->ops && i < l->count; i++) {
    const struct mt_rung *r = &l->rung[i];
    if (!r->ran) continue;
    printf("\nrung %d, operations of rank 0; %.1f TFLOP/s, copy %.0f GB/s\n", r->number,
           r->ceilings.flops_per_s * 1e-12, r->ceilings.bytes_per_s * 1e-9);
    mt_profile_print(&r->ops, PROFILED_STEPS, r->ceilings, false);
  }
  return MT_OK;
}
