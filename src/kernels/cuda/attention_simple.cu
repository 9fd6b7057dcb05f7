/* Attention in float32 on the ordinary units: exact enough for F32 (no TF32), for any head
 * dimension and alignment. Tiles of keys pass through shared memory under an online softmax
 * (Milakov & Gimelshein 2018); backward works the probabilities out again from lse (Dao 2023,
 * arXiv:2307.08691, section 3.1), once for dK and dV and once for dQ, so that every sum has one
 * owner and one order.
 *
 * 256 threads as 16 x 16. DP: head dimension padded with zeros to 64 or 128. */
#include "kernels/cuda/attention.cuh"

namespace {

enum { THREADS = 256, KEYS = 32 };

/* ROWS rows of a head into shared memory as float32, zeros past `rows` and past d. */
template <int ROWS, int DP, class T>
__device__ __forceinline__ void load_tile(float *dst, int stride, const T *src, int64_t ld,
                                          int rows, const struct attention_call &c) {
  for (int i = threadIdx.x; i < ROWS * (DP / 4); i += THREADS) {
    int row = i / (DP / 4), col = i % (DP / 4) * 4;
    float x[4] = {0, 0, 0, 0};
    if (row < rows && col < c.d) {
      const T *p = src + row * ld + col;
      if (c.aligned) {
        load_floats<T, 4>(p, x);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = col + j < c.d ? to_float(p[j]) : 0.0f;
      }
    }
    *reinterpret_cast<float4 *>(dst + row * stride + col) = make_float4(x[0], x[1], x[2], x[3]);
  }
}

/* Columns tx*4 + 64*j of one row. */
template <int DP, class T>
__device__ __forceinline__ void store_row(T *dst, const float *x, float factor, int tx,
                                          const struct attention_call &c) {
#pragma unroll
  for (int j = 0; j < DP / 64; j++) {
    int col = tx * 4 + 64 * j;
    float y[4];
#pragma unroll
    for (int n = 0; n < 4; n++) y[n] = x[j * 4 + n] * factor;
    if (col >= c.d) continue;
    if (c.aligned) {
      store_floats<T, 4>(dst + col, y);
    } else {
      for (int n = 0; n < 4 && col + n < c.d; n++) dst[col + n] = from_float<T>(y[n]);
    }
  }
}

/* acc[i][j] += a row (a0 + i * a_step) . b row (b0 + j * 16), DP wide. */
template <int DP, int MA, int MB>
__device__ __forceinline__ void dots(float (&acc)[MA][MB], const float *a, int a_step,
                                     const float *b, int b_step) {
#pragma unroll 4
  for (int k = 0; k < DP; k += 4) {
    float4 x[MA], y[MB];
#pragma unroll
    for (int i = 0; i < MA; i++) x[i] = *reinterpret_cast<const float4 *>(a + i * a_step + k);
#pragma unroll
    for (int j = 0; j < MB; j++) y[j] = *reinterpret_cast<const float4 *>(b + j * b_step + k);
#pragma unroll
    for (int i = 0; i < MA; i++) {
#pragma unroll
      for (int j = 0; j < MB; j++) {
        acc[i][j] += x[i].x * y[j].x;
        acc[i][j] += x[i].y * y[j].y;
        acc[i][j] += x[i].z * y[j].z;
        acc[i][j] += x[i].w * y[j].w;
      }
    }
  }
}

/* acc[i][...] += w[i] * row[columns of this thread]. */
template <int DP, int M>
__device__ __forceinline__ void add_row(float (&acc)[M][DP / 16], const float (&w)[M],
                                        const float *row, int tx) {
#pragma unroll
  for (int j = 0; j < DP / 64; j++) {
    float4 v = *reinterpret_cast<const float4 *>(row + tx * 4 + 64 * j);
#pragma unroll
    for (int i = 0; i < M; i++) {
      acc[i][j * 4 + 0] += w[i] * v.x;
      acc[i][j * 4 + 1] += w[i] * v.y;
      acc[i][j * 4 + 2] += w[i] * v.z;
      acc[i][j * 4 + 3] += w[i] * v.w;
    }
  }
}

template <int DP>
__device__ __forceinline__ void add_all(float (&acc)[2][DP / 16], const float (&x)[2][DP / 16]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int n = 0; n < DP / 16; n++) acc[i][n] += x[i][n];
  }
}

