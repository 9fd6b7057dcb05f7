#include "model/exchange.h"

static mt_err local_plan(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route) {
  (void)x;
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
                             const struct mt_route *route, const struct mt_tensor *tokens,
                             struct mt_tensor *xs) {
  (void)x;
  return be->ops.dispatch_fwd(
      be, &(struct mt_dispatch_fwd_args){
              .x = *tokens, .row_source = route->row_source, .top_k = route->top_k, .xs = *xs});
}

static mt_err local_dispatch_bwd(struct mt_exchange *x, struct mt_backend *be,
                                 const struct mt_route *route, const struct mt_tensor *dxs,
                                 struct mt_tensor *dtokens) {
  (void)x;
  return be->ops.dispatch_bwd(
      be, &(struct mt_dispatch_bwd_args){
              .dxs = *dxs, .token_row = route->token_row, .top_k = route->top_k, .dx = *dtokens});
}

static mt_err local_combine(struct mt_exchange *x, struct mt_backend *be,
                            const struct mt_route *route, const struct mt_tensor *ys,
                            const struct mt_tensor *prob, struct mt_tensor *y) {
  (void)x;
  return be->ops.combine_fwd(
      be,
      &(struct mt_combine_fwd_args){
          .ys = *ys, .token_row = route->token_row, .prob = *prob, .top_k = route->top_k, .y = *y});
}

static mt_err local_combine_bwd(struct mt_exchange *x, struct mt_backend *be,
                                const struct mt_route *route, const struct mt_tensor *dy,
                                const struct mt_tensor *prob, struct mt_tensor *ys,
                                struct mt_tensor *dprob) {
  (void)x;
  MT_TRY(be->zero(be, dprob->data, mt_bytes(dprob)));
  return be->ops.combine_bwd(be, &(struct mt_combine_bwd_args){.dy = *dy,
                                                               .ys = *ys,
                                                               .row_source = route->row_source,
                                                               .prob = *prob,
                                                               .top_k = route->top_k,
                                                               .dys = *ys,
                                                               .dprob = *dprob});
}

struct mt_exchange mt_exchange_local(void) {
  return (struct mt_exchange){.plan = local_plan,
                              .dispatch = local_dispatch,
                              .dispatch_bwd = local_dispatch_bwd,
                              .combine = local_combine,
                              .combine_bwd = local_combine_bwd};
}
