/* RMSNorm with residual add. Formulas: docs/math.md, "RMSNorm". One block walks a row in tiles of
 * PARTS * blockDim.x * V elements; where one tile holds the row, as it does for the usual H, the
 * row is read once and stays in registers. */
#include "kernels/cuda/rows.cuh"

enum { PARTS = 4, BACKWARD_BLOCKS = 512 };

/* Sums of dweight over each block's rows: [BACKWARD_BLOCKS, H]. The count of blocks depends on T
 * alone, so that the sums are the same on every chip. */
extern "C" size_t mt_cuda_norm_bytes(const struct mt_limits *l) {
  return (size_t)BACKWARD_BLOCKS * (size_t)l->hidden * sizeof(float);
}

struct norm_fwd_rows {
  int64_t h;
  float eps;
  float *rstd;
};

/* s = x (+ residual), rounded to T. */
template <class T, int V>
__device__ __forceinline__ pack<T, V> sum_of(const T *x, const T *residual, int64_t i) {
  pack<T, V> s = *reinterpret_cast<const pack<T, V> *>(x + i);
  if (residual) {
    pack<T, V> r = *reinterpret_cast<const pack<T, V> *>(residual + i);
#pragma unroll
    for (int j = 0; j < V; j++) s.x[j] = from_float<T>(to_float(s.x[j]) + to_float(r.x[j]));
  }
  return s;
}

/* sum may be x or residual: a thread reads an element before it writes it, and no other does. */
template <class T, int V>
__global__ void __launch_bounds__(512)
    norm_fwd(struct mat<const T> x, struct mat<const T> residual, const T *__restrict__ weight,
             struct mat<T> sum, struct mat<T> y, struct norm_fwd_rows p) {
  __shared__ float shared[33];
  int64_t t = blockIdx.x, step = (int64_t)blockDim.x * V, tile = PARTS * step;
  const T *px = row_of(x, t), *pr = residual.p ? row_of(residual, t) : NULL;
  T *ps = sum.p ? row_of(sum, t) : NULL, *py = row_of(y, t);
  pack<T, V> s[PARTS];
  float square = 0;
  for (int64_t base = 0; base < p.h; base += tile) {
#pragma unroll
    for (int n = 0; n < PARTS; n++) {
      int64_t i = base + n * step + threadIdx.x * V;
      if (i < p.h) s[n] = sum_of<T, V>(px, pr, i);
    }
#pragma unroll
    for (int n = 0; n < PARTS; n++) {
      if (base + n * step + threadIdx.x * V >= p.h) continue;
#pragma unroll
      for (int j = 0; j < V; j++) square += to_float(s[n].x[j]) * to_float(s[n].x[j]);
    }
  }
  float rstd = 1.0f / sqrtf(block_sum(square, shared) / (float)p.h + p.eps);
  if (threadIdx.x == 0) p.rstd[t] = rstd;
  for (int64_t base = 0; base < p.h; base += tile) {
#pragma unroll
    for (int n = 0; n < PARTS; n++) {
      int64_t i = base + n * step + threadIdx.x * V;
      if (i >= p.h) continue;
      if (tile < p.h) s[n] = sum_of<T, V>(px, pr, i);
      float w[V], out[V];
      load_floats<T, V>(weight + i, w);
#pragma unroll
      for (int j = 0; j < V; j++) out[j] = to_float(s[n].x[j]) * rstd * w[j];
      if (ps) store_pack<T, V>(ps + i, s[n]);
      store_row<T, V>(py + i, out);
    }
  }
}

/* Threads that let one tile hold a row, where `most` are enough for that. */
static unsigned norm_threads(int64_t h, int width, int64_t most) {
  int64_t n = div_up(h, (int64_t)PARTS * width * 32) * 32;
  return (unsigned)(n < 32 ? 32 : n > most ? most : n);
}

extern "C" mt_err mt_cuda_rmsnorm_fwd(struct mt_backend *be, const struct mt_rmsnorm_fwd_args *a) {
  MT_TRY(mt_check_rmsnorm_fwd(a));
  MT_TRY(mt_cuda_format("rmsnorm_fwd", &a->x));
  int64_t t = a->x.dim[0], h = a->x.dim[1];
  if (t == 0) return MT_OK;
  struct norm_fwd_rows p = {h, a->eps, (float *)a->rstd.data};
  bool fits = rows_wide(&a->x) && rows_wide(&a->residual) && rows_wide(&a->weight) &&
              rows_wide(&a->sum) && rows_wide(&a->y);
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    MT_CUDA_BY_WIDTH(fits, {
      norm_fwd<T, V><<<(unsigned)t, norm_threads(h, V, 512), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->x), mat_of<const T>(&a->residual), (const T *)a->weight.data,
          mat_of<T>(&a->sum), mat_of<T>(&a->y), p);
    });
  });
  return mt_cuda_launched("rmsnorm_fwd");
}

struct norm_bwd_rows {
  int64_t t, h;
  const float *rstd;
  float *partial; /* [gridDim.x, H], or NULL: no dweight, or the row needs several tiles */
};

