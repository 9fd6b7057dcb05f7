/* A backend that only counts: its memory may not be touched, its operations are those of
 * train/profile.h that run nothing. What is built and launched on it is the trainer's own code. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "train/optimizer.h"
#include "train/plan.h"

struct counter {
  struct mt_backend be;
  const struct mt_backend *inner;
  struct mt_profile profile;
  const struct mt_machine *machine;
  double flops_per_s;
  size_t taken_bytes;
  int64_t rows; /* of the layer that runs, and the experts that have them */
  int expert_count;
  size_t home_bytes, away_bytes; /* staging of an exchange */
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

/* All that a pass reads back is the loops' offsets of rows: evenly shared ones. */
static mt_err download(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  const struct counter *c = be->impl;
  int32_t *offsets = dst;
  (void)src;
  memset(dst, 0, size_bytes);
  if (size_bytes != (size_t)(c->expert_count + 1) * sizeof *offsets) return MT_OK;
  for (int e = 0; e <= c->expert_count; e++) offsets[e] = (int32_t)(c->rows * e / c->expert_count);
  return MT_OK;
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
  return mt_machine_seconds(c->machine, c->flops_per_s, op, work);
}

static void make_counter(struct counter *c, const struct mt_count_options *o) {
  *c = (struct counter){.inner = o->backend,
                        .machine = o->machine,
                        .flops_per_s = mt_machine_flops(o->machine, o->recipe->act),
                        .rows = o->rows};
  c->be = (struct mt_backend){.name = o->backend->name,
                              .thread_count = 1,
                              .impl = c,
                              .workspace_bytes = workspace_bytes,
                              .mem_alloc = reserve,
                              .mem_free = give_back,
                              .upload = upload,
                              .download = download,
                              .zero = zero,
                              .steps_ahead = 1};
  mt_profile_count(&c->profile, &c->be, o->sequence_length, seconds_of, c);
}

/* The exchange of par/exchange.c with as many rows for everyone, but for what is sent: the same
 * operations on the same shapes, and the same staging memory. */
static struct counter *counter_of(const struct mt_exchange *x) {
  return x->impl;
}

static mt_err grow(size_t *have, size_t need) {
  if (*have < need) *have = need + need / 8;
  return MT_OK;
}

static mt_err stage(struct counter *c, const struct mt_route *route, enum mt_dtype dtype,
                    int64_t cols, struct mt_tensor *home, struct mt_tensor *away) {
  static char nobody; /* what is there, as far as shapes go */
  *home = mt_mat(&nobody, dtype, (int64_t)route->token_count * route->top_k, cols);
  *away = mt_mat(&nobody, dtype, route->row_count, cols);
  MT_TRY(grow(&c->home_bytes, mt_bytes(home)));
  return grow(&c->away_bytes, mt_bytes(away));
}

static mt_err reorder(struct mt_backend *be, struct mt_tensor from, struct mt_tensor to) {
  return be->ops.dispatch_fwd(be, &(struct mt_dispatch_fwd_args){.x = from, .top_k = 1, .xs = to});
}

static mt_err exchange_plan(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route) {
  struct counter *c = counter_of(x);
  route->row_count = c->rows;
  c->expert_count = route->expert_count;
  return be->ops.permute_plan(
      be, &(struct mt_permute_plan_args){.token_count = route->token_count, .top_k = route->top_k});
}

static mt_err dispatch(struct mt_exchange *x, struct mt_backend *be, const struct mt_route *route,
                       const struct mt_tensor *tokens, struct mt_tensor *xs) {
  struct mt_tensor home, away;
  MT_TRY(stage(counter_of(x), route, tokens->dtype, tokens->dim[1], &home, &away));
  MT_TRY(be->ops.dispatch_fwd(
      be, &(struct mt_dispatch_fwd_args){.x = *tokens, .top_k = route->top_k, .xs = home}));
  return reorder(be, away, *xs);
}

static mt_err dispatch_bwd(struct mt_exchange *x, struct mt_backend *be,
                           const struct mt_route *route, const struct mt_tensor *dxs,
                           struct mt_tensor *dtokens) {
  struct mt_tensor home, away;
  MT_TRY(stage(counter_of(x), route, dxs->dtype, dxs->dim[1], &home, &away));
  MT_TRY(reorder(be, *dxs, away));
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){.dxs = home, .top_k = route->top_k, .dx = *dtokens});
}

static mt_err dispatch_prob(struct mt_exchange *x, struct mt_backend *be,
                            const struct mt_route *route, const struct mt_tensor *prob,
                            struct mt_tensor *row_prob) {
  struct mt_tensor home, away;
  MT_TRY(stage(counter_of(x), route, prob->dtype, 1, &home, &away));
  MT_TRY(reorder(be, home, home));
  return reorder(be, away, *row_prob);
}

