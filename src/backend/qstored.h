/* One copy of an 8-bit operand as it lies in memory, whatever its format: what brings operands back
 * to another format goes by (kernels/cpu/qlinear.c, kernels/cuda/qlinear.cu). */
#ifndef MT_BACKEND_QSTORED_H
#define MT_BACKEND_QSTORED_H

#include "backend/qtensor.h"
#include "base/on_both.h"

/* Element (g, r, c) as stored is e[g * rows * cols + r * ld + c]; matrices whose rows are apart by
 * more than cols are single ones. Its scale is that of index g * scale_count + (r / tall) *
 * scale_ld
 * + c / wide, or, where scales_turned, g * scale_count + (c / wide) * scale_ld + r / tall. turned:
 * rows as stored are columns of the operand. */
struct mt_qstored {
  const uint8_t *e;
  const void *scales; /* float32 where fp8, else e8m0 */
  int64_t matrices, rows, cols, ld;
  int64_t scale_count, scale_ld;
  int tall, wide;
  bool scales_turned, turned, fp8;
};

MT_ON_BOTH int64_t mt_qstored_scale(const struct mt_qstored *s, int64_t g, int64_t r, int64_t c) {
  int64_t i = r / s->tall, j = c / s->wide;
  return g * s->scale_count + (s->scales_turned ? j * s->scale_ld + i : i * s->scale_ld + j);
}

/* Rows [row, row + rows) of a row copy; of a weight all: row 0, its rows. */
static inline struct mt_qstored mt_qstored_rows(const struct mt_qtensor *q, int64_t row,
                                                int64_t rows) {
  bool fp8 = q->format == MT_Q_FP8;
  int64_t n = q->dim[q->rank - 2], k = q->dim[q->rank - 1], wide = mt_q_blocks(q->format, k);
  struct mt_qstored s = {.e = q->row + row * k,
                         .scales = q->row_scale,
                         .matrices = q->rank == 3 ? q->dim[0] : 1,
                         .rows = rows,
                         .cols = k,
                         .ld = k,
                         .scale_count = n * wide,
                         .scale_ld = wide,
                         .tall = 1,
                         .wide = mt_q_block(q->format),
                         .scales_turned = false,
                         .turned = false,
                         .fp8 = fp8};
  if (!fp8) {
    s.scales = (const uint8_t *)q->row_scale + row * wide;
  } else if (q->weight) {
    s.tall = 128;
    s.scale_count = mt_q_blocks(q->format, n) * wide;
  } else {
    s.scales_turned = true;
    s.scale_ld = q->scale_ld;
    s.scales = (const float *)q->row_scale + row;
  }
  return s;
}

/* Rows [row, row + rows) of the operand in a column copy (row: a multiple of MT_Q_PAD; of a weight
 * all). FP8's weights have the same elements and scales either way: without a column copy it is
 * their row copy, as it lies. */
static inline struct mt_qstored mt_qstored_cols(const struct mt_qtensor *q, int64_t row,
                                                int64_t rows) {
  if (q->format == MT_Q_FP8 && q->weight && !q->col) return mt_qstored_rows(q, row, rows);
  int64_t n = q->dim[q->rank - 2], k = q->dim[q->rank - 1], block = mt_q_block(q->format);
  int64_t tall = mt_q_blocks(q->format, n);
  struct mt_qstored s = {.e = q->col + row * k,
                         .scales = q->col_scale,
                         .matrices = q->rank == 3 ? q->dim[0] : 1,
                         .rows = rows,
                         .cols = k,
                         .ld = k,
                         .scale_count = tall * k,
                         .scale_ld = k,
                         .tall = (int)block,
                         .wide = 1,
                         .scales_turned = false,
                         .turned = false,
                         .fp8 = q->format == MT_Q_FP8};
  if (!s.fp8) {
    s.scales = (const uint8_t *)q->col_scale + row / block * k;
    return s;
  }
  s.e = q->col + row;
  s.rows = k, s.cols = rows, s.turned = true;
  s.wide = 128;
  if (q->weight) {
    s.ld = n;
    s.scale_ld = tall, s.scale_count = tall * mt_q_blocks(q->format, k);
  } else {
    s.ld = q->col_rows;
    s.tall = 1;
    s.scales_turned = true;
    s.scales = (const float *)q->col_scale + row / 128 * k;
  }
  return s;
}

#endif
