#include "par/pipeline.h"

#include <stdlib.h>

#include "model/decode.h"

static int warm_up(bool sequential, int stage, int stages, int micro_count) {
  int ahead = sequential ? 0 : stages - 1 - stage;
  return ahead < micro_count ? ahead : micro_count;
}

int mt_stage_in_flight(bool sequential, int stage, int stages, int micro_count) {
  int ahead = warm_up(sequential, stage, stages, micro_count);
  return ahead < micro_count ? ahead + 1 : micro_count;
}

struct mt_stage_action mt_stage_action(bool sequential, int stage, int stages, int micro_count,
                                       int k) {
  int ahead = warm_up(sequential, stage, stages, micro_count), steady = micro_count - ahead;
  if (k < ahead) return (struct mt_stage_action){false, k};
  k -= ahead;
  if (k < 2 * steady) return (struct mt_stage_action){k % 2 == 1, k / 2 + (k % 2 ? 0 : ahead)};
  return (struct mt_stage_action){true, k - steady};
}

mt_err mt_pipeline_open(struct mt_pipeline *p, struct mt_model *m, struct mt_comm *comm,
                        struct mt_comm *back, struct mt_comm *host) {
  const struct mt_shard *s = &m->options.shard;
  *p = (struct mt_pipeline){.model = m,
                            .comm = comm,
                            .back = back,
                            .host = host,
                            .early = comm == host,
                            .slots = m->options.in_flight + 1};
  bool first = s->layer_begin == 0, last = s->layer_end == m->config.layers;
  if (comm->size < 2 || first != (comm->rank == 0) || last != (comm->rank == comm->size - 1)) {
    return mt_fail(MT_EINVAL, "layers %d to %d of %d are not those of stage %d of %d",
                   s->layer_begin, s->layer_end, m->config.layers, comm->rank, comm->size);
  }
  p->come = calloc((size_t)p->slots, sizeof *p->come);
  p->go = calloc((size_t)p->slots, sizeof *p->go);
  if (p->come && p->go) return MT_OK;
  mt_pipeline_close(p);
  return mt_fail(MT_ENOMEM, "messages of %d micro-batches", p->slots);
}

void mt_pipeline_close(struct mt_pipeline *p) {
  free(p->come);
  free(p->go);
  *p = (struct mt_pipeline){0};
}

static bool is_first(const struct mt_pipeline *p) {
  return p->comm->rank == 0;
}
static bool is_last(const struct mt_pipeline *p) {
  return p->comm->rank == p->comm->size - 1;
}

/* What a stage waits for its neighbours is a phase of its own. */
static mt_err await_by(struct mt_pipeline *p, struct mt_comm *c, struct mt_stage_message *m) {
  if (!m->stream.impl && !m->aux.impl) return MT_OK;
  MT_TRY(mt_phase_enter(p->model, MT_PHASE_PIPELINE));
  MT_TRY(mt_comm_wait(c, &m->stream));
  return mt_comm_wait(c, &m->aux);
}

static mt_err await(struct mt_pipeline *p, struct mt_stage_message *m) {
  return await_by(p, p->comm, m);
}

static mt_err await_back(struct mt_pipeline *p, struct mt_stage_message *m) {
  return await_by(p, p->back, m);
}

static size_t stream_bytes(const struct mt_pipeline *p, int tokens) {
  const struct mt_model *m = p->model;
  return (size_t)tokens * (size_t)m->config.hidden * mt_dtype_bytes(m->recipe->act);
}

/* Room for micro-batch i's hidden states, once what lay there has left. */
static mt_err expect(struct mt_pipeline *p, int i, int tokens) {
  struct mt_stage_entry *e = &p->model->acts.entry[i % p->slots];
  struct mt_stage_message *m = &p->come[i % p->slots];
  int from = p->comm->rank - 1;
  if (is_first(p)) return MT_OK;
  MT_TRY(await(p, &p->go[i % p->slots]));
  MT_TRY(mt_comm_recv(p->comm, e->stream.data, stream_bytes(p, tokens), from, &m->stream));
  return mt_comm_recv(p->comm, e->aux_sums.data, p->model->acts.aux_bytes, from, &m->aux);
}

