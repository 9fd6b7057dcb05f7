/* A backend with memory for one test: tensors made from float64 numbers on the host (which are
 * rounded to the storage on the way, so that a formula in the test sees what the backend sees), and
 * read back as float64. */
#ifndef TESTS_KERNELS_BED_H
#define TESTS_KERNELS_BED_H

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

enum { BED_ITEMS = 512 };

struct bed {
  struct mt_backend be;
  const struct mt_recipe *recipe;
  struct mt_rng rng;
  void *host[BED_ITEMS], *dev[BED_ITEMS];
  size_t dev_bytes[BED_ITEMS];
  int host_count, dev_count;
};

/* Runs an operation with the fields given. */
#define DO(b, op, ...) OK((b)->be.ops.op(&(b)->be, &(struct mt_##op##_args){__VA_ARGS__}))

static inline void *host_mem(struct bed *b, size_t bytes) {
  void *p = calloc(1, bytes ? bytes : 1);
  assert_non_null(p);
  assert_true(b->host_count < BED_ITEMS);
  return b->host[b->host_count++] = p;
}

static inline void *dev_mem(struct bed *b, size_t bytes) {
  void *p;
  if (bytes == 0) bytes = 4;
  OK(b->be.mem_alloc(&b->be, bytes, &p));
  assert_true(b->dev_count < BED_ITEMS);
  b->dev_bytes[b->dev_count] = bytes;
  return b->dev[b->dev_count++] = p;
}

static inline void bed_open(struct bed *b, const char *backend, const char *recipe) {
  *b = (struct bed){.recipe = mt_recipe_find(recipe), .rng = mt_rng_make(23, 9)};
  assert_non_null(b->recipe);
  OK(mt_backend_create(&b->be, backend, 2));
  struct mt_limits l = {.tokens = 1024,
                        .rows = 4096,
                        .hidden = 256,
                        .ffn = 256,
                        .experts = 512,
                        .top_k = 16,
                        .vocab = 1024,
                        .heads = 16,
                        .kv_heads = 2,
                        .head_dim = 128,
                        .act = b->recipe->act,
                        .qformat = MT_Q_MXFP8};
  b->be.workspace_size_bytes = b->be.workspace_bytes(&b->be, &l);
  b->be.workspace = dev_mem(b, b->be.workspace_size_bytes);
}

/* Gives back what a round took, all but the workspace. */
static inline void bed_clear(struct bed *b) {
  while (b->host_count > 0) free(b->host[--b->host_count]);
  while (b->dev_count > 1) {
    b->dev_count--;
    b->be.mem_free(&b->be, b->dev[b->dev_count], b->dev_bytes[b->dev_count]);
  }
}

static inline void bed_close(struct bed *b) {
  bed_clear(b);
  b->be.mem_free(&b->be, b->dev[0], b->dev_bytes[0]);
  mt_backend_destroy(&b->be);
}

static inline double *normals(struct bed *b, int64_t n, double scale) {
  double *v = host_mem(b, (size_t)n * sizeof *v);
  for (int64_t i = 0; i < n; i++) v[i] = scale * mt_rng_normal(&b->rng);
  return v;
}

/* Fills an empty view; v NULL: poisoned with NaN. */
static inline struct mt_tensor filled(struct bed *b, struct mt_tensor t, double *v) {
  size_t n = (size_t)mt_count(&t);
  void *raw = host_mem(b, mt_bytes(&t));
  if (!v) {
    v = host_mem(b, n * sizeof *v);
    for (size_t i = 0; i < n; i++) v[i] = NAN;
  }
  assert_int_equal(mt_dtype_convert(raw, t.dtype, v, MT_F64, n), 0);
  assert_int_equal(mt_dtype_convert(v, MT_F64, raw, t.dtype, n), 0);
  t.data = dev_mem(b, mt_bytes(&t));
  OK(b->be.upload(&b->be, t.data, raw, mt_bytes(&t)));
  return t;
}

static inline struct mt_tensor act(struct bed *b, double *v, int64_t rows, int64_t cols) {
  return filled(b, mt_mat(NULL, b->recipe->act, rows, cols), v);
}

static inline struct mt_tensor stat(struct bed *b, double *v, int64_t rows, int64_t cols) {
  return filled(b, mt_mat(NULL, b->recipe->stat, rows, cols), v);
}

static inline struct mt_tensor stat_vec(struct bed *b, double *v, int64_t n) {
  return filled(b, mt_vec(NULL, b->recipe->stat, n), v);
}

static inline struct mt_tensor grad(struct bed *b, double *v, int64_t rows, int64_t cols) {
  return filled(b, mt_mat(NULL, b->recipe->grad, rows, cols), v);
}

