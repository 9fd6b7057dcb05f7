/* Building a model: the memory plan and the memory. */
#include "model/model.h"

#include <math.h>
#include <stdlib.h>

const char *mt_phase_name(enum mt_phase phase) {
  static const char *const names[] = {
#define X(phase, name) name,
      MT_PHASE_LIST(X)
#undef X
  };
  return (unsigned)phase < MT_PHASE_COUNT ? names[phase] : "?";
}

static mt_err take(struct mt_arena *arena, const struct mt_param *p, enum mt_dtype dtype,
                   struct mt_tensor *out) {
  *out = (struct mt_tensor){.dtype = dtype,
                            .rank = p->rank,
                            .dim = {p->dim[0], p->dim[1], p->dim[2]},
                            .ld = p->dim[p->rank - 1]};
  return mt_arena_alloc(arena, mt_bytes(out), &out->data);
}

static mt_err place_one(struct mt_model *m, struct mt_param *p) {
  const struct mt_recipe *recipe = m->recipe;
  MT_TRY(take(&m->parameters, p, recipe->act, &p->compute));
  p->master = p->grad = p->m = p->v = (struct mt_tensor){0};
  if (!m->options.training || !p->learns) return MT_OK;
  if (recipe->act == recipe->state)
    p->master = p->compute;
  else
    MT_TRY(take(&m->parameters, p, recipe->state, &p->master));
  MT_TRY(take(&m->gradients, p, recipe->grad, &p->grad));
  MT_TRY(take(&m->optimizer, p, recipe->state, &p->m));
  return take(&m->optimizer, p, recipe->state, &p->v);
}

/* Everything that lies in arenas, in an order that keeps each sync class together. */
static mt_err place(struct mt_model *m) {
  for (int sync = MT_SYNC_DENSE; sync <= MT_SYNC_EXPERT; sync++) {
    for (int i = 0; i < m->params.count; i++) {
      if ((int)m->params.row[i].sync == sync) MT_TRY(place_one(m, &m->params.row[i]));
    }
  }
  const struct mt_shard *shard = &m->options.shard;
  bool over_ranks = shard->expert_end - shard->expert_begin < m->config.experts;
  struct mt_acts_options a = {
      .token_capacity = m->options.token_capacity,
      .sequence_capacity = m->options.sequence_capacity,
      .training = m->options.training,
      .keep_attention = m->options.training && m->options.recompute != MT_RECOMPUTE_FULL,
      .keep_mlp = m->options.training && m->options.recompute == MT_RECOMPUTE_NONE,
      .weigh_outputs = m->options.experts == MT_EXPERTS_LOOP && !over_ranks,
      .over_ranks = over_ranks};
  return mt_acts_layout(&m->acts, &m->config, shard, m->recipe, m->be, &a, &m->activations);
}

static mt_err plan(struct mt_model *m) {
  if (m->options.shard.expert_end == 0) m->options.shard = mt_shard_whole(&m->config);
  mt_arena_plan(&m->parameters, "parameters");
  mt_arena_plan(&m->gradients, "gradients");
  mt_arena_plan(&m->optimizer, "optimizer");
  mt_arena_plan(&m->activations, "activations");
  mt_err err = place(m);
  mt_acts_free(&m->acts);
  return err;
}

struct mt_memory mt_model_memory(const struct mt_model *m) {
  return (struct mt_memory){.parameters = m->parameters.peak_bytes,
                            .gradients = m->gradients.peak_bytes,
                            .optimizer = m->optimizer.peak_bytes,
                            .activations = m->activations.peak_bytes};
}

mt_err mt_model_plan(const struct mt_config *config, const struct mt_params *params,
                     const struct mt_recipe *recipe, struct mt_backend *be,
                     const struct mt_model_options *options, struct mt_memory *out) {
  struct mt_model m = {.config = *config, .recipe = recipe, .be = be, .options = *options};
  m.params.count = params->count;
  m.params.row = calloc((size_t)params->count, sizeof *m.params.row);
  if (!m.params.row) return mt_fail(MT_ENOMEM, "memory plan of %d parameters", params->count);
  for (int i = 0; i < params->count; i++) m.params.row[i] = params->row[i];
  mt_err err = plan(&m);
  *out = mt_model_memory(&m);
  mt_params_free(&m.params);
  return err;
}

