/* What cuBLASLt is asked for MXFP8 products on Blackwell, as far as that goes without one: each
 * description is read back from the library and carried out on the host, as its documentation says
 * it would be, and must give the reference's product: operands, leading dimensions, transpositions,
 * the copies that are read, scale modes, where each group's scales begin and in what order they
 * lie. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fp8.h"
#include "base/mxscale.h"
#include "base/rng.h"
#include "kernels/registry.h"
#include "quant/linear.h"

#ifdef MOETUNE_WITH_CUDA
#include "kernels/cuda/mxproducts.cuh"
#include "ok.h"

#define LT(call) assert_int_equal((call), CUBLAS_STATUS_SUCCESS)

enum { MOST = 4 };
static const struct shape {
  int groups, rows[MOST]; /* groups 0: dense, of rows[0] */
  int n, k;
} shapes[] = {
    {0, {128}, 128, 128},
    {0, {77}, 160, 96},
    {0, {1}, 32, 352},
    {3, {0, 21, 150}, 96, 64},
    {4, {129, 0, 1, 40}, 160, 224},
    {4, {0, 0, 200, 0}, 64, 32},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* A shape's numbers in float64 and their 8-bit forms, on ref. */
struct bench {
  struct mt_backend be;
  const struct shape *s;
  int32_t offsets[MOST + 1], padded[MOST + 1];
  int64_t rows;
  struct mt_qtensor x, dy, w;
  void *owned[64];
  int owned_count;
};

static void *take(struct bench *b, size_t bytes) {
  void *p = aligned_alloc(256, (bytes + 256) / 256 * 256);
  assert_non_null(p);
  memset(p, 0x7f, bytes);
  return b->owned[b->owned_count++] = p;
}

/* Numbers whose blocks have scales of their own, either way. */
static double *numbers(struct bench *b, struct mt_rng *rng, int64_t rows, int64_t cols) {
  double *v = take(b, (size_t)(rows * cols) * sizeof *v);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++)
      v[r * cols + c] = ldexp(mt_rng_normal(rng), (int)((r / 16 * 5 + c / 16 * 3) % 7) - 3);
  return v;
}

static struct mt_qtensor rows_of(struct bench *b, struct mt_rng *rng, int64_t cols) {
  struct mt_row_groups g = {.count = b->s->groups, .offsets = b->offsets, .padded = b->padded};
  if (!b->s->groups) g = (struct mt_row_groups){.count = 1};
  struct mt_operand o = {.format = MT_Q_MXFP8};
  o.memory = take(b, mt_operand_bytes(MT_Q_MXFP8, b->rows, cols, g.count, MT_SIDE_BOTH));
  struct mt_tensor x = mt_mat(numbers(b, rng, b->rows, cols), MT_F64, b->rows, cols);
  OK(mt_operand_make(&b->be, &o, x, b->rows, MT_SIDE_BOTH, &g));
  return o.q;
}

static void open_bench(struct bench *b, const struct shape *s) {
  struct mt_rng rng = mt_rng_make(3, (uint64_t)(s - shapes));
  memset(b, 0, sizeof *b);
  b->s = s;
  b->rows = s->rows[0];
  OK(mt_backend_ref_create(&b->be));
  if (s->groups) {
    for (int g = 0; g < s->groups; g++) b->offsets[g + 1] = b->offsets[g] + s->rows[g];
    b->rows = b->offsets[s->groups] + 30; /* room for more than there are */
    OK(b->be.ops.pad_offsets(&b->be,
                             &(struct mt_pad_offsets_args){b->offsets, s->groups, b->padded}));
  }
  b->x = rows_of(b, &rng, s->k);
  b->dy = rows_of(b, &rng, s->n);
  int64_t dim[3] = {s->groups ? s->groups : s->n, s->groups ? s->n : s->k, s->k};
  int rank = s->groups ? 3 : 2;
  int64_t matrices = s->groups ? s->groups : 1;
  double *w = numbers(b, &rng, matrices * s->n, s->k);
  mt_qweight_shape(&b->w, MT_Q_MXFP8, rank, dim, MT_SIDE_BOTH,
                   take(b, mt_qweight_bytes(MT_Q_MXFP8, rank, dim, MT_SIDE_BOTH)));
  struct mt_quantize_weight_args a = {.w = rank == 3 ? mt_cube(w, MT_F64, dim[0], s->n, s->k)
                                                     : mt_mat(w, MT_F64, s->n, s->k),
                                      .q = b->w};
  OK(b->be.ops.quantize_weight(&b->be, &a));
}

