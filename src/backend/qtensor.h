/* A matrix in 8 bits: e4m3 elements in blocks, each with a scale that is a power of two, in up to
 * two copies. Products contract along rows of the one (fwd: x and w; dgrad: dy) or along the
 * columns of the other (dgrad: w; wgrad: dy and x), and a block must lie along what is contracted;
 * both are made from the same source, never one of the other. Numbers: base/fp8.h; an element is
 * x / scale, nearest even. A view, as mt_tensor.
 *
 * Activations and gradients, [R,C] in groups of rows (experts; one group where offsets are NULL).
 * Group g is rows [offsets[g], offsets[g+1]) of the row copy and begins at row padded[g] of the
 * column copy: there each group is filled up to a multiple of MT_Q_PAD with zeros, so that no block
 * holds rows of two groups. P = col_rows is what the column copy has room for, a multiple of
 * MT_Q_PAD; rows past padded[G] are never read.
 *   MXFP8 (blocks of 32): row [R,C], row_scale e8m0 [R, ceil(C/32)]
 *                         col [P,C], col_scale e8m0 [P/32, C]
 *   FP8 (1 x 128):        row [R,C], row_scale F32 [ceil(C/128), scale_ld]: of column block and row
 *                         col [C,P], col_scale F32 [P/128, C]: transposed, as Hopper's tensor cores
 *                         want both operands contiguous along what is contracted
 * Weights, [N,K] or of G groups [G,N,K]:
 *   MXFP8:                row [G,N,K], row_scale e8m0 [G, N, ceil(K/32)]
 *                         col [G,N,K], col_scale e8m0 [G, ceil(N/32), K]
 *   FP8 (128 x 128):      row [G,N,K], row_scale F32 [G, ceil(N/128), ceil(K/128)]
 *                         col [G,K,N], col_scale F32 [G, ceil(K/128), ceil(N/128)]: row turned,
 *                         so that dgrad takes a weight that has its row copy alone
 * The last block along a width may be short. */
#ifndef MT_BACKEND_QTENSOR_H
#define MT_BACKEND_QTENSOR_H

#include <stdbool.h>
#include <stdint.h>

enum mt_qformat { MT_Q_NONE, MT_Q_MXFP8, MT_Q_FP8 };

/* Rows of a group are padded to this in a column copy, whatever the format: a tile of Hopper's
 * along the contraction, four of MX's blocks, whose scales Blackwell reads together. */
enum { MT_Q_PAD = 128 };

struct mt_qtensor {
  enum mt_qformat format; /* MT_Q_NONE: absent */
  bool weight;
  int rank;       /* 2; weights also 3 */
  int64_t dim[3]; /* [rows, cols] or [groups, rows, cols] of the source */
  uint8_t *row;   /* NULL: this copy does not exist */
  void *row_scale;
  uint8_t *col;
  void *col_scale;
  int64_t scale_ld; /* activations in FP8: floats between lines of row_scale; a multiple of 4 */
  int64_t col_rows; /* activations: P */
};

static inline int mt_q_block(enum mt_qformat format) {
  return format == MT_Q_MXFP8 ? 32 : 128;
}
static inline int64_t mt_q_blocks(enum mt_qformat format, int64_t n) {
  return (n + mt_q_block(format) - 1) / mt_q_block(format);
}
static inline int64_t mt_q_padded(int64_t rows) {
  return (rows + MT_Q_PAD - 1) / MT_Q_PAD * MT_Q_PAD;
}
/* Rows of a column copy that has room for R rows in so many groups, however they fall. */
static inline int64_t mt_q_col_rows(int64_t rows, int64_t groups) {
  int64_t held = groups < rows ? groups : rows; /* groups that have rows, at most */
  return (rows + held * (MT_Q_PAD - 1)) / MT_Q_PAD * MT_Q_PAD;
}
/* A row on its way between ranks: its C elements as the row copy has them, the scales of their
 * blocks as e8m0 bytes, and zeros up to a multiple of 16 bytes. */
static inline int64_t mt_q_record_bytes(enum mt_qformat format, int64_t cols) {
  return (cols + mt_q_blocks(format, cols) + 15) / 16 * 16;
}
/* Matrix g of a weight of rank 3. */
static inline struct mt_qtensor mt_q_slice(const struct mt_qtensor *q, int64_t g) {
  struct mt_qtensor s = *q;
  int64_t n = q->dim[1], k = q->dim[2], all = n * k;
  int64_t row_scales = q->format == MT_Q_FP8 ? mt_q_blocks(q->format, n) : n;
  int64_t col_scales = q->format == MT_Q_FP8 ? mt_q_blocks(q->format, k) : k;
  int64_t item = q->format == MT_Q_FP8 ? 4 : 1;
  row_scales *= mt_q_blocks(q->format, k), col_scales *= mt_q_blocks(q->format, n);
  s.rank = 2;
  s.dim[0] = n, s.dim[1] = k, s.dim[2] = 1;
  if (s.row) s.row += g * all, s.row_scale = (char *)q->row_scale + g * row_scales * item;
  if (s.col) s.col += g * all, s.col_scale = (char *)q->col_scale + g * col_scales * item;
  return s;
}

#endif
