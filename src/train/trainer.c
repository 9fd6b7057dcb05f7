/* `moetune train`: the run around the step. */
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "base/log.h"
#include "train/commands.h"
#include "train/data.h"
#include "train/facts.h"
#include "train/health.h"
#include "train/inspect.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/samples.h"
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
  struct mt_samples samples;
  struct mt_routing routing;
  struct mt_expert_watch watch;
  struct mt_evaluation before, after; /* the first and the last of this process */
  struct mt_best best;
  bool evaluated, recorded; /* there is an evaluation; there is a run.json */
  int stop;                 /* the signal that ends the run, on all ranks after the same step */
  struct mt_progress progress;
  int64_t total_steps, first_step, looked_at, saved_at, started;
  double open_s, begin_s;            /* of the process, of the first step */
  char last_checkpoint[MT_PATH_MAX]; /* "" before the first */
};

static volatile sig_atomic_t stop_signal;

static void on_signal(int number) {
  stop_signal = number;
}

/* The first SIGINT, SIGTERM or SIGUSR1 (which mpirun hands on) ends the run after its step; a
 * second one ends it at once. */
static void catch_signals(void) {
  struct sigaction a = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
  stop_signal = 0;
  sigemptyset(&a.sa_mask);
  sigaction(SIGINT, &a, NULL);
  sigaction(SIGTERM, &a, NULL);
  sigaction(SIGUSR1, &a, NULL);
}

/* Whether any rank is to stop; and whether any has failed meanwhile. */
static mt_err agree(struct run *r) {
  r->stop = stop_signal;
  return mt_world_meet(r->s.world, MT_OK, &r->stop);
}

static bool speaks(const struct run *r) {
  return mt_session_speaks(&r->s);
}

static struct mt_dataset_options data_options(const struct run *r, const char *path) {
  return (struct mt_dataset_options){.path = path,
                                     .chat = r->s.chat,
                                     .max_seq_length = r->o->max_seq_length,
                                     .eos_id = r->s.checkpoint.config.eos_id,
                                     .train_on_prompt = r->o->train_on_prompt,
                                     .skip_bad_lines = r->o->skip_bad_lines,
                                     .threads = r->o->device.threads};
}

static mt_err begin_data(struct run *r) {
  struct mt_dataset_options o = data_options(r, r->o->data), e = data_options(r, r->o->eval_data);
  MT_TRY(mt_data_begin(&r->s, &o, &r->o->cache, &r->data));
  return e.path ? mt_data_begin(&r->s, &e, &r->o->cache, &r->eval_data) : MT_OK;
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
                                    .rank = mt_session_reader(&r->s),
                                    .world = mt_session_readers(&r->s),
                                    .shuffle = training};
}

static mt_err open_loader(struct run *r, const char *what, const char *path, bool training,
                          struct mt_dataset **data, struct mt_loader *loader) {
  struct mt_dataset_options d = data_options(r, path);
  struct mt_loader_options o = loader_options(r, training);
  MT_TRY(mt_data_finish(&r->s, &d, &r->o->cache, data));
  mt_data_describe(what, path, *data);
  return mt_world_meet(r->s.world, mt_loader_create(loader, *data, &o), NULL);
}

static mt_err open_loaders(struct run *r) {
  MT_TRY(open_loader(r, "data", r->o->data, true, &r->data, &r->loader));
  for (int i = 0; i < r->loader.length_count; i++)
    mt_log(MT_LOG_DEBUG, "rows of up to %d tokens are padded to that", r->loader.length[i]);
  if (!r->o->eval_data) return MT_OK;
  return open_loader(r, "held out", r->o->eval_data, false, &r->eval_data, &r->eval_loader);
}

double mt_train_aux_coef(double asked, const struct mt_config *c) {
  return asked >= 0 ? asked : c->aux_in_loss ? c->aux_coef : 0;
}