static void close_bench(struct bench *b) {
  for (int i = 0; i < b->owned_count; i++) free(b->owned[i]);
  mt_backend_destroy(&b->be);
}

static const int32_t *offsets_of(const struct bench *b) {
  return b->s->groups ? b->offsets : NULL;
}
static const int32_t *padded_of(const struct bench *b) {
  return b->s->groups ? b->padded : NULL;
}

/* The result's shape: [rows or matrices, wide], and its tensor in memory of a format. */
static struct mt_tensor result(const struct bench *b, enum mt_cuda_mx_kind kind, void *data,
                               enum mt_dtype dtype) {
  const struct shape *s = b->s;
  if (kind == MX_FWD) return mt_mat(data, dtype, b->rows, s->n);
  if (kind == MX_DGRAD) return mt_mat(data, dtype, b->rows, s->k);
  return s->groups ? mt_cube(data, dtype, s->groups, s->n, s->k) : mt_mat(data, dtype, s->n, s->k);
}

static bool job_of(const struct bench *b, enum mt_cuda_mx_kind kind, struct mt_tensor c,
                   int accumulate, struct mt_cuda_mx_job *j) {
  const int32_t *offsets = offsets_of(b);
  if (kind == MX_FWD)
    return mt_cuda_mx_fwd_job(
        &(struct mt_qlinear_fwd_args){.x = b->x, .w = b->w, .y = c, .offsets = offsets}, j);
  if (kind == MX_DGRAD)
    return mt_cuda_mx_dgrad_job(
        &(struct mt_qlinear_dgrad_args){
            .dy = b->dy, .w = b->w, .dx = c, .offsets = offsets, .accumulate = accumulate},
        j);
  return mt_cuda_mx_wgrad_job(&(struct mt_qlinear_wgrad_args){.dy = b->dy,
                                                              .x = b->x,
                                                              .dw = c,
                                                              .offsets = offsets,
                                                              .padded = padded_of(b),
                                                              .accumulate = accumulate},
                              j);
}

static void reference(struct bench *b, enum mt_cuda_mx_kind kind, struct mt_tensor c) {
  const int32_t *offsets = offsets_of(b);
  struct mt_ops *ops = &b->be.ops;
  if (kind == MX_FWD)
    OK(ops->qlinear_fwd(
        &b->be, &(struct mt_qlinear_fwd_args){.x = b->x, .w = b->w, .y = c, .offsets = offsets}));
  if (kind == MX_DGRAD)
    OK(ops->qlinear_dgrad(&b->be, &(struct mt_qlinear_dgrad_args){
                                      .dy = b->dy, .w = b->w, .dx = c, .offsets = offsets}));
  if (kind == MX_WGRAD)
    OK(ops->qlinear_wgrad(
        &b->be, &(struct mt_qlinear_wgrad_args){
                    .dy = b->dy, .x = b->x, .dw = c, .offsets = offsets, .padded = padded_of(b)}));
}

static uint8_t *ordered(struct bench *b, struct mt_mx_scales *s) {
  int64_t tall = mt_mx_tiles_tall(s), wide = mt_mx_tiles_wide(s), bytes = mt_mx_scales_bytes(s);
  uint8_t *to = take(b, (size_t)bytes);
  if (s->offsets) s->padded = b->padded;
  for (int64_t i = 0; i < s->matrices * tall * wide; i++) {
    struct mt_mx_tile t = mt_mx_tile_of(s, i / wide / tall, i / wide % tall, i % wide);
    for (int w = 0; t.at >= 0 && w < 128; w++) {
      uint32_t word = mt_mx_tile_word(s, &t, w);
      memcpy(to + t.at + w * 4, &word, 4);
    }
  }
  return to;
}

/* An operand as the library would read it from its description. */
struct lt_operand {
  const uint8_t *e, *scale;
  int64_t outer, depth, ld;
  bool turned;
};

static uint64_t layout_attribute(const cublasLtMatrixLayoutOpaque_t *layout,
                                 cublasLtMatrixLayoutAttribute_t name, size_t bytes) {
  uint64_t value = 0;
  size_t written = 0;
  LT(cublasLtMatrixLayoutGetAttribute((cublasLtMatrixLayout_t)layout, name, &value, bytes,
                                      &written));
  assert_int_equal(written, bytes);
  return value;
}

