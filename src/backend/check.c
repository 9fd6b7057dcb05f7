#include "backend/check_args.h"

#include <stdio.h>

static void shape_text(char *out, size_t size, const struct mt_tensor *t) {
  snprintf(out, size, "%s[%lld%s%.0lld%s%.0lld]", mt_dtype_name(t->dtype), (long long)t->dim[0],
           t->rank > 1 ? "," : "", t->rank > 1 ? (long long)t->dim[1] : 0LL, t->rank > 2 ? "," : "",
           t->rank > 2 ? (long long)t->dim[2] : 0LL);
}

mt_err mt_check_tensor(const char *op, const char *arg, const struct mt_tensor *t,
                       enum mt_presence need, enum mt_dtype dtype, int rank, int64_t d0, int64_t d1,
                       int64_t d2) {
  if (!t->data && mt_count(t) != 0) {
    if (need == OPTIONAL) return MT_OK;
    return mt_fail(MT_ESHAPE, "%s: %s is missing", op, arg);
  }
  bool dtype_ok = dtype == MT_DTYPE_COUNT
                      ? t->dtype == MT_F32 || t->dtype == MT_BF16 || t->dtype == MT_F64
                      : t->dtype == dtype;
  bool ok = t->rank == rank && (d0 == ANY_ROWS || t->dim[0] == d0) &&
            (rank < 2 || t->dim[1] == d1) && (rank < 3 || t->dim[2] == d2) &&
            (rank < 2 || t->ld >= t->dim[rank - 1]);
  if (dtype_ok && ok) return MT_OK;
  struct mt_tensor expected = {
      NULL, dtype == MT_DTYPE_COUNT ? t->dtype : dtype, rank, {d0, d1, d2}, 0};
  char have[96], must[96];
  shape_text(have, sizeof have, t);
  shape_text(must, sizeof must, &expected);
  return mt_fail(MT_ESHAPE, "%s: %s is %s, expected %s", op, arg, have, must);
}

mt_err mt_check_present(const char *op, const char *arg, const void *p) {
  return p ? MT_OK : mt_fail(MT_ESHAPE, "%s: %s is missing", op, arg);
}

/* A parameter gradient's format: that of the statistics, or the activations' own BF16. */
static enum mt_dtype grad_of(const struct mt_tensor *act, const struct mt_tensor *grad) {
  return act->dtype == MT_BF16 && grad->dtype == MT_BF16 ? MT_BF16 : stat_of(act);
}

mt_err mt_check_embed_fwd(const struct mt_embed_fwd_args *a) {
  const char *op = "embed_fwd";
  PTR(ids);
  M2(table, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->table.dim[1]);
  M2(out, REQUIRED, a->table.dtype, ANY_ROWS, a->table.dim[1]);
  return MT_OK;
}

mt_err mt_check_embed_bwd(const struct mt_embed_bwd_args *a) {
  const char *op = "embed_bwd";
  PTR(ids);
  PTR(valid_count);
  M2(dout, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->dtable.dim[1]);
  M2(dtable, REQUIRED, grad_of(&a->dout, &a->dtable), ANY_ROWS, a->dtable.dim[1]);
  return MT_OK;
}

mt_err mt_check_add(const struct mt_add_args *a) {
  const char *op = "add";
  M2(a, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->a.dim[1]);
  M2(b, REQUIRED, a->a.dtype, a->a.dim[0], a->a.dim[1]);
  M2(y, REQUIRED, a->a.dtype, a->a.dim[0], a->a.dim[1]);
  return MT_OK;
}

mt_err mt_check_rmsnorm_fwd(const struct mt_rmsnorm_fwd_args *a) {
  const char *op = "rmsnorm_fwd";
  int64_t t = a->x.dim[0], h = a->x.dim[1];
  M2(x, REQUIRED, MT_DTYPE_COUNT, t, h);
  M2(residual, OPTIONAL, a->x.dtype, t, h);
  V1(weight, REQUIRED, a->x.dtype, h);
  M2(sum, OPTIONAL, a->x.dtype, t, h);
  M2(y, REQUIRED, a->x.dtype, t, h);
  V1(rstd, REQUIRED, stat_of(&a->x), t);
  return MT_OK;
}

