/* Central differences in float64: a case names its inputs (leaves) with the gradients that the
 * backward operations wrote, and its outputs with random cotangents c; every element of every leaf
 * is moved by +-h, and (sum c*out(+h) - sum c*out(-h)) / 2h is held against the gradient.
 *
 * Every operation runs through a wrapper that counts its calls, so that an operation without a case
 * is seen, and that can plant a bug in its arguments, so that the tolerance is seen to reject it.
 */
#ifndef TESTS_KERNELS_DIFFERENCES_H
#define TESTS_KERNELS_DIFFERENCES_H

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
#include "ok.h"

enum { MAX_OWNED = 64, MAX_LEAVES = 4, MAX_OUTPUTS = 3 };

#define X(op) OP_##op,
enum op_id { MT_OP_LIST(X) OP_COUNT };
#undef X

struct leaf {
  const char *name;
  struct mt_tensor x, g;
  double *base; /* what g held before the backward added to it, or NULL */
};

struct output {
  struct mt_tensor y;
  double *c, *side; /* cotangent [n]; the outputs at +h */
};

struct probe {
  struct mt_backend be;
  struct mt_ops ref; /* what the wrappers call */
  struct mt_rng rng;
  void *owned[MAX_OWNED];
  int owned_count, leaf_count, output_count;
  struct leaf leaf[MAX_LEAVES];
  struct output output[MAX_OUTPUTS];
  int calls[OP_COUNT];
  enum op_id bug_op; /* OP_COUNT: none */
  void (*bug)(void *args);
  double worst; /* of all cases since probe_open */
  char worst_name[64];
};

#define X(op)                                                                                      \
  static inline mt_err via_##op(struct mt_backend *be, const struct mt_##op##_args *a) {           \
    struct probe *p = be->impl;                                                                    \
    struct mt_##op##_args x = *a;                                                                  \
    p->calls[OP_##op]++;                                                                           \
    if (p->bug_op == OP_##op) p->bug(&x);                                                          \
    return p->ref.op(be, &x);                                                                      \
  }                                                                                                \
  static inline void apply_##op(struct probe *p, void *a) {                                        \
    OK(p->be.ops.op(&p->be, a));                                                                   \
  }
MT_OP_LIST(X)
#undef X

static inline void probe_open(struct probe *p, uint64_t seed) {
  *p = (struct probe){.bug_op = OP_COUNT, .rng = mt_rng_make(seed, 5)};
  OK(mt_backend_create(&p->be, "ref", 1));
  p->ref = p->be.ops;
#define X(op) p->be.ops.op = via_##op;
  MT_OP_LIST(X)
#undef X
  p->be.impl = p;
}

/* Ends a case, keeping the counts and the worst error. */
static inline void probe_clear(struct probe *p) {
  for (int i = 0; i < p->owned_count; i++) free(p->owned[i]);
  p->owned_count = p->leaf_count = p->output_count = 0;
}

static inline void *own(struct probe *p, size_t bytes) {
  void *m = calloc(1, bytes ? bytes : 1);
  assert_non_null(m);
  assert_true(p->owned_count < MAX_OWNED);
  return p->owned[p->owned_count++] = m;
}

/* Element n of a tensor, counted without the gaps between rows. */
static inline double *at(const struct mt_tensor *t, int64_t n) {
  int64_t cols = t->dim[t->rank - 1];
  return (double *)t->data + n / cols * t->ld + n % cols;
}

/* 'r' random, 'n' NaN, 'z' zero. */
static inline void fill(struct probe *p, const struct mt_tensor *t, char mode) {
  for (int64_t i = 0; i < mt_count(t); i++) {
    *at(t, i) = mode == 'r' ? mt_rng_normal(&p->rng) : mode == 'n' ? NAN : 0;
  }
}

static inline struct mt_tensor vec(struct probe *p, char mode, int64_t n) {
  struct mt_tensor t = mt_vec(own(p, (size_t)n * sizeof(double)), MT_F64, n);
  fill(p, &t, mode);
  return t;
}

static inline struct mt_tensor mat(struct probe *p, char mode, int64_t rows, int64_t cols) {
  struct mt_tensor t = mt_mat(own(p, (size_t)(rows * cols) * sizeof(double)), MT_F64, rows, cols);
  fill(p, &t, mode);
  return t;
}