static mt_err model_options(const struct run *r, struct mt_model_options *out) {
  struct mt_loader_options l = loader_options(r, true);
  int capacity = mt_loader_token_capacity(&l);
  if (capacity < 0) {
    return mt_fail(MT_EINVAL, "batch-size %d x max-seq-length %d is too large", r->o->batch_size,
                   r->o->max_seq_length);
  }
  *out = (struct mt_model_options){
      .experts = (enum mt_experts_strategy)r->o->experts,
      .blocks = (enum mt_blocks_strategy)r->o->blocks,
      .recompute = (enum mt_recompute)r->o->recompute,
      .aux_coef = mt_train_aux_coef(r->o->router_aux_coef, &r->s.checkpoint.config),
      .z_coef = r->o->router_z_loss,
      .training = true,
      .zero = r->o->zero,
      .chunks = r->o->ep_chunks,
      .dispatch = (enum mt_dispatch_precision)r->o->dispatch_precision,
      .token_capacity = capacity,
      .sequence_capacity = r->o->batch_size};
  if (mt_ranks_staged(r->s.ranks)) {
    const struct mt_mesh *mesh = &r->s.ranks->mesh;
    out->in_flight = mt_stage_in_flight(r->o->pp_schedule == MT_PP_SEQUENTIAL, mesh->pp_rank,
                                        mesh->pp, r->o->grad_accum);
  }
  return MT_OK;
}

static mt_err open_model(struct run *r) {
  struct mt_model_options o;
  MT_TRY(model_options(r, &o));
  MT_TRY(mt_session_load(&r->s, &o, &r->o->freeze));
  r->s.members.pipeline.sequential = r->o->pp_schedule == MT_PP_SEQUENTIAL;
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
          (long long)r->total_steps, o->batch_size * o->grad_accum * mt_session_readers(&r->s),
          (double)r->total_steps / (double)per_epoch, (long long)o->warmup_steps, o->lr);
  if (mt_session_parameters(&r->s).learning == 0)
    return mt_fail(MT_EINVAL, "every parameter is frozen: there is nothing to learn");
  MT_TRY(mt_optimizer_create(&r->optimizer, &r->s.model, &oo));
  return mt_step_queue_create(&r->queue, &r->optimizer,
                              mt_device_graphs(&o->device) && !r->s.ranks);
}

static struct mt_run_result result_so_far(struct run *r, const char *status) {
  return (struct mt_run_result){.status = status,
                                .step = r->optimizer.step,
                                .seconds = mt_now_s() - r->open_s,
                                .median_step_ms = mt_metrics_median_ms(&r->metrics),
                                .evaluated = r->evaluated,
                                .loss_before = r->before.cross_entropy,
                                .loss_after = r->after.cross_entropy,
                                .best = r->best};
}

static mt_err write_facts(struct run *r, const char *status, const char *error) {
  if (!speaks(r)) return MT_OK;
  struct mt_run_facts f = {.options = r->o,
                           .session = &r->s,
                           .data = r->data,
                           .eval_data = r->eval_data,
                           .total_steps = r->total_steps,
                           .first_step = r->first_step,
                           .started = r->started};
  struct mt_run_result result = result_so_far(r, status);
  result.error = error;
  return mt_facts_write(&f, &result);
}

/* The model as it is, as a checkpoint of this name. The others wait for the rank that writes. */
static mt_err export_model(struct run *r, const char *name, char path[MT_PATH_MAX]) {
  MT_TRY(mt_path_join(path, r->o->out, name));
  mt_world_doing(r->s.world, "writing the model");
  mt_world_patience(r->s.world, mt_session_patience_s(&r->s));
  MT_TRY(mt_state_export(&r->s, path, r->o->max_shard_bytes));
  MT_TRY(agree(r));
  mt_world_patience(r->s.world, 0);
  return MT_OK;
}

