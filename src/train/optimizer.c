#include "train/optimizer.h"

#include <math.h>
#include <stdlib.h>

double mt_schedule_lr(const struct mt_optimizer_options *o, int64_t step) {
  if (step <= o->warmup_steps) return o->lr * (double)step / (double)(o->warmup_steps + 1);
  if (o->schedule == MT_SCHEDULE_CONSTANT) return o->lr;
  double span = (double)(o->total_steps - o->warmup_steps);
  double x = span > 0 ? (double)(step - 1 - o->warmup_steps) / span : 0;
  if (x > 1) x = 1;
  return o->lr * (o->schedule == MT_SCHEDULE_LINEAR ? 1 - x : 0.5 * (1 + cos(M_PI * x)));
}

/* The experts' weights: nearly all there is, and grouped products make their gradients, which add
 * up the squares on the way. */
static bool leaves_sumsq(const struct mt_param *p) {
  return p->learns && p->sync == MT_SYNC_EXPERT;
}

static size_t sumsq_bytes(const struct mt_optimizer *o) {
  return (size_t)(1 + o->part_count) * sizeof(double);
}

mt_err mt_optimizer_create(struct mt_optimizer *o, struct mt_model *m,
                           const struct mt_optimizer_options *options) {
  *o = (struct mt_optimizer){.options = *options, .model = m};
  mt_err err;
  void *sumsq = NULL;
  struct mt_piece *piece = NULL;
  int pieces, learning = 0;
  MT_GO(mt_model_pieces(m, &piece, &pieces));
  o->segments = calloc((size_t)pieces + 1, sizeof *o->segments);
  o->grads = calloc((size_t)pieces + 1, sizeof *o->grads);
  if (!o->segments || !o->grads) {
    err = mt_fail(MT_ENOMEM, "optimizer table");
    goto done;
  }
  for (int i = 0; i < pieces; i++) {
    struct mt_adamw_segment *s = &o->segments[o->segment_count++];
    *s = (struct mt_adamw_segment){.master = piece[i].master,
                                   .grad = piece[i].grad,
                                   .m = piece[i].m,
                                   .v = piece[i].v,
                                   .decay = m->params.row[piece[i].row].decay,
                                   .tensor = (uint32_t)piece[i].row,
                                   .first = piece[i].first};
    if (piece[i].compute.data && piece[i].compute.data != piece[i].master.data)
      s->compute = piece[i].compute;
  }
  for (int i = 0; i < m->params.count; i++) {
    learning += m->params.row[i].learns;
    o->part_count += leaves_sumsq(&m->params.row[i]);
  }
  if (learning == 0 && !mt_acts_staged(&m->acts)) { /* others' stages may learn */
    err = mt_fail(MT_EINVAL, "every parameter is frozen: there is nothing to learn");
    goto done;
  }
  MT_GO(m->be->mem_alloc(m->be, sumsq_bytes(o), &sumsq));
  o->grad_sumsq = sumsq;
  for (int i = 0, part = 1; i < m->params.count; i++) {
    if (leaves_sumsq(&m->params.row[i])) m->params.row[i].grad_sumsq = o->grad_sumsq + part++;
  }
done:
  free(piece);
  if (err) mt_optimizer_destroy(o);
  return err;
}

void mt_optimizer_destroy(struct mt_optimizer *o) {
  if (o->grad_sumsq) {
    struct mt_params *p = &o->model->params;
    o->model->be->mem_free(o->model->be, o->grad_sumsq, sumsq_bytes(o));
    for (int i = 0; i < p->count; i++) p->row[i].grad_sumsq = NULL;
  }
  free(o->segments);
  free(o->grads);
  *o = (struct mt_optimizer){0};
}

mt_err mt_optimizer_norm(struct mt_optimizer *o) {
  struct mt_backend *be = o->model->be;
  struct mt_params *p = &o->model->params;
  int left = 0, count = 0;
  for (int i = 0; i < p->count; i++) left += p->row[i].grad_summed;
  bool all = left == o->part_count && left > 0;
  for (int i = 0; i < o->segment_count; i++) {
    struct mt_param *row = &p->row[o->segments[i].tensor];
    if (!(all && leaves_sumsq(row))) o->grads[count++] = o->segments[i].grad;
    row->grad_summed = false;
  }
  struct mt_sumsq_args a = {.tensors = o->grads, .tensor_count = count, .out = o->grad_sumsq};
  if (all) a.parts = o->grad_sumsq + 1, a.part_count = o->part_count;
  return be->ops.sumsq(be, &a);
}

double mt_optimizer_prepare(struct mt_optimizer *o) {
  double lr = mt_schedule_lr(&o->options, o->step + 1);
  o->model->acts.host_values->adamw =
      mt_adamw_at(lr, o->options.beta1, o->options.beta2, o->options.weight_decay, o->step + 1,
                  o->options.seed);
  return lr;
}

mt_err mt_optimizer_update(struct mt_optimizer *o) {
  struct mt_backend *be = o->model->be;
  MT_TRY(be->ops.adamw(be, &(struct mt_adamw_args){.segments = o->segments,
                                                   .segment_count = o->segment_count,
                                                   .beta1 = o->options.beta1,
                                                   .beta2 = o->options.beta2,
                                                   .eps = o->options.eps,
                                                   .values = &o->model->acts.values->adamw,
                                                   .clip = o->options.clip,
                                                   .grad_sumsq = o->grad_sumsq}));
  if (o->model->options.zero > 0) return MT_OK; /* mt_ranks_parameters, when all parts are back */
  return mt_model_quantize_weights(o->model);
}
