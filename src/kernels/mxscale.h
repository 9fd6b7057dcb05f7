/* From the scales that quantizing leaves (backend/qtensor.h, MXFP8) to Blackwell's order
 * (base/mxscale.h), a tile at a time: one text for GPUs and for the tests on the host. */
#ifndef MT_KERNELS_MXSCALE_H
#define MT_KERNELS_MXSCALE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/on_both.h"

/* Scale (i, j) of matrix m, outer index i, block j along the contraction, is
 * scales[m * by_matrix + i * by_outer + j * by_block]. Without offsets there are `matrices` of
 * them, each laid out by itself, one after another. With offsets (device memory, one matrix) the
 * rows of each group are an operand of their own, laid out by itself where padded has it begin:
 *   along_blocks false (row copies): group g is outer indices [offsets[g], offsets[g+1]); its tiles
 *     begin at tile row padded[g] / 128;
 *   along_blocks true (column copies): group g is blocks [padded[g] / 32, padded[g+1] / 32), its
 *     tiles come after padded[g] / 128 times those of all outer indices.
 * outer, blocks: of a matrix, with offsets what there is room for (rows, or col_rows / 32). */
struct mt_mx_scales {
  const uint8_t *scales;
  int64_t by_outer, by_block, by_matrix;
  int64_t matrices, outer, blocks;
  const int32_t *offsets, *padded;
  int groups;
  bool along_blocks;
};

/* One tile: where it goes (the index of its first byte), where its scales are from on, and how many
 * of its 128 x 4 there are; others are zeros. at -1: no tile here. */
struct mt_mx_tile {
  int64_t at, from;
  int outer, blocks;
};

MT_ON_BOTH int mt_mx_least(int64_t a, int b) {
  return a < 0 ? 0 : a < b ? (int)a : b;
}

/* The last group that begins at `at` or before, rows as padded; -1 past the last group. */
MT_ON_BOTH int mt_mx_group(const struct mt_mx_scales *s, int64_t at) {
  int low = 0, high = s->groups;
  if (at >= s->padded[s->groups]) return -1;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (s->padded[middle] <= at)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* Tile (i, j) of matrix m, counted as if there were no groups. */
MT_ON_BOTH struct mt_mx_tile mt_mx_tile_of(const struct mt_mx_scales *s, int64_t m, int64_t i,
                                           int64_t j) {
  int64_t tall = (s->outer + 127) / 128, wide = (s->blocks + 3) / 4;
  int64_t outer = i * 128, end = s->outer;
  struct mt_mx_tile t = {-1, 0, 0, 0};
  if (!s->offsets) {
    t.at = ((m * tall + i) * wide + j) * 512;
  } else if (s->along_blocks) {
    int g = mt_mx_group(s, j * 128);
    if (g < 0) return t;
    int64_t first = s->padded[g] / 128, count = s->padded[g + 1] / 128 - first;
    t.at = (first * tall + i * count + (j - first)) * 512;
  } else {
    int g = mt_mx_group(s, i * 128);
    if (g < 0) return t;
    t.at = (i * wide + j) * 512;
    outer += s->offsets[g] - s->padded[g];
    end = s->offsets[g + 1];
  }
  t.from = m * s->by_matrix + outer * s->by_outer + j * 4 * s->by_block;
  t.outer = mt_mx_least(end - outer, 128);
  t.blocks = mt_mx_least(s->blocks - j * 4, 4);
  return t;
}

/* Word w of the tile's 128: the four scales of one outer index, the first in the lowest byte. */
MT_ON_BOTH uint32_t mt_mx_tile_word(const struct mt_mx_scales *s, const struct mt_mx_tile *t,
                                    int w) {
  int i = w / 4 + w % 4 * 32;
  uint32_t word = 0;
  if (i >= t->outer) return 0;
  const uint8_t *from = s->scales + t->from + i * s->by_outer;
  for (int j = 0; j < t->blocks; j++) word |= (uint32_t)from[j * s->by_block] << 8 * j;
  return word;
}

/* Tile rows and columns to go through, with groups those that there is room for. */
MT_ON_BOTH int64_t mt_mx_tiles_tall(const struct mt_mx_scales *s) {
  int64_t rows = s->outer;
  if (s->offsets && !s->along_blocks) { /* as mt_q_col_rows */
    int64_t held = s->groups < rows ? s->groups : rows;
    rows = (rows + held * 127) / 128 * 128;
  }
  return (rows + 127) / 128;
}
MT_ON_BOTH int64_t mt_mx_tiles_wide(const struct mt_mx_scales *s) {
  return (s->blocks + 3) / 4;
}
/* Bytes of all of it. */
MT_ON_BOTH int64_t mt_mx_scales_bytes(const struct mt_mx_scales *s) {
  return s->matrices * mt_mx_tiles_tall(s) * mt_mx_tiles_wide(s) * 512;
}

#endif
