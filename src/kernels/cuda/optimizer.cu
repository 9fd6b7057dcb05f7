/* Norm of all gradients and AdamW: bound by memory, one pass each over many tensors. Kernels get
 * the tensors by value in their parameters, some at a time. Formulas: docs/math.md, "AdamW and
 * clipping". */
#include <math.h>

#include "kernels/cuda/rows.cuh"
#include "kernels/rounding.h"

enum { SUM_BLOCKS = MT_CUDA_PARTIALS, SUM_THREADS = 256, SUM_TENSORS = 128, SUM_TILE = 8192 };
enum { UPDATE_THREADS = 256, UPDATE_SEGMENTS = 48, UPDATE_TILE = 8192 };
/* Blocks that a multiprocessor must hold: arithmetic on random bits hides behind others' loads. */
enum { UPDATE_BLOCKS = 3 };

/* One float64 sum for each block. */
extern "C" size_t mt_cuda_optimizer_bytes(const struct mt_limits *l) {
  (void)l;
  return SUM_BLOCKS * sizeof(double);
}

struct sum_list {
  int count, more; /* more: earlier lists have left their sums in `partial` */
  double *partial; /* [SUM_BLOCKS] */
  const void *data[SUM_TENSORS];
  int64_t n[SUM_TENSORS];
  int64_t first_tile[SUM_TENSORS + 1];
  uint8_t is_bf16[SUM_TENSORS];
};

/* The list's entry that holds the tile: the last whose first tile is not past it. */
__device__ __forceinline__ int entry_of(const int64_t *first_tile, int count, int64_t tile) {
  int low = 0, high = count - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/* Squares in float64: a float32 one is infinite from 1.9e19 on, where the gradient is not. */
template <class T>
__device__ __forceinline__ double sum_tile(const T *x, int64_t begin, int64_t end) {
  constexpr int V = wide<T>;
  double sum = 0;
  int64_t whole = begin;
  if ((reinterpret_cast<uintptr_t>(x) & 15) == 0) { /* begin is a multiple of the tile */
    whole = begin + (end - begin) / V * V;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x * V; i < whole; i += SUM_THREADS * V) {
      float v[V];
      load_floats<T, V>(x + i, v);
#pragma unroll
      for (int j = 0; j < V; j++) sum += (double)v[j] * (double)v[j];
    }
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += SUM_THREADS) {
    sum += (double)to_float(x[i]) * (double)to_float(x[i]);
  }
  return sum;
}

/* The block's sum in thread 0, added up as a tree. */
template <int THREADS> __device__ double tree_sum(double x) {
  __shared__ double shared[THREADS];
  shared[threadIdx.x] = x;
  for (int n = THREADS / 2; n > 0; n /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < n) shared[threadIdx.x] += shared[threadIdx.x + n];
  }
  return threadIdx.x == 0 ? shared[0] : 0; /* another warp may still be adding */
}

/* Block b takes tiles b, b + SUM_BLOCKS and so on of the list. */
__global__ void __launch_bounds__(SUM_THREADS) sum_squares(const __grid_constant__ sum_list l) {
  double sum = 0;
  for (int64_t tile = blockIdx.x; tile < l.first_tile[l.count]; tile += SUM_BLOCKS) {
    int e = entry_of(l.first_tile, l.count, tile);
    int64_t begin = (tile - l.first_tile[e]) * SUM_TILE, end = begin + SUM_TILE;
    if (end > l.n[e]) end = l.n[e];
    sum += l.is_bf16[e] ? sum_tile((const bf16 *)l.data[e], begin, end)
                        : sum_tile((const float *)l.data[e], begin, end);
  }
  sum = tree_sum<SUM_THREADS>(sum);
  if (threadIdx.x == 0) l.partial[blockIdx.x] = l.more ? l.partial[blockIdx.x] + sum : sum;
}

/* count: of partial, at most a number for each thread; parts: any number more. */
__global__ void __launch_bounds__(SUM_BLOCKS)
    sum_partials(const double *partial, int count, const double *parts, int part_count,
                 double *out) {
  double sum = (int)threadIdx.x < count ? partial[threadIdx.x] : 0;
  for (int i = (int)threadIdx.x; i < part_count; i += SUM_BLOCKS) sum += parts[i];
  sum = tree_sum<SUM_BLOCKS>(sum);
  if (threadIdx.x == 0) *out = sum;
}

