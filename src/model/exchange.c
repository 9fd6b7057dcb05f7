#include "model/exchange.h"

void mt_route_cut(struct mt_route *route) {
  int64_t t = route->token_count, n = route->chunk_count;
  for (int c = 0; c < n; c++) {
    int begin = (int)(t * c / n), end = (int)(t * (c + 1) / n);
    route->chunk[c] = (struct mt_route_chunk){.token_begin = begin, .token_count = end - begin};
  }
}

static mt_err local_plan(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route,
                         const struct mt_tensor *tokens) {
  (void)x, (void)tokens;
  route->chunk_count = 1;
  mt_route_cut(route);
  route->row_count = (int64_t)route->token_count * route->top_k;
  route->chunk[0].row_count = route->row_count;
  return be->ops.permute_plan(be, &(struct mt_permute_plan_args){
                                      .index = route->index,
                                      .token_count = route->token_count,
                                      .top_k = route->top_k,
                                      .expert_count = route->expert_count,
                                      .offsets = route->offsets,
                                      .row_source = route->row_source,
                                      .token_row = route->token_row,
                                  });
}

static mt_err local_dispatch(struct mt_exchange *x, struct mt_backend *be,
                             const struct mt_trip *trip, const struct mt_tensor *tokens,
                             struct mt_tensor *xs) {
  const struct mt_route *route = trip->route;
  (void)x;
  if (trip->leg != MT_DEPART) return MT_OK;
  return be->ops.dispatch_fwd(
      be, &(struct mt_dispatch_fwd_args){
              .x = *tokens, .row_source = route->row_source, .top_k = route->top_k, .xs = *xs});
}

static mt_err local_dispatch_bwd(struct mt_exchange *x, struct mt_backend *be,
                                 const struct mt_trip *trip, const struct mt_tensor *dxs,
                                 struct mt_tensor *dtokens) {
  const struct mt_route *route = trip->route;
  (void)x;
  if (trip->leg != MT_DEPART) return MT_OK;
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){
              .dxs = *dxs, .token_row = route->token_row, .top_k = route->top_k, .dx = *dtokens});
}

/* A choice (t, k) as a token of its own, one element wide. */
static struct mt_tensor choices(const struct mt_tensor *prob) {
  return mt_mat(prob->data, prob->dtype, mt_count(prob), 1);
}

static mt_err local_dispatch_prob(struct mt_exchange *x, struct mt_backend *be,
                                  const struct mt_trip *trip, const struct mt_tensor *prob,
                                  struct mt_tensor *row_prob) {
  const struct mt_route *route = trip->route;
  (void)x;
  if (trip->leg != MT_DEPART) return MT_OK;
  return be->ops.dispatch_fwd(be, &(struct mt_dispatch_fwd_args){.x = choices(prob),
                                                                 .row_source = route->row_source,
                                                                 .top_k = 1,
                                                                 .xs = choices(row_prob)});
}

static mt_err local_dispatch_prob_bwd(struct mt_exchange *x, struct mt_backend *be,
                                      const struct mt_trip *trip, const struct mt_tensor *drow_prob,
                                      struct mt_tensor *dprob) {
  const struct mt_route *route = trip->route;
  (void)x;
  if (trip->leg != MT_DEPART) return MT_OK;
  return be->ops.dispatch_bwd(be, &(struct mt_dispatch_bwd_args){.dxs = choices(drow_prob),
                                                                 .token_row = route->token_row,
                                                                 .top_k = 1,
                                                                 .dx = choices(dprob)});
}

static mt_err local_combine(struct mt_exchange *x, struct mt_backend *be,
                            const struct mt_trip *trip, const struct mt_tensor *ys,
                            const struct mt_tensor *prob, struct mt_tensor *y) {
  const struct mt_route *route = trip->route;
  (void)x;
  if (trip->leg != MT_DEPART) return MT_OK;
  struct mt_combine_fwd_args a = {
      .ys = *ys, .token_row = route->token_row, .top_k = route->top_k, .y = *y};
  if (prob) a.prob = *prob;
  return be->ops.combine_fwd(be, &a);
}

static mt_err local_combine_bwd(struct mt_exchange *x, struct mt_backend *be,
                                const struct mt_trip *trip, const struct mt_tensor *dy,
                                const struct mt_tensor *prob, struct mt_tensor *ys,
                                struct mt_tensor *dprob) {
  const struct mt_route *route = trip->route;
  (void)x;
  if (trip->leg != MT_DEPART) return MT_OK;
  struct mt_combine_bwd_args a = {
      .dy = *dy, .row_source = route->row_source, .top_k = route->top_k, .dys = *ys};
  if (prob) {
    MT_TRY(be->zero(be, dprob->data, mt_bytes(dprob)));
    a.ys = *ys;
    a.prob = *prob;
    a.dprob = *dprob;
  }
  return be->ops.combine_bwd(be, &a);
}

struct mt_exchange mt_exchange_local(void) {
  return (struct mt_exchange){.plan = local_plan,
                              .dispatch = local_dispatch,
                              .dispatch_bwd = local_dispatch_bwd,
                              .dispatch_prob = local_dispatch_prob,
                              .dispatch_prob_bwd = local_dispatch_prob_bwd,
                              .combine = local_combine,
                              .combine_bwd = local_combine_bwd};
}
