/* Eight-bit operands: quantizing, products, and SwiGLU with quantizing joined to it. */
#include <stdlib.h>

#include "base/fp8.h"
#include "kernels/ref/ref.h"

/* A block being quantized: its largest magnitude first, then its scale. NaN stays the largest. */
static void widen(float *amax, float x) {
  if (isnan(x) || fabsf(x) > *amax) *amax = fabsf(x);
}

static uint8_t scale_byte(enum mt_qformat format, float amax) {
  return format == MT_Q_FP8 ? mt_fp8_scale(amax) : mt_e8m0_scale(amax);
}

static void put_scale(const struct mt_qtensor *q, void *scales, int64_t at, uint8_t byte) {
  if (q->format == MT_Q_FP8)
    ((float *)scales)[at] = mt_e8m0_to_f32(byte);
  else
    ((uint8_t *)scales)[at] = byte;
}

static double scale_at(const struct mt_qtensor *q, const void *scales, int64_t at) {
  return q->format == MT_Q_FP8 ? (double)((const float *)scales)[at]
                               : (double)mt_e8m0_to_f32(((const uint8_t *)scales)[at]);
}

/* Where the scale of (row, col) and element (row, col) lie in each copy; rows of activations'
 * column copies count their padding. */
static int64_t row_scale_index(const struct mt_qtensor *q, int64_t row, int64_t col) {
  int64_t b = mt_q_block(q->format), k = q->dim[q->rank - 1];
  if (q->format == MT_Q_MXFP8) return row * mt_q_blocks(q->format, k) + col / b;
  return q->weight ? row / b * mt_q_blocks(q->format, k) + col / b : col / b * q->scale_ld + row;
}
static int64_t col_scale_index(const struct mt_qtensor *q, int64_t row, int64_t col) {
  int64_t b = mt_q_block(q->format), k = q->dim[q->rank - 1];
  if (q->format == MT_Q_MXFP8 || !q->weight) return row / b * k + col;
  return col / b * mt_q_blocks(q->format, q->dim[q->rank - 2]) + row / b;
}
static int64_t col_index(const struct mt_qtensor *q, int64_t row, int64_t col) {
  if (q->format == MT_Q_MXFP8) return row * q->dim[q->rank - 1] + col;
  return col * (q->weight ? q->dim[q->rank - 2] : q->col_rows) + row;
}

static double row_at(const struct mt_qtensor *q, int64_t row, int64_t col) {
  return (double)mt_e4m3_to_f32(q->row[row * q->dim[q->rank - 1] + col]) *
         scale_at(q, q->row_scale, row_scale_index(q, row, col));
}
static double col_at(const struct mt_qtensor *q, int64_t row, int64_t col) {
  if (!q->col) return row_at(q, row, col); /* a weight in square blocks */
  return (double)mt_e4m3_to_f32(q->col[col_index(q, row, col)]) *
         scale_at(q, q->col_scale, col_scale_index(q, row, col));
}

mt_err mt_ref_pad_offsets(struct mt_backend *be, const struct mt_pad_offsets_args *a) {
  (void)be;
  MT_TRY(mt_check_pad_offsets(a));
  a->padded[0] = 0;
  for (int g = 0; g < a->group_count; g++) {
    a->padded[g + 1] = a->padded[g] + (int32_t)mt_q_padded(a->offsets[g + 1] - a->offsets[g]);
  }
  return MT_OK;
}

/* Where the rows of one quantize come from and go to. */
struct rows {
  const struct mt_tensor *x;
  const int32_t *row_source, *offsets, *padded;
  int top_k, group_count;
};

static float value_at(const struct rows *s, int64_t row, int64_t col) {
  return (float)ref_get(s->x, s->row_source ? s->row_source[row] / s->top_k : row, col);
}

/* The blocks of rows [begin, end), along the columns. */
static void quantize_along_rows(const struct rows *s, int64_t begin, int64_t end,
                                const struct mt_qtensor *q) {
  int64_t b = mt_q_block(q->format), cols = q->dim[1];
  for (int64_t r = begin; r < end; r++) {
    for (int64_t c = 0; c < cols; c += b) {
      float amax = 0;
      for (int64_t i = c; i < c + b && i < cols; i++) widen(&amax, value_at(s, r, i));
      uint8_t byte = scale_byte(q->format, amax);
      put_scale(q, q->row_scale, row_scale_index(q, r, c), byte);
      for (int64_t i = c; i < c + b && i < cols; i++)
        q->row[r * cols + i] = mt_f32_to_e4m3(value_at(s, r, i) * mt_e8m0_inverse(byte));
    }
  }
}

