/* Attention backward in BF16 on tensor cores, for any chip from sm_80 on. The probabilities are
 * worked out again from lse (Dao 2023, arXiv:2307.08691, algorithm 2), once for dK and dV and once
 * for dQ: seven products where one pass would do with five, but every sum has one owner and one
 * order, and no float32 copy of dQ is needed. */
#include "kernels/cuda/attention_mma.cuh"

namespace {

/* dK, dV: a block has 128 keys of a group, a warp 16 of them, and sees all queries of the group's
 * heads in tiles of 64. Scores are worked out keys by queries: P and dS then are left operands of
 * dV and dK as they lie in registers. */
enum { DKV_KEYS = ATTENTION_MMA_TILE, DKV_QUERIES = 64, DKV_THREADS = 256 };

template <int DP, int STAGES> struct dkv_shared {
  bf16 k[DKV_KEYS][DP], v[DKV_KEYS][DP];
  bf16 q[STAGES][DKV_QUERIES][DP], dout[STAGES][DKV_QUERIES][DP];
  float lse[STAGES][DKV_QUERIES], delta[STAGES][DKV_QUERIES];
};

/* Starts copying a tile of queries. Rows past the sequence's end become zeros, with which a query
 * adds nothing: its P meets dO = 0, its dS = P (0 - 0). */
template <int DP, int STAGES>
__device__ __forceinline__ void copy_queries(dkv_shared<DP, STAGES> &sh, int stage,
                                             const struct attention_call &c, int head, int64_t at,
                                             int rows) {
  const bf16 *q = (const bf16 *)c.q + at * c.q_ld + head / c.r * c.q_group + head % c.r * c.d;
  const bf16 *dout = (const bf16 *)c.dout + at * c.dout_ld + head * c.d;
  copy_tile<DKV_QUERIES, DP, DKV_THREADS>(shared_address(sh.q[stage]), q, c.q_ld, rows, c.d);
  copy_tile<DKV_QUERIES, DP, DKV_THREADS>(shared_address(sh.dout[stage]), dout, c.dout_ld, rows,
                                          c.d);
  int n = threadIdx.x % DKV_QUERIES;
  bool real = n < rows;
  if (threadIdx.x < DKV_QUERIES) {
    copy4(shared_address(&sh.lse[stage][n]), c.lse + (real ? (at + n) * c.lse_ld + head : 0), real);
  } else if (threadIdx.x < 2 * DKV_QUERIES) {
    copy4(shared_address(&sh.delta[stage][n]),
          c.delta + (real ? (at + n) * (c.kv_heads * c.r) + head : 0), real);
  }
  copies_commit();
}

/* One tile of queries at positions from `first` for 16 keys from `key`. */
template <int DP, int STAGES>
__device__ __forceinline__ void add_queries(const dkv_shared<DP, STAGES> &sh, int stage,
                                            const struct attention_call &c, int first, int key,
                                            float (&dk)[1][DP / 8][4], float (&dv)[1][DP / 8][4]) {
  constexpr int N = DKV_QUERIES / 8;
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  /* One address and constants from it: what is always there in registers is dK and dV. */
  constexpr uint32_t KEY_BYTES = DKV_KEYS * DP * 2, QUERY_BYTES = DKV_QUERIES * DP * 2;
  uint32_t k = shared_address(sh.k), v = k + KEY_BYTES;
  uint32_t q = k + 2 * KEY_BYTES + (uint32_t)stage * QUERY_BYTES, dout = q + STAGES * QUERY_BYTES;
  float s[1][N][4] = {}, dp[1][N][4] = {}, scale = c.scale * LOG2_E;
  uint32_t w[1][N / 2][4];
  dots<DP>(s, operand<DP>::by_rows(k, warp_row), operand<DP>::by_columns(q, 0));
#pragma unroll
  for (int n = 0; n < N; n++) {
    float2 lse = *reinterpret_cast<const float2 *>(&sh.lse[stage][8 * n + lane % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 4; i++)
      s[0][n][i] = exp2_fast(s[0][n][i] * scale - (i % 2 ? lse.y : lse.x) * LOG2_E);
  }
  if (first < key + 15 || (c.window > 0 && first + DKV_QUERIES - 1 - key >= c.window)) {
#pragma unroll
    for (int i = 0; i < 4 * N; i++) {
      if (!attention_sees(first + lane % 4 * 2 + i / 4 * 8 + i % 2, key + lane / 4 + i / 2 % 2 * 8,
                          c.window))
        s[0][i / 4][i % 4] = 0;
    }
  }
#pragma unroll
  for (int n = 0; n < N / 2; n++) as_left(w[0][n], s[0][2 * n], s[0][2 * n + 1]);
  mix<DP>(dv, w, operand<DP>::by_rows(dout, 0));
  dots<DP>(dp, operand<DP>::by_rows(v, warp_row), operand<DP>::by_columns(dout, 0));
#pragma unroll
  for (int n = 0; n < N; n++) {
    float2 delta = *reinterpret_cast<const float2 *>(&sh.delta[stage][8 * n + lane % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 4; i++)
      dp[0][n][i] = s[0][n][i] * (dp[0][n][i] - (i % 2 ? delta.y : delta.x));
  }
#pragma unroll
  for (int n = 0; n < N / 2; n++) as_left(w[0][n], dp[0][2 * n], dp[0][2 * n + 1]);
  mix<DP>(dk, w, operand<DP>::by_rows(q, 0));
}

/* Grid: tiles of keys x groups. */
template <int DP, int STAGES>
__global__ void __launch_bounds__(DKV_THREADS, 1) mma_dkv(const struct attention_call c) {
  extern __shared__ float4 raw[];
  auto &sh = *reinterpret_cast<dkv_shared<DP, STAGES> *>(raw);
  struct attention_item item;
  if (!attention_item_of<DKV_KEYS>(c, blockIdx.x / c.kv_heads, false, &item)) return;
  int g = blockIdx.x % c.kv_heads, warp_row = threadIdx.x / 32 * 16;
  int key0 = item.tile * DKV_KEYS, keys = min((int)DKV_KEYS, item.count - key0);
  int64_t at = item.begin + key0;
  copy_tile<DKV_KEYS, DP, DKV_THREADS>(
      shared_address(sh.k), (const bf16 *)c.k + at * c.kv_ld + g * c.kv_group, c.kv_ld, keys, c.d);
  copy_tile<DKV_KEYS, DP, DKV_THREADS>(
      shared_address(sh.v), (const bf16 *)c.v + at * c.kv_ld + g * c.kv_group, c.kv_ld, keys, c.d);
  int end = attention_queries_end(key0 + keys - 1, item.count, c.window);
  int mine = key0 + warp_row; /* this warp's first key */
  float dk[1][DP / 8][4] = {}, dv[1][DP / 8][4] = {};
  /* The tile to copy next: a head's queries in order, then the next head's. */
  int head = g * c.r, first = key0, stage = 0;
  auto copy_next = [&](int to) {
    if (head == (g + 1) * c.r) return;
    copy_queries(sh, to, c, head, item.begin + first, item.count - first);
    first += DKV_QUERIES;
    if (first >= end) {
      first = key0;
      head++;
    }
  };
  if (STAGES > 1) copy_next(0);
  for (int q = 0; q < c.r; q++) {
    for (int row = key0; row < end; row += DKV_QUERIES) {
      if (STAGES == 1) {
        __syncthreads();
        copy_next(0);
      }
      copies_wait();
      __syncthreads(); /* this tile is there, and the other stage is read */
      if (STAGES > 1) copy_next(stage ^ 1);
      if (row + DKV_QUERIES > mine && (c.window == 0 || row - (mine + 15) < c.window))
        add_queries(sh, stage, c, row, mine, dk, dv);
      if (STAGES > 1) stage ^= 1;
    }
  }
  int64_t to = (at + warp_row) * c.dqkv_ld + g * c.kv_group;
  store_tile<DP>(shared_address(sh.k), warp_row, dk[0], c.scale, c.scale, (bf16 *)c.dk + to,
                 c.dqkv_ld, keys - warp_row, c.d);
  store_tile<DP>(shared_address(sh.v), warp_row, dv[0], 1.0f, 1.0f, (bf16 *)c.dv + to, c.dqkv_ld,
                 keys - warp_row, c.d);
}

/* dQ: a block has 128 queries of a head, a warp 32 of them; keys come in tiles of 32. */
enum { DQ_QUERIES = ATTENTION_MMA_TILE, DQ_KEYS = 32, DQ_THREADS = 128 };

template <int DP> struct dq_shared {
  bf16 q[DQ_QUERIES][DP], dout[DQ_QUERIES][DP];
  bf16 k[2][DQ_KEYS][DP], v[2][DQ_KEYS][DP];
};

/* dS of 32 queries from position `first` against 32 keys from `key`, as left operands.
 * lse: in powers of 2; lse and delta of tile m, rows lane/4 and lane/4 + 8. */
template <int DP>
__device__ __forceinline__ void
score_gradients(uint32_t (&ds)[2][DQ_KEYS / 16][4], const dq_shared<DP> &sh, int stage,
                const struct attention_call &c, int first, int key, const float (&lse)[2][2],
                const float (&delta)[2][2]) {
  constexpr int N = DQ_KEYS / 8;
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 32;
  float s[2][N][4] = {}, dp[2][N][4] = {}, scale = c.scale * LOG2_E;
  dots<DP>(s, operand<DP>::by_rows(shared_address(sh.q), warp_row),
           operand<DP>::by_columns(shared_address(sh.k[stage]), 0));
  dots<DP>(dp, operand<DP>::by_rows(shared_address(sh.dout), warp_row),
           operand<DP>::by_columns(shared_address(sh.v[stage]), 0));
  bool hidden = key + DQ_KEYS - 1 > first || (c.window > 0 && first + 31 - key >= c.window);
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x = exp2_fast(s[m][n][i] * scale - lse[m][i / 2]);
        if (hidden && !attention_sees(first + 16 * m + lane / 4 + i / 2 * 8,
                                      key + 8 * n + lane % 4 * 2 + i % 2, c.window))
          x = 0;
        dp[m][n][i] = x * (dp[m][n][i] - delta[m][i / 2]);
      }
    }
#pragma unroll
    for (int k = 0; k < N / 2; k++) as_left(ds[m][k], dp[m][2 * k], dp[m][2 * k + 1]);
  }
}

