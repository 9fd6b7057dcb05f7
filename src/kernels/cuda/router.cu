/* Router. Formulas: docs/math.md, "Router" and "Auxiliary loss". Products with the router's weight
 * are plain float32 arithmetic: a rounded logit would change which expert is chosen. */
#include "kernels/cuda/rows.cuh"

/* Experts that a thread holds sums for at once, and tokens of one warp or block. */
enum { GROUP = 8, LOGIT_TOKENS = 4, LOGIT_WARPS = 4, DX_TOKENS = 8 };
enum { ROUTE_WARPS = 8, ROUTE_BLOCKS = 256 };
enum { COLUMN_THREADS = 128, DW_PARTS = 128, DW_TOKENS = 64 };

static int64_t groups_of(int64_t experts) {
  return div_up(experts, GROUP);
}

/* Parts of the tokens that dw is summed over one by one: the fewer, the more experts there are. */
static int dw_parts(int64_t experts) {
  int64_t parts = DW_PARTS / groups_of(experts);
  return (int)(parts < 1 ? 1 : parts);
}

/* Forward: [ROUTE_BLOCKS, E] sums of p, [ROUTE_BLOCKS] sums of the z-loss. Backward: [dw_parts, E,
 * H] sums of dw. */
extern "C" size_t mt_cuda_router_bytes(const struct mt_limits *l) {
  int64_t experts = l->experts > 0 ? l->experts : 1;
  int64_t forward = ROUTE_BLOCKS * (experts + 1),
          backward = dw_parts(experts) * experts * l->hidden;
  return (size_t)(forward > backward ? forward : backward) * sizeof(float);
}

/* What is read once should not push w out of the L1. */
template <class T, int V> __device__ __forceinline__ pack<T, V> load_once(const T *p) {
  pack<T, V> v;
  if constexpr (sizeof v == sizeof(uint4)) {
    uint4 word = __ldcs(reinterpret_cast<const uint4 *>(p));
    memcpy(&v, &word, sizeof v);
  } else {
    v = *reinterpret_cast<const pack<T, V> *>(p);
  }
  return v;
}

/* logits[t, e] of LOGIT_TOKENS tokens and GROUP experts by one warp, whose lanes share the columns:
 * x is read once where E <= GROUP; w comes from the caches. Each logit is summed in the same order,
 * so that equal rows of w give equal bits. */