/* The same rows along themselves, from row `at` of the column copy on. */
static void quantize_along_columns(const struct rows *s, int64_t begin, int64_t end, int64_t at,
                                   const struct mt_qtensor *q) {
  int64_t b = mt_q_block(q->format);
  for (int64_t r = 0; r < mt_q_padded(end - begin); r += b) {
    for (int64_t c = 0; c < q->dim[1]; c++) {
      float amax = 0;
      for (int64_t i = r; i < r + b && begin + i < end; i++)
        widen(&amax, value_at(s, begin + i, c));
      uint8_t byte = scale_byte(q->format, amax);
      put_scale(q, q->col_scale, col_scale_index(q, at + r, c), byte);
      for (int64_t i = r; i < r + b; i++) {
        float x = begin + i < end ? value_at(s, begin + i, c) * mt_e8m0_inverse(byte) : 0;
        q->col[col_index(q, at + i, c)] = begin + i < end ? mt_f32_to_e4m3(x) : 0;
      }
    }
  }
}

static void quantize_rows(const struct rows *s, const struct mt_qtensor *q) {
  for (int g = 0; g < (s->offsets ? s->group_count : 1); g++) {
    int64_t begin = s->offsets ? s->offsets[g] : 0,
            end = s->offsets ? s->offsets[g + 1] : q->dim[0];
    if (q->row) quantize_along_rows(s, begin, end, q);
    if (q->col) quantize_along_columns(s, begin, end, s->padded ? s->padded[g] : 0, q);
  }
}

mt_err mt_ref_quantize(struct mt_backend *be, const struct mt_quantize_args *a) {
  (void)be;
  MT_TRY(mt_check_quantize(a));
  struct rows s = {&a->x, a->row_source, a->offsets, a->padded, a->top_k, a->group_count};
  quantize_rows(&s, &a->q);
  return MT_OK;
}

/* One matrix of a weight, in blocks of `tall` x `wide`; column copies where `columns`. */
static void quantize_matrix(const struct mt_tensor *w, const struct mt_qtensor *q, int64_t tall,
                            int64_t wide, bool columns) {
  int64_t n = q->dim[0], k = q->dim[1];
  for (int64_t i = 0; i < n; i += tall) {
    for (int64_t j = 0; j < k; j += wide) {
      float amax = 0;
      for (int64_t r = i; r < i + tall && r < n; r++)
        for (int64_t c = j; c < j + wide && c < k; c++) widen(&amax, (float)ref_get(w, r, c));
      uint8_t byte = scale_byte(q->format, amax);
      put_scale(q, columns ? q->col_scale : q->row_scale,
                columns ? col_scale_index(q, i, j) : row_scale_index(q, i, j), byte);
      for (int64_t r = i; r < i + tall && r < n; r++) {
        for (int64_t c = j; c < j + wide && c < k; c++) {
          uint8_t e = mt_f32_to_e4m3((float)ref_get(w, r, c) * mt_e8m0_inverse(byte));
          if (columns)
            q->col[col_index(q, r, c)] = e;
          else
            q->row[r * k + c] = e;
        }
      }
    }
  }
}

mt_err mt_ref_quantize_weight(struct mt_backend *be, const struct mt_quantize_weight_args *a) {
  (void)be;
  MT_TRY(mt_check_quantize_weight(a));
  int64_t b = mt_q_block(a->q.format);
  bool square = a->q.format == MT_Q_FP8;
  for (int64_t g = 0; g < (a->w.rank == 3 ? a->w.dim[0] : 1); g++) {
    struct mt_tensor w = a->w.rank == 3 ? mt_slice(&a->w, g) : a->w;
    struct mt_qtensor q = a->w.rank == 3 ? mt_q_slice(&a->q, g) : a->q;
    if (q.row) quantize_matrix(&w, &q, square ? b : 1, b, false);
    if (q.col) quantize_matrix(&w, &q, b, square ? b : 1, true);
  }
  return MT_OK;
}

/* Rows of group g of the groups that a weight has, or all. */
static void group_rows(const int32_t *offsets, int64_t rows, int64_t g, int64_t *begin,
                       int64_t *end) {
  *begin = offsets ? offsets[g] : 0;
  *end = offsets ? offsets[g + 1] : rows;
}

/* Rows [first, first + rows) of a copy as numbers, on the heap; NULL: no memory. Each is decoded
 * once and not at each multiplication, of which there are hundreds. */
