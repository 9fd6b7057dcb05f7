/* Matrices for tests of grouped operations: random numbers with NaN around them, on the host and on
 * the device; row counts of many kinds. */
#ifndef TESTS_GPU_RAGGED_H
#define TESTS_GPU_RAGGED_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/device.h"
#include "base/rng.h"
#include "gpu/gpu.h"
#include "ok.h"

enum rows_of { MIXED, ONE_EXPERT, EVEN, RANDOM, NONE, DENSE, DENSE_ONE };
enum { GROUPS_MOST = 160, SLACK_ROWS = 37, WORK_MOST = 4000000 };

/* A matrix (or a row of matrices, `rows` in all) on both sides. host: as the device sees it. */
struct both {
  struct mt_tensor dev;
  enum mt_dtype dtype;
  int64_t rows, cols, ld;
  float *host;     /* [rows, ld] */
  void *raw, *was; /* what is downloaded; what was there before */
  size_t bytes;
};

static inline void *take(size_t bytes) {
  void *p = calloc(1, bytes ? bytes : 1);
  assert_non_null(p);
  return p;
}

static inline float as_stored(double x, enum mt_dtype dtype) {
  return dtype == MT_BF16 ? mt_bf16_to_f32(mt_f32_to_bf16((float)x)) : (float)x;
}

/* Of variance 1, from the sum of four uniform numbers: millions are needed, fast (the mixing
 * function is splitmix64's). */
static inline double number(uint64_t i) {
  i += 0x9e3779b97f4a7c15u;
  i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9u;
  i = (i ^ i >> 27) * 0x94d049bb133111ebu;
  i ^= i >> 31;
  uint64_t sum = (i & 0xffff) + (i >> 16 & 0xffff) + (i >> 32 & 0xffff) + (i >> 48);
  return ((double)sum / 65535 - 2) * 1.7320508075688772;
}

/* The first `filled` rows random, the rest and what is beyond the columns NaN. */
static inline struct both make(struct mt_backend *be, struct mt_rng *rng, enum mt_dtype dtype,
                               double scale, int64_t rows, int64_t cols, int64_t pad,
                               int64_t filled) {
  struct both x = {.dtype = dtype, .rows = rows, .cols = cols, .ld = cols + pad};
  size_t n = (size_t)(rows * x.ld);
  x.bytes = n * mt_dtype_bytes(dtype);
  x.host = take(n * sizeof(float));
  x.raw = take(x.bytes);
  x.was = take(x.bytes);
  uint64_t seed = mt_rng_u32(rng);
#pragma omp parallel for
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < x.ld; c++) {
      bool inside = r < filled && c < cols;
      x.host[r * x.ld + c] =
          inside ? as_stored(scale * number(seed << 32 ^ (uint64_t)(r * cols + c)), dtype) : NAN;
    }
  }
  mt_dtype_convert(x.was, dtype, x.host, MT_F32, n);
  void *data;
  OK(be->mem_alloc(be, x.bytes ? x.bytes : 4, &data));
  OK(be->upload(be, data, x.was, x.bytes));
  x.dev = (struct mt_tensor){data, dtype, 2, {rows, cols, 1}, x.ld};
  return x;
}

/* How many of a test's shapes are tried: all, or as many as the command line's number says (for
 * compute-sanitizer, which is slow). */
static size_t shapes_tried;

static inline size_t shapes_asked(int argc, char **argv, size_t all) {
  size_t asked = argc > 1 ? (size_t)strtoul(argv[1], NULL, 10) : all;
  return asked < all ? asked : all;
}

static inline void drop(struct mt_backend *be, struct both *x) {
  be->mem_free(be, x->dev.data, x->bytes);
  free(x->host);
  free(x->raw);
  free(x->was);
}

static inline int fill_offsets(int32_t *offsets, enum rows_of rows, int groups,
                               struct mt_rng *rng) {
  static const int mixed[] = {0, 1, 127, 128, 129, 500, 0, 63};
  int at = 0;
  for (int g = 0; g < groups; g++) {
    offsets[g] = at;
    at += rows == MIXED        ? mixed[g % 8]
          : rows == ONE_EXPERT ? (g == 3 ? 2600 : 0)
          : rows == EVEN       ? 256
          : rows == DENSE      ? 333
          : rows == DENSE_ONE  ? 1
          : rows == RANDOM     ? (int)mt_rng_below(rng, groups > 16 ? 40 : 420)
                               : 0;
  }
  offsets[groups] = at;
  return at;
}

static inline float stored(const struct both *x, const void *raw, int64_t i) {
  return x->dtype == MT_BF16 ? mt_bf16_to_f32(((const uint16_t *)raw)[i]) : ((const float *)raw)[i];
}

#endif
