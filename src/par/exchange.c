#include "par/exchange.h"

#include <stdlib.h>
#include <string.h>

/* One layer's plan: who sends how many rows to whom. Host arrays of one entry a rank. */
struct ways {
  int64_t *out_count, *out_start; /* this rank's choices */
  int64_t *in_count, *in_start;   /* rows that come here */
  int32_t *order;                 /* backend [R] of a row in the experts' order: where it arrives */
  int32_t *back;                  /* backend [R] of a row as it arrives: where it goes */
  size_t order_bytes, back_bytes;
};

struct state {
  struct mt_backend *be;
  struct mt_comm *expert, *readers;
  int ranks, held, experts; /* experts: of all ranks */
  struct ways *plan;
  int plan_count;
  int64_t *numbers; /* what the ways' arrays are cut from */
  /* Backend: [E+1] offsets of this rank's choices, then [ranks][held+1] of what others send here;
   * and the host's copy. */
  int32_t *offsets, *host_offsets;
  size_t offsets_bytes;
  void *home, *away; /* rows on their way: [T*K] and [R], of H act */
  size_t home_bytes, away_bytes;
  const void *gathered; /* tokens that lie in home already, or NULL */
  char *records;        /* backend: all readers' numbers of the auxiliary loss */
  size_t record_bytes;
  int32_t *valid_count; /* backend [1]: of all readers */
};

static struct state *state_of(const struct mt_exchange *x) {
  return x->impl;
}

static mt_err grow(struct mt_backend *be, void **p, size_t *have, size_t need) {
  if (*have >= need) return MT_OK;
  be->mem_free(be, *p, *have);
  *p = NULL;
  *have = 0;
  MT_TRY(be->mem_alloc(be, need + need / 8, p));
  *have = need + need / 8;
  return MT_OK;
}

static mt_err grow_orders(struct mt_backend *be, struct ways *w, int64_t rows) {
  void *order = w->order, *back = w->back;
  size_t need = (size_t)rows * sizeof *w->order;
  mt_err err = grow(be, &order, &w->order_bytes, need);
  if (!err) err = grow(be, &back, &w->back_bytes, need);
  w->order = order;
  w->back = back;
  return err;
}

/* This rank's choices, gathered where they leave from. */
static mt_err gather(struct state *s, const struct mt_route *route, const struct mt_tensor *tokens,
                     struct mt_tensor *home) {
  *home = mt_mat(NULL, tokens->dtype, (int64_t)route->token_count * route->top_k, tokens->dim[1]);
  MT_TRY(grow(s->be, &s->home, &s->home_bytes, mt_bytes(home)));
  home->data = s->home;
  if (s->gathered == tokens->data) return MT_OK;
  s->gathered = NULL;
  return s->be->ops.dispatch_fwd(
      s->be,
      &(struct mt_dispatch_fwd_args){
          .x = *tokens, .row_source = route->row_source, .top_k = route->top_k, .xs = *home});
}

/* Everyone tells everyone the offsets of its rows for the other's experts: on the way to the host,
 * which must know how many rows come, once they are there. */
static mt_err exchange_counts(struct state *s) {
  struct mt_backend *be = s->be;
  int64_t numbers[4 * MT_MAX_EXPERTS], wide = s->held + 1;
  struct mt_parts parts = {numbers, numbers + s->ranks};
  struct mt_parts places = {numbers, numbers + 2 * s->ranks};
  for (int i = 0; i < s->ranks; i++) {
    numbers[i] = wide;
    numbers[s->ranks + i] = (int64_t)i * s->held;
    numbers[2 * s->ranks + i] = i * wide;
  }
  MT_TRY(mt_comm_all_to_all(s->expert, s->offsets, parts, s->offsets + s->experts + 1, places,
                            sizeof *s->offsets, NULL));
  MT_TRY(be->download_later(be, s->host_offsets, s->offsets, s->offsets_bytes));
  return be->stamp(be, MT_STAMP_COUNTS);
}

/* What the host needs of the counts. */
static int64_t count_rows(const struct state *s, struct ways *w) {
  const int32_t *own = s->host_offsets, *sent = own + s->experts + 1;
  int64_t rows = 0;
  for (int i = 0; i < s->ranks; i++, sent += s->held + 1) {
    w->out_start[i] = own[i * s->held];
    w->out_count[i] = own[(i + 1) * s->held] - own[i * s->held];
    w->in_start[i] = rows;
    w->in_count[i] = sent[s->held] - sent[0];
    rows += w->in_count[i];
  }
  return rows;
}

