/* Scales in Blackwell's order, of every kind of copy: what a kernel makes beside mt_mx_swizzle of
 * each operand by itself. */
#ifndef TESTS_KERNELS_MXSCALE_CASES_H
#define TESTS_KERNELS_MXSCALE_CASES_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "backend/qtensor.h"
#include "base/mxscale.h"
#include "base/rng.h"
#include "kernels/mxscale.h"

enum { SCALE_GROUPS = 6, SCALE_POISON = 0x5a };

/* rows: of the groups, by tens; width: of the operand, in blocks. columns: of a column copy. */
struct scale_case {
  int groups; /* 0: matrices, each [rows[0] of outer indices] */
  int rows[SCALE_GROUPS];
  int width, matrices;
  bool columns;
};
static const struct scale_case scale_cases[] = {
    {0, {1}, 1, 1, false},
    {0, {128}, 4, 1, false},
    {0, {129}, 5, 3, false},
    {0, {300}, 7, 1, true},
    {0, {96}, 12, 4, true},
    {1, {200}, 6, 1, false},
    {6, {0, 1, 127, 128, 129, 300}, 3, 1, false},
    {6, {0, 1, 127, 128, 129, 300}, 5, 1, true},
    {6, {257, 0, 0, 31, 0, 0}, 9, 1, false},
    {6, {257, 0, 0, 31, 0, 0}, 4, 1, true},
    {3, {0, 0, 0}, 4, 1, false},
    {3, {0, 0, 0}, 4, 1, true},
};
enum { SCALE_CASES = sizeof scale_cases / sizeof *scale_cases };

/* A case on the host: s.scales, s.offsets and s.padded are host memory; want: poison where nothing
 * is to be written. */
struct scales_tried {
  struct mt_mx_scales s;
  uint8_t *source, *want;
  int64_t source_bytes, bytes;
  int32_t offsets[SCALE_GROUPS + 1], padded[SCALE_GROUPS + 1];
};

/* want (=) of one operand, from `from` on. */
static void want_operand(const struct mt_mx_scales *s, int64_t from, int64_t outer, int64_t blocks,
                         uint8_t *want) {
  uint8_t *plain = malloc((size_t)(outer * blocks) + 1);
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < blocks; j++)
      plain[i * blocks + j] = s->scales[from + i * s->by_outer + j * s->by_block];
  mt_mx_swizzle(plain, outer, blocks, want);
  free(plain);
}

static void scales_make(struct scales_tried *t, const struct scale_case *c) {
  struct mt_rng rng = mt_rng_make(5, (uint64_t)(c - scale_cases));
  struct mt_mx_scales *s = &t->s;
  int64_t rows = c->rows[0];
  memset(t, 0, sizeof *t);
  for (int g = 0; g < c->groups; g++) {
    t->offsets[g + 1] = t->offsets[g] + c->rows[g];
    t->padded[g + 1] = t->padded[g] + (int32_t)mt_q_padded(c->rows[g]);
  }
  if (c->groups) rows = t->offsets[c->groups] + 40; /* room for more than there are */
  s->matrices = c->matrices, s->groups = c->groups;
  if (c->groups) s->offsets = t->offsets, s->padded = t->padded;
  s->along_blocks = c->groups && c->columns;
  if (s->along_blocks) {
    s->outer = c->width, s->blocks = mt_q_col_rows(rows, c->groups) / 32;
  } else {
    s->outer = rows, s->blocks = c->width;
  }
  s->by_outer = c->columns ? 1 : s->blocks;
  s->by_block = c->columns ? s->outer : 1;
  s->by_matrix = s->outer * s->blocks;
  t->source_bytes = s->matrices * s->by_matrix;
  t->source = malloc((size_t)t->source_bytes);
  for (int64_t i = 0; i < t->source_bytes; i++)
    t->source[i] = (uint8_t)(1 + mt_rng_below(&rng, 255)); /* none is padding's 0 */
  s->scales = t->source;
  t->bytes = mt_mx_scales_bytes(s);
  t->want = malloc((size_t)t->bytes);
  memset(t->want, SCALE_POISON, (size_t)t->bytes);
  uint8_t *to = t->want;
  for (int64_t m = 0; !c->groups && m < s->matrices; m++) {
    want_operand(s, m * s->by_matrix, s->outer, s->blocks, to);
    to += mt_mx_scale_bytes(s->outer, s->blocks);
  }
  for (int g = 0; g < c->groups; g++) {
    int64_t outer = s->along_blocks ? s->outer : c->rows[g];
    int64_t blocks = s->along_blocks ? (t->padded[g + 1] - t->padded[g]) / 32 : s->blocks;
    int64_t from = s->along_blocks ? t->padded[g] / 32 * s->by_block : t->offsets[g] * s->by_outer;
    want_operand(s, from, outer, blocks, to);
    to += mt_mx_scale_bytes(outer, blocks);
  }
  assert_true(to <= t->want + t->bytes);
}

static void scales_free(struct scales_tried *t) {
  free(t->source), free(t->want);
}

#endif
