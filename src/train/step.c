#include "train/step.h"

#include <math.h>
#include <stdlib.h>

/* A slot's two marks on the backend's clock. */
static int begin_stamp(const struct mt_step_queue *q, const struct mt_step_slot *s) {
  return 2 * (int)(s - q->slot);
}
static int end_stamp(const struct mt_step_queue *q, const struct mt_step_slot *s) {
  return begin_stamp(q, s) + 1;
}

static size_t report_bytes(const struct mt_model *m) {
  return sizeof(struct mt_step_report) +
         (size_t)m->config.layers * (size_t)m->config.experts * sizeof(int32_t);
}

mt_err mt_step_queue_create(struct mt_step_queue *q, struct mt_optimizer *o, bool graphs) {
  struct mt_backend *be = o->model->be;
  mt_err err = MT_OK;
  *q = (struct mt_step_queue){.model = o->model, .optimizer = o, .depth = be->steps_ahead};
  if (q->depth > MT_STEP_DEPTH) q->depth = MT_STEP_DEPTH;
  mt_graphs_open(&q->graphs, o->model, graphs);
  for (int i = 0; i < q->depth; i++) {
    void *report = NULL;
    MT_GO(be->host_alloc(be, report_bytes(q->model), &report));
    q->slot[i].report = report;
  }
done:
  if (err) mt_step_queue_destroy(q);
  return err;
}

void mt_step_queue_destroy(struct mt_step_queue *q) {
  mt_graphs_close(&q->graphs);
  for (int i = 0; i < MT_STEP_DEPTH && q->model; i++) {
    if (q->slot[i].report) q->model->be->host_free(q->model->be, q->slot[i].report);
  }
  free(q->targets);
  free(q->passes);
  *q = (struct mt_step_queue){0};
}

bool mt_step_full(const struct mt_step_queue *q) {
  return q->count == q->depth;
}

mt_err mt_step_done(const struct mt_step_queue *q, bool *done) {
  *done = false;
  if (q->count == 0) return MT_OK;
  return q->model->be->stamp_passed(q->model->be, end_stamp(q, &q->slot[q->first]), done);
}

mt_err mt_step_wait(const struct mt_step_queue *q, int stay) {
  if (q->count <= stay) return MT_OK;
  const struct mt_step_slot *s = &q->slot[(q->first + q->count - stay - 1) % q->depth];
  return q->model->be->stamp_wait(q->model->be, end_stamp(q, s));
}

static struct mt_step_slot *next_slot(struct mt_step_queue *q) {
  return &q->slot[(q->first + q->count) % q->depth];
}

mt_err mt_step_begin(struct mt_step_queue *q) {
  if (mt_step_full(q)) return mt_fail(MT_EINVAL, "%d steps are under way already", q->count);
  MT_TRY(q->model->be->stamp(q->model->be, begin_stamp(q, next_slot(q))));
  return mt_phase_begin(q->model, MT_PHASE_DATA);
}

static void count_step(struct mt_batch *const *micro, int micro_count, struct mt_step_result *r) {
  for (int i = 0; i < micro_count; i++) {
    const struct mt_batch *b = micro[i];
    r->target_count += b->target_count;
    r->token_count += b->valid_count;
    for (int k = 0; b->lines && k < b->sequence_count && r->line_count < MT_STEP_LINES; k++) {
      r->lines[r->line_count++] = b->lines[k];
    }
  }
}

/* Targets of each micro-batch, of all ranks, and of the step; tokens likewise. */
static mt_err count_targets(struct mt_ranks *ranks, struct mt_batch *const *micro, int micro_count,
                            int64_t *targets, struct mt_step_result *r) {
  count_step(micro, micro_count, r);
  for (int i = 0; i < micro_count; i++) targets[i] = micro[i]->target_count;
  targets[micro_count] = r->token_count;
  if (ranks) MT_TRY(mt_ranks_sum_counts(ranks, targets, micro_count + 1));
  r->token_count = targets[micro_count];
  r->target_count = 0;
  for (int i = 0; i < micro_count; i++) r->target_count += targets[i];
  if (r->target_count > 0) return MT_OK;
  return mt_fail(MT_EFORMAT, "no token of this step is a target of the loss");
}

/* targets: of each micro-batch, of all ranks. */
static struct mt_pass micro_pass(const struct mt_step_result *r, const int64_t *targets,
                                 struct mt_batch *const *micro, int micro_count, int i) {
  double share = 1.0 / (double)r->target_count;
  return (struct mt_pass){.batch = micro[i],
                          .loss_scale = share,
                          .aux_weight = share * (double)targets[i],
                          .accumulate = i > 0,
                          .sum_squares = micro_count == 1};
}

struct part {
  struct mt_step_queue *q;
  struct mt_pass pass;
};

static mt_err launch_pass(void *context) {
  struct part *p = context;
  return mt_model_pass_launch(p->q->model, &p->pass);
}

/* part.pass: the step's last. The norm takes what its squares say once; launched again, behind a
 * capture that failed, it must find them as before. */
