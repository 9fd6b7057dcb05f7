#include "par/exchange.h"

#include <stdlib.h>
#include <string.h>

/* Who sends how many rows of one chunk to whom, in arrays of one entry a rank. */
struct way {
  int64_t *out_count, *out_start; /* this rank's choices */
  int64_t *in_count, *in_start;   /* rows that come here */
};

/* One layer's plan. */
struct ways {
  struct way *chunk;
  int32_t *order; /* backend [R] of a row in the experts' order: where it arrives */
  int32_t *back;  /* backend [R] of a row as it arrives: where it goes */
  size_t order_bytes, back_bytes;
};

/* Rows on their way, each chunk's in its place among all: this rank's choices as they leave and
 * come home, [T*K], and others' as they arrive and leave again, [R]. */
struct lane {
  void *home, *away;
  size_t home_bytes, away_bytes;
  struct mt_transfer under_way[MT_MAX_CHUNKS];
};

/* What travels in 8 bits does so as records, which lie where the rows would: they are smaller. */
struct state {
  struct mt_backend *be;
  struct mt_comm *expert, *readers;
  int ranks, held, experts; /* experts: of all ranks */
  int chunks;
  struct ways *plan;
  int plan_count;
  struct way *way;  /* what the plans' chunks are cut from */
  int64_t *numbers; /* and the ways' arrays */
  /* Backend: for each chunk [E+1] offsets of this rank's choices, then for each
   * [ranks][held+1] of what others send here; and the host's copy. */
  int32_t *offsets, *host_offsets;
  size_t offsets_bytes;
  struct lane tokens, probabilities;
  enum mt_qformat token_format, gradient_format; /* of what goes out; MT_Q_NONE: as it is */
  const void *gathered[MT_MAX_CHUNKS];           /* tokens that lie at home already, or NULL */
  char *records; /* backend: all readers' numbers of the auxiliary loss */
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

/* A chunk's offsets of this rank's choices, and those that others have sent; of either copy. */
static int32_t *own_offsets(const struct state *s, int32_t *offsets, int chunk) {
  return offsets + (ptrdiff_t)chunk * (s->experts + 1);
}
static int32_t *sent_offsets(const struct state *s, int32_t *offsets, int chunk) {
  return own_offsets(s, offsets, s->chunks) + (ptrdiff_t)chunk * s->ranks * (s->held + 1);
}

/* The chunk's part of something that has `each` of a token. */
static int32_t *of_tokens(int32_t *all, const struct mt_route *route, int chunk) {
  return all + (ptrdiff_t)route->chunk[chunk].token_begin * route->top_k;
}
static struct mt_tensor token_rows(const struct mt_tensor *all, const struct mt_route *route,
                                   int chunk, int each) {
  const struct mt_route_chunk *k = &route->chunk[chunk];
  return mt_rows(all, (int64_t)k->token_begin * each, (int64_t)k->token_count * each);
}

/* Rows of one matrix in another order. */
static mt_err reorder(struct mt_backend *be, struct mt_tensor from, const int32_t *source,
                      int top_k, struct mt_tensor to) {
  if (to.dim[0] == 0) return MT_OK;
  return be->ops.dispatch_fwd(be, &(struct mt_dispatch_fwd_args){
                                      .x = from, .row_source = source, .top_k = top_k, .xs = to});
}

/* Memory for all of this rank's choices; home (=) the chunk's. */
static mt_err stage(struct state *s, struct lane *lane, const struct mt_route *route, int chunk,
                    enum mt_dtype dtype, int64_t cols, struct mt_tensor *home) {
  struct mt_tensor all = mt_mat(NULL, dtype, (int64_t)route->token_count * route->top_k, cols);
  MT_TRY(grow(s->be, &lane->home, &lane->home_bytes, mt_bytes(&all)));
  all.data = lane->home;
  *home = token_rows(&all, route, chunk, route->top_k);
  return MT_OK;
}

/* A chunk's choices of `from`, gathered where they leave from. */
static mt_err gather_rows(struct state *s, const struct mt_route *route, int chunk,
                          const struct mt_tensor *from, enum mt_qformat format,
                          struct mt_tensor home) {
  struct mt_tensor mine = token_rows(from, route, chunk, 1);
  const int32_t *source = of_tokens(route->row_source, route, chunk);
  if (format == MT_Q_NONE || home.dim[0] == 0)
    return reorder(s->be, mine, source, route->top_k, home);
  return s->be->ops.pack_rows(s->be, &(struct mt_pack_rows_args){.x = mine,
                                                                 .row_source = source,
                                                                 .top_k = route->top_k,
                                                                 .row_count = home.dim[0],
                                                                 .format = format,
                                                                 .records = home.data});
}

static mt_err gather(struct state *s, const struct mt_route *route, int chunk,
                     const struct mt_tensor *tokens, struct mt_tensor *home) {
  MT_TRY(stage(s, &s->tokens, route, chunk, tokens->dtype, tokens->dim[1], home));
  if (s->gathered[chunk] == tokens->data) return MT_OK;
  return gather_rows(s, route, chunk, tokens, s->token_format, *home);
}

/* Everyone tells everyone the offsets of its rows for the other's experts: on the way to the host,
 * which must know how many rows come, once they are there. */
static mt_err exchange_counts(struct state *s) {
  struct mt_backend *be = s->be;
  struct mt_transfer under_way[MT_MAX_CHUNKS];
  int64_t numbers[4 * MT_MAX_EXPERTS], wide = s->held + 1;
  struct mt_parts parts = {numbers, numbers + s->ranks};
  struct mt_parts places = {numbers, numbers + 2 * s->ranks};
  for (int i = 0; i < s->ranks; i++) {
    numbers[i] = wide;
    numbers[s->ranks + i] = (int64_t)i * s->held;
    numbers[2 * s->ranks + i] = i * wide;
  }
  for (int c = 0; c < s->chunks; c++)
    MT_TRY(mt_comm_all_to_all(s->expert, own_offsets(s, s->offsets, c), parts,
                              sent_offsets(s, s->offsets, c), places, sizeof *s->offsets,
                              &under_way[c]));
  for (int c = 0; c < s->chunks; c++) MT_TRY(mt_comm_wait(s->expert, &under_way[c]));
  MT_TRY(be->download_later(be, s->host_offsets, s->offsets, s->offsets_bytes));
  return be->stamp(be, MT_STAMP_COUNTS);
}

/* What the host needs of the counts: ways, and rows of the route and its chunks. */
static int64_t count_rows(const struct state *s, struct ways *w, struct mt_route *route) {
  int64_t all = 0;
  for (int c = 0; c < s->chunks; c++) {
    const int32_t *own = own_offsets(s, s->host_offsets, c);
    const int32_t *sent = sent_offsets(s, s->host_offsets, c);
    const struct way *k = &w->chunk[c];
    int64_t rows = 0;
    for (int i = 0; i < s->ranks; i++, sent += s->held + 1) {
      k->out_start[i] = own[i * s->held];
      k->out_count[i] = own[(i + 1) * s->held] - own[i * s->held];
      k->in_start[i] = rows;
      k->in_count[i] = sent[s->held] - sent[0];
      rows += k->in_count[i];
    }
    route->chunk[c].row_begin = all;
    route->chunk[c].row_count = rows;
    all += rows;
  }
  return all;
}

/* The experts' order of the rows that come, chunk by chunk. Without a row there is room for one,
 * which belongs to no expert. */
static mt_err plan_arrivals(struct state *s, struct ways *w, struct mt_route *route) {
  struct mt_backend *be = s->be;
  int64_t rows = count_rows(s, w, route);
  route->row_count = rows > 0 ? rows : 1;
  MT_TRY(grow_orders(be, w, route->row_count));
  if (rows == 0) MT_TRY(be->zero(be, w->order, sizeof *w->order));
  if (rows == 0) MT_TRY(be->zero(be, w->back, sizeof *w->back));
  for (int c = 0; c < s->chunks; c++) {
    const struct mt_route_chunk *k = &route->chunk[c];
    MT_TRY(be->ops.arrival_plan(
        be, &(struct mt_arrival_plan_args){.sent = sent_offsets(s, s->offsets, c),
                                           .rank_count = s->ranks,
                                           .expert_count = s->held,
                                           .row_count = k->row_count,
                                           .offsets = route->offsets + (ptrdiff_t)c * (s->held + 1),
                                           .order = w->order + k->row_begin,
                                           .back = w->back + k->row_begin}));
  }
  if (rows == 0) route->chunk[0].row_count = 1;
  return MT_OK;
}

static mt_err plan(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route,
                   const struct mt_tensor *tokens) {
  struct state *s = state_of(x);
  struct mt_tensor home;
  mt_route_cut(route);
  for (int c = 0; c < s->chunks; c++)
    MT_TRY(be->ops.permute_plan(
        be, &(struct mt_permute_plan_args){.index = of_tokens(route->index, route, c),
                                           .token_count = route->chunk[c].token_count,
                                           .top_k = route->top_k,
                                           .expert_count = s->experts,
                                           .offsets = own_offsets(s, s->offsets, c),
                                           .row_source = of_tokens(route->row_source, route, c),
                                           .token_row = of_tokens(route->token_row, route, c)}));
  MT_TRY(exchange_counts(s));
  for (int c = 0; c < s->chunks; c++) {
    s->gathered[c] = NULL;
    if (!tokens) continue;
    MT_TRY(gather(s, route, c, tokens, &home));
    s->gathered[c] = tokens->data;
  }
  MT_TRY(be->stamp_wait(be, MT_STAMP_COUNTS));
  MT_TRY(mt_comm_failed(s->expert));
  return plan_arrivals(s, &s->plan[route->plan], route);
}

/* A chunk's rows on one lane. */
struct journey {
  struct state *s;
  enum mt_qformat format; /* of what goes out */
  struct mt_transfer *under_way;
  const struct way *way;
  const int32_t *order, *back;
  struct mt_tensor home;
  struct mt_tensor rows; /* in the experts' order */
  struct mt_tensor away; /* as they arrive and leave: of one expert the same, as they are */
};

/* rows: all of them. format: of what goes out; MT_Q_NONE on the way back. */
static mt_err journey_of(struct state *s, struct lane *lane, const struct mt_trip *trip,
                         struct mt_tensor rows, enum mt_qformat format, struct journey *j) {
  const struct mt_route *route = trip->route;
  const struct mt_route_chunk *k = &route->chunk[trip->chunk];
  const struct ways *w = &s->plan[route->plan];
  struct mt_tensor away = rows;
  *j = (struct journey){.s = s,
                        .format = format,
                        .under_way = &lane->under_way[trip->chunk],
                        .way = &w->chunk[trip->chunk],
                        .order = w->order + k->row_begin,
                        .back = w->back + k->row_begin,
                        .rows = mt_rows(&rows, k->row_begin, k->row_count)};
  MT_TRY(stage(s, lane, route, trip->chunk, rows.dtype, rows.dim[1], &j->home));
  if (s->held > 1 || format != MT_Q_NONE) {
    MT_TRY(grow(s->be, &lane->away, &lane->away_bytes, mt_bytes(&rows)));
    away.data = lane->away;
  }
  j->away = mt_rows(&away, k->row_begin, k->row_count);
  return MT_OK;
}

static size_t row_bytes(const struct journey *j) {
  if (j->format != MT_Q_NONE) return (size_t)mt_q_record_bytes(j->format, j->home.dim[1]);
  return (size_t)j->home.dim[1] * mt_dtype_bytes(j->home.dtype);
}

static mt_err leave_home(const struct journey *j) {
  const struct way *w = j->way;
  return mt_comm_all_to_all(
      j->s->expert, j->home.data, (struct mt_parts){w->out_count, w->out_start}, j->away.data,
      (struct mt_parts){w->in_count, w->in_start}, row_bytes(j), j->under_way);
}

static mt_err arrive_away(const struct journey *j) {
  MT_TRY(mt_comm_wait(j->s->expert, j->under_way));
  if (j->format != MT_Q_NONE && j->rows.dim[0] > 0) {
    return j->s->be->ops.unpack_rows(
        j->s->be,
        &(struct mt_unpack_rows_args){
            .records = j->away.data, .source = j->order, .format = j->format, .xs = j->rows});
  }
  return j->s->held == 1 ? MT_OK : reorder(j->s->be, j->away, j->order, 1, j->rows);
}

static mt_err leave_away(const struct journey *j) {
  const struct way *w = j->way;
  if (j->s->held > 1) MT_TRY(reorder(j->s->be, j->rows, j->back, 1, j->away));
  return mt_comm_all_to_all(j->s->expert, j->away.data, (struct mt_parts){w->in_count, w->in_start},
                            j->home.data, (struct mt_parts){w->out_count, w->out_start},
                            row_bytes(j), j->under_way);
}

static mt_err arrive_home(const struct journey *j) {
  return mt_comm_wait(j->s->expert, j->under_way);
}

static mt_err dispatch(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                       const struct mt_tensor *tokens, struct mt_tensor *xs) {
  struct state *s = state_of(x);
  struct journey j;
  (void)be;
  MT_TRY(journey_of(s, &s->tokens, trip, *xs, s->token_format, &j));
  if (trip->leg == MT_ARRIVE) return arrive_away(&j);
  MT_TRY(gather(s, trip->route, trip->chunk, tokens, &j.home));
  s->gathered[trip->chunk] = NULL;
  return leave_home(&j);
}

static mt_err dispatch_bwd(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                           const struct mt_tensor *dxs, struct mt_tensor *dtokens) {
  struct state *s = state_of(x);
  const struct mt_route *route = trip->route;
  struct mt_tensor mine = token_rows(dtokens, route, trip->chunk, 1);
  struct journey j;
  MT_TRY(journey_of(s, &s->tokens, trip, *dxs, MT_Q_NONE, &j));
  if (trip->leg == MT_DEPART) return leave_away(&j);
  MT_TRY(arrive_home(&j));
  if (mine.dim[0] == 0) return MT_OK;
  const int32_t *token_row = of_tokens(route->token_row, route, trip->chunk);
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){
              .dxs = j.home, .token_row = token_row, .top_k = route->top_k, .dx = mine});
}

