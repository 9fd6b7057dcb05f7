/* MoE block: residual add, RMSNorm, router, dispatch, experts (gate_up, SwiGLU, down), combine.
 * Formulas: docs/math.md, "Router", "Dispatch and combine", "SwiGLU".
 *
 * Four ways through the experts:
 * - blocks unfused, experts loop: one expert after another gathers its tokens, runs, and adds its
 *   weighted output to the result, as transformers' eager code does (over ranks as the next);
 * - experts loop: tokens are permuted once, then one expert after another runs on its slice;
 * - experts grouped: tokens are permuted once, each projection is one grouped product; the routing
 *   probability enters with SwiGLU, before the down projection (down is linear: the same result),
 *   so that backward needs no expert's output and none is kept. With blocks fused, SwiGLU is part
 *   of the products that it stands between;
 * - experts fused: the same, always with SwiGLU part of its neighbours. In an 8-bit recipe those
 *   are the quantizing: tokens are quantized on their way to their experts (on one rank), SwiGLU's
 *   output and its gradient as they are made, and neither exists in more bits.
 *
 * The loops read the row counts back to the host in each layer, forward and again backward; the
 * grouped ways never do. (An exchange over ranks does, for its own messages: par/exchange.h.)
 *
 * Over ranks the tokens may come and go in chunks (exchange.h): while the experts work on one, the
 * next is on its way here and the outputs of the one before are on theirs home. A chunk's rows lie
 * together, in expert order, and run as a whole layer's would; its share of the weights' gradients
 * is added to that of the chunks before. */
#include "model/experts.h"

/* All experts' rows of a chunk. */
static struct mt_moe_span chunk_span(const struct mt_moe *o, int chunk) {
  const struct mt_route_chunk *k = &o->route.chunk[chunk];
  int64_t ends = (int64_t)chunk * (o->route.expert_count + 1);
  return (struct mt_moe_span){.begin = k->row_begin,
                              .rows = k->row_count,
                              .accumulate = o->v->accumulate_experts || k->row_begin > 0,
                              .last = k->row_begin + k->row_count == o->route.row_count,
                              .w1 = mt_forms_of(o->gate_up),
                              .w2 = mt_forms_of(o->down),
                              .dw1 = o->gate_up->grad,
                              .dw2 = o->down->grad,
                              .groups = {.offsets = o->route.offsets + ends,
                                         .padded = o->route.padded ? o->route.padded + ends : NULL,
                                         .count = o->route.expert_count}};
}

/* Those of expert e; read_offsets has been called. */
static struct mt_moe_span expert_span(const struct mt_moe *o, int chunk, int e) {
  const int32_t *offsets = o->m->host_route + (ptrdiff_t)chunk * (o->route.expert_count + 1) + e;
  struct mt_moe_span s = chunk_span(o, chunk);
  s.begin += offsets[0];
  s.rows = offsets[1] - offsets[0];
  s.w1 = mt_weight_slice(&s.w1, e);
  s.w2 = mt_weight_slice(&s.w2, e);
  s.dw1 = mt_slice(&o->gate_up->grad, e);
  s.dw2 = mt_slice(&o->down->grad, e);
  s.groups = (struct mt_row_groups){.count = 1};
  return s;
}

static struct mt_moe moe_open(struct mt_model *m, int layer, const struct mt_view *v) {
  struct mt_layer_acts *l = &m->acts.layer[layer];
  int64_t t = v->tokens;
  struct mt_moe o = {
      .m = m,
      .be = m->be,
      .l = l,
      .v = v,
      .norm = mt_params_find(&m->params, MT_PARAM_MLP_NORM, layer),
      .router = mt_params_find(&m->params, MT_PARAM_ROUTER, layer),
      .gate_up = mt_params_find(&m->params, MT_PARAM_GATE_UP, layer),
      .down = mt_params_find(&m->params, MT_PARAM_DOWN, layer),
      .route = l->route,
      .xn = mt_top(m->acts.xn, t),
      .y = mt_top(m->acts.branch, t),
      .prob = mt_top(l->prob, t),
  };
  o.route.layer = layer;
  o.route.plan = m->acts.running * m->config.layers + layer;
  o.route.token_count = (int)t;
  return o;
}

