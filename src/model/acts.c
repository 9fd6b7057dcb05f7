#include "model/acts.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

struct mt_limits mt_acts_limits(const struct mt_config *c, const struct mt_recipe *recipe,
                                int64_t token_capacity, enum mt_room room) {
  struct mt_limits l = {.tokens = token_capacity,
                        .rows = token_capacity * c->top_k,
                        .hidden = c->hidden,
                        .ffn = c->ffn,
                        .experts = c->experts,
                        .top_k = c->top_k,
                        .vocab = c->vocab,
                        .heads = c->heads,
                        .kv_heads = c->kv_heads,
                        .head_dim = c->head_dim,
                        .act = recipe->act};
  /* What does not run there is made as small as can be. */
  if (room != MT_ROOM_ENDS) l.vocab = 1;
  if (room == MT_ROOM_ATTENTION) {
    l.rows = l.tokens;
    l.experts = l.top_k = l.ffn = 1;
  }
  if (room == MT_ROOM_MOE) l.heads = l.kv_heads = 1;
  if (room != MT_ROOM_ENDS) l.qformat = recipe->qformat;
  return l;
}

static mt_err take(struct mt_arena *arena, struct mt_tensor *t, struct mt_tensor shape) {
  *t = shape;
  return mt_arena_alloc(arena, mt_bytes(t), &t->data);
}

static mt_err take_ints(struct mt_arena *arena, int32_t **p, int64_t count) {
  void *memory;
  MT_TRY(mt_arena_alloc(arena, (size_t)count * sizeof **p, &memory));
  *p = memory;
  return MT_OK;
}

/* What a layer keeps in every mode of training, but for s1. */
static mt_err take_stream(struct mt_layer_acts *l, const struct mt_config *c,
                          const struct mt_shard *shard, const struct mt_recipe *recipe,
                          const struct mt_acts_options *o, struct mt_arena *arena) {
  int64_t t = o->token_capacity, e = c->experts, k = c->top_k, r = t * k;
  int64_t ends = o->chunks * (e + 1);
  MT_TRY(take(arena, &l->rstd1, mt_vec(NULL, recipe->stat, t)));
  MT_TRY(take(arena, &l->rstd2, mt_vec(NULL, recipe->stat, t)));
  MT_TRY(take(arena, &l->logits, mt_mat(NULL, recipe->stat, t, e)));
  MT_TRY(take(arena, &l->prob, mt_mat(NULL, recipe->stat, t, k)));
  if (!o->weigh_outputs && !o->over_ranks)
    MT_TRY(take(arena, &l->row_prob, mt_vec(NULL, recipe->stat, r)));
  MT_TRY(take_ints(arena, &l->route.index, r));
  MT_TRY(take_ints(arena, &l->route.offsets, ends));
  MT_TRY(take_ints(arena, &l->route.row_source, r));
  MT_TRY(take_ints(arena, &l->route.token_row, r));
  if (mt_eight_bits(recipe, MT_8BIT_EXPERTS, o->skip_8bit))
    MT_TRY(take_ints(arena, &l->route.padded, ends));
  l->route.top_k = c->top_k;
  l->route.chunk_count = o->chunks;
  l->route.expert_count = shard->expert_end - shard->expert_begin;
  return MT_OK;
}

static mt_err take_attention(struct mt_layer_acts *l, const struct mt_config *c,
                             const struct mt_recipe *recipe, const struct mt_acts_options *o,
                             struct mt_arena *arena) {
  int64_t t = o->token_capacity;
  int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
  MT_TRY(take(arena, &l->qkv, mt_mat(NULL, recipe->act, t, q + 2 * kv)));
  MT_TRY(take(arena, &l->att, mt_mat(NULL, recipe->act, t, q)));
  MT_TRY(take(arena, &l->lse, mt_mat(NULL, recipe->stat, t, c->heads)));
  return take(arena, &l->s2, mt_mat(NULL, recipe->act, t, c->hidden));
}

