#include "par/ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "par/exchange.h"
#include "par/nccl.h"

enum { SETTLE_S = 5 }; /* as long as who fails alone gives the others to come: mt_world_end */

struct mt_shard mt_ranks_shard(const struct mt_mesh *mesh) {
  return (struct mt_shard){.expert_begin = (int)mesh->expert_begin,
                           .expert_end = (int)mesh->expert_end,
                           .layer_begin = (int)mesh->layer_begin,
                           .layer_end = (int)mesh->layer_end};
}

struct mt_sharers mt_ranks_sharers(const struct mt_mesh *mesh) {
  struct mt_group_span dense = mt_mesh_group(mesh, MT_GROUP_DENSE);
  struct mt_group_span data = mt_mesh_group(mesh, MT_GROUP_DATA);
  return (struct mt_sharers){
      .count = {[MT_SYNC_DENSE] = dense.count, [MT_SYNC_EXPERT] = data.count},
      .index = {[MT_SYNC_DENSE] = dense.index, [MT_SYNC_EXPERT] = data.index}};
}

mt_err mt_ranks_open(struct mt_ranks *r, struct mt_world *world, const struct mt_mesh *mesh) {
  mt_err err = MT_OK;
  *r = (struct mt_ranks){.world = world, .mesh = *mesh};
  for (int g = 0; g < MT_GROUP_COUNT; g++) {
    MT_GO(mt_world_group(world, mesh, (enum mt_group)g, &r->comm[g]));
  }
  MT_GO(mt_world_group(world, mesh, MT_GROUP_DENSE, &r->late[MT_SYNC_DENSE]));
  MT_GO(mt_world_group(world, mesh, MT_GROUP_DATA, &r->late[MT_SYNC_EXPERT]));
done:
  if (err) mt_ranks_close(r);
  return err;
}

/* The squares of this rank's parts, one a bucket at a time, and of all ranks or stages. */
static size_t squares_bytes(const struct mt_ranks *r) {
  int readers = r->comm[MT_GROUP_DENSE].size, stages = r->comm[MT_GROUP_PIPE].size;
  return (1 + (size_t)(readers > stages ? readers : stages)) * sizeof(double);
}

static mt_err settle_one(struct mt_comm *c, double *limit_s) {
  bool over;
  mt_err err = mt_comm_settle(c, *limit_s, &over);
  if (!over) *limit_s = 0; /* whoever does not come here does not come elsewhere */
  return err;
}

void mt_ranks_settle(struct mt_ranks *r) {
  char why[1024];
  double limit_s = r->well ? r->world->timeout_s : SETTLE_S;
  mt_err err = MT_OK;
  snprintf(why, sizeof why, "%s", mt_error_message());
  (void)settle_one(&r->gpu_back, &limit_s); /* these can be given up */
  for (int g = 0; g < MT_GROUP_COUNT; g++) (void)settle_one(&r->gpu[g], &limit_s);
  for (int g = 0; !err && g < MT_GROUP_COUNT; g++) err = settle_one(&r->comm[g], &limit_s);
  for (int s = 0; !err && s < MT_SYNC_COUNT; s++) err = settle_one(&r->late[s], &limit_s);
  if (err) mt_world_abort(r->world, *why ? why : mt_error_message());
  (void)mt_fail(MT_OK, "%s", why);
}

void mt_ranks_leave(struct mt_ranks *r) {
  if (r->model) mt_exchange_close(r->model);
  mt_pipeline_close(&r->pipeline);
  if (r->squares) r->model->be->mem_free(r->model->be, r->squares, squares_bytes(r));
  mt_sum_free(&r->sum);
  mt_ranks_end_overlap(r);
  mt_ranks_end_collecting(r);
  mt_buckets_free(&r->buckets);
  free(r->views);
  r->squares = NULL;
  r->views = NULL;
  r->whole = NULL;
  r->model = NULL;
  r->begun = r->behind = false;
}

void mt_ranks_close(struct mt_ranks *r) {
  mt_ranks_settle(r);
  mt_ranks_leave(r);
  for (int sync = 0; sync < MT_SYNC_COUNT; sync++) mt_comm_destroy(&r->late[sync]);
  mt_comm_destroy(&r->gpu_back);
  for (int g = 0; g < MT_GROUP_COUNT; g++) {
    mt_comm_destroy(&r->gpu[g]);
    mt_comm_destroy(&r->comm[g]);
  }
  *r = (struct mt_ranks){0};
}

