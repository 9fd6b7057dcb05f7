#include "model/decode.h"

#include <math.h>
#include <stdlib.h>

#include "model/layers.h"

mt_err mt_kv_cache_create(struct mt_kv_cache *cache, const struct mt_model *m, int64_t capacity) {
  const struct mt_config *c = &m->config;
  int64_t width = (int64_t)c->kv_heads * c->head_dim;
  size_t row_bytes = (size_t)width * mt_dtype_bytes(m->recipe->act);
  size_t held = (size_t)(m->acts.shard.layer_end - m->acts.shard.layer_begin);
  *cache = (struct mt_kv_cache){.be = m->be, .layers = c->layers, .capacity = capacity};
  mt_err err = MT_ENOMEM;
  cache->k = calloc((size_t)c->layers, sizeof *cache->k);
  cache->v = calloc((size_t)c->layers, sizeof *cache->v);
  if (!cache->k || !cache->v) {
    mt_fail(MT_ENOMEM, "key-value cache of %d layers", c->layers);
    goto done;
  }
  cache->memory_size_bytes = 2 * held * (size_t)capacity * row_bytes;
  MT_GO(m->be->mem_alloc(m->be, cache->memory_size_bytes, &cache->memory));
  char *p = cache->memory;
  for (int l = m->acts.shard.layer_begin; l < m->acts.shard.layer_end; l++) {
    cache->k[l] = mt_mat(p, m->recipe->act, capacity, width);
    p += (size_t)capacity * row_bytes;
    cache->v[l] = mt_mat(p, m->recipe->act, capacity, width);
    p += (size_t)capacity * row_bytes;
  }
done:
  if (err) mt_kv_cache_destroy(cache);
  return err;
}

void mt_kv_cache_destroy(struct mt_kv_cache *cache) {
  if (cache->memory) cache->be->mem_free(cache->be, cache->memory, cache->memory_size_bytes);
  free(cache->k);
  free(cache->v);
  *cache = (struct mt_kv_cache){0};
}

static mt_err load_tokens(struct mt_model *m, int64_t start, const int32_t *ids, int count) {
  struct mt_batch b = {.token_count = count, .valid_count = count, .sequence_count = 1};
  int32_t cu[2] = {0, count};
  int32_t *positions = m->host_rows; /* [T] of 8 bytes: positions, then labels */
  int32_t *labels = positions + count;
  for (int i = 0; i < count; i++) {
    positions[i] = (int32_t)(start + i);
    labels[i] = MT_IGNORE;
  }
  b.ids = (int32_t *)(uintptr_t)ids; /* read only */
  b.positions = positions;
  b.labels = labels;
  b.cu_seqlens = cu;
  return mt_acts_load(&m->acts, m->be, &b);
}

static mt_err cached_attention(struct mt_model *m, struct mt_kv_cache *cache, int layer,
                               int64_t tokens) {
  const struct mt_config *c = &m->config;
  struct mt_layer_acts *l = &m->acts.layer[layer];
  int start = (int)cache->length, r = c->heads / c->kv_heads;
  MT_TRY(m->be->ops.kv_append(m->be, &(struct mt_kv_append_args){.qkv = mt_top(l->qkv, tokens),
                                                                 .k = cache->k[layer],
                                                                 .v = cache->v[layer],
                                                                 .start = start,
                                                                 .kv_heads = c->kv_heads,
                                                                 .q_per_kv = r,
                                                                 .head_dim = c->head_dim}));
  return m->be->ops.attention_cache(
      m->be, &(struct mt_attention_cache_args){.qkv = mt_top(l->qkv, tokens),
                                               .k = cache->k[layer],
                                               .v = cache->v[layer],
                                               .start = start,
                                               .kv_heads = c->kv_heads,
                                               .q_per_kv = r,
                                               .head_dim = c->head_dim,
                                               .window = c->layer[layer].window,
                                               .scale = (float)(1.0 / sqrt((double)c->head_dim)),
                                               .out = mt_top(l->att, tokens)});
}

mt_err mt_model_decode_check(const struct mt_model *m, const struct mt_kv_cache *cache,
                             const int32_t *ids, int count) {
  if (count < 1 || count > m->acts.options.token_capacity ||
      count > cache->capacity - cache->length) {
    return mt_fail(MT_ESHAPE, "%d tokens after %lld: the model takes %lld at once, the cache %lld",
                   count, (long long)cache->length, (long long)m->acts.options.token_capacity,
                   (long long)cache->capacity);
  }
  for (int i = 0; i < count; i++) {
    if (ids[i] >= 0 && ids[i] < m->config.vocab) continue;
    return mt_fail(MT_EINVAL, "token id %d lies outside the vocabulary of %d", (int)ids[i],
                   m->config.vocab);
  }
  return MT_OK;
}

mt_err mt_model_decode(struct mt_model *m, struct mt_kv_cache *cache, const int32_t *ids, int count,
                       float *logits) {
  struct mt_view v = {.tokens = count, .sequences = 1};
  MT_TRY(mt_model_decode_check(m, cache, ids, count));
  MT_TRY(load_tokens(m, cache->length, ids, count));
  MT_TRY(mt_stream_open(m, &v));
  for (int l = m->acts.shard.layer_begin; l < m->acts.shard.layer_end; l++) {
    MT_TRY(mt_attention_project(m, l, count));
    MT_TRY(cached_attention(m, cache, l, count));
    MT_TRY(mt_attention_output(m, l, count));
    MT_TRY(mt_moe_forward(m, l, &v));
  }
  MT_TRY(mt_stream_close(m, &v));
  cache->length += count;
  return logits ? mt_model_logits(m, count - 1, 1, logits) : MT_OK;
}