static mt_err launch_update(void *context) {
  struct part *p = context;
  struct mt_step_queue *q = p->q;
  struct mt_model *m = q->model;
  mt_model_say_summed(m, p->pass.sum_squares);
  MT_TRY(mt_phase_enter(m, MT_PHASE_OPTIMIZER));
  mt_acts_enter(&m->acts, m->be, MT_ROOM_ENDS);
  if (q->ranks)
    MT_TRY(mt_ranks_gradients(q->ranks, q->optimizer->grad_sumsq));
  else
    MT_TRY(mt_optimizer_norm(q->optimizer));
  MT_TRY(mt_optimizer_update(q->optimizer));
  return q->ranks ? mt_ranks_parameters(q->ranks) : MT_OK;
}

/* What the host will read, on its way there. */
static mt_err send_report(struct mt_step_queue *q, struct mt_step_slot *s) {
  struct mt_backend *be = q->model->be;
  double *sumsq = &s->report->grad_sumsq;
  MT_TRY(be->download_later(be, s->report, q->model->acts.report, report_bytes(q->model)));
  MT_TRY(be->download_later(be, sumsq, q->optimizer->grad_sumsq, sizeof *sumsq));
  return be->stamp(be, end_stamp(q, s));
}

/* Over ranks what is launched depends on how many rows come: nothing of it can be repeated. */
static mt_err run_part(struct mt_step_queue *q, struct mt_graph_key key,
                       mt_err (*launch)(void *context), struct part *part, bool *replayed) {
  if (!q->ranks) return mt_graphs_run(&q->graphs, key, launch, part, replayed);
  *replayed = false;
  return launch(part);
}

/* *last (=) the step's last pass. */
static mt_err launch_stages(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count,
                            const int64_t *targets, struct mt_pass *last) {
  const struct mt_step_result *r = &next_slot(q)->result;
  for (int i = 0; i < micro_count; i++) {
    q->passes[i] = micro_pass(r, targets, micro, micro_count, i);
    q->passes[i].sum_squares = false;
  }
  *last = q->passes[micro_count - 1];
  return mt_pipeline_run(&q->ranks->pipeline, q->passes, micro_count);
}

static mt_err launch_all(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count,
                         int64_t *targets) {
  struct mt_step_slot *s = next_slot(q);
  struct mt_step_result *r = &s->result;
  bool several = micro_count > 1;
  const struct mt_graph_key update = {.tokens = -1, .several = several};
  struct part part = {.q = q};
  bool replayed;
  *r = (struct mt_step_result){.step = q->optimizer->step + 1,
                               .load = (const int32_t *)(s->report + 1)};
  MT_TRY(count_targets(q->ranks, micro, micro_count, targets, r));
  r->lr = mt_optimizer_prepare(q->optimizer);
  r->replayed = !mt_ranks_staged(q->ranks);
  if (mt_ranks_staged(q->ranks)) MT_TRY(launch_stages(q, micro, micro_count, targets, &part.pass));
  for (int i = 0; i < micro_count && !mt_ranks_staged(q->ranks); i++) {
    part.pass = micro_pass(r, targets, micro, micro_count, i);
    part.pass.sum_squares &= !q->ranks; /* a sum over ranks comes behind */
    const struct mt_graph_key pass = {mt_batch_rows(micro[i]), part.pass.accumulate, several};
    MT_TRY(mt_model_pass_load(q->model, &part.pass));
    if (q->ranks) MT_TRY(mt_ranks_begin(q->ranks, i, micro_count));
    MT_TRY(run_part(q, pass, launch_pass, &part, &replayed));
    r->replayed &= replayed;
  }
  MT_TRY(run_part(q, update, launch_update, &part, &replayed));
  r->replayed &= replayed;
  mt_model_say_summed(q->model, false);
  MT_TRY(mt_phase_end(q->model));
  MT_TRY(send_report(q, s));
  q->graphs.warm = true;
  q->optimizer->step++;
  q->count++;
  return MT_OK;
}

/* Room for a number of each micro-batch and one more; taken anew only when they get more. */
static mt_err reserve_targets(struct mt_step_queue *q, int micro_count) {
  if (q->target_capacity > micro_count) return MT_OK;
  free(q->targets);
  free(q->passes);
  q->targets = calloc((size_t)micro_count + 1, sizeof *q->targets);
  q->passes = calloc((size_t)micro_count, sizeof *q->passes);
  q->target_capacity = q->targets && q->passes ? micro_count + 1 : 0;
  return q->target_capacity ? MT_OK : mt_fail(MT_ENOMEM, "%d micro-batches", micro_count);
}

mt_err mt_step_launch(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count) {
  MT_TRY(reserve_targets(q, micro_count));
  return launch_all(q, micro, micro_count, q->targets);
}

/* Each stage has its layers' loads, the last one the losses. */
static mt_err sum_stages(struct mt_step_queue *q, struct mt_step_report *report, int64_t *loads,
                         int n) {
  MT_TRY(mt_ranks_sum_stages(q->ranks, report->sums, 4));
  return mt_ranks_sum_stage_counts(q->ranks, loads, n);
}