mt_err mt_check_rmsnorm_bwd(const struct mt_rmsnorm_bwd_args *a) {
  const char *op = "rmsnorm_bwd";
  int64_t t = a->x.dim[0], h = a->x.dim[1];
  M2(x, REQUIRED, MT_DTYPE_COUNT, t, h);
  M2(dy, REQUIRED, a->x.dtype, t, h);
  V1(weight, REQUIRED, a->x.dtype, h);
  V1(rstd, REQUIRED, stat_of(&a->x), t);
  M2(dresidual, OPTIONAL, a->x.dtype, t, h);
  M2(dx, REQUIRED, a->x.dtype, t, h);
  V1(dweight, OPTIONAL, grad_of(&a->x, &a->dweight), h);
  return MT_OK;
}

static mt_err linear(const char *op, const struct mt_tensor *x, const struct mt_tensor *w,
                     const struct mt_tensor *y, enum mt_dtype act, const int32_t *offsets) {
  if (w->rank != (offsets ? 3 : 2)) {
    return mt_fail(MT_ESHAPE, "%s: weight of rank %d %s offsets", op, w->rank,
                   offsets ? "with" : "without");
  }
  if (!w->data) return mt_fail(MT_ESHAPE, "%s: weight is missing", op);
  int64_t out = w->dim[w->rank - 2], in = w->dim[w->rank - 1];
  MT_TRY(mt_check_tensor(op, "input side", x, REQUIRED, act, 2, y->dim[0], in, 1));
  return mt_check_tensor(op, "output side", y, REQUIRED, act, 2, y->dim[0], out, 1);
}

mt_err mt_check_linear_fwd(const struct mt_linear_fwd_args *a) {
  if (a->w.dtype != a->x.dtype) {
    return mt_fail(MT_ESHAPE, "linear_fwd: weight is %s, input %s", mt_dtype_name(a->w.dtype),
                   mt_dtype_name(a->x.dtype));
  }
  return linear("linear_fwd", &a->x, &a->w, &a->y, a->x.dtype, a->offsets);
}

mt_err mt_check_linear_dgrad(const struct mt_linear_dgrad_args *a) {
  if (a->w.dtype != a->dy.dtype) {
    return mt_fail(MT_ESHAPE, "linear_dgrad: weight is %s, gradient %s", mt_dtype_name(a->w.dtype),
                   mt_dtype_name(a->dy.dtype));
  }
  return linear("linear_dgrad", &a->dx, &a->w, &a->dy, a->dy.dtype, a->offsets);
}

mt_err mt_check_linear_wgrad(const struct mt_linear_wgrad_args *a) {
  if (a->dw.dtype != grad_of(&a->x, &a->dw)) {
    return mt_fail(MT_ESHAPE, "linear_wgrad: gradient is %s", mt_dtype_name(a->dw.dtype));
  }
  if (a->sumsq && a->dw.ld != a->dw.dim[a->dw.rank - 1]) {
    return mt_fail(MT_ESHAPE, "linear_wgrad: squares of rows of %lld, %lld apart",
                   (long long)a->dw.dim[a->dw.rank - 1], (long long)a->dw.ld);
  }
  return linear("linear_wgrad", &a->x, &a->dw, &a->dy, a->x.dtype, a->offsets);
}

mt_err mt_check_rope_table(const struct mt_rope_table_args *a) {
  const char *op = "rope_table";
  PTR(positions);
  PTR(inv_freq);
  M2(cos, REQUIRED, stat_of(&a->cos), ANY_ROWS, a->cos.dim[1]);
  M2(sin, REQUIRED, a->cos.dtype, a->cos.dim[0], a->cos.dim[1]);
  return MT_OK;
}

static int64_t qkv_width(int kv_heads, int q_per_kv, int head_dim) {
  return (int64_t)kv_heads * (q_per_kv + 2) * head_dim;
}

mt_err mt_check_rope(const struct mt_rope_args *a) {
  const char *op = "rope";
  int64_t t = a->qkv.dim[0];
  M2(qkv, REQUIRED, MT_DTYPE_COUNT, t, qkv_width(a->kv_heads, a->q_per_kv, a->head_dim));
  M2(cos, REQUIRED, stat_of(&a->qkv), t, a->head_dim / 2);
  M2(sin, REQUIRED, stat_of(&a->qkv), t, a->head_dim / 2);
  return MT_OK;
}

