/* Router and dispatcher. Formulas: docs/math.md, "Router", "Dispatch and combine". */
#include <stdlib.h>

#include "api/blocks.h"
#include "base/error.h"
#include "model/exchange.h"

struct mt_router {
  struct mt_space *s;
  struct mt_router_shape shape;
  struct mt_weight w;
  struct mt_array *valid, *coef, *aux_prob, *aux_count, *load, *aux_loss, *aux_grad;
  struct mt_array *z_coef, *z_sum, *z_loss, *z_grad; /* NULL: no z-loss */
  struct mt_array *logits, *dlogits;
  const struct mt_recipe *recipe; /* of the last forward; NULL: none */
  const struct mt_array *x, *prob, *index;
};

mt_err mt_router_create(mt_space *s, const struct mt_router_shape *shape, mt_router **out) {
  int e = shape->experts, k = shape->top_k;
  mt_err err;
  if (shape->hidden < 1 || e < 1 || e > MT_OPS_MAX_EXPERTS || k < 1 || k > e ||
      k > MT_OPS_MAX_TOP_K || !(shape->aux_coef >= 0 && shape->aux_coef < 1e6) ||
      !(shape->z_coef >= 0 && shape->z_coef < 1e6)) {
    return mt_fail(MT_EINVAL, "router: hidden %d, %d experts, top_k %d, aux_coef %g, z_coef %g",
                   shape->hidden, e, k, shape->aux_coef, shape->z_coef);
  }
  struct mt_router *r = calloc(1, sizeof *r);
  if (!r) return mt_fail(MT_ENOMEM, "a router");
  r->s = s;
  r->shape = *shape;
  const float coef = (float)shape->aux_coef, z_coef = (float)shape->z_coef;
  MT_GO(mt_weight_create(s, &r->w, 2, e, shape->hidden, 1, 0));
  MT_GO(mt_array_ensure_ints(s, &r->valid, 1));
  MT_GO(mt_array_ensure(s, &r->coef, MT_F32, 1, 1, 1, 1));
  MT_GO(s->be.upload(&s->be, r->coef->t.data, &coef, sizeof coef));
  MT_GO(mt_array_ensure(s, &r->aux_prob, s->full, 1, e, 1, 1));
  MT_GO(mt_array_ensure_ints(s, &r->aux_count, e));
  MT_GO(mt_array_ensure_ints(s, &r->load, e));
  MT_GO(mt_array_ensure(s, &r->aux_loss, s->full, 1, 1, 1, 1));
  MT_GO(mt_array_ensure(s, &r->aux_grad, s->full, 1, e, 1, 1));
  if (shape->z_coef > 0) {
    MT_GO(mt_array_ensure(s, &r->z_coef, MT_F32, 1, 1, 1, 1));
    MT_GO(s->be.upload(&s->be, r->z_coef->t.data, &z_coef, sizeof z_coef));
    MT_GO(mt_array_ensure(s, &r->z_sum, s->full, 1, 1, 1, 1));
    MT_GO(mt_array_ensure(s, &r->z_loss, s->full, 1, 1, 1, 1));
    MT_GO(mt_array_ensure(s, &r->z_grad, s->full, 1, 1, 1, 1));
  }
done:
  if (err)
    mt_router_free(r);
  else
    *out = r;
  return err;
}

void mt_router_free(mt_router *r) {
  if (!r) return;
  struct mt_array *const all[] = {r->valid,    r->coef,     r->aux_prob, r->aux_count, r->load,
                                  r->aux_loss, r->aux_grad, r->z_coef,   r->z_sum,     r->z_loss,
                                  r->z_grad,   r->logits,   r->dlogits};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) mt_array_free(all[i]);
  mt_weight_free(&r->w);
  free(r);
}

mt_array *mt_router_parameter(mt_router *r) {
  return r->w.value;
}

mt_array *mt_router_gradient(mt_router *r) {
  return r->w.grad;
}

