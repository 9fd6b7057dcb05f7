#include "hf/names.h"

#include <fnmatch.h>
#include <stdio.h>

int64_t mt_param_row_elems(const struct mt_param *p) {
  return p->dim[p->rank - 1];
}

int64_t mt_param_rows(const struct mt_param *p) {
  return mt_param_count(p) / mt_param_row_elems(p);
}

int mt_hf_tensor_count(const struct mt_config *c, enum mt_hf_layout layout,
                       const struct mt_param *p) {
  switch (p->kind) {
  case MT_PARAM_QKV:
    return 3;
  case MT_PARAM_GATE_UP:
    return layout == MT_HF_PACKED ? 1 : 2 * c->experts;
  case MT_PARAM_DOWN:
    return layout == MT_HF_PACKED ? 1 : c->experts;
  default:
    return 1;
  }
}

/* A tensor that is the parameter, under the given name. */
static struct mt_hf_tensor whole(const struct mt_param *p, const char *name) {
  struct mt_hf_tensor t = {.rank = p->rank,
                           .dim = {p->dim[0], p->dim[1], p->dim[2]},
                           .blocks = 1,
                           .block_rows = mt_param_rows(p)};
  if (p->layer < 0)
    snprintf(t.name, sizeof t.name, "%s", name);
  else
    snprintf(t.name, sizeof t.name, "model.layers.%d.%s", p->layer, name);
  return t;
}

static struct mt_hf_tensor part_of_qkv(const struct mt_config *c, const struct mt_param *p, int i) {
  static const char *const names[] = {"self_attn.q_proj.weight", "self_attn.k_proj.weight",
                                      "self_attn.v_proj.weight"};
  struct mt_hf_tensor t = whole(p, names[i]);
  int64_t d = c->head_dim, r = c->heads / c->kv_heads;
  const int64_t rows[] = {r * d, d, d}, begin[] = {0, r * d, (r + 1) * d};
  t.blocks = c->kv_heads;
  t.block_rows = rows[i];
  t.param_row = begin[i];
  t.param_stride = (r + 2) * d;
  t.dim[0] = t.blocks * t.block_rows;
  return t;
}

static struct mt_hf_tensor part_of_experts(const struct mt_config *c, const struct mt_param *p,
                                           int i) {
  char name[96];
  int per_expert = p->kind == MT_PARAM_GATE_UP ? 2 : 1, expert = i / per_expert;
  const char *w = p->kind == MT_PARAM_DOWN ? "w2" : i % 2 ? "w3" : "w1";
  snprintf(name, sizeof name, "block_sparse_moe.experts.%d.%s.weight", expert, w);
  struct mt_hf_tensor t = whole(p, name);
  t.rank = 2;
  t.block_rows = p->kind == MT_PARAM_DOWN ? c->hidden : c->ffn;
  t.param_row = i * t.block_rows;
  t.dim[0] = t.block_rows;
  t.dim[1] = p->dim[2];
  t.dim[2] = 1;
  return t;
}

struct mt_hf_tensor mt_hf_tensor_at(const struct mt_config *c, enum mt_hf_layout layout,
                                    const struct mt_param *p, int i) {
  bool packed = layout == MT_HF_PACKED;
  switch (p->kind) {
  case MT_PARAM_EMBED:
    return whole(p, "model.embed_tokens.weight");
  case MT_PARAM_ATTN_NORM:
    return whole(p, "input_layernorm.weight");
  case MT_PARAM_QKV:
    return part_of_qkv(c, p, i);
  case MT_PARAM_ATTN_OUT:
    return whole(p, "self_attn.o_proj.weight");
  case MT_PARAM_MLP_NORM:
    return whole(p, "post_attention_layernorm.weight");
  case MT_PARAM_ROUTER:
    return whole(p, packed ? "mlp.gate.weight" : "block_sparse_moe.gate.weight");
  case MT_PARAM_GATE_UP:
    return packed ? whole(p, "mlp.experts.gate_up_proj") : part_of_experts(c, p, i);
  case MT_PARAM_DOWN:
    return packed ? whole(p, "mlp.experts.down_proj") : part_of_experts(c, p, i);
  case MT_PARAM_FINAL_NORM:
    return whole(p, "model.norm.weight");
  default:
    return whole(p, "lm_head.weight");
  }
}

/* How many of a parameter's names in a layout match. */
static int matches(const struct mt_config *c, enum mt_hf_layout layout, const struct mt_param *p,
                   const char *pattern) {
  int n = 0;
  for (int i = 0; i < mt_hf_tensor_count(c, layout, p); i++) {
    n += fnmatch(pattern, mt_hf_tensor_at(c, layout, p, i).name, 0) == 0;
  }
  return n;
}

mt_err mt_hf_freeze(const struct mt_config *c, struct mt_params *params,
                    const char *const *patterns, int count) {
  for (int n = 0; n < count; n++) {
    bool any = false;
    for (int i = 0; i < params->count; i++) {
      struct mt_param *p = &params->row[i];
      bool whole_row = fnmatch(patterns[n], p->name, 0) == 0, part = false;
      for (int layout = 0; layout < MT_HF_LAYOUT_COUNT; layout++) {
        int hit = matches(c, (enum mt_hf_layout)layout, p, patterns[n]);
        int all = mt_hf_tensor_count(c, (enum mt_hf_layout)layout, p);
        whole_row |= hit == all;
        part |= hit > 0;
      }
      if (part && !whole_row) {
        struct mt_hf_tensor first = mt_hf_tensor_at(c, MT_HF_PER_EXPERT, p, 0);
        return mt_fail(MT_EUNSUPPORTED,
                       "--freeze '%s' matches part of '%s', which is one tensor here: its %d "
                       "tensors ('%s' and so on) freeze together",
                       patterns[n], p->name, mt_hf_tensor_count(c, MT_HF_PER_EXPERT, p),
                       first.name);
      }
      if (whole_row) p->learns = false;
      any |= whole_row;
    }
    if (!any) return mt_fail(MT_EINVAL, "--freeze '%s' matches no parameter", patterns[n]);
  }
  return MT_OK;
}

mt_err mt_hf_params(const struct mt_config *c, const struct mt_shard *shard,
                    const char *const *patterns, int count, struct mt_params *whole,
                    struct mt_params *out) {
  struct mt_params all = {0};
  mt_err err;
  *out = (struct mt_params){0};
  MT_GO(mt_params_build(c, NULL, &all));
  MT_GO(mt_hf_freeze(c, &all, patterns, count));
  MT_GO(mt_params_build(c, shard, out));
  for (int i = 0; i < out->count; i++) {
    struct mt_param *p = &out->row[i];
    p->learns = mt_params_find(&all, p->kind, p->layer)->learns;
  }
done:
  if (whole && !err)
    *whole = all;
  else
    mt_params_free(&all);
  return err;
}
