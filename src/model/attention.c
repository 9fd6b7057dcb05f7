/* Attention block: residual add, RMSNorm, fused QKV, RoPE, attention, output projection.
 * Formulas: docs/math.md, "RMSNorm", "RoPE", "Attention". */
#include <math.h>

#include "model/layers.h"
#include "quant/linear.h"

mt_err mt_norm_forward(struct mt_model *m, struct mt_tensor stream, struct mt_tensor branch,
                       const struct mt_param *weight, struct mt_tensor sum, struct mt_tensor y,
                       struct mt_tensor rstd) {
  struct mt_rmsnorm_fwd_args a = {
      .x = sum, .weight = weight->compute, .eps = (float)m->config.rms_eps, .y = y, .rstd = rstd};
  if (branch.data && m->options.blocks == MT_BLOCKS_FUSED) {
    a.x = stream;
    a.residual = branch;
    a.sum = sum;
  } else if (branch.data) {
    MT_TRY(m->be->ops.add(m->be, &(struct mt_add_args){.a = stream, .b = branch, .y = sum}));
  }
  return m->be->ops.rmsnorm_fwd(m->be, &a);
}

mt_err mt_norm_backward(struct mt_model *m, struct mt_tensor dy, struct mt_tensor sum,
                        struct mt_param *weight, struct mt_tensor rstd, struct mt_tensor ds,
                        int first, int accumulate) {
  struct mt_rmsnorm_bwd_args a = {.dy = dy,
                                  .x = sum,
                                  .weight = weight->compute,
                                  .rstd = rstd,
                                  .dx = ds,
                                  .dweight = weight->grad,
                                  .accumulate = accumulate};
  if (!first) a.dresidual = ds;
  MT_TRY(m->be->ops.rmsnorm_bwd(m->be, &a));
  mt_grad_ready(m, weight);
  return MT_OK;
}

/* The three projections one by one, as unfused code has them: the fused weight holds per key-value
 * group its queries, K and V, so each projection is a set of row blocks. */
static mt_err qkv_unfused(struct mt_model *m, struct mt_tensor x, struct mt_tensor w,
                          struct mt_tensor qkv) {
  const struct mt_config *c = &m->config;
  int64_t d = c->head_dim, r = c->heads / c->kv_heads, group = (r + 2) * d;
  const int64_t begin[3] = {0, r * d, (r + 1) * d}, width[3] = {r * d, d, d};
  for (int part = 0; part < 3; part++) {
    for (int64_t g = 0; g < c->kv_heads; g++) {
      int64_t row = g * group + begin[part];
      MT_TRY(mt_linear_forward(m->be, x, mt_rows(&w, row, width[part]),
                               mt_cols(&qkv, row, width[part]), NULL));
    }
  }
  return MT_OK;
}

/* Operand i of the room, empty. */
static struct mt_operand operand(const struct mt_model *m, int i) {
  return (struct mt_operand){.format = m->acts.attention_format,
                             .memory = m->acts.attention_operand[i]};
}

/* y = x w^T by the recipe. */
static mt_err multiply(struct mt_model *m, struct mt_tensor x, const struct mt_param *p,
                       struct mt_tensor y) {
  struct mt_operand in = operand(m, 0);
  struct mt_weight_forms w = mt_forms_of(p);
  MT_TRY(mt_operand_make(m->be, &in, x, x.dim[0], MT_SIDE_ROW, NULL));
  return mt_product_forward(m->be, &in, &w, y);
}

/* Its backward: the weight's gradient from x (unless it is frozen), and dx (=). make_x is called
 * before x is read, or NULL. */
struct back {
  struct mt_tensor dy, x, dx;
  struct mt_param *p;
  mt_err (*make_x)(struct mt_model *m, int layer, int64_t tokens);
  int layer, accumulate;
};
static mt_err multiply_backward(struct mt_model *m, const struct back *b) {
  struct mt_operand dy = operand(m, 0), x = operand(m, 1);
  struct mt_weight_forms w = mt_forms_of(b->p);
  int64_t rows = b->dy.dim[0];
  bool learns = b->p->grad.data != NULL;
  MT_TRY(mt_operand_make(m->be, &dy, b->dy, rows, learns ? MT_SIDE_BOTH : MT_SIDE_ROW, NULL));
  if (learns) {
    if (b->make_x) MT_TRY(b->make_x(m, b->layer, rows));
    MT_TRY(mt_operand_make(m->be, &x, b->x, rows, MT_SIDE_COL, NULL));
    MT_TRY(mt_product_wgrad(m->be, &dy, &x, b->p->grad, b->accumulate, NULL));
  }
  mt_grad_ready(m, b->p);
  return mt_product_dgrad(m->be, &dy, &w, b->dx);
}

static struct mt_attention_fwd_args attention_args(struct mt_model *m, struct mt_layer_acts *l,
                                                   int layer, const struct mt_view *v) {
  const struct mt_config *c = &m->config;
  return (struct mt_attention_fwd_args){.qkv = mt_top(l->qkv, v->tokens),
                                        .cu_seqlens = m->acts.cu_seqlens,
                                        .sequence_count = v->sequences,
                                        .kv_heads = c->kv_heads,
                                        .q_per_kv = c->heads / c->kv_heads,
                                        .head_dim = c->head_dim,
                                        .window = c->layer[layer].window,
                                        .scale = (float)(1.0 / sqrt((double)c->head_dim)),
                                        .out = mt_top(l->att, v->tokens),
                                        .lse = mt_top(l->lse, v->tokens)};
}