static inline struct mt_tensor cube(struct probe *p, char mode, int64_t n, int64_t rows,
                                    int64_t cols) {
  struct mt_tensor t =
      mt_cube(own(p, (size_t)(n * rows * cols) * sizeof(double)), MT_F64, n, rows, cols);
  fill(p, &t, mode);
  return t;
}

/* A column slice of a wider matrix, whose other columns hold NaN. */
static inline struct mt_tensor sliced(struct probe *p, char mode, int64_t rows, int64_t cols) {
  struct mt_tensor wide = mat(p, 'n', rows, cols + 3), t = mt_cols(&wide, 2, cols);
  fill(p, &t, mode);
  return t;
}

static inline void copy(const struct mt_tensor *to, const struct mt_tensor *from) {
  assert_true(mt_count(to) == mt_count(from));
  for (int64_t i = 0; i < mt_count(to); i++) *at(to, i) = *at(from, i);
}

static inline void zero_rows_from(const struct mt_tensor *t, int64_t row) {
  for (int64_t i = row * t->dim[1]; i < mt_count(t); i++) *at(t, i) = 0;
}

/* g as the backward will find it: what it holds now is taken off again when accumulated. */
static inline void leaf(struct probe *p, const char *name, struct mt_tensor x, struct mt_tensor g,
                        int accumulated) {
  assert_true(p->leaf_count < MAX_LEAVES && mt_count(&x) == mt_count(&g));
  struct leaf *l = &p->leaf[p->leaf_count++];
  *l = (struct leaf){.name = name, .x = x, .g = g};
  if (!accumulated) return;
  l->base = own(p, (size_t)mt_count(&g) * sizeof(double));
  for (int64_t i = 0; i < mt_count(&g); i++) l->base[i] = *at(&g, i);
}

/* c: the cotangent, same shape as y; kept by value. */
static inline void output(struct probe *p, struct mt_tensor y, struct mt_tensor c) {
  assert_true(p->output_count < MAX_OUTPUTS && mt_count(&y) == mt_count(&c));
  struct output *o = &p->output[p->output_count++];
  size_t bytes = (size_t)mt_count(&y) * sizeof(double);
  *o = (struct output){.y = y, .c = own(p, bytes), .side = own(p, bytes)};
  for (int64_t i = 0; i < mt_count(&y); i++) o->c[i] = *at(&c, i);
}

/* The derivative of sum c*out by one element. */
static inline double difference(struct probe *p, double *x, void (*forward)(struct probe *, void *),
                                void *args) {
  const double h = 1e-5, was = *x;
  double sum = 0;
  *x = was + h;
  forward(p, args);
  for (int o = 0; o < p->output_count; o++) {
    const struct output *out = &p->output[o];
    for (int64_t i = 0; i < mt_count(&out->y); i++) out->side[i] = *at(&out->y, i);
  }
  *x = was - h;
  forward(p, args);
  for (int o = 0; o < p->output_count; o++) {
    const struct output *out = &p->output[o];
    for (int64_t i = 0; i < mt_count(&out->y); i++) {
      /* Rows that nothing reads may hold anything, NaN included. */
      if (out->c[i] != 0) sum += out->c[i] * (out->side[i] - *at(&out->y, i));
    }
  }
  *x = was;
  return sum / (2 * h);
}

/* Keeps the worst of max|difference - gradient| / (max|gradient| + 0.01); the small constant is for
 * gradients that are zero by nature. */
static inline void differences(struct probe *p, const char *name,
                               void (*forward)(struct probe *, void *), void *args) {
  for (int n = 0; n < p->leaf_count; n++) {
    const struct leaf *l = &p->leaf[n];
    double top = 0, error = 0;
    for (int64_t i = 0; i < mt_count(&l->x); i++) {
      double g = *at(&l->g, i) - (l->base ? l->base[i] : 0);
      double off = fabs(difference(p, at(&l->x, i), forward, args) - g);
      error = fmax(error, isnan(off) ? INFINITY : off);
      top = fmax(top, fabs(g));
    }
    error /= top + 0.01;
    if (error <= p->worst) continue;
    p->worst = error;
    snprintf(p->worst_name, sizeof p->worst_name, "%s, %s", name, l->name);
  }
  probe_clear(p);
}

#endif
