#include "model/params.h"

#include <stdio.h>
#include <stdlib.h>

static const struct {
  const char *name;
  bool decay;
  enum mt_sync sync;
} kinds[] = {
#define X(kind, name, decay, sync) {name, decay, sync},
    MT_PARAM_KIND_LIST(X)
#undef X
};

enum { PER_LAYER = MT_PARAM_DOWN - MT_PARAM_ATTN_NORM + 1 };

static struct mt_param *add_row(struct mt_params *p, enum mt_param_kind kind, int layer, int rank,
                                int64_t d0, int64_t d1, int64_t d2) {
  struct mt_param *r = &p->row[p->count++];
  *r = (struct mt_param){.kind = kind,
                         .layer = layer,
                         .rank = rank,
                         .dim = {d0, d1, d2},
                         .decay = kinds[kind].decay,
                         .sync = kinds[kind].sync,
                         .learns = true};
  if (layer < 0)
    snprintf(r->name, sizeof r->name, "%s", kinds[kind].name);
  else
    snprintf(r->name, sizeof r->name, "layers.%d.%s", layer, kinds[kind].name);
  return r;
}

mt_err mt_params_build(const struct mt_config *c, const struct mt_shard *shard,
                       struct mt_params *out) {
  struct mt_shard s = mt_shard_of(c, shard);
  *out = (struct mt_params){0};
  if (c->tied_head && mt_shard_staged(c, &s)) {
    return mt_fail(MT_EUNSUPPORTED, "tie_word_embeddings: the first stage's embedding would be the "
                                    "last one's head; a model with it is not cut into stages");
  }
  out->row = calloc((size_t)c->layers * PER_LAYER + 3, sizeof *out->row);
  if (!out->row) return mt_fail(MT_ENOMEM, "parameter table of %d layers", c->layers);
  int64_t h = c->hidden, f = c->ffn, e = c->experts, v = c->vocab;
  int64_t held = s.expert_end - s.expert_begin;
  int64_t queries = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
  if (s.layer_begin == 0) add_row(out, MT_PARAM_EMBED, -1, 2, v, h, 1);
  for (int l = s.layer_begin; l < s.layer_end; l++) {
    add_row(out, MT_PARAM_ATTN_NORM, l, 1, h, 1, 1);
    add_row(out, MT_PARAM_QKV, l, 2, queries + 2 * kv, h, 1);
    add_row(out, MT_PARAM_ATTN_OUT, l, 2, h, queries, 1);
    add_row(out, MT_PARAM_MLP_NORM, l, 1, h, 1, 1);
    add_row(out, MT_PARAM_ROUTER, l, 2, e, h, 1);
    add_row(out, MT_PARAM_GATE_UP, l, 3, held, 2 * f, h)->first = s.expert_begin;
    add_row(out, MT_PARAM_DOWN, l, 3, held, h, f)->first = s.expert_begin;
  }
  if (s.layer_end < c->layers) return MT_OK;
  add_row(out, MT_PARAM_FINAL_NORM, -1, 1, h, 1, 1);
  if (!c->tied_head) add_row(out, MT_PARAM_HEAD, -1, 2, v, h, 1);
  return MT_OK;
}

void mt_params_free(struct mt_params *p) {
  free(p->row);
  *p = (struct mt_params){0};
}

struct mt_param *mt_params_find(const struct mt_params *p, enum mt_param_kind kind, int layer) {
  for (int i = 0; i < p->count; i++) {
    if (p->row[i].kind == kind && p->row[i].layer == layer) return &p->row[i];
  }
  return kind == MT_PARAM_HEAD ? mt_params_find(p, MT_PARAM_EMBED, -1) : NULL;
}

const char *mt_param_kind_name(enum mt_param_kind kind) {
  return kinds[kind].name;
}

int64_t mt_param_count(const struct mt_param *p) {
  return p->dim[0] * p->dim[1] * p->dim[2];
}
