/* Products of 8-bit operands in plain loops, of which each operand is either what was stored or
 * what it was quantized from: what the rounding of one alone costs. Host memory; experts grouped,
 * each operand quantized by itself. */
#ifndef TESTS_GOLDEN_ROUNDED_APART_H
#define TESTS_GOLDEN_ROUNDED_APART_H

#include "backend/qstored.h"
#include "base/fp8.h"
#include "golden/model_cases.h"

/* Operands, as bits: those that are rounded. */
enum {
  FWD_X = 1,
  FWD_W = 2,
  DGRAD_DY = 4,
  DGRAD_W = 8,
  WGRAD_DY = 16,
  WGRAD_X = 32,
  ROUND_ALL = 63
};
/* Products, by their weight. */
enum { OF_QKV, OF_OUT, OF_GATE_UP, OF_DOWN, OF_COUNT };

static struct rounded_apart {
  struct mt_ops right;
  unsigned rounded[OF_COUNT];
  /* Sources of what has been quantized, the newest first. */
  struct source {
    const void *row, *col;
    int64_t cols;
    float *of;
    struct source *next;
  } * sources;
} apart_state;

static float apart_get(const struct mt_tensor *t, int64_t i) {
  float x;
  mt_dtype_convert(&x, MT_F32, (char *)t->data + (size_t)i * mt_dtype_bytes(t->dtype), t->dtype, 1);
  return x;
}
static void apart_put(const struct mt_tensor *t, int64_t i, double value) {
  float x = (float)value;
  mt_dtype_convert((char *)t->data + (size_t)i * mt_dtype_bytes(t->dtype), t->dtype, &x, MT_F32, 1);
}

static float *apart_source(const struct mt_qtensor *q, int64_t rows, int64_t cols) {
  struct source *s = malloc(sizeof *s);
  *s = (struct source){q->row, q->col, cols, calloc((size_t)(rows * cols) + 1, sizeof(float)),
                       apart_state.sources};
  apart_state.sources = s;
  return s->of;
}

static mt_err apart_quantize(struct mt_backend *be, const struct mt_quantize_args *a) {
  MT_TRY(apart_state.right.quantize(be, a));
  int64_t cols = a->q.dim[1], rows = a->offsets ? a->offsets[a->group_count] : a->q.dim[0];
  float *to = apart_source(&a->q, a->q.dim[0], cols);
  for (int64_t i = 0; i < rows * cols; i++) {
    int64_t row = a->row_source ? a->row_source[i / cols] / a->top_k : i / cols;
    to[i] = apart_get(&a->x, row * a->x.ld + i % cols);
  }
  return MT_OK;
}

static mt_err apart_quantize_weight(struct mt_backend *be,
                                    const struct mt_quantize_weight_args *a) {
  MT_TRY(apart_state.right.quantize_weight(be, a));
  int64_t n = mt_count(&a->w), cols = a->w.dim[a->w.rank - 1];
  float *to = apart_source(&a->q, n / cols, cols);
  for (int64_t i = 0; i < n; i++) to[i] = apart_get(&a->w, i);
  return MT_OK;
}

/* A copy's numbers, [matrices][rows][cols] of the operand; padded rows count. */
static double *apart_numbers(const struct mt_qtensor *q, bool col, bool rounded) {
  int64_t matrices = q->rank == 3 ? q->dim[0] : 1, cols = q->dim[q->rank - 1];
  int64_t rows = q->dim[q->rank - 2], all = rows;
  if (col && !q->weight && rounded) rows = all = q->col_rows;
  struct mt_qstored s = col ? mt_qstored_cols(q, 0, rows) : mt_qstored_rows(q, 0, rows);
  double *to = malloc((size_t)(matrices * rows * cols) * sizeof *to + 1);
  const struct source *from = apart_state.sources;
  bool by_col = col && q->col; /* FP8's weights may have their rows alone, for both */
  while (from && ((by_col ? from->col != q->col : from->row != q->row) || from->cols != cols))
    from = from->next;
  assert_non_null(from);
  for (int64_t i = 0; i < matrices * rows * cols; i++) {
    int64_t g = i / (rows * cols), r = i / cols % rows, c = i % cols;
    if (!rounded) {
      to[i] = (double)from->of[i];
      continue;
    }
    int64_t sr = s.turned ? c : r, sc = s.turned ? r : c, at = mt_qstored_scale(&s, g, sr, sc);
    float scale =
        s.fp8 ? ((const float *)s.scales)[at] : mt_e8m0_to_f32(((const uint8_t *)s.scales)[at]);
    uint8_t e = s.e[g * s.rows * s.ld + sr * s.ld + sc];
    to[i] = (double)mt_e4m3_to_f32(e) * (double)scale;
  }
  return to;
}

