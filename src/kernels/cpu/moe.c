/* Dispatch, combine, scatter and SwiGLU. */
#include <omp.h>
#include <string.h>

#include "backend/experts.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vexp.h"

mt_err mt_cpu_dispatch_fwd(struct mt_backend *be, const struct mt_dispatch_fwd_args *a) {
  MT_TRY(mt_check_dispatch_fwd(a));
  MT_TRY(mt_cpu_format("dispatch_fwd", &a->x));
  size_t item = mt_dtype_bytes(a->x.dtype), row = (size_t)a->x.dim[1] * item;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < a->xs.dim[0]; r++) {
    if (a->row_source[r] < 0) continue;
    int64_t t = a->row_source[r] / a->top_k;
    memcpy((char *)a->xs.data + (size_t)(r * a->xs.ld) * item,
           (const char *)a->x.data + (size_t)(t * a->x.ld) * item, row);
  }
  return MT_OK;
}

/* sum (=) over k of weight * rows[token_row[k]]; buffer is a row of scratch. */
static void gather_sum(const struct mt_tensor *rows, const int32_t *token_row, const float *prob,
                       int top_k, float *sum, float *buffer) {
  int64_t h = rows->dim[1];
  memset(sum, 0, (size_t)h * sizeof *sum);
  for (int k = 0; k < top_k; k++) {
    if (token_row[k] < 0) continue;
    const float *x = cpu_read(rows, token_row[k], h, buffer);
    float p = prob ? prob[k] : 1.0f;
    for (int64_t i = 0; i < h; i++) sum[i] += p * x[i];
  }
}

mt_err mt_cpu_dispatch_bwd(struct mt_backend *be, const struct mt_dispatch_bwd_args *a) {
  MT_TRY(mt_check_dispatch_bwd(a));
  MT_TRY(mt_cpu_format("dispatch_bwd", &a->dx));
  int64_t h = a->dx.dim[1];
#pragma omp parallel num_threads(be->thread_count)
  {
    float *sum = mt_cpu_thread_scratch(be, omp_get_thread_num());
    float *buffer = sum + CPU_ROW_FLOATS;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->dx.dim[0]; t++) {
      gather_sum(&a->dxs, a->token_row + t * a->top_k, NULL, a->top_k, sum, buffer);
      if (a->accumulate) {
        const float *old = cpu_read(&a->dx, t, h, buffer);
        for (int64_t i = 0; i < h; i++) sum[i] += old[i];
      }
      float *dx = cpu_target(&a->dx, t, sum);
      if (dx != sum) memcpy(dx, sum, (size_t)h * sizeof *dx);
      cpu_write(&a->dx, t, h, dx);
    }
  }
  return MT_OK;
}

mt_err mt_cpu_combine_fwd(struct mt_backend *be, const struct mt_combine_fwd_args *a) {
  MT_TRY(mt_check_combine_fwd(a));
  MT_TRY(mt_cpu_format("combine_fwd", &a->y));
  int64_t h = a->y.dim[1];
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->y.dim[0]; t++) {
      const float *prob = a->prob.data ? (const float *)a->prob.data + t * a->prob.ld : NULL;
      float *y = cpu_target(&a->y, t, scratch);
      gather_sum(&a->ys, a->token_row + t * a->top_k, prob, a->top_k, y, scratch + CPU_ROW_FLOATS);
      cpu_write(&a->y, t, h, y);
    }
  }
  return MT_OK;
}

mt_err mt_cpu_combine_bwd(struct mt_backend *be, const struct mt_combine_bwd_args *a) {
  MT_TRY(mt_check_combine_bwd(a));
  MT_TRY(mt_cpu_format("combine_bwd", &a->dy));
  int64_t h = a->dy.dim[1];
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a->dys.dim[0]; r++) {
      if (a->row_source[r] < 0) continue;
      int64_t t = a->row_source[r] / a->top_k, k = a->row_source[r] % a->top_k;
      const float *dy = cpu_read(&a->dy, t, h, scratch);
      float p = a->prob.data ? ((const float *)a->prob.data)[t * a->prob.ld + k] : 1.0f;
      if (a->ys.data && a->dprob.data) {
        const float *y = cpu_read(&a->ys, r, h, scratch + CPU_ROW_FLOATS);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < h; i++) sum += dy[i] * y[i];
        ((float *)a->dprob.data)[t * a->dprob.ld + k] = sum;
      }
      float *dys = cpu_target(&a->dys, r, scratch + CPU_ROW_FLOATS);
      for (int64_t i = 0; i < h; i++) dys[i] = p * dy[i];
      cpu_write(&a->dys, r, h, dys);
    }
  }
  return MT_OK;
}

mt_err mt_cpu_scatter_add(struct mt_backend *be, const struct mt_scatter_add_args *a) {
  MT_TRY(mt_check_scatter_add(a));
  MT_TRY(mt_cpu_format("scatter_add", &a->y));
  int64_t h = a->y.dim[1];
  /* No token appears twice, so the rows can be spread over threads. */
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a->ys.dim[0]; r++) {
      if (a->row_source[r] < 0) continue;
      int64_t t = a->row_source[r] / a->top_k, k = a->row_source[r] % a->top_k;
      const float *x = cpu_read(&a->ys, r, h, scratch);
      const float *old = cpu_read(&a->y, t, h, scratch + CPU_ROW_FLOATS);
      float p = a->prob.data ? ((const float *)a->prob.data)[t * a->prob.ld + k] : 1.0f;
      float *y = cpu_target(&a->y, t, scratch + CPU_ROW_FLOATS);
      for (int64_t i = 0; i < h; i++) y[i] = old[i] + p * x[i];
      cpu_write(&a->y, t, h, y);
    }
  }
  return MT_OK;
}