/* Groups whose tensors need a communicator of their own on a GPU. */
static bool has_tensors(enum mt_group group, int size) {
  return group != MT_GROUP_WORLD && size > 1;
}

int mt_ranks_gpu_comms(const struct mt_mesh *mesh) {
  int n = mesh->pp > 1; /* what goes back in the pipeline */
  for (int g = 0; g < MT_GROUP_COUNT; g++)
    n += has_tensors((enum mt_group)g, mt_mesh_group(mesh, (enum mt_group)g).count);
  return n;
}

/* Communicators for what is in the backend's memory: where that is the host's, the ones there are.
 */
static mt_err open_tensor_comms(struct mt_ranks *r, struct mt_backend *be) {
  for (int g = 0; g < MT_GROUP_COUNT; g++) {
    r->tensor[g] = &r->comm[g];
    if (!be->memory_used || !has_tensors((enum mt_group)g, r->comm[g].size)) continue;
    if (!r->gpu[g].impl) MT_TRY(mt_comm_device(&r->comm[g], be, &r->gpu[g]));
    r->tensor[g] = &r->gpu[g];
  }
  return MT_OK;
}

/* Buckets of this rank's place; those of a model with sharded state must be the same. */
static mt_err open_buckets(struct mt_ranks *r, const struct mt_model *m) {
  struct mt_sharers s = mt_ranks_sharers(&r->mesh);
  if (!m->options.training) return MT_OK;
  if (m->options.zero > 0 && memcmp(&s, &m->options.sharers, sizeof s) != 0) {
    return mt_fail(MT_EINVAL, "the model's state is not cut for rank %d of %d", r->mesh.rank,
                   r->mesh.world);
  }
  return mt_buckets_build(&m->params, &s, m->options.bucket_elements, &r->buckets);
}

static mt_err begin_backward(void *context, int micro, int micro_count) {
  return mt_ranks_begin(context, micro, micro_count);
}

mt_err mt_ranks_join(struct mt_ranks *r, struct mt_model *m) {
  void *squares = NULL;
  MT_TRY(open_buckets(r, m));
  MT_TRY(open_tensor_comms(r, m->be));
  r->views = calloc((size_t)m->params.count, sizeof *r->views);
  if (!r->views) return mt_fail(MT_ENOMEM, "%d gradients", m->params.count);
  r->model = m;
  r->sum.be = m->be;
  MT_TRY(m->be->mem_alloc(m->be, squares_bytes(r), &squares));
  r->squares = squares;
  MT_TRY(mt_exchange_over(m, r->tensor[MT_GROUP_EXPERT], r->tensor[MT_GROUP_DENSE]));
  if (r->mesh.pp == 1) return MT_OK;
  struct mt_comm *host = &r->comm[MT_GROUP_PIPE], *forth = r->tensor[MT_GROUP_PIPE], *back = forth;
  if (forth != host) {
    back = &r->gpu_back;
    if (!back->impl) MT_TRY(mt_comm_device(host, m->be, back));
  }
  MT_TRY(mt_pipeline_open(&r->pipeline, m, forth, back, host));
  r->pipeline.begin = begin_backward;
  r->pipeline.begin_context = r;
  return MT_OK;
}

mt_err mt_ranks_failed(struct mt_ranks *r) {
  for (int g = 0; g < MT_GROUP_COUNT; g++) MT_TRY(mt_comm_failed(&r->gpu[g]));
  return mt_comm_failed(&r->gpu_back);
}

/* Everyone's numbers in the order of the group's ranks; *all is the caller's to free. */
static mt_err gather(struct mt_comm *c, const void *mine, size_t bytes, char **all) {
  *all = malloc((size_t)c->size * bytes);
  if (!*all) return mt_fail(MT_ENOMEM, "numbers of %d ranks", c->size);
  memcpy(*all + (size_t)c->rank * bytes, mine, bytes);
  return mt_comm_gather_each(c, *all, bytes);
}

static mt_err sum_counts(struct mt_comm *c, int64_t *numbers, int n) {
  size_t bytes = (size_t)n * sizeof *numbers;
  char *all = NULL;
  mt_err err = gather(c, numbers, bytes, &all);
  if (!err) memset(numbers, 0, bytes);
  for (int i = 0; !err && i < c->size; i++) {
    const int64_t *one = (const int64_t *)(const void *)(all + (size_t)i * bytes);
    for (int k = 0; k < n; k++) numbers[k] += one[k];
  }
  free(all);
  return err;
}