template <class T, int V>
__global__ void __launch_bounds__(32 * LOGIT_WARPS)
    router_logits(struct mat<const T> x, struct mat<const T> w, const int32_t *valid_count,
                  int64_t tokens, int64_t h, int experts, struct mat<float> logits) {
  int lane = threadIdx.x % 32, first_expert = blockIdx.y * GROUP;
  int64_t t0 = ((int64_t)blockIdx.x * LOGIT_WARPS + threadIdx.x / 32) * LOGIT_TOKENS;
  int64_t valid = *valid_count < tokens ? *valid_count : tokens;
  float sum[LOGIT_TOKENS][GROUP] = {{0}};
  for (int64_t i = lane * V; t0 < valid && i < h; i += 32 * V) {
    pack<T, V> px[LOGIT_TOKENS];
#pragma unroll
    for (int t = 0; t < LOGIT_TOKENS; t++) {
      /* A warp's spare tokens repeat the last: what they give is not kept. */
      int64_t token = t0 + t < valid ? t0 + t : valid - 1;
      px[t] = load_once<T, V>(row_of(x, token) + i);
    }
#pragma unroll
    for (int e = 0; e < GROUP; e++) {
      int expert = first_expert + e < experts ? first_expert + e : experts - 1;
      float vw[V];
      load_floats<T, V>(row_of(w, expert) + i, vw);
#pragma unroll
      for (int t = 0; t < LOGIT_TOKENS; t++) {
#pragma unroll
        for (int j = 0; j < V; j++) sum[t][e] += to_float(px[t].x[j]) * vw[j];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < LOGIT_TOKENS; t++) {
    float mine = 0;
#pragma unroll
    for (int e = 0; e < GROUP; e++) {
      float total = warp_sum(sum[t][e]);
      if (lane == e) mine = total;
    }
    if (lane < GROUP && first_expert + lane < experts && t0 + t < tokens) {
      row_of(logits, t0 + t)[first_expert + lane] = t0 + t < valid ? mine : 0.0f;
    }
  }
}

struct route_rows {
  int64_t tokens;
  int experts, top_k, renormalize;
  const int32_t *valid_count;
  int32_t *index, *aux_count, *load;
  float *partial;   /* [gridDim.x, E] */
  float *z_partial; /* [gridDim.x], or NULL */
};

/* A lane's share of one token: experts lane, lane + 32, ... ; p = softmax. Returns logsumexp, to
 * all lanes. A NaN stands last in the choice (its token must still go somewhere, so that the loss
 * shows it) and makes all p NaN. */
template <int N>
__device__ __forceinline__ float softmax_lane(const float *logits, int experts, float (&z)[N],
                                              float (&p)[N]) {
  int lane = threadIdx.x % 32;
  float top = -INFINITY, sum = 0;
#pragma unroll
  for (int n = 0; n < N; n++) {
    z[n] = lane + 32 * n < experts ? logits[lane + 32 * n] : -INFINITY;
    top = fmaxf(top, z[n]);
  }
  top = warp_max(top);
#pragma unroll
  for (int n = 0; n < N; n++) {
    p[n] = lane + 32 * n < experts ? expf(z[n] - top) : 0.0f;
    sum += p[n];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int n = 0; n < N; n++) p[n] /= sum;
  return top + logf(sum);
}

/* The expert with the largest logit that is not in `taken` (bit n: this lane's n-th), ties to the
 * lower index; *prob is its p. */
template <int N>
__device__ __forceinline__ int choose(const float (&z)[N], const float (&p)[N], int experts,
                                      unsigned taken, float *prob) {
  float best = -INFINITY, best_p = 0;
  int at = INT32_MAX;
#pragma unroll
  for (int n = 0; n < N; n++) {
    int e = (int)(threadIdx.x % 32) + 32 * n;
    if (e >= experts || (taken >> n & 1)) continue;
    float value = isnan(z[n]) ? -INFINITY : z[n];
    if (at != INT32_MAX && !(value > best)) continue;
    best = value, at = e, best_p = p[n];
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    float value = __shfl_xor_sync(0xffffffffu, best, i);
    float value_p = __shfl_xor_sync(0xffffffffu, best_p, i);
    int e = __shfl_xor_sync(0xffffffffu, at, i);
    if (value > best || (value == best && e < at)) best = value, at = e, best_p = value_p;
  }
  *prob = best_p;
  return at;
}

/* One warp a token; N * 32 experts at most. Warps take tokens in turn, and a block's sums of p are
 * added in the order of its warps. */
template <int N>
__global__ void __launch_bounds__(32 * ROUTE_WARPS)
    route(struct mat<const float> logits, struct mat<float> prob, struct route_rows r) {
  __shared__ int32_t count[MT_OPS_MAX_EXPERTS];
  __shared__ float aux[ROUTE_WARPS][32 * N], aux_z[ROUTE_WARPS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total[N] = {0}, total_z = 0;
  for (int e = threadIdx.x; e < r.experts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  for (int64_t t = (int64_t)blockIdx.x * ROUTE_WARPS + warp; t < r.tokens;
       t += (int64_t)gridDim.x * ROUTE_WARPS) {
    int32_t mine = -1;
    float mine_p = 0, chosen = 0;
    if (t < *r.valid_count) {
      float z[N], p[N];
      unsigned taken = 0;
      float lse = softmax_lane<N>(row_of(logits, t), r.experts, z, p);
      total_z += lse * lse;
#pragma unroll
      for (int n = 0; n < N; n++) total[n] += p[n];
      for (int k = 0; k < r.top_k; k++) {
        float pk;
        int e = choose<N>(z, p, r.experts, taken, &pk);
        if (e % 32 == lane) taken |= 1u << e / 32;
        if (lane == k) mine = e, mine_p = pk;
        chosen += pk;
      }
      if (r.renormalize) mine_p /= chosen;
    }
    if (lane >= r.top_k) continue;
    r.index[t * r.top_k + lane] = mine;
    row_of(prob, t)[lane] = mine_p;
    if (mine >= 0) atomicAdd(&count[mine], 1);
  }
#pragma unroll
  for (int n = 0; n < N; n++) aux[warp][lane + 32 * n] = total[n];
  if (lane == 0) aux_z[warp] = total_z;
  __syncthreads();
  if (threadIdx.x == 0 && r.z_partial) {
    float sum = 0;
    for (int w = 0; w < ROUTE_WARPS; w++) sum += aux_z[w];
    r.z_partial[blockIdx.x] = sum;
  }
  for (int e = threadIdx.x; e < r.experts; e += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < ROUTE_WARPS; w++) sum += aux[w][e];
    r.partial[(int64_t)blockIdx.x * r.experts + e] = sum;
    if (count[e] == 0) continue;
    atomicAdd(&r.load[e], count[e]);
    atomicAdd(&r.aux_count[e], count[e]);
  }
}

static mt_err logits_launch(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  int64_t t = a->x.dim[0], h = a->x.dim[1], e = a->w.dim[0];
  dim3 grid((unsigned)div_up(t, LOGIT_WARPS * LOGIT_TOKENS), (unsigned)groups_of(e));
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->x) && rows_wide(&a->w), {
      router_logits<T, V><<<grid, 32 * LOGIT_WARPS, 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->x), mat_of<const T>(&a->w), a->valid_count, t, h, (int)e,
          mat_of<float>(&a->logits));
    });
  });
  return mt_cuda_launched("router_fwd");
}