extern "C" mt_err mt_cuda_sum_partials(struct mt_backend *be, const double *partial, int count,
                                       double *out) {
  sum_partials<<<1, SUM_BLOCKS, 0, mt_cuda_of(be)->stream>>>(partial, count, NULL, 0, out);
  return mt_cuda_launched("sumsq");
}

extern "C" mt_err mt_cuda_sumsq(struct mt_backend *be, const struct mt_sumsq_args *a) {
  MT_TRY(mt_check_sumsq(a));
  cudaStream_t s = mt_cuda_of(be)->stream;
  void *partial;
  MT_TRY(mt_cuda_scratch(be, "sumsq", SUM_BLOCKS * sizeof(double), &partial));
  struct sum_list l = {};
  l.partial = (double *)partial;
  for (int i = 0; i < a->tensor_count; i++) {
    const struct mt_tensor *t = &a->tensors[i];
    MT_TRY(mt_cuda_format("sumsq", t));
    l.data[l.count] = t->data;
    l.n[l.count] = mt_count(t);
    l.is_bf16[l.count] = t->dtype == MT_BF16;
    l.first_tile[l.count + 1] = l.first_tile[l.count] + div_up(l.n[l.count], SUM_TILE);
    l.count++;
    if (l.count < SUM_TENSORS && i + 1 < a->tensor_count) continue;
    sum_squares<<<SUM_BLOCKS, SUM_THREADS, 0, s>>>(l);
    MT_TRY(mt_cuda_launched("sumsq"));
    l.count = 0;
    l.more = 1;
  }
  sum_partials<<<1, SUM_BLOCKS, 0, s>>>((const double *)partial, l.more ? SUM_BLOCKS : 0, a->parts,
                                        a->part_count, a->out);
  return mt_cuda_launched("sumsq");
}

/* What all elements share. A block's first thread makes it. */
struct update {
  struct mt_adamw_factors factors;
  float keep;  /* of segments that decay */
  float scale; /* of gradients; negative: nothing is changed */
  uint32_t step;
  uint64_t seed;
};

struct update_list {
  int count;
  float beta1, beta2, eps;
  const struct mt_adamw_values *values;
  double clip;
  const double *grad_sumsq; /* [1] or NULL */
  void *w[UPDATE_SEGMENTS], *m[UPDATE_SEGMENTS], *v[UPDATE_SEGMENTS];
  const void *g[UPDATE_SEGMENTS];
  bf16 *compute[UPDATE_SEGMENTS]; /* or NULL */
  int64_t n[UPDATE_SEGMENTS];
  int64_t first_tile[UPDATE_SEGMENTS + 1];
  uint64_t
      first_block[UPDATE_SEGMENTS]; /* of random bits, which count from the parameter's begin */
  uint32_t tensor[UPDATE_SEGMENTS];
  uint8_t decay[UPDATE_SEGMENTS], is_bf16[UPDATE_SEGMENTS], is_wide[UPDATE_SEGMENTS];
};
static_assert(sizeof(struct update_list) <= 4096 && sizeof(struct sum_list) <= 4096,
              "what the parameters of a kernel hold on every chip and driver");
static_assert(UPDATE_TILE % MT_ROUND_BLOCK == 0 && 128 % MT_ROUND_BLOCK == 0,
              "tiles and segments begin with a block of random bits");

/* T: the format of weight, moments and gradient. */
template <class T> struct update_segment {
  T *w, *m, *v;
  const T *g;
  bf16 *compute;
  float keep;
  uint32_t tensor;
  uint64_t first_block;
};

template <class T>
__device__ __forceinline__ struct update_segment<T> segment_of(const struct update_list &l,
                                                               const struct update &u, int e) {
  return {(T *)l.w[e],       (T *)l.m[e],     (T *)l.v[e],
          (const T *)l.g[e], l.compute[e],    l.decay[e] ? u.keep : 1.0f,
          l.tensor[e],       l.first_block[e]};
}

/* V elements as they are kept: float32 is, bfloat16 is rounded at random by a block's words. V is
 * 1, where `at` is the element's place in its block, or a block. */
