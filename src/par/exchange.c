#include "par/exchange.h"

#include <stdlib.h>
#include <string.h>

/* One layer's plan: who sends how many rows to whom. Host arrays of one entry a rank. */
struct ways {
  int64_t *out_count, *out_start; /* this rank's choices */
  int64_t *in_count, *in_start;   /* rows that come here */
  int32_t *order;                 /* [R] of a row in the experts' order: where it arrives */
  int32_t *back;                  /* [R] of a row as it arrives: where it goes */
  int64_t row_capacity;
};

enum { READERS_MOST = 4096, LEAST_BYTES = 4096 };

struct state {
  struct mt_backend *be;
  struct mt_comm *expert, *readers;
  int ranks, held, experts; /* experts: of all ranks */
  struct ways *layer;
  int layer_count;
  int64_t *numbers;     /* what the ways' arrays are cut from */
  int32_t *all_offsets; /* backend [E+1]: of this rank's choices */
  int32_t *counts;      /* host [2][E]: sent and got */
  void *home, *away;    /* rows on their way: [T*K] and [R], of H act */
  size_t home_bytes, away_bytes;
  void *aux; /* host: all readers' numbers of the auxiliary loss */
  int32_t valid_count;
};

static struct state *state_of(const struct mt_exchange *x) {
  return x->impl;
}

static mt_err grow(struct mt_backend *be, void **p, size_t *have, size_t need) {
  if (*have >= need && *p) return MT_OK;
  if (need < LEAST_BYTES) need = LEAST_BYTES; /* no row is something too: operations want a place */
  be->mem_free(be, *p, *have);
  *p = NULL;
  *have = 0;
  MT_TRY(be->mem_alloc(be, need + need / 8, p));
  *have = need + need / 8;
  return MT_OK;
}

static mt_err grow_orders(struct ways *w, int64_t rows) {
  if (w->row_capacity >= rows && w->order) return MT_OK;
  int64_t more = rows + rows / 8 + 1;
  free(w->order);
  free(w->back);
  w->order = malloc((size_t)more * sizeof *w->order);
  w->back = malloc((size_t)more * sizeof *w->back);
  w->row_capacity = w->order && w->back ? more : 0;
  return w->row_capacity ? MT_OK : mt_fail(MT_ENOMEM, "order of %lld rows", (long long)more);
}

/* From counts of arrivals, sorted by rank and expert within, to the experts' order. */
static mt_err sort_arrivals(struct state *s, struct ways *w, const int32_t *got, int32_t *offsets) {
  int64_t rows = 0;
  for (int i = 0; i < s->ranks; i++) {
    w->in_start[i] = rows;
    w->in_count[i] = 0;
    for (int e = 0; e < s->held; e++) w->in_count[i] += got[i * s->held + e];
    rows += w->in_count[i];
  }
  MT_TRY(grow_orders(w, rows));
  int32_t row = 0;
  for (int e = 0; e < s->held; e++) {
    offsets[e] = row;
    for (int i = 0; i < s->ranks; i++) {
      int64_t at = w->in_start[i];
      for (int before = 0; before < e; before++) at += got[i * s->held + before];
      for (int32_t n = 0; n < got[i * s->held + e]; n++, row++) {
        w->order[row] = (int32_t)(at + n);
        w->back[at + n] = row;
      }
    }
  }
  offsets[s->held] = row;
  return MT_OK;
}

static mt_err plan(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route) {
  struct state *s = state_of(x);
  struct ways *w = &s->layer[route->layer];
  MT_TRY(be->ops.permute_plan(be, &(struct mt_permute_plan_args){.index = route->index,
                                                                 .token_count = route->token_count,
                                                                 .top_k = route->top_k,
                                                                 .expert_count = s->experts,
                                                                 .offsets = s->all_offsets,
                                                                 .row_source = route->row_source,
                                                                 .token_row = route->token_row}));
  int64_t ones[2 * MT_MAX_EXPERTS];
  for (int i = 0; i < s->ranks; i++) ones[i] = 1, ones[s->ranks + i] = i;
  for (int e = 0; e < s->experts; e++) s->counts[e] = s->all_offsets[e + 1] - s->all_offsets[e];
  for (int i = 0; i < s->ranks; i++) {
    w->out_start[i] = s->all_offsets[i * s->held];
    w->out_count[i] = s->all_offsets[(i + 1) * s->held] - w->out_start[i];
  }
  struct mt_parts each = {ones, ones + s->ranks};
  int32_t *got = s->counts + s->experts;
  MT_TRY(mt_comm_all_to_all(s->expert, s->counts, each, got, each, (size_t)s->held * sizeof *got,
                            NULL));
  MT_TRY(sort_arrivals(s, w, got, route->offsets));
  route->row_count = route->offsets[s->held];
  return MT_OK;
}

