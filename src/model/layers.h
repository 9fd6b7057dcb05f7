/* The blocks of the model, each forward beside its backward. Internal to model/. */
#ifndef MT_MODEL_LAYERS_H
#define MT_MODEL_LAYERS_H

#include "model/model.h"

/* The part of the buffers that this micro-batch fills. */
struct mt_view {
  int64_t tokens; /* T of this batch */
  int sequences;
  int accumulate; /* of parameter gradients: dense ones, and the experts' */
  int accumulate_experts;
};

/* The first `rows` rows of a buffer that was laid out for more. */
static inline struct mt_tensor mt_top(struct mt_tensor t, int64_t rows) {
  t.dim[0] = rows;
  if (t.rank == 1) t.ld = rows;
  return t;
}

/* s1 = stream + branch (a shard's first layer: what comes in already lies in s1), branch (=) =
 * output of the attention block, to be added to s1 by the MoE block. */
mt_err mt_attention_forward(struct mt_model *m, int layer, const struct mt_view *v);
/* Forward again in backward, from s1 on, which was kept: qkv, att, lse, branch. */
mt_err mt_attention_again(struct mt_model *m, int layer, const struct mt_view *v);
/* acts.ds: in, gradient of s1 + branch; out, gradient of s1. */
mt_err mt_attention_backward(struct mt_model *m, int layer, const struct mt_view *v);

/* The two halves of mt_attention_forward around the attention itself, which decoding replaces:
 * up to qkv with rope applied; and from att to branch. */
mt_err mt_attention_project(struct mt_model *m, int layer, int64_t tokens);
mt_err mt_attention_output(struct mt_model *m, int layer, int64_t tokens);

/* Whether buffers that layers share have been overwritten since the layer's forward: those of the
 * last layer have not, unless another micro-batch has run since. */
static inline bool mt_layer_overwritten(const struct mt_model *m, int layer) {
  return layer + 1 < m->acts.shard.layer_end || m->acts.forwarded != m->acts.running;
}
static inline bool mt_layer_attention_lost(const struct mt_model *m, int layer) {
  return m->options.recompute == MT_RECOMPUTE_FULL && mt_layer_overwritten(m, layer);
}
static inline bool mt_layer_gate_up_lost(const struct mt_model *m, int layer) {
  return m->options.recompute != MT_RECOMPUTE_NONE && mt_layer_overwritten(m, layer);
}

/* s2 = s1 + branch, branch (=) = output of the MoE block. */
mt_err mt_moe_forward(struct mt_model *m, int layer, const struct mt_view *v);
/* acts.ds: in, gradient of s2 + branch; out, gradient of s2. Where mt_layer_attention_lost, branch
 * is that of mt_attention_again. */
mt_err mt_moe_backward(struct mt_model *m, int layer, const struct mt_view *v);

/* The residual add and the norm that follows, as the blocks strategy does them:
 * sum (=) = stream + branch (or what lies in sum already when branch has no memory),
 * y (=) normalised. */
mt_err mt_norm_forward(struct mt_model *m, struct mt_tensor stream, struct mt_tensor branch,
                       const struct mt_param *weight, struct mt_tensor sum, struct mt_tensor y,
                       struct mt_tensor rstd);
/* ds (in place) = dnorm(dy) + ds; without ds's old value when first. */
mt_err mt_norm_backward(struct mt_model *m, struct mt_tensor dy, struct mt_tensor sum,
                        struct mt_param *weight, struct mt_tensor rstd, struct mt_tensor ds,
                        int first, int accumulate);

/* The ends of the residual stream: rope tables and embedding into layer 0's s1; last residual add
 * and the final norm into xf. Of a stage, only what it holds, and the last residual add into
 * acts.out where the stream goes on. */
mt_err mt_stream_open(struct mt_model *m, const struct mt_view *v);
mt_err mt_stream_close(struct mt_model *m, const struct mt_view *v);

/* What products read of a weight. */
static inline struct mt_weight_forms mt_forms_of(const struct mt_param *p) {
  return (struct mt_weight_forms){.w = p->compute, .q = p->q};
}

/* Announces a finished gradient. */
void mt_grad_ready(struct mt_model *m, struct mt_param *param);

#endif