extern "C" mt_err mt_cuda_router_fwd(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  MT_TRY(mt_check_router_fwd(a));
  MT_TRY(mt_cuda_format("router_fwd", &a->x));
  int64_t t = a->x.dim[0], e = a->w.dim[0];
  cudaStream_t s = mt_cuda_of(be)->stream;
  MT_TRY(mt_cuda_check(cudaMemsetAsync(a->load, 0, (size_t)e * sizeof(int32_t), s),
                       "router_fwd: zeroing the load"));
  if (t == 0) return MT_OK;
  MT_TRY(logits_launch(be, a));
  int64_t blocks = div_up(t, ROUTE_WARPS);
  if (blocks > ROUTE_BLOCKS) blocks = ROUTE_BLOCKS;
  void *partial;
  MT_TRY(mt_cuda_scratch(be, "router_fwd", (size_t)(blocks * (e + 1)) * sizeof(float), &partial));
  struct route_rows r = {t,
                         (int)e,
                         (int)a->prob.dim[1],
                         a->renormalize,
                         a->valid_count,
                         a->index,
                         a->aux_count,
                         a->load,
                         (float *)partial,
                         a->z_sum.data ? (float *)partial + blocks * e : NULL};
  struct mat<const float> logits = mat_of<const float>(&a->logits);
  struct mat<float> prob = mat_of<float>(&a->prob);
  if (e <= 32) {
    route<1><<<(unsigned)blocks, 32 * ROUTE_WARPS, 0, s>>>(logits, prob, r);
  } else if (e <= 128) {
    route<4><<<(unsigned)blocks, 32 * ROUTE_WARPS, 0, s>>>(logits, prob, r);
  } else {
    route<16><<<(unsigned)blocks, 32 * ROUTE_WARPS, 0, s>>>(logits, prob, r);
  }
  MT_TRY(mt_cuda_launched("router_fwd"));
  if (r.z_partial) MT_TRY(sum_columns(be, "router_fwd", r.z_partial, (int)blocks, &a->z_sum, 1));
  return sum_columns(be, "router_fwd", r.partial, (int)blocks, &a->aux_prob, 1);
}

enum { AUX_THREADS = 256 };

struct z_loss {
  const float *sum, *coef; /* sum NULL: none */
  float *loss, *grad;
};