static mt_err reserve(struct mt_router *r, int64_t tokens) {
  MT_TRY(mt_space_reserve(r->s, &(struct mt_limits){.rows = tokens,
                                                    .hidden = r->shape.hidden,
                                                    .experts = r->shape.experts,
                                                    .top_k = r->shape.top_k}));
  return mt_array_ensure(r->s, &r->logits, r->s->full, 2, tokens, r->shape.experts, 1);
}

mt_err mt_router_forward(mt_router *r, const mt_array *x, mt_array *prob, mt_array *index) {
  struct mt_space *s = r->s;
  struct mt_backend *be = &s->be;
  const struct mt_recipe *recipe = mt_space_recipe(s);
  int64_t t = x ? x->t.dim[0] : 0;
  struct mt_tensor w;
  MT_TRY(mt_array_check(x, s, "x", recipe->act, 2, t, r->shape.hidden));
  MT_TRY(mt_array_check(prob, s, "prob", s->full, 2, t, r->shape.top_k));
  MT_TRY(mt_array_check(index, s, "index", MT_I32, 2, t, r->shape.top_k));
  const int32_t valid = (int32_t)t;
  r->recipe = NULL;
  MT_TRY(reserve(r, t));
  MT_TRY(mt_weight_compute(&r->w, recipe, &w));
  MT_TRY(mt_array_write_ints(r->valid, &valid));
  MT_TRY(be->zero(be, r->aux_prob->t.data, mt_bytes(&r->aux_prob->t)));
  MT_TRY(be->zero(be, r->aux_count->t.data, mt_bytes(&r->aux_count->t)));
  struct mt_router_fwd_args forward = {.x = x->t,
                                       .w = w,
                                       .valid_count = r->valid->t.data,
                                       .renormalize = r->shape.renormalize,
                                       .logits = r->logits->t,
                                       .prob = prob->t,
                                       .index = index->t.data,
                                       .aux_prob = r->aux_prob->t,
                                       .aux_count = r->aux_count->t.data,
                                       .load = r->load->t.data};
  struct mt_aux_loss_args aux = {.aux_prob = r->aux_prob->t,
                                 .aux_count = r->aux_count->t.data,
                                 .valid_count = r->valid->t.data,
                                 .layer_count = 1,
                                 .coef = r->coef->t.data,
                                 .loss = r->aux_loss->t,
                                 .grad = r->aux_grad->t};
  if (r->z_sum) {
    MT_TRY(be->zero(be, r->z_sum->t.data, mt_bytes(&r->z_sum->t)));
    forward.z_sum = aux.z_sum = r->z_sum->t;
    aux.z_coef = r->z_coef->t.data;
    aux.z_loss = r->z_loss->t;
    aux.z_grad = r->z_grad->t;
  }
  MT_TRY(be->ops.router_fwd(be, &forward));
  MT_TRY(be->ops.aux_loss(be, &aux));
  r->recipe = recipe;
  r->x = x;
  r->prob = prob;
  r->index = index;
  return MT_OK;
}

mt_err mt_router_aux_loss(mt_router *r, double *loss) {
  if (!r->recipe) return mt_fail(MT_EINVAL, "router: no forward yet");
  return mt_array_read(r->aux_loss, loss);
}

mt_err mt_router_z_loss(mt_router *r, double *loss) {
  if (!r->recipe) return mt_fail(MT_EINVAL, "router: no forward yet");
  *loss = 0;
  return r->z_loss ? mt_array_read(r->z_loss, loss) : MT_OK;
}

mt_err mt_router_backward(mt_router *r, const mt_array *dprob, mt_array *dx, int accumulate) {
  struct mt_space *s = r->s;
  if (!r->recipe) return mt_fail(MT_EINVAL, "router: backward without a forward");
  int64_t t = r->x->t.dim[0];
  struct mt_router_bwd_args a = {.x = r->x->t,
                                 .valid_count = r->valid->t.data,
                                 .renormalize = r->shape.renormalize,
                                 .logits = r->logits->t,
                                 .prob = r->prob->t,
                                 .index = r->index->t.data,
                                 .accumulate_dx = 1,
                                 .dw = r->w.grad->t,
                                 .accumulate = accumulate != 0};
  MT_TRY(mt_array_check(dprob, s, "dprob", s->full, 2, t, r->shape.top_k));
  MT_TRY(mt_array_check(dx, s, "dx", r->recipe->act, 2, t, r->shape.hidden));
  MT_TRY(mt_array_ensure(s, &r->dlogits, s->full, 2, t, r->shape.experts, 1));
  MT_TRY(mt_weight_compute(&r->w, r->recipe, &a.w));
  a.dprob = dprob->t;
  a.dx = dx->t;
  a.dlogits = r->dlogits->t;
  if (r->shape.aux_coef > 0) a.aux_grad = r->aux_grad->t;
  if (r->z_grad) a.z_grad = r->z_grad->t;
  return s->be.ops.router_bwd(&s->be, &a);
}

