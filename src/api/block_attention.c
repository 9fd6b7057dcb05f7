/* Norm and attention as one block. Formulas: docs/math.md, "RMSNorm", "RoPE", "Attention". */
#include <math.h>
#include <stdlib.h>

#include "api/block_impl.h"

enum { NORM, QKV, OUT };

struct attention {
  struct mt_block b;
  struct mt_attention_shape shape;
  double *inv_freq; /* [D/2] */
  int sequences;
  struct mt_array *cu, *positions;                          /* of the last forward's sequences */
  struct mt_array *cos, *sin, *rstd, *xn, *qkv, *att, *lse; /* kept for backward */
  struct mt_array *datt, *dqkv, *dxn;                       /* of backward */
};

static int64_t att_width(const struct attention *a) {
  return (int64_t)a->shape.heads * a->shape.head_dim;
}

static int64_t qkv_width(const struct attention *a) {
  return att_width(a) + 2 * (int64_t)a->shape.kv_heads * a->shape.head_dim;
}

/* cu (=), positions (=) of the lengths. */
static mt_err load_sequences(struct attention *a, int64_t rows) {
  const struct mt_rows_info *info = &a->b.info;
  int n = info->sequence_count;
  if (!info->sequence_lengths || n < 1)
    return mt_fail(MT_EINVAL, "attention needs sequence_lengths");
  MT_TRY(mt_array_ensure_ints(a->b.s, &a->cu, (int64_t)n + 1));
  MT_TRY(mt_array_ensure_ints(a->b.s, &a->positions, rows));
  int32_t *host = calloc((size_t)n + 1 + (size_t)rows, sizeof *host);
  if (!host) return mt_fail(MT_ENOMEM, "positions of %lld tokens", (long long)rows);
  int32_t *positions = host + n + 1;
  int64_t at = 0;
  mt_err err = MT_OK;
  for (int i = 0; i < n && !err; i++) {
    int32_t length = info->sequence_lengths[i];
    if (length < 0 || length > rows - at) {
      err = mt_fail(MT_ESHAPE, "sequence %d has %d tokens, %lld are left", i, (int)length,
                    (long long)(rows - at));
      break;
    }
    for (int32_t k = 0; k < length; k++) positions[at + k] = k;
    at += length;
    host[i + 1] = (int32_t)at;
  }
  if (!err && at != rows) {
    err = mt_fail(MT_ESHAPE, "sequence_lengths add up to %lld, x has %lld rows", (long long)at,
                  (long long)rows);
  }
  if (!err) err = mt_array_write_ints(a->cu, host);
  if (!err) err = mt_array_write_ints(a->positions, positions);
  a->sequences = n;
  free(host);
  return err;
}

static mt_err make_room(struct attention *a, int64_t rows) {
  const struct mt_attention_shape *sh = &a->shape;
  struct mt_space *s = a->b.s;
  enum mt_dtype act = a->b.recipe->act, full = s->full;
  MT_TRY(mt_space_reserve(s, &(struct mt_limits){.rows = rows,
                                                 .hidden = qkv_width(a),
                                                 .heads = sh->heads,
                                                 .kv_heads = sh->kv_heads,
                                                 .head_dim = sh->head_dim}));
  MT_TRY(mt_array_ensure(s, &a->cos, full, 2, rows, sh->head_dim / 2, 1));
  MT_TRY(mt_array_ensure(s, &a->sin, full, 2, rows, sh->head_dim / 2, 1));
  MT_TRY(mt_array_ensure(s, &a->rstd, full, 1, rows, 1, 1));
  MT_TRY(mt_array_ensure(s, &a->xn, act, 2, rows, sh->hidden, 1));
  MT_TRY(mt_array_ensure(s, &a->qkv, act, 2, rows, qkv_width(a), 1));
  MT_TRY(mt_array_ensure(s, &a->att, act, 2, rows, att_width(a), 1));
  return mt_array_ensure(s, &a->lse, full, 2, rows, sh->heads, 1);
}