static mt_err expect_back(struct mt_pipeline *p, int i, int tokens) {
  struct mt_stage_turn *t = &p->model->acts.turn[i % 2];
  struct mt_stage_message *m = &p->back_come[i % 2];
  int from = p->comm->rank + 1;
  MT_TRY(await_back(p, &p->back_go[i % 2]));
  if (is_last(p)) return MT_OK;
  MT_TRY(mt_comm_recv(p->back, t->ds.data, stream_bytes(p, tokens), from, &m->stream));
  return mt_comm_recv(p->back, t->aux_grads.data, mt_bytes(&t->aux_grads), from, &m->aux);
}

static mt_err pass_on(struct mt_pipeline *p, int i, int tokens) {
  struct mt_acts *a = &p->model->acts;
  struct mt_stage_message *m = &p->go[i % p->slots];
  int to = p->comm->rank + 1;
  if (is_last(p)) return MT_OK;
  MT_TRY(mt_comm_send(p->comm, a->out.data, stream_bytes(p, tokens), to, &m->stream));
  MT_TRY(mt_comm_send(p->comm, a->aux_sums.data, a->aux_bytes, to, &m->aux));
  return mt_comm_set_out(p->comm);
}

static mt_err pass_back(struct mt_pipeline *p, int i, int tokens) {
  struct mt_acts *a = &p->model->acts;
  struct mt_stage_message *m = &p->back_go[i % 2];
  int to = p->comm->rank - 1;
  if (is_first(p)) return MT_OK;
  MT_TRY(mt_comm_send(p->back, a->ds.data, stream_bytes(p, tokens), to, &m->stream));
  MT_TRY(mt_comm_send(p->back, a->aux_grads.data, mt_bytes(&a->aux_grads), to, &m->aux));
  return mt_comm_set_out(p->back);
}

/* Micro-batch i's entry is in use from here on, and its turn's `out`. The next one's is free: what
 * had it has come back. */
static mt_err forward(struct mt_pipeline *p, const struct mt_pass *passes, int micro_count, int i) {
  int next = i + 1;
  if (!p->early) MT_TRY(expect(p, i, mt_batch_rows(passes[i].batch)));
  MT_TRY(await(p, &p->come[i % p->slots]));
  if (p->early && next < micro_count) MT_TRY(expect(p, next, mt_batch_rows(passes[next].batch)));
  MT_TRY(await(p, &p->go[i % p->slots]));
  if (i >= 2) MT_TRY(await(p, &p->go[(i - 2) % p->slots]));
  if (is_last(p)) MT_TRY(await_back(p, &p->back_go[i % 2])); /* aux_grads' */
  MT_TRY(mt_model_stage_forward(p->model, i, &passes[i]));
  return pass_on(p, i, mt_batch_rows(passes[i].batch));
}

static mt_err backward(struct mt_pipeline *p, const struct mt_pass *passes, int micro_count,
                       int i) {
  int next = i + 1;
  if (!p->early) MT_TRY(expect_back(p, i, mt_batch_rows(passes[i].batch)));
  MT_TRY(await_back(p, &p->back_come[i % 2]));
  if (p->early && next < micro_count)
    MT_TRY(expect_back(p, next, mt_batch_rows(passes[next].batch)));
  if (p->begin) MT_TRY(p->begin(p->begin_context, i, micro_count));
  MT_TRY(mt_model_stage_backward(p->model, i, &passes[i]));
  return pass_back(p, i, mt_batch_rows(passes[i].batch));
}

