/* Router, auxiliary loss, permutation, dispatch and combine, SwiGLU. */
#include <math.h>

#include "backend/experts.h"
#include "kernels/ref/ref.h"

static double softmax_denominator(const struct mt_tensor *logits, int64_t t, double *top) {
  int64_t e = logits->dim[1];
  double sum = 0;
  *top = -INFINITY;
  for (int64_t i = 0; i < e; i++) *top = fmax(*top, ref_get(logits, t, i));
  for (int64_t i = 0; i < e; i++) sum += exp(ref_get(logits, t, i) - *top);
  return sum;
}

static void route_token(const struct mt_router_fwd_args *a, int64_t t) {
  int64_t e = a->w.dim[0], k = a->prob.dim[1];
  double top, denominator = softmax_denominator(&a->logits, t, &top), chosen = 0;
  for (int64_t i = 0; i < e; i++) {
    ref_put(&a->aux_prob, i,
            ref_at(&a->aux_prob, i) + exp(ref_get(&a->logits, t, i) - top) / denominator);
  }
  if (a->z_sum.data) {
    double z = top + log(denominator);
    ref_put(&a->z_sum, 0, ref_at(&a->z_sum, 0) + z * z);
  }
  for (int64_t slot = 0; slot < k; slot++) {
    int64_t best = -1;
    for (int64_t i = 0; i < e; i++) {
      bool taken = false;
      for (int64_t s = 0; s < slot; s++) taken |= a->index[t * k + s] == i;
      /* Strictly larger: a tie stays with the lower index. A NaN logit must still route somewhere,
       * so that the loss shows it. */
      if (!taken && (best < 0 || ref_get(&a->logits, t, i) > ref_get(&a->logits, t, best))) {
        best = i;
      }
    }
    a->index[t * k + slot] = (int32_t)best;
    a->aux_count[best]++;
    a->load[best]++;
    chosen += exp(ref_get(&a->logits, t, best) - top) / denominator;
  }
  for (int64_t slot = 0; slot < k; slot++) {
    double p = exp(ref_get(&a->logits, t, a->index[t * k + slot]) - top) / denominator;
    ref_set(&a->prob, t, slot, a->renormalize ? p / chosen : p);
  }
}

mt_err mt_ref_router_fwd(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_router_fwd(a));
  int64_t e = a->w.dim[0], k = a->prob.dim[1];
  for (int64_t i = 0; i < e; i++) a->load[i] = 0;
  for (int64_t t = 0; t < a->x.dim[0]; t++) {
    bool valid = t < *a->valid_count;
    for (int64_t i = 0; i < e; i++) {
      double sum = 0;
      for (int64_t n = 0; valid && n < a->x.dim[1]; n++) {
        sum += ref_get(&a->x, t, n) * ref_get(&a->w, i, n);
      }
      ref_set(&a->logits, t, i, sum);
    }
    if (valid) route_token(a, t);
    for (int64_t slot = 0; !valid && slot < k; slot++) {
      a->index[t * k + slot] = -1;
      ref_set(&a->prob, t, slot, 0);
    }
  }
  return MT_OK;
}

mt_err mt_ref_aux_loss(struct mt_backend *be, const struct mt_aux_loss_args *a) {
  (void)be;
  MT_TRY(mt_check_aux_loss(a));
  int64_t e = a->aux_prob.dim[0];
  double rows = (double)a->layer_count * *a->valid_count, sum = 0;
  if (rows < 1) rows = 1;
  for (int64_t i = 0; i < e; i++) {
    double f = a->aux_count[i] / rows;
    sum += f * ref_at(&a->aux_prob, i) / rows;
    ref_put(&a->grad, i, (double)*a->coef * (double)e * f / rows);
  }
  ref_put(&a->loss, 0, (double)e * sum);
  if (!a->z_sum.data) return MT_OK;
  ref_put(&a->z_loss, 0, ref_at(&a->z_sum, 0) / rows);
  ref_put(&a->z_grad, 0, 2 * (double)*a->z_coef / rows);
  return MT_OK;
}

/* With s = softmax(logits), C the chosen experts, S = sum over C of s:
 * renormalised p_k = s_k / S: ds_k = (dp_k - sum_j dp_j p_j) / S for k in C; else ds_k = dp_k.
 * Then aux_grad adds to every ds, and dlogits_i = s_i (ds_i - sum_j s_j ds_j + z_grad lse), since
 * s_i is the derivative of lse = logsumexp(logits). */