template <int V>
__device__ __forceinline__ void store_state(float *p, const uint32_t (&)[4], int, enum mt_rounding,
                                            const float (&x)[V]) {
  store_row<float, V>(p, x);
}
template <int V>
__device__ __forceinline__ void store_state(bf16 *p, const uint32_t (&r)[4], int at,
                                            enum mt_rounding purpose, const float (&x)[V]) {
  static_assert(V == 1 || V == MT_ROUND_BLOCK, "bits come by the block");
  pack<bf16, V> out;
#pragma unroll
  for (int j = 0; j < V; j++) {
    uint32_t addend;
    if constexpr (V == 1) {
      /* A word chosen at run time without an array that the compiler would put into memory. */
      uint32_t word = at < 4 ? (at < 2 ? r[0] : r[1]) : (at < 6 ? r[2] : r[3]);
      addend = mt_rounding_addend(word >> (16 * (at % 2)) & 0xffffu, purpose);
    } else {
      addend = mt_rounding_pick(r, j, purpose);
    }
    out.x[j] = __ushort_as_bfloat16(mt_round_at_random(x[j], addend));
  }
  store_pack<bf16, V>(p, out);
}

template <class T, int V>
__device__ __forceinline__ void adamw_at(const struct update_segment<T> &s, const struct update &u,
                                         int64_t i, const pack<T, V> &pw, const pack<T, V> &pm,
                                         const pack<T, V> &pv, const pack<T, V> &pg) {
  float w[V], m[V], v[V];
#pragma unroll
  for (int j = 0; j < V; j++) {
    w[j] = to_float(pw.x[j]), m[j] = to_float(pm.x[j]), v[j] = to_float(pv.x[j]);
    mt_adamw_one(&w[j], &m[j], &v[j], to_float(pg.x[j]), s.keep, u.scale, u.factors);
  }
  uint32_t r[4] = {};
  uint64_t block = s.first_block + (uint64_t)i / MT_ROUND_BLOCK;
  int at = (int)(i % MT_ROUND_BLOCK);
  constexpr bool rounded = sizeof(T) == sizeof(bf16);
  if (rounded)
    mt_rounding_bits(u.seed, s.tensor, MT_ROUND_WEIGHT, u.step, block, &r[0], &r[1], &r[2], &r[3]);
  store_state<V>(s.w + i, r, at, MT_ROUND_WEIGHT, w);
  if (rounded)
    mt_rounding_bits(u.seed, s.tensor, MT_ROUND_M, u.step, block, &r[0], &r[1], &r[2], &r[3]);
  store_state<V>(s.m + i, r, at, MT_ROUND_M, m);
  store_state<V>(s.v + i, r, at, MT_ROUND_V, v);
  if constexpr (!rounded) {
    if (s.compute) store_row<bf16, V>(s.compute + i, w);
  }
}

/* DEPTH accesses of each array are asked for before the first is used. */
template <class T, int V, int DEPTH>
__device__ __forceinline__ void adamw_run(const struct update_segment<T> &s, const struct update &u,
                                          int64_t begin, int64_t end) {
  constexpr int STEP = UPDATE_THREADS * V;
  for (int64_t base = begin + threadIdx.x * V; base < end; base += DEPTH * STEP) {
    pack<T, V> w[DEPTH], m[DEPTH], v[DEPTH], g[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int64_t i = base + d * STEP;
      if (i >= end) continue;
      g[d] = *reinterpret_cast<const pack<T, V> *>(s.g + i);
      w[d] = *reinterpret_cast<const pack<T, V> *>(s.w + i);
      m[d] = *reinterpret_cast<const pack<T, V> *>(s.m + i);
      v[d] = *reinterpret_cast<const pack<T, V> *>(s.v + i);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int64_t i = base + d * STEP;
      if (i < end) adamw_at<T, V>(s, u, i, w[d], m[d], v[d], g[d]);
    }
  }
}

/* The root of x and the quotient as the IEEE operations give them, by the instructions that the
 * compiler has for them but without a branch for each: correct in the ranges that adamw_fast looks
 * at. The branches made a step's update of 3.2 G elements 17.4 ms instead of 15.0 (H100). */
__device__ __forceinline__ float fast_root(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(x, 0x1p-100f)));
  float y = __fmul_rn(x, r), e = __fmaf_rn(-y, y, x);
  return __fmaf_rn(e, __fmul_rn(r, 0.5f), y);
}
__device__ __forceinline__ float fast_quotient(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
  float q = __fmul_rn(a, r);
  q = __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
  return a == 0 ? a : q; /* a zero's sign */
}