/* Grid: tiles of queries x heads. */
template <int DP>
__global__ void __launch_bounds__(DQ_THREADS, 2) mma_dq(const struct attention_call c) {
  extern __shared__ float4 raw[];
  auto &sh = *reinterpret_cast<dq_shared<DP> *>(raw);
  struct attention_item item;
  int heads = c.kv_heads * c.r;
  if (!attention_item_of<DQ_QUERIES>(c, blockIdx.x / heads, true, &item)) return;
  int head = blockIdx.x % heads, g = head / c.r, lane = threadIdx.x % 32;
  int warp_row = threadIdx.x / 32 * 32;
  int row0 = item.tile * DQ_QUERIES, rows = min((int)DQ_QUERIES, item.count - row0), lo, hi;
  int64_t at = item.begin + row0;
  attention_keys(row0, row0 + rows - 1, c.window, &lo, &hi);
  const bf16 *k = (const bf16 *)c.k + (int64_t)item.begin * c.kv_ld + g * c.kv_group;
  const bf16 *v = (const bf16 *)c.v + (int64_t)item.begin * c.kv_ld + g * c.kv_group;
  copy_tile<DQ_QUERIES, DP, DQ_THREADS>(
      shared_address(sh.q), (const bf16 *)c.q + at * c.q_ld + g * c.q_group + head % c.r * c.d,
      c.q_ld, rows, c.d);
  copy_tile<DQ_QUERIES, DP, DQ_THREADS>(shared_address(sh.dout),
                                        (const bf16 *)c.dout + at * c.dout_ld + head * c.d,
                                        c.dout_ld, rows, c.d);
  int key0 = (hi - 1) / DQ_KEYS * DQ_KEYS, mine = row0 + warp_row;
  auto copy_keys = [&](int key, int stage) {
    copy_tile<DQ_KEYS, DP, DQ_THREADS>(shared_address(sh.k[stage]), k + key * c.kv_ld, c.kv_ld,
                                       hi - key, c.d);
    copy_tile<DQ_KEYS, DP, DQ_THREADS>(shared_address(sh.v[stage]), v + key * c.kv_ld, c.kv_ld,
                                       hi - key, c.d);
    copies_commit();
  };
  copy_keys(key0, 0);
  float dq[2][DP / 8][4] = {}, lse[2][2], delta[2][2];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = warp_row + 8 * i + lane / 4;
    bool real = row < rows;
    lse[i / 2][i % 2] = real ? c.lse[(at + row) * c.lse_ld + head] * LOG2_E : 0.0f;
    delta[i / 2][i % 2] = real ? c.delta[(at + row) * heads + head] : 0.0f;
  }
  for (int stage = 0; key0 + DQ_KEYS > lo; key0 -= DQ_KEYS, stage ^= 1) {
    copies_wait();
    __syncthreads(); /* this tile is there, and the other stage is read */
    if (key0 > lo) copy_keys(key0 - DQ_KEYS, stage ^ 1);
    if (key0 > mine + 31 || (c.window > 0 && mine - (key0 + DQ_KEYS - 1) >= c.window)) continue;
    uint32_t ds[2][DQ_KEYS / 16][4];
    score_gradients<DP>(ds, sh, stage, c, mine, key0, lse, delta);
    mix<DP>(dq, ds, operand<DP>::by_rows(shared_address(sh.k[stage]), 0));
  }
  bf16 *to = (bf16 *)c.dq + (at + warp_row) * c.dqkv_ld + g * c.q_group + head % c.r * c.d;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    store_tile<DP>(shared_address(sh.q), warp_row + 16 * m, dq[m], c.scale, c.scale,
                   to + 16 * m * c.dqkv_ld, c.dqkv_ld, rows - warp_row - 16 * m, c.d);
  }
}

