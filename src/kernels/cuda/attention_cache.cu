/* Decoding: a few queries against a long cache. The cache is read once for all queries of a group
 * and bounds the time, so it is cut into parts that run side by side, each with its own softmax;
 * a second kernel joins them in order ("Flash-Decoding", Dao et al. 2023). */
#include "kernels/cuda/attention.cuh"

namespace {

enum {
  THREADS = 128,
  WARPS = THREADS / 32,
  UNROLL = 4,           /* keys of a lane in flight */
  KEYS_LEAST = 32,      /* of a part */
  PARTS_MOST = 128,     /* of a query */
  BLOCKS_WANTED = 1024, /* a constant, not the chip's: the parts decide the bits of the sum */
  JOIN_THREADS = 128
};
static_assert(JOIN_THREADS >= (int)ATTENTION_HEAD_DIM_MOST && JOIN_THREADS >= PARTS_MOST,
              "one each");

struct cuts {
  int parts, head_chunks;
};

/* Values of one part: the sums [d], the largest logit, the denominator. */
__host__ __device__ inline int64_t part_floats(int64_t d) {
  return d + 2;
}

template <class T>
__device__ __forceinline__ void load_eight(float (&x)[8], const T *p, int col,
                                           const struct attention_call &c) {
  if (c.aligned) {
    load_floats<T, wide<T>>(p + col, *reinterpret_cast<float(*)[wide<T>]>(x));
    if (wide<T> == 4)
      load_floats<T, wide<T>>(p + col + 4, *reinterpret_cast<float(*)[wide<T>]>(x + 4));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = col + i < c.d ? to_float(p[col + i]) : 0.0f;
  }
}

/* The softmax of R queries over some keys: columns [8] of this lane, largest logit, denominator. */
template <int R> struct state { float o[R][8], top[R], sum[R]; };

template <int R>
__device__ __forceinline__ void join(struct state<R> &a, int h, float top, float sum,
                                     const float (&o)[8]) {
  float next = fmaxf(a.top[h], top), base = next == -INFINITY ? 0.0f : next;
  float mine = expf(a.top[h] - base), other = expf(top - base);
  a.top[h] = next;
  a.sum[h] = a.sum[h] * mine + sum * other;
#pragma unroll
  for (int i = 0; i < 8; i++) a.o[h][i] = a.o[h][i] * mine + o[i] * other;
}

/* UNROLL keys from `key` on, `step` apart, those below `end`. lanes: of one key, each with 8
 * columns. */
template <class T, int R>
__device__ __forceinline__ void take_keys(struct state<R> &a, const float (&q)[R][8], const T *k,
                                          const T *v, int key, int step, int end, int lanes,
                                          int col, const struct attention_call &c) {
  float x[UNROLL][8], y[UNROLL][8], s[UNROLL][R];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    bool real = key + u * step < end && col < c.d;
    int64_t at = real ? (key + u * step) * c.kv_ld : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) x[u][i] = y[u][i] = 0.0f;
    if (real) load_eight<T>(x[u], k + at, col, c);
    if (real) load_eight<T>(y[u], v + at, col, c);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
#pragma unroll
    for (int h = 0; h < R; h++) {
      s[u][h] = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) s[u][h] += q[h][i] * x[u][i];
      for (int n = lanes / 2; n > 0; n /= 2) s[u][h] += __shfl_xor_sync(0xffffffffu, s[u][h], n);
      s[u][h] = key + u * step < end ? s[u][h] * c.scale : -INFINITY;
    }
  }
#pragma unroll
  for (int h = 0; h < R; h++) {
    float next = a.top[h];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) next = fmaxf(next, s[u][h]);
    float base = next == -INFINITY ? 0.0f : next, shrink = expf(a.top[h] - base);
    a.top[h] = next;
    a.sum[h] *= shrink;
#pragma unroll
    for (int i = 0; i < 8; i++) a.o[h][i] *= shrink;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float p = expf(s[u][h] - base);
      a.sum[h] += p;
#pragma unroll
      for (int i = 0; i < 8; i++) a.o[h][i] += p * y[u][i];
    }
  }
}

