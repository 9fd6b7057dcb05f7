/* A backend that only counts: its memory may not be touched, its operations are those of
 * train/profile.h that run nothing. What is built and launched on it is the trainer's own code. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "data/dataset.h"
#include "par/ranks.h"
#include "train/optimizer.h"
#include "train/plan.h"

struct counter {
  struct mt_backend be;
  const struct mt_backend *inner;
  struct mt_profile profile;
  const struct mt_machine *machine;
  const struct mt_recipe *recipe;
  size_t taken_bytes;
  int64_t tokens, top_k, rows; /* T and K of this rank; rows that come to it */
  int ep, experts, held, chunks;
};

static mt_err reserve(struct mt_backend *be, size_t size_bytes, void **out) {
  struct counter *c = be->impl;
  void *p = mmap(NULL, size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *out = NULL;
  if (p == MAP_FAILED) return mt_fail(MT_ENOMEM, "no address space for %zu bytes", size_bytes);
  *out = p;
  c->taken_bytes += size_bytes;
  return MT_OK;
}

static void give_back(struct mt_backend *be, void *p, size_t size_bytes) {
  struct counter *c = be->impl;
  if (!p) return;
  munmap(p, size_bytes);
  c->taken_bytes -= size_bytes;
}

static mt_err upload(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  (void)be, (void)dst, (void)src, (void)size_bytes;
  return MT_OK;
}

/* Rows that come up to the end of a chunk's tokens. */
static int64_t rows_up_to(const struct counter *c, int chunk) {
  return c->rows * (c->tokens * chunk / c->chunks) / c->tokens;
}

/* All that a pass reads back is the loops' offsets of rows, a chunk after the other: evenly shared
 * ones. */
static mt_err download(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  const struct counter *c = be->impl;
  int32_t *offsets = dst;
  (void)src;
  memset(dst, 0, size_bytes);
  if (size_bytes != (size_t)c->chunks * (size_t)(c->held + 1) * sizeof *offsets) return MT_OK;
  for (int k = 0; k < c->chunks; k++) {
    int64_t rows = rows_up_to(c, k + 1) - rows_up_to(c, k);
    for (int e = 0; e <= c->held; e++) *offsets++ = (int32_t)(rows * e / c->held);
  }
  return MT_OK;
}

/* And over ranks each chunk's offsets of this rank's choices, then of what each rank sends here. */
static mt_err download_later(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  const struct counter *c = be->impl;
  int32_t *offsets = dst;
  (void)src;
  size_t count = (size_t)c->experts + 1 + (size_t)c->ep * (size_t)(c->held + 1);
  if (size_bytes != (size_t)c->chunks * count * sizeof *offsets)
    return mt_fail(MT_EUNSUPPORTED, "counts of no plan");
  for (int k = 0; k < c->chunks; k++) {
    int64_t tokens = c->tokens * (k + 1) / c->chunks - c->tokens * k / c->chunks;
    for (int e = 0; e <= c->experts; e++)
      *offsets++ = (int32_t)(tokens * c->top_k * e / c->experts);
  }
  for (int k = 0; k < c->chunks; k++) {
    int64_t come = rows_up_to(c, k + 1) - rows_up_to(c, k);
    for (int i = 0; i < c->ep; i++) {
      int64_t rows = come * (i + 1) / c->ep - come * i / c->ep;
      for (int e = 0; e <= c->held; e++) *offsets++ = (int32_t)(rows * e / c->held);
    }
  }
  return MT_OK;
}

static mt_err host_alloc(struct mt_backend *be, size_t size_bytes, void **out) {
  (void)be;
  *out = calloc(1, size_bytes);
  return *out ? MT_OK : mt_fail(MT_ENOMEM, "%zu bytes", size_bytes);
}

static void host_free(struct mt_backend *be, void *p) {
  (void)be;
  free(p);
}

static mt_err copy(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  return upload(be, dst, src, size_bytes);
}

static mt_err stamp(struct mt_backend *be, int slot) {
  (void)be, (void)slot;
  return MT_OK;
}

static void no_stream(struct mt_backend *be, void *stream) {
  (void)be, (void)stream;
}

static mt_err zero(struct mt_backend *be, void *p, size_t size_bytes) {
  (void)be, (void)p, (void)size_bytes;
  return MT_OK;
}

static size_t workspace_bytes(const struct mt_backend *be, const struct mt_limits *limits) {
  const struct counter *c = be->impl;
  return c->inner->workspace_bytes(c->inner, limits);
}

static double seconds_of(const void *context, int op, struct mt_work work) {
  const struct counter *c = context;
  return mt_machine_seconds(c->machine, c->recipe, op, work);
}

static void make_counter(struct counter *c, const struct mt_count_options *o) {
  *c = (struct counter){.inner = o->backend,
                        .machine = o->machine,
                        .recipe = o->recipe,
                        .tokens = o->model.token_capacity,
                        .top_k = o->config->top_k,
                        .chunks = o->mesh->ep > 1 && o->model.chunks > 1 ? o->model.chunks : 1,
                        .rows = o->rows,
                        .ep = o->mesh->ep,
                        .experts = o->config->experts,
                        .held = o->config->experts / o->mesh->ep};
  c->be = (struct mt_backend){.name = o->backend->name,
                              .thread_count = 1,
                              .impl = c,
                              .workspace_bytes = workspace_bytes,
                              .mem_alloc = reserve,
                              .mem_free = give_back,
                              .upload = upload,
                              .download = download,
                              .download_later = download_later,
                              .host_alloc = host_alloc,
                              .host_free = host_free,
                              .copy = copy,
                              .stamp = stamp,
                              .stamp_wait = stamp,
                              .zero = zero,
                              .on_stream = o->backend->on_stream ? no_stream : NULL,
                              .steps_ahead = 1};
  mt_profile_count(&c->profile, &c->be, o->sequence_length, seconds_of, c);
}

/* A group whose other members are not there: what is sent is counted (par/comm.c), nothing moves.
 */
static mt_err no_exchange(struct mt_comm *c, const void *send, struct mt_parts parts, void *recv,
                          struct mt_parts places, size_t unit_bytes, struct mt_transfer *t) {
  (void)c, (void)send, (void)parts, (void)recv, (void)places, (void)unit_bytes, (void)t;
  return MT_OK;
}

static mt_err no_gathering(struct mt_comm *c, void *buf, struct mt_parts parts, size_t unit_bytes,
                           struct mt_transfer *t) {
  (void)c, (void)buf, (void)parts, (void)unit_bytes, (void)t;
  return MT_OK;
}

static mt_err no_message(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                         struct mt_transfer *t) {
  (void)c, (void)buf, (void)size_bytes, (void)to, (void)t;
  return MT_OK;
}

static mt_err no_answer(struct mt_comm *c, void *buf, size_t size_bytes, int from,
                        struct mt_transfer *t) {
  return no_message(c, buf, size_bytes, from, t);
}

static mt_err no_wait(struct mt_comm *c, struct mt_transfer *t) {
  (void)c, (void)t;
  return MT_OK;
}

static struct mt_comm group_of(const struct mt_mesh *mesh, enum mt_group group) {
  struct mt_group_span span = mt_mesh_group(mesh, group);
  struct mt_comm c = mt_comm_self(mt_group_name(group));
  c.size = span.count;
  c.rank = span.index;
  c.all_to_all = no_exchange;
  c.all_gather = no_gathering;
  c.send = no_message;
  c.recv = no_answer;
  c.wait = no_wait;
  return c;
}

static mt_err join(struct mt_ranks *r, struct mt_model *m, const struct mt_mesh *mesh) {
  r->mesh = *mesh;
  for (int g = 0; g < MT_GROUP_COUNT; g++) r->comm[g] = group_of(mesh, (enum mt_group)g);
  r->late[MT_SYNC_DENSE] = group_of(mesh, MT_GROUP_DENSE);
  r->late[MT_SYNC_EXPERT] = group_of(mesh, MT_GROUP_DATA);
  return mt_ranks_join(r, m);
}

/* What the rows hold since the last time, which is forgotten. */
static void take_rows(struct counter *c, struct mt_work *work, double *seconds,
                      struct mt_count *ends) {
  *work = (struct mt_work){0};
  *seconds = 0;
  if (ends) ends->ends_s = 0;
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    struct mt_profile_row *r = &c->profile.row[i];
    const char *name = mt_op_name(i);
    work->flops += r->flops;
    work->bytes += r->bytes;
    *seconds += r->seconds;
    if (ends && (strncmp(name, "embed", 5) == 0 || strcmp(name, "head_loss") == 0))
      ends->ends_s += r->seconds;
    *r = (struct mt_profile_row){0};
  }
}

