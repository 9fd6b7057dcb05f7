/* One micro-batch through the model and back. Shapes at each step are in acts.h. */
#include <stdlib.h>

#include "model/layers.h"
#include "quant/linear.h"

void mt_grad_ready(struct mt_model *m, struct mt_param *param) {
  if (m->grad_ready && param->learns) m->grad_ready(m->grad_ready_context, param);
}

void mt_range(struct mt_model *m, const char *name) {
  if (!m->be->range) return;
  if (m->in_range) m->be->range(NULL);
  m->in_range = name != NULL;
  if (name) m->be->range(name);
}

mt_err mt_phase_begin(struct mt_model *m, enum mt_phase phase) {
  m->timed = true;
  mt_range(m, mt_phase_name(phase));
  return m->be->clock_enter(m->be, &m->acts.report->clock, (int)phase, true);
}

mt_err mt_phase_enter(struct mt_model *m, enum mt_phase phase) {
  if (!m->timed) return MT_OK;
  mt_range(m, mt_phase_name(phase));
  return m->be->clock_enter(m->be, &m->acts.report->clock, (int)phase, false);
}

mt_err mt_phase_end(struct mt_model *m) {
  if (!m->timed) return MT_OK;
  m->timed = false;
  mt_range(m, NULL);
  return m->be->clock_enter(m->be, &m->acts.report->clock, -1, false);
}

mt_err mt_stream_open(struct mt_model *m, const struct mt_view *v) {
  struct mt_acts *a = &m->acts;
  struct mt_backend *be = m->be;
  int64_t t = v->tokens;
  MT_TRY(mt_phase_enter(m, MT_PHASE_EMBED));
  mt_acts_enter(a, be, MT_ROOM_ENDS);
  MT_TRY(be->ops.rope_table(be, &(struct mt_rope_table_args){.positions = a->positions,
                                                             .inv_freq = m->inv_freq,
                                                             .cos = mt_top(a->cos, t),
                                                             .sin = mt_top(a->sin, t)}));
  if (!mt_acts_first_stage(a)) return MT_OK;
  MT_TRY(be->ops.embed_fwd(be, &(struct mt_embed_fwd_args){
                                   .ids = a->ids,
                                   .table = mt_params_find(&m->params, MT_PARAM_EMBED, -1)->compute,
                                   .out = mt_top(a->layer[0].s1, t)}));
  return be->zero(be, a->aux_sums.data, a->aux_bytes);
}

mt_err mt_stream_close(struct mt_model *m, const struct mt_view *v) {
  struct mt_acts *a = &m->acts;
  int64_t t = v->tokens;
  struct mt_tensor s2 = mt_top(a->layer[a->shard.layer_end - 1].s2, t);
  if (!mt_acts_last_stage(a)) {
    return m->be->ops.add(
        m->be, &(struct mt_add_args){.a = s2, .b = mt_top(a->branch, t), .y = mt_top(a->out, t)});
  }
  mt_acts_enter(a, m->be, MT_ROOM_ENDS);
  return mt_norm_forward(m, s2, mt_top(a->branch, t),
                         mt_params_find(&m->params, MT_PARAM_FINAL_NORM, -1), mt_top(a->sf, t),
                         mt_top(a->xf, t), mt_top(a->rstdf, t));
}

static mt_err forward(struct mt_model *m, const struct mt_view *v) {
  struct mt_acts *a = &m->acts;
  MT_TRY(mt_stream_open(m, v));
  for (int l = a->shard.layer_begin; l < a->shard.layer_end; l++) {
    MT_TRY(mt_phase_enter(m, MT_PHASE_ATTENTION_FWD));
    MT_TRY(mt_attention_forward(m, l, v));
    MT_TRY(mt_phase_enter(m, MT_PHASE_MOE_FWD));
    MT_TRY(mt_moe_forward(m, l, v));
  }
  MT_TRY(mt_phase_enter(m, MT_PHASE_HEAD));
  MT_TRY(mt_stream_close(m, v));
  a->forwarded = a->running;
  if (!mt_acts_last_stage(a)) return MT_OK;
  const int32_t *valid_count = a->valid_count;
  if (m->exchange.share_aux) {
    MT_TRY(m->exchange.share_aux(&m->exchange, m->be, &a->aux_sums, a->aux_count, &valid_count));
  }
  struct mt_aux_loss_args aux = {.aux_prob = a->aux_prob,
                                 .aux_count = a->aux_count,
                                 .valid_count = valid_count,
                                 .layer_count = m->config.layers,
                                 .coef = &a->values->aux_coef,
                                 .loss = a->aux_loss,
                                 .grad = a->aux_grad};
  if (m->options.z_coef > 0) {
    aux.z_sum = a->z_sum;
    aux.z_coef = &a->values->z_coef;
    aux.z_loss = a->z_loss;
    aux.z_grad = a->z_grad;
  }
  return m->be->ops.aux_loss(m->be, &aux);
}