/* A choice (t, k) as a token of its own, one element wide. */
static struct mt_tensor choices(const struct mt_tensor *prob) {
  return mt_mat(prob->data, prob->dtype, mt_count(prob), 1);
}

static mt_err dispatch_prob(struct mt_exchange *x, struct mt_backend *be,
                            const struct mt_trip *trip, const struct mt_tensor *prob,
                            struct mt_tensor *row_prob) {
  struct state *s = state_of(x);
  struct mt_tensor all = choices(prob);
  struct journey j;
  MT_TRY(journey_of(s, &s->probabilities, trip, choices(row_prob), MT_Q_NONE, &j));
  if (trip->leg == MT_ARRIVE) return arrive_away(&j);
  MT_TRY(reorder(be, token_rows(&all, trip->route, trip->chunk, trip->route->top_k),
                 of_tokens(trip->route->row_source, trip->route, trip->chunk), 1, j.home));
  return leave_home(&j);
}

static mt_err dispatch_prob_bwd(struct mt_exchange *x, struct mt_backend *be,
                                const struct mt_trip *trip, const struct mt_tensor *drow_prob,
                                struct mt_tensor *dprob) {
  struct state *s = state_of(x);
  const struct mt_route *route = trip->route;
  struct mt_tensor all = choices(dprob), mine = token_rows(&all, route, trip->chunk, route->top_k);
  struct journey j;
  MT_TRY(journey_of(s, &s->probabilities, trip, choices(drow_prob), MT_Q_NONE, &j));
  if (trip->leg == MT_DEPART) return leave_away(&j);
  MT_TRY(arrive_home(&j));
  if (mine.dim[0] == 0) return MT_OK;
  const int32_t *token_row = of_tokens(route->token_row, route, trip->chunk);
  return be->ops.dispatch_bwd(be,
                              &(struct mt_dispatch_bwd_args){
                                  .dxs = j.home, .token_row = token_row, .top_k = 1, .dx = mine});
}

