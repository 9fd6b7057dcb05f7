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

/* Columns [begin, end) of the table's gradient in F32: the rows of the tokens are added where they
 * belong, in order. */
static void embed_add_rows(const struct mt_embed_bwd_args *a, int64_t begin, int64_t end) {
  for (int32_t t = 0; t < *a->valid_count; t++) {
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

/* Each id's tokens as a list in order: first[id] and next[token], -1 at the end. */
struct tokens_by_id {
  int32_t *first, *next;
};

static mt_err list_by_id(const struct mt_backend *be, const struct mt_embed_bwd_args *a,
                         struct tokens_by_id *l) {
  size_t room;
  int64_t vocab = a->dtable.dim[0], rows = *a->valid_count;
  l->first = (int32_t *)mt_cpu_shared_scratch(be, &room);
  l->next = l->first + vocab;
  if ((size_t)(vocab + rows) > room) return mt_fail(MT_ESHAPE, "embed_bwd: workspace too small");
  for (int64_t v = 0; v < vocab; v++) l->first[v] = -1;
  for (int64_t t = rows - 1; t >= 0; t--) {
    l->next[t] = l->first[a->ids[t]];
    l->first[a->ids[t]] = (int32_t)t;
  }
  return MT_OK;
}

/* The same in BF16: an id's sum is made in float32 and rounded once. */
static void embed_sum_ids(const struct mt_embed_bwd_args *a, const struct tokens_by_id *l,
                          int64_t begin, int64_t end, float *scratch) {
  int64_t n = end - begin;
  struct mt_tensor dout = mt_cols(&a->dout, begin, n);
  float *sum = scratch + CPU_ROW_FLOATS;
  for (int32_t t = 0; t < *a->valid_count; t++) {
    if (l->first[a->ids[t]] != t) continue;
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (int32_t k = t; k >= 0; k = l->next[k]) {
      const float *x = cpu_read(&dout, k, n, scratch);
      for (int64_t i = 0; i < n; i++) sum[i] += x[i];
    }
    cpu_write_grad(&a->dtable, a->ids[t], begin, n, sum, a->accumulate);
  }
}

mt_err mt_cpu_embed_bwd(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  MT_TRY(mt_check_embed_bwd(a));
  MT_TRY(mt_cpu_format("embed_bwd", &a->dout));
  int64_t h = a->dtable.dim[1];
  struct tokens_by_id lists;
  bool narrow = a->dtable.dtype == MT_BF16;
  if (narrow) MT_TRY(list_by_id(be, a, &lists));
    /* Each thread owns a range of columns and walks the tokens in order: no two write one element,
     * and the sums do not depend on the number of threads. */
#pragma omp parallel num_threads(be->thread_count)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t begin = h * me / threads, end = h * (me + 1) / threads;
    if (!a->accumulate) cpu_zero_columns(&a->dtable, begin, end - begin);
    if (narrow)
      embed_sum_ids(a, &lists, begin, end, mt_cpu_thread_scratch(be, (int)me));
    else
      embed_add_rows(a, begin, end);
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
  float *sum = scratch + 2 * CPU_ROW_FLOATS;
  memset(sum, 0, (size_t)n * sizeof *sum);
  for (int64_t t = 0; t < a->x.dim[0]; t++) {
    const float *xr = cpu_read(&x, t, n, scratch);
    const float *dyr = cpu_read(&dy, t, n, scratch + CPU_ROW_FLOATS);
    for (int64_t i = 0; i < n; i++) sum[i] += dyr[i] * xr[i] * rstd[t];
  }
  cpu_write_grad(&a->dweight, 0, begin, n, sum, a->accumulate);
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
