/* Generation one token after another with a cache of keys and values. */
#ifndef MT_MODEL_DECODE_H
#define MT_MODEL_DECODE_H

#include "model/model.h"

struct mt_kv_cache {
  struct mt_backend *be;
  int layers;
  struct mt_tensor *k, *v; /* per layer, act [capacity, G*D]; of those here */
  int64_t capacity;
  int64_t length; /* tokens held */
  void *memory;   /* of the backend */
  size_t memory_size_bytes;
};

/* Room for `capacity` tokens, empty. Errors: MT_ENOMEM. */
mt_err mt_kv_cache_create(struct mt_kv_cache *cache, const struct mt_model *m, int64_t capacity);
void mt_kv_cache_destroy(struct mt_kv_cache *cache);

/* Runs `count` new tokens (count <= the model's token capacity) after those in the cache, which
 * grows by them. logits (=) host [V] F32 of the last one, or NULL.
 * Errors: MT_ESHAPE when the cache or the model has no room, MT_EINVAL for ids out of range. */
mt_err mt_model_decode_check(const struct mt_model *m, const struct mt_kv_cache *cache,
                             const int32_t *ids, int count); /* these errors alone */
mt_err mt_model_decode(struct mt_model *m, struct mt_kv_cache *cache, const int32_t *ids, int count,
                       float *logits);

#endif