static mt_err arena_on_device(struct mt_backend *be, struct mt_arena *a) {
  size_t bytes = a->peak_bytes;
  const char *name = a->name;
  void *base = NULL;
  if (bytes) MT_TRY(mt_context(be->mem_alloc(be, bytes, &base), "arena '%s'", name));
  mt_arena_adopt(a, name, base, bytes);
  return MT_OK;
}

static void arena_release(struct mt_backend *be, struct mt_arena *a) {
  if (a->base) be->mem_free(be, a->base, a->capacity_bytes);
  *a = (struct mt_arena){0};
}

static int lowest_learning(const struct mt_model *m) {
  int lowest = m->config.layers;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (!p->learns) continue;
    if (p->kind == MT_PARAM_EMBED) return -1;
    if (p->layer >= 0 && p->layer < lowest) lowest = p->layer;
  }
  return lowest;
}

static mt_err host_tables(struct mt_model *m) {
  int half = m->config.head_dim / 2;
  m->inv_freq = calloc((size_t)half, sizeof *m->inv_freq);
  m->host_route = calloc((size_t)m->config.experts + 1, sizeof *m->host_route);
  m->host_rows = calloc((size_t)m->options.token_capacity, sizeof(double));
  if (!m->inv_freq || !m->host_route || !m->host_rows) return mt_fail(MT_ENOMEM, "host tables");
  for (int i = 0; i < half; i++) {
    m->inv_freq[i] = pow(m->config.rope_theta, -2.0 * i / m->config.head_dim);
  }
  return MT_OK;
}

mt_err mt_model_create(struct mt_model *m, const struct mt_config *config, struct mt_params *params,
                       const struct mt_recipe *recipe, struct mt_backend *be,
                       const struct mt_model_options *options) {
  *m = (struct mt_model){.config = *config,
                         .recipe = recipe,
                         .be = be,
                         .options = *options,
                         .params = *params,
                         .exchange = mt_exchange_local()};
  *params = (struct mt_params){0};
  mt_err err;
  MT_GO(mt_config_check(config));
  MT_GO(mt_backend_check(be));
  MT_GO(plan(m));
  struct mt_arena *arenas[] = {&m->parameters, &m->gradients, &m->optimizer, &m->activations};
  for (int i = 0; i < 4; i++) MT_GO(arena_on_device(be, arenas[i]));
  MT_GO(place(m));
  MT_GO(be->zero(be, m->optimizer.base, m->optimizer.capacity_bytes));
  MT_GO(host_tables(m));
  m->lowest_learning = lowest_learning(m);
done:
  if (err) mt_model_destroy(m);
  return err;
}

void mt_model_destroy(struct mt_model *m) {
  struct mt_arena *arenas[] = {&m->parameters, &m->gradients, &m->optimizer, &m->activations};
  for (int i = 0; i < 4; i++) {
    if (m->be) arena_release(m->be, arenas[i]);
  }
  if (m->be) mt_acts_release_rows(&m->acts, m->be);
  mt_acts_free(&m->acts);
  mt_params_free(&m->params);
  free(m->inv_freq);
  free(m->host_route);
  free(m->host_rows);
  *m = (struct mt_model){0};
}

double mt_model_flops_per_token(const struct mt_config *c, double sequence_length) {
  double h = c->hidden, f = c->ffn, v = c->vocab;
  double q = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
  /* q + out projections, K and V, causal half of scores and values, k experts of three products. */
  double layer = 2 * (2 * h * q + 2 * h * kv) + 2 * sequence_length * q + c->top_k * 6 * h * f;
  return 3 * (c->layers * layer + 2 * h * v);
}