mt_err mt_check_attention_fwd(const struct mt_attention_fwd_args *a) {
  const char *op = "attention_fwd";
  int64_t t = a->qkv.dim[0], heads = (int64_t)a->kv_heads * a->q_per_kv;
  PTR(cu_seqlens);
  M2(qkv, REQUIRED, MT_DTYPE_COUNT, t, qkv_width(a->kv_heads, a->q_per_kv, a->head_dim));
  M2(out, REQUIRED, a->qkv.dtype, t, heads * a->head_dim);
  M2(lse, REQUIRED, stat_of(&a->qkv), t, heads);
  return MT_OK;
}

mt_err mt_check_attention_bwd(const struct mt_attention_bwd_args *a) {
  const char *op = "attention_bwd";
  MT_TRY(mt_context(mt_check_attention_fwd(&a->fwd), "%s", op));
  int64_t t = a->fwd.qkv.dim[0];
  M2(dout, REQUIRED, a->fwd.qkv.dtype, t, a->fwd.out.dim[1]);
  M2(dqkv, REQUIRED, a->fwd.qkv.dtype, t, a->fwd.qkv.dim[1]);
  return MT_OK;
}

static mt_err cache_room(const char *op, const struct mt_tensor *k, int start, int64_t t) {
  if (start >= 0 && start <= k->dim[0] && t <= k->dim[0] - start) return MT_OK;
  return mt_fail(MT_ESHAPE, "%s: rows %d to %lld of a cache of %lld", op, start,
                 (long long)(start + t), (long long)k->dim[0]);
}

mt_err mt_check_kv_append(const struct mt_kv_append_args *a) {
  const char *op = "kv_append";
  int64_t t = a->qkv.dim[0], width = (int64_t)a->kv_heads * a->head_dim;
  M2(qkv, REQUIRED, MT_DTYPE_COUNT, t, qkv_width(a->kv_heads, a->q_per_kv, a->head_dim));
  M2(k, REQUIRED, a->qkv.dtype, ANY_ROWS, width);
  M2(v, REQUIRED, a->qkv.dtype, a->k.dim[0], width);
  return cache_room(op, &a->k, a->start, t);
}

mt_err mt_check_attention_cache(const struct mt_attention_cache_args *a) {
  const char *op = "attention_cache";
  int64_t t = a->qkv.dim[0], width = (int64_t)a->kv_heads * a->head_dim;
  M2(qkv, REQUIRED, MT_DTYPE_COUNT, t, qkv_width(a->kv_heads, a->q_per_kv, a->head_dim));
  M2(k, REQUIRED, a->qkv.dtype, ANY_ROWS, width);
  M2(v, REQUIRED, a->qkv.dtype, a->k.dim[0], width);
  M2(out, REQUIRED, a->qkv.dtype, t, width * a->q_per_kv);
  return cache_room(op, &a->k, a->start, t);
}

mt_err mt_check_router_fwd(const struct mt_router_fwd_args *a) {
  const char *op = "router_fwd";
  int64_t t = a->x.dim[0], e = a->w.dim[0], k = a->prob.dim[1];
  enum mt_dtype stat = stat_of(&a->x);
  M2(x, REQUIRED, MT_DTYPE_COUNT, t, a->w.dim[1]);
  M2(w, REQUIRED, a->x.dtype, e, a->w.dim[1]);
  M2(logits, REQUIRED, stat, t, e);
  M2(prob, REQUIRED, stat, t, k);
  V1(aux_prob, REQUIRED, stat, e);
  V1(z_sum, OPTIONAL, stat, 1);
  PTR(valid_count);
  PTR(index);
  PTR(aux_count);
  PTR(load);
  if (k < 1 || k > e || k > MT_OPS_MAX_TOP_K || e > MT_OPS_MAX_EXPERTS)
    return mt_fail(MT_ESHAPE, "router_fwd: top %lld of %lld experts", (long long)k, (long long)e);
  return MT_OK;
}