static struct mt_rope_args rope_args(struct mt_model *m, struct mt_tensor qkv, int inverse) {
  const struct mt_config *c = &m->config;
  return (struct mt_rope_args){.qkv = qkv,
                               .cos = mt_top(m->acts.cos, qkv.dim[0]),
                               .sin = mt_top(m->acts.sin, qkv.dim[0]),
                               .kv_heads = c->kv_heads,
                               .q_per_kv = c->heads / c->kv_heads,
                               .head_dim = c->head_dim,
                               .inverse = inverse};
}

/* Normalised input to qkv with rope applied. */
static mt_err project(struct mt_model *m, int layer, int64_t tokens) {
  struct mt_tensor xn = mt_top(m->acts.xn, tokens);
  struct mt_tensor qkv = mt_top(m->acts.layer[layer].qkv, tokens);
  struct mt_param *p = mt_params_find(&m->params, MT_PARAM_QKV, layer);
  /* A block of 8-bit weights may reach over two heads: there it is one product in any case. */
  if (m->options.blocks == MT_BLOCKS_FUSED || p->q.format != MT_Q_NONE)
    MT_TRY(multiply(m, xn, p, qkv));
  else
    MT_TRY(qkv_unfused(m, xn, p->compute, qkv));
  struct mt_rope_args rope = rope_args(m, qkv, 0);
  return m->be->ops.rope(m->be, &rope);
}

mt_err mt_attention_project(struct mt_model *m, int layer, int64_t tokens) {
  struct mt_layer_acts *l = &m->acts.layer[layer];
  struct mt_tensor none = {0};
  bool first = layer == m->acts.shard.layer_begin; /* its s1 is there already */
  struct mt_tensor stream = first ? none : mt_top(m->acts.layer[layer - 1].s2, tokens);
  struct mt_tensor branch = first ? none : mt_top(m->acts.branch, tokens);
  mt_acts_enter(&m->acts, m->be, MT_ROOM_ATTENTION);
  MT_TRY(mt_norm_forward(m, stream, branch, mt_params_find(&m->params, MT_PARAM_ATTN_NORM, layer),
                         mt_top(l->s1, tokens), mt_top(m->acts.xn, tokens),
                         mt_top(l->rstd1, tokens)));
  return project(m, layer, tokens);
}

mt_err mt_attention_output(struct mt_model *m, int layer, int64_t tokens) {
  return multiply(m, mt_top(m->acts.layer[layer].att, tokens),
                  mt_params_find(&m->params, MT_PARAM_ATTN_OUT, layer),
                  mt_top(m->acts.branch, tokens));
}

/* qkv to branch. */
static mt_err attend(struct mt_model *m, int layer, const struct mt_view *v) {
  struct mt_attention_fwd_args a = attention_args(m, &m->acts.layer[layer], layer, v);
  MT_TRY(m->be->ops.attention_fwd(m->be, &a));
  return mt_attention_output(m, layer, v->tokens);
}

mt_err mt_attention_forward(struct mt_model *m, int layer, const struct mt_view *v) {
  MT_TRY(mt_attention_project(m, layer, v->tokens));
  return attend(m, layer, v);
}

/* The block's normalised input from the stream, which is kept. */
static mt_err norm_again(struct mt_model *m, int layer, int64_t tokens) {
  struct mt_layer_acts *l = &m->acts.layer[layer];
  struct mt_tensor none = {0};
  return mt_norm_forward(m, none, none, mt_params_find(&m->params, MT_PARAM_ATTN_NORM, layer),
                         mt_top(l->s1, tokens), mt_top(m->acts.xn, tokens),
                         mt_top(l->rstd1, tokens));
}

mt_err mt_attention_again(struct mt_model *m, int layer, const struct mt_view *v) {
  mt_acts_enter(&m->acts, m->be, MT_ROOM_ATTENTION);
  MT_TRY(norm_again(m, layer, v->tokens));
  MT_TRY(project(m, layer, v->tokens));
  return attend(m, layer, v);
}

mt_err mt_attention_backward(struct mt_model *m, int layer, const struct mt_view *v) {
  struct mt_layer_acts *l = &m->acts.layer[layer];
  struct mt_param *out = mt_params_find(&m->params, MT_PARAM_ATTN_OUT, layer);
  struct mt_param *proj = mt_params_find(&m->params, MT_PARAM_QKV, layer);
  struct mt_param *norm = mt_params_find(&m->params, MT_PARAM_ATTN_NORM, layer);
  int64_t t = v->tokens;
  struct mt_tensor ds = mt_top(m->acts.ds, t), datt = mt_top(m->acts.datt, t),
                   dqkv = mt_top(m->acts.dqkv, t), dxn = mt_top(m->acts.branch, t),
                   xn = mt_top(m->acts.xn, t);

  mt_acts_enter(&m->acts, m->be, MT_ROOM_ATTENTION);
  MT_TRY(multiply_backward(
      m, &(struct back){
             .dy = ds, .x = mt_top(l->att, t), .dx = datt, .p = out, .accumulate = v->accumulate}));

  struct mt_attention_bwd_args a = {
      .fwd = attention_args(m, l, layer, v), .dout = datt, .dqkv = dqkv};
  MT_TRY(m->be->ops.attention_bwd(m->be, &a));
  struct mt_rope_args rope = rope_args(m, dqkv, 1);
  MT_TRY(m->be->ops.rope(m->be, &rope));

  MT_TRY(multiply_backward(m, &(struct back){.dy = dqkv,
                                             .x = xn,
                                             .dx = dxn,
                                             .p = proj,
                                             .make_x = norm_again,
                                             .layer = layer,
                                             .accumulate = v->accumulate}));
  return mt_norm_backward(m, dxn, mt_top(l->s1, t), norm, mt_top(l->rstd1, t), ds, 0,
                          v->accumulate);
}
