/* Building a model: the memory plan and the memory. */
#include "model/model.h"

#include <math.h>
#include <stdlib.h>

#include "quant/linear.h"

const char *mt_phase_name(enum mt_phase phase) {
  static const char *const names[] = {
#define X(phase, name) name,
      MT_PHASE_LIST(X)
#undef X
  };
  return (unsigned)phase < MT_PHASE_COUNT ? names[phase] : "?";
}

static struct mt_tensor shape_of(const struct mt_param *p, enum mt_dtype dtype) {
  return (struct mt_tensor){.dtype = dtype,
                            .rank = p->rank,
                            .dim = {p->dim[0], p->dim[1], p->dim[2]},
                            .ld = p->dim[p->rank - 1]};
}

/* In which format products read it, or MT_Q_NONE. */
static enum mt_qformat format_of(const struct mt_model *m, const struct mt_param *p) {
  unsigned part = p->kind == MT_PARAM_QKV || p->kind == MT_PARAM_ATTN_OUT   ? MT_8BIT_ATTENTION
                  : p->kind == MT_PARAM_GATE_UP || p->kind == MT_PARAM_DOWN ? MT_8BIT_EXPERTS
                                                                            : 0;
  return part && mt_eight_bits(m->recipe, part, m->options.skip_8bit) ? m->recipe->qformat
                                                                      : MT_Q_NONE;
}

/* The 8-bit copies of a weight. Backward wants columns too; of FP8, whose blocks are square, it can
 * turn the rows as it needs them, which is what keeps the memory of float32 masters below bf16's.
 */
static mt_err take_eight_bits(struct mt_model *m, struct mt_param *p, enum mt_qformat format) {
  bool turned = format == MT_Q_FP8 && m->recipe->act != m->recipe->state;
  int sides = m->options.training && !turned ? MT_SIDE_BOTH : MT_SIDE_ROW;
  void *memory;
  MT_TRY(mt_arena_alloc(&m->parameters, mt_qweight_bytes(format, p->rank, p->dim, sides), &memory));
  mt_qweight_shape(&p->q, format, p->rank, p->dim, sides, memory);
  return MT_OK;
}

/* Each is rounded up to a bucket's unit, so that a class is one stretch in any format. */
static mt_err take(struct mt_arena *arena, const struct mt_param *p, enum mt_dtype dtype,
                   struct mt_tensor *out) {
  *out = shape_of(p, dtype);
  size_t bytes = (size_t)mt_bucket_round(mt_param_count(p)) * mt_dtype_bytes(dtype);
  return mt_arena_alloc(arena, bytes, &out->data);
}

static mt_err take_share(struct mt_arena *arena, int64_t n, enum mt_dtype dtype,
                         struct mt_tensor *out) {
  *out = mt_vec(NULL, dtype, n);
  return mt_arena_alloc(arena, mt_bytes(out), &out->data);
}

static struct mt_tensor ring_part(const struct mt_model *m, const struct mt_param *p) {
  const struct mt_tensor *ring = &m->share[p->sync].ring;
  struct mt_tensor t = shape_of(p, ring->dtype);
  size_t at = (size_t)m->buckets.ring_at[p - m->params.row] * mt_dtype_bytes(ring->dtype);
  if (ring->data) t.data = (char *)ring->data + at;
  return t;
}

/* What of a parameter learns, but for what operations read. */
static mt_err place_state(struct mt_model *m, struct mt_param *p) {
  const struct mt_recipe *recipe = m->recipe;
  bool sharded = m->options.zero > 0;
  if (recipe->act == recipe->state)
    p->master = p->compute;
  else if (!sharded)
    MT_TRY(take(&m->parameters, p, recipe->state, &p->master));
  if (mt_model_grad_shared(m, p->sync))
    p->grad = ring_part(m, p);
  else
    MT_TRY(take(&m->gradients, p, recipe->grad, &p->grad));
  if (sharded) return MT_OK;
  MT_TRY(take(&m->optimizer, p, recipe->state, &p->m));
  return take(&m->optimizer, p, recipe->state, &p->v);
}

/* What this rank keeps of a class that is cut; before its parameters, some of which lie there. */
static mt_err place_shares(struct mt_model *m, enum mt_sync sync) {
  const struct mt_recipe *recipe = m->recipe;
  int64_t n = m->buckets.owned[sync];
  if (mt_model_grad_shared(m, sync)) {
    MT_TRY(take_share(&m->gradients, n, recipe->grad, &m->share[sync].grad));
    MT_TRY(take_share(&m->gradients, m->buckets.ring[sync], recipe->grad, &m->share[sync].ring));
  }
  if (recipe->act != recipe->state)
    MT_TRY(take_share(&m->parameters, n, recipe->state, &m->share[sync].master));
  MT_TRY(take_share(&m->optimizer, n, recipe->state, &m->share[sync].m));
  return take_share(&m->optimizer, n, recipe->state, &m->share[sync].v);
}

