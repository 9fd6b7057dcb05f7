#include "par/collect.h"

#include <stdlib.h>

struct mt_tensor mt_param_form(const struct mt_param *p, enum mt_form form) {
  switch (form) {
#define X(form, field)                                                                             \
  case MT_FORM_##form:                                                                             \
    return p->field;
    MT_FORM_LIST(X)
#undef X
  default:
    return (struct mt_tensor){0};
  }
}

struct mt_tensor mt_model_share(const struct mt_model *m, enum mt_sync sync, enum mt_form form) {
  switch (form) {
  case MT_FORM_MASTER:
    return m->share[sync].master;
  case MT_FORM_M:
    return m->share[sync].m;
  case MT_FORM_V:
    return m->share[sync].v;
  default:
    return (struct mt_tensor){0};
  }
}

static bool sharded(const struct mt_model *m, enum mt_form form) {
  if (m->options.zero == 0 || form == MT_FORM_COMPUTE) return false;
  return form != MT_FORM_MASTER || m->recipe->act != m->recipe->state;
}

/* Of each stage its table and buckets: this rank's own, those of the others made when state that is
 * cut over ranks is first asked for. */
struct mt_stage_tables {
  struct mt_params params;
  struct mt_buckets buckets;
  bool own;
};

static mt_err open_stage(const struct mt_ranks *r, int stage, struct mt_stage_tables *out) {
  const struct mt_config *c = &r->model->config;
  out->own = stage == r->mesh.pp_rank;
  if (out->own) {
    out->params = r->model->params;
    out->buckets = r->buckets;
    return MT_OK;
  }
  struct mt_mesh there = mt_mesh_of(&r->mesh, c, stage * r->mesh.dp * r->mesh.ep);
  struct mt_shard shard = mt_ranks_shard(&there);
  struct mt_sharers sharers = mt_ranks_sharers(&there);
  MT_TRY(mt_params_build(c, &shard, &out->params));
  for (int i = 0; i < out->params.count; i++) {
    struct mt_param *p = &out->params.row[i];
    p->learns = mt_params_find(r->whole, p->kind, p->layer)->learns;
  }
  return mt_buckets_build(&out->params, &sharers, r->model->options.bucket_elements, &out->buckets);
}

void mt_ranks_end_collecting(struct mt_ranks *r) {
  for (int i = 0; r->stages && i < r->mesh.pp; i++) {
    if (r->stages[i].own) continue;
    mt_params_free(&r->stages[i].params);
    mt_buckets_free(&r->stages[i].buckets);
  }
  free(r->stages);
  r->stages = NULL;
}

static mt_err open_stages(struct mt_ranks *r) {
  mt_err err = MT_OK;
  r->stages = calloc((size_t)r->mesh.pp, sizeof *r->stages);
  if (!r->stages) return mt_fail(MT_ENOMEM, "tables of %d stages", r->mesh.pp);
  for (int i = 0; !err && i < r->mesh.pp; i++) err = open_stage(r, i, &r->stages[i]);
  if (err) mt_ranks_end_collecting(r);
  return err;
}

/* Which of the ranks that share it keeps element `at` of the stage's row, and how many from there.
 */
static int sharer(const struct mt_ranks *r, const struct mt_stage_tables *s,
                  const struct mt_param *whole, int64_t at, int64_t *run) {
  int row = (int)(mt_params_find(&s->params, whole->kind, whole->layer) - s->params.row);
  int64_t pos = s->buckets.at[row] + at, n;
  int ranks = mt_ranks_sharers(&r->mesh).count[whole->sync];
  for (int i = 0; i < s->buckets.count; i++) {
    const struct mt_bucket *k = &s->buckets.item[i];
    if (k->sync != whole->sync || pos < k->begin || pos >= k->begin + k->count) continue;
    for (int p = 0; p < ranks; p++) {
      int64_t begin = k->begin + mt_bucket_part(k->count, ranks, p, &n);
      if (pos < begin || pos >= begin + n) continue;
      if (begin + n - pos < *run) *run = begin + n - pos;
      return p;
    }
  }
  return 0;
}

/* Who holds element `at` of the whole parameter's form (the first of those that do), and how many
 * follow there. */
static mt_err holder(struct mt_ranks *r, const struct mt_param *whole, enum mt_form form,
                     int64_t at, int *rank, int64_t *run) {
  const struct mt_mesh *m = &r->mesh;
  bool expert = whole->sync == MT_SYNC_EXPERT;
  int64_t all = mt_param_count(whole), held = expert ? all / m->ep : all;
  int ep_rank = (int)(at / held), stage = 0, index = 0;
  *run = (ep_rank + 1) * held - at;
  if (whole->layer >= 0) stage = mt_mesh_stage(m, &r->model->config, whole->layer);
  if (whole->layer < 0 && whole->kind != MT_PARAM_EMBED) stage = m->pp - 1;
  *rank = stage * m->dp * m->ep + ep_rank;
  if (!sharded(r->model, form)) return MT_OK;
  if (!r->stages) MT_TRY(open_stages(r));
  index = sharer(r, &r->stages[stage], whole, at - ep_rank * held, run);
  *rank += expert ? index * m->ep : index;
  return MT_OK;
}

/* The row of what is here; not EMBED's for a tied head. */
static const struct mt_param *here(const struct mt_ranks *r, const struct mt_param *whole) {
  const struct mt_param *p = mt_params_find(&r->model->params, whole->kind, whole->layer);
  return p && p->kind == whole->kind ? p : NULL;
}

static mt_err take(struct mt_ranks *r, const struct mt_param *whole, enum mt_form form, int64_t at,
                   int64_t count, void *out) {
  const struct mt_model *m = r->model;
  const struct mt_param *p = here(r, whole);
  if (!p) return mt_fail(MT_EINVAL, "'%s' is not on rank %d", whole->name, r->world->rank);
  struct mt_tensor t = mt_param_form(p, form);
  int64_t from = at - p->first * (mt_param_count(whole) / whole->dim[0]), begin, n, state;
  if (sharded(m, form)) {
    t = mt_model_share(m, p->sync, form);
    if (!mt_buckets_run(&m->buckets, &m->params, (int)(p - m->params.row), from, &begin, &n,
                        &state) ||
        begin != from || n < count)
      return mt_fail(MT_EINVAL, "the state of '%s' is not on rank %d", p->name, r->world->rank);
    from = state;
  }
  size_t item = mt_dtype_bytes(t.dtype);
  return m->be->download(m->be, out, (const char *)t.data + (size_t)from * item,
                         (size_t)count * item);
}

mt_err mt_ranks_collect(struct mt_ranks *r, const struct mt_param *whole, enum mt_form form,
                        int64_t begin, int64_t count, void *out) {
  struct mt_comm *c = &r->comm[MT_GROUP_WORLD];
  const struct mt_recipe *recipe = r->model->recipe;
  size_t item = mt_dtype_bytes(form == MT_FORM_COMPUTE ? recipe->act : recipe->state);
  for (int64_t at = begin, n; at < begin + count; at += n) {
    int from;
    MT_TRY(holder(r, whole, form, at, &from, &n));
    if (n > begin + count - at) n = begin + count - at;
    char *piece = (char *)out + (size_t)(at - begin) * item;
    if (c->rank == from) MT_TRY(take(r, whole, form, at, n, piece));
    if (from == 0) continue;
    if (c->rank == from) MT_TRY(mt_comm_send(c, piece, (size_t)n * item, 0, NULL));
    if (c->rank == 0) MT_TRY(mt_comm_recv(c, piece, (size_t)n * item, from, NULL));
  }
  return MT_OK;
}