/* The rows' buffers, once their number is known. */
static void moe_rows(struct mt_moe *o) {
  struct mt_acts *a = &o->m->acts;
  int64_t r = o->route.row_count;
  o->gu = mt_top(o->l->gate_up, r);
  o->xs = mt_top(o->l->xs, r);
  o->ys = mt_top(o->l->ys, r);
  o->h = mt_top(a->h, r);
  o->row_prob = mt_top(o->l->row_prob, r);
  o->drow_prob = mt_top(a->drow_prob, r);
}

static mt_err make_plan(struct mt_moe *o) {
  struct mt_model *m = o->m;
  bool grown;
  MT_TRY(m->exchange.plan(&m->exchange, o->be, &o->route, &o->xn));
  for (int c = 0; o->route.padded && c < o->route.chunk_count; c++) {
    int64_t ends = (int64_t)c * (o->route.expert_count + 1);
    MT_TRY(o->be->ops.pad_offsets(
        o->be, &(struct mt_pad_offsets_args){.offsets = o->route.offsets + ends,
                                             .group_count = o->route.expert_count,
                                             .padded = o->route.padded + ends}));
  }
  o->l->route = o->route;
  if (m->acts.options.over_ranks) {
    MT_TRY(mt_acts_reserve_rows(&m->acts, &m->config, m->recipe, o->be, o->route.layer,
                                o->route.row_count, &grown));
    if (grown) mt_acts_enter(&m->acts, o->be, MT_ROOM_MOE);
  }
  moe_rows(o);
  return MT_OK;
}

/* Where outputs are weighed and dispatch is undone one expert at a time: with all experts here. */
static bool scattered(const struct mt_moe *o) {
  return o->m->options.experts == MT_EXPERTS_LOOP && o->m->options.blocks == MT_BLOCKS_UNFUSED &&
         !o->m->acts.options.over_ranks;
}

static mt_err read_offsets(struct mt_moe *o) {
  size_t count = (size_t)o->route.chunk_count * (size_t)(o->route.expert_count + 1);
  return o->be->download(o->be, o->m->host_route, o->route.offsets, count * sizeof(int32_t));
}

/* The loop's forward, or for backward what of it was not kept: ys if outputs are weighed, else
 * gate_up alone. read_offsets has been called. */
static mt_err loop_forward(struct mt_moe *o, int chunk, bool again) {
  bool scatter = scattered(o) && !again;
  if (scatter) MT_TRY(o->be->zero(o->be, o->y.data, mt_bytes(&o->y)));
  for (int e = 0; e < o->route.expert_count; e++) {
    struct mt_moe_span s = expert_span(o, chunk, e);
    if (s.rows == 0) continue;
    if (scattered(o) || again) MT_TRY(mt_experts_gather(o, s.begin, s.rows));
    if (again && !o->m->acts.options.weigh_outputs)
      MT_TRY(mt_experts_up_forward(o, &s));
    else
      MT_TRY(mt_experts_forward(o, &s));
    if (scatter) {
      MT_TRY(o->be->ops.scatter_add(
          o->be, &(struct mt_scatter_add_args){.ys = mt_rows(&o->ys, s.begin, s.rows),
                                               .row_source = o->route.row_source + s.begin,
                                               .prob = o->prob,
                                               .top_k = o->route.top_k,
                                               .y = o->y}));
    }
  }
  return MT_OK;
}

static mt_err zero_expert_grad(struct mt_moe *o, const struct mt_moe_span *s, struct mt_tensor dw) {
  if (!dw.data || s->accumulate) return MT_OK;
  return o->be->zero(o->be, dw.data, mt_bytes(&dw));
}

static mt_err expert_backward(struct mt_moe *o, const struct mt_moe_span *s, struct mt_tensor dy) {
  struct mt_operand dgu;
  MT_TRY(mt_experts_down_backward(o, s, dy, &dgu));
  MT_TRY(mt_experts_up_wgrad(o, s, &dgu));
  return mt_experts_up_dgrad(o, s, &dgu);
}