static mt_err take_mlp(struct mt_layer_acts *l, const struct mt_config *c,
                       const struct mt_recipe *recipe, const struct mt_acts_options *o,
                       struct mt_arena *arena) {
  int64_t r = o->token_capacity * c->top_k;
  if (o->over_ranks) return MT_OK;
  MT_TRY(take(arena, &l->gate_up, mt_mat(NULL, recipe->act, r, 2 * (int64_t)c->ffn)));
  if (!o->weigh_outputs || !o->keep_mlp) return MT_OK;
  return take(arena, &l->ys, mt_mat(NULL, recipe->act, r, c->hidden));
}

/* A layer's buffers in the set that is filled; what is not kept is that of the first one of all.
 * Training, a stage's first layer has its s1 from the entry. */
static mt_err layer_layout(struct mt_acts *a, int layer, const struct mt_config *c,
                           const struct mt_recipe *recipe, struct mt_arena *arena) {
  const struct mt_acts_options *o = &a->options;
  struct mt_layer_acts *l = &a->layer[layer];
  const struct mt_layer_acts *first = &a->sets[0].layer[a->shard.layer_begin];
  bool comes = !mt_acts_first_stage(a) && layer == a->shard.layer_begin && o->training;
  *l = *first;
  if ((o->training || l == first) && !comes)
    MT_TRY(take(arena, &l->s1, mt_mat(NULL, recipe->act, o->token_capacity, c->hidden)));
  if (o->training || l == first) MT_TRY(take_stream(l, c, &a->shard, recipe, o, arena));
  if (o->keep_attention || l == first) MT_TRY(take_attention(l, c, recipe, o, arena));
  if (o->keep_mlp || l == first) MT_TRY(take_mlp(l, c, recipe, o, arena));
  l->load = a->loads ? a->loads + layer * c->experts : NULL;
  return MT_OK;
}

/* The block of a batch, see mt_acts: the bytes before ids, and all of them for so many tokens. */
static size_t block_head_bytes(const struct mt_acts *a) {
  size_t ints = 1 + (size_t)a->options.sequence_capacity + 1;
  return (sizeof(struct mt_step_values) + ints * sizeof(int32_t) + 15) / 16 * 16;
}
static size_t block_bytes(const struct mt_acts *a, int64_t tokens) {
  return block_head_bytes(a) + 3 * (size_t)tokens * sizeof(int32_t);
}

/* Elements of a vector; one without memory has parts without. */
static struct mt_tensor part_of(const struct mt_tensor *v, int64_t begin, int64_t n) {
  char *data = v->data;
  if (data) data += (size_t)begin * mt_dtype_bytes(v->dtype);
  return mt_vec(data, v->dtype, n);
}

/* The set's own: a->set, whose layers are there already. */
static mt_err set_layout(struct mt_acts *a, const struct mt_config *c,
                         const struct mt_recipe *recipe, struct mt_arena *arena) {
  int64_t t = a->options.token_capacity;
  size_t bytes = block_bytes(a, t);
  void *block;
  MT_TRY(mt_arena_alloc(arena, bytes, &block));
  a->values = block;
  MT_TRY(take(arena, &a->cos, mt_mat(NULL, recipe->stat, t, c->head_dim / 2)));
  MT_TRY(take(arena, &a->sin, mt_mat(NULL, recipe->stat, t, c->head_dim / 2)));
  MT_TRY(take_ints(arena, &a->loads, (int64_t)c->layers * c->experts));
  for (int l = a->shard.layer_begin; l < a->shard.layer_end; l++)
    MT_TRY(layer_layout(a, l, c, recipe, arena));
  return MT_OK;
}

/* Host memory of all sets. */
static mt_err set_tables(struct mt_acts *a) {
  size_t sets = (size_t)a->options.in_flight, layers = (size_t)a->layer_count;
  size_t bytes = block_bytes(a, a->options.token_capacity);
  a->sets = calloc(sets, sizeof *a->sets);
  a->entry = calloc(sets + 1, sizeof *a->entry);
  if (!a->sets || !a->entry) return mt_fail(MT_ENOMEM, "%zu micro-batches under way", sets);
  for (size_t i = 0; i < sets; i++) {
    a->sets[i].layer = calloc(layers, sizeof *a->layer);
    a->sets[i].host_block = a->sets[i].host_values = calloc(1, bytes);
    if (!a->sets[i].layer || !a->sets[i].host_block) {
      return mt_fail(MT_ENOMEM, "a batch of %lld tokens in %zu layers",
                     (long long)a->options.token_capacity, layers);
    }
  }
  return MT_OK;
}