/* The model whose held-out loss is the lowest yet; what has learned nothing is not worth it. */
static mt_err keep_best(struct run *r) {
  char path[MT_PATH_MAX];
  if (!r->o->keep_best || r->optimizer.step == 0) return MT_OK;
  MT_TRY(export_model(r, "best", path));
  mt_info("best     step %lld: %s", (long long)r->optimizer.step, path);
  return MT_OK;
}

static void tell_evaluation(const struct run *r) {
  const struct mt_evaluation *e = &r->after;
  double least, most, low = INFINITY, high = 0;
  mt_info("held out step %lld: loss %.4f, perplexity %.2f, token accuracy %.1f%%",
          (long long)r->optimizer.step, e->cross_entropy, e->perplexity, 100 * e->accuracy);
  for (int l = 0; l < r->routing.layers; l++) {
    low = fmin(low, r->routing.entropy[l]);
    high = fmax(high, r->routing.entropy[l]);
  }
  mt_routing_shares(r->routing.load, r->routing.layers, r->routing.experts, &least, &most);
  mt_info("routing  an expert's share of its layer %.1f%% to %.1f%%, even %.1f%%; router entropy "
          "%.2f to %.2f of %.2f nats",
          100 * least, 100 * most, 100.0 / r->routing.experts, low, high,
          log((double)r->routing.experts));
}

/* Whether this step's evaluation belongs to the run: a resumed one looks where it begins too, and
 * must decide as if it had not been stopped. */
static bool look_counts(const struct run *r) {
  const struct mt_train_options *o = r->o;
  int64_t step = r->optimizer.step;
  if (r->best.any && r->best.last_step == step) return false;
  return step == 0 || step == r->total_steps || (o->eval_every && step % o->eval_every == 0);
}

/* The held-out loss and the samples as the model is now. */
static mt_err look(struct run *r) {
  int64_t step = r->optimizer.step;
  bool counts = look_counts(r);
  mt_progress_break(&r->progress);
  mt_world_doing(r->s.world, "evaluating");
  if (r->eval_data) {
    MT_TRY(mt_evaluate(&r->s.model, r->s.ranks, &r->eval_loader, &r->routing, &r->after));
    if (!r->evaluated) r->before = r->after;
    r->evaluated = true;
    tell_evaluation(r);
  }
  r->looked_at = step;
  if (!counts) return MT_OK;
  if (r->eval_data) {
    if (speaks(r)) MT_TRY(mt_metrics_evaluation(&r->metrics, step, &r->after, &r->routing));
    if (mt_best_update(&r->best, step, r->after.cross_entropy, r->o->min_delta))
      MT_TRY(keep_best(r));
  }
  return mt_samples_take(&r->samples, step);
}

static bool patience_is_over(const struct run *r) {
  return r->o->patience > 0 && r->best.since >= r->o->patience;
}

/* On the disk, before there is a checkpoint that a run goes on from with them. */
static mt_err sync_lines(const struct run *r) {
  MT_TRY(mt_lines_sync(r->metrics.file, "metrics.jsonl"));
  return mt_lines_sync(r->samples.file, "samples.jsonl");
}

