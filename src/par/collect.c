#include "par/collect.h"

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

/* Who holds element `at` of the whole parameter (the first of those that do), and how many follow
 * there. */
static int holder(const struct mt_ranks *r, const struct mt_param *whole, int64_t at,
                  int64_t *run) {
  const struct mt_mesh *m = &r->mesh;
  int64_t all = mt_param_count(whole);
  int ep_rank = 0, stage = 0;
  *run = all - at;
  if (whole->sync == MT_SYNC_EXPERT) {
    int64_t held = all / m->ep;
    ep_rank = (int)(at / held);
    *run = (ep_rank + 1) * held - at;
  }
  if (whole->layer >= 0) stage = mt_mesh_stage(m, &r->model->config, whole->layer);
  if (whole->layer < 0 && whole->kind != MT_PARAM_EMBED) stage = m->pp - 1;
  return stage * m->dp * m->ep + ep_rank;
}

/* The row of what is here; not EMBED's for a tied head. */
static const struct mt_param *here(const struct mt_ranks *r, const struct mt_param *whole) {
  const struct mt_param *p = mt_params_find(&r->model->params, whole->kind, whole->layer);
  return p && p->kind == whole->kind ? p : NULL;
}

static mt_err take(struct mt_ranks *r, const struct mt_param *whole, enum mt_form form, int64_t at,
                   int64_t count, void *out) {
  const struct mt_param *p = here(r, whole);
  if (!p) return mt_fail(MT_EINVAL, "'%s' is not on rank %d", whole->name, r->world->rank);
  struct mt_tensor t = mt_param_form(p, form);
  size_t item = mt_dtype_bytes(t.dtype);
  int64_t first = p->first * (mt_param_count(whole) / whole->dim[0]);
  return r->model->be->download(
      r->model->be, out, (const char *)t.data + (size_t)(at - first) * item, (size_t)count * item);
}

mt_err mt_ranks_collect(struct mt_ranks *r, const struct mt_param *whole, enum mt_form form,
                        int64_t begin, int64_t count, void *out) {
  struct mt_comm *c = &r->comm[MT_GROUP_WORLD];
  const struct mt_recipe *recipe = r->model->recipe;
  size_t item = mt_dtype_bytes(form == MT_FORM_COMPUTE ? recipe->act : recipe->state);
  for (int64_t at = begin, n; at < begin + count; at += n) {
    int from = holder(r, whole, at, &n);
    if (n > begin + count - at) n = begin + count - at;
    char *piece = (char *)out + (size_t)(at - begin) * item;
    if (c->rank == from) MT_TRY(take(r, whole, form, at, n, piece));
    if (from == 0) continue;
    if (c->rank == from) MT_TRY(mt_comm_send(c, piece, (size_t)n * item, 0, NULL));
    if (c->rank == 0) MT_TRY(mt_comm_recv(c, piece, (size_t)n * item, from, NULL));
  }
  return MT_OK;
}