static mt_err rope(struct attention *a, struct mt_array *qkv, int inverse) {
  struct mt_backend *be = &a->b.s->be;
  return be->ops.rope(be, &(struct mt_rope_args){.qkv = qkv->t,
                                                 .cos = a->cos->t,
                                                 .sin = a->sin->t,
                                                 .kv_heads = a->shape.kv_heads,
                                                 .q_per_kv = a->shape.heads / a->shape.kv_heads,
                                                 .head_dim = a->shape.head_dim,
                                                 .inverse = inverse});
}

static struct mt_attention_fwd_args attend(const struct attention *a) {
  const struct mt_attention_shape *sh = &a->shape;
  return (struct mt_attention_fwd_args){.qkv = a->qkv->t,
                                        .cu_seqlens = a->cu->t.data,
                                        .sequence_count = a->sequences,
                                        .kv_heads = sh->kv_heads,
                                        .q_per_kv = sh->heads / sh->kv_heads,
                                        .head_dim = sh->head_dim,
                                        .window = sh->window,
                                        .scale = (float)(1 / sqrt((double)sh->head_dim)),
                                        .out = a->att->t,
                                        .lse = a->lse->t};
}

static mt_err forward(struct mt_block *b, const struct mt_array *x, struct mt_array *y) {
  struct attention *a = (struct attention *)b;
  struct mt_backend *be = &b->s->be;
  struct mt_tensor w[MT_BLOCK_WEIGHTS];
  MT_TRY(load_sequences(a, x->t.dim[0]));
  MT_TRY(make_room(a, x->t.dim[0]));
  for (int i = 0; i < MT_BLOCK_WEIGHTS; i++)
    MT_TRY(mt_weight_compute(&b->weight[i], b->recipe, &w[i]));
  MT_TRY(be->ops.rmsnorm_fwd(be, &(struct mt_rmsnorm_fwd_args){.x = x->t,
                                                               .weight = w[NORM],
                                                               .eps = (float)a->shape.norm_eps,
                                                               .y = a->xn->t,
                                                               .rstd = a->rstd->t}));
  MT_TRY(mt_linear_forward(be, a->xn->t, w[QKV], a->qkv->t, NULL));
  MT_TRY(be->ops.rope_table(be, &(struct mt_rope_table_args){.positions = a->positions->t.data,
                                                             .inv_freq = a->inv_freq,
                                                             .cos = a->cos->t,
                                                             .sin = a->sin->t}));
  MT_TRY(rope(a, a->qkv, 0));
  struct mt_attention_fwd_args f = attend(a);
  MT_TRY(be->ops.attention_fwd(be, &f));
  MT_TRY(mt_linear_forward(be, a->att->t, w[OUT], y->t, NULL));
  if (!a->shape.residual) return MT_OK;
  return be->ops.add(be, &(struct mt_add_args){.a = x->t, .b = y->t, .y = y->t});
}