/* read_offsets has been called. */
static mt_err loop_backward(struct mt_moe *o, int chunk, struct mt_tensor dy,
                            struct mt_tensor dprob, struct mt_tensor dxn) {
  if (scattered(o)) {
    MT_TRY(o->be->zero(o->be, dxn.data, mt_bytes(&dxn)));
    MT_TRY(o->be->zero(o->be, dprob.data, mt_bytes(&dprob)));
  }
  for (int e = 0; e < o->route.expert_count; e++) {
    struct mt_moe_span s = expert_span(o, chunk, e);
    if (s.rows == 0) {
      MT_TRY(zero_expert_grad(o, &s, s.dw1));
      MT_TRY(zero_expert_grad(o, &s, s.dw2));
      continue;
    }
    struct mt_tensor ys = mt_rows(&o->ys, s.begin, s.rows);
    if (scattered(o)) {
      MT_TRY(o->be->ops.combine_bwd(
          o->be, &(struct mt_combine_bwd_args){.dy = dy,
                                               .ys = ys,
                                               .row_source = o->route.row_source + s.begin,
                                               .prob = o->prob,
                                               .top_k = o->route.top_k,
                                               .dys = ys,
                                               .dprob = dprob}));
    }
    MT_TRY(expert_backward(o, &s, dy));
    if (scattered(o)) {
      MT_TRY(o->be->ops.scatter_add(
          o->be, &(struct mt_scatter_add_args){.ys = ys,
                                               .row_source = o->route.row_source + s.begin,
                                               .top_k = o->route.top_k,
                                               .y = dxn}));
    }
  }
  return MT_OK;
}

/* ---- ways to the experts and back; a chunk departs and arrives ---- */

static mt_err tokens_out(struct mt_moe *o, int chunk, enum mt_leg leg) {
  struct mt_exchange *x = &o->m->exchange;
  struct mt_trip trip = {&o->route, chunk, leg};
  if (!mt_experts_quantize_rows(o)) MT_TRY(x->dispatch(x, o->be, &trip, &o->xn, &o->xs));
  if (o->m->acts.options.weigh_outputs) return MT_OK;
  return x->dispatch_prob(x, o->be, &trip, &o->prob, &o->row_prob);
}

static mt_err outputs_home(struct mt_moe *o, int chunk, enum mt_leg leg) {
  struct mt_exchange *x = &o->m->exchange;
  struct mt_trip trip = {&o->route, chunk, leg};
  const struct mt_tensor *prob = o->m->acts.options.weigh_outputs ? &o->prob : NULL;
  return x->combine(x, o->be, &trip, &o->ys, prob, &o->y);
}

static mt_err permuted_forward(struct mt_moe *o) {
  bool loop = o->m->options.experts == MT_EXPERTS_LOOP;
  int n = o->route.chunk_count;
  MT_TRY(tokens_out(o, 0, MT_DEPART));
  if (loop) MT_TRY(read_offsets(o));
  for (int c = 0; c < n; c++) {
    struct mt_moe_span s = chunk_span(o, c);
    if (c + 1 < n) MT_TRY(tokens_out(o, c + 1, MT_DEPART));
    MT_TRY(tokens_out(o, c, MT_ARRIVE));
    if (s.rows > 0) MT_TRY(loop ? loop_forward(o, c, false) : mt_experts_forward(o, &s));
    MT_TRY(outputs_home(o, c, MT_DEPART));
    if (c > 0) MT_TRY(outputs_home(o, c - 1, MT_ARRIVE));
  }
  return outputs_home(o, n - 1, MT_ARRIVE);
}

/* Gradients of a layer's output, and of what its routing decides. */
struct gradients {
  struct mt_tensor dy, dprob, dxn;
};