mt_err mt_check_aux_loss(const struct mt_aux_loss_args *a) {
  const char *op = "aux_loss";
  V1(aux_prob, REQUIRED, stat_of(&a->aux_prob), a->aux_prob.dim[0]);
  V1(loss, REQUIRED, a->aux_prob.dtype, 1);
  V1(grad, REQUIRED, a->aux_prob.dtype, a->aux_prob.dim[0]);
  PTR(aux_count);
  PTR(valid_count);
  PTR(coef);
  if (!a->z_sum.data) return MT_OK;
  V1(z_sum, REQUIRED, a->aux_prob.dtype, 1);
  V1(z_loss, REQUIRED, a->aux_prob.dtype, 1);
  V1(z_grad, REQUIRED, a->aux_prob.dtype, 1);
  PTR(z_coef);
  return MT_OK;
}

mt_err mt_check_router_bwd(const struct mt_router_bwd_args *a) {
  const char *op = "router_bwd";
  int64_t t = a->x.dim[0], h = a->x.dim[1], e = a->w.dim[0], k = a->prob.dim[1];
  enum mt_dtype stat = stat_of(&a->x);
  M2(x, REQUIRED, MT_DTYPE_COUNT, t, h);
  M2(w, REQUIRED, a->x.dtype, e, h);
  M2(logits, REQUIRED, stat, t, e);
  M2(prob, REQUIRED, stat, t, k);
  M2(dprob, REQUIRED, stat, t, k);
  V1(aux_grad, OPTIONAL, stat, e);
  V1(z_grad, OPTIONAL, stat, 1);
  M2(dlogits, REQUIRED, stat, t, e);
  M2(dx, REQUIRED, a->x.dtype, t, h);
  M2(dw, OPTIONAL, grad_of(&a->x, &a->dw), e, h);
  PTR(valid_count);
  PTR(index);
  return MT_OK;
}

mt_err mt_check_permute_plan(const struct mt_permute_plan_args *a) {
  const char *op = "permute_plan";
  PTR(index);
  PTR(offsets);
  PTR(row_source);
  PTR(token_row);
  if (a->token_count < 0 || a->top_k < 1 || a->expert_count < 1 ||
      (int64_t)a->token_count * a->top_k > INT32_MAX) {
    return mt_fail(MT_ESHAPE, "%s: %d tokens, top %d of %d experts", op, a->token_count, a->top_k,
                   a->expert_count);
  }
  return MT_OK;
}

mt_err mt_check_arrival_plan(const struct mt_arrival_plan_args *a) {
  const char *op = "arrival_plan";
  PTR(sent);
  PTR(offsets);
  if (a->row_count > 0) {
    PTR(order);
    PTR(back);
  }
  if (a->rank_count < 1 || a->expert_count < 1 || a->row_count < 0 || a->row_count > INT32_MAX) {
    return mt_fail(MT_ESHAPE, "%s: %lld rows of %d ranks for %d experts", op,
                   (long long)a->row_count, a->rank_count, a->expert_count);
  }
  return MT_OK;
}

mt_err mt_check_aux_join(const struct mt_aux_join_args *a) {
  const char *op = "aux_join";
  PTR(records);
  PTR(aux_count);
  PTR(valid_count);
  V1(aux_sums, REQUIRED, a->aux_sums.dtype == MT_F64 ? MT_F64 : MT_F32, a->aux_sums.dim[0]);
  if (a->rank_count < 1) return mt_fail(MT_ESHAPE, "%s: %d ranks", op, a->rank_count);
  return MT_OK;
}

mt_err mt_check_parts_sum(const struct mt_parts_sum_args *a) {
  const char *op = "parts_sum";
  M2(parts, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->out.dim[0]);
  V1(out, REQUIRED, a->parts.dtype, a->out.dim[0]);
  if (a->parts.dim[0] < 1) return mt_fail(MT_ESHAPE, "%s: no parts", op);
  return MT_OK;
}

mt_err mt_check_dispatch_fwd(const struct mt_dispatch_fwd_args *a) {
  const char *op = "dispatch_fwd";
  PTR(row_source);
  M2(x, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->x.dim[1]);
  M2(xs, REQUIRED, a->x.dtype, ANY_ROWS, a->x.dim[1]);
  return MT_OK;
}