/* Block b takes rows b, b + gridDim.x and so on; what dweight gets from them stays in registers
 * until the last. dx may be dresidual. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    norm_bwd(struct mat<const T> dy, struct mat<const T> x, const T *__restrict__ weight,
             struct mat<const T> dresidual, struct mat<T> dx, struct norm_bwd_rows p) {
  __shared__ float shared[33];
  int64_t step = (int64_t)blockDim.x * V, tile = PARTS * step;
  float dw[PARTS][V] = {{0}};
  for (int64_t t = blockIdx.x; t < p.t; t += gridDim.x) {
    const T *pdy = row_of(dy, t), *px = row_of(x, t);
    const T *pres = dresidual.p ? row_of(dresidual, t) : NULL;
    T *pdx = row_of(dx, t);
    float r = p.rstd[t], dot = 0;
    pack<T, V> vy[PARTS], vx[PARTS];
    for (int64_t base = 0; base < p.h; base += tile) {
#pragma unroll
      for (int n = 0; n < PARTS; n++) {
        int64_t i = base + n * step + threadIdx.x * V;
        if (i >= p.h) continue;
        vy[n] = *reinterpret_cast<const pack<T, V> *>(pdy + i);
        vx[n] = *reinterpret_cast<const pack<T, V> *>(px + i);
      }
#pragma unroll
      for (int n = 0; n < PARTS; n++) {
        int64_t i = base + n * step + threadIdx.x * V;
        if (i >= p.h) continue;
        float w[V];
        load_floats<T, V>(weight + i, w);
#pragma unroll
        for (int j = 0; j < V; j++) {
          float yx = to_float(vy[n].x[j]) * to_float(vx[n].x[j]);
          dot += yx * w[j];
          dw[n][j] += yx * r;
        }
      }
    }
    float share = block_sum(dot, shared) / (float)p.h * r * r;
    for (int64_t base = 0; base < p.h; base += tile) {
#pragma unroll
      for (int n = 0; n < PARTS; n++) {
        int64_t i = base + n * step + threadIdx.x * V;
        if (i >= p.h) continue;
        if (tile < p.h) {
          vy[n] = *reinterpret_cast<const pack<T, V> *>(pdy + i);
          vx[n] = *reinterpret_cast<const pack<T, V> *>(px + i);
        }
        float w[V], out[V], beside[V] = {0};
        load_floats<T, V>(weight + i, w);
        if (pres) load_floats<T, V>(pres + i, beside);
#pragma unroll
        for (int j = 0; j < V; j++) {
          out[j] = r * (to_float(vy[n].x[j]) * w[j] - to_float(vx[n].x[j]) * share) + beside[j];
        }
        store_row<T, V>(pdx + i, out);
      }
    }
  }
  if (!p.partial) return;
#pragma unroll
  for (int n = 0; n < PARTS; n++) {
    int64_t i = n * step + threadIdx.x * V;
    if (i < p.h) store_stats<V>(p.partial + blockIdx.x * p.h + i, dw[n]);
  }
}

/* dweight's share of the rows of block x, one column a thread: for rows that need several tiles. */
template <class T>
__global__ void __launch_bounds__(256)
    norm_bwd_columns(struct mat<const T> dy, struct mat<const T> x, struct norm_bwd_rows p) {
  int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= p.h) return;
  float sum = 0;
  for (int64_t t = blockIdx.x; t < p.t; t += gridDim.x) {
    sum += to_float(row_of(dy, t)[i]) * to_float(row_of(x, t)[i]) * p.rstd[t];
  }
  p.partial[blockIdx.x * p.h + i] = sum;
}

static mt_err norm_bwd_launch(struct mt_backend *be, const struct mt_rmsnorm_bwd_args *a,
                              float *partial, unsigned blocks) {
  int64_t t = a->x.dim[0], h = a->x.dim[1];
  cudaStream_t s = mt_cuda_of(be)->stream;
  bool fits = rows_wide(&a->dy) && rows_wide(&a->x) && rows_wide(&a->weight) &&
              rows_wide(&a->dresidual) && rows_wide(&a->dx) && aligned_to(partial, 16);
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    MT_CUDA_BY_WIDTH(fits, {
      unsigned threads = norm_threads(h, V, 256);
      bool one_tile = h <= (int64_t)PARTS * V * threads;
      struct norm_bwd_rows p = {t, h, (const float *)a->rstd.data, one_tile ? partial : NULL};
      /* Before norm_bwd: dx may lie over dresidual, but dy and x stay. */
      if (partial && !one_tile) {
        struct norm_bwd_rows columns = {t, h, p.rstd, partial};
        norm_bwd_columns<T><<<dim3(blocks, (unsigned)div_up(h, 256)), 256, 0, s>>>(
            mat_of<const T>(&a->dy), mat_of<const T>(&a->x), columns);
        MT_TRY(mt_cuda_launched("rmsnorm_bwd"));
      }
      norm_bwd<T, V><<<partial ? blocks : (unsigned)t, threads, 0, s>>>(
          mat_of<const T>(&a->dy), mat_of<const T>(&a->x), (const T *)a->weight.data,
          mat_of<const T>(&a->dresidual), mat_of<T>(&a->dx), p);
    });
  });
  return mt_cuda_launched("rmsnorm_bwd");
}

extern "C" mt_err mt_cuda_rmsnorm_bwd(struct mt_backend *be, const struct mt_rmsnorm_bwd_args *a) {
  MT_TRY(mt_check_rmsnorm_bwd(a));
  MT_TRY(mt_cuda_format("rmsnorm_bwd", &a->x));
  int64_t t = a->x.dim[0], h = a->x.dim[1];
  const int64_t most = BACKWARD_BLOCKS;
  unsigned blocks = (unsigned)(t < most ? t : most);
  void *partial = NULL;
  if (a->dweight.data) {
    MT_TRY(
        mt_cuda_scratch(be, "rmsnorm_bwd", (size_t)blocks * (size_t)h * sizeof(float), &partial));
  }
  if (t > 0) MT_TRY(norm_bwd_launch(be, a, (float *)partial, blocks));
  if (!a->dweight.data) return MT_OK;
  return sum_columns(be, "rmsnorm_bwd", (const float *)partial, (int)blocks, &a->dweight,
                     a->accumulate);
}