static mt_err combine(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                      const struct mt_tensor *ys, const struct mt_tensor *prob,
                      struct mt_tensor *y) {
  struct state *s = state_of(x);
  const struct mt_route *route = trip->route;
  struct mt_tensor mine = token_rows(y, route, trip->chunk, 1);
  struct journey j;
  MT_TRY(journey_of(s, &s->tokens, trip, *ys, MT_Q_NONE, &j));
  if (trip->leg == MT_DEPART) return leave_away(&j);
  MT_TRY(arrive_home(&j));
  if (mine.dim[0] == 0) return MT_OK;
  struct mt_combine_fwd_args a = {.ys = j.home,
                                  .token_row = of_tokens(route->token_row, route, trip->chunk),
                                  .top_k = route->top_k,
                                  .y = mine};
  if (prob) a.prob = token_rows(prob, route, trip->chunk, 1);
  return be->ops.combine_fwd(be, &a);
}

static mt_err combine_bwd(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                          const struct mt_tensor *dy, const struct mt_tensor *prob,
                          struct mt_tensor *ys, struct mt_tensor *dprob) {
  struct state *s = state_of(x);
  struct journey j;
  (void)be;
  if (prob || dprob) {
    return mt_fail(MT_EUNSUPPORTED, "over ranks the probabilities go with the tokens");
  }
  MT_TRY(journey_of(s, &s->tokens, trip, *ys, s->gradient_format, &j));
  if (trip->leg == MT_ARRIVE) return arrive_away(&j);
  MT_TRY(gather_rows(s, trip->route, trip->chunk, dy, s->gradient_format, j.home));
  return leave_home(&j);
}