static mt_err gradient_out(struct mt_moe *o, struct gradients *g, int chunk, enum mt_leg leg) {
  struct mt_exchange *x = &o->m->exchange;
  struct mt_trip trip = {&o->route, chunk, leg};
  bool weigh = o->m->acts.options.weigh_outputs;
  if (mt_experts_quantize_rows(o)) return MT_OK;
  return x->combine_bwd(x, o->be, &trip, &g->dy, weigh ? &o->prob : NULL, &o->ys,
                        weigh ? &g->dprob : NULL);
}

static mt_err gradient_home(struct mt_moe *o, struct gradients *g, int chunk, enum mt_leg leg) {
  struct mt_exchange *x = &o->m->exchange;
  struct mt_trip trip = {&o->route, chunk, leg};
  if (!o->m->acts.options.weigh_outputs)
    MT_TRY(x->dispatch_prob_bwd(x, o->be, &trip, &o->drow_prob, &g->dprob));
  return x->dispatch_bwd(x, o->be, &trip, &o->ys, &g->dxn);
}

/* gate_up, where it was not kept. */
static mt_err hidden_again(struct mt_moe *o) {
  bool loop = o->m->options.experts == MT_EXPERTS_LOOP;
  if (o->m->acts.options.weigh_outputs || !mt_layer_gate_up_lost(o->m, o->route.layer))
    return MT_OK;
  if (loop) MT_TRY(read_offsets(o));
  for (int c = 0; c < o->route.chunk_count; c++) {
    struct mt_moe_span s = chunk_span(o, c);
    if (s.rows == 0) continue;
    if (!loop && !mt_experts_quantize_rows(o)) MT_TRY(mt_experts_gather(o, s.begin, s.rows));
    MT_TRY(loop ? loop_forward(o, c, true) : mt_experts_up_forward(o, &s));
  }
  return MT_OK;
}

/* What arrived of a chunk's gradient, to where it leaves for home. Where the tokens are kept, their
 * gradient is on its way while gate_up's is made. */
static mt_err chunk_backward(struct mt_moe *o, struct gradients *g, int chunk) {
  struct mt_moe_span s = chunk_span(o, chunk);
  struct mt_operand dgu;
  bool kept = o->m->acts.options.over_ranks;
  if (s.rows == 0) return gradient_home(o, g, chunk, MT_DEPART);
  if (o->m->options.experts == MT_EXPERTS_LOOP) {
    MT_TRY(loop_backward(o, chunk, g->dy, g->dprob, g->dxn));
    return gradient_home(o, g, chunk, MT_DEPART);
  }
  MT_TRY(mt_experts_down_backward(o, &s, g->dy, &dgu));
  if (!kept) MT_TRY(mt_experts_up_wgrad(o, &s, &dgu));
  MT_TRY(mt_experts_up_dgrad(o, &s, &dgu));
  MT_TRY(gradient_home(o, g, chunk, MT_DEPART));
  return kept ? mt_experts_up_wgrad(o, &s, &dgu) : MT_OK;
}

/* From the gradient of the block's output to that of its routed tokens. Over ranks the first chunk
 * is on its way while gate_up is made again; on one it comes into the memory of the tokens that
 * gate_up is made of. */
static mt_err permuted_backward(struct mt_moe *o, struct gradients *g) {
  bool kept = o->m->acts.options.over_ranks;
  int n = o->route.chunk_count;
  if (!kept) MT_TRY(hidden_again(o));
  MT_TRY(gradient_out(o, g, 0, MT_DEPART));
  if (kept) MT_TRY(hidden_again(o));
  if (o->m->options.experts == MT_EXPERTS_LOOP) MT_TRY(read_offsets(o));
  for (int c = 0; c < n; c++) {
    if (c + 1 < n) MT_TRY(gradient_out(o, g, c + 1, MT_DEPART));
    MT_TRY(gradient_out(o, g, c, MT_ARRIVE));
    MT_TRY(chunk_backward(o, g, c));
    if (c > 0) MT_TRY(gradient_home(o, g, c - 1, MT_ARRIVE));
  }
  return gradient_home(o, g, n - 1, MT_ARRIVE);
}

