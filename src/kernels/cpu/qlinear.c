/* Products of 8-bit operands: one group after another is made bf16, exactly (down to 2^-133), and
 * multiplied as any other. */
#include "backend/dequant.h"
#include "backend/qstored.h"
#include "base/fp8.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"

size_t mt_cpu_qlinear_bytes(const struct mt_limits *l) {
  return mt_dequant_elements(l, 1) * sizeof(uint16_t);
}

/* Memory for a bf16 matrix from the shared scratch, after *used elements. */
static mt_err take(const struct mt_backend *be, const char *op, size_t *used, int64_t count,
                   uint16_t **out) {
  size_t floats, begin = (*used + 31) / 32 * 32;
  uint16_t *scratch = (uint16_t *)mt_cpu_shared_scratch(be, &floats);
  if (!be->workspace || begin + (size_t)count > 2 * floats)
    return mt_fail(MT_ESHAPE, "%s: no workspace for %lld elements", op, (long long)count);
  *out = scratch + begin;
  *used = begin + (size_t)count;
  return MT_OK;
}

static float scale_at(const struct mt_qstored *s, int64_t r, int64_t c) {
  int64_t at = mt_qstored_scale(s, 0, r, c);
  return s->fp8 ? ((const float *)s->scales)[at] : mt_e8m0_to_f32(((const uint8_t *)s->scales)[at]);
}

/* to (=) [rows, cols], rows one after another. */
static void restore(const struct mt_backend *be, const struct mt_qstored *s, uint16_t *to) {
  float value[256];
  for (int i = 0; i < 256; i++) value[i] = mt_e4m3_to_f32((uint8_t)i);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < s->rows; r++) {
    const uint8_t *e = s->e + r * s->ld;
    uint16_t *y = to + r * s->cols;
    for (int64_t c = 0; c < s->cols; c += s->wide) {
      float by = scale_at(s, r, c);
      int64_t end = c + s->wide < s->cols ? c + s->wide : s->cols;
      for (int64_t i = c; i < end; i++) y[i] = mt_f32_to_bf16(value[e[i]] * by);
    }
  }
}

static int64_t group_rows(const int32_t *offsets, int64_t rows, int64_t g, int64_t *begin) {
  *begin = offsets ? offsets[g] : 0;
  return (offsets ? offsets[g + 1] : rows) - *begin;
}

static void *row_at(const struct mt_tensor *t, int64_t row) {
  return (char *)t->data + (size_t)(row * t->ld) * mt_dtype_bytes(t->dtype);
}

mt_err mt_cpu_qlinear_fwd(struct mt_backend *be, const struct mt_qlinear_fwd_args *a) {
  const char *op = "qlinear_fwd";
  MT_TRY(mt_check_qlinear_fwd(a));
  MT_TRY(mt_cpu_format(op, &a->y));
  int64_t n = a->y.dim[1], k = a->x.dim[1];
  for (int64_t g = 0; g < (a->offsets ? a->w.dim[0] : 1); g++) {
    struct mt_qtensor q = a->offsets ? mt_q_slice(&a->w, g) : a->w;
    uint16_t *x = NULL, *w = NULL;
    size_t used = 0;
    int64_t begin, rows = group_rows(a->offsets, a->x.dim[0], g, &begin);
    if (rows == 0) continue;
    MT_TRY(take(be, op, &used, rows * k, &x));
    MT_TRY(take(be, op, &used, n * k, &w));
    struct mt_qstored sx = mt_qstored_rows(&a->x, begin, rows), sw = mt_qstored_rows(&q, 0, n);
    restore(be, &sx, x);
    restore(be, &sw, w);
    mt_cpu_products(be,
                    &(struct cpu_product){.a = {x, MT_BF16, k, 1},
                                          .b = {w, MT_BF16, 1, k},
                                          .c = {row_at(&a->y, begin), a->y.dtype, a->y.ld, 0},
                                          .i_count = rows,
                                          .j_count = n,
                                          .k_count = k},
                    1);
  }
  return MT_OK;
}

mt_err mt_cpu_qlinear_dgrad(struct mt_backend *be, const struct mt_qlinear_dgrad_args *a) {
  const char *op = "qlinear_dgrad";
  MT_TRY(mt_check_qlinear_dgrad(a));
  MT_TRY(mt_cpu_format(op, &a->dx));
  int64_t n = a->dy.dim[1], k = a->dx.dim[1];
  for (int64_t g = 0; g < (a->offsets ? a->w.dim[0] : 1); g++) {
    struct mt_qtensor q = a->offsets ? mt_q_slice(&a->w, g) : a->w;
    uint16_t *dy = NULL, *w = NULL;
    size_t used = 0;
    int64_t begin, rows = group_rows(a->offsets, a->dy.dim[0], g, &begin);
    if (rows == 0) continue;
    MT_TRY(take(be, op, &used, rows * n, &dy));
    MT_TRY(take(be, op, &used, n * k, &w));
    struct mt_qstored sy = mt_qstored_rows(&a->dy, begin, rows), sw = mt_qstored_cols(&q, 0, n);
    restore(be, &sy, dy);
    restore(be, &sw, w);
    mt_cpu_products(
        be,
        &(struct cpu_product){.a = {dy, MT_BF16, n, 1},
                              .b = {w, MT_BF16, sw.turned ? 1 : k, sw.turned ? n : 1},
                              .c = {row_at(&a->dx, begin), a->dx.dtype, a->dx.ld, a->accumulate},
                              .i_count = rows,
                              .j_count = k,
                              .k_count = n},
        1);
  }
  return MT_OK;
}

mt_err mt_cpu_qlinear_wgrad(struct mt_backend *be, const struct mt_qlinear_wgrad_args *a) {
  const char *op = "qlinear_wgrad";
  MT_TRY(mt_check_qlinear_wgrad(a));
  MT_TRY(mt_cpu_format(op, &a->dw));
  int64_t n = a->dy.dim[1], k = a->x.dim[1];
  bool turned = a->x.format == MT_Q_FP8; /* both are stored with their rows along the tokens */
  for (int64_t g = 0; g < (a->offsets ? a->dw.dim[0] : 1); g++) {
    struct mt_tensor dw = a->offsets ? mt_slice(&a->dw, g) : a->dw;
    uint16_t *dy = NULL, *x = NULL;
    size_t used = 0;
    int64_t begin, rows = group_rows(a->offsets, a->x.dim[0], g, &begin);
    if (rows == 0 && a->accumulate) continue;
    MT_TRY(take(be, op, &used, rows * n, &dy));
    MT_TRY(take(be, op, &used, rows * k, &x));
    int64_t at = a->offsets ? a->padded[g] : 0;
    struct mt_qstored sy = mt_qstored_cols(&a->dy, at, rows), sx = mt_qstored_cols(&a->x, at, rows);
    restore(be, &sy, dy);
    restore(be, &sx, x);
    mt_cpu_products(be,
                    &(struct cpu_product){.a = {dy, MT_BF16, turned ? rows : 1, turned ? 1 : n},
                                          .b = {x, MT_BF16, turned ? 1 : k, turned ? rows : 1},
                                          .c = {dw.data, dw.dtype, dw.ld, a->accumulate},
                                          .i_count = n,
                                          .j_count = k,
                                          .k_count = rows},
                    1);
  }
  if (!a->sumsq) return MT_OK;
  struct mt_tensor flat = mt_vec(a->dw.data, a->dw.dtype, mt_count(&a->dw));
  return mt_cpu_sumsq(
      be, &(struct mt_sumsq_args){.tensors = &flat, .tensor_count = 1, .out = a->sumsq});
}