/* What operations read. */
static mt_err place_read(struct mt_model *m, struct mt_param *p) {
  const struct mt_recipe *recipe = m->recipe;
  enum mt_qformat format = format_of(m, p);
  bool learning = m->options.training && p->learns;
  p->q = (struct mt_qtensor){0};
  if (format != MT_Q_NONE) MT_TRY(take_eight_bits(m, p, format));
  if (format == MT_Q_NONE || !learning || recipe->act == recipe->state)
    return take(&m->parameters, p, recipe->act, &p->compute);
  p->compute = shape_of(p, recipe->act);
  return MT_OK;
}

/* The rows of a class that learn, one behind the other, then those that do not. */
static mt_err place_compute(struct mt_model *m, int sync) {
  for (int learns = 1; learns >= 0; learns--) {
    for (int i = 0; i < m->params.count; i++) {
      struct mt_param *p = &m->params.row[i];
      if ((int)p->sync == sync && (int)p->learns == learns) MT_TRY(place_read(m, p));
    }
  }
  return MT_OK;
}

/* Everything that lies in arenas, in an order that keeps each sync class together. */
static mt_err place(struct mt_model *m) {
  for (int sync = 0; sync < MT_SYNC_COUNT; sync++) {
    MT_TRY(place_compute(m, sync));
    if (m->options.training && m->options.zero > 0) MT_TRY(place_shares(m, (enum mt_sync)sync));
    for (int i = 0; i < m->params.count; i++) {
      struct mt_param *p = &m->params.row[i];
      if ((int)p->sync != sync) continue;
      p->master = p->grad = p->m = p->v = (struct mt_tensor){0};
      if (m->options.training && p->learns) MT_TRY(place_state(m, p));
    }
  }
  const struct mt_shard *shard = &m->options.shard;
  bool over_ranks = shard->expert_end - shard->expert_begin < m->config.experts;
  struct mt_acts_options a = {
      .token_capacity = m->options.token_capacity,
      .sequence_capacity = m->options.sequence_capacity,
      .in_flight = m->options.in_flight,
      .training = m->options.training,
      .keep_attention = m->options.training && m->options.recompute != MT_RECOMPUTE_FULL,
      .keep_mlp = m->options.training && m->options.recompute == MT_RECOMPUTE_NONE,
      .weigh_outputs = m->options.experts == MT_EXPERTS_LOOP && !over_ranks,
      .over_ranks = over_ranks,
      .chunks = over_ranks ? m->options.chunks : 1,
      .skip_8bit = m->options.skip_8bit};
  return mt_acts_layout(&m->acts, &m->config, shard, m->recipe, m->be, &a, &m->activations);
}

/* What 8-bit products contract over: the widths of the activations that they take and, in backward,
 * give. */
static mt_err check_widths(const struct mt_model *m) {
  const struct mt_config *c = &m->config;
  const struct mt_recipe *r = m->recipe;
  int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
  const struct {
    unsigned parts;
    const char *key;
    int64_t width;
  } widths[] = {{MT_8BIT_ATTENTION | MT_8BIT_EXPERTS, "hidden_size", c->hidden},
                {MT_8BIT_ATTENTION, "num_attention_heads x head_dim", q},
                {MT_8BIT_ATTENTION, "num_key_value_heads x head_dim", kv},
                {MT_8BIT_EXPERTS, "intermediate_size", c->ffn}};
  for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
    bool used = r->qformat != MT_Q_NONE && (widths[i].parts & ~m->options.skip_8bit);
    if (!used || widths[i].width % r->width_multiple == 0) continue;
    return mt_fail(MT_EUNSUPPORTED, "%s is %lld: precision %s needs a multiple of %d",
                   widths[i].key, (long long)widths[i].width, r->precision, r->width_multiple);
  }
  return MT_OK;
}

/* Tokens that travel in 8 bits are multiplied as they are. */
static mt_err check_dispatch(const struct mt_model *m) {
  static const char *const names[] = {"act", "8bit", "both"};
  const struct mt_recipe *r = m->recipe;
  if (m->options.dispatch == MT_DISPATCH_ACT ||
      mt_eight_bits(r, MT_8BIT_EXPERTS, m->options.skip_8bit))
    return MT_OK;
  return mt_fail(MT_EUNSUPPORTED,
                 "--dispatch-precision %s with precision %s%s: the experts take no 8-bit tokens",
                 names[m->options.dispatch], r->precision,
                 r->qformat == MT_Q_NONE ? "" : " and --fp8-skip experts");
}