/* Rows of one matrix in another order. */
static mt_err reorder(struct mt_backend *be, struct mt_tensor from, const int32_t *source,
                      struct mt_tensor to) {
  return be->ops.dispatch_fwd(
      be, &(struct mt_dispatch_fwd_args){.x = from, .row_source = source, .top_k = 1, .xs = to});
}

/* The staging memory as matrices of one row a choice, and of one row that comes here. */
static mt_err stage(struct state *s, const struct mt_route *route, enum mt_dtype dtype,
                    int64_t cols, struct mt_tensor *home, struct mt_tensor *away) {
  *home = mt_mat(NULL, dtype, (int64_t)route->token_count * route->top_k, cols);
  *away = mt_mat(NULL, dtype, route->row_count, cols);
  MT_TRY(grow(s->be, &s->home, &s->home_bytes, mt_bytes(home)));
  MT_TRY(grow(s->be, &s->away, &s->away_bytes, mt_bytes(away)));
  home->data = s->home;
  away->data = s->away;
  return MT_OK;
}

static mt_err send_out(struct state *s, const struct mt_route *route, struct mt_tensor home,
                       struct mt_tensor away, struct mt_tensor rows) {
  const struct ways *w = &s->layer[route->layer];
  MT_TRY(mt_comm_all_to_all(s->expert, home.data, (struct mt_parts){w->out_count, w->out_start},
                            away.data, (struct mt_parts){w->in_count, w->in_start},
                            (size_t)home.dim[1] * mt_dtype_bytes(home.dtype), NULL));
  return reorder(s->be, away, w->order, rows);
}

static mt_err send_back(struct state *s, const struct mt_route *route, struct mt_tensor rows,
                        struct mt_tensor away, struct mt_tensor home) {
  const struct ways *w = &s->layer[route->layer];
  MT_TRY(reorder(s->be, rows, w->back, away));
  return mt_comm_all_to_all(s->expert, away.data, (struct mt_parts){w->in_count, w->in_start},
                            home.data, (struct mt_parts){w->out_count, w->out_start},
                            (size_t)home.dim[1] * mt_dtype_bytes(home.dtype), NULL);
}

static mt_err dispatch(struct mt_exchange *x, struct mt_backend *be, const struct mt_route *route,
                       const struct mt_tensor *tokens, struct mt_tensor *xs) {
  struct state *s = state_of(x);
  struct mt_tensor home, away;
  MT_TRY(stage(s, route, tokens->dtype, tokens->dim[1], &home, &away));
  MT_TRY(be->ops.dispatch_fwd(
      be, &(struct mt_dispatch_fwd_args){
              .x = *tokens, .row_source = route->row_source, .top_k = route->top_k, .xs = home}));
  return send_out(s, route, home, away, *xs);
}

static mt_err dispatch_bwd(struct mt_exchange *x, struct mt_backend *be,
                           const struct mt_route *route, const struct mt_tensor *dxs,
                           struct mt_tensor *dtokens) {
  struct state *s = state_of(x);
  struct mt_tensor home, away;
  MT_TRY(stage(s, route, dxs->dtype, dxs->dim[1], &home, &away));
  MT_TRY(send_back(s, route, *dxs, away, home));
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
  struct mt_tensor home, away;
  MT_TRY(stage(s, route, prob->dtype, 1, &home, &away));
  MT_TRY(reorder(be, choices(prob), route->row_source, home));
  return send_out(s, route, home, away, choices(row_prob));
}

static mt_err dispatch_prob_bwd(struct mt_exchange *x, struct mt_backend *be,
                                const struct mt_route *route, const struct mt_tensor *drow_prob,
                                struct mt_tensor *dprob) {
  struct state *s = state_of(x);
  struct mt_tensor home, away;
  MT_TRY(stage(s, route, drow_prob->dtype, 1, &home, &away));
  MT_TRY(send_back(s, route, choices(drow_prob), away, home));
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){
              .dxs = home, .token_row = route->token_row, .top_k = 1, .dx = choices(dprob)});
}

static mt_err combine(struct mt_exchange *x, struct mt_backend *be, const struct mt_route *route,
                      const struct mt_tensor *ys, const struct mt_tensor *prob,
                      struct mt_tensor *y) {
  struct state *s = state_of(x);
  struct mt_tensor home, away;
  MT_TRY(stage(s, route, ys->dtype, ys->dim[1], &home, &away));
  MT_TRY(send_back(s, route, *ys, away, home));
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
  struct mt_tensor home, away;
  if (prob || dprob) {
    return mt_fail(MT_EUNSUPPORTED, "over ranks the probabilities go with the tokens");
  }
  MT_TRY(stage(s, route, dy->dtype, dy->dim[1], &home, &away));
  MT_TRY(be->ops.combine_bwd(
      be, &(struct mt_combine_bwd_args){
              .dy = *dy, .row_source = route->row_source, .top_k = route->top_k, .dys = home}));
  return send_out(s, route, home, away, *ys);
}