/* mt_adamw_one of V elements; false where one of them is outside what the fast operations (or, in
 * bfloat16, rounding without its special cases) can take, and then w, m, v are anything. */
template <int V>
__device__ __forceinline__ bool adamw_fast(float (&w)[V], float (&m)[V], float (&v)[V],
                                           const float (&g)[V], float keep, float scale,
                                           const struct mt_adamw_factors &u) {
  bool in_range = true;
  float top_v = 0, top_a = 0, finite = 0;
#pragma unroll
  for (int j = 0; j < V; j++) {
    float x = __fmul_rn(g[j], scale);
    m[j] = __fmaf_rn(u.beta1, m[j], __fmul_rn(1.0f - u.beta1, x));
    v[j] = __fmaf_rn(u.beta2, v[j], __fmul_rn(__fmul_rn(1.0f - u.beta2, x), x));
    float a = __fmul_rn(u.step_size, m[j]);
    float b = __fmaf_rn(fast_root(v[j]), u.root_c2, u.eps);
    bool root = (v[j] >= 0x1p-100f) | (v[j] == 0), quotient = (fabsf(a) >= 0x1p-80f) | (a == 0);
    in_range = in_range & root & quotient;
    top_v = fmaxf(top_v, v[j]), top_a = fmaxf(top_a, fabsf(a));
    w[j] = __fmaf_rn(w[j], keep, -fast_quotient(a, b));
    finite = __fmaf_rn(w[j], 0.0f, finite); /* NaN once one is not finite */
    finite = __fmaf_rn(m[j], 0.0f, finite);
  }
  return in_range & (top_v <= 0x1p40f) & (top_a <= 0x1p40f) & (finite == 0);
}

/* Whether adamw_fast's divisor cannot leave its range by them. */
__device__ __forceinline__ bool factors_fit(const struct mt_adamw_factors &u) {
  return u.eps >= 0x1p-60f && u.eps <= 1.0f && u.root_c2 >= 1.0f && u.root_c2 <= 0x1p20f;
}

/* Two finite numbers to bfloat16 in one word, x in its lower half. */
__device__ __forceinline__ uint32_t round_pair(float x, float y, uint32_t add_x, uint32_t add_y) {
  return __byte_perm(__float_as_uint(x) + add_x, __float_as_uint(y) + add_y, 0x7632);
}

template <int V>
__device__ __forceinline__ void round_fast(const uint32_t (&r)[4], enum mt_rounding purpose,
                                           const float (&x)[V], uint32_t (&out)[4]) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t low, high;
    if (purpose == MT_ROUND_WEIGHT)
      low = r[k] & 0xffffu, high = r[k] >> 16;
    else if (purpose == MT_ROUND_M) /* bytes: 0x80, the lower eight bits, 0, 0 */
      low = __byte_perm(r[k], 0x80u, 0x5504), high = __byte_perm(r[k], 0x80u, 0x5524);
    else
      low = __byte_perm(r[k], 0x80u, 0x5514), high = __byte_perm(r[k], 0x80u, 0x5534);
    out[k] = round_pair(x[2 * k], x[2 * k + 1], low, high);
  }
}

/* Words as one store. */
template <class T> __device__ __forceinline__ void store_words(T *p, const uint32_t (&x)[4]) {
  pack<uint32_t, 4> words = {{x[0], x[1], x[2], x[3]}};
  store_pack<uint32_t, 4>((uint32_t *)(void *)p, words);
}