static mt_err plan(struct mt_model *m) {
  MT_TRY(check_widths(m));
  MT_TRY(check_dispatch(m));
  m->options.shard = mt_shard_of(&m->config, &m->options.shard);
  if (m->options.in_flight < 1) m->options.in_flight = 1;
  if (m->options.chunks < 1) m->options.chunks = 1;
  if (m->options.chunks > MT_MAX_CHUNKS) {
    return mt_fail(MT_EINVAL, "--ep-chunks %d: at most %d", m->options.chunks, MT_MAX_CHUNKS);
  }
  mt_arena_plan(&m->parameters, "parameters");
  mt_arena_plan(&m->gradients, "gradients");
  mt_arena_plan(&m->optimizer, "optimizer");
  mt_arena_plan(&m->activations, "activations");
  if (m->options.bucket_elements <= 0)
    m->options.bucket_elements = m->be->on_stream ? MT_BUCKET_ELEMENTS_GPU : MT_BUCKET_ELEMENTS;
  if (m->options.training)
    MT_TRY(
        mt_buckets_build(&m->params, &m->options.sharers, m->options.bucket_elements, &m->buckets));
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
  mt_buckets_free(&m.buckets);
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

mt_err mt_model_quantize_weights(struct mt_model *m) {
  if (m->recipe->qformat == MT_Q_NONE) return MT_OK;
  mt_acts_enter(&m->acts, m->be, MT_ROOM_ENDS);
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (p->q.format == MT_Q_NONE) continue;
    struct mt_quantize_weight_args a = {.w = p->master.data ? p->master : p->compute, .q = p->q};
    if (!a.w.data) continue; /* its master is cut over the ranks: mt_ranks_quantize */
    MT_TRY(mt_context(m->be->ops.quantize_weight(m->be, &a), "'%s'", p->name));
  }
  return MT_OK;
}

bool mt_model_gathers_rows(const struct mt_model *m) {
  return m->options.zero > 0 && m->recipe->qformat != MT_Q_NONE;
}

/* Layers of the stages before may learn, whoever is here. */
static int lowest_learning(const struct mt_model *m) {
  int lowest = m->config.layers;
  if (m->options.shard.layer_begin > 0) return -1;
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
  size_t ends = (size_t)m->options.chunks * ((size_t)m->config.experts + 1);
  m->host_route = calloc(ends, sizeof *m->host_route);
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
  MT_GO(mt_acts_clear(&m->acts, config, be));
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
  mt_buckets_free(&m->buckets);
  mt_params_free(&m->params);
  free(m->inv_freq);
  free(m->host_route);
  free(m->host_rows);
  *m = (struct mt_model){0};
}

static struct mt_tensor run_of(const struct mt_tensor *t, int64_t first, int64_t n) {
  if (!t->data) return (struct mt_tensor){0};
  return mt_vec((char *)t->data + (size_t)first * mt_dtype_bytes(t->dtype), t->dtype, n);
}

static struct mt_piece piece_of(const struct mt_model *m, int row, int64_t first, int64_t n,
                                int64_t state) {
  const struct mt_param *p = &m->params.row[row];
  struct mt_piece x = {.row = row,
                       .first = first,
                       .compute = run_of(&p->compute, first, n),
                       .master = run_of(&p->master, first, n),
                       .grad = run_of(&p->grad, first, n),
                       .m = run_of(&p->m, first, n),
                       .v = run_of(&p->v, first, n)};
  if (m->options.zero == 0) return x;
  x.m = run_of(&m->share[p->sync].m, state, n);
  x.v = run_of(&m->share[p->sync].v, state, n);
  if (m->recipe->act != m->recipe->state) x.master = run_of(&m->share[p->sync].master, state, n);
  if (mt_model_grad_shared(m, p->sync)) x.grad = run_of(&m->share[p->sync].grad, state, n);
  return x;
}

mt_err mt_model_pieces(const struct mt_model *m, struct mt_piece **out, int *count) {
  /* A row is cut once at each bucket's end, at most. */
  size_t most = (size_t)m->params.count + (size_t)m->buckets.count;
  *out = calloc(most + 1, sizeof **out);
  *count = 0;
  if (!*out) return mt_fail(MT_ENOMEM, "pieces of %d parameters", m->params.count);
  for (int row = 0; row < m->params.count; row++) {
    int64_t from = 0, first, n, state, all = mt_param_count(&m->params.row[row]);
    if (!m->params.row[row].learns) continue;
    if (m->options.zero == 0) (*out)[(*count)++] = piece_of(m, row, 0, all, 0);
    while (m->options.zero > 0 &&
           mt_buckets_run(&m->buckets, &m->params, row, from, &first, &n, &state)) {
      (*out)[(*count)++] = piece_of(m, row, first, n, state);
      from = first + n;
    }
  }
  return MT_OK;
}

double mt_model_flops_per_token(const struct mt_config *c, double sequence_length) {
  double h = c->hidden, f = c->ffn, v = c->vocab;
  double q = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
  /* q + out projections, K and V, causal half of scores and values, k experts of three products. */
  double layer = 2 * (2 * h * q + 2 * h * kv) + 2 * sequence_length * q + c->top_k * 6 * h * f;
  return 3 * (c->layers * layer + 2 * h * v);
}