static size_t aux_bytes(const struct mt_config *c, const struct mt_recipe *recipe) {
  size_t e = (size_t)c->experts;
  return (e + 1) * mt_dtype_bytes(recipe->stat) + e * sizeof(int32_t);
}

static mt_err aux_layout(struct mt_stage_entry *x, const struct mt_config *c,
                         const struct mt_recipe *recipe, struct mt_arena *arena) {
  void *memory;
  MT_TRY(mt_arena_alloc(arena, aux_bytes(c, recipe), &memory));
  x->aux_sums = mt_vec(memory, recipe->stat, c->experts + 1);
  x->aux_count = memory ? (int32_t *)(void *)((char *)memory + mt_bytes(&x->aux_sums)) : NULL;
  return MT_OK;
}

/* Where the auxiliary losses' sums and gradients lie from here on. */
static void place_aux(struct mt_acts *a, const struct mt_stage_entry *entry,
                      struct mt_tensor grads) {
  int64_t e = grads.dim[0] - 1;
  a->aux_sums = entry->aux_sums;
  a->aux_prob = part_of(&a->aux_sums, 0, e);
  a->z_sum = part_of(&a->aux_sums, e, 1);
  a->aux_count = entry->aux_count;
  a->aux_grads = grads;
  a->aux_grad = part_of(&grads, 0, e);
  a->z_grad = part_of(&grads, e, 1);
}

/* What all micro-batches share, of one pass. */
static mt_err batch_layout(struct mt_acts *a, const struct mt_config *c,
                           const struct mt_recipe *recipe, struct mt_arena *arena) {
  int64_t t = a->options.token_capacity;
  size_t loads = (size_t)(c->layers * c->experts) * sizeof(int32_t);
  void *report;
  MT_TRY(mt_arena_alloc(arena, sizeof *a->report + loads, &report));
  a->report = report;
  a->load_sums = report ? (int32_t *)(a->report + 1) : NULL;
  MT_TRY(aux_layout(&a->entry[0], c, recipe, arena));
  a->aux_bytes = aux_bytes(c, recipe);
  MT_TRY(take(arena, &a->aux_grads, mt_vec(NULL, recipe->stat, c->experts + 1)));
  place_aux(a, &a->entry[0], a->aux_grads);
  MT_TRY(take(arena, &a->aux_loss, mt_vec(NULL, recipe->stat, 1)));
  MT_TRY(take(arena, &a->z_loss, mt_vec(NULL, recipe->stat, 1)));
  MT_TRY(take(arena, &a->loss, mt_vec(NULL, recipe->stat, t)));
  return take_ints(arena, &a->correct, t);
}

static mt_err take_operand(struct mt_arena *arena, void **memory, enum mt_qformat format,
                           int64_t rows, int64_t cols, int64_t groups, int sides) {
  size_t bytes = mt_operand_bytes(format, rows, cols, groups, sides);
  return bytes ? mt_arena_alloc(arena, bytes, memory) : MT_OK;
}

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* A stage's ends; the first of the shared buffers is one of the two turns', or of both where
 * nothing goes back. */
static mt_err stage_layout(struct mt_acts *a, const struct mt_config *c,
                           const struct mt_recipe *recipe, struct mt_arena *arena) {
  struct mt_tensor stream = mt_mat(NULL, recipe->act, a->options.token_capacity, c->hidden);
  for (int i = 0; i <= a->options.in_flight; i++) {
    if (!mt_acts_first_stage(a)) MT_TRY(take(arena, &a->entry[i].stream, stream));
    if (i > 0) MT_TRY(aux_layout(&a->entry[i], c, recipe, arena));
  }
  a->turn[0] = a->turn[1] = (struct mt_stage_turn){.ds = a->ds, .aux_grads = a->aux_grads};
  for (int i = 0; i < 2; i++) {
    if (!mt_acts_last_stage(a)) MT_TRY(take(arena, &a->turn[i].out, stream));
    if (i == 0 || !a->options.training) continue;
    MT_TRY(take(arena, &a->turn[i].ds, stream));
    MT_TRY(take(arena, &a->turn[i].aux_grads, a->aux_grads));
  }
  return MT_OK;
}