mt_err mt_check_dispatch_bwd(const struct mt_dispatch_bwd_args *a) {
  const char *op = "dispatch_bwd";
  PTR(token_row);
  M2(dxs, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->dxs.dim[1]);
  M2(dx, REQUIRED, a->dxs.dtype, ANY_ROWS, a->dxs.dim[1]);
  return MT_OK;
}

mt_err mt_check_combine_fwd(const struct mt_combine_fwd_args *a) {
  const char *op = "combine_fwd";
  PTR(token_row);
  M2(ys, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->ys.dim[1]);
  M2(y, REQUIRED, a->ys.dtype, ANY_ROWS, a->ys.dim[1]);
  M2(prob, OPTIONAL, stat_of(&a->y), a->y.dim[0], a->top_k);
  return MT_OK;
}

mt_err mt_check_combine_bwd(const struct mt_combine_bwd_args *a) {
  const char *op = "combine_bwd";
  PTR(row_source);
  M2(dy, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->dy.dim[1]);
  M2(dys, REQUIRED, a->dy.dtype, ANY_ROWS, a->dy.dim[1]);
  M2(ys, OPTIONAL, a->dy.dtype, a->dys.dim[0], a->dy.dim[1]);
  M2(prob, OPTIONAL, stat_of(&a->dy), a->dy.dim[0], a->top_k);
  M2(dprob, OPTIONAL, stat_of(&a->dy), a->dy.dim[0], a->top_k);
  return MT_OK;
}

mt_err mt_check_scatter_add(const struct mt_scatter_add_args *a) {
  const char *op = "scatter_add";
  PTR(row_source);
  M2(y, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->y.dim[1]);
  M2(ys, REQUIRED, a->y.dtype, ANY_ROWS, a->y.dim[1]);
  M2(prob, OPTIONAL, stat_of(&a->y), a->y.dim[0], a->top_k);
  return MT_OK;
}

mt_err mt_check_swiglu_fwd(const struct mt_swiglu_fwd_args *a) {
  const char *op = "swiglu_fwd";
  int64_t r = a->h.dim[0], f = a->h.dim[1];
  M2(h, REQUIRED, MT_DTYPE_COUNT, r, f);
  M2(gate_up, REQUIRED, a->h.dtype, r, 2 * f);
  V1(row_prob, OPTIONAL, stat_of(&a->h), r);
  return MT_OK;
}

mt_err mt_check_swiglu_bwd(const struct mt_swiglu_bwd_args *a) {
  const char *op = "swiglu_bwd";
  int64_t r = a->dh.dim[0], f = a->dh.dim[1];
  M2(dh, REQUIRED, MT_DTYPE_COUNT, r, f);
  M2(gate_up, REQUIRED, a->dh.dtype, r, 2 * f);
  M2(dgate_up, REQUIRED, a->dh.dtype, r, 2 * f);
  M2(h, OPTIONAL, a->dh.dtype, r, f);
  V1(row_prob, OPTIONAL, stat_of(&a->dh), r);
  V1(drow_prob, OPTIONAL, stat_of(&a->dh), r);
  return MT_OK;
}

mt_err mt_check_experts_up_fwd(const struct mt_experts_up_fwd_args *a) {
  const char *op = "experts_up_fwd";
  int64_t r = a->h.dim[0], f = a->h.dim[1], h = a->x.dim[1];
  PTR(offsets);
  M2(x, REQUIRED, MT_DTYPE_COUNT, r, h);
  MT_TRY(mt_check_tensor(op, "w", &a->w, REQUIRED, a->x.dtype, 3, ANY_ROWS, 2 * f, h));
  V1(row_prob, OPTIONAL, stat_of(&a->x), r);
  M2(gate_up, REQUIRED, a->x.dtype, r, 2 * f);
  M2(h, REQUIRED, a->x.dtype, r, f);
  return MT_OK;
}

