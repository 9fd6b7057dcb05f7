/* `moetune train`: the run around the step. */
#include <math.h>
#include <signal.h>
#include <stdlib.h>

#include "base/log.h"
#include "train/commands.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/state.h"
#include "train/trainer.h"

struct run {
  const struct mt_train_options *o;
  struct mt_session s;
  struct mt_dataset *data, *eval_data;
  struct mt_loader loader, eval_loader;
  struct mt_optimizer optimizer;
  struct mt_step_queue queue;
  struct mt_metrics metrics;
  struct mt_progress progress;
  int64_t total_steps;
  double begin_s;                    /* of the first step */
  char last_checkpoint[MT_PATH_MAX]; /* "" before the first */
};

static volatile sig_atomic_t stop_signal;

static void on_signal(int number) {
  stop_signal = number;
}

/* The first SIGINT or SIGTERM ends the run after its step; a second one ends it at once. */
static void catch_signals(void) {
  struct sigaction a = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
  stop_signal = 0;
  sigemptyset(&a.sa_mask);
  sigaction(SIGINT, &a, NULL);
  sigaction(SIGTERM, &a, NULL);
}

static mt_err open_data(struct run *r, const char *path, struct mt_dataset **out) {
  struct mt_dataset_options o = {.path = path,
                                 .chat = r->s.chat,
                                 .max_seq_length = r->o->max_seq_length,
                                 .eos_id = r->s.checkpoint.config.eos_id,
                                 .train_on_prompt = r->o->train_on_prompt,
                                 .skip_bad_lines = r->o->skip_bad_lines};
  return mt_dataset_open(r->s.tokenizer, &o, out);
}

static void describe_data(const char *what, const char *path, const struct mt_dataset *d) {
  struct mt_dataset_stats s = mt_dataset_stats(d);
  mt_info("%-8s %s: %lld samples, %lld tokens, %lld of them targets; longest %lld", what, path,
          (long long)s.samples, (long long)s.tokens, (long long)s.targets, (long long)s.longest);
  if (s.truncated) mt_info("         %lld samples cut at max-seq-length", (long long)s.truncated);
  if (s.dropped) mt_info("         %lld samples without a target left out", (long long)s.dropped);
  if (s.bad_lines) {
    mt_warn("%s: %lld malformed lines skipped, the first is line %lld", path,
            (long long)s.bad_lines, (long long)s.first_bad_line);
  }
}

static struct mt_loader_options loader_options(const struct run *r, bool training) {
  enum mt_experts_strategy experts = (enum mt_experts_strategy)r->o->experts;
  /* Not by whether graphs are wanted: padding has its part in the bits of a result. */
  bool few = training && mt_graphs_possible(&r->s.be, experts);
  return (struct mt_loader_options){.lengths = few ? mt_graph_lengths(r->o->grad_accum) : 0,
                                    .batch_size = r->o->batch_size,
                                    .micro_batches = training ? r->o->grad_accum : 1,
                                    .max_seq_length = r->o->max_seq_length,
                                    .pad_multiple = r->s.recipe->pad_multiple,
                                    .seed = r->o->seed,
                                    .world = 1,
                                    .shuffle = training};
}

static mt_err open_loaders(struct run *r) {
  struct mt_loader_options o = loader_options(r, true);
  MT_TRY(mt_dataset_wait(r->data));
  describe_data("data", r->o->data, r->data);
  MT_TRY(mt_loader_create(&r->loader, r->data, &o));
  for (int i = 0; i < r->loader.length_count; i++)
    mt_log(MT_LOG_DEBUG, "rows of up to %d tokens are padded to that", r->loader.length[i]);
  if (!r->eval_data) return MT_OK;
  MT_TRY(mt_dataset_wait(r->eval_data));
  describe_data("held out", r->o->eval_data, r->eval_data);
  o = loader_options(r, false);
  return mt_loader_create(&r->eval_loader, r->eval_data, &o);
}

double mt_train_aux_coef(double asked, const struct mt_config *c) {
  return asked >= 0 ? asked : c->aux_in_loss ? c->aux_coef : 0;
}