mt_err mt_moe_forward(struct mt_model *m, int layer, const struct mt_view *v) {
  struct mt_moe o = moe_open(m, layer, v);
  int64_t t = v->tokens;
  mt_acts_enter(&m->acts, m->be, MT_ROOM_MOE);
  MT_TRY(mt_norm_forward(m, mt_top(o.l->s1, t), mt_top(m->acts.branch, t), o.norm,
                         mt_top(o.l->s2, t), o.xn, mt_top(o.l->rstd2, t)));
  struct mt_router_fwd_args r = {.x = o.xn,
                                 .w = o.router->compute,
                                 .valid_count = m->acts.valid_count,
                                 .renormalize = m->config.layer[layer].renormalize,
                                 .logits = mt_top(o.l->logits, t),
                                 .prob = o.prob,
                                 .index = o.route.index,
                                 .aux_prob = m->acts.aux_prob,
                                 .aux_count = m->acts.aux_count,
                                 .load = o.l->load};
  if (m->options.z_coef > 0) r.z_sum = m->acts.z_sum;
  MT_TRY(o.be->ops.router_fwd(o.be, &r));
  MT_TRY(make_plan(&o));
  if (!scattered(&o)) return permuted_forward(&o);
  MT_TRY(read_offsets(&o));
  return loop_forward(&o, 0, false);
}

/* What backward reads of forward and was not kept: s2, the normalised input, and where outputs are
 * weighed those (with gate_up; else see hidden_again). The routing was kept: tokens go where they
 * went. */
static mt_err forward_again(struct mt_moe *o, int layer) {
  struct mt_model *m = o->m;
  int64_t t = o->v->tokens;
  struct mt_tensor s1 = {0}, branch = {0};
  if (mt_layer_attention_lost(m, layer)) {
    s1 = mt_top(o->l->s1, t);
    branch = mt_top(m->acts.branch, t);
  }
  MT_TRY(
      mt_norm_forward(m, s1, branch, o->norm, mt_top(o->l->s2, t), o->xn, mt_top(o->l->rstd2, t)));
  /* ys does not outlive its room. */
  if (!m->acts.options.weigh_outputs || m->options.recompute == MT_RECOMPUTE_NONE) return MT_OK;
  MT_TRY(read_offsets(o));
  return loop_forward(o, 0, true);
}

mt_err mt_moe_backward(struct mt_model *m, int layer, const struct mt_view *v) {
  struct mt_moe o = moe_open(m, layer, v);
  int64_t t = v->tokens;
  struct mt_tensor ds = mt_top(m->acts.ds, t), dxn = o.y, dprob = mt_top(m->acts.dprob, t);
  struct gradients g = {ds, dprob, dxn};
  mt_acts_enter(&m->acts, m->be, MT_ROOM_MOE);
  moe_rows(&o);
  MT_TRY(forward_again(&o, layer));
  if (scattered(&o)) {
    MT_TRY(read_offsets(&o));
    MT_TRY(loop_backward(&o, 0, ds, dprob, dxn));
  } else {
    MT_TRY(permuted_backward(&o, &g));
  }
  mt_grad_ready(m, o.down);
  mt_grad_ready(m, o.gate_up);

  struct mt_router_bwd_args r = {.x = o.xn,
                                 .w = o.router->compute,
                                 .valid_count = m->acts.valid_count,
                                 .renormalize = m->config.layer[layer].renormalize,
                                 .logits = mt_top(o.l->logits, t),
                                 .prob = o.prob,
                                 .index = o.route.index,
                                 .dprob = dprob,
                                 .dlogits = mt_top(m->acts.dlogits, t),
                                 .dx = dxn,
                                 .accumulate_dx = 1,
                                 .dw = o.router->grad,
                                 .accumulate = v->accumulate};
  if (m->options.aux_coef > 0) r.aux_grad = m->acts.aux_grad;
  if (m->options.z_coef > 0) r.z_grad = m->acts.z_grad;
  MT_TRY(o.be->ops.router_bwd(o.be, &r));
  mt_grad_ready(m, o.router);
  return mt_norm_backward(m, dxn, mt_top(o.l->s2, t), o.norm, mt_top(o.l->rstd2, t), ds, 0,
                          v->accumulate);
}