static mt_err sum(struct mt_comm *c, double *numbers, int n) {
  size_t bytes = (size_t)n * sizeof *numbers;
  char *all = NULL;
  mt_err err = gather(c, numbers, bytes, &all);
  if (!err) memset(numbers, 0, bytes);
  for (int i = 0; !err && i < c->size; i++) {
    const double *one = (const double *)(const void *)(all + (size_t)i * bytes);
    for (int k = 0; k < n; k++) numbers[k] += one[k];
  }
  free(all);
  return err;
}

mt_err mt_ranks_sum_counts(struct mt_ranks *r, int64_t *numbers, int n) {
  return sum_counts(&r->comm[MT_GROUP_DENSE], numbers, n);
}

mt_err mt_ranks_sum(struct mt_ranks *r, double *numbers, int n) {
  return sum(&r->comm[MT_GROUP_DENSE], numbers, n);
}

mt_err mt_ranks_sum_stage_counts(struct mt_ranks *r, int64_t *numbers, int n) {
  return sum_counts(&r->comm[MT_GROUP_PIPE], numbers, n);
}

mt_err mt_ranks_sum_stages(struct mt_ranks *r, double *numbers, int n) {
  return sum(&r->comm[MT_GROUP_PIPE], numbers, n);
}

bool mt_ranks_staged(const struct mt_ranks *r) {
  return r && r->mesh.pp > 1;
}

/* What a pass gave, which has been waited for, unless a transfer that it used has failed. */
static mt_err believed(struct mt_ranks *r, mt_err err) {
  return !err && r ? mt_ranks_failed(r) : err;
}

mt_err mt_ranks_eval(struct mt_ranks *r, struct mt_model *m, int i, const struct mt_batch *batch,
                     struct mt_loss *loss) {
  mt_err err = mt_ranks_staged(r) ? mt_pipeline_eval(&r->pipeline, i, batch, loss)
                                  : mt_model_eval_pass(m, batch, loss);
  return believed(r, err);
}

mt_err mt_ranks_eval_end(struct mt_ranks *r, struct mt_loss *total) {
  return mt_ranks_staged(r) ? believed(r, mt_pipeline_eval_end(&r->pipeline, total)) : MT_OK;
}

mt_err mt_ranks_decode(struct mt_ranks *r, struct mt_model *m, struct mt_kv_cache *cache,
                       const int32_t *ids, int count, float *logits) {
  mt_err err = mt_ranks_staged(r) ? mt_pipeline_decode(&r->pipeline, cache, ids, count, logits)
                                  : mt_model_decode(m, cache, ids, count, logits);
  return believed(r, err);
}

mt_err mt_ranks_logits(struct mt_ranks *r, struct mt_model *m, int64_t begin, int64_t count,
                       float *out) {
  mt_err err = mt_ranks_staged(r) ? mt_pipeline_logits(&r->pipeline, begin, count, out)
                                  : mt_model_logits(m, begin, count, out);
  return believed(r, err);
}

mt_err mt_ranks_token(struct mt_ranks *r, int32_t *id) {
  return r ? mt_comm_broadcast(&r->comm[MT_GROUP_WORLD], id, sizeof *id, 0) : MT_OK;
}

/* A number for each parameter: the bits of its sum of squares; 0 where it is held in 8 bits alone.
 */
static mt_err weigh(struct mt_ranks *r, uint64_t *of) {
  struct mt_model *m = r->model;
  mt_acts_enter(&m->acts, m->be, MT_ROOM_ENDS); /* for its workspace */
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    struct mt_tensor w = p->compute.data ? p->compute : p->master;
    of[i] = 0;
    if (!w.data || mt_count(&w) != mt_param_count(p)) continue;
    const struct mt_sumsq_args a = {.tensors = &w, .tensor_count = 1, .out = r->squares};
    MT_TRY(m->be->ops.sumsq(m->be, &a));
    MT_TRY(m->be->download(m->be, &of[i], r->squares, sizeof *of));
  }
  return MT_OK;
}