/* Grid: (parts, groups * head_chunks, T). */
template <class T, int R>
__global__ void __launch_bounds__(THREADS)
    decode_part(const struct attention_call c, const struct cuts cut, float *parts) {
  __shared__ float shared[WARPS][R][ATTENTION_HEAD_DIM_MOST + 2];
  int g = blockIdx.y / cut.head_chunks, h0 = blockIdx.y % cut.head_chunks * R, t = blockIdx.z;
  int lanes = 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  while (lanes * 8 < c.d) lanes *= 2;
  int col = lane % lanes * 8, lo, hi;
  attention_keys(c.offset + t, c.offset + t, c.window, &lo, &hi);
  int size = (hi - lo + cut.parts - 1) / cut.parts;
  int begin = lo + blockIdx.x * size, end = min(hi, begin + size);
  const T *k = (const T *)c.k + g * c.kv_group, *v = (const T *)c.v + g * c.kv_group;
  float q[R][8] = {};
  struct state<R> a = {};
#pragma unroll
  for (int h = 0; h < R; h++) {
    a.top[h] = -INFINITY;
    if (h0 + h < c.r && col < c.d)
      load_eight<T>(q[h], (const T *)c.q + t * c.q_ld + g * c.q_group + (h0 + h) * c.d, col, c);
  }
  int per_warp = 32 / lanes, step = per_warp * WARPS;
  /* The bound is the warp's: lanes of keys past the end take part in the sums. */
  for (int key = begin + warp * per_warp; key < end; key += step * UNROLL) {
    take_keys<T, R>(a, q, k, v, key + lane / lanes, step, end, lanes, col, c);
  }
#pragma unroll
  for (int h = 0; h < R; h++) {
    for (int n = lanes; n < 32; n *= 2) {
      float o[8];
#pragma unroll
      for (int i = 0; i < 8; i++) o[i] = __shfl_xor_sync(0xffffffffu, a.o[h][i], n);
      join<R>(a, h, __shfl_xor_sync(0xffffffffu, a.top[h], n),
              __shfl_xor_sync(0xffffffffu, a.sum[h], n), o);
    }
    if (lane >= lanes) continue;
    for (int i = 0; i < 8 && col + i < c.d; i++) shared[warp][h][col + i] = a.o[h][i];
    if (lane == 0) shared[warp][h][c.d] = a.top[h];
    if (lane == 0) shared[warp][h][c.d + 1] = a.sum[h];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < R * (c.d + 2); i += THREADS) {
    int h = i / (c.d + 2), n = i % (c.d + 2);
    if (h0 + h >= c.r) continue;
    float top = -INFINITY, sum = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared[w][h][c.d]);
    float base = top == -INFINITY ? 0.0f : top;
    for (int w = 0; w < WARPS; w++) sum += shared[w][h][n] * expf(shared[w][h][c.d] - base);
    int64_t head = (int64_t)t * c.kv_heads * c.r + g * c.r + h0 + h;
    parts[(head * cut.parts + blockIdx.x) * part_floats(c.d) + n] = n == c.d ? top : sum;
  }
}

/* Grid: (heads, T). A thread has a part, then a column. */
template <class T>
__global__ void __launch_bounds__(JOIN_THREADS)
    decode_join(const struct attention_call c, const struct cuts cut, const float *parts) {
  __shared__ float share[PARTS_MOST], tops[JOIN_THREADS / 32], sums[33];
  int64_t head = (int64_t)blockIdx.y * gridDim.x + blockIdx.x, width = part_floats(c.d);
  const float *p = parts + head * cut.parts * width;
  int i = threadIdx.x;
  float mine = i < cut.parts ? p[i * width + c.d] : -INFINITY, top = warp_max(mine);
  if (i % 32 == 0) tops[i / 32] = top;
  __syncthreads();
  for (int w = 0; w < JOIN_THREADS / 32; w++) top = fmaxf(top, tops[w]);
  float x = i < cut.parts ? expf(mine - top) : 0.0f;
  if (i < cut.parts) share[i] = x;
  float sum = block_sum(i < cut.parts ? x * p[i * width + c.d + 1] : 0.0f, sums), o = 0;
  if (i >= c.d) return;
#pragma unroll 8
  for (int n = 0; n < cut.parts; n++) o += share[n] * p[n * width + i];
  ((T *)c.out)[blockIdx.y * c.out_ld + blockIdx.x * c.d + i] = from_float<T>(o / sum);
}

template <class T, int R>
mt_err run(struct mt_cuda *cuda, const struct attention_call *c, float *parts) {
  struct cuts cut = {1, (c->r + R - 1) / R};
  int span = c->offset + c->rows;
  if (c->window > 0 && c->window < span) span = c->window;
  int blocks = c->kv_heads * cut.head_chunks * c->rows;
  while (cut.parts < PARTS_MOST && cut.parts * KEYS_LEAST < span &&
         cut.parts * blocks < BLOCKS_WANTED)
    cut.parts *= 2;
  dim3 grid((unsigned)cut.parts, (unsigned)(c->kv_heads * cut.head_chunks), (unsigned)c->rows);
  decode_part<T, R><<<grid, THREADS, 0, cuda->stream>>>(*c, cut, parts);
  MT_TRY(mt_cuda_launched("attention_cache"));
  dim3 heads((unsigned)(c->kv_heads * c->r), (unsigned)c->rows);
  decode_join<T><<<heads, JOIN_THREADS, 0, cuda->stream>>>(*c, cut, parts);
  return mt_cuda_launched("attention_cache");
}

} // namespace

/* The doubling of parts stops at BLOCKS_WANTED blocks of at most r queries each, or begins past it
 * with one part. */
size_t mt_cuda_attention_decode_bytes(int64_t heads, int64_t kv_heads, int64_t d) {
  int64_t r = kv_heads > 0 ? heads / kv_heads : 1;
  int64_t queries = 2 * BLOCKS_WANTED * (r < 8 ? r : 8) + ATTENTION_DECODE_ROWS_MOST * heads;
  return (size_t)(queries * part_floats(d)) * sizeof(float);
}

mt_err mt_cuda_attention_decode(struct mt_cuda *cuda, const struct attention_call *c,
                                enum mt_dtype dtype, float *parts) {
  MT_CUDA_BY_FORMAT(dtype, {
    if (c->r == 1) return run<T, 1>(cuda, c, parts);
    if (c->r == 2) return run<T, 2>(cuda, c, parts);
    if (c->r <= 4) return run<T, 4>(cuda, c, parts);
    return run<T, 8>(cuda, c, parts);
  });
}