static mt_err head(struct mt_model *m, const struct mt_view *v, bool backward) {
  struct mt_param *w = mt_params_find(&m->params, MT_PARAM_HEAD, -1);
  struct mt_head_loss_args h = {.x = mt_top(m->acts.xf, v->tokens),
                                .w = w->compute,
                                .labels = m->acts.labels,
                                .loss_scale = &m->acts.values->loss_scale,
                                .loss = mt_top(m->acts.loss, v->tokens),
                                .correct = m->acts.correct,
                                .accumulate = v->accumulate};
  if (backward) {
    h.dx = mt_top(m->acts.branch, v->tokens);
    h.dw = w->grad;
  }
  MT_TRY(m->be->ops.head_loss(m->be, &h));
  if (backward && w->kind == MT_PARAM_HEAD) mt_grad_ready(m, w);
  return MT_OK;
}

static mt_err backward(struct mt_model *m, const struct mt_view *v) {
  struct mt_acts *a = &m->acts;
  int64_t t = v->tokens;
  if (mt_acts_last_stage(a)) {
    MT_TRY(mt_norm_backward(m, mt_top(a->branch, t), mt_top(a->sf, t),
                            mt_params_find(&m->params, MT_PARAM_FINAL_NORM, -1),
                            mt_top(a->rstdf, t), mt_top(a->ds, t), 1, v->accumulate));
  }
  int lowest =
      m->lowest_learning > a->shard.layer_begin ? m->lowest_learning : a->shard.layer_begin;
  for (int l = a->shard.layer_end - 1; l >= lowest; l--) {
    if (mt_layer_attention_lost(m, l)) {
      MT_TRY(mt_phase_enter(m, MT_PHASE_ATTENTION_BWD));
      MT_TRY(mt_attention_again(m, l, v));
    }
    MT_TRY(mt_phase_enter(m, MT_PHASE_MOE_BWD));
    MT_TRY(mt_moe_backward(m, l, v));
    MT_TRY(mt_phase_enter(m, MT_PHASE_ATTENTION_BWD));
    MT_TRY(mt_attention_backward(m, l, v));
  }
  if (!mt_acts_first_stage(a)) return MT_OK;
  MT_TRY(mt_phase_enter(m, MT_PHASE_EMBED));
  mt_acts_enter(a, m->be, MT_ROOM_ENDS);
  struct mt_param *embed = mt_params_find(&m->params, MT_PARAM_EMBED, -1);
  if (embed->learns) {
    /* A tied head has written its share of this gradient already. */
    int accumulate = v->accumulate || m->config.tied_head;
    MT_TRY(m->be->ops.embed_bwd(m->be, &(struct mt_embed_bwd_args){.ids = a->ids,
                                                                   .valid_count = a->valid_count,
                                                                   .dout = mt_top(a->ds, t),
                                                                   .dtable = embed->grad,
                                                                   .accumulate = accumulate}));
    mt_grad_ready(m, embed);
  }
  return MT_OK;
}