static mt_err backward(struct mt_block *b, const struct mt_array *dy, struct mt_array *dx,
                       struct mt_array *drow_scale, int accumulate) {
  struct attention *a = (struct attention *)b;
  struct mt_backend *be = &b->s->be;
  struct mt_tensor w[MT_BLOCK_WEIGHTS];
  int64_t rows = b->x->t.dim[0];
  enum mt_dtype act = b->recipe->act;
  (void)drow_scale;
  MT_TRY(mt_array_ensure(b->s, &a->datt, act, 2, rows, att_width(a), 1));
  MT_TRY(mt_array_ensure(b->s, &a->dqkv, act, 2, rows, qkv_width(a), 1));
  MT_TRY(mt_array_ensure(b->s, &a->dxn, act, 2, rows, b->in, 1));
  for (int i = 0; i < MT_BLOCK_WEIGHTS; i++)
    MT_TRY(mt_weight_compute(&b->weight[i], b->recipe, &w[i]));
  MT_TRY(mt_linear_wgrad(be, dy->t, a->att->t, b->weight[OUT].grad->t, NULL, accumulate, NULL));
  MT_TRY(mt_linear_dgrad(be, dy->t, w[OUT], a->datt->t, NULL));
  struct mt_attention_bwd_args g = {.fwd = attend(a), .dout = a->datt->t, .dqkv = a->dqkv->t};
  MT_TRY(be->ops.attention_bwd(be, &g));
  MT_TRY(rope(a, a->dqkv, 1));
  MT_TRY(mt_linear_wgrad(be, a->dqkv->t, a->xn->t, b->weight[QKV].grad->t, NULL, accumulate, NULL));
  MT_TRY(mt_linear_dgrad(be, a->dqkv->t, w[QKV], a->dxn->t, NULL));
  struct mt_rmsnorm_bwd_args n = {.dy = a->dxn->t,
                                  .x = b->x->t,
                                  .weight = w[NORM],
                                  .rstd = a->rstd->t,
                                  .dx = dx->t,
                                  .dweight = b->weight[NORM].grad->t,
                                  .accumulate = accumulate};
  if (a->shape.residual) n.dresidual = dy->t;
  return be->ops.rmsnorm_bwd(be, &n);
}

static void release(struct mt_block *b) {
  struct attention *a = (struct attention *)b;
  struct mt_array *const all[] = {a->cu,  a->positions, a->cos, a->sin,  a->rstd, a->xn,
                                  a->qkv, a->att,       a->lse, a->datt, a->dqkv, a->dxn};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) mt_array_free(all[i]);
  free(a->inv_freq);
}

static const struct mt_block_kind kind_attention = {
    .name = "attention", .forward = forward, .backward = backward, .release = release};

static mt_err check_shape(const struct mt_attention_shape *s) {
  bool ok = s->heads > 0 && s->kv_heads > 0 && s->heads % s->kv_heads == 0 && s->head_dim > 0 &&
            s->head_dim % 2 == 0 && s->window >= 0 && s->heads <= 65536 && s->head_dim <= 65536;
  if (!ok) {
    return mt_fail(MT_EINVAL, "attention: %d heads, %d of keys, head_dim %d, window %d", s->heads,
                   s->kv_heads, s->head_dim, s->window);
  }
  if (s->norm_eps > 0 && s->norm_eps < 1 && s->rope_theta > 1 && s->rope_theta < 1e15) return MT_OK;
  return mt_fail(MT_EINVAL, "attention: norm_eps %g, rope_theta %g", s->norm_eps, s->rope_theta);
}

mt_err mt_attention_create(mt_space *s, const struct mt_attention_shape *shape, mt_block **out) {
  struct mt_block *b = NULL;
  mt_err err;
  MT_TRY(check_shape(shape));
  MT_TRY(mt_block_make(s, &kind_attention, sizeof(struct attention), shape->hidden, shape->hidden,
                       1, &b));
  struct attention *a = (struct attention *)b;
  int64_t h = shape->hidden;
  a->shape = *shape;
  a->inv_freq = calloc((size_t)shape->head_dim / 2, sizeof *a->inv_freq);
  if (!a->inv_freq) {
    err = mt_fail(MT_ENOMEM, "attention");
    goto done;
  }
  for (int i = 0; i < shape->head_dim / 2; i++)
    a->inv_freq[i] = pow(shape->rope_theta, -2.0 * i / shape->head_dim);
  b->weight_count = MT_BLOCK_WEIGHTS;
  MT_GO(mt_weight_create(s, &b->weight[NORM], 1, h, 1, 1, 1));
  MT_GO(mt_weight_create(s, &b->weight[QKV], 2, qkv_width(a), h, 1, 0));
  err = mt_weight_create(s, &b->weight[OUT], 2, h, att_width(a), 1, 0);
done:
  return mt_block_finish(b, err, out);
}
