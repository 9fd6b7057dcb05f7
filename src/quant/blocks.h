/* Quantizing a matrix in blocks, on the host: what the 8-bit recipes store. Along the columns
 * ("rows": a block is part of a row) or along the rows ("columns"), which the product that
 * contracts over that dimension reads; both are made from the same source, never one from the
 * other.
 *
 * MXFP8: blocks of 32 elements, e4m3, a scale e8m0 each: 2^ceil(log2(amax / 448)), 2^-127 at least.
 * A block whose scale is 2^-127 has only zeros, a NaN in it makes the scale 255, an infinity 254.
 * FP8: blocks of 1 x 128 (activations, gradients) or 128 x 128 (weights), e4m3, a float32 scale
 * each, the same power of two but 2^-126 at least, and 1 for zeros; NaN and infinity as above.
 *
 * The last block along a dimension may be short. Elements are x / scale, nearest even, at most 448
 * in magnitude. Threads of OpenMP share the work; the bytes do not depend on their number. */
#ifndef MT_QUANT_BLOCKS_H
#define MT_QUANT_BLOCKS_H

#include "backend/tensor.h"
#include "base/error.h"

enum { MT_MX_BLOCK = 32, MT_FP8_BLOCK = 128 };

/* x: F32 or BF16 [rows, cols], any ld. Each output may be NULL.
 *   row [rows, cols] (=), row_scale [rows, ceil(cols/32)] (=)
 *   col [rows, cols] (=), col_scale [ceil(rows/32), cols] (=): as stored, not transposed
 * One pass over x. Errors: MT_EUNSUPPORTED naming the format. */
mt_err mt_mxfp8_quantize(const struct mt_tensor *x, uint8_t *row, uint8_t *row_scale, uint8_t *col,
                         uint8_t *col_scale);
/* y [rows, cols] F32 or BF16 (=): element times scale; exact in both down to 2^-133. */
mt_err mt_mxfp8_dequantize_rows(const uint8_t *row, const uint8_t *row_scale, struct mt_tensor *y);
mt_err mt_mxfp8_dequantize_columns(const uint8_t *col, const uint8_t *col_scale,
                                   struct mt_tensor *y);

/* FP8, 1 x 128: row [rows, cols], row_scale [rows, ceil(cols/128)]; col is transposed, [cols,
 * rows], and col_scale [cols, ceil(rows/128)], since Hopper's products want both operands
 * contiguous along what is contracted. Each pair may be NULL. */
mt_err mt_fp8_quantize(const struct mt_tensor *x, uint8_t *row, float *row_scale, uint8_t *col,
                       float *col_scale);
/* FP8, 128 x 128: w [rows, cols], scale [ceil(rows/128), ceil(cols/128)]; and, unless NULL, the
 * same elements and scales transposed. */
mt_err mt_fp8_quantize_weight(const struct mt_tensor *x, uint8_t *w, float *scale, uint8_t *turned,
                              float *turned_scale);

/* Where the scale of outer index i (row of the operand) and block j along the contraction lies for
 * Blackwell's tensor cores: tiles of 128 x 4 scales, 512 bytes, whole rows of tiles one after
 * another; blocks: along the contraction, of the whole operand. */
static inline int64_t mt_mx_scale_index(int64_t i, int64_t j, int64_t blocks) {
  int64_t tile = i / 128 * ((blocks + 3) / 4) + j / 4;
  return tile * 512 + i % 32 * 16 + i % 128 / 32 * 4 + j % 4;
}
/* Bytes of the scales of an operand so laid out, padding included. */
int64_t mt_mx_scale_bytes(int64_t rows, int64_t blocks);
/* to (=) [mt_mx_scale_bytes]: scales [rows, blocks] in that order, zeros in the padding; and back.
 */
void mt_mx_swizzle(const uint8_t *scales, int64_t rows, int64_t blocks, uint8_t *to);
void mt_mx_unswizzle(const uint8_t *from, int64_t rows, int64_t blocks, uint8_t *scales);

#endif
