/* Head with cross entropy, gradient norm, AdamW. */
#include <math.h>
#include <stdlib.h>

#include "kernels/ref/ref.h"
#include "kernels/rounding.h"

/* One row: logits (=) scratch [V]; returns the log of the softmax's denominator. */
static double row_logits(const struct mt_head_loss_args *a, int64_t t, double *logits,
                         int64_t *best) {
  int64_t v = a->w.dim[0];
  *best = 0;
  for (int64_t i = 0; i < v; i++) {
    logits[i] = 0;
    for (int64_t n = 0; n < a->w.dim[1]; n++) {
      logits[i] += ref_get(&a->x, t, n) * ref_get(&a->w, i, n);
    }
    if (logits[i] > logits[*best]) *best = i;
  }
  double sum = 0;
  for (int64_t i = 0; i < v; i++) sum += exp(logits[i] - logits[*best]);
  return logits[*best] + log(sum);
}

mt_err mt_ref_head_loss(struct mt_backend *be, const struct mt_head_loss_args *a) {
  (void)be;
  MT_TRY(mt_check_head_loss(a));
  int64_t rows = a->x.dim[0], h = a->x.dim[1], v = a->w.dim[0];
  double *logits = malloc((size_t)v * sizeof *logits);
  if (!logits) return mt_fail(MT_ENOMEM, "head_loss: %lld logits", (long long)v);
  for (int64_t i = 0; a->dw.data && !a->accumulate && i < v; i++) {
    for (int64_t n = 0; n < h; n++) ref_set(&a->dw, i, n, 0);
  }
  for (int64_t t = 0; t < rows; t++) {
    int32_t label = a->labels[t];
    for (int64_t n = 0; a->dx.data && n < h; n++) ref_set(&a->dx, t, n, 0);
    ref_put(&a->loss, t, 0);
    if (a->correct) a->correct[t] = 0;
    if (label < 0) continue;
    int64_t best;
    double lse = row_logits(a, t, logits, &best);
    ref_put(&a->loss, t, lse - logits[label]);
    if (a->correct) a->correct[t] = best == label;
    if (!a->dx.data && !a->dw.data) continue;
    for (int64_t i = 0; i < v; i++) {
      logits[i] = (double)*a->loss_scale * (exp(logits[i] - lse) - (i == label));
    }
    for (int64_t n = 0; a->dx.data && n < h; n++) {
      double sum = 0;
      for (int64_t i = 0; i < v; i++) sum += logits[i] * ref_get(&a->w, i, n);
      ref_set(&a->dx, t, n, sum);
    }
    for (int64_t i = 0; a->dw.data && i < v; i++) {
      for (int64_t n = 0; n < h; n++) ref_acc(&a->dw, i, n, logits[i] * ref_get(&a->x, t, n), 1);
    }
  }
  free(logits);
  return MT_OK;
}

mt_err mt_ref_sumsq(struct mt_backend *be, const struct mt_sumsq_args *a) {
  (void)be;
  MT_TRY(mt_check_sumsq(a));
  double sum = 0;
  for (int i = 0; i < a->tensor_count; i++) {
    for (int64_t n = 0; n < mt_count(&a->tensors[i]); n++) {
      double x = ref_at(&a->tensors[i], n);
      sum += x * x;
    }
  }
  for (int i = 0; i < a->part_count; i++) sum += a->parts[i];
  *a->out = sum;
  return MT_OK;
}

/* Kept as it is, but for BF16, which is rounded at random. */
static void put_state(const struct mt_adamw_args *a, const struct mt_adamw_segment *s,
                      const struct mt_tensor *t, enum mt_rounding purpose, int64_t n, double x) {
  uint32_t r[4];
  if (t->dtype != MT_BF16) {
    ref_put(t, n, x);
    return;
  }
  mt_rounding_bits(a->values->seed, s->tensor, purpose, (uint32_t)a->values->step,
                   (uint64_t)(n + s->first) / MT_ROUND_BLOCK, &r[0], &r[1], &r[2], &r[3]);
  ((uint16_t *)t->data)[n] =
      mt_round_at_random((float)x, mt_rounding_pick(r, (int)(n % MT_ROUND_BLOCK), purpose));
}

mt_err mt_ref_adamw(struct mt_backend *be, const struct mt_adamw_args *a) {
  (void)be;
  MT_TRY(mt_check_adamw(a));
  if (a->grad_sumsq && !isfinite(*a->grad_sumsq)) return MT_OK;
  const struct mt_adamw_values u = *a->values;
  double scale = 1;
  if (a->clip > 0 && a->grad_sumsq) scale = fmin(1.0, a->clip / (sqrt(*a->grad_sumsq) + 1e-6));
  for (int i = 0; i < a->segment_count; i++) {
    const struct mt_adamw_segment *s = &a->segments[i];
    for (int64_t n = 0; n < s->master.dim[0]; n++) {
      double g = scale * ref_at(&s->grad, n), w = ref_at(&s->master, n);
      double m = a->beta1 * ref_at(&s->m, n) + (1 - a->beta1) * g;
      double v = a->beta2 * ref_at(&s->v, n) + (1 - a->beta2) * g * g;
      if (s->decay) w *= u.keep;
      w -= u.step_size * m / (sqrt(v) * u.root_c2 + a->eps);
      put_state(a, s, &s->m, MT_ROUND_M, n, m);
      put_state(a, s, &s->v, MT_ROUND_V, n, v);
      put_state(a, s, &s->master, MT_ROUND_WEIGHT, n, w);
      if (s->compute.data) ref_put(&s->compute, n, ref_at(&s->master, n));
    }
  }
  return MT_OK;
}

mt_err mt_ref_tally(struct mt_backend *be, const struct mt_tally_args *a) {
  (void)be;
  MT_TRY(mt_check_tally(a));
  double loss = 0, correct = 0;
  for (int64_t t = 0; t < a->loss.dim[0]; t++) {
    loss += ref_at(&a->loss, t);
    correct += a->correct[t];
  }
  const double sums[4] = {loss, correct, *a->aux_weight * ref_at(&a->aux, 0),
                          a->z_loss.data ? *a->aux_weight * ref_at(&a->z_loss, 0) : 0};
  for (int i = 0; i < 4; i++) a->sums[i] = (a->accumulate ? a->sums[i] : 0) + sums[i];
  for (int64_t i = 0; i < a->load_count; i++) {
    a->load_sums[i] = (a->accumulate ? a->load_sums[i] : 0) + a->load[i];
  }
  return MT_OK;
}
