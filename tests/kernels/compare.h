/* A backend beside the reference: every tensor exists twice, in the backend's memory and storage
 * format, and as float64 on the host, from the same rounded numbers. Outputs are poisoned with NaN
 * before they are written. */
#ifndef TESTS_KERNELS_COMPARE_H
#define TESTS_KERNELS_COMPARE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "backend/device.h"
#include "base/rng.h"
#include "kernels/registry.h"
#include "quant/recipe.h"
#include "ok.h"

enum { MAX_DUALS = 192 };

struct dual {
  const char *name;
  struct mt_tensor dev, ref; /* ref: F64, contiguous */
};

struct dual_ints {
  int32_t *dev, *ref;
  int64_t count;
};

struct bench_case {
  struct mt_backend *be, ref_be;
  const struct mt_recipe *recipe;
  struct mt_rng rng;
  void *owned[2 * MAX_DUALS], *owned_dev[MAX_DUALS];
  size_t owned_dev_bytes[MAX_DUALS];
  int owned_count, owned_dev_count;
  double worst; /* largest error seen over tolerance 1 */
  const char *worst_name;
  uint64_t bits;   /* of everything that was compared, as stored */
  double plant;    /* a planted bug: an output's largest element is off by this share */
  int64_t drawn;   /* numbers, where bits_only */
  bool bits_only;  /* the reference does not run: nothing is compared, bits are mixed */
  bool kept_types; /* the case has asked for the formats of gradients or states */
};

static inline enum mt_dtype kept_type(struct bench_case *c, enum mt_dtype type) {
  c->kept_types = true;
  return type;
}

/* A normal number. Where nothing is compared one of a few, over and over, which is soon had; a
 * prime of them, so that rows differ. */
static inline double draw(struct bench_case *c) {
  enum { FEW_NUMBERS = 4093 };
  static double few[FEW_NUMBERS];
  if (!c->bits_only) return mt_rng_normal(&c->rng);
  for (int i = 0; i < FEW_NUMBERS && few[FEW_NUMBERS - 1] == 0; i++)
    few[i] = mt_rng_normal(&c->rng);
  return few[c->drawn++ % FEW_NUMBERS];
}

static inline void *own(struct bench_case *c, size_t bytes) {
  void *p = calloc(1, bytes ? bytes : 1);
  assert_non_null(p);
  assert_true(c->owned_count < 2 * MAX_DUALS);
  return c->owned[c->owned_count++] = p;
}

static inline void *own_dev(struct bench_case *c, size_t bytes) {
  void *p;
  OK(c->be->mem_alloc(c->be, bytes ? bytes : 4, &p));
  assert_true(c->owned_dev_count < MAX_DUALS);
  c->owned_dev_bytes[c->owned_dev_count] = bytes ? bytes : 4;
  return c->owned_dev[c->owned_dev_count++] = p;
}

static inline void release_all(struct bench_case *c) {
  for (int i = 0; i < c->owned_count; i++) free(c->owned[i]);
  for (int i = 0; i < c->owned_dev_count; i++) {
    c->be->mem_free(c->be, c->owned_dev[i], c->owned_dev_bytes[i]);
  }
  c->owned_count = c->owned_dev_count = 0;
}

/* mode: 'r' random inputs, 'n' poisoned with NaN, 'z' zeros. d1, d2: 0 where the rank is lower. */
static inline struct dual dual(struct bench_case *c, const char *name, enum mt_dtype dtype,
                               char mode, double scale, int64_t d0, int64_t d1, int64_t d2) {
  struct dual x = {.name = name};
  x.dev = d2   ? mt_cube(NULL, dtype, d0, d1, d2)
          : d1 ? mt_mat(NULL, dtype, d0, d1)
               : mt_vec(NULL, dtype, d0);
  x.ref = x.dev;
  x.ref.dtype = MT_F64;
  int64_t n = mt_count(&x.dev);
  double *values = x.ref.data = own(c, (size_t)n * sizeof(double));
  void *raw = own(c, mt_bytes(&x.dev));
  for (int64_t i = 0; i < n; i++) {
    values[i] = mode == 'r' ? scale * draw(c) : mode == 'n' ? NAN : 0;
  }
  mt_dtype_convert(raw, dtype, values, MT_F64, (size_t)n);
  mt_dtype_convert(values, MT_F64, raw, dtype, (size_t)n);
  x.dev.data = own_dev(c, mt_bytes(&x.dev));
  OK(c->be->upload(c->be, x.dev.data, raw, mt_bytes(&x.dev)));
  return x;
}

