/* Router, auxiliary loss and the permutation by expert. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

/* Softmax of one row of logits: out (=) p[e]. Returns the largest logit; *sum (=) that of
 * exp(logit - largest): logsumexp is the one plus the log of the other. */
static float softmax(const float *logits, int64_t e, float *p, float *sum) {
  float top = logits[0];
  *sum = 0;
  for (int64_t i = 1; i < e; i++) top = logits[i] > top ? logits[i] : top;
  for (int64_t i = 0; i < e; i++) p[i] = logits[i] - top;
  mt_cpu_exp(p, p, e);
  for (int64_t i = 0; i < e; i++) *sum += p[i];
  for (int64_t i = 0; i < e; i++) p[i] /= *sum;
  return top;
}

static void choose(const struct mt_router_fwd_args *a, int64_t t, const float *p) {
  int64_t e = a->w.dim[0], k = a->prob.dim[1];
  const float *logits = (const float *)a->logits.data + t * a->logits.ld;
  float *prob = (float *)a->prob.data + t * a->prob.ld, sum = 0;
  int32_t *index = a->index + t * k;
  bool taken[MT_OPS_MAX_EXPERTS] = {false};
  for (int64_t slot = 0; slot < k; slot++) {
    int64_t best = -1;
    for (int64_t i = 0; i < e; i++) {
      if (!taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
    }
    taken[best] = true;
    index[slot] = (int32_t)best;
    prob[slot] = p[best];
    sum += p[best];
  }
  for (int64_t slot = 0; a->renormalize && slot < k; slot++) prob[slot] /= sum;
}

static void route_row(const struct mt_router_fwd_args *a, int64_t t, float *scratch) {
  int64_t h = a->x.dim[1], e = a->w.dim[0], k = a->prob.dim[1];
  float *logits = (float *)a->logits.data + t * a->logits.ld, p[MT_OPS_MAX_EXPERTS];
  if (t >= *a->valid_count) {
    memset(logits, 0, (size_t)e * sizeof *logits);
    memset((float *)a->prob.data + t * a->prob.ld, 0, (size_t)k * sizeof(float));
    for (int64_t slot = 0; slot < k; slot++) a->index[t * k + slot] = -1;
    return;
  }
  const float *x = cpu_read(&a->x, t, h, scratch);
  for (int64_t i = 0; i < e; i++) {
    const float *w = cpu_read(&a->w, i, h, scratch + CPU_ROW_FLOATS);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < h; n++) sum += x[n] * w[n];
    logits[i] = sum;
  }
  softmax(logits, e, p, &(float){0});
  choose(a, t, p);
}

mt_err mt_cpu_router_fwd(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  MT_TRY(mt_check_router_fwd(a));
  MT_TRY(mt_cpu_format("router_fwd", &a->x));
  int64_t e = a->w.dim[0], k = a->prob.dim[1];
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->x.dim[0]; t++) route_row(a, t, scratch);
  }
  /* In token order on one thread: the sums are the same whatever the thread count. */
  memset(a->load, 0, (size_t)e * sizeof *a->load);
  double sums[MT_OPS_MAX_EXPERTS] = {0}, z_sum = 0;
  for (int64_t t = 0; t < *a->valid_count; t++) {
    float p[MT_OPS_MAX_EXPERTS], sum;
    float top = softmax((const float *)a->logits.data + t * a->logits.ld, e, p, &sum);
    double z = (double)(top + logf(sum));
    z_sum += z * z;
    for (int64_t i = 0; i < e; i++) sums[i] += (double)p[i];
    for (int64_t slot = 0; slot < k; slot++) {
      a->load[a->index[t * k + slot]]++;
      a->aux_count[a->index[t * k + slot]]++;
    }
  }
  for (int64_t i = 0; i < e; i++) ((float *)a->aux_prob.data)[i] += (float)sums[i];
  if (a->z_sum.data) *(float *)a->z_sum.data += (float)z_sum;
  return MT_OK;
}