static double *decoded(const struct mt_qtensor *q, bool columns, int64_t first, int64_t rows) {
  int64_t cols = q->dim[q->rank - 1];
  double *x = malloc((size_t)(rows * cols) * sizeof *x + 1);
  for (int64_t r = 0; x && r < rows; r++) {
    for (int64_t c = 0; c < cols; c++)
      x[r * cols + c] = columns ? col_at(q, first + r, c) : row_at(q, first + r, c);
  }
  return x;
}

/* The two operands of one group's product. */
struct operands {
  double *a, *b;
};
static mt_err operands_there(const struct operands *o) {
  return o->a && o->b ? MT_OK : mt_fail(MT_ENOMEM, "operands of a product in 8 bits");
}
static void free_operands(struct operands *o) {
  free(o->a);
  free(o->b);
}

mt_err mt_ref_qlinear_fwd(struct mt_backend *be, const struct mt_qlinear_fwd_args *a) {
  mt_err err = MT_OK;
  (void)be;
  MT_TRY(mt_check_qlinear_fwd(a));
  for (int64_t g = 0; g < (a->offsets ? a->w.dim[0] : 1) && !err; g++) {
    struct mt_qtensor w = a->offsets ? mt_q_slice(&a->w, g) : a->w;
    int64_t begin, end, width = w.dim[1];
    group_rows(a->offsets, a->x.dim[0], g, &begin, &end);
    struct operands o = {decoded(&a->x, false, begin, end - begin),
                         decoded(&w, false, 0, w.dim[0])};
    err = operands_there(&o);
    for (int64_t r = begin; r < end && !err; r++) {
      const double *x = o.a + (r - begin) * width;
      for (int64_t n = 0; n < w.dim[0]; n++) {
        double sum = 0;
        for (int64_t k = 0; k < width; k++) sum += x[k] * o.b[n * width + k];
        ref_set(&a->y, r, n, sum);
      }
    }
    free_operands(&o);
  }
  return err;
}

mt_err mt_ref_qlinear_dgrad(struct mt_backend *be, const struct mt_qlinear_dgrad_args *a) {
  mt_err err = MT_OK;
  (void)be;
  MT_TRY(mt_check_qlinear_dgrad(a));
  for (int64_t g = 0; g < (a->offsets ? a->w.dim[0] : 1) && !err; g++) {
    struct mt_qtensor w = a->offsets ? mt_q_slice(&a->w, g) : a->w;
    int64_t begin, end, height = w.dim[0], width = w.dim[1];
    group_rows(a->offsets, a->dy.dim[0], g, &begin, &end);
    struct operands o = {decoded(&a->dy, false, begin, end - begin), decoded(&w, true, 0, height)};
    err = operands_there(&o);
    for (int64_t r = begin; r < end && !err; r++) {
      const double *dy = o.a + (r - begin) * height;
      for (int64_t k = 0; k < width; k++) {
        double sum = 0;
        for (int64_t n = 0; n < height; n++) sum += dy[n] * o.b[n * width + k];
        ref_acc(&a->dx, r, k, sum, a->accumulate);
      }
    }
    free_operands(&o);
  }
  return err;
}

mt_err mt_ref_qlinear_wgrad(struct mt_backend *be, const struct mt_qlinear_wgrad_args *a) {
  mt_err err = MT_OK;
  MT_TRY(mt_check_qlinear_wgrad(a));
  for (int64_t g = 0; g < (a->offsets ? a->dw.dim[0] : 1) && !err; g++) {
    struct mt_tensor dw = a->offsets ? mt_slice(&a->dw, g) : a->dw;
    int64_t begin, end, at = a->offsets ? a->padded[g] : 0, height = dw.dim[0], width = dw.dim[1];
    group_rows(a->offsets, a->x.dim[0], g, &begin, &end);
    struct operands o = {decoded(&a->dy, true, at, end - begin),
                         decoded(&a->x, true, at, end - begin)};
    err = operands_there(&o);
    for (int64_t n = 0; n < height && !err; n++) {
      for (int64_t k = 0; k < width; k++) {
        double sum = 0;
        for (int64_t r = 0; r < end - begin; r++) sum += o.a[r * height + n] * o.b[r * width + k];
        ref_acc(&dw, n, k, sum, a->accumulate);
      }
    }
    free_operands(&o);
  }
  if (err || !a->sumsq) return err;
  return mt_ref_sumsq(
      be, &(struct mt_sumsq_args){.tensors = &a->dw, .tensor_count = 1, .out = a->sumsq});
}