static mt_err dispatch_prob_bwd(struct mt_exchange *x, struct mt_backend *be,
                                const struct mt_route *route, const struct mt_tensor *drow_prob,
                                struct mt_tensor *dprob) {
  struct mt_tensor home, away;
  MT_TRY(stage(counter_of(x), route, drow_prob->dtype, 1, &home, &away));
  MT_TRY(reorder(be, *drow_prob, away));
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){.dxs = home, .top_k = 1, .dx = *dprob});
}

static mt_err combine(struct mt_exchange *x, struct mt_backend *be, const struct mt_route *route,
                      const struct mt_tensor *ys, const struct mt_tensor *prob,
                      struct mt_tensor *y) {
  struct mt_tensor home, away;
  MT_TRY(stage(counter_of(x), route, ys->dtype, ys->dim[1], &home, &away));
  MT_TRY(reorder(be, *ys, away));
  (void)prob;
  return be->ops.combine_fwd(
      be, &(struct mt_combine_fwd_args){.ys = home, .top_k = route->top_k, .y = *y});
}

static mt_err combine_bwd(struct mt_exchange *x, struct mt_backend *be,
                          const struct mt_route *route, const struct mt_tensor *dy,
                          const struct mt_tensor *prob, struct mt_tensor *ys,
                          struct mt_tensor *dprob) {
  struct mt_tensor home, away;
  (void)prob, (void)dprob;
  MT_TRY(stage(counter_of(x), route, dy->dtype, dy->dim[1], &home, &away));
  MT_TRY(be->ops.combine_bwd(
      be, &(struct mt_combine_bwd_args){.dy = *dy, .top_k = route->top_k, .dys = home}));
  return reorder(be, away, *ys);
}

static struct mt_exchange counting_exchange(struct counter *c) {
  return (struct mt_exchange){.plan = exchange_plan,
                              .dispatch = dispatch,
                              .dispatch_bwd = dispatch_bwd,
                              .dispatch_prob = dispatch_prob,
                              .dispatch_prob_bwd = dispatch_prob_bwd,
                              .combine = combine,
                              .combine_bwd = combine_bwd,
                              .impl = c};
}

/* What the rows hold since the last time, which is forgotten. */
static void take_rows(struct counter *c, struct mt_work *work, double *seconds, int64_t *calls,
                      struct mt_count *ends) {
  *work = (struct mt_work){0};
  *seconds = 0;
  *calls = 0;
  if (ends) ends->ends_s = ends->ends_flops = 0;
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    struct mt_profile_row *r = &c->profile.row[i];
    const char *name = mt_op_name(i);
    work->flops += r->flops;
    work->bytes += r->bytes;
    *seconds += r->seconds;
    *calls += r->calls;
    if (ends && (strncmp(name, "embed", 5) == 0 || strcmp(name, "head_loss") == 0)) {
      ends->ends_s += r->seconds;
      ends->ends_flops += r->flops;
    }
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

static mt_err run(struct counter *c, struct mt_model *m, struct mt_optimizer *opt,
                  const struct mt_count_options *o, struct mt_count *out,
                  struct mt_profile *profile) {
  int64_t tokens = o->model.token_capacity;
  struct mt_batch batch = {.token_count = (int)tokens};
  bool alone = !m->acts.options.over_ranks;
  size_t before = c->taken_bytes;
  struct mt_pass pass = {.batch = &batch, .sum_squares = alone};
  c->expert_count = o->config->experts;
  if (alone) c->rows = tokens * o->config->top_k;
  if (!alone) m->exchange = counting_exchange(c);
  mt_model_say_summed(m, pass.sum_squares);
  MT_TRY(mt_model_pass_launch(m, &pass));
  out->rows_bytes = c->taken_bytes - before + c->home_bytes + c->away_bytes;
  add_rows(profile, &c->profile);
  take_rows(c, &out->first, &out->first_s, &out->first_calls, out);
  MT_TRY(mt_optimizer_norm(opt));
  MT_TRY(mt_optimizer_update(opt));
  add_rows(profile, &c->profile);
  take_rows(c, &out->update, &out->update_s, &out->update_calls, NULL);
  pass.accumulate = 1;
  pass.sum_squares = false;
  mt_model_say_summed(m, false);
  MT_TRY(mt_model_pass_launch(m, &pass));
  take_rows(c, &out->more, &out->more_s, &out->more_calls, NULL);
  return MT_OK;
}

mt_err mt_count_step(const struct mt_count_options *o, struct mt_count *out,
                     struct mt_profile *profile) {
  struct counter c;
  struct mt_model m = {0};
  struct mt_optimizer opt = {0};
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
  MT_GO(mt_optimizer_create(&opt, &m, &oo));
  MT_GO(run(&c, &m, &opt, o, out, profile));
done:
  if (opt.model) mt_optimizer_destroy(&opt);
  if (m.be) mt_model_destroy(&m);
  mt_params_free(&params);
  return err;
}