mt_err mt_cpu_aux_loss(struct mt_backend *be, const struct mt_aux_loss_args *a) {
  (void)be;
  MT_TRY(mt_check_aux_loss(a));
  MT_TRY(mt_cpu_format("aux_loss", &a->aux_prob));
  int64_t e = a->aux_prob.dim[0];
  double rows = (double)a->layer_count * *a->valid_count, sum = 0;
  if (rows < 1) rows = 1;
  for (int64_t i = 0; i < e; i++) {
    double f = a->aux_count[i] / rows;
    sum += f * (double)((const float *)a->aux_prob.data)[i] / rows;
    ((float *)a->grad.data)[i] = (float)((double)*a->coef * (double)e * f / rows);
  }
  *(float *)a->loss.data = (float)((double)e * sum);
  if (!a->z_sum.data) return MT_OK;
  *(float *)a->z_loss.data = (float)((double)*(const float *)a->z_sum.data / rows);
  *(float *)a->z_grad.data = (float)(2 * (double)*a->z_coef / rows);
  return MT_OK;
}

/* dlogits of one token; the formulas are in docs/math.md, "Router". */
static void route_row_bwd(const struct mt_router_bwd_args *a, int64_t t, float *dlogits) {
  int64_t e = a->w.dim[0], k = a->prob.dim[1];
  const float *dprob = (const float *)a->dprob.data + t * a->dprob.ld;
  const float *prob = (const float *)a->prob.data + t * a->prob.ld;
  const int32_t *index = a->index + t * k;
  float s[MT_OPS_MAX_EXPERTS], ds[MT_OPS_MAX_EXPERTS], chosen = 0, mean = 0, dot = 0;
  float total, top = softmax((const float *)a->logits.data + t * a->logits.ld, e, s, &total);
  for (int64_t i = 0; i < e; i++) ds[i] = a->aux_grad.data ? ((float *)a->aux_grad.data)[i] : 0;
  for (int64_t slot = 0; slot < k; slot++) {
    chosen += s[index[slot]];
    mean += dprob[slot] * prob[slot];
  }
  for (int64_t slot = 0; slot < k; slot++) {
    ds[index[slot]] += a->renormalize ? (dprob[slot] - mean) / chosen : dprob[slot];
  }
  for (int64_t i = 0; i < e; i++) dot += s[i] * ds[i];
  if (a->z_grad.data) dot -= *(const float *)a->z_grad.data * (top + logf(total));
  for (int64_t i = 0; i < e; i++) dlogits[i] = s[i] * (ds[i] - dot);
}

static void router_dx_row(const struct mt_router_bwd_args *a, int64_t t, const float *w,
                          float *scratch) {
  int64_t h = a->x.dim[1], e = a->w.dim[0];
  float *dlogits = (float *)a->dlogits.data + t * a->dlogits.ld, *sum = scratch;
  bool valid = t < *a->valid_count;
  if (valid)
    route_row_bwd(a, t, dlogits);
  else
    memset(dlogits, 0, (size_t)e * sizeof *dlogits);
  if (!valid && a->accumulate_dx) return;
  memset(sum, 0, (size_t)h * sizeof *sum);
  for (int64_t i = 0; valid && i < e; i++) {
    float c = dlogits[i];
    for (int64_t n = 0; n < h; n++) sum[n] += c * w[i * h + n];
  }
  if (a->accumulate_dx) {
    const float *old = cpu_read(&a->dx, t, h, scratch + CPU_ROW_FLOATS);
    for (int64_t n = 0; n < h; n++) sum[n] += old[n];
  }
  float *dx = cpu_target(&a->dx, t, sum);
  if (dx != sum) memcpy(dx, sum, (size_t)h * sizeof *dx);
  cpu_write(&a->dx, t, h, dx);
}