static mt_err attention_layout(struct mt_acts *a, const struct mt_config *c,
                               const struct mt_recipe *recipe, struct mt_arena *arena) {
  int64_t t = a->options.token_capacity;
  int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
  int64_t in = most(q, c->hidden), out = most(q + 2 * kv, c->hidden);
  enum mt_qformat format = a->attention_format;
  if (!a->options.training)
    return take_operand(arena, &a->attention_operand[0], format, t, in, 1, MT_SIDE_ROW);
  MT_TRY(take_operand(arena, &a->attention_operand[0], format, t, most(in, out), 1, MT_SIDE_BOTH));
  MT_TRY(take_operand(arena, &a->attention_operand[1], format, t, in, 1, MT_SIDE_COL));
  MT_TRY(take(arena, &a->datt, mt_mat(NULL, recipe->act, t, q)));
  return take(arena, &a->dqkv, mt_mat(NULL, recipe->act, t, q + 2 * kv));
}

/* Forward reads rows alone; backward needs more of [0], and [2] for its columns alone. */
static mt_err moe_operands_layout(struct mt_acts *a, const struct mt_config *c, int64_t r,
                                  struct mt_arena *arena) {
  enum mt_qformat format = a->moe_format;
  int64_t experts = a->shard.expert_end - a->shard.expert_begin, f = c->ffn;
  bool training = a->options.training;
  if (format == MT_Q_NONE) return MT_OK;
  MT_TRY(take_operand(arena, &a->moe_operand[0], format, r, c->hidden, experts,
                      training ? MT_SIDE_BOTH : MT_SIDE_ROW));
  if (training)
    MT_TRY(take_operand(arena, &a->moe_operand[1], format, r, 2 * f, experts, MT_SIDE_BOTH));
  size_t row = mt_operand_bytes(format, r, f, experts, MT_SIDE_ROW);
  size_t col = mt_operand_bytes(format, r, f, experts, MT_SIDE_COL);
  return mt_arena_alloc(arena, training && col > row ? col : row, &a->moe_operand[2]);
}

/* One buffer for all layers of all sets: the tensor at `member` of each. */
static void share(struct mt_acts *a, size_t member, struct mt_tensor t) {
  for (int i = 0; i < a->options.in_flight; i++) {
    for (int l = 0; l < a->layer_count; l++)
      memcpy((char *)&a->sets[i].layer[l] + member, &t, sizeof t);
  }
}

/* The MoE room's buffers of so many rows. */
static mt_err room_rows_layout(struct mt_acts *a, const struct mt_config *c,
                               const struct mt_recipe *recipe, int64_t r, struct mt_arena *arena) {
  const struct mt_acts_options *o = &a->options;
  MT_TRY(take(arena, &a->h, mt_mat(NULL, recipe->act, r, c->ffn)));
  if (!o->weigh_outputs || !o->keep_mlp) {
    struct mt_tensor ys;
    MT_TRY(take(arena, &ys, mt_mat(NULL, recipe->act, r, c->hidden)));
    share(a, offsetof(struct mt_layer_acts, ys), ys);
  }
  if (o->training && !o->weigh_outputs)
    MT_TRY(take(arena, &a->drow_prob, mt_vec(NULL, recipe->stat, r)));
  if (!o->over_ranks) {
    for (int i = 0; i < o->in_flight; i++) {
      struct mt_layer_acts *layer = a->sets[i].layer;
      for (int l = 0; l < a->layer_count; l++) layer[l].xs = layer[l].ys;
    }
  }
  return moe_operands_layout(a, c, r, arena);
}