__global__ void __launch_bounds__(AUX_THREADS)
    aux_loss_all(const float *aux_prob, const int32_t *aux_count, const int32_t *valid_count,
                 int layer_count, const float *coef, int64_t experts, float *loss, float *grad,
                 struct z_loss z) {
  __shared__ double shared[AUX_THREADS];
  double rows = fmax(1.0, (double)layer_count * (double)*valid_count), sum = 0;
  for (int64_t e = threadIdx.x; e < experts; e += AUX_THREADS) {
    double f = (double)aux_count[e] / rows;
    sum += f * (double)aux_prob[e] / rows;
    grad[e] = (float)((double)*coef * (double)experts * f / rows);
  }
  shared[threadIdx.x] = sum;
  for (int n = AUX_THREADS / 2; n > 0; n /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < n) shared[threadIdx.x] += shared[threadIdx.x + n];
  }
  if (threadIdx.x != 0) return;
  *loss = (float)((double)experts * shared[0]);
  if (!z.sum) return;
  *z.loss = (float)((double)*z.sum / rows);
  *z.grad = (float)(2 * (double)*z.coef / rows);
}

extern "C" mt_err mt_cuda_aux_loss(struct mt_backend *be, const struct mt_aux_loss_args *a) {
  MT_TRY(mt_check_aux_loss(a));
  MT_TRY(mt_cuda_format("aux_loss", &a->aux_prob));
  struct z_loss z = {(const float *)a->z_sum.data, a->z_coef, (float *)a->z_loss.data,
                     (float *)a->z_grad.data};
  aux_loss_all<<<1, AUX_THREADS, 0, mt_cuda_of(be)->stream>>>(
      (const float *)a->aux_prob.data, a->aux_count, a->valid_count, a->layer_count, a->coef,
      a->aux_prob.dim[0], (float *)a->loss.data, (float *)a->grad.data, z);
  return mt_cuda_launched("aux_loss");
}

struct dlogit_rows {
  int64_t tokens;
  int experts, top_k, renormalize;
  const int32_t *valid_count, *index;
  const float *aux_grad; /* [E] or NULL */
  const float *z_grad;   /* [1] or NULL */
};

/* One warp a token. With s = softmax and C the chosen, renormalised p_k = s_k / S(C):
 * ds_k = (dp_k - sum_j dp_j p_j) / S for k in C (else dp_k), plus aux_grad on every s;
 * dlogits_i = s_i (ds_i - sum_j s_j ds_j + z_grad logsumexp). */
template <int N>
__global__ void __launch_bounds__(32 * ROUTE_WARPS)
    router_dlogits(struct mat<const float> logits, struct mat<const float> prob,
                   struct mat<const float> dprob, struct mat<float> dlogits, struct dlogit_rows r) {
  int lane = threadIdx.x % 32;
  int64_t t = (int64_t)blockIdx.x * ROUTE_WARPS + threadIdx.x / 32;
  if (t >= r.tokens) return;
  float z[N], s[N], ds[N], out[N] = {0};
  if (t < *r.valid_count) {
    float lse = softmax_lane<N>(row_of(logits, t), r.experts, z, s);
#pragma unroll
    for (int n = 0; n < N; n++) {
      int e = lane + 32 * n;
      ds[n] = r.aux_grad && e < r.experts ? r.aux_grad[e] : 0.0f;
    }
    bool has = lane < r.top_k;
    int32_t mine = has ? r.index[t * r.top_k + lane] : -1;
    float dp = has ? row_of(dprob, t)[lane] : 0.0f, chosen = 0, dot = 0;
    float mean = warp_sum(has ? dp * row_of(prob, t)[lane] : 0.0f);
    for (int k = 0; k < r.top_k; k++) {
      int32_t e = __shfl_sync(0xffffffffu, mine, k);
#pragma unroll
      for (int n = 0; n < N; n++) chosen += e == lane + 32 * n ? s[n] : 0.0f;
    }
    chosen = warp_sum(chosen);
    for (int k = 0; k < r.top_k; k++) {
      int32_t e = __shfl_sync(0xffffffffu, mine, k);
      float dk = __shfl_sync(0xffffffffu, dp, k);
      if (r.renormalize) dk = (dk - mean) / chosen;
#pragma unroll
      for (int n = 0; n < N; n++) ds[n] += e == lane + 32 * n ? dk : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < N; n++) dot += s[n] * ds[n];
    dot = warp_sum(dot);
    if (r.z_grad) dot -= *r.z_grad * lse;
#pragma unroll
    for (int n = 0; n < N; n++) out[n] = s[n] * (ds[n] - dot);
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    if (lane + 32 * n < r.experts) row_of(dlogits, t)[lane + 32 * n] = out[n];
  }
}