static uint64_t attribute(const struct mt_cuda_mx_lt *s, cublasLtMatmulDescAttributes_t name,
                          size_t bytes) {
  uint64_t value = 0;
  size_t written = 0;
  LT(cublasLtMatmulDescGetAttribute((cublasLtMatmulDesc_t)&s->op, name, &value, bytes, &written));
  assert_int_equal(written, bytes);
  return value;
}

static struct lt_operand operand(const struct mt_cuda_mx_lt *s, bool first, const uint8_t *e) {
  const cublasLtMatrixLayoutOpaque_t *layout = first ? &s->b : &s->a;
  uint64_t op = attribute(s, first ? CUBLASLT_MATMUL_DESC_TRANSA : CUBLASLT_MATMUL_DESC_TRANSB, 4);
  uint64_t mode = attribute(
      s, first ? CUBLASLT_MATMUL_DESC_A_SCALE_MODE : CUBLASLT_MATMUL_DESC_B_SCALE_MODE, 4);
  uint64_t scale = attribute(
      s, first ? CUBLASLT_MATMUL_DESC_A_SCALE_POINTER : CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, 8);
  int64_t rows = (int64_t)layout_attribute(layout, CUBLASLT_MATRIX_LAYOUT_ROWS, 8);
  int64_t cols = (int64_t)layout_attribute(layout, CUBLASLT_MATRIX_LAYOUT_COLS, 8);
  int64_t ld = (int64_t)layout_attribute(layout, CUBLASLT_MATRIX_LAYOUT_LD, 8);
  assert_int_equal(layout_attribute(layout, CUBLASLT_MATRIX_LAYOUT_TYPE, 4), CUDA_R_8F_E4M3);
  assert_int_equal(layout_attribute(layout, CUBLASLT_MATRIX_LAYOUT_ORDER, 4), CUBLASLT_ORDER_COL);
  assert_int_equal(mode, CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0);
  assert_true(ld >= rows && ld % 16 == 0 && (uintptr_t)e % 16 == 0 && scale % 16 == 0);
  bool turned = op == CUBLAS_OP_T;
  /* The first's rows (of op) are outer, the second's columns. */
  return (struct lt_operand){.e = e,
                             .scale = (const uint8_t *)(uintptr_t)scale,
                             .outer = turned == first ? cols : rows,
                             .depth = turned == first ? rows : cols,
                             .ld = ld,
                             .turned = turned};
}

/* Column-major storage; along: op's contracted index runs down a column. */
static double lt_value(const struct lt_operand *o, bool first, int64_t i, int64_t d) {
  bool along = o->turned == first;
  uint8_t e = o->e[along ? i * o->ld + d : d * o->ld + i];
  uint8_t scale = o->scale[mt_mx_scale_index(i, d / 32, (o->depth + 31) / 32)];
  return (double)mt_e4m3_to_f32(e) * (double)mt_e8m0_to_f32(scale);
}

/* Adds nothing up where the job would not; to: the whole result in float64. */
static void carry_out(const struct mt_cuda_mx_product *p, const struct mt_cuda_mx_job *j,
                      double *to) {
  struct mt_cuda_mx_lt s;
  size_t item = mt_dtype_bytes(j->c_dtype);
  LT(mt_cuda_mx_describe(p, &s));
  struct lt_operand a = operand(&s, true, p->b), b = operand(&s, false, p->a);
  int64_t rows = (int64_t)layout_attribute(&s.c, CUBLASLT_MATRIX_LAYOUT_ROWS, 8);
  int64_t cols = (int64_t)layout_attribute(&s.c, CUBLASLT_MATRIX_LAYOUT_COLS, 8);
  int64_t ld = (int64_t)layout_attribute(&s.c, CUBLASLT_MATRIX_LAYOUT_LD, 8);
  assert_int_equal(layout_attribute(&s.c, CUBLASLT_MATRIX_LAYOUT_TYPE, 4),
                   j->c_dtype == MT_F32 ? CUDA_R_32F : CUDA_R_16BF);
  assert_int_equal(attribute(&s, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, 4), CUBLAS_COMPUTE_32F);
  assert_int_equal(attribute(&s, CUBLASLT_MATMUL_DESC_SCALE_TYPE, 4), CUDA_R_32F);
  assert_true(a.outer == rows && b.outer == cols && a.depth == b.depth && ld >= rows);
  assert_int_equal((uintptr_t)p->c % 16, 0);
  int64_t first = ((char *)p->c - (char *)j->c) / (int64_t)item;
  for (int64_t c = 0; c < cols; c++) {
    for (int64_t r = 0; r < rows; r++) {
      double sum = 0;
      for (int64_t d = 0; d < a.depth; d++)
        sum += lt_value(&a, true, r, d) * lt_value(&b, false, c, d);
      to[first + c * ld + r] = sum;
    }
  }
}

