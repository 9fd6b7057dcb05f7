/* The CPU backend's packed products against plain sums in double: every layout and format, sizes
 * around each block's edge, poisoned results, and bits that do not depend on the threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
#include "kernels/registry.h"

struct matrix {
  void *data;
  enum mt_dtype dtype;
  int64_t rows, cols, ld;
};

static double get(const struct matrix *m, int64_t r, int64_t c) {
  int64_t at = r * m->ld + c;
  return m->dtype == MT_F32 ? (double)((float *)m->data)[at]
                            : (double)mt_bf16_to_f32(((uint16_t *)m->data)[at]);
}

/* Random, or NaN everywhere; the gap between rows is NaN always. */
static struct matrix matrix(struct mt_rng *rng, enum mt_dtype dtype, int64_t rows, int64_t cols,
                            int64_t gap, bool poison) {
  struct matrix m = {NULL, dtype, rows, cols, cols + gap};
  m.data = malloc((size_t)(rows * m.ld + 1) * mt_dtype_bytes(dtype));
  assert_non_null(m.data);
  for (int64_t i = 0; i < rows * m.ld; i++) {
    float x = poison || i % m.ld >= cols ? NAN : (float)mt_rng_normal(rng);
    if (dtype == MT_F32)
      ((float *)m.data)[i] = x;
    else
      ((uint16_t *)m.data)[i] = mt_f32_to_bf16(x);
  }
  return m;
}

static struct matrix copy_of(const struct matrix *m) {
  struct matrix c = *m;
  size_t bytes = (size_t)(m->rows * m->ld) * mt_dtype_bytes(m->dtype);
  c.data = malloc(bytes + 1);
  assert_non_null(c.data);
  memcpy(c.data, m->data, bytes);
  return c;
}

static void open_backend(struct mt_backend *be, int threads) {
  assert_int_equal(mt_backend_cpu_create(be, threads), MT_OK);
  struct mt_limits limits = {.tokens = 1, .hidden = 1, .vocab = 1, .experts = 1};
  be->workspace_size_bytes = be->workspace_bytes(be, &limits);
  assert_int_equal(be->mem_alloc(be, be->workspace_size_bytes, &be->workspace), MT_OK);
}

static void close_backend(struct mt_backend *be) {
  be->mem_free(be, be->workspace, be->workspace_size_bytes);
  mt_backend_destroy(be);
}

struct layout {
  bool columns;    /* a is [k,i] */
  bool transposed; /* b is [j,k] */
  enum mt_dtype in, out;
  int accumulate;
};

static double element(const struct layout *l, const struct matrix *a, const struct matrix *b,
                      int64_t i, int64_t j, int64_t k) {
  return (l->columns ? get(a, k, i) : get(a, i, k)) * (l->transposed ? get(b, j, k) : get(b, k, j));
}

static void check(const struct layout *l, int64_t ni, int64_t nj, int64_t nk, int64_t gap) {
  struct mt_rng rng = mt_rng_make((uint64_t)(ni * 31 + nj * 7 + nk), 1);
  struct matrix a = l->columns ? matrix(&rng, l->in, nk, ni, gap, false)
                               : matrix(&rng, l->in, ni, nk, gap, false);
  struct matrix b = l->transposed ? matrix(&rng, l->in, nj, nk, gap, false)
                                  : matrix(&rng, l->in, nk, nj, gap, false);
  struct matrix start = matrix(&rng, l->out, ni, nj, gap, !l->accumulate), c[2];
  struct cpu_product p = {.a = {a.data, l->in, l->columns ? 1 : a.ld, l->columns ? a.ld : 1},
                          .b = {b.data, l->in, l->transposed ? 1 : b.ld, l->transposed ? b.ld : 1},
                          .i_count = ni,
                          .j_count = nj,
                          .k_count = nk};
  for (int n = 0; n < 2; n++) {
    struct mt_backend be;
    c[n] = copy_of(&start);
    open_backend(&be, n ? 3 : 1);
    p.c = (struct cpu_result){c[n].data, l->out, c[n].ld, l->accumulate};
    mt_cpu_products(&be, &p, 1);
    close_backend(&be);
  }
  size_t bytes = (size_t)(ni * start.ld) * mt_dtype_bytes(l->out);
  assert_memory_equal(c[0].data, c[1].data, bytes);
  double rounding = l->out == MT_F32 ? 2e-6 : 5e-3;
  /* All rows and columns of small products, a scattering of large ones. */
  int64_t step_i = ni > 40 ? 13 : 1, step_j = nj > 60 ? 11 : 1;
  for (int64_t i = 0; i < ni; i += step_i) {
    for (int64_t j = 0; j < nj; j += step_j) {
      double want = l->accumulate ? get(&start, i, j) : 0, size = fabs(want) + 1;
      for (int64_t k = 0; k < nk; k++) {
        double x = element(l, &a, &b, i, j, k);
        want += x;
        size += fabs(x);
      }
      double got = get(&c[0], i, j);
      if (!(fabs(got - want) <= rounding * size)) {
        fail_msg("%lld x %lld x %lld, columns %d, transposed %d: (%lld,%lld) %g, not %g",
                 (long long)ni, (long long)nj, (long long)nk, l->columns, l->transposed,
                 (long long)i, (long long)j, got, want);
      }
    }
    /* The gap between rows is nobody's. */
    for (int64_t j = nj; j < start.ld; j++) assert_true(isnan(get(&c[0], i, j)));
  }
  free(a.data), free(b.data), free(start.data), free(c[0].data), free(c[1].data);
}

