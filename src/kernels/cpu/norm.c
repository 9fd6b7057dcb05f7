/* Embedding, residual add, RMSNorm. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

mt_err mt_cpu_embed_fwd(struct mt_backend *be, const struct mt_embed_fwd_args *a) {
  MT_TRY(mt_check_embed_fwd(a));
  MT_TRY(mt_cpu_format("embed_fwd", &a->out));
  size_t item = mt_dtype_bytes(a->out.dtype), row = (size_t)a->out.dim[1] * item;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t t = 0; t < a->out.dim[0]; t++) {
    memcpy((char *)a->out.data + (size_t)(t * a->out.ld) * item,
           (const char *)a->table.data + (size_t)(a->ids[t] * a->table.ld) * item, row);
  }
  return MT_OK;
}

mt_err mt_cpu_embed_bwd(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  MT_TRY(mt_check_embed_bwd(a));
  MT_TRY(mt_cpu_format("embed_bwd", &a->dout));
  int64_t h = a->dtable.dim[1];
  int32_t rows = *a->valid_count;
  /* Each thread owns a range of columns and walks the tokens in order: no two write one element,
   * and the sums do not depend on the number of threads. */
#pragma omp parallel num_threads(be->thread_count)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t begin = h * me / threads, end = h * (me + 1) / threads;
    for (int64_t v = 0; !a->accumulate && v < a->dtable.dim[0]; v++) {
      memset((float *)a->dtable.data + v * a->dtable.ld + begin, 0,
             (size_t)(end - begin) * sizeof(float));
    }
    for (int32_t t = 0; t < rows; t++) {
      float *dst = (float *)a->dtable.data + a->ids[t] * a->dtable.ld;
      if (a->dout.dtype == MT_F32) {
        const float *src = (const float *)a->dout.data + t * a->dout.ld;
        for (int64_t i = begin; i < end; i++) dst[i] += src[i];
      } else {
        const uint16_t *src = (const uint16_t *)a->dout.data + t * a->dout.ld;
        for (int64_t i = begin; i < end; i++) dst[i] += mt_bf16_to_f32(src[i]);
      }
    }
  }
  return MT_OK;
}

mt_err mt_cpu_add(struct mt_backend *be, const struct mt_add_args *a) {
  MT_TRY(mt_check_add(a));
  MT_TRY(mt_cpu_format("add", &a->y));
  int64_t h = a->y.dim[1];
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->y.dim[0]; t++) {
      const float *x = cpu_read(&a->a, t, h, scratch);
      const float *z = cpu_read(&a->b, t, h, scratch + CPU_ROW_FLOATS);
      float *y = cpu_target(&a->y, t, scratch + 2 * CPU_ROW_FLOATS);
      for (int64_t i = 0; i < h; i++) y[i] = x[i] + z[i];
      cpu_write(&a->y, t, h, y);
    }
  }
  return MT_OK;
}

static void norm_row(const struct mt_rmsnorm_fwd_args *a, int64_t t, const float *weight,
                     float *scratch) {
  int64_t h = a->x.dim[1];
  float *sum = scratch, *other = scratch + CPU_ROW_FLOATS;
  const float *s = cpu_read(&a->x, t, h, sum);
  if (a->residual.data) {
    const float *r = cpu_read(&a->residual, t, h, other);
    for (int64_t i = 0; i < h; i++) sum[i] = s[i] + r[i];
    if (a->x.dtype == MT_BF16) {
      for (int64_t i = 0; i < h; i++) sum[i] = mt_bf16_to_f32(mt_f32_to_bf16(sum[i]));
    }
    s = sum;
  }
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < h; i++) square += s[i] * s[i];
  float rstd = 1.0f / sqrtf(square / (float)h + a->eps);
  ((float *)a->rstd.data)[t] = rstd;
  if (a->sum.data) {
    float *dst = cpu_target(&a->sum, t, other);
    memmove(dst, s, (size_t)h * sizeof *dst);
    cpu_write(&a->sum, t, h, dst);
  }
  float *y = cpu_target(&a->y, t, other);
  for (int64_t i = 0; i < h; i++) y[i] = s[i] * rstd * weight[i];
  cpu_write(&a->y, t, h, y);
}