template <int DP> struct fwd_shared {
  float q[ATTENTION_SIMPLE_FWD_TILE][DP];
  float k[KEYS][DP + 4]; /* 16 threads read 16 rows: 4 floats keep them in different banks */
  float v[KEYS][DP];
  float p[ATTENTION_SIMPLE_FWD_TILE][KEYS + 4];
};

/* Grid: tiles of queries x heads. Thread: queries ty*4 + i, keys tx + 16 j, columns as above. */
template <class T, int DP>
__global__ void __launch_bounds__(THREADS) simple_fwd(const struct attention_call c) {
  enum { BM = ATTENTION_SIMPLE_FWD_TILE };
  extern __shared__ float4 raw[];
  auto &sh = *reinterpret_cast<fwd_shared<DP> *>(raw);
  struct attention_item item;
  int heads = c.kv_heads * c.r;
  if (!attention_item_of<BM>(c, blockIdx.x / heads, true, &item)) return;
  int head = blockIdx.x % heads, g = head / c.r, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int row0 = item.tile * BM, rows = min(BM, item.count - row0), first = c.offset + row0, lo, hi;
  attention_keys(first, first + rows - 1, c.window, &lo, &hi);
  load_tile<BM, DP>(
      sh.q[0], DP, (const T *)c.q + (item.begin + row0) * c.q_ld + g * c.q_group + head % c.r * c.d,
      c.q_ld, rows, c);
  const T *k = (const T *)c.k + item.begin * c.kv_ld + g * c.kv_group;
  const T *v = (const T *)c.v + item.begin * c.kv_ld + g * c.kv_group;
  float o[4][DP / 16] = {}, top[4], sum[4] = {};
  for (int i = 0; i < 4; i++) top[i] = -INFINITY;
  for (int key0 = lo / KEYS * KEYS; key0 < hi; key0 += KEYS) {
    __syncthreads();
    load_tile<KEYS, DP>(sh.k[0], DP + 4, k + key0 * c.kv_ld, c.kv_ld, hi - key0, c);
    load_tile<KEYS, DP>(sh.v[0], DP, v + key0 * c.kv_ld, c.kv_ld, hi - key0, c);
    __syncthreads();
    float s[4][2] = {};
    dots<DP>(s, sh.q[ty * 4], DP, sh.k[tx], 16 * (DP + 4));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        bool seen = attention_sees(first + ty * 4 + i, key0 + tx + 16 * j, c.window);
        s[i][j] = seen ? s[i][j] * c.scale : -INFINITY;
        most = fmaxf(most, s[i][j]);
      }
      for (int n = 8; n > 0; n /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, n));
      float next = fmaxf(top[i], most), base = next == -INFINITY ? 0.0f : next;
      float shrink = expf(top[i] - base), part = 0;
      top[i] = next;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float p = expf(s[i][j] - base);
        part += p;
        sh.p[ty * 4 + i][tx + 16 * j] = p;
      }
      for (int n = 8; n > 0; n /= 2) part += __shfl_xor_sync(0xffffffffu, part, n);
      sum[i] = sum[i] * shrink + part;
#pragma unroll
      for (int n = 0; n < DP / 16; n++) o[i][n] *= shrink;
    }
    __syncwarp(); /* a warp writes and reads its own rows of p */
    for (int key = 0; key < KEYS; key++) {
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = sh.p[ty * 4 + i][key];
      add_row<DP>(o, w, sh.v[key], tx);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = ty * 4 + i;
    if (row >= rows) continue;
    int64_t at = item.begin + row0 + row;
    store_row<DP>((T *)c.out + at * c.out_ld + head * c.d, o[i], 1.0f / sum[i], tx, c);
    if (c.lse && tx == 0) c.lse[at * c.lse_ld + head] = top[i] + logf(sum[i]);
  }
}

template <int DP> struct bwd_shared {
  float q[ATTENTION_SIMPLE_BWD_TILE][DP + 4], dout[ATTENTION_SIMPLE_BWD_TILE][DP + 4];
  float k[KEYS][DP + 4], v[KEYS][DP + 4];
  float p[ATTENTION_SIMPLE_BWD_TILE][KEYS + 2], ds[ATTENTION_SIMPLE_BWD_TILE][KEYS + 2];
};

