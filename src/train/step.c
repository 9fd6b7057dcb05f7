#include "train/step.h"

#include <math.h>

/* The last stamp of a step's window ends it. */
static int end_stamp(const struct mt_step_slot *s) {
  return s->marks.first + MT_MARKS;
}

static size_t load_bytes(const struct mt_model *m) {
  return (size_t)m->config.layers * (size_t)m->config.experts * sizeof(int32_t);
}

mt_err mt_step_queue_create(struct mt_step_queue *q, struct mt_optimizer *o) {
  struct mt_backend *be = o->model->be;
  mt_err err = MT_OK;
  *q = (struct mt_step_queue){.model = o->model, .optimizer = o, .depth = be->steps_ahead};
  if (q->depth > MT_STEP_DEPTH) q->depth = MT_STEP_DEPTH;
  for (int i = 0; i < q->depth; i++) {
    struct mt_step_slot *s = &q->slot[i];
    void *sums = NULL, *load = NULL;
    MT_GO(be->host_alloc(be, 4 * sizeof *s->sums, &sums));
    s->sums = sums;
    MT_GO(be->host_alloc(be, load_bytes(q->model), &load));
    s->load = load;
    s->marks.first = i * MT_MARKS_WINDOW;
  }
done:
  if (err) mt_step_queue_destroy(q);
  return err;
}

void mt_step_queue_destroy(struct mt_step_queue *q) {
  for (int i = 0; i < MT_STEP_DEPTH && q->model; i++) {
    q->model->be->host_free(q->model->be, q->slot[i].sums);
    q->model->be->host_free(q->model->be, q->slot[i].load);
  }
  if (q->model) q->model->marks = NULL;
  *q = (struct mt_step_queue){0};
}

bool mt_step_full(const struct mt_step_queue *q) {
  return q->count == q->depth;
}

static struct mt_step_slot *next_slot(struct mt_step_queue *q) {
  return &q->slot[(q->first + q->count) % q->depth];
}

mt_err mt_step_begin(struct mt_step_queue *q) {
  if (mt_step_full(q)) return mt_fail(MT_EINVAL, "%d steps are under way already", q->count);
  return mt_phase_begin(q->model, &next_slot(q)->marks);
}

static mt_err count_step(struct mt_batch *const *micro, int micro_count, struct mt_step_result *r) {
  for (int i = 0; i < micro_count; i++) {
    const struct mt_batch *b = micro[i];
    r->target_count += b->target_count;
    r->token_count += b->valid_count;
    for (int k = 0; b->lines && k < b->sequence_count && r->line_count < MT_STEP_LINES; k++) {
      r->lines[r->line_count++] = b->lines[k];
    }
  }
  if (r->target_count > 0) return MT_OK;
  return mt_fail(MT_EFORMAT, "no token of this step is a target of the loss");
}

static struct mt_pass micro_pass(const struct mt_step_result *r, struct mt_batch *const *micro,
                                 int i) {
  double share = 1.0 / (double)r->target_count;
  return (struct mt_pass){.batch = micro[i],
                          .loss_scale = share,
                          .aux_weight = share * micro[i]->target_count,
                          .accumulate = i > 0};
}

/* What the host will read, on its way there. */
static mt_err send_report(struct mt_step_queue *q, struct mt_step_slot *s) {
  struct mt_backend *be = q->model->be;
  const struct mt_acts *a = &q->model->acts;
  MT_TRY(be->download_later(be, s->sums, a->sums, 3 * sizeof *s->sums));
  MT_TRY(be->download_later(be, s->sums + 3, q->optimizer->grad_sumsq, sizeof *s->sums));
  MT_TRY(be->download_later(be, s->load, a->load_sums, load_bytes(q->model)));
  return be->stamp(be, end_stamp(s));
}

mt_err mt_step_launch(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count) {
  struct mt_step_slot *s = next_slot(q);
  struct mt_model *m = q->model;
  s->result = (struct mt_step_result){.step = q->optimizer->step + 1, .load = s->load};
  MT_TRY(count_step(micro, micro_count, &s->result));
  MT_TRY(mt_phase_mark(m, MT_PHASE_DATA));
  for (int i = 0; i < micro_count; i++) {
    struct mt_pass pass = micro_pass(&s->result, micro, i);
    pass.sum_squares = i + 1 == micro_count; /* mt_optimizer_norm follows */
    MT_TRY(mt_model_train_pass_later(m, &pass));
  }
  MT_TRY(mt_optimizer_norm(q->optimizer));
  MT_TRY(mt_optimizer_update(q->optimizer, &s->result.lr));
  MT_TRY(mt_phase_mark(m, MT_PHASE_OPTIMIZER));
  MT_TRY(send_report(q, s));
  q->count++;
  return MT_OK;
}

mt_err mt_step_take(struct mt_step_queue *q, struct mt_step_result *out) {
  struct mt_step_slot *s = &q->slot[q->first];
  struct mt_step_result *r = &s->result;
  struct mt_backend *be = q->model->be;
  double seconds;
  if (q->count == 0) return mt_fail(MT_EINVAL, "no step is under way");
  q->first = (q->first + 1) % q->depth;
  q->count--;
  MT_TRY(be->stamp_wait(be, end_stamp(s)));
  MT_TRY(be->stamp_read(be, s->marks.first, end_stamp(s), &seconds));
  MT_TRY(mt_phase_collect(be, &s->marks, r->phase_s));
  r->ms = seconds * 1e3;
  r->cross_entropy = s->sums[0] / (double)r->target_count;
  r->correct_count = (int64_t)s->sums[1];
  r->aux = s->sums[2];
  r->loss = r->cross_entropy + q->model->options.aux_coef * r->aux;
  r->grad_norm = sqrt(s->sums[3]);
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
  MT_TRY(count_step(micro, micro_count, out));
  for (int i = 0; i < micro_count; i++) {
    struct mt_pass pass = micro_pass(out, micro, i);
    struct mt_loss loss;
    MT_TRY(mt_model_train_pass(m, &pass, &loss));
    out->cross_entropy += loss.cross_entropy_sum * pass.loss_scale;
    out->aux += loss.aux * pass.aux_weight;
    out->correct_count += loss.correct_count;
  }
  out->loss = out->cross_entropy + m->options.aux_coef * out->aux;
  return MT_OK;
}