static mt_err open_model(struct run *r) {
  struct mt_loader_options l = loader_options(r, true);
  int capacity = mt_loader_token_capacity(&l);
  if (capacity < 0) {
    return mt_fail(MT_EINVAL, "batch-size %d x max-seq-length %d is too large", r->o->batch_size,
                   r->o->max_seq_length);
  }
  struct mt_model_options o = {
      .experts = (enum mt_experts_strategy)r->o->experts,
      .blocks = (enum mt_blocks_strategy)r->o->blocks,
      .recompute = (enum mt_recompute)r->o->recompute,
      .aux_coef = mt_train_aux_coef(r->o->router_aux_coef, &r->s.checkpoint.config),
      .training = true,
      .token_capacity = capacity,
      .sequence_capacity = r->o->batch_size};
  MT_TRY(mt_session_load(&r->s, &o, &r->o->freeze));
  mt_session_describe(&r->s);
  return MT_OK;
}

static mt_err open_optimizer(struct run *r) {
  const struct mt_train_options *o = r->o;
  int64_t per_epoch = mt_loader_steps_per_epoch(&r->loader);
  int64_t wanted = (int64_t)ceil(o->epochs * (double)per_epoch);
  r->total_steps = o->warmup_steps + o->train_steps;
  if (o->train_steps == 0)
    r->total_steps = wanted > o->warmup_steps + 1 ? wanted : o->warmup_steps + 1;
  struct mt_optimizer_options oo = {.lr = o->lr,
                                    .beta1 = o->adam_beta1,
                                    .beta2 = o->adam_beta2,
                                    .eps = o->adam_eps,
                                    .weight_decay = o->weight_decay,
                                    .clip = o->grad_clip,
                                    .schedule = (enum mt_schedule)o->lr_schedule,
                                    .warmup_steps = o->warmup_steps,
                                    .total_steps = r->total_steps,
                                    .seed = o->seed};
  mt_info("run      %lld steps of %d samples (%.2f epochs), warm-up %lld, learning rate %g",
          (long long)r->total_steps, o->batch_size * o->grad_accum,
          (double)r->total_steps / (double)per_epoch, (long long)o->warmup_steps, o->lr);
  MT_TRY(mt_optimizer_create(&r->optimizer, &r->s.model, &oo));
  return mt_step_queue_create(&r->queue, &r->optimizer, mt_device_graphs(&o->device));
}

/* What was asked and what was found, for whoever opens the directory later. */
static mt_err write_facts(const struct run *r) {
  const struct mt_train_options *o = r->o;
  const struct mt_config *c = &r->s.checkpoint.config;
  struct mt_dataset_stats d = mt_dataset_stats(r->data);
  struct mt_memory m = mt_model_memory(&r->s.model);
  char path[MT_PATH_MAX];
  json_t *root = json_object();
  json_object_set_new(root, "moetune", json_string(MOETUNE_VERSION));
  json_object_set_new(root, "files",
                      json_pack("{s:s, s:s, s:s}", "model/", "the fine-tuned checkpoint",
                                "metrics.jsonl", "one line a step, and one an evaluation",
                                "checkpoint-N/",
                                "the model after N steps with what --resume needs"));
  json_object_set_new(
      root, "options",
      json_pack("{s:s, s:s, s:s?, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:I, s:I, s:f, s:f, "
                "s:f, s:f, s:f, s:f, s:f, s:I}",
                "model", o->model, "data", o->data, "eval-data", o->eval_data, "precision",
                r->s.recipe->precision, "optim-state", r->s.recipe->states, "experts",
                o->experts == MT_EXPERTS_LOOP ? "loop" : "grouped", "blocks",
                o->blocks == MT_BLOCKS_UNFUSED ? "unfused" : "fused", "batch-size", o->batch_size,
                "grad-accum", o->grad_accum, "max-seq-length", o->max_seq_length, "warmup-steps",
                (json_int_t)o->warmup_steps, "total-steps", (json_int_t)r->total_steps, "lr", o->lr,
                "weight-decay", o->weight_decay, "adam-beta1", o->adam_beta1, "adam-beta2",
                o->adam_beta2, "adam-eps", o->adam_eps, "grad-clip", o->grad_clip,
                "router-aux-coef", r->s.model.options.aux_coef, "seed", (json_int_t)o->seed));
  json_object_set_new(root, "model",
                      json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i}", "type", c->model_type,
                                "layers", c->layers, "hidden", c->hidden, "ffn", c->ffn, "experts",
                                c->experts, "top_k", c->top_k, "vocab", c->vocab));
  json_object_set_new(root, "data",
                      json_pack("{s:I, s:I, s:I, s:I}", "samples", (json_int_t)d.samples, "tokens",
                                (json_int_t)d.tokens, "targets", (json_int_t)d.targets, "truncated",
                                (json_int_t)d.truncated));
  json_object_set_new(root, "memory_bytes",
                      json_pack("{s:I, s:I, s:I, s:I}", "parameters", (json_int_t)m.parameters,
                                "gradients", (json_int_t)m.gradients, "optimizer",
                                (json_int_t)m.optimizer, "activations", (json_int_t)m.activations));
  char *text = json_dumps(root, JSON_INDENT(2));
  json_decref(root);
  if (!text) return mt_fail(MT_ENOMEM, "run.json");
  mt_err err = mt_path_join(path, o->out, "run.json");
  if (!err) err = mt_file_write_atomic(path, text, strlen(text));
  free(text);
  return err;
}