static mt_err save(struct run *r) {
  if (r->saved_at == r->optimizer.step) return MT_OK;     /* the run ends where it has just saved */
  MT_TRY(mt_world_meet(r->s.world, sync_lines(r), NULL)); /* safe before it is */
  mt_world_doing(r->s.world, "writing a checkpoint");
  mt_world_patience(r->s.world, mt_session_patience_s(&r->s));
  MT_TRY(mt_state_save(&r->s, &r->optimizer, &r->loader, r->o, r->last_checkpoint));
  mt_progress_break(&r->progress);
  mt_info("saved    %s", r->last_checkpoint);
  r->saved_at = r->optimizer.step;
  mt_err err = speaks(r) ? mt_state_retain(r->o->out, r->optimizer.step, r->o->keep_last) : MT_OK;
  err = mt_world_meet(r->s.world, err, NULL); /* large files may be long in going, too */
  mt_world_patience(r->s.world, 0);
  return err;
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

/* Tells of experts that have gone without a token for long. */
static mt_err watch_experts(struct run *r, const struct mt_step_result *step) {
  char names[256], text[512];
  int n = mt_expert_watch_step(&r->watch, step->step, step->load, names, sizeof names);
  if (n == 0) return MT_OK;
  snprintf(text, sizeof text, "%d expert%s without a token for %lld step%s (%s)", n,
           n == 1 ? "" : "s", (long long)r->watch.patience, r->watch.patience == 1 ? "" : "s",
           names);
  mt_progress_break(&r->progress);
  if (!speaks(r)) return MT_OK;
  mt_warn("step %lld: %s", (long long)step->step, text);
  return mt_metrics_warning(&r->metrics, step->step, text);
}

static mt_err take_step(struct run *r) {
  struct mt_step_result result;
  mt_err err = mt_step_take(&r->queue, &result);
  if (err == MT_ENUMERIC) return numeric_failure(r, &result);
  if (err) return err;
  if (!speaks(r)) return watch_experts(r, &result);
  MT_TRY(mt_metrics_step(&r->metrics, &result, &r->s.model, result.step > r->o->warmup_steps));
  mt_progress_show(&r->progress, &(struct mt_progress_step){
                                     .step = result.step,
                                     .loss = result.loss,
                                     .grad_norm = result.grad_norm,
                                     .lr = result.lr,
                                     .tokens_per_s = (double)result.token_count / result.ms * 1e3,
                                     .elapsed_s = mt_now_s() - r->begin_s});
  return watch_experts(r, &result);
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
  bool due, done;
  MT_TRY(mt_step_begin(q));
  MT_TRY(mt_loader_next(&r->loader));
  MT_TRY(mt_step_launch(q, r->loader.list, r->o->grad_accum));
  due = r->optimizer.step % r->o->log_every == 0 || mt_step_full(q);
  int stay = q->depth > STAY ? STAY : q->depth - 1;
  if (due) MT_TRY(mt_step_wait(q, stay));
  /* Taking adds up over ranks: all must take the same ones, whichever they find done. */
  while (r->s.ranks && due && q->count > stay) MT_TRY(take_step(r));
  while (!r->s.ranks) {
    MT_TRY(mt_step_done(q, &done));
    if (!done) break;
    MT_TRY(take_step(r));
  }
  return MT_OK;
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
  for (;;) {
    char what[64];
    MT_TRY(agree(r));
    if (r->optimizer.step == r->total_steps || r->stop || patience_is_over(r)) break;
    snprintf(what, sizeof what, "step %lld", (long long)r->optimizer.step + 1);
    mt_world_doing(r->s.world, what);
    MT_TRY(one_step(r));
    int64_t step = r->optimizer.step;
    bool last = step == r->total_steps;
    bool due = o->eval_every && step % o->eval_every == 0 && !last;
    bool keep = o->save_every && step % o->save_every == 0 && !last;
    if (due || keep) MT_TRY(take_all(r));
    if (due) MT_TRY(look(r));
    if (keep) MT_TRY(save(r));
  }
  MT_TRY(take_all(r));
  mt_progress_break(&r->progress);
  describe_device(r);
  return MT_OK;
}

static mt_err finish(struct run *r) {
  char path[MT_PATH_MAX];
  int64_t step = r->optimizer.step;
  bool early = step < r->total_steps;
  if (r->looked_at != step) MT_TRY(look(r));
  if (r->evaluated && speaks(r))
    printf("Held-out loss: %.4f before, %.4f after\n", r->before.cross_entropy,
           r->after.cross_entropy);
  if (early && speaks(r))
    printf("Stopped early after step %lld: no better held-out loss in %d evaluations; the best was "
           "%.4f at step %lld\n",
           (long long)step, r->best.since, (double)r->best.loss, (long long)r->best.step);
  if (r->o->save_every) MT_TRY(save(r));
  MT_TRY(export_model(r, "model", path));
  if (!speaks(r)) return MT_OK;
  printf("Fine-tuned checkpoint: %s\n", path);
  printf("%lld fine-tuning steps complete!\n",
         (long long)(step > r->o->warmup_steps ? step - r->o->warmup_steps : 0));
  printf("Median time per step: %.0f ms\n", mt_metrics_median_ms(&r->metrics));
  return write_facts(r, early ? "stopped early" : "finished", NULL);
}

/* What rank 0 writes as the run goes. */
static mt_err open_files(struct run *r, bool resume) {
  const struct mt_train_options *o = r->o;
  if (!speaks(r)) return MT_OK;
  MT_TRY(mt_metrics_open(&r->metrics, o->out, r->first_step, resume, r->total_steps));
  if (o->tensorboard) MT_TRY(mt_metrics_board(&r->metrics, o->out, r->first_step));
  return resume ? mt_metrics_best(o->out, r->first_step, o->min_delta, &r->best) : MT_OK;
}

static mt_err open_records(struct run *r, bool resume) {
  const struct mt_train_options *o = r->o;
  const struct mt_config *c = &r->s.checkpoint.config;
  r->first_step = r->optimizer.step;
  r->looked_at = r->saved_at = -1;
  MT_TRY(mt_world_meet(r->s.world, open_files(r, resume), NULL));
  if (r->s.world) MT_TRY(mt_comm_broadcast(&r->s.world->all, &r->best, sizeof r->best, 0));
  MT_TRY(mt_samples_open(&r->samples, &r->s, o, r->eval_data, r->first_step, resume));
  MT_TRY(mt_expert_watch_create(&r->watch, c->layers, c->experts, o->dead_expert_steps,
                                r->first_step));
  MT_TRY(mt_routing_create(&r->routing, &r->s.model));
  r->recorded = true;
  return write_facts(r, "running", NULL);
}

/* The checkpoint to go on from, if any, whole; and the run's directory. Rank 0 looks. */
static mt_err find_checkpoint(struct run *r, char from[MT_PATH_MAX]) {
  const struct mt_train_options *o = r->o;
  if (o->world && o->world->rank != 0) return MT_OK;
  if (o->resume) {
    MT_TRY(mt_state_find(o, from));
    MT_TRY(mt_state_verify(from));
  } else {
    mt_state_warn_of_earlier(o->out);
  }
  MT_TRY(mt_dir_create(o->out));
  mt_state_sweep(o->out);
  return MT_OK;
}

static mt_err open_session(struct run *r, char from[MT_PATH_MAX]) {
  const struct mt_train_options *o = r->o;
  struct mt_world *w = o->world;
  mt_world_doing(w, "opening the model");
  mt_world_patience(w, 1e6); /* a checkpoint of any size is read for its checksums */
  MT_TRY(mt_world_meet(w, find_checkpoint(r, from), NULL));
  mt_world_patience(w, 0);
  if (w) MT_TRY(mt_comm_broadcast(&w->all, from, MT_PATH_MAX, 0));
  mt_err err = mt_session_open(&r->s, *from ? from : o->model, &o->device, o->chat_template, w);
  MT_TRY(mt_world_meet(w, err, NULL));
  return mt_session_join(&r->s, w, o->ep_size, o->pp_size);
}

/* All up to the first step; a signal ends it between two of its stages. from (=) the checkpoint
 * that the run goes on from, "" when it is a fresh one. */
static mt_err prepare(struct run *r, char from[MT_PATH_MAX]) {
  MT_TRY(open_session(r, from));
  MT_TRY(mt_world_meet(r->s.world, begin_data(r), NULL)); /* tokenised while weights are read */
  MT_TRY(agree(r));
  if (r->stop) return MT_OK;
  MT_TRY(open_model(r));
  MT_TRY(agree(r));
  if (r->stop) return MT_OK;
  MT_TRY(open_loaders(r));
  MT_TRY(agree(r));
  if (r->stop) return MT_OK;
  MT_TRY(mt_world_meet(r->s.world, open_optimizer(r), NULL));
  if (*from) {
    mt_world_doing(r->s.world, "loading the checkpoint");
    mt_world_patience(r->s.world, mt_session_patience_s(&r->s));
    mt_err err = mt_state_load(from, &r->s, &r->optimizer, &r->loader, r->o);
    MT_TRY(mt_world_meet(r->s.world, err, NULL));
    mt_world_patience(r->s.world, 0);
    if (r->optimizer.step > r->total_steps) {
      return mt_fail(MT_EINVAL, "%s is of step %lld, the run would end after %lld", from,
                     (long long)r->optimizer.step, (long long)r->total_steps);
    }
    if (r->s.ranks) MT_TRY(mt_ranks_quantize(r->s.ranks));
    snprintf(r->last_checkpoint, sizeof r->last_checkpoint, "%s", from);
    mt_info("resuming %s at step %lld", from, (long long)r->optimizer.step);
  }
  MT_TRY(agree(r));
  if (r->stop) return MT_OK;
  return open_records(r, *from != '\0');
}

static void tell_stopped_early(const struct run *r, const char *from) {
  if (*from)
    mt_info("stopped by signal %d before a step was taken; go on with --resume %s", r->stop, from);
  else
    mt_info("stopped by signal %d before a step was taken: there is nothing to resume, start it "
            "again the same way",
            r->stop);
}

static mt_err train(struct run *r) {
  char from[MT_PATH_MAX] = "";
  catch_signals();
  MT_TRY(prepare(r, from));
  if (!r->recorded) {
    tell_stopped_early(r, from);
    return MT_OK;
  }
  r->queue.ranks = r->s.ranks;
  MT_TRY(look(r));
  MT_TRY(steps(r));
  if (r->optimizer.step == r->total_steps || patience_is_over(r)) return finish(r);
  MT_TRY(save(r));
  mt_info("stopped by signal %d after step %lld; go on with --resume %s", r->stop,
          (long long)r->optimizer.step, r->last_checkpoint);
  return write_facts(r, "interrupted", NULL);
}

/* The error that ended the run stays the one that is told. */
static void record_failure(struct run *r) {
  char why[1024];
  snprintf(why, sizeof why, "%s", mt_error_message());
  (void)write_facts(r, "failed", why);
  (void)mt_fail(MT_OK, "%s", why);
}

static mt_err dry_run(struct run *r) {
  struct mt_model_options m;
  const struct mt_train_options *o = r->o;
  struct mt_device_options device = o->device;
  device.plan_only = true;
  mt_err err = mt_session_open(&r->s, o->model, &device, o->chat_template, o->world);
  MT_TRY(mt_world_meet(o->world, err, NULL));
  MT_TRY(mt_session_join(&r->s, o->world, o->ep_size, o->pp_size));
  MT_TRY(model_options(r, &m));
  return mt_inspect_session(&r->s, &m, &r->o->freeze);
}

mt_err mt_train_run(const struct mt_train_options *options) {
  struct run r = {.o = options, .open_s = mt_now_s(), .started = (int64_t)time(NULL)};
  mt_err err = options->dry_run ? dry_run(&r) : train(&r);
  mt_progress_break(&r.progress);
  if (err && r.recorded) record_failure(&r);
  r.s.members.well = !err;
  if (options->recorded) *options->recorded = r.recorded;
  if (r.s.ranks) mt_ranks_settle(r.s.ranks); /* before any memory goes */
  mt_samples_close(&r.samples);
  mt_routing_destroy(&r.routing);
  mt_expert_watch_destroy(&r.watch);
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