template <class K>
mt_err launch(struct mt_cuda *cuda, K *kernel, int64_t grid, int threads, size_t bytes,
              const struct attention_call *c) {
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
      "attention_bwd"));
  kernel<<<(unsigned)grid, threads, bytes, cuda->stream>>>(*c);
  return mt_cuda_launched("attention_bwd");
}

template <int DP> mt_err backward(struct mt_cuda *cuda, const struct attention_call *c) {
  int64_t grid = (int64_t)c->item_grid * c->kv_heads;
  size_t two = sizeof(dkv_shared<DP, 2>), one = sizeof(dkv_shared<DP, 1>);
  if (two <= cuda->shared_optin_bytes) {
    MT_TRY(launch(cuda, mma_dkv<DP, 2>, grid, DKV_THREADS, two, c));
  } else {
    MT_TRY(launch(cuda, mma_dkv<DP, 1>, grid, DKV_THREADS, one, c));
  }
  return launch(cuda, mma_dq<DP>, grid * c->r, DQ_THREADS, sizeof(dq_shared<DP>), c);
}

} // namespace

mt_err mt_cuda_attention_mma_bwd(struct mt_cuda *cuda, const struct attention_call *c) {
  return c->d <= 64 ? backward<64>(cuda, c) : backward<128>(cuda, c);
}
