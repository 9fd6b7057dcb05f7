#include "model/config.h"

#include <math.h>
#include <stddef.h>

static mt_err in_range(const char *key, int64_t value, int64_t lo, int64_t hi) {
  if (value >= lo && value <= hi) return MT_OK;
  return mt_fail(MT_ESHAPE, "%s is %lld, must be from %lld to %lld", key, (long long)value,
                 (long long)lo, (long long)hi);
}

mt_err mt_config_check(const struct mt_config *c) {
  const struct {
    const char *key;
    int64_t value, lo, hi;
  } ranges[] = {
      {"hidden_size", c->hidden, 1, 1 << 20},
      {"intermediate_size", c->ffn, 1, 1 << 20},
      {"num_hidden_layers", c->layers, 1, MT_MAX_LAYERS},
      {"num_attention_heads", c->heads, 1, 4096},
      {"num_key_value_heads", c->kv_heads, 1, 4096},
      {"head_dim", c->head_dim, 2, 1024},
      {"num_local_experts", c->experts, 1, MT_MAX_EXPERTS},
      {"num_experts_per_tok", c->top_k, 1, MT_MAX_TOP_K},
      {"vocab_size", c->vocab, 1, 1 << 24},
  };
  for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
    MT_TRY(in_range(ranges[i].key, ranges[i].value, ranges[i].lo, ranges[i].hi));
  }
  if (c->heads % c->kv_heads) {
    return mt_fail(MT_ESHAPE, "num_attention_heads %d is no multiple of num_key_value_heads %d",
                   c->heads, c->kv_heads);
  }
  if (c->head_dim % 2) {
    return mt_fail(MT_ESHAPE, "head_dim %d is odd: rotary embedding needs pairs", c->head_dim);
  }
  if (c->top_k > c->experts) {
    return mt_fail(MT_ESHAPE, "num_experts_per_tok %d exceeds num_local_experts %d", c->top_k,
                   c->experts);
  }
  if (!(c->rms_eps > 0 && c->rms_eps < 1)) {
    return mt_fail(MT_ESHAPE, "rms_norm_eps %g must lie between 0 and 1", c->rms_eps);
  }
  if (!(c->rope_theta > 0) || !isfinite(c->rope_theta)) {
    return mt_fail(MT_ESHAPE, "rope_theta %g must be positive", c->rope_theta);
  }
  if (!(c->aux_coef >= 0) || !isfinite(c->aux_coef)) {
    return mt_fail(MT_ESHAPE, "router_aux_loss_coef %g must not be negative", c->aux_coef);
  }
  return MT_OK;
}

struct mt_shard mt_shard_whole(const struct mt_config *c) {
  return (struct mt_shard){.expert_end = c->experts, .layer_end = c->layers};
}

struct mt_shard mt_shard_of(const struct mt_config *c, const struct mt_shard *shard) {
  struct mt_shard s = shard ? *shard : mt_shard_whole(c);
  if (s.expert_end == 0) s.expert_end = c->experts;
  if (s.layer_end == 0) s.layer_end = c->layers;
  return s;
}

bool mt_shard_staged(const struct mt_config *c, const struct mt_shard *shard) {
  return shard->layer_begin > 0 || shard->layer_end < c->layers;
}