/* A matrix on the heap. */
static mt_err temporary(struct mt_tensor *t, enum mt_dtype dtype, int64_t rows, int64_t cols) {
  *t = mt_mat(NULL, dtype, rows, cols);
  t->data = calloc(1, mt_bytes(t) + 1);
  return t->data ? MT_OK : mt_fail(MT_ENOMEM, "%lld x %lld", (long long)rows, (long long)cols);
}

mt_err mt_ref_swiglu_quantize_fwd(struct mt_backend *be,
                                  const struct mt_swiglu_quantize_fwd_args *a) {
  MT_TRY(mt_check_swiglu_quantize_fwd(a));
  struct mt_tensor h;
  MT_TRY(temporary(&h, a->gate_up.dtype, a->h.dim[0], a->h.dim[1]));
  mt_err err = mt_ref_swiglu_fwd(
      be, &(struct mt_swiglu_fwd_args){.gate_up = a->gate_up,
                                       .row_prob = a->row_prob,
                                       .row_count = a->offsets ? a->offsets + a->group_count : NULL,
                                       .h = h});
  struct rows s = {&h, NULL, a->offsets, a->padded, 1, a->group_count};
  if (!err) quantize_rows(&s, &a->h);
  free(h.data);
  return err;
}

mt_err mt_ref_swiglu_quantize_bwd(struct mt_backend *be,
                                  const struct mt_swiglu_quantize_bwd_args *a) {
  MT_TRY(mt_check_swiglu_quantize_bwd(a));
  struct mt_tensor h = {0}, dgu = {0};
  mt_err err;
  MT_GO(temporary(&h, a->dh.dtype, a->dh.dim[0], a->dh.dim[1]));
  MT_GO(temporary(&dgu, a->dh.dtype, a->dh.dim[0], 2 * a->dh.dim[1]));
  MT_GO(mt_ref_swiglu_bwd(
      be, &(struct mt_swiglu_bwd_args){.dh = a->dh,
                                       .gate_up = a->gate_up,
                                       .row_prob = a->row_prob,
                                       .row_count = a->offsets ? a->offsets + a->group_count : NULL,
                                       .dgate_up = dgu,
                                       .h = h,
                                       .drow_prob = a->drow_prob}));
  struct rows s = {&dgu, NULL, a->offsets, a->padded, 1, a->group_count};
  quantize_rows(&s, &a->dgate_up);
  s.x = &h;
  if (a->h.format != MT_Q_NONE) quantize_rows(&s, &a->h);
done:
  free(h.data);
  free(dgu.data);
  return err;
}

mt_err mt_ref_pack_rows(struct mt_backend *be, const struct mt_pack_rows_args *a) {
  (void)be;
  MT_TRY(mt_check_pack_rows(a));
  int64_t b = mt_q_block(a->format), cols = a->x.dim[1];
  int64_t bytes = mt_q_record_bytes(a->format, cols);
  for (int64_t r = 0; r < a->row_count; r++) {
    if (a->row_source && a->row_source[r] < 0) continue;
    int64_t from = a->row_source ? a->row_source[r] / a->top_k : r;
    uint8_t *to = a->records + r * bytes;
    memset(to, 0, (size_t)bytes);
    for (int64_t c = 0; c < cols; c += b) {
      float amax = 0;
      for (int64_t i = c; i < c + b && i < cols; i++) widen(&amax, (float)ref_get(&a->x, from, i));
      uint8_t byte = scale_byte(a->format, amax);
      to[cols + c / b] = byte;
      for (int64_t i = c; i < c + b && i < cols; i++)
        to[i] = mt_f32_to_e4m3((float)ref_get(&a->x, from, i) * mt_e8m0_inverse(byte));
    }
  }
  return MT_OK;
}

mt_err mt_ref_unpack_rows(struct mt_backend *be, const struct mt_unpack_rows_args *a) {
  (void)be;
  MT_TRY(mt_check_unpack_rows(a));
  int64_t b = mt_q_block(a->format), cols = a->xs.dim[1];
  for (int64_t r = 0; r < a->xs.dim[0]; r++) {
    const uint8_t *from =
        a->records + (a->source ? a->source[r] : r) * mt_q_record_bytes(a->format, cols);
    for (int64_t c = 0; c < cols; c++)
      ref_set(&a->xs, r, c, (double)mt_e4m3_to_f32(from[c]) * mt_e8m0_to_f32(from[cols + c / b]));
  }
  return MT_OK;
}