static mt_err evaluate(struct run *r, struct mt_evaluation *e) {
  MT_TRY(mt_evaluate(&r->s.model, &r->eval_loader, e));
  mt_progress_break(&r->progress);
  mt_info("held out step %lld: loss %.4f, perplexity %.2f, token accuracy %.1f%%",
          (long long)r->optimizer.step, e->cross_entropy, e->perplexity, 100 * e->accuracy);
  return mt_metrics_evaluation(&r->metrics, r->optimizer.step, e);
}

static mt_err save(struct run *r) {
  MT_TRY(mt_state_save(&r->s, &r->optimizer, &r->loader, r->o, r->last_checkpoint));
  mt_progress_break(&r->progress);
  mt_info("saved    %s", r->last_checkpoint);
  return MT_OK;
}

/* Names the samples of the step that went wrong, and what is left. */
static mt_err numeric_failure(const struct run *r, const struct mt_step_result *step) {
  char lines[512] = "", why[256];
  size_t used = 0;
  snprintf(why, sizeof why, "%s", mt_error_message());
  for (int i = 0; i < step->line_count && used < sizeof lines - 24; i++) {
    used += (size_t)snprintf(lines + used, sizeof lines - used, " %lld", (long long)step->lines[i]);
  }
  return mt_fail(MT_ENUMERIC,
                 "step %lld: %s; lines of %s in this step:%s; last good checkpoint: %s",
                 (long long)step->step, why, r->o->data, lines,
                 *r->last_checkpoint ? r->last_checkpoint : "none yet");
}

static mt_err take_step(struct run *r) {
  struct mt_step_result result;
  mt_err err = mt_step_take(&r->queue, &result);
  if (err == MT_ENUMERIC) return numeric_failure(r, &result);
  if (err) return err;
  MT_TRY(mt_metrics_step(&r->metrics, &result, &r->s.model, result.step > r->o->warmup_steps));
  mt_progress_show(&r->progress, &(struct mt_progress_step){
                                     .step = result.step,
                                     .loss = result.loss,
                                     .grad_norm = result.grad_norm,
                                     .lr = result.lr,
                                     .tokens_per_s = (double)result.token_count / result.ms * 1e3,
                                     .elapsed_s = mt_now_s() - r->begin_s});
  return MT_OK;
}

static mt_err take_all(struct run *r) {
  while (r->queue.count > 0) MT_TRY(take_step(r));
  return MT_OK;
}

/* Launches a step and takes what is done. Waits every log_every steps alone, or once as many are
 * under way as may be, and then for all but the last few, so that a GPU has work meanwhile. */
static mt_err one_step(struct run *r) {
  enum { STAY = 2 };
  struct mt_step_queue *q = &r->queue;
  bool done;
  MT_TRY(mt_step_begin(q));
  MT_TRY(mt_loader_next(&r->loader));
  MT_TRY(mt_step_launch(q, r->loader.list, r->o->grad_accum));
  if (r->optimizer.step % r->o->log_every == 0 || mt_step_full(q)) {
    MT_TRY(mt_step_wait(q, q->depth > STAY ? STAY : q->depth - 1));
  }
  for (;;) {
    MT_TRY(mt_step_done(q, &done));
    if (!done) return MT_OK;
    MT_TRY(take_step(r));
  }
}

/* Where a GPU's memory went, and how the steps were launched. */
static void describe_device(const struct run *r) {
  const struct mt_backend *be = &r->s.be;
  const struct mt_step_queue *q = &r->queue;
  struct mt_memory m = mt_model_memory(&r->s.model);
  double planned = (double)(m.parameters + m.gradients + m.optimizer + m.activations);
  if (mt_graphs_possible(be, r->s.model.options.experts)) {
    mt_info("graphs   %d, replayed in %lld of %lld steps (%.1f%%)", q->graphs.count,
            (long long)q->replayed, (long long)q->taken,
            q->taken ? 100.0 * (double)q->replayed / (double)q->taken : 0.0);
  }
  if (!be->memory_used) return;
  double used = (double)be->memory_used(be);
  mt_info("memory   %.3f GiB of the GPU in use: %.3f as planned, %.3f beyond", used / (1 << 30),
          planned / (1 << 30), (used - planned) / (1 << 30));
}