/* Columns [begin, begin + n) of dw over all tokens in order, added to sum [E,n] (rows ld apart). */
static void router_dw_sum(const struct mt_router_bwd_args *a, int64_t begin, int64_t n, float *sum,
                          int64_t ld, float *scratch) {
  int64_t e = a->w.dim[0];
  struct mt_tensor x = mt_cols(&a->x, begin, n);
  for (int64_t t = 0; t < *a->valid_count; t++) {
    const float *xr = cpu_read(&x, t, n, scratch);
    const float *dlogits = (const float *)a->dlogits.data + t * a->dlogits.ld;
    for (int64_t i = 0; i < e; i++) {
      float c = dlogits[i], *dw = sum + i * ld;
      for (int64_t m = 0; m < n; m++) dw[m] += c * xr[m];
    }
  }
}

/* Columns [begin, end) of dw: in F32 they are summed in place, in BF16 in scratch, as many columns
 * at a time as fit, and rounded once. */
static void router_dw(const struct mt_router_bwd_args *a, int64_t begin, int64_t end,
                      float *scratch) {
  int64_t e = a->w.dim[0];
  if (a->dw.dtype == MT_F32) {
    if (!a->accumulate) cpu_zero_columns(&a->dw, begin, end - begin);
    router_dw_sum(a, begin, end - begin, (float *)a->dw.data + begin, a->dw.ld, scratch);
    return;
  }
  float *sum = scratch + CPU_ROW_FLOATS;
  for (int64_t n, most = CPU_ROW_FLOATS / e; begin < end; begin += n) {
    n = end - begin < most ? end - begin : most;
    memset(sum, 0, (size_t)(e * n) * sizeof *sum);
    router_dw_sum(a, begin, n, sum, n, scratch);
    for (int64_t i = 0; i < e; i++) cpu_write_grad(&a->dw, i, begin, n, sum + i * n, a->accumulate);
  }
}

mt_err mt_cpu_router_bwd(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  MT_TRY(mt_check_router_bwd(a));
  MT_TRY(mt_cpu_format("router_bwd", &a->x));
  int64_t h = a->x.dim[1], e = a->w.dim[0];
  size_t room;
  float *shared = mt_cpu_shared_scratch(be, &room);
  const float *w = a->w.data;
  if (a->w.dtype == MT_BF16) {
    if ((size_t)(e * h) > room) return mt_fail(MT_ESHAPE, "router_bwd: workspace too small");
    for (int64_t i = 0; i < e; i++) cpu_read(&a->w, i, h, shared + i * h);
    w = shared;
  }
#pragma omp parallel num_threads(be->thread_count)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    float *scratch = mt_cpu_thread_scratch(be, (int)me);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->x.dim[0]; t++) router_dx_row(a, t, w, scratch);
    if (a->dw.data) router_dw(a, h * me / threads, h * (me + 1) / threads, scratch);
  }
  return MT_OK;
}

mt_err mt_cpu_permute_plan(struct mt_backend *be, const struct mt_permute_plan_args *a) {
  (void)be;
  MT_TRY(mt_check_permute_plan(a));
  if (a->expert_count > MT_OPS_MAX_EXPERTS) {
    return mt_fail(MT_EUNSUPPORTED, "permute_plan: %d experts", a->expert_count);
  }
  int32_t choices = a->token_count * a->top_k, next[MT_OPS_MAX_EXPERTS] = {0}, row = 0;
  for (int32_t i = 0; i < choices; i++) {
    if (a->index[i] >= 0) next[a->index[i]]++;
  }
  for (int e = 0; e < a->expert_count; e++) {
    int32_t n = next[e];
    a->offsets[e] = next[e] = row;
    row += n;
  }
  a->offsets[a->expert_count] = row;
  for (int32_t i = 0; i < choices; i++) {
    if (a->index[i] < 0) {
      a->token_row[i] = -1;
      continue;
    }
    a->token_row[i] = next[a->index[i]];
    a->row_source[next[a->index[i]]++] = i;
  }
  for (int32_t i = row; i < choices; i++) a->row_source[i] = -1;
  return MT_OK;
}