static mt_err moe_layout(struct mt_acts *a, const struct mt_config *c,
                         const struct mt_recipe *recipe, struct mt_arena *arena) {
  const struct mt_acts_options *o = &a->options;
  int64_t t = o->token_capacity;
  if (!o->over_ranks) MT_TRY(room_rows_layout(a, c, recipe, t * c->top_k, arena));
  if (!o->training) return MT_OK;
  MT_TRY(take(arena, &a->dprob, mt_mat(NULL, recipe->stat, t, c->top_k)));
  return take(arena, &a->dlogits, mt_mat(NULL, recipe->stat, t, c->experts));
}

static mt_err ends_layout(struct mt_acts *a, const struct mt_config *c,
                          const struct mt_recipe *recipe, struct mt_arena *arena) {
  int64_t t = a->options.token_capacity;
  MT_TRY(take(arena, &a->sf, mt_mat(NULL, recipe->act, t, c->hidden)));
  MT_TRY(take(arena, &a->xf, mt_mat(NULL, recipe->act, t, c->hidden)));
  MT_TRY(take(arena, &a->rstdf, mt_vec(NULL, recipe->stat, t)));
  return take(arena, &a->logit_rows, mt_mat(NULL, recipe->act, MT_LOGIT_ROWS, c->vocab));
}

/* The rooms, one over the other. */
static mt_err rooms_layout(struct mt_acts *a, const struct mt_config *c,
                           const struct mt_recipe *recipe, const struct mt_backend *be,
                           struct mt_arena *arena) {
  static mt_err (*const layout[MT_ROOM_COUNT])(struct mt_acts *, const struct mt_config *,
                                               const struct mt_recipe *, struct mt_arena *) = {
      [MT_ROOM_ATTENTION] = attention_layout,
      [MT_ROOM_MOE] = moe_layout,
      [MT_ROOM_ENDS] = ends_layout};
  size_t begin = mt_arena_mark(arena), end = begin;
  for (int room = 0; room < MT_ROOM_COUNT; room++) {
    struct mt_limits limits =
        mt_acts_limits(c, recipe, a->options.token_capacity, (enum mt_room)room);
    size_t bytes = be->workspace_bytes(be, &limits);
    mt_arena_reset(arena, begin);
    MT_TRY(layout[room](a, c, recipe, arena));
    MT_TRY(mt_arena_alloc(arena, bytes, &a->workspace[room].data));
    a->workspace[room].size_bytes = bytes;
    if (mt_arena_mark(arena) > end) end = mt_arena_mark(arena);
  }
  mt_arena_reach(arena, end);
  return MT_OK;
}

mt_err mt_acts_layout(struct mt_acts *a, const struct mt_config *c, const struct mt_shard *shard,
                      const struct mt_recipe *recipe, const struct mt_backend *be,
                      const struct mt_acts_options *options, struct mt_arena *arena) {
  struct mt_tensor stream = mt_mat(NULL, recipe->act, options->token_capacity, c->hidden);
  *a = (struct mt_acts){.options = *options, .shard = *shard, .layer_count = c->layers};
  if (mt_eight_bits(recipe, MT_8BIT_ATTENTION, options->skip_8bit))
    a->attention_format = recipe->qformat;
  if (mt_eight_bits(recipe, MT_8BIT_EXPERTS, options->skip_8bit)) a->moe_format = recipe->qformat;
  MT_TRY(set_tables(a));
  MT_TRY(batch_layout(a, c, recipe, arena));
  for (int i = 0; i < options->in_flight; i++) {
    a->set = a->sets[i];
    MT_TRY(set_layout(a, c, recipe, arena));
    a->sets[i] = a->set;
  }
  a->set = a->sets[0];
  MT_TRY(take(arena, &a->branch, stream));
  MT_TRY(take(arena, &a->xn, stream));
  if (options->training) MT_TRY(take(arena, &a->ds, stream));
  if (mt_acts_staged(a)) MT_TRY(stage_layout(a, c, recipe, arena));
  return rooms_layout(a, c, recipe, be, arena);
}