/* Everyone's waits, and what they are of. */
static mt_err share_waits(struct mt_step_queue *q, struct mt_step_result *r) {
  int n = q->ranks->mesh.pp;
  double work = 0, numbers[MT_STEP_STAGES + 1] = {0};
  for (int p = MT_PHASE_EMBED; p <= MT_PHASE_ATTENTION_BWD; p++) work += r->phase_s[p];
  numbers[q->ranks->mesh.pp_rank] = r->phase_s[MT_PHASE_PIPELINE];
  numbers[n] = work;
  MT_TRY(mt_ranks_sum_stages(q->ranks, numbers, n + 1));
  double waited = 0;
  for (int i = 0; i < n; i++) waited += r->stage_wait_s[i] = numbers[i];
  r->stage_count = n;
  if (waited > 0) r->bubble = waited / (waited + numbers[n]);
  return MT_OK;
}

/* A report's sums over the ranks that read data; the auxiliary losses are of all of them already.
 */
static mt_err sum_reports(struct mt_step_queue *q, struct mt_step_report *report) {
  int32_t *load = (int32_t *)(report + 1);
  int n = q->model->config.layers * q->model->config.experts;
  int64_t *wide = calloc((size_t)n, sizeof *wide);
  if (!wide) return mt_fail(MT_ENOMEM, "load of %d experts", n);
  for (int i = 0; i < n; i++) wide[i] = load[i];
  mt_err err = mt_ranks_sum(q->ranks, report->sums, 2);
  if (!err) err = mt_ranks_sum_counts(q->ranks, wide, n);
  if (!err && mt_ranks_staged(q->ranks)) err = sum_stages(q, report, wide, n);
  for (int i = 0; !err && i < n; i++) load[i] = (int32_t)wide[i];
  free(wide);
  return err;
}

static double loss_of(const struct mt_model *m, const struct mt_step_result *r) {
  return r->cross_entropy + m->options.aux_coef * r->aux + m->options.z_coef * r->z;
}

mt_err mt_step_take(struct mt_step_queue *q, struct mt_step_result *out) {
  struct mt_step_slot *s = &q->slot[q->first];
  struct mt_step_result *r = &s->result;
  struct mt_backend *be = q->model->be;
  double seconds;
  if (q->count == 0) return mt_fail(MT_EINVAL, "no step is under way");
  q->first = (q->first + 1) % q->depth;
  q->count--;
  MT_TRY(be->stamp_wait(be, end_stamp(q, s)));
  MT_TRY(be->stamp_read(be, begin_stamp(q, s), end_stamp(q, s), &seconds));
  q->taken++;
  q->replayed += r->replayed;
  struct mt_step_report *report = s->report;
  if (q->ranks) MT_TRY(mt_ranks_failed(q->ranks));
  if (q->ranks) MT_TRY(sum_reports(q, report));
  for (int p = 0; p < MT_PHASE_COUNT; p++) r->phase_s[p] = 1e-9 * (double)report->clock.phase_ns[p];
  if (mt_ranks_staged(q->ranks)) MT_TRY(share_waits(q, r));
  r->ms = seconds * 1e3;
  r->cross_entropy = report->sums[0] / (double)r->target_count;
  r->correct_count = (int64_t)report->sums[1];
  r->aux = report->sums[2];
  r->z = report->sums[3];
  r->loss = loss_of(q->model, r);
  r->grad_norm = sqrt(report->grad_sumsq);
  *out = *r;
  if (isfinite(r->loss) && isfinite(r->grad_norm)) return MT_OK;
  q->optimizer->step = r->step - 1;
  return mt_fail(MT_ENUMERIC, "loss %g, gradient norm %g", r->loss, r->grad_norm);
}

mt_err mt_step_run(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count,
                   struct mt_step_result *out) {
  MT_TRY(mt_step_begin(q));
  MT_TRY(mt_step_launch(q, micro, micro_count));
  return mt_step_take(q, out);
}

mt_err mt_step_gradients(struct mt_model *m, struct mt_batch *const *micro, int micro_count,
                         struct mt_step_result *out) {
  *out = (struct mt_step_result){0};
  int64_t *targets = calloc((size_t)micro_count + 1, sizeof *targets);
  if (!targets) return mt_fail(MT_ENOMEM, "%d micro-batches", micro_count);
  mt_err err = count_targets(NULL, micro, micro_count, targets, out);
  for (int i = 0; !err && i < micro_count; i++) {
    struct mt_pass pass = micro_pass(out, targets, micro, micro_count, i);
    pass.sum_squares = false;
    struct mt_loss loss;
    err = mt_model_train_pass(m, &pass, &loss);
    if (err) break;
    out->cross_entropy += loss.cross_entropy_sum * pass.loss_scale;
    out->aux += loss.aux * pass.aux_weight;
    out->z += loss.z * pass.aux_weight;
    out->correct_count += loss.correct_count;
  }
  free(targets);
  out->loss = loss_of(m, out);
  return err;
}