static void add_rows(struct mt_profile *to, const struct mt_profile *from) {
  for (int i = 0; to && i < MT_PROFILE_OPS; i++) {
    to->row[i].calls += from->row[i].calls;
    to->row[i].flops += from->row[i].flops;
    to->row[i].bytes += from->row[i].bytes;
    to->row[i].seconds += from->row[i].seconds;
  }
}

/* All that is under way at a time, forward and back; of a whole model one micro-batch. */
static mt_err run_passes(struct mt_model *m, struct mt_ranks *ranks, struct mt_pass *passes,
                         int count) {
  if (ranks->mesh.pp > 1) return mt_pipeline_run(&ranks->pipeline, passes, count);
  mt_model_say_summed(m, passes[0].sum_squares);
  if (ranks->model) MT_TRY(mt_ranks_begin(ranks, 0, 1));
  return mt_model_pass_launch(m, &passes[0]);
}

/* Additions that ran beside passes are sums', of which a step has `times` of these. */
static void take_additions(struct counter *c, struct mt_count *out, int times) {
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    struct mt_profile_row *r = &c->profile.row[i];
    if (!mt_op_name(i) || strcmp(mt_op_name(i), "parts_sum") != 0) continue;
    out->sums.flops += r->flops / times;
    out->sums.bytes += r->bytes / times;
    out->sums_s += r->seconds / times;
    *r = (struct mt_profile_row){0};
  }
}