/* dx[t, i] (acc) = sum over e of dlogits[t,e] w[e,i]: DX_TOKENS tokens by a block, V columns a
 * thread. */
template <class T, int V>
__global__ void __launch_bounds__(COLUMN_THREADS)
    router_dx(struct mat<const float> dlogits, struct mat<const T> w, struct mat<T> dx,
              int64_t tokens, int64_t h, int experts, int accumulate) {
  __shared__ float d[MT_OPS_MAX_EXPERTS][DX_TOKENS];
  int64_t t0 = (int64_t)blockIdx.x * DX_TOKENS;
  for (int k = threadIdx.x; k < experts * DX_TOKENS; k += COLUMN_THREADS) {
    int e = k % experts, t = k / experts;
    d[e][t] = t0 + t < tokens ? row_of(dlogits, t0 + t)[e] : 0.0f;
  }
  __syncthreads();
  int64_t i = ((int64_t)blockIdx.y * COLUMN_THREADS + threadIdx.x) * V;
  if (i >= h) return;
  float sum[DX_TOKENS][V] = {{0}};
#pragma unroll 2
  for (int e = 0; e < experts; e++) {
    float vw[V];
    load_floats<T, V>(row_of(w, e) + i, vw);
#pragma unroll
    for (int t = 0; t < DX_TOKENS; t++) {
#pragma unroll
      for (int j = 0; j < V; j++) sum[t][j] += d[e][t] * vw[j];
    }
  }
#pragma unroll
  for (int t = 0; t < DX_TOKENS; t++) {
    if (t0 + t >= tokens) continue;
    T *to = row_of(dx, t0 + t) + i;
    if (accumulate) {
      float old[V];
      load_floats<T, V>(to, old);
#pragma unroll
      for (int j = 0; j < V; j++) sum[t][j] += old[j];
    }
    store_row<T, V>(to, sum[t]);
  }
}

struct dw_rows {
  const int32_t *valid_count;
  int64_t tokens, h, each; /* each: tokens of a part */
  int experts;
  float *partial; /* [parts, E, H] */
};

/* Part blockIdx.z of dw[e, i] = sum over t of dlogits[t,e] x[t,i] for GROUP experts (blockIdx.x:
 * neighbours share x in the L2), V columns a thread. */
template <class T, int V>
__global__ void __launch_bounds__(COLUMN_THREADS)
    router_dw(struct mat<const float> dlogits, struct mat<const T> x, struct dw_rows r) {
  __shared__ float d[DW_TOKENS][GROUP];
  int first_expert = blockIdx.x * GROUP;
  int64_t i = ((int64_t)blockIdx.y * COLUMN_THREADS + threadIdx.x) * V;
  int64_t begin = blockIdx.z * r.each, end = begin + r.each;
  int64_t valid = *r.valid_count < r.tokens ? *r.valid_count : r.tokens;
  if (end > valid) end = valid;
  float sum[GROUP][V] = {{0}};
  for (int64_t base = begin; base < end; base += DW_TOKENS) {
    int count = (int)(end - base < DW_TOKENS ? end - base : DW_TOKENS);
    __syncthreads();
    for (int k = threadIdx.x; k < count * GROUP; k += COLUMN_THREADS) {
      int e = first_expert + k % GROUP;
      d[k / GROUP][k % GROUP] = e < r.experts ? row_of(dlogits, base + k / GROUP)[e] : 0.0f;
    }
    __syncthreads();
    if (i >= r.h) continue;
#pragma unroll 4
    for (int t = 0; t < count; t++) {
      float vx[V];
      load_floats<T, V>(row_of(x, base + t) + i, vx);
#pragma unroll
      for (int e = 0; e < GROUP; e++) {
#pragma unroll
        for (int j = 0; j < V; j++) sum[e][j] += d[t][e] * vx[j];
      }
    }
  }
  if (i >= r.h) return;
#pragma unroll
  for (int e = 0; e < GROUP; e++) {
    if (first_expert + e >= r.experts) continue;
    store_stats<V>(r.partial + ((int64_t)blockIdx.z * r.experts + first_expert + e) * r.h + i,
                   sum[e]);
  }
}