/* A layer's rows over ranks; a gate_up that is not kept is the room's. */
static mt_err kept_rows_layout(struct mt_acts *a, int layer, const struct mt_config *c,
                               const struct mt_recipe *recipe, int64_t r, struct mt_arena *arena) {
  struct mt_layer_acts *l = &a->layer[layer];
  MT_TRY(take(arena, &l->xs, mt_mat(NULL, recipe->act, r, c->hidden)));
  MT_TRY(take(arena, &l->row_prob, mt_vec(NULL, recipe->stat, r)));
  if (!a->options.keep_mlp) return MT_OK;
  return take(arena, &l->gate_up, mt_mat(NULL, recipe->act, r, 2 * (int64_t)c->ffn));
}

static mt_err shared_rows_layout(struct mt_acts *a, const struct mt_config *c,
                                 const struct mt_recipe *recipe, const struct mt_backend *be,
                                 int64_t r, struct mt_arena *arena) {
  struct mt_limits limits = mt_acts_limits(c, recipe, a->options.token_capacity, MT_ROOM_MOE);
  if (limits.rows < r) limits.rows = r;
  MT_TRY(room_rows_layout(a, c, recipe, r, arena));
  a->workspace[MT_ROOM_MOE].size_bytes = be->workspace_bytes(be, &limits);
  MT_TRY(
      mt_arena_alloc(arena, a->workspace[MT_ROOM_MOE].size_bytes, &a->workspace[MT_ROOM_MOE].data));
  if (a->options.keep_mlp) return MT_OK;
  struct mt_tensor gate_up;
  MT_TRY(take(arena, &gate_up, mt_mat(NULL, recipe->act, r, 2 * (int64_t)c->ffn)));
  share(a, offsetof(struct mt_layer_acts, gate_up), gate_up);
  return MT_OK;
}

static void release(struct mt_growing *g, struct mt_backend *be) {
  if (g->arena.base) be->mem_free(be, g->arena.base, g->arena.capacity_bytes);
  *g = (struct mt_growing){0};
}

/* layer < 0: the room's. Laid out twice, as arenas are. */
static mt_err grow(struct mt_acts *a, const struct mt_config *c, const struct mt_recipe *recipe,
                   struct mt_backend *be, int layer, int64_t rows) {
  struct mt_growing *g = layer < 0 ? &a->room_rows : &a->layer[layer].rows;
  const char *name = "rows of other ranks";
  void *base = NULL;
  release(g, be);
  mt_arena_plan(&g->arena, name);
  for (int real = 0; real < 2; real++) {
    MT_TRY(layer < 0 ? shared_rows_layout(a, c, recipe, be, rows, &g->arena)
                     : kept_rows_layout(a, layer, c, recipe, rows, &g->arena));
    if (real) break;
    size_t bytes = g->arena.peak_bytes;
    MT_TRY(mt_context(be->mem_alloc(be, bytes, &base), "room for %lld rows", (long long)rows));
    mt_log(MT_LOG_DEBUG, "room for %lld rows of other ranks: %.1f MB", (long long)rows,
           (double)bytes * 1e-6);
    mt_arena_adopt(&g->arena, name, base, bytes);
  }
  g->row_capacity = rows;
  return MT_OK;
}

mt_err mt_acts_reserve_rows(struct mt_acts *a, const struct mt_config *c,
                            const struct mt_recipe *recipe, struct mt_backend *be, int layer,
                            int64_t rows, bool *grown) {
  /* Without training all layers are one. */
  struct mt_layer_acts *l = &a->layer[a->options.training ? layer : a->shard.layer_begin];
  if (rows < 1) rows = 1; /* where nothing comes, operations still want a place */
  int64_t more = rows + rows / 8;
  *grown = false;
  if (a->room_rows.row_capacity < rows) {
    MT_TRY(grow(a, c, recipe, be, -1, more));
    *grown = true;
  }
  if (l->rows.row_capacity < rows) {
    MT_TRY(grow(a, c, recipe, be, (int)(l - a->layer), more));
    *grown = true;
  }
  if (!a->options.training) {
    a->layer[layer].xs = l->xs;
    a->layer[layer].row_prob = l->row_prob;
  }
  return MT_OK;
}