static const int64_t sizes[][3] = {
    {1, 1, 1},    {3, 17, 0},    {8, 48, 16},    {9, 47, 31},      {4, 145, 33},
    {70, 96, 64}, {65, 100, 70}, {12, 289, 257}, {1030, 20, 18},   {20, 30, 1100},
    {5, 16, 513}, {64, 48, 512}, {33, 700, 40},  {200, 150, 1025},
};

static void all_layouts(void **state) {
  (void)state;
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    for (int n = 0; n < 32; n++) {
      struct layout l = {n & 1, n & 2, n & 4 ? MT_BF16 : MT_F32, n & 8 ? MT_BF16 : MT_F32,
                         n & 16 ? 1 : 0};
      check(&l, sizes[s][0], sizes[s][1], sizes[s][2], (int64_t)s % 3);
    }
  }
}

/* Rows a multiple of a page apart are copied rather than read in place. */
static void rows_of_whole_pages(void **state) {
  (void)state;
  struct layout l = {false, false, MT_F32, MT_F32, 0};
  check(&l, 37, 50, 1000, 24);
  check(&l, 37, 50, 1024, 0);
}

/* Many products of uneven size, some without rows. */
static void uneven_groups(void **state) {
  (void)state;
  enum { GROUPS = 9, IN = 70, OUT = 130 };
  const int64_t rows[GROUPS] = {0, 5, 1, 130, 0, 64, 8, 3, 0};
  struct mt_rng rng = mt_rng_make(4, 4);
  struct matrix x = matrix(&rng, MT_F32, 211, IN, 0, false);
  struct matrix w = matrix(&rng, MT_F32, GROUPS * OUT, IN, 0, false);
  struct matrix y = matrix(&rng, MT_F32, 211, OUT, 0, true);
  struct cpu_product p[GROUPS];
  struct mt_backend be;
  int64_t begin = 0;
  for (int g = 0; g < GROUPS; begin += rows[g++]) {
    p[g] = (struct cpu_product){.a = {(float *)x.data + begin * IN, MT_F32, IN, 1},
                                .b = {(float *)w.data + g * OUT * IN, MT_F32, 1, IN},
                                .c = {(float *)y.data + begin * OUT, MT_F32, OUT, 0},
                                .i_count = rows[g],
                                .j_count = OUT,
                                .k_count = IN};
  }
  open_backend(&be, 4);
  mt_cpu_products(&be, p, GROUPS);
  close_backend(&be);
  begin = 0;
  for (int g = 0; g < GROUPS; begin += rows[g++]) {
    for (int64_t i = begin; i < begin + rows[g]; i++) {
      for (int64_t o = 0; o < OUT; o++) {
        double want = 0;
        for (int64_t k = 0; k < IN; k++) want += get(&x, i, k) * get(&w, g * OUT + o, k);
        assert_true(fabs(get(&y, i, o) - want) < 1e-4);
      }
    }
  }
  free(x.data), free(w.data), free(y.data);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(all_layouts),
      cmocka_unit_test(rows_of_whole_pages),
      cmocka_unit_test(uneven_groups),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