static mt_err dlogits_launch(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  int64_t t = a->x.dim[0], e = a->w.dim[0];
  unsigned blocks = (unsigned)div_up(t, ROUTE_WARPS);
  cudaStream_t s = mt_cuda_of(be)->stream;
  struct dlogit_rows r = {t,
                          (int)e,
                          (int)a->prob.dim[1],
                          a->renormalize,
                          a->valid_count,
                          a->index,
                          (const float *)a->aux_grad.data,
                          (const float *)a->z_grad.data};
  struct mat<const float> logits = mat_of<const float>(&a->logits);
  struct mat<const float> prob = mat_of<const float>(&a->prob);
  struct mat<const float> dprob = mat_of<const float>(&a->dprob);
  struct mat<float> dlogits = mat_of<float>(&a->dlogits);
  if (e <= 32) {
    router_dlogits<1><<<blocks, 32 * ROUTE_WARPS, 0, s>>>(logits, prob, dprob, dlogits, r);
  } else if (e <= 128) {
    router_dlogits<4><<<blocks, 32 * ROUTE_WARPS, 0, s>>>(logits, prob, dprob, dlogits, r);
  } else {
    router_dlogits<16><<<blocks, 32 * ROUTE_WARPS, 0, s>>>(logits, prob, dprob, dlogits, r);
  }
  return mt_cuda_launched("router_bwd");
}

static mt_err dx_launch(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  int64_t t = a->x.dim[0], h = a->x.dim[1];
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->w) && rows_wide(&a->dx), {
      dim3 grid((unsigned)div_up(t, DX_TOKENS), (unsigned)div_up(h, COLUMN_THREADS * V));
      router_dx<T, V><<<grid, COLUMN_THREADS, 0, mt_cuda_of(be)->stream>>>(
          mat_of<const float>(&a->dlogits), mat_of<const T>(&a->w), mat_of<T>(&a->dx), t, h,
          (int)a->w.dim[0], a->accumulate_dx);
    });
  });
  return mt_cuda_launched("router_bwd");
}

static mt_err dw_launch(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  int64_t t = a->x.dim[0], h = a->x.dim[1], e = a->w.dim[0];
  int parts = dw_parts(e);
  void *partial;
  MT_TRY(mt_cuda_scratch(be, "router_bwd", (size_t)(parts * e * h) * sizeof(float), &partial));
  struct dw_rows r = {a->valid_count, t, h, div_up(t, parts), (int)e, (float *)partial};
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->x), {
      dim3 grid((unsigned)groups_of(e), (unsigned)div_up(h, COLUMN_THREADS * V), (unsigned)parts);
      router_dw<T, V><<<grid, COLUMN_THREADS, 0, mt_cuda_of(be)->stream>>>(
          mat_of<const float>(&a->dlogits), mat_of<const T>(&a->x), r);
    });
  });
  MT_TRY(mt_cuda_launched("router_bwd"));
  return sum_columns(be, "router_bwd", r.partial, parts, &a->dw, a->accumulate);
}

extern "C" mt_err mt_cuda_router_bwd(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  MT_TRY(mt_check_router_bwd(a));
  MT_TRY(mt_cuda_format("router_bwd", &a->x));
  int64_t t = a->x.dim[0], h = a->x.dim[1], e = a->w.dim[0], k = a->prob.dim[1];
  if (e > MT_OPS_MAX_EXPERTS || k > MT_OPS_MAX_TOP_K) {
    return mt_fail(MT_ESHAPE, "router_bwd: top %lld of %lld experts", (long long)k, (long long)e);
  }
  if (h == 0 || e == 0) return MT_OK;
  if (t > 0) {
    MT_TRY(dlogits_launch(be, a));
    MT_TRY(dx_launch(be, a));
  }
  return a->dw.data ? dw_launch(be, a) : MT_OK;
}