/* A tile of queries of one head with its output gradients. */
template <class T, int DP>
__device__ __forceinline__ void load_queries(bwd_shared<DP> &sh, const struct attention_call &c,
                                             int head, int64_t row, int rows) {
  enum { BM = ATTENTION_SIMPLE_BWD_TILE };
  load_tile<BM, DP>(sh.q[0], DP + 4,
                    (const T *)c.q + row * c.q_ld + head / c.r * c.q_group + head % c.r * c.d,
                    c.q_ld, rows, c);
  load_tile<BM, DP>(sh.dout[0], DP + 4, (const T *)c.dout + row * c.dout_ld + head * c.d, c.dout_ld,
                    rows, c);
}

/* p and ds of queries ty + 16 i (positions from first, rows of them) against keys tx + 16 j
 * (positions from key0), into shared memory. row: the first query's in the packed row. */
template <int DP>
__device__ __forceinline__ void probabilities(bwd_shared<DP> &sh, const struct attention_call &c,
                                              int head, int64_t row, int rows, int first,
                                              int key0) {
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float s[2][2] = {}, dp[2][2] = {};
  dots<DP>(s, sh.q[ty], 16 * (DP + 4), sh.k[tx], 16 * (DP + 4));
  dots<DP>(dp, sh.dout[ty], 16 * (DP + 4), sh.v[tx], 16 * (DP + 4));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int n = ty + 16 * i;
    bool real = n < rows;
    float lse = real ? c.lse[(row + n) * c.lse_ld + head] : 0.0f;
    float delta = real ? c.delta[(row + n) * (c.kv_heads * c.r) + head] : 0.0f;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      bool seen = real && attention_sees(first + n, key0 + tx + 16 * j, c.window);
      float p = seen ? expf(s[i][j] * c.scale - lse) : 0.0f;
      sh.p[n][tx + 16 * j] = p;
      sh.ds[n][tx + 16 * j] = p * (dp[i][j] - delta);
    }
  }
}