/* A number or struct that both take from their memory. */
struct dual_value {
  void *dev, *ref;
};
static inline struct dual_value dual_value(struct bench_case *c, const void *value, size_t bytes) {
  struct dual_value x = {own_dev(c, bytes), own(c, bytes)};
  memcpy(x.ref, value, bytes);
  OK(c->be->upload(c->be, x.dev, value, bytes));
  return x;
}

static inline struct dual_ints ints(struct bench_case *c, int64_t count, const int32_t *values) {
  struct dual_ints x = {.count = count};
  x.ref = own(c, (size_t)count * sizeof *x.ref);
  for (int64_t i = 0; i < count; i++) x.ref[i] = values ? values[i] : -77;
  x.dev = own_dev(c, (size_t)count * sizeof *x.dev);
  OK(c->be->upload(c->be, x.dev, x.ref, (size_t)count * sizeof *x.dev));
  return x;
}

/* FNV-1a. */
static inline void mix_bits(struct bench_case *c, const void *data, size_t size_bytes) {
  const unsigned char *p = data;
  for (size_t i = 0; i < size_bytes; i++) c->bits = (c->bits ^ p[i]) * 0x100000001b3u;
}

/* Compares what the backend wrote with what ref wrote: max|d| / max|ref|, NaN anywhere it should
 * not be is infinite. Keeps the worst of the case. */
static inline void expect_scaled(struct bench_case *c, const struct dual *x, double slack) {
  int64_t n = mt_count(&x->dev);
  double *got = own(c, (size_t)n * sizeof *got), top = 0, worst = 0;
  void *raw = own(c, mt_bytes(&x->dev));
  const double *want = x->ref.data;
  OK(c->be->download(c->be, raw, x->dev.data, mt_bytes(&x->dev)));
  mix_bits(c, raw, mt_bytes(&x->dev));
  if (c->bits_only) return;
  mt_dtype_convert(got, MT_F64, raw, x->dev.dtype, (size_t)n);
  int64_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    if (isnan(want[i]) || fabs(want[i]) <= top) continue;
    top = fabs(want[i]);
    largest = i;
  }
  if (c->plant != 0 && n > 0) got[largest] += c->plant * (top > 0 ? top : 1);
  for (int64_t i = 0; i < n; i++) {
    if (isnan(want[i]) && isnan(got[i])) continue; /* left as they were, both */
    double d = fabs(got[i] - want[i]) / (top > 0 ? top : 1);
    worst = isnan(d) ? INFINITY : fmax(worst, d);
  }
  worst /= slack;
  if (worst > c->worst) {
    c->worst = worst;
    c->worst_name = x->name;
  }
}

static inline void expect(struct bench_case *c, const struct dual *x) {
  expect_scaled(c, x, 1);
}

static inline void expect_ints(struct bench_case *c, const char *name, const struct dual_ints *x) {
  int32_t *got = own(c, (size_t)x->count * sizeof *got);
  OK(c->be->download(c->be, got, x->dev, (size_t)x->count * sizeof *got));
  mix_bits(c, got, (size_t)x->count * sizeof *got);
  if (c->plant != 0 && x->count > 0) got[x->count / 2] ^= 1;
  for (int64_t i = 0; i < x->count; i++) {
    if (got[i] == x->ref[i]) continue;
    c->worst = INFINITY;
    c->worst_name = name;
  }
}

#endif