static void route_token_bwd(const struct mt_router_bwd_args *a, int64_t t) {
  int64_t e = a->w.dim[0], k = a->prob.dim[1];
  double s[MT_OPS_MAX_EXPERTS], ds[MT_OPS_MAX_EXPERTS], top, dot = 0, chosen = 0, mean = 0;
  double denominator = softmax_denominator(&a->logits, t, &top);
  for (int64_t i = 0; i < e; i++) {
    s[i] = exp(ref_get(&a->logits, t, i) - top) / denominator;
    ds[i] = a->aux_grad.data ? ref_at(&a->aux_grad, i) : 0;
  }
  for (int64_t slot = 0; slot < k; slot++) {
    chosen += s[a->index[t * k + slot]];
    mean += ref_get(&a->dprob, t, slot) * ref_get(&a->prob, t, slot);
  }
  for (int64_t slot = 0; slot < k; slot++) {
    double dp = ref_get(&a->dprob, t, slot);
    ds[a->index[t * k + slot]] += a->renormalize ? (dp - mean) / chosen : dp;
  }
  for (int64_t i = 0; i < e; i++) dot += s[i] * ds[i];
  if (a->z_grad.data) dot -= ref_at(&a->z_grad, 0) * (top + log(denominator));
  for (int64_t i = 0; i < e; i++) ref_set(&a->dlogits, t, i, s[i] * (ds[i] - dot));
}

mt_err mt_ref_router_bwd(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_router_bwd(a));
  int64_t rows = a->x.dim[0], h = a->x.dim[1], e = a->w.dim[0];
  for (int64_t t = 0; t < rows; t++) {
    if (t < *a->valid_count) route_token_bwd(a, t);
    for (int64_t i = 0; t >= *a->valid_count && i < e; i++) ref_set(&a->dlogits, t, i, 0);
    for (int64_t n = 0; n < h; n++) {
      double sum = 0;
      for (int64_t i = 0; i < e; i++) sum += ref_get(&a->dlogits, t, i) * ref_get(&a->w, i, n);
      ref_acc(&a->dx, t, n, sum, a->accumulate_dx);
    }
  }
  for (int64_t i = 0; a->dw.data && i < e; i++) {
    for (int64_t n = 0; n < h; n++) {
      double sum = 0;
      for (int64_t t = 0; t < *a->valid_count; t++) {
        sum += ref_get(&a->dlogits, t, i) * ref_get(&a->x, t, n);
      }
      ref_acc(&a->dw, i, n, sum, a->accumulate);
    }
  }
  return MT_OK;
}

mt_err mt_ref_permute_plan(struct mt_backend *be, const struct mt_permute_plan_args *a) {
  (void)be;
  MT_TRY(mt_check_permute_plan(a));
  int32_t choices = a->token_count * a->top_k, row = 0;
  for (int e = 0; e < a->expert_count; e++) {
    a->offsets[e] = row;
    for (int32_t i = 0; i < choices; i++) {
      if (a->index[i] != e) continue;
      a->row_source[row] = i;
      a->token_row[i] = row++;
    }
  }
  a->offsets[a->expert_count] = row;
  for (int32_t i = row; i < choices; i++) a->row_source[i] = -1;
  for (int32_t i = 0; i < choices; i++) {
    if (a->index[i] < 0) a->token_row[i] = -1;
  }
  return MT_OK;
}

mt_err mt_ref_dispatch_fwd(struct mt_backend *be, const struct mt_dispatch_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_dispatch_fwd(a));
  for (int64_t r = 0; r < a->xs.dim[0]; r++) {
    if (a->row_source[r] < 0) continue;
    for (int64_t i = 0; i < a->xs.dim[1]; i++) {
      ref_set(&a->xs, r, i, ref_get(&a->x, a->row_source[r] / a->top_k, i));
    }
  }
  return MT_OK;
}

/* sum over k of weight * rows[token_row], weight 1 without prob. */
static double gather_sum(const struct mt_tensor *rows, const int32_t *token_row,
                         const struct mt_tensor *prob, int64_t t, int top_k, int64_t i) {
  double sum = 0;
  for (int k = 0; k < top_k; k++) {
    int32_t row = token_row[t * top_k + k];
    if (row < 0) continue;
    sum += (prob && prob->data ? ref_get(prob, t, k) : 1.0) * ref_get(rows, row, i);
  }
  return sum;
}

mt_err mt_ref_dispatch_bwd(struct mt_backend *be, const struct mt_dispatch_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_dispatch_bwd(a));
  for (int64_t t = 0; t < a->dx.dim[0]; t++) {
    for (int64_t i = 0; i < a->dx.dim[1]; i++) {
      ref_acc(&a->dx, t, i, gather_sum(&a->dxs, a->token_row, NULL, t, a->top_k, i), a->accumulate);
    }
  }
  return MT_OK;
}

mt_err mt_ref_combine_fwd(struct mt_backend *be, const struct mt_combine_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_combine_fwd(a));
  for (int64_t t = 0; t < a->y.dim[0]; t++) {
    for (int64_t i = 0; i < a->y.dim[1]; i++) {
      ref_set(&a->y, t, i, gather_sum(&a->ys, a->token_row, &a->prob, t, a->top_k, i));
    }
  }
  return MT_OK;
}