mt_err mt_ranks_same_weights(struct mt_ranks *r, const char *dir) {
  const struct mt_params *rows = &r->model->params;
  size_t bytes = (size_t)rows->count * sizeof(uint64_t);
  uint64_t *mine = calloc(2, bytes);
  if (!mine) return mt_world_meet(r->world, mt_fail(MT_ENOMEM, "%d weights", rows->count), NULL);
  uint64_t *theirs = mine + rows->count;
  const struct mt_param *other = NULL;
  mt_err err = mt_world_meet(r->world, weigh(r, mine), NULL);
  for (int sync = 0; !err && sync < MT_SYNC_COUNT; sync++) {
    enum mt_group group = sync == MT_SYNC_DENSE ? MT_GROUP_DENSE : MT_GROUP_DATA;
    memcpy(theirs, mine, bytes);
    err = mt_comm_broadcast(&r->comm[group], theirs, bytes, 0);
    for (int i = 0; i < rows->count && !other; i++) {
      if (rows->row[i].sync == (enum mt_sync)sync && mine[i] != theirs[i]) other = &rows->row[i];
    }
  }
  if (!err && other)
    err = mt_fail(MT_EINVAL,
                  "%s: '%s' is not what another rank has read: is it the same checkpoint on all "
                  "hosts?",
                  dir, other->name);
  free(mine);
  return mt_world_meet(r->world, err, NULL);
}

struct mt_comm *mt_ranks_sharing(struct mt_ranks *r, enum mt_sync sync) {
  return r->tensor[sync == MT_SYNC_DENSE ? MT_GROUP_DENSE : MT_GROUP_DATA];
}

/* Where a bucket lies in a form that has the class in one stretch: gradients, or what operations
 * read. */
char *mt_ranks_bucket(const struct mt_ranks *r, const struct mt_bucket *k, bool compute) {
  const struct mt_param *p = &r->model->params.row[k->first];
  const struct mt_tensor *t = compute ? &p->compute : &p->grad;
  int64_t into = k->begin - r->buckets.at[k->first];
  return (char *)t->data + into * (int64_t)mt_dtype_bytes(t->dtype);
}

/* r->squares[0] += the squares of this rank's part of a bucket, of parameters that lie there. */
static mt_err add_squares(struct mt_ranks *r, const struct mt_bucket *k) {
  struct mt_model *m = r->model;
  int64_t begin = k->begin + k->own, end = begin + k->owned;
  int count = 0;
  for (int i = k->first; i <= k->last; i++) {
    const struct mt_param *p = &m->params.row[i];
    int64_t at = r->buckets.at[i], from = begin > at ? begin : at, to = at + mt_param_count(p);
    if (to > end) to = end;
    if (p->sync != k->sync || !p->learns || from >= to) continue;
    char *data = (char *)p->grad.data + (from - at) * (int64_t)mt_dtype_bytes(p->grad.dtype);
    if (mt_model_grad_shared(m, k->sync)) {
      const struct mt_tensor *share = &m->share[k->sync].grad;
      data =
          (char *)share->data + (k->state + from - begin) * (int64_t)mt_dtype_bytes(share->dtype);
    }
    r->views[count++] = mt_vec(data, p->grad.dtype, to - from);
  }
  if (count == 0) return MT_OK;
  /* The sum so far is one of the parts of the next; it may not lie where that is written. */
  MT_TRY(m->be->copy(m->be, r->squares + 1, r->squares, sizeof(double)));
  return m->be->ops.sumsq(m->be, &(struct mt_sumsq_args){.tensors = r->views,
                                                         .tensor_count = count,
                                                         .parts = r->squares + 1,
                                                         .part_count = 1,
                                                         .out = r->squares});
}

static mt_err sum_bucket(struct mt_ranks *r, const struct mt_bucket *k) {
  struct mt_comm *c = mt_ranks_sharing(r, k->sync);
  enum mt_dtype dtype = r->model->recipe->grad;
  int64_t own, owned;
  char *grad = mt_ranks_bucket(r, k, false);
  if (r->model->options.zero > 0)
    return mt_sum_scatter(&r->sum, c, grad, dtype, k->count, &own, &owned);
  return mt_sum_bucket(&r->sum, c, grad, dtype, k->count, &own, &owned);
}

/* *sumsq (=) squares[0] of every member of a group, added up in their order. */
static mt_err sum_squares(struct mt_ranks *r, enum mt_group group, double *sumsq) {
  struct mt_backend *be = r->model->be;
  struct mt_comm *c = r->tensor[group];
  MT_TRY(be->copy(be, r->squares + 1 + c->rank, r->squares, sizeof(double)));
  MT_TRY(mt_comm_gather_each(c, r->squares + 1, sizeof(double)));
  return be->ops.sumsq(
      be, &(struct mt_sumsq_args){.parts = r->squares + 1, .part_count = c->size, .out = sumsq});
}