mt_err mt_cpu_rmsnorm_fwd(struct mt_backend *be, const struct mt_rmsnorm_fwd_args *a) {
  MT_TRY(mt_check_rmsnorm_fwd(a));
  MT_TRY(mt_cpu_format("rmsnorm_fwd", &a->x));
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
    const float *weight = cpu_read(&a->weight, 0, a->x.dim[1], scratch + 2 * CPU_ROW_FLOATS);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->x.dim[0]; t++) norm_row(a, t, weight, scratch);
  }
  return MT_OK;
}

static void norm_row_bwd(const struct mt_rmsnorm_bwd_args *a, int64_t t, const float *weight,
                         float *scratch) {
  int64_t h = a->x.dim[1];
  const float *x = cpu_read(&a->x, t, h, scratch);
  const float *dy = cpu_read(&a->dy, t, h, scratch + CPU_ROW_FLOATS);
  float r = ((const float *)a->rstd.data)[t], dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < h; i++) dot += dy[i] * weight[i] * x[i];
  float c = dot * r * r * r / (float)h;
  float *dx = cpu_target(&a->dx, t, scratch); /* x's buffer: read before it is overwritten */
  if (a->dresidual.data && a->dresidual.dtype == MT_F32) {
    const float *dr = (const float *)a->dresidual.data + t * a->dresidual.ld;
    for (int64_t i = 0; i < h; i++) dx[i] = r * weight[i] * dy[i] - c * x[i] + dr[i];
  } else if (a->dresidual.data) {
    const uint16_t *dr = (const uint16_t *)a->dresidual.data + t * a->dresidual.ld;
    for (int64_t i = 0; i < h; i++) {
      dx[i] = r * weight[i] * dy[i] - c * x[i] + mt_bf16_to_f32(dr[i]);
    }
  } else {
    for (int64_t i = 0; i < h; i++) dx[i] = r * weight[i] * dy[i] - c * x[i];
  }
  cpu_write(&a->dx, t, h, dx);
}

/* Columns [begin, end) of dweight: all rows in order, so the sum does not depend on the threads. */
static void norm_dweight(const struct mt_rmsnorm_bwd_args *a, int64_t begin, int64_t end,
                         float *scratch) {
  int64_t n = end - begin;
  struct mt_tensor x = mt_cols(&a->x, begin, n), dy = mt_cols(&a->dy, begin, n);
  const float *rstd = a->rstd.data;
  float *sum = scratch + 2 * CPU_ROW_FLOATS, *dw = (float *)a->dweight.data + begin;
  memset(sum, 0, (size_t)n * sizeof *sum);
  for (int64_t t = 0; t < a->x.dim[0]; t++) {
    const float *xr = cpu_read(&x, t, n, scratch);
    const float *dyr = cpu_read(&dy, t, n, scratch + CPU_ROW_FLOATS);
    for (int64_t i = 0; i < n; i++) sum[i] += dyr[i] * xr[i] * rstd[t];
  }
  for (int64_t i = 0; i < n; i++) dw[i] = a->accumulate ? dw[i] + sum[i] : sum[i];
}

mt_err mt_cpu_rmsnorm_bwd(struct mt_backend *be, const struct mt_rmsnorm_bwd_args *a) {
  MT_TRY(mt_check_rmsnorm_bwd(a));
  MT_TRY(mt_cpu_format("rmsnorm_bwd", &a->x));
  int64_t h = a->x.dim[1];
#pragma omp parallel num_threads(be->thread_count)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    float *scratch = mt_cpu_thread_scratch(be, (int)me);
    if (a->dweight.data) norm_dweight(a, h * me / threads, h * (me + 1) / threads, scratch);
    const float *weight = cpu_read(&a->weight, 0, h, scratch + 2 * CPU_ROW_FLOATS);
    /* dx may be dresidual, never dy or x: the columns above are read before and after alike. */
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->x.dim[0]; t++) norm_row_bwd(a, t, weight, scratch);
  }
  return MT_OK;
}