/* ---- dispatcher ---- */

struct mt_dispatcher {
  struct mt_space *s;
  struct mt_exchange exchange;
  struct mt_route route;
  struct mt_array *offsets, *row_source, *token_row;
  bool planned;
};

mt_err mt_dispatcher_create(mt_space *s, int experts, int top_k, mt_dispatcher **out) {
  if (experts < 1 || experts > MT_OPS_MAX_EXPERTS || top_k < 1 || top_k > MT_OPS_MAX_TOP_K)
    return mt_fail(MT_EINVAL, "dispatcher: %d experts, top_k %d", experts, top_k);
  struct mt_dispatcher *d = calloc(1, sizeof *d);
  if (!d) return mt_fail(MT_ENOMEM, "a dispatcher");
  d->s = s;
  d->exchange = mt_exchange_local();
  d->route = (struct mt_route){.top_k = top_k, .expert_count = experts};
  mt_err err = mt_array_ensure_ints(s, &d->offsets, (int64_t)experts + 1);
  if (err)
    mt_dispatcher_free(d);
  else
    *out = d;
  return err;
}

void mt_dispatcher_free(mt_dispatcher *d) {
  if (!d) return;
  mt_array_free(d->offsets);
  mt_array_free(d->row_source);
  mt_array_free(d->token_row);
  free(d);
}

mt_err mt_dispatcher_plan(mt_dispatcher *d, const mt_array *index) {
  int64_t t = index ? index->t.dim[0] : 0;
  MT_TRY(mt_array_check(index, d->s, "index", MT_I32, 2, t, d->route.top_k));
  d->planned = false;
  MT_TRY(mt_space_reserve(d->s, &(struct mt_limits){.rows = t * d->route.top_k,
                                                    .hidden = 1,
                                                    .experts = d->route.expert_count,
                                                    .top_k = d->route.top_k}));
  MT_TRY(mt_array_ensure_ints(d->s, &d->row_source, t * d->route.top_k));
  MT_TRY(mt_array_ensure_ints(d->s, &d->token_row, t * d->route.top_k));
  d->route.token_count = (int)t;
  d->route.index = index->t.data;
  d->route.offsets = d->offsets->t.data;
  d->route.row_source = d->row_source->t.data;
  d->route.token_row = d->token_row->t.data;
  MT_TRY(d->exchange.plan(&d->exchange, &d->s->be, &d->route, NULL));
  d->planned = true;
  return MT_OK;
}

const mt_array *mt_dispatcher_offsets(const mt_dispatcher *d) {
  return d->planned ? d->offsets : NULL;
}

/* tokens [T, width] and rows [R, width], both of `tokens`' format, which is an activation's. */
static mt_err check_pair(const mt_dispatcher *d, const mt_array *tokens, const char *tokens_name,
                         const mt_array *rows, const char *rows_name) {
  if (!d->planned) return mt_fail(MT_EINVAL, "dispatcher: no plan yet");
  if (!tokens || tokens->t.dtype == MT_I32)
    return mt_fail(MT_EINVAL, "%s is NULL or holds int32", tokens_name);
  enum mt_dtype act = tokens->t.dtype;
  int64_t width = tokens->t.dim[1], t = d->route.token_count;
  MT_TRY(mt_array_check(tokens, d->s, tokens_name, act, 2, t, width));
  MT_TRY(mt_array_check(rows, d->s, rows_name, act, 2, t * d->route.top_k, width));
  return mt_space_reserve(d->s, &(struct mt_limits){.rows = t * d->route.top_k, .hidden = width});
}