mt_err mt_ranks_gradients(struct mt_ranks *r, double *sumsq) {
  MT_TRY(r->model->be->zero(r->model->be, r->squares, squares_bytes(r)));
  bool begun = r->begun;
  if (begun) MT_TRY(mt_ranks_finish(r));
  if (!begun && r->model->options.zero > 1)
    return mt_fail(MT_EINVAL, "sharded gradients of a backward that nobody has begun");
  for (int i = 0; i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    if (!begun) MT_TRY(sum_bucket(r, k));
    MT_TRY(add_squares(r, k));
  }
  if (r->mesh.pp == 1) return sum_squares(r, MT_GROUP_DENSE, sumsq);
  MT_TRY(sum_squares(r, MT_GROUP_DENSE, r->squares));
  MT_TRY(mt_phase_enter(r->model, MT_PHASE_PIPELINE)); /* the last stage waits for the first */
  MT_TRY(sum_squares(r, MT_GROUP_PIPE, sumsq));
  return mt_phase_enter(r->model, MT_PHASE_OPTIMIZER);
}

/* All of a row that learns, of which each rank has its parts. whole: its memory. */
static mt_err gather_row(struct mt_ranks *r, int row, struct mt_tensor whole) {
  const struct mt_param *p = &r->model->params.row[row];
  int64_t at = r->buckets.at[row], end = at + mt_param_count(p);
  for (int i = 0; i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    int64_t from = k->begin > at ? k->begin : at, to = k->begin + k->count;
    if (to > end) to = end;
    if (k->sync != p->sync || from >= to) continue;
    char *here = (char *)whole.data + (size_t)(from - at) * mt_dtype_bytes(whole.dtype);
    MT_TRY(mt_sum_gather_run(&r->sum, mt_ranks_sharing(r, k->sync), here, whole.dtype, k->count,
                             from - k->begin, to - from));
  }
  return MT_OK;
}

/* The own parts of a row's master into a place for all of it. */
static mt_err put_master(struct mt_ranks *r, int row, struct mt_tensor whole) {
  const struct mt_model *m = r->model;
  const struct mt_tensor *share = &m->share[m->params.row[row].sync].master;
  size_t item = mt_dtype_bytes(whole.dtype);
  int64_t first, n, state;
  for (int64_t from = 0; mt_buckets_run(&m->buckets, &m->params, row, from, &first, &n, &state);
       from = first + n) {
    MT_TRY(m->be->copy(m->be, (char *)whole.data + (size_t)first * item,
                       (const char *)share->data + (size_t)state * item, (size_t)n * item));
  }
  return MT_OK;
}

/* Whether mt_model_quantize_weights finds no whole source. */
static bool quantized_here(const struct mt_ranks *r, const struct mt_param *p) {
  return r->model->options.zero > 0 && p->learns && p->q.format != MT_Q_NONE && !p->compute.data;
}

mt_err mt_ranks_quantize(struct mt_ranks *r) {
  struct mt_model *m = r->model;
  mt_acts_enter(&m->acts, m->be, MT_ROOM_ENDS);
  for (int row = 0; row < m->params.count; row++) {
    const struct mt_param *p = &m->params.row[row];
    struct mt_tensor whole = p->grad;
    if (!quantized_here(r, p)) continue;
    if (whole.dtype != m->recipe->state)
      return mt_fail(MT_EUNSUPPORTED, "'%s': gradient and master in two formats", p->name);
    MT_TRY(put_master(r, row, whole));
    MT_TRY(gather_row(r, row, whole));
    MT_TRY(mt_context(
        m->be->ops.quantize_weight(m->be, &(struct mt_quantize_weight_args){.w = whole, .q = p->q}),
        "'%s'", p->name));
  }
  return MT_OK;
}

mt_err mt_ranks_parameters(struct mt_ranks *r) {
  const struct mt_model *m = r->model;
  if (m->options.zero == 0) return MT_OK;
  bool by_rows = mt_model_gathers_rows(m);
  for (int i = 0; by_rows && i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (p->learns && p->compute.data) MT_TRY(gather_row(r, i, p->compute));
  }
  for (int i = 0; !by_rows && i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    MT_TRY(mt_sum_gather(&r->sum, mt_ranks_sharing(r, k->sync), mt_ranks_bucket(r, k, true),
                         m->recipe->act, k->count));
  }
  return m->recipe->act == m->recipe->state ? mt_model_quantize_weights(r->model)
                                            : mt_ranks_quantize(r);
}
