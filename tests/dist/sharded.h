/* Models whose experts lie on several ranks, beside whole ones. */
#ifndef TESTS_DIST_SHARDED_H
#define TESTS_DIST_SHARDED_H

#include "dist/dist.h"
#include "model/small.h"

enum { EXPERTS = 24 };

static inline struct mt_config config(void) {
  struct mt_config c = small_config();
  c.experts = EXPERTS;
  c.aux_coef = 0.1;
  return c;
}

/* Different batches of different lengths; every third rank's are shorter, and the second of them
 * has no token at all. */
static inline void batch_of(struct small_batch *s, int vocab, int rank, int pass) {
  small_batch(s, vocab, (uint64_t)(rank * 10 + pass + 1));
  if (rank % 3 != 1) return;
  int keep = pass % 2 == 0 ? 10 : 0;
  s->b.valid_count = keep;
  for (int i = 1; i <= SMALL_SEQUENCES; i++) s->cu[i] = s->cu[i] < keep ? s->cu[i] : keep;
  s->b.target_count = 0;
  for (int i = 0; i < SMALL_TOKENS; i++) {
    if (i >= keep) s->ids[i] = s->positions[i] = 0, s->labels[i] = MT_IGNORE;
    s->b.target_count += s->labels[i] != MT_IGNORE;
  }
}

struct run {
  struct mt_backend *be, own;
  struct mt_model m;
};

/* On the GPU of `dist_be` where that is one. */
static inline void open_run(struct run *r, const char *recipe, struct mt_model_options options,
                            const struct mt_config *c, const struct mt_shard *shard) {
  struct mt_params params;
  memset(r, 0, sizeof *r);
  r->be = dist_be.memory_used ? &dist_be : &r->own;
  if (!dist_be.memory_used)
    OK(mt_backend_create(&r->own, strcmp(recipe, "fp64") == 0 ? "ref" : "cpu", 1));
  OK(mt_params_build(c, shard, &params));
  if (!options.token_capacity) options.token_capacity = SMALL_TOKENS;
  if (!options.sequence_capacity) options.sequence_capacity = SMALL_SEQUENCES;
  if (shard) options.shard = *shard;
  OK(mt_model_create(&r->m, c, &params, mt_recipe_find(recipe), r->be, &options));
}

static inline void close_run(struct run *r) {
  mt_model_destroy(&r->m);
  mt_backend_destroy(&r->own);
}

/* The shard's slices of a whole model's weights. */
static inline void take_weights(struct run *to, const struct run *whole) {
  for (int i = 0; i < to->m.params.count; i++) {
    struct mt_param *p = &to->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    struct mt_tensor *form[] = {&p->compute, &p->master};
    const struct mt_tensor *from[] = {&w->compute, &w->master};
    for (int f = 0; f < 2; f++) {
      if (!form[f]->data || (f == 1 && p->master.data == p->compute.data)) continue;
      size_t skip = mt_bytes(from[f]) / (size_t)w->dim[0] * (size_t)p->first;
      OK(to->be->copy(to->be, form[f]->data, (const char *)from[f]->data + skip,
                      mt_bytes(form[f])));
    }
  }
  OK(to->be->sync(to->be));
}

/* What rank 0 alone has worked out, an arena of a model that all have alike: to everyone. Ranks are
 * more than cores, and each would work out the same. */
static inline void take_from_rank_0(struct run *r, const struct mt_arena *arena) {
  size_t bytes = arena->capacity_bytes;
  if (world.size == 1) return;
  void *host = malloc(bytes);
  assert_non_null(host);
  if (world.rank == 0) OK(r->be->download(r->be, host, arena->base, bytes));
  OK(mt_comm_broadcast(&everyone, host, bytes, 0));
  if (world.rank != 0) OK(r->be->upload(r->be, arena->base, host, bytes));
  OK(r->be->sync(r->be));
  free(host);
}

/* A tensor's numbers; the caller's to free. */
static inline double *values_of(const struct run *r, const struct mt_tensor *t) {
  size_t n = (size_t)mt_count(t);
  double *x = malloc(n * sizeof *x + 1);
  void *raw = malloc(mt_bytes(t) + 1);
  assert_non_null(x);
  assert_non_null(raw);
  OK(r->be->download(r->be, raw, t->data, mt_bytes(t)));
  mt_dtype_convert(x, MT_F64, raw, t->dtype, n);
  free(raw);
  return x;
}

#endif
