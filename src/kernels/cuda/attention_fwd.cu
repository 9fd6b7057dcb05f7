/* Attention forward in BF16 on tensor cores, for any chip from sm_80 on (FlashAttention-2: Dao
 * 2023, arXiv:2307.08691, algorithm 1). A block has 128 queries of one head, a warp 32 of them;
 * tiles of 64 keys come from the last one down, two in flight. 32 rows a warp, since every
 * fragment of keys read from shared memory then feeds two products. */
#include "kernels/cuda/attention_mma.cuh"

namespace {

enum { BM = ATTENTION_MMA_TILE, BN = 64, THREADS = 128 };

template <int DP> struct fwd_shared { bf16 q[BM][DP], k[2][BN][DP], v[2][BN][DP]; };

/* The running softmax of a lane's rows: tile m, rows lane/4 and lane/4 + 8. */
struct rows_state {
  float top[2][2], sum[2][2];
};

/* Hides the keys that a query does not see. query, key: of this lane's first element. */
__device__ __forceinline__ void hide(float (&s)[2][BN / 8][4], int query, int key, int window) {
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < BN / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (!attention_sees(query + 16 * m + i / 2 * 8, key + 8 * n + i % 2, window))
          s[m][n][i] = -INFINITY;
      }
    }
  }
}

/* Scores become probabilities relative to the largest so far (as left operands); what was summed
 * before shrinks to match. scale: of the scores, in powers of 2. */
template <int DP>
__device__ __forceinline__ void softmax(float (&s)[2][BN / 8][4], struct rows_state &st,
                                        float (&o)[2][DP / 8][4], uint32_t (&p)[2][BN / 16][4],
                                        float scale) {
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = st.top[m][half];
#pragma unroll
      for (int n = 0; n < BN / 8; n++)
        top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      float base = top == -INFINITY ? 0.0f : top * scale;
      float shrink = exp2_fast(st.top[m][half] * scale - base), sum = 0;
      st.top[m][half] = top;
#pragma unroll
      for (int n = 0; n < BN / 8; n++) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          s[m][n][i] = exp2_fast(s[m][n][i] * scale - base);
          sum += s[m][n][i];
        }
      }
      st.sum[m][half] = st.sum[m][half] * shrink + sum;
#pragma unroll
      for (int n = 0; n < DP / 8; n++) {
        o[m][n][2 * half] *= shrink;
        o[m][n][2 * half + 1] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < BN / 16; k++) as_left(p[m][k], s[m][2 * k], s[m][2 * k + 1]);
  }
}

/* Divides, and writes the rows of this warp that exist: `rows` of them from packed row `at`. */
template <int DP>
__device__ __forceinline__ void finish(const struct attention_call &c, uint32_t tile, int row0,
                                       const float (&o)[2][DP / 8][4], struct rows_state &st,
                                       int64_t at, int rows, int head) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = st.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[half] = 1.0f / sum;
      int row = 16 * m + 8 * half + lane / 4;
      if (c.lse && lane % 4 == 0 && row < rows)
        c.lse[(at + row) * c.lse_ld + head] = st.top[m][half] * c.scale + logf(sum);
    }
    bf16 *out = (bf16 *)c.out + (at + 16 * m) * c.out_ld + head * c.d;
    store_tile<DP>(tile, row0 + 16 * m, o[m], inverse[0], inverse[1], out, c.out_ld, rows - 16 * m,
                   c.d);
  }
}

/* Grid: tiles of queries x heads. */
template <int DP>
__global__ void __launch_bounds__(THREADS, 2) mma_fwd(const struct attention_call c) {
  extern __shared__ float4 raw[];
  auto &sh = *reinterpret_cast<fwd_shared<DP> *>(raw);
  struct attention_item item;
  int heads = c.kv_heads * c.r;
  if (!attention_item_of<BM>(c, blockIdx.x / heads, true, &item)) return;
  int head = blockIdx.x % heads, g = head / c.r, lane = threadIdx.x % 32;
  int row0 = item.tile * BM, rows = min(BM, item.count - row0), first = c.offset + row0, lo, hi;
  attention_keys(first, first + rows - 1, c.window, &lo, &hi);
  const bf16 *q =
      (const bf16 *)c.q + (int64_t)(item.begin + row0) * c.q_ld + g * c.q_group + head % c.r * c.d;
  const bf16 *k = (const bf16 *)c.k + (int64_t)item.begin * c.kv_ld + g * c.kv_group;
  const bf16 *v = (const bf16 *)c.v + (int64_t)item.begin * c.kv_ld + g * c.kv_group;
  const uint32_t sq = shared_address(sh.q), sk = shared_address(sh.k), sv = shared_address(sh.v);
  constexpr uint32_t STAGE = BN * DP * 2;
  int warp_row = threadIdx.x / 32 * 32, mine = first + warp_row; /* this warp's first query */
  int key0 = (hi - 1) / BN * BN;
  copy_tile<BM, DP, THREADS>(sq, q, c.q_ld, rows, c.d);
  copy_tile<BN, DP, THREADS>(sk, k + key0 * c.kv_ld, c.kv_ld, hi - key0, c.d);
  copy_tile<BN, DP, THREADS>(sv, v + key0 * c.kv_ld, c.kv_ld, hi - key0, c.d);
  copies_commit();
  const operand<DP> left = operand<DP>::by_rows(sq, warp_row);
  const operand<DP> keys = operand<DP>::by_columns(sk, 0), values = operand<DP>::by_rows(sv, 0);
  float o[2][DP / 8][4] = {};
  struct rows_state st = {{{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, {}};
  for (uint32_t stage = 0; key0 + BN > lo; key0 -= BN, stage ^= STAGE) {
    copies_wait();
    __syncthreads(); /* this tile is there, and the other stage is read */
    if (key0 > lo) {
      uint32_t other = stage ^ STAGE;
      copy_tile<BN, DP, THREADS>(sk + other, k + (key0 - BN) * c.kv_ld, c.kv_ld, BN, c.d);
      copy_tile<BN, DP, THREADS>(sv + other, v + (key0 - BN) * c.kv_ld, c.kv_ld, BN, c.d);
      copies_commit();
    }
    if (key0 > mine + 31 || (c.window > 0 && mine - (key0 + BN - 1) >= c.window)) continue;
    float s[2][BN / 8][4] = {};
    uint32_t p[2][BN / 16][4];
    dots<DP>(s, left, operand<DP>{keys.at + stage, keys.flips});
    if (key0 + BN - 1 > mine || (c.window > 0 && mine + 31 - key0 >= c.window))
      hide(s, mine + lane / 4, key0 + lane % 4 * 2, c.window);
    softmax<DP>(s, st, o, p, c.scale * LOG2_E);
    mix<DP>(o, p, operand<DP>{values.at + stage, values.flips});
  }
  finish<DP>(c, sq, warp_row, o, st, item.begin + row0 + warp_row, rows - warp_row, head);
}

template <int DP> mt_err launch(struct mt_cuda *cuda, const struct attention_call *c) {
  size_t bytes = sizeof(fwd_shared<DP>);
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(mma_fwd<DP>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
      "attention_fwd"));
  int64_t grid = (int64_t)c->item_grid * c->kv_heads * c->r;
  mma_fwd<DP><<<(unsigned)grid, THREADS, bytes, cuda->stream>>>(*c);
  return mt_cuda_launched("attention_fwd");
}

} // namespace

mt_err mt_cuda_attention_mma_fwd(struct mt_cuda *cuda, const struct attention_call *c) {
  return c->d <= 64 ? launch<64>(cuda, c) : launch<128>(cuda, c);
}