/* out: words of w, m, v. False: nothing done. */
__device__ __forceinline__ bool
adamw_words(const struct update_segment<bf16> &s, const struct update &u, int64_t i,
            const pack<bf16, 8> &pw, const pack<bf16, 8> &pm, const pack<bf16, 8> &pv,
            const pack<bf16, 8> &pg, uint32_t (&ow)[4], uint32_t (&om)[4], uint32_t (&ov)[4]) {
  float w[8], m[8], v[8], g[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    w[j] = to_float(pw.x[j]), m[j] = to_float(pm.x[j]), v[j] = to_float(pv.x[j]);
    g[j] = to_float(pg.x[j]);
  }
  if (!adamw_fast<8>(w, m, v, g, s.keep, u.scale, u.factors)) return false;
  uint32_t r[4];
  uint64_t block = s.first_block + (uint64_t)i / MT_ROUND_BLOCK;
  mt_rounding_bits(u.seed, s.tensor, MT_ROUND_WEIGHT, u.step, block, &r[0], &r[1], &r[2], &r[3]);
  round_fast<8>(r, MT_ROUND_WEIGHT, w, ow);
  mt_rounding_bits(u.seed, s.tensor, MT_ROUND_M, u.step, block, &r[0], &r[1], &r[2], &r[3]);
  round_fast<8>(r, MT_ROUND_M, m, om);
  round_fast<8>(r, MT_ROUND_V, v, ov);
  return true;
}
__device__ __forceinline__ bool
adamw_words(const struct update_segment<float> &s, const struct update &u, int64_t i,
            const pack<float, 4> &pw, const pack<float, 4> &pm, const pack<float, 4> &pv,
            const pack<float, 4> &pg, uint32_t (&ow)[4], uint32_t (&om)[4], uint32_t (&ov)[4]) {
  float w[4], m[4], v[4], g[4];
#pragma unroll
  for (int j = 0; j < 4; j++) w[j] = pw.x[j], m[j] = pm.x[j], v[j] = pv.x[j], g[j] = pg.x[j];
  if (!adamw_fast<4>(w, m, v, g, s.keep, u.scale, u.factors)) return false;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    ow[j] = __float_as_uint(w[j]), om[j] = __float_as_uint(m[j]), ov[j] = __float_as_uint(v[j]);
  }
  if (s.compute) store_row<bf16, 4>(s.compute + i, w);
  return true;
}

/* What the fast operations did not take. Out of line and from memory: registers are not to be held
 * for it. */
template <class T>
__device__ __noinline__ void adamw_rare(const struct update_list *l, const struct update *u, int e,
                                        int64_t i) {
  constexpr int V = wide<T>;
  struct update_segment<T> s = segment_of<T>(*l, *u, e);
  pack<T, V> g = *reinterpret_cast<const pack<T, V> *>(s.g + i);
  pack<T, V> w = *reinterpret_cast<const pack<T, V> *>(s.w + i);
  pack<T, V> m = *reinterpret_cast<const pack<T, V> *>(s.m + i);
  pack<T, V> v = *reinterpret_cast<const pack<T, V> *>(s.v + i);
  adamw_at<T, V>(s, *u, i, w, m, v, g);
}

/* A tile's whole packs by the fast operations. */
template <class T>
__device__ __forceinline__ void adamw_fast_run(const struct update_list &l, const struct update &u,
                                               int e, const struct update_segment<T> &s,
                                               int64_t begin, int64_t end) {
  constexpr int V = wide<T>;
  bool fits = factors_fit(u.factors);
  for (int64_t i = begin + threadIdx.x * V; i < end; i += UPDATE_THREADS * V) {
    uint32_t w[4], m[4], v[4];
    pack<T, V> pg = *reinterpret_cast<const pack<T, V> *>(s.g + i);
    pack<T, V> pw = *reinterpret_cast<const pack<T, V> *>(s.w + i);
    pack<T, V> pm = *reinterpret_cast<const pack<T, V> *>(s.m + i);
    pack<T, V> pv = *reinterpret_cast<const pack<T, V> *>(s.v + i);
    if (fits && adamw_words(s, u, i, pw, pm, pv, pg, w, m, v)) {
      store_words(s.w + i, w);
      store_words(s.m + i, m);
      store_words(s.v + i, v);
    } else {
      adamw_rare<T>(&l, &u, e, i);
    }
  }
}

template <class T, bool FAST>
__device__ __forceinline__ void adamw_tile(const struct update_list &l, const struct update &u,
                                           int e, int64_t begin, int64_t end) {
  struct update_segment<T> s = segment_of<T>(l, u, e);
  int64_t whole = begin;
  if (l.is_wide[e]) {
    constexpr int V = wide<T>;
    whole = begin + (end - begin) / V * V;
    if (FAST)
      adamw_fast_run<T>(l, u, e, s, begin, whole);
    else
      adamw_run<T, V, sizeof(T) == sizeof(float) ? 2 : 1>(s, u, begin, whole);
  }
  adamw_run<T, 1, 1>(s, u, whole, end);
}