/* Passes that only add, then those of a step's beginning, whose first does not. */
static mt_err count_passes(struct counter *c, struct mt_model *m, struct mt_ranks *ranks,
                           struct mt_pass *passes, int count, struct mt_count *out,
                           struct mt_profile *profile) {
  int times = m->options.zero > 1 ? count : 1; /* sums of whole gradients: in the last one */
  bool sum_squares = passes[0].sum_squares;
  for (int i = 0; i < count; i++) passes[i].accumulate = 1, passes[i].sum_squares = false;
  MT_TRY(run_passes(m, ranks, passes, count));
  if (ranks->begun) MT_TRY(mt_ranks_finish(ranks));
  take_additions(c, &(struct mt_count){0}, 1);
  take_rows(c, &out->more, &out->more_s, NULL);
  out->stage_bytes = (double)ranks->comm[MT_GROUP_PIPE].sent[MT_COMM_SEND].bytes / count;
  passes[0].accumulate = 0;
  passes[0].sum_squares = sum_squares;
  MT_TRY(run_passes(m, ranks, passes, count));
  add_rows(profile, &c->profile);
  take_additions(c, out, times);
  take_rows(c, &out->first, &out->first_s, out);
  out->more_s /= count;
  out->ends_s /= count;
  out->first_s -= (count - 1) * out->more_s;
  return MT_OK;
}

/* What brings sums or weights back: mt_ranks_parameters. */
static void count_weights(const struct mt_model *m, struct mt_count *out) {
  bool by_rows = mt_model_gathers_rows(m);
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    int64_t n = by_rows ? mt_param_count(p) : mt_bucket_round(mt_param_count(p));
    enum mt_dtype dtype = p->q.format == MT_Q_NONE ? m->recipe->act : m->recipe->state;
    if (p->learns) out->weights_bytes[p->sync] += (double)n * (double)mt_dtype_bytes(dtype);
  }
}