mt_err mt_ref_combine_bwd(struct mt_backend *be, const struct mt_combine_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_combine_bwd(a));
  for (int64_t r = 0; r < a->dys.dim[0]; r++) {
    if (a->row_source[r] < 0) continue;
    int64_t t = a->row_source[r] / a->top_k, k = a->row_source[r] % a->top_k;
    double p = a->prob.data ? ref_get(&a->prob, t, k) : 1.0, sum = 0;
    for (int64_t i = 0; i < a->dy.dim[1]; i++) {
      double dy = ref_get(&a->dy, t, i);
      if (a->ys.data) sum += dy * ref_get(&a->ys, r, i);
      ref_set(&a->dys, r, i, p * dy);
    }
    if (a->dprob.data && a->ys.data) ref_set(&a->dprob, t, k, sum);
  }
  return MT_OK;
}

mt_err mt_ref_scatter_add(struct mt_backend *be, const struct mt_scatter_add_args *a) {
  (void)be;
  MT_TRY(mt_check_scatter_add(a));
  for (int64_t r = 0; r < a->ys.dim[0]; r++) {
    if (a->row_source[r] < 0) continue;
    int64_t t = a->row_source[r] / a->top_k, k = a->row_source[r] % a->top_k;
    double p = a->prob.data ? ref_get(&a->prob, t, k) : 1.0;
    for (int64_t i = 0; i < a->y.dim[1]; i++) ref_acc(&a->y, t, i, p * ref_get(&a->ys, r, i), 1);
  }
  return MT_OK;
}

mt_err mt_ref_swiglu_fwd(struct mt_backend *be, const struct mt_swiglu_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_swiglu_fwd(a));
  int64_t rows = a->row_count ? *a->row_count : a->h.dim[0], f = a->h.dim[1];
  for (int64_t r = 0; r < rows; r++) {
    double p = a->row_prob.data ? ref_at(&a->row_prob, r) : 1.0;
    for (int64_t i = 0; i < f; i++) {
      double g = ref_get(&a->gate_up, r, i), u = ref_get(&a->gate_up, r, f + i);
      ref_set(&a->h, r, i, g / (1 + exp(-g)) * u * p);
    }
  }
  return MT_OK;
}

/* h = p silu(g) u, sig = 1/(1+e^-g), silu' = sig (1 + g (1 - sig)). Element i of row r; returns its
 * share of drow_prob. */
static double swiglu_bwd_at(const struct mt_swiglu_bwd_args *a, int64_t r, int64_t i, double dh) {
  int64_t f = a->dgate_up.dim[1] / 2;
  double p = a->row_prob.data ? ref_at(&a->row_prob, r) : 1.0;
  double g = ref_get(&a->gate_up, r, i), u = ref_get(&a->gate_up, r, f + i);
  double sig = 1 / (1 + exp(-g)), silu = g * sig;
  ref_set(&a->dgate_up, r, i, dh * p * u * sig * (1 + g * (1 - sig)));
  ref_set(&a->dgate_up, r, f + i, dh * p * silu);
  if (a->h.data) ref_set(&a->h, r, i, silu * u * p);
  return dh * silu * u;
}

mt_err mt_ref_swiglu_bwd(struct mt_backend *be, const struct mt_swiglu_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_swiglu_bwd(a));
  int64_t rows = a->row_count ? *a->row_count : a->dh.dim[0];
  for (int64_t r = 0; r < rows; r++) {
    double dp = 0;
    for (int64_t i = 0; i < a->dh.dim[1]; i++) dp += swiglu_bwd_at(a, r, i, ref_get(&a->dh, r, i));
    if (a->drow_prob.data) ref_put(&a->drow_prob, r, dp);
  }
  return MT_OK;
}

mt_err mt_ref_experts_up_fwd(struct mt_backend *be, const struct mt_experts_up_fwd_args *a) {
  MT_TRY(mt_check_experts_up_fwd(a));
  struct mt_linear_fwd_args product = mt_experts_up_product(a);
  struct mt_swiglu_fwd_args swiglu = mt_experts_up_swiglu(a);
  MT_TRY(mt_ref_linear_fwd(be, &product));
  return mt_ref_swiglu_fwd(be, &swiglu);
}

/* dh is never rounded: it is no tensor here. */
mt_err mt_ref_experts_down_dgrad(struct mt_backend *be,
                                 const struct mt_experts_down_dgrad_args *a) {
  (void)be;
  MT_TRY(mt_check_experts_down_dgrad(a));
  struct mt_swiglu_bwd_args swiglu = mt_experts_down_swiglu(a);
  for (int64_t g = 0; g < a->w.dim[0]; g++) {
    struct mt_tensor w = mt_slice(&a->w, g);
    for (int64_t r = a->offsets[g]; r < a->offsets[g + 1]; r++) {
      double dp = 0;
      for (int64_t i = 0; i < w.dim[1]; i++) {
        double dh = 0;
        for (int64_t n = 0; n < w.dim[0]; n++) dh += ref_get(&a->dy, r, n) * ref_get(&w, n, i);
        dp += swiglu_bwd_at(&swiglu, r, i, dh);
      }
      if (a->drow_prob.data) ref_put(&a->drow_prob, r, dp);
    }
  }
  return MT_OK;
}
