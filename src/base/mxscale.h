/* MX's block scales in the order in which Blackwell's tensor cores, and cuBLASLt for them, read
 * them (cuBLAS documentation, "1D Block Scaling Factors Layout"): tiles of 128 outer indices (rows
 * of an operand, whatever is not contracted) by 4 blocks along the contraction, 512 bytes, whole
 * rows of tiles one after another; within a tile the outer index runs 32 apart first. */
#ifndef MT_BASE_MXSCALE_H
#define MT_BASE_MXSCALE_H

#include <stdint.h>

enum { MT_MX_TILE_OUTER = 128, MT_MX_TILE_BLOCKS = 4, MT_MX_TILE_BYTES = 512 };

/* Tiles of so many outer indices, of so many blocks. */
static inline int64_t mt_mx_outer_tiles(int64_t outer) {
  return (outer + MT_MX_TILE_OUTER - 1) / MT_MX_TILE_OUTER;
}
static inline int64_t mt_mx_block_tiles(int64_t blocks) {
  return (blocks + MT_MX_TILE_BLOCKS - 1) / MT_MX_TILE_BLOCKS;
}

/* Where the scale of outer index i and block j lies; blocks: of the whole operand. */
static inline int64_t mt_mx_scale_index(int64_t i, int64_t j, int64_t blocks) {
  int64_t tile = i / MT_MX_TILE_OUTER * mt_mx_block_tiles(blocks) + j / MT_MX_TILE_BLOCKS;
  return tile * MT_MX_TILE_BYTES + i % 32 * 16 + i % 128 / 32 * 4 + j % 4;
}
/* Bytes of the scales of an operand so laid out, padding included. */
static inline int64_t mt_mx_scale_bytes(int64_t outer, int64_t blocks) {
  return mt_mx_outer_tiles(outer) * mt_mx_block_tiles(blocks) * MT_MX_TILE_BYTES;
}

/* to (=) [mt_mx_scale_bytes]: scales [outer, blocks] in that order, zeros in the padding; and back.
 */
void mt_mx_swizzle(const uint8_t *scales, int64_t outer, int64_t blocks, uint8_t *to);
void mt_mx_unswizzle(const uint8_t *from, int64_t outer, int64_t blocks, uint8_t *scales);

#endif
