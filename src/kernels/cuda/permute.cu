/* Tokens to experts and back. Formulas: docs/math.md, "Dispatch and combine". */
#include "kernels/cuda/rows.cuh"

/* The plan is a stable counting sort of T*K choices by expert: counts by tile of choices, their
 * prefix over tiles, and each choice to its row. */
enum { TILE = 2048, TILE_THREADS = 256, TILE_WARPS = TILE_THREADS / 32 };

static int64_t plan_tiles(int64_t choices) {
  return div_up(choices, TILE);
}

/* [E, tiles] counts, which become first rows within the expert, and [E] rows of each expert. */
static size_t plan_ints(int64_t choices, int64_t experts) {
  return (size_t)((plan_tiles(choices) + 1) * experts);
}

extern "C" size_t mt_cuda_permute_bytes(const struct mt_limits *l) {
  int64_t choices = l->tokens * l->top_k > l->rows ? l->tokens * l->top_k : l->rows;
  return plan_ints(choices, l->experts) * sizeof(int32_t);
}

struct plan {
  const int32_t *index;
  int32_t choices, experts, tiles;
  int32_t *counts; /* [E, tiles] */
  int32_t *rows;   /* [E] */
  int32_t *offsets, *row_source, *token_row;
};

__global__ void __launch_bounds__(TILE_THREADS) count_tile(struct plan p) {
  __shared__ int32_t count[MT_OPS_MAX_EXPERTS];
  for (int e = threadIdx.x; e < p.experts; e += TILE_THREADS) count[e] = 0;
  __syncthreads();
  int64_t begin = (int64_t)blockIdx.x * TILE;
  for (int64_t i = begin + threadIdx.x; i < begin + TILE && i < p.choices; i += TILE_THREADS) {
    int32_t e = p.index[i];
    if (e >= 0 && e < p.experts) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += TILE_THREADS) {
    p.counts[(int64_t)e * p.tiles + blockIdx.x] = count[e];
  }
}

__device__ __forceinline__ int32_t warp_prefix(int32_t x) { /* inclusive */
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    int32_t y = __shfl_up_sync(0xffffffffu, x, i);
    if ((int)(threadIdx.x % 32) >= i) x += y;
  }
  return x;
}