/* plant: one operand's scales are those of the group before. */
static double worst_error(struct bench *b, enum mt_cuda_mx_kind kind, bool plant) {
  enum mt_dtype dtype = kind == MX_WGRAD ? MT_F32 : MT_BF16;
  struct mt_tensor shape = result(b, kind, NULL, MT_F64);
  int64_t n = mt_count(&shape);
  double *want = take(b, (size_t)n * sizeof *want), *got = take(b, (size_t)n * sizeof *got);
  void *c = take(b, (size_t)n * 4);
  for (int64_t i = 0; i < n; i++) want[i] = got[i] = NAN;
  reference(b, kind, result(b, kind, want, MT_F64));
  struct mt_cuda_mx_job j;
  assert_true(job_of(b, kind, result(b, kind, c, dtype), 0, &j));
  uint8_t *a_scale = ordered(b, &j.a_scales), *b_scale = ordered(b, &j.b_scales);
  for (int g = 0; g < (j.groups ? j.groups : 1); g++) {
    struct mt_cuda_mx_product p = mt_cuda_mx_product_of(&j, g, offsets_of(b), a_scale, b_scale);
    if (plant) p.a_scale = a_scale + (p.a_scale == a_scale ? 16 : 0);
    if (p.k == 0) /* never the library's: a group without rows has the gradient 0 */
      for (int64_t i = 0; i < p.m * p.n; i++) got[g * p.m * p.n + i] = 0;
    else if (p.m > 0)
      carry_out(&p, &j, got);
  }
  double worst = 0, top = 0;
  for (int64_t i = 0; i < n; i++) {
    if (isnan(want[i]) && isnan(got[i])) continue; /* rows of no group */
    top = fmax(top, fabs(want[i]));
    double d = fabs(want[i] - got[i]);
    worst = isnan(d) ? INFINITY : fmax(worst, d);
  }
  return worst / top;
}

static void descriptions_give_the_references_products(void **state) {
  (void)state;
  for (int i = 0; i < SHAPES; i++) {
    for (int kind = MX_FWD; kind <= MX_WGRAD; kind++) {
      struct bench b;
      open_bench(&b, &shapes[i]);
      double error = worst_error(&b, (enum mt_cuda_mx_kind)kind, false);
      double planted = worst_error(&b, (enum mt_cuda_mx_kind)kind, true);
      if (!(error < 1e-12)) fail_msg("shape %d, product %d: off by %.3g", i, kind, error);
      if (b.rows > 1 && !(planted > 1e-3))
        fail_msg("shape %d, product %d: wrong scales are not seen", i, kind);
      close_bench(&b);
    }
  }
}

static void what_is_not_taken(void **state) {
  (void)state;
  struct bench b;
  struct mt_cuda_mx_job j;
  open_bench(&b, &shapes[0]);
  void *c = take(&b, 128 * 128 * 4);
  struct mt_tensor bf16 = result(&b, MX_DGRAD, c, MT_BF16), f32 = result(&b, MX_WGRAD, c, MT_F32);
  assert_true(job_of(&b, MX_DGRAD, bf16, 0, &j));
  assert_false(job_of(&b, MX_DGRAD, bf16, 1, &j)); /* rounded twice */
  assert_true(job_of(&b, MX_WGRAD, f32, 1, &j) && j.accumulate);
  assert_false(job_of(&b, MX_FWD, result(&b, MX_FWD, c, MT_F32), 0, &j));
  struct mt_tensor odd = bf16;
  odd.data = (char *)c + 2;
  assert_false(job_of(&b, MX_DGRAD, odd, 0, &j));
  b.x.format = MT_Q_FP8;
  assert_false(job_of(&b, MX_FWD, bf16, 0, &j));
  close_bench(&b);
}