/* Grid: tiles of keys x groups. Thread: keys ty*2 + i of the sums. */
template <class T, int DP>
__global__ void __launch_bounds__(THREADS) simple_dkv(const struct attention_call c) {
  enum { BM = ATTENTION_SIMPLE_BWD_TILE };
  extern __shared__ float4 raw[];
  auto &sh = *reinterpret_cast<bwd_shared<DP> *>(raw);
  struct attention_item item;
  if (!attention_item_of<KEYS>(c, blockIdx.x / c.kv_heads, false, &item)) return;
  int g = blockIdx.x % c.kv_heads, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int key0 = item.tile * KEYS, keys = min(KEYS, item.count - key0);
  int64_t at = item.begin + key0;
  load_tile<KEYS, DP>(sh.k[0], DP + 4, (const T *)c.k + at * c.kv_ld + g * c.kv_group, c.kv_ld,
                      keys, c);
  load_tile<KEYS, DP>(sh.v[0], DP + 4, (const T *)c.v + at * c.kv_ld + g * c.kv_group, c.kv_ld,
                      keys, c);
  int end = attention_queries_end(key0 + keys - 1, item.count, c.window);
  float dk[2][DP / 16] = {}, dv[2][DP / 16] = {};
  for (int q = 0; q < c.r; q++) {
    int head = g * c.r + q;
    for (int first = key0 / BM * BM; first < end; first += BM) {
      int rows = min(BM, item.count - first);
      __syncthreads();
      load_queries<T, DP>(sh, c, head, item.begin + first, rows);
      __syncthreads();
      probabilities<DP>(sh, c, head, item.begin + first, rows, first, key0);
      __syncthreads();
      /* Sums of a tile first: thousands of terms one by one would lose float32's last digits. */
      float tk[2][DP / 16] = {}, tv[2][DP / 16] = {};
      for (int n = 0; n < BM; n++) {
        float2 p = *reinterpret_cast<const float2 *>(&sh.p[n][ty * 2]);
        float2 ds = *reinterpret_cast<const float2 *>(&sh.ds[n][ty * 2]);
        add_row<DP>(tv, {p.x, p.y}, sh.dout[n], tx);
        add_row<DP>(tk, {ds.x, ds.y}, sh.q[n], tx);
      }
      add_all<DP>(dk, tk);
      add_all<DP>(dv, tv);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (ty * 2 + i >= keys) continue;
    int64_t to = (at + ty * 2 + i) * c.dqkv_ld + g * c.kv_group;
    store_row<DP>((T *)c.dk + to, dk[i], c.scale, tx, c);
    store_row<DP>((T *)c.dv + to, dv[i], 1.0f, tx, c);
  }
}

/* Grid: tiles of queries x heads. Thread: queries ty*2 + i of the sums. */
template <class T, int DP>
__global__ void __launch_bounds__(THREADS) simple_dq(const struct attention_call c) {
  enum { BM = ATTENTION_SIMPLE_BWD_TILE };
  extern __shared__ float4 raw[];
  auto &sh = *reinterpret_cast<bwd_shared<DP> *>(raw);
  struct attention_item item;
  int heads = c.kv_heads * c.r;
  if (!attention_item_of<BM>(c, blockIdx.x / heads, true, &item)) return;
  int head = blockIdx.x % heads, g = head / c.r, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int row0 = item.tile * BM, rows = min(BM, item.count - row0), lo, hi;
  int64_t at = item.begin + row0;
  load_queries<T, DP>(sh, c, head, at, rows);
  attention_keys(row0, row0 + rows - 1, c.window, &lo, &hi);
  const T *k = (const T *)c.k + item.begin * c.kv_ld + g * c.kv_group;
  const T *v = (const T *)c.v + item.begin * c.kv_ld + g * c.kv_group;
  float dq[2][DP / 16] = {};
  for (int key0 = lo / KEYS * KEYS; key0 < hi; key0 += KEYS) {
    __syncthreads();
    load_tile<KEYS, DP>(sh.k[0], DP + 4, k + key0 * c.kv_ld, c.kv_ld, hi - key0, c);
    load_tile<KEYS, DP>(sh.v[0], DP + 4, v + key0 * c.kv_ld, c.kv_ld, hi - key0, c);
    __syncthreads();
    probabilities<DP>(sh, c, head, at, rows, row0, key0);
    __syncthreads();
    float part[2][DP / 16] = {};
    for (int key = 0; key < KEYS; key++) {
      float w[2] = {sh.ds[ty * 2][key], sh.ds[ty * 2 + 1][key]};
      add_row<DP>(part, w, sh.k[key], tx);
    }
    add_all<DP>(dq, part);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (ty * 2 + i >= rows) continue;
    store_row<DP>((T *)c.dq + (at + ty * 2 + i) * c.dqkv_ld + g * c.q_group + head % c.r * c.d,
                  dq[i], c.scale, tx, c);
  }
}

template <class K>
mt_err launch(struct mt_cuda *cuda, K *kernel, int64_t grid, size_t shared_bytes, const char *op,
              const struct attention_call *c) {
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes),
      op));
  kernel<<<(unsigned)grid, THREADS, shared_bytes, cuda->stream>>>(*c);
  return mt_cuda_launched(op);
}

template <class T, int DP> mt_err backward(struct mt_cuda *cuda, const struct attention_call *c) {
  int64_t grid = (int64_t)c->item_grid * c->kv_heads;
  size_t bytes = sizeof(bwd_shared<DP>);
  MT_TRY(launch(cuda, simple_dkv<T, DP>, grid, bytes, "attention_bwd", c));
  return launch(cuda, simple_dq<T, DP>, grid * c->r, bytes, "attention_bwd", c);
}

} // namespace

mt_err mt_cuda_attention_simple_fwd(struct mt_cuda *cuda, const struct attention_call *c,
                                    enum mt_dtype dtype) {
  int64_t grid = (int64_t)c->item_grid * c->kv_heads * c->r;
  MT_CUDA_BY_FORMAT(dtype, {
    if (c->d <= 64)
      return launch(cuda, simple_fwd<T, 64>, grid, sizeof(fwd_shared<64>), "attention_fwd", c);
    return launch(cuda, simple_fwd<T, 128>, grid, sizeof(fwd_shared<128>), "attention_fwd", c);
  });
}

mt_err mt_cuda_attention_simple_bwd(struct mt_cuda *cuda, const struct attention_call *c,
                                    enum mt_dtype dtype) {
  MT_CUDA_BY_FORMAT(dtype, {
    if (c->d <= 64) return backward<T, 64>(cuda, c);
    return backward<T, 128>(cuda, c);
  });
}
