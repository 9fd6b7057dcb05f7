/* Linear layers: dense and grouped products as lists of independent products. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"

enum { MAX_GROUPS = MT_OPS_MAX_EXPERTS, FEW_ROWS = 4 };

static const void *at(const struct mt_tensor *t, int64_t row) {
  return (const char *)t->data + (size_t)(row * t->ld) * mt_dtype_bytes(t->dtype);
}

static int group_count(const struct mt_tensor *w) {
  return w->rank == 3 ? (int)w->dim[0] : 1;
}

static void group_rows(const int32_t *offsets, int64_t rows, int g, int64_t *begin, int64_t *n) {
  *begin = offsets ? offsets[g] : 0;
  *n = (offsets ? offsets[g + 1] : rows) - *begin;
}

static const void *group_weight(const struct mt_tensor *w, int g) {
  return w->rank == 3 ? mt_slice(w, g).data : w->data;
}

static mt_err ready(const struct mt_backend *be, const char *op, const struct mt_tensor *x,
                    const struct mt_tensor *w) {
  MT_TRY(mt_cpu_format(op, x));
  if (group_count(w) > MAX_GROUPS)
    return mt_fail(MT_EUNSUPPORTED, "%s: %d groups", op, group_count(w));
  if (!be->workspace) return mt_fail(MT_EINVAL, "%s: the cpu backend has no workspace", op);
  return MT_OK;
}

/* Few rows (decoding): each output is one dot product; the weights are streamed once. */
static void few_rows(const struct mt_backend *be, const struct mt_linear_fwd_args *a, int g,
                     int64_t begin, int64_t n) {
  int64_t out = a->y.dim[1], in = a->x.dim[1];
  struct mt_tensor w = a->w.rank == 3 ? mt_slice(&a->w, g) : a->w;
#pragma omp parallel num_threads(be->thread_count)
  {
    float wbuf[256], xbuf[256];
#pragma omp for schedule(static)
    for (int64_t o = 0; o < out; o++) {
      float sum[FEW_ROWS] = {0};
      for (int64_t k = 0; k < in; k += 256) {
        int64_t kc = in - k < 256 ? in - k : 256;
        struct mt_tensor wk = mt_cols(&w, k, kc), xk = mt_cols(&a->x, k, kc);
        const float *wr = cpu_read(&wk, o, kc, wbuf);
        for (int64_t r = 0; r < n; r++) {
          const float *xr = cpu_read(&xk, begin + r, kc, xbuf);
          float s = 0;
#pragma omp simd reduction(+ : s)
          for (int64_t i = 0; i < kc; i++) s += wr[i] * xr[i];
          sum[r] += s;
        }
      }
      for (int64_t r = 0; r < n; r++) {
        if (a->y.dtype == MT_F32)
          ((float *)a->y.data)[(begin + r) * a->y.ld + o] = sum[r];
        else
          ((uint16_t *)a->y.data)[(begin + r) * a->y.ld + o] = mt_f32_to_bf16(sum[r]);
      }
    }
  }
}

mt_err mt_cpu_linear_fwd(struct mt_backend *be, const struct mt_linear_fwd_args *a) {
  struct cpu_product p[MAX_GROUPS];
  int count = 0;
  MT_TRY(mt_check_linear_fwd(a));
  MT_TRY(ready(be, "linear_fwd", &a->x, &a->w));
  for (int g = 0; g < group_count(&a->w); g++) {
    int64_t begin, n;
    group_rows(a->offsets, a->x.dim[0], g, &begin, &n);
    if (n == 0) continue;
    if (n <= FEW_ROWS) {
      few_rows(be, a, g, begin, n);
      continue;
    }
    p[count++] =
        (struct cpu_product){.a = {at(&a->x, begin), a->x.dtype, a->x.ld, 1},
                             .b = {group_weight(&a->w, g), a->w.dtype, 1, a->w.ld},
                             .c = {(void *)(uintptr_t)at(&a->y, begin), a->y.dtype, a->y.ld, 0},
                             .i_count = n,
                             .j_count = a->y.dim[1],
                             .k_count = a->x.dim[1]};
  }
  mt_cpu_products(be, p, count);
  return MT_OK;
}

mt_err mt_cpu_linear_dgrad(struct mt_backend *be, const struct mt_linear_dgrad_args *a) {
  struct cpu_product p[MAX_GROUPS];
  int count = 0;
  MT_TRY(mt_check_linear_dgrad(a));
  MT_TRY(ready(be, "linear_dgrad", &a->dy, &a->w));
  for (int g = 0; g < group_count(&a->w); g++) {
    int64_t begin, n;
    group_rows(a->offsets, a->dy.dim[0], g, &begin, &n);
    if (n == 0) continue;
    p[count++] = (struct cpu_product){
        .a = {at(&a->dy, begin), a->dy.dtype, a->dy.ld, 1},
        .b = {group_weight(&a->w, g), a->w.dtype, a->w.ld, 1},
        .c = {(void *)(uintptr_t)at(&a->dx, begin), a->dx.dtype, a->dx.ld, a->accumulate},
        .i_count = n,
        .j_count = a->dx.dim[1],
        .k_count = a->dy.dim[1]};
  }
  mt_cpu_products(be, p, count);
  return MT_OK;
}

mt_err mt_cpu_linear_wgrad(struct mt_backend *be, const struct mt_linear_wgrad_args *a) {
  struct cpu_product p[MAX_GROUPS];
  int count = 0;
  MT_TRY(mt_check_linear_wgrad(a));
  MT_TRY(ready(be, "linear_wgrad", &a->x, &a->dw));
  for (int g = 0; g < group_count(&a->dw); g++) {
    int64_t begin, n;
    group_rows(a->offsets, a->x.dim[0], g, &begin, &n);
    if (n == 0 && a->accumulate) continue;
    p[count++] = (struct cpu_product){
        .a = {at(&a->dy, begin), a->dy.dtype, 1, a->dy.ld},
        .b = {at(&a->x, begin), a->x.dtype, a->x.ld, 1},
        .c = {(void *)(uintptr_t)group_weight(&a->dw, g), a->dw.dtype, a->dw.ld, a->accumulate},
        .i_count = a->dy.dim[1],
        .j_count = a->x.dim[1],
        .k_count = n};
  }
  mt_cpu_products(be, p, count);
  if (!a->sumsq) return MT_OK;
  struct mt_tensor flat = mt_vec(a->dw.data, a->dw.dtype, mt_count(&a->dw));
  return mt_cpu_sumsq(
      be, &(struct mt_sumsq_args){.tensors = &flat, .tensor_count = 1, .out = a->sumsq});
}