static int apart_groups(const int32_t *offsets, int64_t groups) {
  return offsets ? (int)groups : 1;
}
/* Rows [*begin, *end) of group g. */
static void apart_rows(const int32_t *offsets, int g, int64_t rows, int64_t *begin, int64_t *end) {
  *begin = offsets ? offsets[g] : 0;
  *end = offsets ? offsets[g + 1] : rows;
}

/* Of the weight [n,k] (of gate and up n is 2 F > H, of down F > H = n there). */
static unsigned apart_rounded(const int32_t *offsets, int64_t n, int64_t k) {
  int of = offsets ? (n > k ? OF_GATE_UP : OF_DOWN) : (n > k ? OF_QKV : OF_OUT);
  return apart_state.rounded[of];
}

/* y (+=) rows times each group's matrix, whose element of output o and term t is at
 * o * by_output + t * by_term. */
static void apart_rows_product(const struct mt_tensor *y, const int32_t *offsets, int64_t groups,
                               bool accumulate, const double *x, int64_t terms, const double *w,
                               int64_t by_output, int64_t by_term) {
  int64_t outputs = y->dim[1], begin, end;
  for (int g = 0; g < apart_groups(offsets, groups); g++, w += outputs * terms) {
    apart_rows(offsets, g, y->dim[0], &begin, &end);
    for (int64_t r = begin; r < end; r++) {
      for (int64_t o = 0; o < outputs; o++) {
        double sum = accumulate ? (double)apart_get(y, r * y->ld + o) : 0;
        for (int64_t t = 0; t < terms; t++)
          sum += x[r * terms + t] * w[o * by_output + t * by_term];
        apart_put(y, r * y->ld + o, sum);
      }
    }
  }
}

static mt_err apart_fwd(struct mt_backend *be, const struct mt_qlinear_fwd_args *a) {
  int64_t n = a->y.dim[1], k = a->x.dim[1];
  unsigned rounded = apart_rounded(a->offsets, n, k);
  double *x = apart_numbers(&a->x, false, rounded & FWD_X);
  double *w = apart_numbers(&a->w, false, rounded & FWD_W);
  (void)be;
  apart_rows_product(&a->y, a->offsets, a->w.dim[0], false, x, k, w, k, 1);
  free(x), free(w);
  return MT_OK;
}

static mt_err apart_dgrad(struct mt_backend *be, const struct mt_qlinear_dgrad_args *a) {
  int64_t n = a->dy.dim[1], k = a->dx.dim[1];
  unsigned rounded = apart_rounded(a->offsets, n, k);
  double *dy = apart_numbers(&a->dy, false, rounded & DGRAD_DY);
  double *w = apart_numbers(&a->w, true, rounded & DGRAD_W);
  (void)be;
  apart_rows_product(&a->dx, a->offsets, a->w.dim[0], a->accumulate, dy, n, w, 1, k);
  free(dy), free(w);
  return MT_OK;
}

static mt_err apart_wgrad(struct mt_backend *be, const struct mt_qlinear_wgrad_args *a) {
  int64_t n = a->dy.dim[1], k = a->x.dim[1], begin, end;
  unsigned rounded = apart_rounded(a->offsets, n, k);
  double *dy = apart_numbers(&a->dy, true, rounded & WGRAD_DY), squares = 0;
  double *x = apart_numbers(&a->x, true, rounded & WGRAD_X);
  (void)be;
  for (int g = 0; g < apart_groups(a->offsets, a->dw.dim[0]); g++) {
    apart_rows(a->offsets, g, a->x.dim[0], &begin, &end);
    int64_t padded = a->offsets ? a->padded[g] : 0;
    int64_t dy_at = rounded & WGRAD_DY ? padded : begin, x_at = rounded & WGRAD_X ? padded : begin;
    for (int64_t j = 0; j < n; j++) {
      for (int64_t i = 0; i < k; i++) {
        int64_t at = (g * n + j) * a->dw.ld + i;
        double sum = a->accumulate ? (double)apart_get(&a->dw, at) : 0;
        for (int64_t r = 0; r < end - begin; r++)
          sum += dy[(dy_at + r) * n + j] * x[(x_at + r) * k + i];
        apart_put(&a->dw, at, sum);
        squares += sum * sum;
      }
    }
  }
  if (a->sumsq) *a->sumsq = squares;
  free(dy), free(x);
  return MT_OK;
}

/* From here on the model's products are these; its weights are quantized once more. */
static void round_apart(struct golden *g) {
  apart_state.right = g->be.ops;
  g->be.ops.quantize = apart_quantize;
  g->be.ops.quantize_weight = apart_quantize_weight;
  g->be.ops.qlinear_fwd = apart_fwd;
  g->be.ops.qlinear_dgrad = apart_dgrad;
  g->be.ops.qlinear_wgrad = apart_wgrad;
  OK(mt_model_quantize_weights(&g->m));
}

static void forget_sources(void) {
  while (apart_state.sources) {
    struct source *s = apart_state.sources;
    apart_state.sources = s->next;
    free(s->of), free(s);
  }
}

#endif