/* SwiGLU runs over short pieces of a row, so that its temporaries stay in L1. */
enum { PIECE = 256 };

void mt_cpu_swiglu_row(const float *g, const float *u, float p, int64_t n, float *h) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) h[i] = g[i] / (1.0f + cpu_exp_one(-g[i])) * u[i] * p;
}

static void swiglu_piece(const struct mt_swiglu_fwd_args *a, int64_t r, int64_t i0, int64_t n,
                         float p) {
  float gbuf[PIECE], ubuf[PIECE], hbuf[PIECE];
  int64_t f = a->h.dim[1];
  struct mt_tensor gate = mt_cols(&a->gate_up, i0, n), up = mt_cols(&a->gate_up, f + i0, n);
  struct mt_tensor out = mt_cols(&a->h, i0, n);
  const float *g = cpu_read(&gate, r, n, gbuf), *u = cpu_read(&up, r, n, ubuf);
  float *h = cpu_target(&out, r, hbuf);
  mt_cpu_swiglu_row(g, u, p, n, h);
  cpu_write(&out, r, n, h);
}

mt_err mt_cpu_swiglu_fwd(struct mt_backend *be, const struct mt_swiglu_fwd_args *a) {
  MT_TRY(mt_check_swiglu_fwd(a));
  MT_TRY(mt_cpu_format("swiglu_fwd", &a->h));
  int64_t rows = a->row_count ? *a->row_count : a->h.dim[0], f = a->h.dim[1];
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float p = a->row_prob.data ? ((const float *)a->row_prob.data)[r] : 1.0f;
    for (int64_t i = 0; i < f; i += PIECE) swiglu_piece(a, r, i, f - i < PIECE ? f - i : PIECE, p);
  }
  return MT_OK;
}

float mt_cpu_swiglu_bwd_row(const float *d, const float *g, const float *u, float p, int64_t n,
                            float *dg, float *du, float *h) {
  float dp = 0;
#pragma omp simd reduction(+ : dp)
  for (int64_t i = 0; i < n; i++) {
    float sig = 1.0f / (1.0f + cpu_exp_one(-g[i])), silu = g[i] * sig, value = silu * u[i];
    dp += d[i] * value;
    dg[i] = d[i] * p * u[i] * sig * (1.0f + g[i] * (1.0f - sig));
    du[i] = d[i] * p * silu;
    h[i] = value * p;
  }
  return dp;
}

/* Returns the piece's share of drow_prob. Everything is read before anything is written: outputs
 * may be the inputs. */
static float swiglu_piece_bwd(const struct mt_swiglu_bwd_args *a, int64_t r, int64_t i0, int64_t n,
                              float p) {
  float dbuf[PIECE], gbuf[PIECE], ubuf[PIECE], dg[PIECE], du[PIECE], h[PIECE];
  int64_t f = a->dh.dim[1];
  struct mt_tensor gate = mt_cols(&a->gate_up, i0, n), up = mt_cols(&a->gate_up, f + i0, n);
  struct mt_tensor in = mt_cols(&a->dh, i0, n);
  const float *d = cpu_read(&in, r, n, dbuf), *g = cpu_read(&gate, r, n, gbuf),
              *u = cpu_read(&up, r, n, ubuf);
  float dp = mt_cpu_swiglu_bwd_row(d, g, u, p, n, dg, du, h);
  const struct {
    const struct mt_tensor *t;
    int64_t col;
    const float *x;
  } outs[] = {{&a->dgate_up, i0, dg}, {&a->dgate_up, f + i0, du}, {&a->h, i0, h}};
  for (int o = 0; o < (a->h.data ? 3 : 2); o++) {
    struct mt_tensor t = mt_cols(outs[o].t, outs[o].col, n);
    if (t.dtype == MT_F32)
      memcpy((float *)t.data + r * t.ld, outs[o].x, (size_t)n * sizeof(float));
    else
      cpu_write(&t, r, n, outs[o].x);
  }
  return dp;
}

mt_err mt_cpu_swiglu_bwd(struct mt_backend *be, const struct mt_swiglu_bwd_args *a) {
  MT_TRY(mt_check_swiglu_bwd(a));
  MT_TRY(mt_cpu_format("swiglu_bwd", &a->dh));
  int64_t rows = a->row_count ? *a->row_count : a->dh.dim[0], f = a->dh.dim[1];
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float p = a->row_prob.data ? ((const float *)a->row_prob.data)[r] : 1.0f, dp = 0;
    for (int64_t i = 0; i < f; i += PIECE) {
      dp += swiglu_piece_bwd(a, r, i, f - i < PIECE ? f - i : PIECE, p);
    }
    if (a->drow_prob.data) ((float *)a->drow_prob.data)[r] = dp;
  }
  return MT_OK;
}

mt_err mt_cpu_experts_up_fwd(struct mt_backend *be, const struct mt_experts_up_fwd_args *a) {
  MT_TRY(mt_check_experts_up_fwd(a));
  struct mt_linear_fwd_args product = mt_experts_up_product(a);
  struct mt_swiglu_fwd_args swiglu = mt_experts_up_swiglu(a);
  MT_TRY(mt_cpu_linear_fwd(be, &product));
  return mt_cpu_swiglu_fwd(be, &swiglu);
}

mt_err mt_cpu_experts_down_dgrad(struct mt_backend *be,
                                 const struct mt_experts_down_dgrad_args *a) {
  MT_TRY(mt_check_experts_down_dgrad(a));
  struct mt_linear_dgrad_args product = mt_experts_down_product(a);
  struct mt_swiglu_bwd_args swiglu = mt_experts_down_swiglu(a);
  MT_TRY(mt_cpu_linear_dgrad(be, &product));
  return mt_cpu_swiglu_bwd(be, &swiglu);
}
