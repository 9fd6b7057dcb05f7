/* A small random model and batch for tests. */
#ifndef TESTS_MODEL_SMALL_H
#define TESTS_MODEL_SMALL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "kernels/registry.h"
#include "model/model.h"
#include "ok.h"

static inline struct mt_config small_config(void) {
  struct mt_config c = {.model_type = "mixtral",
                        .hidden = 12,
                        .ffn = 10,
                        .layers = 2,
                        .heads = 4,
                        .kv_heads = 2,
                        .head_dim = 6,
                        .experts = 5,
                        .top_k = 2,
                        .vocab = 19,
                        .max_positions = 64,
                        .rms_eps = 1e-5,
                        .rope_theta = 100.0};
  for (int l = 0; l < c.layers; l++) c.layer[l].renormalize = true;
  return c;
}

/* The same in widths that 8-bit recipes take, none a multiple of FP8's blocks. */
static inline struct mt_config small_8bit_config(void) {
  struct mt_config c = small_config();
  c.hidden = 96;
  c.ffn = 160;
  c.head_dim = 32;
  return c;
}

enum { SMALL_TOKENS = 24, SMALL_SEQUENCES = 3 };

struct small_batch {
  struct mt_batch b;
  int32_t ids[SMALL_TOKENS], positions[SMALL_TOKENS], labels[SMALL_TOKENS], cu[SMALL_SEQUENCES + 1];
};

/* Three samples, the last tokens padding, some labels ignored. */
static inline void small_batch(struct small_batch *s, int vocab, uint64_t seed) {
  struct mt_rng r = mt_rng_make(seed, 9);
  const int cu[SMALL_SEQUENCES + 1] = {0, 9, 10, 21};
  s->b = (struct mt_batch){.token_count = SMALL_TOKENS,
                           .valid_count = 21,
                           .sequence_count = 3,
                           .ids = s->ids,
                           .positions = s->positions,
                           .labels = s->labels,
                           .cu_seqlens = s->cu};
  memset(s->ids, 0, sizeof s->ids);
  memset(s->positions, 0, sizeof s->positions);
  for (int i = 0; i <= SMALL_SEQUENCES; i++) s->cu[i] = cu[i];
  for (int i = 0; i < SMALL_TOKENS; i++) s->labels[i] = MT_IGNORE;
  for (int q = 0; q < SMALL_SEQUENCES; q++) {
    for (int i = cu[q]; i < cu[q + 1]; i++) {
      s->ids[i] = (int32_t)mt_rng_below(&r, (uint32_t)vocab);
      s->positions[i] = i - cu[q];
    }
    for (int i = cu[q] + 1; i + 1 < cu[q + 1]; i++) {
      s->labels[i] = s->ids[i + 1];
      s->b.target_count++;
    }
  }
}

/* At least n normal numbers of a stream, kept for the next who asks: tests make the same small
 * models some hundred times, and drawing their weights took as long as all else. */
static inline const double *small_normals(uint64_t seed, uint64_t stream, int64_t n) {
  static struct {
    uint64_t seed, stream;
    int64_t count;
    double *x;
  } kept[128], *k;
  k = &kept[stream % (sizeof kept / sizeof *kept)];
  if (k->x && k->seed == seed && k->stream == stream && k->count >= n) return k->x;
  free(k->x);
  k->x = malloc((size_t)n * sizeof *k->x);
  assert_non_null(k->x);
  struct mt_rng r = mt_rng_make(seed, stream);
  for (int64_t i = 0; i < n; i++) k->x[i] = mt_rng_normal(&r);
  k->seed = seed, k->stream = stream, k->count = n;
  return k->x;
}

/* Fills every parameter's master (and its rounded compute copy) from one seed. */
static inline void small_weights(struct mt_model *m, uint64_t seed) {
  for (int i = 0; i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    int64_t n = mt_param_count(p);
    const double *normal = small_normals(seed, (uint64_t)i, n);
    double *x = malloc((size_t)n * sizeof *x);
    for (int64_t k = 0; k < n; k++) x[k] = p->rank == 1 ? 1 + 0.2 * normal[k] : 0.4 * normal[k];
    void *raw = malloc((size_t)n * sizeof(double));
    struct mt_tensor *forms[] = {&p->compute, &p->master};
    for (int f = 0; f < 2; f++) {
      if (!forms[f]->data) continue;
      mt_dtype_convert(raw, forms[f]->dtype, x, MT_F64, (size_t)n);
      OK(m->be->upload(m->be, forms[f]->data, raw, mt_bytes(forms[f])));
    }
    free(raw);
    free(x);
  }
  OK(mt_model_quantize_weights(m));
}

struct small_model {
  struct mt_backend be;
  struct mt_model m;
};

static inline void small_open(struct small_model *s, const char *backend, const char *recipe,
                              const struct mt_config *config, struct mt_model_options options) {
  struct mt_params params;
  OK(mt_backend_create(&s->be, backend, 2));
  OK(mt_params_build(config, NULL, &params));
  options.token_capacity = SMALL_TOKENS;
  options.sequence_capacity = SMALL_SEQUENCES;
  OK(mt_model_create(&s->m, config, &params, mt_recipe_find(recipe), &s->be, &options));
  small_weights(&s->m, 3);
}

static inline void small_close(struct small_model *s) {
  mt_model_destroy(&s->m);
  mt_backend_destroy(&s->be);
}

#endif