static mt_err plan(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route,
                   const struct mt_tensor *tokens) {
  struct state *s = state_of(x);
  struct ways *w = &s->plan[route->plan];
  struct mt_tensor home;
  MT_TRY(be->ops.permute_plan(be, &(struct mt_permute_plan_args){.index = route->index,
                                                                 .token_count = route->token_count,
                                                                 .top_k = route->top_k,
                                                                 .expert_count = s->experts,
                                                                 .offsets = s->offsets,
                                                                 .row_source = route->row_source,
                                                                 .token_row = route->token_row}));
  MT_TRY(exchange_counts(s));
  s->gathered = NULL;
  if (tokens) {
    MT_TRY(gather(s, route, tokens, &home));
    s->gathered = tokens->data;
  }
  MT_TRY(be->stamp_wait(be, MT_STAMP_COUNTS));
  MT_TRY(mt_comm_failed(s->expert));
  int64_t rows = count_rows(s, w);
  /* Without a row there is room for one, which belongs to no expert: no operation sees a shape of
   * nothing. */
  route->row_count = rows > 0 ? rows : 1;
  MT_TRY(grow_orders(be, w, route->row_count));
  if (rows == 0) MT_TRY(be->zero(be, w->order, sizeof *w->order));
  if (rows == 0) MT_TRY(be->zero(be, w->back, sizeof *w->back));
  return be->ops.arrival_plan(be,
                              &(struct mt_arrival_plan_args){.sent = s->offsets + s->experts + 1,
                                                             .rank_count = s->ranks,
                                                             .expert_count = s->held,
                                                             .row_count = rows,
                                                             .offsets = route->offsets,
                                                             .order = w->order,
                                                             .back = w->back});
}

/* Rows of one matrix in another order. */
static mt_err reorder(struct mt_backend *be, struct mt_tensor from, const int32_t *source,
                      struct mt_tensor to) {
  return be->ops.dispatch_fwd(
      be, &(struct mt_dispatch_fwd_args){.x = from, .row_source = source, .top_k = 1, .xs = to});
}

/* Memory for this rank's choices on their way: a row each. */
static mt_err stage(struct state *s, const struct mt_route *route, enum mt_dtype dtype,
                    int64_t cols, struct mt_tensor *home) {
  *home = mt_mat(NULL, dtype, (int64_t)route->token_count * route->top_k, cols);
  MT_TRY(grow(s->be, &s->home, &s->home_bytes, mt_bytes(home)));
  home->data = s->home;
  s->gathered = NULL;
  return MT_OK;
}

/* Where rows arrive and leave from: of one expert in its own order, so in their place; else in
 * memory like it. */
static mt_err stage_away(struct state *s, const struct mt_tensor *rows, struct mt_tensor *away) {
  *away = *rows;
  if (s->held == 1) return MT_OK;
  MT_TRY(grow(s->be, &s->away, &s->away_bytes, mt_bytes(rows)));
  away->data = s->away;
  return MT_OK;
}

static mt_err send_out(struct state *s, const struct mt_route *route, struct mt_tensor home,
                       struct mt_tensor rows) {
  const struct ways *w = &s->plan[route->plan];
  struct mt_tensor away;
  MT_TRY(stage_away(s, &rows, &away));
  MT_TRY(mt_comm_all_to_all(s->expert, home.data, (struct mt_parts){w->out_count, w->out_start},
                            away.data, (struct mt_parts){w->in_count, w->in_start},
                            (size_t)home.dim[1] * mt_dtype_bytes(home.dtype), NULL));
  return s->held == 1 ? MT_OK : reorder(s->be, away, w->order, rows);
}

static mt_err send_back(struct state *s, const struct mt_route *route, struct mt_tensor rows,
                        struct mt_tensor home) {
  const struct ways *w = &s->plan[route->plan];
  struct mt_tensor away;
  MT_TRY(stage_away(s, &rows, &away));
  if (s->held > 1) MT_TRY(reorder(s->be, rows, w->back, away));
  return mt_comm_all_to_all(s->expert, away.data, (struct mt_parts){w->in_count, w->in_start},
                            home.data, (struct mt_parts){w->out_count, w->out_start},
                            (size_t)home.dim[1] * mt_dtype_bytes(home.dtype), NULL);
}

