/* Models whose experts lie on several ranks, beside whole ones. */
#ifndef TESTS_DIST_SHARDED_H
#define TESTS_DIST_SHARDED_H

#include "dist/dist.h"
#undef OK
#include "model/small.h"

enum { EXPERTS = 24 };

static inline struct mt_config config(void) {
  struct mt_config c = small_config();
  c.experts = EXPERTS;
  c.aux_coef = 0.1;
  return c;
}

/* Different batches of different lengths; that of rank 1 has no token at all but one. */
static inline void batch_of(struct small_batch *s, int vocab, int rank, int pass) {
  small_batch(s, vocab, (uint64_t)(rank * 10 + pass + 1));
  if (rank % 3 != 1) return;
  int keep = pass == 0 ? 10 : 9;
  s->b.valid_count = s->cu[2] = s->cu[3] = keep;
  s->b.target_count = 0;
  for (int i = 0; i < SMALL_TOKENS; i++) {
    if (i >= keep) s->ids[i] = s->positions[i] = 0, s->labels[i] = MT_IGNORE;
    s->b.target_count += s->labels[i] != MT_IGNORE;
  }
}

struct run {
  struct mt_backend be;
  struct mt_model m;
};

static inline void open_run(struct run *r, const char *recipe, struct mt_model_options options,
                            const struct mt_config *c, const struct mt_shard *shard) {
  struct mt_params params;
  OK(mt_backend_create(&r->be, strcmp(recipe, "fp64") == 0 ? "ref" : "cpu", 1));
  OK(mt_params_build(c, shard, &params));
  if (!options.token_capacity) options.token_capacity = SMALL_TOKENS;
  if (!options.sequence_capacity) options.sequence_capacity = SMALL_SEQUENCES;
  if (shard) options.shard = *shard;
  OK(mt_model_create(&r->m, c, &params, mt_recipe_find(recipe), &r->be, &options));
}

static inline void close_run(struct run *r) {
  mt_model_destroy(&r->m);
  mt_backend_destroy(&r->be);
}

/* The shard's slices of a whole model's weights. */
static inline void take_weights(struct run *to, const struct run *whole) {
  for (int i = 0; i < to->m.params.count; i++) {
    struct mt_param *p = &to->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    size_t skip = mt_bytes(&w->compute) / (size_t)w->dim[0] * (size_t)p->first;
    memcpy(p->compute.data, (const char *)w->compute.data + skip, mt_bytes(&p->compute));
  }
}

static inline double at(const struct mt_tensor *t, int64_t i) {
  return t->dtype == MT_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

#endif