/* A contiguous tensor as float64 on the host. */
static inline double *values(struct bed *b, const struct mt_tensor *t) {
  size_t n = (size_t)mt_count(t);
  double *v = host_mem(b, n * sizeof *v);
  void *raw = host_mem(b, mt_bytes(t));
  OK(b->be.download(&b->be, raw, t->data, mt_bytes(t)));
  assert_int_equal(mt_dtype_convert(v, MT_F64, raw, t->dtype, n), 0);
  return v;
}

/* Integers on the device; v NULL: values that no operation would write. */
static inline int32_t *ints(struct bed *b, const int32_t *v, int64_t n) {
  size_t bytes = (size_t)n * sizeof(int32_t);
  int32_t *d = dev_mem(b, bytes), *h = host_mem(b, bytes);
  for (int64_t i = 0; i < n; i++) h[i] = v ? v[i] : -77;
  OK(b->be.upload(&b->be, d, h, bytes));
  return d;
}

static inline int32_t *one(struct bed *b, int32_t value) {
  return ints(b, &value, 1);
}

/* One number of a step on the device. */
static inline void *on_device(struct bed *b, const void *value, size_t bytes) {
  void *d = dev_mem(b, bytes);
  OK(b->be.upload(&b->be, d, value, bytes));
  return d;
}

static inline const float *one_float(struct bed *b, float value) {
  return on_device(b, &value, sizeof value);
}

/* Betas 0.9 and 0.95. */
static inline const struct mt_adamw_values *adamw_values(struct bed *b, double lr, double decay,
                                                         int64_t step, uint64_t seed) {
  struct mt_adamw_values v = mt_adamw_at(lr, 0.9, 0.95, decay, step, seed);
  return on_device(b, &v, sizeof v);
}

static inline int32_t *read_ints(struct bed *b, const int32_t *d, int64_t n) {
  int32_t *h = host_mem(b, (size_t)n * sizeof *h);
  OK(b->be.download(&b->be, h, d, (size_t)n * sizeof *h));
  return h;
}

/* max|got - want| / max|want|; infinite where either is NaN. */
static inline double distance(const double *got, const double *want, int64_t n) {
  double top = 0, off = 0;
  for (int64_t i = 0; i < n; i++) {
    double d = fabs(got[i] - want[i]);
    off = fmax(off, isnan(d) ? INFINITY : d);
    top = fmax(top, fabs(want[i]));
  }
  return off == 0 ? 0 : off / (top > 0 ? top : 1);
}

/* Within `slack` times what the recipe allows one operation, and not within it once the largest
 * element is off by 5%: a comparison that nothing fails proves nothing. */
static inline void expect_close(struct bed *b, const char *what, const double *got,
                                const double *want, int64_t n, double slack) {
  double limit = slack * b->recipe->op_tolerance, off = distance(got, want, n);
  if (!(off <= limit)) {
    fail_msg("%s %s: %s is off by %.2g of %.1g", b->be.name, b->recipe->name, what, off, limit);
  }
  int64_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    if (fabs(want[i]) > fabs(want[largest])) largest = i;
  }
  if (n == 0 || want[largest] == 0) return;
  double *bug = host_mem(b, (size_t)n * sizeof *bug);
  memcpy(bug, got, (size_t)n * sizeof *bug);
  bug[largest] *= 1.05;
  if (distance(bug, want, n) <= limit) fail_msg("%s: a planted bug passed", what);
}

static inline void expect_same(struct bed *b, const char *what, const double *got,
                               const double *want, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    if (got[i] == want[i]) continue;
    fail_msg("%s %s: %s[%lld] is %.17g, not %.17g", b->be.name, b->recipe->name, what, (long long)i,
             got[i], want[i]);
  }
}

/* Runs a property on every backend and format; on a GPU where there is one. */
static inline void on_every_backend(void (*property)(struct bed *b)) {
  static const char *const rows[][2] = {{"ref", "fp64"},  {"cpu", "fp32"},
                                        {"cpu", "bf16"},  {"cuda", "fp32"},
                                        {"cuda", "bf16"}, {"cuda-portable", "bf16"}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    if (strncmp(rows[i][0], "cuda", 4) == 0 && mt_cuda_device_count() == 0) continue;
    struct bed b;
    bed_open(&b, rows[i][0], rows[i][1]);
    property(&b);
    bed_close(&b);
  }
}

/* test_NAME for cmocka from property NAME. */
#define ON_EVERY_BACKEND(name)                                                                     \
  static void test_##name(void **state) {                                                          \
    (void)state;                                                                                   \
    on_every_backend(name);                                                                        \
  }

#endif