static mt_err dispatch(struct mt_exchange *x, struct mt_backend *be, const struct mt_route *route,
                       const struct mt_tensor *tokens, struct mt_tensor *xs) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  (void)be;
  MT_TRY(gather(s, route, tokens, &home));
  s->gathered = NULL;
  return send_out(s, route, home, *xs);
}

static mt_err dispatch_bwd(struct mt_exchange *x, struct mt_backend *be,
                           const struct mt_route *route, const struct mt_tensor *dxs,
                           struct mt_tensor *dtokens) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  MT_TRY(stage(s, route, dxs->dtype, dxs->dim[1], &home));
  MT_TRY(send_back(s, route, *dxs, home));
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){
              .dxs = home, .token_row = route->token_row, .top_k = route->top_k, .dx = *dtokens});
}

/* A choice (t, k) as a token of its own, one element wide. */
static struct mt_tensor choices(const struct mt_tensor *prob) {
  return mt_mat(prob->data, prob->dtype, mt_count(prob), 1);
}

static mt_err dispatch_prob(struct mt_exchange *x, struct mt_backend *be,
                            const struct mt_route *route, const struct mt_tensor *prob,
                            struct mt_tensor *row_prob) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  MT_TRY(stage(s, route, prob->dtype, 1, &home));
  MT_TRY(reorder(be, choices(prob), route->row_source, home));
  return send_out(s, route, home, choices(row_prob));
}

static mt_err dispatch_prob_bwd(struct mt_exchange *x, struct mt_backend *be,
                                const struct mt_route *route, const struct mt_tensor *drow_prob,
                                struct mt_tensor *dprob) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  MT_TRY(stage(s, route, drow_prob->dtype, 1, &home));
  MT_TRY(send_back(s, route, choices(drow_prob), home));
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){
              .dxs = home, .token_row = route->token_row, .top_k = 1, .dx = choices(dprob)});
}

static mt_err combine(struct mt_exchange *x, struct mt_backend *be, const struct mt_route *route,
                      const struct mt_tensor *ys, const struct mt_tensor *prob,
                      struct mt_tensor *y) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  MT_TRY(stage(s, route, ys->dtype, ys->dim[1], &home));
  MT_TRY(send_back(s, route, *ys, home));
  struct mt_combine_fwd_args a = {
      .ys = home, .token_row = route->token_row, .top_k = route->top_k, .y = *y};
  if (prob) a.prob = *prob;
  return be->ops.combine_fwd(be, &a);
}

static mt_err combine_bwd(struct mt_exchange *x, struct mt_backend *be,
                          const struct mt_route *route, const struct mt_tensor *dy,
                          const struct mt_tensor *prob, struct mt_tensor *ys,
                          struct mt_tensor *dprob) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  if (prob || dprob) {
    return mt_fail(MT_EUNSUPPORTED, "over ranks the probabilities go with the tokens");
  }
  MT_TRY(stage(s, route, dy->dtype, dy->dim[1], &home));
  MT_TRY(be->ops.combine_bwd(
      be, &(struct mt_combine_bwd_args){
              .dy = *dy, .row_source = route->row_source, .top_k = route->top_k, .dys = home}));
  return send_out(s, route, home, *ys);
}

static mt_err share_aux(struct mt_exchange *x, struct mt_backend *be, struct mt_tensor *aux_sums,
                        int32_t *aux_count, const int32_t **valid_count) {
  struct state *s = state_of(x);
  size_t sums = mt_bytes(aux_sums), counts = (size_t)s->experts * sizeof(int32_t);
  char *mine = s->records + s->record_bytes * (size_t)s->readers->rank;
  MT_TRY(be->copy(be, mine, aux_sums->data, sums));
  MT_TRY(be->copy(be, mine + sums, aux_count, counts));
  MT_TRY(be->copy(be, mine + sums + counts, *valid_count, sizeof(int32_t)));
  MT_TRY(mt_comm_gather_each(s->readers, s->records, s->record_bytes));
  *valid_count = s->valid_count;
  return be->ops.aux_join(be, &(struct mt_aux_join_args){.records = s->records,
                                                         .rank_count = s->readers->size,
                                                         .aux_sums = *aux_sums,
                                                         .aux_count = aux_count,
                                                         .valid_count = s->valid_count});
}

