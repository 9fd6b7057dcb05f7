#include "model/acts.h"

#include <stdlib.h>

struct mt_limits mt_acts_limits(const struct mt_config *c, const struct mt_recipe *recipe,
                                int64_t token_capacity) {
  return (struct mt_limits){.tokens = token_capacity,
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

static mt_err layer_layout(struct mt_layer_acts *l, const struct mt_config *c,
                           const struct mt_recipe *recipe, const struct mt_acts_options *o,
                           struct mt_arena *arena) {
  enum mt_dtype act = recipe->act, stat = recipe->stat;
  int64_t t = o->token_capacity, h = c->hidden, e = c->experts, k = c->top_k, r = t * k;
  int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
  MT_TRY(take(arena, &l->s1, mt_mat(NULL, act, t, h)));
  MT_TRY(take(arena, &l->xn1, mt_mat(NULL, act, t, h)));
  MT_TRY(take(arena, &l->rstd1, mt_vec(NULL, stat, t)));
  MT_TRY(take(arena, &l->qkv, mt_mat(NULL, act, t, q + 2 * kv)));
  MT_TRY(take(arena, &l->att, mt_mat(NULL, act, t, q)));
  MT_TRY(take(arena, &l->lse, mt_mat(NULL, stat, t, c->heads)));
  MT_TRY(take(arena, &l->s2, mt_mat(NULL, act, t, h)));
  MT_TRY(take(arena, &l->xn2, mt_mat(NULL, act, t, h)));
  MT_TRY(take(arena, &l->rstd2, mt_vec(NULL, stat, t)));
  MT_TRY(take(arena, &l->logits, mt_mat(NULL, stat, t, e)));
  MT_TRY(take(arena, &l->prob, mt_mat(NULL, stat, t, k)));
  MT_TRY(take(arena, &l->xs, mt_mat(NULL, act, r, h)));
  MT_TRY(take(arena, &l->gate_up, mt_mat(NULL, act, r, 2 * (int64_t)c->ffn)));
  if (o->keep_outputs)
    MT_TRY(take(arena, &l->ys, mt_mat(NULL, act, r, h)));
  else
    MT_TRY(take(arena, &l->row_prob, mt_vec(NULL, stat, r)));
  MT_TRY(take_ints(arena, &l->route.index, r));
  MT_TRY(take_ints(arena, &l->route.offsets, e + 1));
  MT_TRY(take_ints(arena, &l->route.row_source, r));
  MT_TRY(take_ints(arena, &l->route.token_row, r));
  l->route.top_k = c->top_k;
  l->route.expert_count = c->experts;
  return MT_OK;
}

static mt_err scratch_layout(struct mt_acts *a, const struct mt_config *c,
                             const struct mt_recipe *recipe, struct mt_arena *arena) {
  enum mt_dtype act = recipe->act, stat = recipe->stat;
  int64_t t = a->options.token_capacity;
  int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
  MT_TRY(take(arena, &a->branch, mt_mat(NULL, act, t, c->hidden)));
  MT_TRY(take(arena, &a->h, mt_mat(NULL, act, t * c->top_k, c->ffn)));
  if (!a->options.keep_outputs) {
    struct mt_tensor ys;
    MT_TRY(take(arena, &ys, mt_mat(NULL, act, t * c->top_k, c->hidden)));
    for (int l = 0; l < a->layer_count; l++) a->layer[l].ys = ys;
  }
  MT_TRY(take(arena, &a->logit_rows, mt_mat(NULL, act, MT_LOGIT_ROWS, c->vocab)));
  if (!a->options.training) return MT_OK;
  MT_TRY(take(arena, &a->ds, mt_mat(NULL, act, t, c->hidden)));
  MT_TRY(take(arena, &a->datt, mt_mat(NULL, act, t, q)));
  MT_TRY(take(arena, &a->dqkv, mt_mat(NULL, act, t, q + 2 * kv)));
  MT_TRY(take(arena, &a->dprob, mt_mat(NULL, stat, t, c->top_k)));
  if (!a->options.keep_outputs)
    MT_TRY(take(arena, &a->drow_prob, mt_vec(NULL, stat, t * c->top_k)));
  return take(arena, &a->dlogits, mt_mat(NULL, stat, t, c->experts));
}

mt_err mt_acts_layout(struct mt_acts *a, const struct mt_config *c, const struct mt_recipe *recipe,
                      const struct mt_backend *be, const struct mt_acts_options *options,
                      struct mt_arena *arena) {
  int64_t t = options->token_capacity, e = c->experts;
  struct mt_tensor sums;
  enum mt_dtype act = recipe->act, stat = recipe->stat;
  *a = (struct mt_acts){.options = *options, .layer_count = c->layers};
  a->layer = calloc((size_t)c->layers, sizeof *a->layer);
  if (!a->layer) return mt_fail(MT_ENOMEM, "activation table of %d layers", c->layers);
  MT_TRY(take_ints(arena, &a->ids, t));
  MT_TRY(take_ints(arena, &a->positions, t));
  MT_TRY(take_ints(arena, &a->labels, t));
  MT_TRY(take_ints(arena, &a->cu_seqlens, options->sequence_capacity + 1));
  MT_TRY(take_ints(arena, &a->valid_count, 1));
  MT_TRY(take(arena, &a->cos, mt_mat(NULL, stat, t, c->head_dim / 2)));
  MT_TRY(take(arena, &a->sin, mt_mat(NULL, stat, t, c->head_dim / 2)));
  MT_TRY(take(arena, &sums, mt_vec(NULL, MT_F64, 3)));
  a->sums = sums.data;
  MT_TRY(take_ints(arena, &a->loads, c->layers * e));
  MT_TRY(take_ints(arena, &a->load_sums, c->layers * e));
  for (int l = 0; l < c->layers; l++) {
    if (options->training || l == 0)
      MT_TRY(layer_layout(&a->layer[l], c, recipe, options, arena));
    else
      a->layer[l] = a->layer[0];
    a->layer[l].load = a->loads ? a->loads + l * e : NULL;
  }
  MT_TRY(take(arena, &a->sf, mt_mat(NULL, act, t, c->hidden)));
  MT_TRY(take(arena, &a->xf, mt_mat(NULL, act, t, c->hidden)));
  MT_TRY(take(arena, &a->rstdf, mt_vec(NULL, stat, t)));
  MT_TRY(take(arena, &a->aux_prob, mt_vec(NULL, stat, e)));
  MT_TRY(take(arena, &a->aux_loss, mt_vec(NULL, stat, 1)));
  MT_TRY(take(arena, &a->aux_grad, mt_vec(NULL, stat, e)));
  MT_TRY(take_ints(arena, &a->aux_count, e));
  MT_TRY(take(arena, &a->loss, mt_vec(NULL, stat, t)));
  MT_TRY(take_ints(arena, &a->correct, t));
  MT_TRY(scratch_layout(a, c, recipe, arena));
  struct mt_limits limits = mt_acts_limits(c, recipe, t);
  a->workspace_size_bytes = be->workspace_bytes(be, &limits);
  return mt_arena_alloc(arena, a->workspace_size_bytes, &a->workspace);
}

void mt_acts_free(struct mt_acts *a) {
  free(a->layer);
  *a = (struct mt_acts){0};
}

mt_err mt_acts_load(struct mt_acts *a, struct mt_backend *be, const struct mt_batch *batch) {
  if (batch->token_count > a->options.token_capacity ||
      batch->sequence_count > a->options.sequence_capacity) {
    return mt_fail(MT_ESHAPE,
                   "a batch of %d tokens in %d sequences exceeds the room for %lld in %lld",
                   batch->token_count, batch->sequence_count, (long long)a->options.token_capacity,
                   (long long)a->options.sequence_capacity);
  }
  size_t bytes = (size_t)batch->token_count * sizeof(int32_t);
  MT_TRY(be->upload(be, a->ids, batch->ids, bytes));
  MT_TRY(be->upload(be, a->positions, batch->positions, bytes));
  MT_TRY(be->upload(be, a->labels, batch->labels, bytes));
  MT_TRY(be->upload(be, a->cu_seqlens, batch->cu_seqlens,
                    (size_t)(batch->sequence_count + 1) * sizeof(int32_t)));
  int32_t valid = batch->valid_count;
  return be->upload(be, a->valid_count, &valid, sizeof valid);
}