/* One reader's numbers: the sums, then the counts and how many tokens. */
static size_t record_bytes(const struct state *s, enum mt_dtype stat) {
  size_t e = (size_t)s->experts;
  return ((e + 1) * mt_dtype_bytes(stat) + (e + 1) * sizeof(int32_t) + 7) / 8 * 8;
}

static mt_err share_aux(struct mt_exchange *x, struct mt_backend *be, struct mt_tensor *aux_sums,
                        int32_t *aux_count, const int32_t **valid_count) {
  struct state *s = state_of(x);
  size_t sums = mt_bytes(aux_sums), counts = (size_t)s->experts * sizeof(int32_t);
  size_t record = record_bytes(s, aux_sums->dtype);
  int64_t parts[2 * READERS_MOST];
  (void)be;
  for (int i = 0; i < s->readers->size; i++) parts[i] = 1, parts[s->readers->size + i] = i;
  char *mine = (char *)s->aux + record * (size_t)s->readers->rank;
  memcpy(mine, aux_sums->data, sums);
  memcpy(mine + sums, aux_count, counts);
  memcpy(mine + sums + counts, *valid_count, sizeof(int32_t));
  MT_TRY(mt_comm_all_gather(s->readers, s->aux, (struct mt_parts){parts, parts + s->readers->size},
                            record, NULL));
  memset(aux_sums->data, 0, sums);
  memset(aux_count, 0, counts);
  s->valid_count = 0;
  for (int i = 0; i < s->readers->size; i++) {
    const char *r = (char *)s->aux + record * (size_t)i;
    int32_t n;
    for (int e = 0; e <= s->experts; e++) {
      if (aux_sums->dtype == MT_F64)
        ((double *)aux_sums->data)[e] += ((const double *)(const void *)r)[e];
      else
        ((float *)aux_sums->data)[e] += ((const float *)(const void *)r)[e];
    }
    for (int e = 0; e < s->experts; e++) {
      memcpy(&n, r + sums + (size_t)e * sizeof n, sizeof n);
      aux_count[e] += n;
    }
    memcpy(&n, r + sums + counts, sizeof n);
    s->valid_count += n;
  }
  *valid_count = &s->valid_count;
  return MT_OK;
}

void mt_exchange_close(struct mt_model *m) {
  struct state *s = m->exchange.impl;
  m->exchange = mt_exchange_local();
  if (!s) return;
  for (int l = 0; s->layer && l < s->layer_count; l++) {
    free(s->layer[l].order);
    free(s->layer[l].back);
  }
  s->be->mem_free(s->be, s->home, s->home_bytes);
  s->be->mem_free(s->be, s->away, s->away_bytes);
  free(s->layer);
  free(s->numbers);
  free(s->all_offsets);
  free(s->counts);
  free(s->aux);
  free(s);
}

static mt_err open_state(struct state *s, const struct mt_model *m) {
  size_t ranks = (size_t)s->ranks, layers = (size_t)m->config.layers, e = (size_t)s->experts;
  s->layer_count = m->config.layers;
  s->layer = calloc(layers, sizeof *s->layer);
  s->numbers = calloc(layers * ranks * 4, sizeof *s->numbers);
  s->all_offsets = calloc(e + 1, sizeof *s->all_offsets);
  s->counts = calloc(2 * e, sizeof *s->counts);
  s->aux = calloc((size_t)s->readers->size, record_bytes(s, m->recipe->stat));
  if (!s->layer || !s->numbers || !s->all_offsets || !s->counts || !s->aux) {
    return mt_fail(MT_ENOMEM, "exchange of %d ranks", s->ranks);
  }
  for (size_t l = 0; l < layers; l++) {
    int64_t *n = s->numbers + l * ranks * 4;
    s->layer[l] = (struct ways){.out_count = n,
                                .out_start = n + ranks,
                                .in_count = n + 2 * ranks,
                                .in_start = n + 3 * ranks};
  }
  return MT_OK;
}

mt_err mt_exchange_over(struct mt_model *m, struct mt_comm *expert, struct mt_comm *readers) {
  const struct mt_shard *shard = &m->options.shard;
  int held = shard->expert_end - shard->expert_begin;
  if (held * expert->size != m->config.experts || shard->expert_begin != held * expert->rank ||
      readers->size > READERS_MOST) {
    return mt_fail(MT_EINVAL,
                   "experts %d to %d of %d are not what member %d of %d holds, or %d readers are "
                   "more than %d",
                   shard->expert_begin, shard->expert_end, m->config.experts, expert->rank,
                   expert->size, readers->size, READERS_MOST);
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