void mt_exchange_close(struct mt_model *m) {
  struct state *s = m->exchange.impl;
  m->exchange = mt_exchange_local();
  if (!s) return;
  struct mt_backend *be = s->be;
  for (int l = 0; s->plan && l < s->plan_count; l++) {
    be->mem_free(be, s->plan[l].order, s->plan[l].order_bytes);
    be->mem_free(be, s->plan[l].back, s->plan[l].back_bytes);
  }
  be->mem_free(be, s->home, s->home_bytes);
  be->mem_free(be, s->away, s->away_bytes);
  be->mem_free(be, s->offsets, s->offsets_bytes);
  be->mem_free(be, s->records, s->record_bytes * (size_t)s->readers->size);
  be->mem_free(be, s->valid_count, sizeof *s->valid_count);
  if (s->host_offsets) be->host_free(be, s->host_offsets);
  free(s->plan);
  free(s->numbers);
  free(s);
}

static mt_err take(struct mt_backend *be, size_t size_bytes, void **out) {
  MT_TRY(be->mem_alloc(be, size_bytes, out));
  return be->zero(be, *out, size_bytes);
}

static mt_err open_state(struct state *s, const struct mt_model *m) {
  size_t ranks = (size_t)s->ranks, e = (size_t)s->experts;
  size_t plans = (size_t)m->config.layers * (size_t)m->options.in_flight;
  struct mt_backend *be = s->be;
  void *p = NULL;
  s->plan_count = (int)plans;
  s->plan = calloc(plans, sizeof *s->plan);
  s->numbers = calloc(plans * ranks * 4, sizeof *s->numbers);
  if (!s->plan || !s->numbers) return mt_fail(MT_ENOMEM, "exchange of %d ranks", s->ranks);
  s->offsets_bytes = (e + 1 + ranks * ((size_t)s->held + 1)) * sizeof *s->offsets;
  MT_TRY(take(be, s->offsets_bytes, &p));
  s->offsets = p;
  MT_TRY(be->host_alloc(be, s->offsets_bytes, &p));
  s->host_offsets = p;
  s->record_bytes = mt_aux_record_bytes(s->experts + 1, m->recipe->stat);
  MT_TRY(take(be, s->record_bytes * (size_t)s->readers->size, &p));
  s->records = p;
  MT_TRY(take(be, sizeof *s->valid_count, &p));
  s->valid_count = p;
  for (size_t l = 0; l < plans; l++) {
    int64_t *n = s->numbers + l * ranks * 4;
    s->plan[l] = (struct ways){.out_count = n,
                               .out_start = n + ranks,
                               .in_count = n + 2 * ranks,
                               .in_start = n + 3 * ranks};
  }
  return MT_OK;
}

mt_err mt_exchange_over(struct mt_model *m, struct mt_comm *expert, struct mt_comm *readers) {
  const struct mt_shard *shard = &m->options.shard;
  int held = shard->expert_end - shard->expert_begin;
  if (held * expert->size != m->config.experts || shard->expert_begin != held * expert->rank) {
    return mt_fail(MT_EINVAL, "experts %d to %d of %d are not what member %d of %d holds",
                   shard->expert_begin, shard->expert_end, m->config.experts, expert->rank,
                   expert->size);
  }
  struct state *s = calloc(1, sizeof *s);
  if (!s) return mt_fail(MT_ENOMEM, "exchange");
  s->be = m->be;
  s->expert = expert;
  s->readers = readers;
  s->ranks = expert->size;
  s->held = held;
  s->experts = m->config.experts;
  if (expert->size > 1) {
    m->exchange = (struct mt_exchange){.plan = plan,
                                       .dispatch = dispatch,
                                       .dispatch_bwd = dispatch_bwd,
                                       .dispatch_prob = dispatch_prob,
                                       .dispatch_prob_bwd = dispatch_prob_bwd,
                                       .combine = combine,
                                       .combine_bwd = combine_bwd};
  }
  m->exchange.share_aux = share_aux;
  m->exchange.impl = s;
  mt_err err = open_state(s, m);
  if (err) mt_exchange_close(m);
  return err;
}