static mt_err sent(struct mt_pipeline *p) {
  for (int i = 0; i < p->slots; i++) MT_TRY(await(p, &p->go[i]));
  for (int i = 0; i < 2; i++) MT_TRY(await_back(p, &p->back_go[i]));
  return MT_OK;
}

mt_err mt_pipeline_run(struct mt_pipeline *p, const struct mt_pass *passes, int micro_count) {
  int stage = p->comm->rank, stages = p->comm->size;
  int need = mt_stage_in_flight(p->sequential, stage, stages, micro_count);
  if (need > p->model->options.in_flight) {
    return mt_fail(MT_EINVAL, "stage %d of %d keeps %d micro-batches, there is room for %d", stage,
                   stages, need, p->model->options.in_flight);
  }
  if (p->early) MT_TRY(expect(p, 0, mt_batch_rows(passes[0].batch)));
  if (p->early) MT_TRY(expect_back(p, 0, mt_batch_rows(passes[0].batch)));
  for (int k = 0; k < 2 * micro_count; k++) {
    struct mt_stage_action a = mt_stage_action(p->sequential, stage, stages, micro_count, k);
    MT_TRY(a.backward ? backward(p, passes, micro_count, a.micro)
                      : forward(p, passes, micro_count, a.micro));
  }
  return sent(p);
}

/* A forward without a backward, of so many tokens: what comes in lies in the entry on return. */
static mt_err enter(struct mt_pipeline *p, int tokens) {
  mt_acts_select(&p->model->acts, 0);
  MT_TRY(expect(p, 0, tokens));
  return await(p, &p->come[0]);
}

static mt_err leave(struct mt_pipeline *p, int tokens) {
  MT_TRY(pass_on(p, 0, tokens));
  return await(p, &p->go[0]);
}

/* As in forward(), but for the arrival of the next, whose length is not known yet. On a GPU the
 * host waits for this stage's part: else the first stage would launch a whole file ahead. */
mt_err mt_pipeline_eval(struct mt_pipeline *p, int i, const struct mt_batch *batch,
                        struct mt_loss *loss) {
  mt_acts_select(&p->model->acts, i);
  MT_TRY(expect(p, i, mt_batch_rows(batch)));
  MT_TRY(await(p, &p->come[i % p->slots]));
  MT_TRY(await(p, &p->go[i % p->slots]));
  if (i >= 2) MT_TRY(await(p, &p->go[(i - 2) % p->slots]));
  MT_TRY(mt_model_stage_eval(p->model, batch, loss));
  MT_TRY(pass_on(p, i, mt_batch_rows(batch)));
  return p->model->be->sync(p->model->be);
}

mt_err mt_pipeline_eval_end(struct mt_pipeline *p, struct mt_loss *total) {
  MT_TRY(mt_phase_enter(p->model, MT_PHASE_PIPELINE));
  MT_TRY(sent(p));
  return mt_comm_broadcast(p->host, total, sizeof *total, p->comm->size - 1);
}

mt_err mt_pipeline_decode(struct mt_pipeline *p, struct mt_kv_cache *cache, const int32_t *ids,
                          int count, float *logits) {
  MT_TRY(mt_model_decode_check(p->model, cache, ids, count));
  MT_TRY(enter(p, count));
  MT_TRY(mt_model_decode(p->model, cache, ids, count, is_last(p) ? logits : NULL));
  MT_TRY(leave(p, count));
  if (!logits) return MT_OK;
  size_t bytes = (size_t)p->model->config.vocab * sizeof *logits;
  return mt_comm_broadcast(p->host, logits, bytes, p->comm->size - 1);
}

mt_err mt_pipeline_logits(struct mt_pipeline *p, int64_t begin, int64_t count, float *out) {
  size_t bytes = (size_t)count * (size_t)p->model->config.vocab * sizeof *out;
  if (is_last(p)) MT_TRY(mt_model_logits(p->model, begin, count, out));
  return mt_comm_broadcast(p->host, out, bytes, p->comm->size - 1); /* host memory */
}