__device__ __forceinline__ struct update update_of(const struct update_list &l) {
  const struct mt_adamw_values v = *l.values;
  double scale = 1;
  if (l.grad_sumsq) {
    double sumsq = *l.grad_sumsq;
    if (l.clip > 0) scale = fmin(1.0, l.clip / (sqrt(sumsq) + 1e-6));
    if (!isfinite(sumsq)) scale = -1;
  }
  return {{l.beta1, l.beta2, (float)v.step_size, (float)v.root_c2, l.eps},
          (float)v.keep,
          (float)scale,
          (uint32_t)v.step,
          v.seed};
}

/* One block a tile. A norm that is not finite changes nothing. FAST: where the chip is one that the
 * fast operations are known on (Hopper: every root in range and 2^34 quotients were compared). */
template <bool FAST>
__global__ void __launch_bounds__(UPDATE_THREADS, UPDATE_BLOCKS)
    adamw_tiles(const __grid_constant__ update_list l) {
  __shared__ struct update u;
  if (threadIdx.x == 0) u = update_of(l);
  __syncthreads();
  if (u.scale < 0) return;
  int e = entry_of(l.first_tile, l.count, blockIdx.x);
  int64_t begin = (blockIdx.x - l.first_tile[e]) * UPDATE_TILE, end = begin + UPDATE_TILE;
  if (end > l.n[e]) end = l.n[e];
  if (l.is_bf16[e]) {
    adamw_tile<bf16, FAST>(l, u, e, begin, end);
  } else {
    adamw_tile<float, FAST>(l, u, e, begin, end);
  }
}

static mt_err adamw_formats(const struct mt_adamw_segment *s) {
  if (s->compute.data && s->compute.dtype != MT_BF16) {
    return mt_fail(MT_EUNSUPPORTED, "adamw: a rounded copy in %s", mt_dtype_name(s->compute.dtype));
  }
  return mt_cuda_format("adamw", &s->master);
}

static void list_segment(struct update_list *l, const struct mt_adamw_segment *s) {
  int i = l->count++;
  l->w[i] = s->master.data;
  l->m[i] = s->m.data;
  l->v[i] = s->v.data;
  l->g[i] = s->grad.data;
  l->compute[i] = (bf16 *)s->compute.data;
  l->n[i] = s->master.dim[0];
  l->first_tile[i + 1] = l->first_tile[i] + div_up(l->n[i], UPDATE_TILE);
  l->first_block[i] = (uint64_t)s->first / MT_ROUND_BLOCK;
  l->tensor[i] = s->tensor;
  l->decay[i] = s->decay != 0;
  l->is_bf16[i] = s->master.dtype == MT_BF16;
  l->is_wide[i] = aligned_to(l->w[i], 16) && aligned_to(l->m[i], 16) && aligned_to(l->v[i], 16) &&
                  aligned_to(l->g[i], 16) && aligned_to(l->compute[i], 8);
}

extern "C" mt_err mt_cuda_adamw(struct mt_backend *be, const struct mt_adamw_args *a) {
  MT_TRY(mt_check_adamw(a));
  for (int i = 0; i < a->segment_count; i++) MT_TRY(adamw_formats(&a->segments[i]));
  struct mt_cuda *c = mt_cuda_of(be);
  bool fast = c->capability == 90 && !c->portable;
  struct update_list l = {};
  l.beta1 = (float)a->beta1;
  l.beta2 = (float)a->beta2;
  l.eps = (float)a->eps;
  l.values = a->values;
  l.clip = a->clip;
  l.grad_sumsq = a->grad_sumsq;
  for (int i = 0; i < a->segment_count; i++) {
    list_segment(&l, &a->segments[i]);
    if (l.count < UPDATE_SEGMENTS && i + 1 < a->segment_count) continue;
    int64_t tiles = l.first_tile[l.count];
    if (tiles > 0) {
      auto kernel = fast ? adamw_tiles<true> : adamw_tiles<false>;
      kernel<<<(unsigned)tiles, UPDATE_THREADS, 0, c->stream>>>(l);
      MT_TRY(mt_cuda_launched("adamw"));
    }
    l.count = 0;
  }
  return MT_OK;
}