/* MPI moves large messages only while it is called. */
static mt_err advance(struct mt_exchange *x) {
  struct state *s = state_of(x);
  bool done;
  for (int c = 0; c < s->chunks; c++) {
    MT_TRY(mt_comm_test(s->expert, &s->tokens.under_way[c], &done));
    MT_TRY(mt_comm_test(s->expert, &s->probabilities.under_way[c], &done));
  }
  return MT_OK;
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
  struct lane *const lanes[] = {&s->tokens, &s->probabilities};
  for (int i = 0; i < 2; i++) {
    be->mem_free(be, lanes[i]->home, lanes[i]->home_bytes);
    be->mem_free(be, lanes[i]->away, lanes[i]->away_bytes);
  }
  be->mem_free(be, s->offsets, s->offsets_bytes);
  be->mem_free(be, s->records, s->record_bytes * (size_t)s->readers->size);
  be->mem_free(be, s->valid_count, sizeof *s->valid_count);
  if (s->host_offsets) be->host_free(be, s->host_offsets);
  free(s->plan);
  free(s->way);
  free(s->numbers);
  free(s);
}

static mt_err take(struct mt_backend *be, size_t size_bytes, void **out) {
  MT_TRY(be->mem_alloc(be, size_bytes, out));
  return be->zero(be, *out, size_bytes);
}