static mt_err check_prob(const mt_dispatcher *d, const mt_array *prob, const char *name) {
  if (!d->planned) return mt_fail(MT_EINVAL, "dispatcher: no plan yet");
  return mt_array_check(prob, d->s, name, d->s->full, 2, d->route.token_count, d->route.top_k);
}

static mt_err check_scale(const mt_dispatcher *d, const mt_array *scale, const char *name) {
  int64_t rows = (int64_t)d->route.token_count * d->route.top_k;
  return mt_array_check(scale, d->s, name, d->s->full, 1, rows, 1);
}

/* All experts are here: what departs has arrived. */
static struct mt_trip trip_of(const mt_dispatcher *d) {
  return (struct mt_trip){.route = &d->route, .leg = MT_DEPART};
}

mt_err mt_dispatch_forward(mt_dispatcher *d, const mt_array *x, mt_array *xs) {
  MT_TRY(check_pair(d, x, "x", xs, "xs"));
  struct mt_trip trip = trip_of(d);
  return d->exchange.dispatch(&d->exchange, &d->s->be, &trip, &x->t, &xs->t);
}

mt_err mt_dispatch_backward(mt_dispatcher *d, const mt_array *dxs, mt_array *dx) {
  MT_TRY(check_pair(d, dx, "dx", dxs, "dxs"));
  struct mt_trip trip = trip_of(d);
  return d->exchange.dispatch_bwd(&d->exchange, &d->s->be, &trip, &dxs->t, &dx->t);
}

mt_err mt_dispatch_prob_forward(mt_dispatcher *d, const mt_array *prob, mt_array *row_scale) {
  MT_TRY(check_prob(d, prob, "prob"));
  MT_TRY(check_scale(d, row_scale, "row_scale"));
  struct mt_trip trip = trip_of(d);
  return d->exchange.dispatch_prob(&d->exchange, &d->s->be, &trip, &prob->t, &row_scale->t);
}

mt_err mt_dispatch_prob_backward(mt_dispatcher *d, const mt_array *drow_scale, mt_array *dprob) {
  MT_TRY(check_prob(d, dprob, "dprob"));
  MT_TRY(check_scale(d, drow_scale, "drow_scale"));
  struct mt_trip trip = trip_of(d);
  return d->exchange.dispatch_prob_bwd(&d->exchange, &d->s->be, &trip, &drow_scale->t, &dprob->t);
}

mt_err mt_combine_forward(mt_dispatcher *d, const mt_array *ys, const mt_array *prob, mt_array *y) {
  MT_TRY(check_pair(d, y, "y", ys, "ys"));
  if (prob) MT_TRY(check_prob(d, prob, "prob"));
  struct mt_trip trip = trip_of(d);
  return d->exchange.combine(&d->exchange, &d->s->be, &trip, &ys->t, prob ? &prob->t : NULL, &y->t);
}

mt_err mt_combine_backward(mt_dispatcher *d, const mt_array *dy, const mt_array *prob,
                           const mt_array *ys, mt_array *dys, mt_array *dprob) {
  struct mt_backend *be = &d->s->be;
  MT_TRY(check_pair(d, dy, "dy", dys, "dys"));
  if (!prob != !ys || !prob != !dprob)
    return mt_fail(MT_EINVAL, "combine: prob, ys and dprob go together");
  struct mt_combine_bwd_args a = {
      .dy = dy->t, .row_source = d->route.row_source, .top_k = d->route.top_k, .dys = dys->t};
  if (prob) {
    MT_TRY(check_pair(d, dy, "dy", ys, "ys"));
    MT_TRY(check_prob(d, prob, "prob"));
    MT_TRY(check_prob(d, dprob, "dprob"));
    MT_TRY(be->zero(be, dprob->t.data, mt_bytes(&dprob->t)));
    a.ys = ys->t;
    a.prob = prob->t;
    a.dprob = dprob->t;
  }
  return be->ops.combine_bwd(be, &a);
}