/* What is set aside for scales holds those of every product within the limits. */
static void scales_have_room(void **state) {
  (void)state;
  struct mt_limits l = {.tokens = 200,
                        .rows = 400,
                        .hidden = 96,
                        .ffn = 160,
                        .experts = 5,
                        .top_k = 2,
                        .heads = 4,
                        .kv_heads = 2,
                        .head_dim = 32,
                        .act = MT_BF16,
                        .qformat = MT_Q_MXFP8};
  const int64_t wide[][3] = {{5, 320, 96}, {5, 96, 160}, {0, 256, 96}, {0, 96, 128}};
  size_t most = mt_cuda_mx_bytes(&l);
  static char nothing[256] __attribute__((aligned(256)));
  for (int i = 0; i < 4; i++) {
    int64_t groups = wide[i][0], rows = groups ? l.rows : l.tokens, n = wide[i][1], k = wide[i][2];
    struct bench b = {.s = &(struct shape){(int)groups, {0}, (int)n, (int)k}, .rows = rows};
    int64_t dim[3] = {groups ? groups : n, groups ? n : k, k};
    mt_qweight_shape(&b.w, MT_Q_MXFP8, groups ? 3 : 2, dim, MT_SIDE_BOTH, nothing);
    struct mt_operand o = {.format = MT_Q_MXFP8, .memory = nothing};
    struct mt_row_groups g = {.count = groups ? (int)groups : 1};
    mt_operand_shape(&o, rows, k, MT_SIDE_BOTH, &g);
    b.x = o.q;
    mt_operand_shape(&o, rows, n, MT_SIDE_BOTH, &g);
    b.dy = o.q;
    for (int kind = MX_FWD; kind <= MX_WGRAD; kind++) {
      struct mt_cuda_mx_job j;
      enum mt_dtype dtype = kind == MX_WGRAD ? MT_F32 : MT_BF16;
      struct mt_tensor c = result(&b, (enum mt_cuda_mx_kind)kind, nothing, dtype);
      assert_true(job_of(&b, (enum mt_cuda_mx_kind)kind, c, 0, &j));
      size_t need = (size_t)(mt_mx_scales_bytes(&j.a_scales) + mt_mx_scales_bytes(&j.b_scales));
      assert_true(need + (size_t)(groups + 1) * 4 <= most);
    }
  }
  l.qformat = MT_Q_FP8;
  assert_int_equal(mt_cuda_mx_bytes(&l), 0);
}

/* The library itself answers only where there is a GPU that it knows. */
static void the_library_has_an_algorithm(void **state) {
  (void)state;
  struct bench b;
  struct mt_backend be;
  if (mt_cuda_device_count() == 0) {
    print_message("  not asked: no GPU is visible\n");
    skip();
  }
  OK(mt_backend_create(&be, "cuda", 1));
  if (!mt_cuda_mx_chip(&be)) {
    print_message("  not asked: %s is no Blackwell\n", be.description);
    mt_backend_destroy(&be);
    skip();
  }
  open_bench(&b, &shapes[0]);
  for (int kind = MX_FWD; kind <= MX_WGRAD; kind++) {
    struct mt_cuda_mx_job j;
    struct mt_cuda_mx_lt s;
    cublasLtMatmulHeuristicResult_t found;
    cublasLtMatmulPreferenceOpaque_t wish;
    int count = 0;
    enum mt_dtype dtype = kind == MX_WGRAD ? MT_F32 : MT_BF16;
    struct mt_tensor c = result(&b, (enum mt_cuda_mx_kind)kind, take(&b, 128 * 128 * 4), dtype);
    assert_true(job_of(&b, (enum mt_cuda_mx_kind)kind, c, 0, &j));
    struct mt_cuda_mx_product p =
        mt_cuda_mx_product_of(&j, 0, NULL, ordered(&b, &j.a_scales), ordered(&b, &j.b_scales));
    LT(mt_cuda_mx_describe(&p, &s));
    LT(cublasLtMatmulPreferenceInit(&wish));
    LT(cublasLtMatmulAlgoGetHeuristic(mt_cuda_of(&be)->lt, &s.op, &s.b, &s.a, &s.c, &s.c, &wish, 1,
                                      &found, &count));
    assert_int_equal(count, 1);
  }
  close_bench(&b);
  mt_backend_destroy(&be);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(descriptions_give_the_references_products),
      cmocka_unit_test(what_is_not_taken),
      cmocka_unit_test(scales_have_room),
      cmocka_unit_test(the_library_has_an_algorithm),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}

#else

int main(void) {
  printf("skipped: this build has no CUDA\n");
  return 77;
}

#endif