static mt_err steps(struct run *r) {
  const struct mt_train_options *o = r->o;
  r->begin_s = mt_now_s();
  mt_progress_begin(&r->progress, 2, r->optimizer.step, r->total_steps, o->log_every);
  while (r->optimizer.step < r->total_steps && !stop_signal) {
    MT_TRY(one_step(r));
    int64_t step = r->optimizer.step;
    struct mt_evaluation e;
    bool last = step == r->total_steps;
    bool look = r->eval_data && o->eval_every && step % o->eval_every == 0 && !last;
    bool keep = o->save_every && step % o->save_every == 0 && !last;
    if (look || keep) MT_TRY(take_all(r));
    if (look) MT_TRY(evaluate(r, &e));
    if (keep) MT_TRY(save(r));
  }
  MT_TRY(take_all(r));
  mt_progress_break(&r->progress);
  describe_device(r);
  return MT_OK;
}

static mt_err finish(struct run *r, const struct mt_evaluation *before) {
  char path[MT_PATH_MAX];
  struct mt_hf_export_options e = {MT_HF_KEEP, MT_HF_KEEP, r->o->max_shard_bytes};
  if (r->eval_data) {
    struct mt_evaluation after;
    MT_TRY(evaluate(r, &after));
    printf("Held-out loss: %.4f before, %.4f after\n", before->cross_entropy, after.cross_entropy);
  }
  if (r->o->save_every) MT_TRY(save(r));
  MT_TRY(mt_path_join(path, r->o->out, "model"));
  MT_TRY(mt_hf_export(&r->s.checkpoint, &r->s.model.params, &r->s.be, path, &e));
  printf("Fine-tuned checkpoint: %s\n", path);
  printf("%lld fine-tuning steps complete!\n", (long long)(r->total_steps - r->o->warmup_steps));
  printf("Median time per step: %.0f ms\n", mt_metrics_median_ms(&r->metrics));
  return MT_OK;
}

static mt_err train(struct run *r) {
  const struct mt_train_options *o = r->o;
  char from[MT_PATH_MAX] = "";
  struct mt_evaluation before = {0};
  if (o->resume) MT_TRY(mt_state_find(o, from));
  MT_TRY(mt_dir_create(o->out));
  MT_TRY(mt_session_open(&r->s, *from ? from : o->model, &o->device, o->chat_template));
  MT_TRY(open_data(r, o->data, &r->data)); /* tokenised while the weights are read */
  if (o->eval_data) MT_TRY(open_data(r, o->eval_data, &r->eval_data));
  MT_TRY(open_model(r));
  MT_TRY(open_loaders(r));
  MT_TRY(open_optimizer(r));
  if (*from) {
    MT_TRY(mt_state_load(from, &r->s, &r->optimizer, &r->loader, o));
    snprintf(r->last_checkpoint, sizeof r->last_checkpoint, "%s", from);
    mt_info("resuming %s at step %lld", from, (long long)r->optimizer.step);
  }
  MT_TRY(mt_metrics_open(&r->metrics, o->out, r->optimizer.step, *from != '\0', r->total_steps));
  MT_TRY(write_facts(r));
  if (r->eval_data) MT_TRY(evaluate(r, &before));
  catch_signals();
  MT_TRY(steps(r));
  if (r->optimizer.step < r->total_steps) {
    MT_TRY(save(r));
    mt_info("stopped by signal %d after step %lld; go on with --resume %s", (int)stop_signal,
            (long long)r->optimizer.step, r->last_checkpoint);
    return MT_OK;
  }
  return finish(r, &before);
}

mt_err mt_train_run(const struct mt_train_options *options) {
  struct run r = {.o = options};
  if (options->ep_size != 1) {
    return mt_fail(MT_EUNSUPPORTED, "--ep-size %d: this build runs on one rank", options->ep_size);
  }
  mt_err err = train(&r);
  mt_progress_break(&r.progress);
  mt_metrics_close(&r.metrics);
  mt_step_queue_destroy(&r.queue);
  if (r.optimizer.model) mt_optimizer_destroy(&r.optimizer);
  mt_loader_destroy(&r.loader);
  mt_loader_destroy(&r.eval_loader);
  mt_dataset_close(r.data);
  mt_dataset_close(r.eval_data);
  mt_session_close(&r.s);
  return err;
}