static double stat_at(const void *data, enum mt_dtype dtype, int64_t i) {
  return dtype == MT_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

static mt_err read_loss(struct mt_model *m, const struct mt_batch *batch, struct mt_loss *out) {
  struct mt_acts *a = &m->acts;
  *out = (struct mt_loss){.target_count = batch->target_count};
  size_t rows = (size_t)mt_batch_rows(batch);
  MT_TRY(m->be->download(m->be, m->host_rows, a->loss.data, rows * mt_dtype_bytes(a->loss.dtype)));
  for (size_t i = 0; i < rows; i++) {
    out->cross_entropy_sum += stat_at(m->host_rows, a->loss.dtype, (int64_t)i);
  }
  const int32_t *correct = m->host_rows;
  MT_TRY(m->be->download(m->be, m->host_rows, a->correct, rows * sizeof(int32_t)));
  for (size_t i = 0; i < rows; i++) out->correct_count += correct[i];
  MT_TRY(m->be->download(m->be, m->host_rows, a->aux_loss.data, mt_bytes(&a->aux_loss)));
  out->aux = stat_at(m->host_rows, a->aux_loss.dtype, 0);
  if (!(m->options.z_coef > 0)) return MT_OK;
  MT_TRY(m->be->download(m->be, m->host_rows, a->z_loss.data, mt_bytes(&a->z_loss)));
  out->z = stat_at(m->host_rows, a->z_loss.dtype, 0);
  return MT_OK;
}

static struct mt_view view_of(const struct mt_model *m, const struct mt_batch *batch) {
  return (struct mt_view){.tokens = mt_batch_rows(batch),
                          .sequences = (int)m->acts.options.sequence_capacity};
}

void mt_model_say_summed(struct mt_model *m, bool summed) {
  summed &= m->options.experts != MT_EXPERTS_LOOP;
  for (int i = 0; i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    p->grad_summed = summed && p->grad_sumsq && p->grad.data;
  }
}

mt_err mt_model_pass_load(struct mt_model *m, const struct mt_pass *pass) {
  struct mt_step_values *v = m->acts.host_values;
  v->loss_scale = (float)pass->loss_scale;
  v->aux_weight = pass->aux_weight;
  v->aux_coef = (float)(m->options.aux_coef * pass->aux_weight);
  v->z_coef = (float)(m->options.z_coef * pass->aux_weight);
  /* Said here and not where it is done: a replayed pass leaves them too. */
  mt_model_say_summed(m, pass->sum_squares);
  return mt_acts_load(&m->acts, m->be, pass->batch);
}

/* Head where it is here, backward, and the numbers. */
static mt_err launch_backward(struct mt_model *m, const struct mt_pass *pass,
                              const struct mt_view *view) {
  struct mt_acts *a = &m->acts;
  struct mt_view v = *view;
  v.accumulate = pass->accumulate && !mt_model_grad_shared(m, MT_SYNC_DENSE);
  v.accumulate_experts = pass->accumulate && !mt_model_grad_shared(m, MT_SYNC_EXPERT);
  if (mt_acts_last_stage(a)) MT_TRY(head(m, &v, true));
  MT_TRY(backward(m, &v));
  a->forwarded = -1;
  struct mt_tally_args t = {.loss = mt_top(a->loss, v.tokens),
                            .correct = a->correct,
                            .aux = a->aux_loss,
                            .aux_weight = &a->values->aux_weight,
                            .sums = a->report->sums,
                            .load = a->loads,
                            .load_sums = a->load_sums,
                            .load_count = (int64_t)m->config.layers * m->config.experts,
                            .accumulate = pass->accumulate};
  if (m->options.z_coef > 0) t.z_loss = a->z_loss;
  return m->be->ops.tally(m->be, &t);
}

static mt_err whole(const struct mt_model *m) {
  if (!mt_acts_staged(&m->acts)) return MT_OK;
  return mt_fail(MT_EINVAL, "layers %d to %d of %d are a stage, not a model",
                 m->acts.shard.layer_begin, m->acts.shard.layer_end, m->config.layers);
}

mt_err mt_model_pass_launch(struct mt_model *m, const struct mt_pass *pass) {
  struct mt_view v = view_of(m, pass->batch);
  if (!m->options.training) return mt_fail(MT_EINVAL, "this model was built for inference");
  MT_TRY(whole(m));
  MT_TRY(forward(m, &v));
  return launch_backward(m, pass, &v);
}

mt_err mt_model_stage_forward(struct mt_model *m, int micro, const struct mt_pass *pass) {
  struct mt_view v = view_of(m, pass->batch);
  if (!m->options.training) return mt_fail(MT_EINVAL, "this model was built for inference");
  mt_acts_select(&m->acts, micro);
  MT_TRY(mt_model_pass_load(m, pass));
  return forward(m, &v);
}

mt_err mt_model_stage_backward(struct mt_model *m, int micro, const struct mt_pass *pass) {
  struct mt_view v = view_of(m, pass->batch);
  mt_acts_select(&m->acts, micro);
  if (mt_acts_last_stage(&m->acts)) MT_TRY(mt_phase_enter(m, MT_PHASE_HEAD));
  return launch_backward(m, pass, &v);
}

mt_err mt_model_stage_eval(struct mt_model *m, const struct mt_batch *batch, struct mt_loss *loss) {
  struct mt_view v = view_of(m, batch);
  *loss = (struct mt_loss){0};
  MT_TRY(mt_model_pass_load(m, &(struct mt_pass){.batch = batch, .aux_weight = 1}));
  MT_TRY(forward(m, &v));
  if (!mt_acts_last_stage(&m->acts)) return MT_OK;
  MT_TRY(head(m, &v, false));
  return read_loss(m, batch, loss);
}

mt_err mt_model_train_pass(struct mt_model *m, const struct mt_pass *pass, struct mt_loss *loss) {
  MT_TRY(mt_model_pass_load(m, pass));
  MT_TRY(mt_model_pass_launch(m, pass));
  return read_loss(m, pass->batch, loss);
}

mt_err mt_model_eval_pass(struct mt_model *m, const struct mt_batch *batch, struct mt_loss *loss) {
  MT_TRY(whole(m));
  return mt_model_stage_eval(m, batch, loss);
}

mt_err mt_model_logits(struct mt_model *m, int64_t begin, int64_t count, float *out) {
  struct mt_tensor w = mt_params_find(&m->params, MT_PARAM_HEAD, -1)->compute;
  struct mt_tensor *rows = &m->acts.logit_rows;
  int64_t vocab = m->config.vocab;
  void *raw = malloc(mt_bytes(rows));
  if (!raw) return mt_fail(MT_ENOMEM, "logits of %lld tokens", (long long)MT_LOGIT_ROWS);
  mt_err err = MT_OK;
  for (int64_t done = 0; done < count; done += MT_LOGIT_ROWS) {
    int64_t n = count - done < MT_LOGIT_ROWS ? count - done : MT_LOGIT_ROWS;
    struct mt_tensor y = mt_top(*rows, n);
    MT_GO(mt_linear_forward(m->be, mt_rows(&m->acts.xf, begin + done, n), w, y, NULL));
    MT_GO(m->be->download(m->be, raw, y.data, mt_bytes(&y)));
    mt_dtype_convert(out + done * vocab, MT_F32, raw, y.dtype, (size_t)(n * vocab));
  }
done:
  free(raw);
  return err;
}