/* One warp an expert: counts of tiles become what lies before each tile. */
__global__ void __launch_bounds__(32) prefix_tiles(struct plan p) {
  int32_t *count = p.counts + (int64_t)blockIdx.x * p.tiles, before = 0;
  for (int32_t base = 0; base < p.tiles; base += 32) {
    int32_t i = base + (int32_t)threadIdx.x, own = i < p.tiles ? count[i] : 0;
    int32_t sum = warp_prefix(own);
    if (i < p.tiles) count[i] = before + sum - own;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (threadIdx.x == 0) p.rows[blockIdx.x] = before;
}

/* first[e] = rows of the experts before e, first[E] = all rows; by the block's first warp. */
__device__ void prefix_experts(struct plan p, int32_t *first) {
  if (threadIdx.x < 32) {
    int32_t before = 0;
    for (int base = 0; base < p.experts; base += 32) {
      int e = base + (int)threadIdx.x;
      int32_t own = e < p.experts ? p.rows[e] : 0, sum = warp_prefix(own);
      if (e < p.experts) first[e] = before + sum - own;
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (threadIdx.x == 0) first[p.experts] = before;
  }
  __syncthreads();
}

/* Each warp takes a stretch of the tile, 32 choices a step in order: a choice's row is the expert's
 * first, plus what other tiles, warps and steps have put before it, plus equal lanes before. */
__global__ void __launch_bounds__(TILE_THREADS) place_tile(struct plan p) {
  __shared__ int32_t first[MT_OPS_MAX_EXPERTS + 1];
  __shared__ int32_t next[TILE_WARPS][MT_OPS_MAX_EXPERTS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t begin = (int64_t)blockIdx.x * TILE + warp * (TILE / TILE_WARPS);
  prefix_experts(p, first);
  for (int e = lane; e < p.experts; e += 32) next[warp][e] = 0;
  __syncwarp();
  for (int64_t i = begin + lane; i < begin + TILE / TILE_WARPS && i < p.choices; i += 32) {
    int32_t e = p.index[i];
    if (e >= 0 && e < p.experts) atomicAdd(&next[warp][e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += TILE_THREADS) {
    int32_t row = first[e] + p.counts[(int64_t)e * p.tiles + blockIdx.x];
    for (int w = 0; w < TILE_WARPS; w++) {
      int32_t own = next[w][e];
      next[w][e] = row;
      row += own;
    }
  }
  __syncthreads();
  for (int step = 0; step < TILE / TILE_WARPS; step += 32) {
    int64_t i = begin + step + lane;
    int32_t e = i < p.choices ? p.index[i] : -1;
    if (e >= p.experts) e = -1;
    unsigned equal = __match_any_sync(0xffffffffu, e);
    int32_t row = e >= 0 ? next[warp][e] + __popc(equal & ((1u << lane) - 1)) : -1;
    __syncwarp();
    if (e >= 0 && lane == __ffs((int)equal) - 1) next[warp][e] += __popc(equal);
    __syncwarp();
    if (i >= p.choices) continue;
    p.token_row[i] = row;
    if (row >= 0) p.row_source[row] = (int32_t)i;
    /* The rows past the last choice that went anywhere: nobody else writes them. */
    if (i >= first[p.experts]) p.row_source[i] = -1;
  }
  for (int e = threadIdx.x; blockIdx.x == 0 && e <= p.experts; e += TILE_THREADS) {
    p.offsets[e] = first[e];
  }
}

extern "C" mt_err mt_cuda_permute_plan(struct mt_backend *be,
                                       const struct mt_permute_plan_args *a) {
  MT_TRY(mt_check_permute_plan(a));
  mt_cuda_counts_forget(be, a->offsets, (size_t)(a->expert_count + 1) * sizeof(int32_t));
  int64_t choices = (int64_t)a->token_count * a->top_k;
  cudaStream_t s = mt_cuda_of(be)->stream;
  if (a->expert_count > MT_OPS_MAX_EXPERTS) {
    return mt_fail(MT_EUNSUPPORTED, "permute_plan: %d experts; the cuda backend takes %d",
                   a->expert_count, MT_OPS_MAX_EXPERTS);
  }
  if (choices == 0) {
    return mt_cuda_check(
        cudaMemsetAsync(a->offsets, 0, (size_t)(a->expert_count + 1) * sizeof(int32_t), s),
        "permute_plan: zeroing offsets");
  }
  void *scratch;
  MT_TRY(mt_cuda_scratch(be, "permute_plan", plan_ints(choices, a->expert_count) * sizeof(int32_t),
                         &scratch));
  struct plan p = {.index = a->index,
                   .choices = (int32_t)choices,
                   .experts = a->expert_count,
                   .tiles = (int32_t)plan_tiles(choices),
                   .counts = (int32_t *)scratch,
                   .rows = NULL,
                   .offsets = a->offsets,
                   .row_source = a->row_source,
                   .token_row = a->token_row};
  p.rows = p.counts + (int64_t)p.tiles * p.experts;
  count_tile<<<(unsigned)p.tiles, TILE_THREADS, 0, s>>>(p);
  MT_TRY(mt_cuda_launched("permute_plan"));
  prefix_tiles<<<(unsigned)p.experts, 32, 0, s>>>(p);
  MT_TRY(mt_cuda_launched("permute_plan"));
  place_tile<<<(unsigned)p.tiles, TILE_THREADS, 0, s>>>(p);
  return mt_cuda_launched("permute_plan");
}

/* One block a row, as in everything below. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    gather_rows(struct mat<const T> x, const int32_t *__restrict__ row_source, int top_k,
                struct mat<T> xs, int64_t h) {
  int32_t source = row_source[blockIdx.x];
  if (source < 0) return;
  const T *from = row_of(x, source / top_k);
  T *to = row_of(xs, blockIdx.x);
  for (int64_t i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    *reinterpret_cast<pack<T, V> *>(to + i) = *reinterpret_cast<const pack<T, V> *>(from + i);
  }
}

extern "C" mt_err mt_cuda_dispatch_fwd(struct mt_backend *be,
                                       const struct mt_dispatch_fwd_args *a) {
  MT_TRY(mt_check_dispatch_fwd(a));
  MT_TRY(mt_cuda_format("dispatch_fwd", &a->xs));
  int64_t r = a->xs.dim[0], h = a->xs.dim[1];
  if (r == 0 || h == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->xs.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->x) && rows_wide(&a->xs), {
      gather_rows<T, V><<<(unsigned)r, row_threads(h, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->x), a->row_source, a->top_k, mat_of<T>(&a->xs), h);
    });
  });
  return mt_cuda_launched("dispatch_fwd");
}

/* y[t] (acc) = sum over k of prob[t,k] * rows[token_row[t,k]], weight 1 without prob. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    sum_choices(struct mat<const T> rows, const int32_t *__restrict__ token_row,
                struct mat<const float> prob, int top_k, struct mat<T> y, int64_t h,
                int accumulate) {
  int64_t t = blockIdx.x;
  const int32_t *choice = token_row + t * top_k;
  const float *weight = prob.p ? row_of(prob, t) : NULL;
  T *to = row_of(y, t);
  for (int64_t i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    float sum[V] = {0};
#pragma unroll 4
    for (int k = 0; k < top_k; k++) {
      int32_t row = choice[k];
      if (row < 0) continue;
      float x[V], w = weight ? weight[k] : 1.0f;
      load_floats<T, V>(row_of(rows, row) + i, x);
#pragma unroll
      for (int j = 0; j < V; j++) sum[j] += w * x[j];
    }
    if (accumulate) {
      float old[V];
      load_floats<T, V>(to + i, old);
#pragma unroll
      for (int j = 0; j < V; j++) sum[j] += old[j];
    }
    store_floats<T, V>(to + i, sum);
  }
}

static mt_err sum_over_choices(struct mt_backend *be, const char *op, const struct mt_tensor *rows,
                               const int32_t *token_row, const struct mt_tensor *prob, int top_k,
                               const struct mt_tensor *y, int accumulate) {
  int64_t t = y->dim[0], h = y->dim[1];
  MT_TRY(mt_cuda_format(op, y));
  if (t == 0 || h == 0) return MT_OK;
  struct mat<const float> weights = {
    NULL, 0
  };
  if (prob) weights = mat_of<const float>(prob);
  MT_CUDA_BY_FORMAT(y->dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(rows) && rows_wide(y), {
      sum_choices<T, V><<<(unsigned)t, row_threads(h, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(rows), token_row, weights, top_k, mat_of<T>(y), h, accumulate);
    });
  });
  return mt_cuda_launched(op);
}

extern "C" mt_err mt_cuda_dispatch_bwd(struct mt_backend *be,
                                       const struct mt_dispatch_bwd_args *a) {
  MT_TRY(mt_check_dispatch_bwd(a));
  return sum_over_choices(be, "dispatch_bwd", &a->dxs, a->token_row, NULL, a->top_k, &a->dx,
                          a->accumulate);
}

extern "C" mt_err mt_cuda_combine_fwd(struct mt_backend *be, const struct mt_combine_fwd_args *a) {
  MT_TRY(mt_check_combine_fwd(a));
  return sum_over_choices(be, "combine_fwd", &a->ys, a->token_row, &a->prob, a->top_k, &a->y, 0);
}

struct combine_bwd_rows {
  const int32_t *row_source;
  int top_k;
  int64_t h;
};

/* dys may be ys: a thread reads its elements before it writes them. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    spread_rows(struct mat<const T> dy, struct mat<const T> ys, struct mat<const float> prob,
                struct mat<T> dys, struct mat<float> dprob, struct combine_bwd_rows p) {
  __shared__ float shared[33];
  int32_t source = p.row_source[blockIdx.x];
  if (source < 0) return;
  int64_t t = source / p.top_k, k = source % p.top_k;
  const T *pdy = row_of(dy, t), *pys = ys.p ? row_of(ys, blockIdx.x) : NULL;
  T *to = row_of(dys, blockIdx.x);
  float weight = prob.p ? row_of(prob, t)[k] : 1.0f, dot = 0;
  for (int64_t i = threadIdx.x * V; i < p.h; i += blockDim.x * V) {
    float d[V], y[V] = {0};
    load_floats<T, V>(pdy + i, d);
    if (pys) load_floats<T, V>(pys + i, y);
#pragma unroll
    for (int j = 0; j < V; j++) {
      dot += d[j] * y[j];
      d[j] *= weight;
    }
    store_floats<T, V>(to + i, d);
  }
  if (!pys || !dprob.p) return;
  dot = block_sum(dot, shared);
  if (threadIdx.x == 0) row_of(dprob, t)[k] = dot;
}

extern "C" mt_err mt_cuda_combine_bwd(struct mt_backend *be, const struct mt_combine_bwd_args *a) {
  MT_TRY(mt_check_combine_bwd(a));
  MT_TRY(mt_cuda_format("combine_bwd", &a->dys));
  int64_t r = a->dys.dim[0], h = a->dys.dim[1];
  if (r == 0) return MT_OK;
  struct combine_bwd_rows p = {a->row_source, a->top_k, h};
  MT_CUDA_BY_FORMAT(a->dys.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->dy) && rows_wide(&a->ys) && rows_wide(&a->dys), {
      spread_rows<T, V><<<(unsigned)r, row_threads(h, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->dy), mat_of<const T>(&a->ys), mat_of<const float>(&a->prob),
          mat_of<T>(&a->dys), mat_of<float>(&a->dprob), p);
    });
  });
  return mt_cuda_launched("combine_bwd");
}

/* No token appears twice, so that no two blocks write one row. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    add_to_tokens(struct mat<const T> ys, const int32_t *__restrict__ row_source,
                  struct mat<const float> prob, int top_k, struct mat<T> y, int64_t h) {
  int32_t source = row_source[blockIdx.x];
  if (source < 0) return;
  int64_t t = source / top_k, k = source % top_k;
  const T *from = row_of(ys, blockIdx.x);
  T *to = row_of(y, t);
  float weight = prob.p ? row_of(prob, t)[k] : 1.0f;
  for (int64_t i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    float x[V], sum[V];
    load_floats<T, V>(from + i, x);
    load_floats<T, V>(to + i, sum);
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] += weight * x[j];
    store_floats<T, V>(to + i, sum);
  }
}

extern "C" mt_err mt_cuda_scatter_add(struct mt_backend *be, const struct mt_scatter_add_args *a) {
  MT_TRY(mt_check_scatter_add(a));
  MT_TRY(mt_cuda_format("scatter_add", &a->y));
  int64_t r = a->ys.dim[0], h = a->ys.dim[1];
  if (r == 0 || h == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->y.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->ys) && rows_wide(&a->y), {
      add_to_tokens<T, V><<<(unsigned)r, row_threads(h, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->ys), a->row_source, mat_of<const float>(&a->prob), a->top_k,
          mat_of<T>(&a->y), h);
    });
  });
  return mt_cuda_launched("scatter_add");
}