mt_err mt_check_experts_down_dgrad(const struct mt_experts_down_dgrad_args *a) {
  const char *op = "experts_down_dgrad";
  int64_t r = a->h.dim[0], f = a->h.dim[1], h = a->dy.dim[1];
  PTR(offsets);
  M2(dy, REQUIRED, MT_DTYPE_COUNT, r, h);
  MT_TRY(mt_check_tensor(op, "w", &a->w, REQUIRED, a->dy.dtype, 3, ANY_ROWS, h, f));
  M2(gate_up, REQUIRED, a->dy.dtype, r, 2 * f);
  V1(row_prob, OPTIONAL, stat_of(&a->dy), r);
  M2(dgate_up, REQUIRED, a->dy.dtype, r, 2 * f);
  M2(h, REQUIRED, a->dy.dtype, r, f);
  V1(drow_prob, OPTIONAL, stat_of(&a->dy), r);
  return MT_OK;
}

mt_err mt_check_head_loss(const struct mt_head_loss_args *a) {
  const char *op = "head_loss";
  int64_t t = a->x.dim[0], h = a->x.dim[1], v = a->w.dim[0];
  enum mt_dtype stat = stat_of(&a->x);
  PTR(labels);
  if (a->dx.data || a->dw.data) PTR(loss_scale);
  M2(x, REQUIRED, MT_DTYPE_COUNT, t, h);
  M2(w, REQUIRED, a->x.dtype, v, h);
  V1(loss, REQUIRED, stat, t);
  M2(dx, OPTIONAL, a->x.dtype, t, h);
  M2(dw, OPTIONAL, grad_of(&a->x, &a->dw), v, h);
  return MT_OK;
}

mt_err mt_check_tally(const struct mt_tally_args *a) {
  const char *op = "tally";
  if (!a->correct || !a->aux_weight || !a->sums ||
      (a->load_count > 0 && (!a->load || !a->load_sums))) {
    return mt_fail(MT_EINVAL, "%s: an array is missing", op);
  }
  if (a->loss.rank != 1 || mt_count(&a->aux) != 1 || a->aux.dtype != a->loss.dtype) {
    return mt_fail(MT_ESHAPE, "%s: loss of rank %d, aux of %lld elements", op, a->loss.rank,
                   (long long)mt_count(&a->aux));
  }
  V1(z_loss, OPTIONAL, a->loss.dtype, 1);
  return MT_OK;
}

mt_err mt_check_sumsq(const struct mt_sumsq_args *a) {
  const char *op = "sumsq";
  PTR(out);
  if (a->part_count > 0) PTR(parts);
  for (int i = 0; i < a->tensor_count; i++) {
    const struct mt_tensor *t = &a->tensors[i];
    MT_TRY(mt_check_tensor(op, "tensor", t, REQUIRED, MT_DTYPE_COUNT, t->rank, t->dim[0], t->dim[1],
                           t->dim[2]));
  }
  return MT_OK;
}

mt_err mt_check_adamw(const struct mt_adamw_args *a) {
  const char *op = "adamw";
  PTR(values);
  for (int i = 0; i < a->segment_count; i++) {
    const struct mt_adamw_segment *s = &a->segments[i];
    int64_t n = s->master.dim[0];
    enum mt_dtype wide = s->master.dtype;
    if (s->first < 0 || s->first % 128 != 0)
      return mt_fail(MT_ESHAPE, "%s: a segment from element %lld on", op, (long long)s->first);
    MT_TRY(mt_check_tensor(op, "master", &s->master, REQUIRED, MT_DTYPE_COUNT, 1, n, 1, 1));
    MT_TRY(mt_check_tensor(op, "grad", &s->grad, REQUIRED, wide, 1, n, 1, 1));
    MT_TRY(mt_check_tensor(op, "m", &s->m, REQUIRED, wide, 1, n, 1, 1));
    MT_TRY(mt_check_tensor(op, "v", &s->v, REQUIRED, wide, 1, n, 1, 1));
    MT_TRY(mt_check_tensor(op, "compute", &s->compute, OPTIONAL, MT_DTYPE_COUNT, 1, n, 1, 1));
    if (wide == MT_BF16 && s->compute.data)
      return mt_fail(MT_ESHAPE, "%s: a rounded copy of weights in bf16", op);
  }
  return MT_OK;
}