void mt_acts_release_rows(struct mt_acts *a, struct mt_backend *be) {
  release(&a->room_rows, be);
  for (int i = 0; a->sets && i < a->options.in_flight; i++) {
    struct mt_layer_acts *layer = a->sets[i].layer;
    for (int l = 0; layer && l < a->layer_count; l++) release(&layer[l].rows, be);
  }
}

void mt_acts_enter(const struct mt_acts *a, struct mt_backend *be, enum mt_room room) {
  be->workspace = a->workspace[room].data;
  be->workspace_size_bytes = a->workspace[room].size_bytes;
}

void mt_acts_free(struct mt_acts *a) {
  for (int i = 0; a->sets && i < a->options.in_flight; i++) {
    free(a->sets[i].layer);
    free(a->sets[i].host_block);
  }
  free(a->sets);
  free(a->entry);
  *a = (struct mt_acts){0};
}

mt_err mt_acts_clear(struct mt_acts *a, const struct mt_config *c, struct mt_backend *be) {
  size_t loads = (size_t)c->layers * (size_t)c->experts * sizeof(int32_t);
  if (!mt_acts_staged(a)) return MT_OK;
  for (int i = 0; i < a->options.in_flight; i++) MT_TRY(be->zero(be, a->sets[i].loads, loads));
  MT_TRY(be->zero(be, a->loss.data, mt_bytes(&a->loss)));
  MT_TRY(be->zero(be, a->correct, (size_t)a->options.token_capacity * sizeof *a->correct));
  MT_TRY(be->zero(be, a->z_loss.data, mt_bytes(&a->z_loss)));
  return be->zero(be, a->aux_loss.data, mt_bytes(&a->aux_loss));
}

void mt_acts_select(struct mt_acts *a, int micro) {
  const struct mt_stage_entry *entry = &a->entry[micro % (a->options.in_flight + 1)];
  const struct mt_stage_turn *turn = &a->turn[micro % 2];
  struct mt_step_values values = *a->host_values;
  a->sets[a->running] = a->set;
  a->running = micro % a->options.in_flight;
  a->set = a->sets[a->running];
  *a->host_values = values;
  a->out = turn->out;
  a->ds = turn->ds;
  place_aux(a, entry, turn->aux_grads);
  if (!mt_acts_first_stage(a)) a->layer[a->shard.layer_begin].s1 = entry->stream;
}

mt_err mt_acts_load(struct mt_acts *a, struct mt_backend *be, const struct mt_batch *batch) {
  if (batch->token_count > a->options.token_capacity ||
      batch->sequence_count > a->options.sequence_capacity) {
    return mt_fail(MT_ESHAPE,
                   "a batch of %d tokens in %d sequences exceeds the room for %lld in %lld",
                   batch->token_count, batch->sequence_count, (long long)a->options.token_capacity,
                   (long long)a->options.sequence_capacity);
  }
  int64_t t = mt_batch_rows(batch);
  size_t bytes = (size_t)t * sizeof(int32_t), head = block_head_bytes(a);
  int32_t *ints = (int32_t *)(a->host_values + 1);
  *ints++ = batch->valid_count;
  for (int64_t s = 0; s <= a->options.sequence_capacity; s++) {
    *ints++ = batch->cu_seqlens[s < batch->sequence_count ? s : batch->sequence_count];
  }
  char *rows = (char *)a->host_block + head;
  if (batch->token_count > 0) {
    memcpy(rows, batch->ids, bytes);
    memcpy(rows + bytes, batch->positions, bytes);
    memcpy(rows + 2 * bytes, batch->labels, bytes);
  } else {
    const int32_t padding[] = {0, 0, MT_IGNORE};
    memcpy(rows, padding, sizeof padding);
  }
  a->valid_count = (int32_t *)(a->values + 1);
  a->cu_seqlens = a->valid_count + 1;
  a->ids = (int32_t *)((char *)a->values + head);
  a->positions = a->ids + t;
  a->labels = a->positions + t;
  return be->upload(be, a->values, a->host_block, block_bytes(a, t));
}