static void count_calls(const struct mt_model *m, const struct mt_buckets *b,
                        struct mt_count *out) {
  bool by_rows = mt_model_gathers_rows(m);
  for (int i = 0; i < b->count; i++) {
    const struct mt_bucket *k = &b->item[i];
    out->buckets[k->sync]++;
    if (!by_rows) out->gathers[k->sync]++;
    for (int row = k->first; by_rows && row <= k->last; row++) {
      const struct mt_param *p = &m->params.row[row];
      int64_t at = b->at[row];
      bool here = at < k->begin + k->count && at + mt_param_count(p) > k->begin;
      out->gathers[k->sync] += p->sync == k->sync && p->learns && here;
    }
  }
}

static mt_err run(struct counter *c, struct mt_model *m, struct mt_optimizer *opt,
                  struct mt_ranks *ranks, const struct mt_count_options *o, struct mt_count *out,
                  struct mt_profile *profile) {
  struct mt_batch batch = {0};
  struct mt_work norm;
  bool alone = o->mesh->world == 1;
  size_t before = c->taken_bytes;
  int count = o->model.in_flight > 1 ? o->model.in_flight : 1;
  struct mt_pass *passes = calloc((size_t)count, sizeof *passes);
  mt_err err = passes ? MT_OK : mt_fail(MT_ENOMEM, "%d passes", count);
  if (!err) err = mt_batch_create(&batch, (int)o->model.token_capacity, 1);
  if (err) goto done;
  batch.token_count = batch.token_capacity;
  for (int i = 0; i < count; i++)
    passes[i] = (struct mt_pass){.batch = &batch, .sum_squares = alone};
  if (!alone) MT_GO(join(ranks, m, o->mesh));
  MT_GO(count_passes(c, m, ranks, passes, count, out, profile));
  if (alone) {
    MT_GO(mt_optimizer_norm(opt));
  } else {
    MT_GO(mt_ranks_gradients(ranks, opt->grad_sumsq));
    add_rows(profile, &c->profile);
    take_additions(c, out, m->options.zero > 1 ? count : 1);
    take_rows(c, &norm, &out->norm_s, NULL);
    out->sums.flops += norm.flops;
    out->sums.bytes += norm.bytes;
    out->sums_bytes = mt_ranks_sum_bytes(ranks);
    count_calls(m, &ranks->buckets, out);
  }
  out->rows_bytes = c->taken_bytes - before - out->sums_bytes;
  MT_GO(mt_optimizer_update(opt));
  if (!alone) MT_GO(mt_ranks_parameters(ranks));
  add_rows(profile, &c->profile);
  take_rows(c, &out->update, &out->update_s, NULL);
done:
  mt_batch_destroy(&batch);
  free(passes);
  return err;
}

mt_err mt_count_step(const struct mt_count_options *o, struct mt_count *out,
                     struct mt_profile *profile) {
  struct counter c;
  struct mt_model m = {0};
  struct mt_optimizer opt = {0};
  struct mt_ranks ranks = {0};
  struct mt_params params = {.count = o->params->count};
  const struct mt_optimizer_options oo = {.clip = 1};
  mt_err err;
  *out = (struct mt_count){0};
  make_counter(&c, o);
  params.row = calloc((size_t)params.count, sizeof *params.row);
  if (!params.row) return mt_fail(MT_ENOMEM, "%d parameters", params.count);
  memcpy(params.row, o->params->row, (size_t)params.count * sizeof *params.row);
  MT_GO(mt_model_create(&m, o->config, &params, o->recipe, &c.be, &o->model));
  out->arenas = mt_model_memory(&m);
  count_weights(&m, out);
  MT_GO(mt_optimizer_create(&opt, &m, &oo));
  MT_GO(run(&c, &m, &opt, &ranks, o, out, profile));
done:
  if (ranks.model) mt_ranks_close(&ranks);
  if (opt.model) mt_optimizer_destroy(&opt);
  if (m.be) mt_model_destroy(&m);
  mt_params_free(&params);
  return err;
}
