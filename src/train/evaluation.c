#include "train/evaluation.h"

#include <math.h>
#include <stdlib.h>

static size_t pair_count(const struct mt_routing *r) {
  return (size_t)r->layers * (size_t)r->experts;
}

mt_err mt_routing_create(struct mt_routing *r, const struct mt_model *m) {
  const struct mt_tensor *logits = &m->acts.layer[m->acts.shard.layer_begin].logits;
  *r = (struct mt_routing){.layers = m->config.layers, .experts = m->config.experts};
  r->load = calloc(pair_count(r), sizeof *r->load);
  r->host_load = calloc(pair_count(r), sizeof *r->host_load);
  r->entropy = calloc((size_t)r->layers, sizeof *r->entropy);
  r->host_logits = malloc(mt_bytes(logits) + 1);
  if (r->load && r->host_load && r->entropy && r->host_logits) return MT_OK;
  mt_routing_destroy(r);
  return mt_fail(MT_ENOMEM, "routing of %d layers", m->config.layers);
}

void mt_routing_destroy(struct mt_routing *r) {
  free(r->load);
  free(r->host_load);
  free(r->entropy);
  free(r->host_logits);
  *r = (struct mt_routing){0};
}

double mt_softmax_entropy(const double *x, int n) {
  double top = -INFINITY, sum = 0, weighted = 0;
  for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int i = 0; i < n; i++) {
    double d = x[i] - top, e = exp(d);
    sum += e;
    if (e > 0) weighted += e * d;
  }
  return log(sum) - weighted / sum;
}

/* Sum over the tokens of one layer. */
static double entropy_sum(const struct mt_routing *r, enum mt_dtype dtype, int64_t tokens) {
  double sum = 0, row[MT_MAX_EXPERTS];
  for (int64_t t = 0; t < tokens; t++) {
    for (int e = 0; e < r->experts; e++) {
      int64_t i = t * r->experts + e;
      row[e] = dtype == MT_F64 ? ((const double *)r->host_logits)[i]
                               : (double)((const float *)r->host_logits)[i];
    }
    sum += mt_softmax_entropy(row, r->experts);
  }
  return sum;
}

/* Adds what the pass that has just run left behind. */
static mt_err add_routing(struct mt_routing *r, struct mt_model *m, const struct mt_batch *b) {
  const struct mt_acts *a = &m->acts;
  MT_TRY(m->be->download(m->be, r->host_load, a->loads, pair_count(r) * sizeof *r->host_load));
  for (size_t i = 0; i < pair_count(r); i++) r->load[i] += r->host_load[i];
  r->tokens += b->valid_count;
  if (!m->options.training) return MT_OK;
  for (int l = a->shard.layer_begin; l < a->shard.layer_end; l++) {
    struct mt_tensor logits = mt_rows(&a->layer[l].logits, 0, b->valid_count);
    MT_TRY(m->be->download(m->be, r->host_logits, logits.data, mt_bytes(&logits)));
    r->entropy[l] += entropy_sum(r, logits.dtype, b->valid_count);
  }
  return MT_OK;
}

static void begin_routing(struct mt_routing *r) {
  memset(r->load, 0, pair_count(r) * sizeof *r->load);
  memset(r->entropy, 0, (size_t)r->layers * sizeof *r->entropy);
  r->tokens = 0;
}

static void finish_routing(struct mt_routing *r, const struct mt_model *m) {
  bool known = m->options.training && r->tokens > 0;
  for (int l = 0; l < r->layers; l++)
    r->entropy[l] = known ? r->entropy[l] / (double)r->tokens : NAN;
}

/* What each rank has found, added up. */
static mt_err add_ranks(struct mt_ranks *ranks, struct mt_routing *routing,
                        struct mt_evaluation *out, struct mt_loss *total) {
  int64_t counts[] = {total->correct_count, out->samples, out->targets,
                      routing ? routing->tokens : 0};
  MT_TRY(mt_ranks_sum(ranks, &total->cross_entropy_sum, 1));
  MT_TRY(mt_ranks_sum_counts(ranks, counts, 4));
  total->correct_count = counts[0];
  out->samples = counts[1];
  out->targets = counts[2];
  if (!routing) return MT_OK;
  routing->tokens = counts[3];
  MT_TRY(mt_ranks_sum_counts(ranks, routing->load, (int)pair_count(routing)));
  MT_TRY(mt_ranks_sum(ranks, routing->entropy, routing->layers));
  if (!mt_ranks_staged(ranks)) return MT_OK; /* else each stage has its layers' */
  MT_TRY(mt_ranks_sum_stage_counts(ranks, routing->load, (int)pair_count(routing)));
  return mt_ranks_sum_stages(ranks, routing->entropy, routing->layers);
}

mt_err mt_evaluate(struct mt_model *m, struct mt_ranks *ranks, struct mt_loader *l,
                   struct mt_routing *routing, struct mt_evaluation *out) {
  struct mt_loss total = {0};
  struct mt_batch *b;
  mt_err err;
  *out = (struct mt_evaluation){0};
  l->next = (struct mt_position){0};
  if (routing) begin_routing(routing);
  for (int i = 0; (err = mt_loader_next_once(l, &b)) == MT_OK; i++) {
    struct mt_loss loss;
    MT_TRY(mt_ranks_eval(ranks, m, i, b, &loss));
    if (routing) MT_TRY(add_routing(routing, m, b));
    total.cross_entropy_sum += loss.cross_entropy_sum;
    total.correct_count += loss.correct_count;
    out->samples += b->sequence_count;
    out->targets += b->target_count;
  }
  if (err != MT_EEND) return err;
  MT_TRY(mt_ranks_eval_end(ranks, &total));
  if (ranks) MT_TRY(add_ranks(ranks, routing, out, &total));
  if (routing) finish_routing(routing, m);
  out->cross_entropy = total.cross_entropy_sum / (double)out->targets;
  out->perplexity = exp(out->cross_entropy);
  out->accuracy = (double)total.correct_count / (double)out->targets;
  return MT_OK;
}

void mt_routing_shares(const int64_t *load, int layers, int experts, double *least, double *most) {
  bool any = false;
  *least = *most = 0;
  for (int l = 0; l < layers; l++) {
    const int64_t *row = load + (int64_t)l * experts;
    double sum = 0;
    for (int e = 0; e < experts; e++) sum += (double)row[e];
    for (int e = 0; e < experts && sum > 0; e++) {
      double share = (double)row[e] / sum;
      if (!any || share < *least) *least = share;
      if (!any || share > *most) *most = share;
      any = true;
    }
  }
}

bool mt_best_update(struct mt_best *b, int64_t step, double loss, double min_delta) {
  float now = (float)loss;
  if (b->any && step == b->last_step) return false;
  b->last_step = step;
  if (!b->any || (double)now < (double)b->loss - min_delta) {
    b->any = true;
    b->loss = now;
    b->step = step;
    b->since = 0;
    return true;
  }
  b->since++;
  return false;
}