static mt_err open_state(struct state *s, const struct mt_model *m) {
  size_t ranks = (size_t)s->ranks, e = (size_t)s->experts, chunks = (size_t)s->chunks;
  size_t plans = (size_t)m->config.layers * (size_t)m->options.in_flight;
  struct mt_backend *be = s->be;
  void *p = NULL;
  s->plan_count = (int)plans;
  s->plan = calloc(plans, sizeof *s->plan);
  s->way = calloc(plans * chunks, sizeof *s->way);
  s->numbers = calloc(plans * chunks * ranks * 4, sizeof *s->numbers);
  if (!s->plan || !s->way || !s->numbers)
    return mt_fail(MT_ENOMEM, "exchange of %d ranks", s->ranks);
  s->offsets_bytes = chunks * (e + 1 + ranks * ((size_t)s->held + 1)) * sizeof *s->offsets;
  MT_TRY(take(be, s->offsets_bytes, &p));
  s->offsets = p;
  MT_TRY(be->host_alloc(be, s->offsets_bytes, &p));
  s->host_offsets = p;
  s->record_bytes = mt_aux_record_bytes(s->experts + 1, m->recipe->stat);
  MT_TRY(take(be, s->record_bytes * (size_t)s->readers->size, &p));
  s->records = p;
  MT_TRY(take(be, sizeof *s->valid_count, &p));
  s->valid_count = p;
  for (size_t l = 0; l < plans; l++) s->plan[l].chunk = s->way + l * chunks;
  for (size_t i = 0; i < plans * chunks; i++) {
    int64_t *n = s->numbers + i * ranks * 4;
    s->way[i] = (struct way){.out_count = n,
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
  s->chunks = m->acts.options.chunks;
  if (m->options.dispatch != MT_DISPATCH_ACT) s->token_format = m->acts.moe_format;
  if (m->options.dispatch == MT_DISPATCH_BOTH) s->gradient_format = m->acts.moe_format;
  if (expert->size > 1) {
    m->exchange = (struct mt_exchange){.plan = plan,
                                       .dispatch = dispatch,
                                       .dispatch_bwd = dispatch_bwd,
                                       .dispatch_prob = dispatch_prob,
                                       .dispatch_prob_bwd = dispatch_prob_bwd,
                                       .combine = combine,
                                       .combine_bwd = combine_bwd,
                                       .advance = advance};
  }
  m->exchange.share_aux = share_aux;
  m->exchange.impl = s;
  mt_err err = open_state(s, m);
  if (err) mt_exchange_close(m);
  return err;
}
