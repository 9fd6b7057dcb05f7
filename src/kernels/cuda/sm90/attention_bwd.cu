/* Attention backward on Hopper, as attention_bwd.cu on other chips: dQ per tile of queries, dK and
 * dV per tile of keys, no sum with two owners. dQ's kernel works out delta, which both need. What
 * becomes a left operand (P, dS, and for dQ the queries themselves) stays in registers; a warpgroup
 * copies, two multiply. */
#include "kernels/cuda/sm90/attention_wgmma.cuh"

namespace {

/* Registers of a thread after the start: 65536 / 128 = 2 * 240 + 24 + 8. With fewer the products
 * would wait for each other; the copier keeps a few words in memory instead. */
enum { MULTIPLIER_REGISTERS = 240, COPIER_REGISTERS = 24 };

/* dK, dV: a block has 128 keys of a group, a warpgroup 64, against tiles of 64 queries; scores are
 * worked out keys by queries.
 *
 * A 64 x 64 product with both operands in shared memory takes as long to read as to compute, so
 * part of V becomes fragments once and for all. Registers of a thread: dK and dV 128, V 20, scores
 * or dP 32, P and dS 16 each, 28 for the rest; with more of V, or P in float32 beside dP, ptxas
 * (13.0) finds too few and waits after every product (its remark C7512). So dS is worked out from
 * the bf16 P that dV's product has. The next tile's scores start together with this tile's dK,
 * which covers the exponentials. */
enum { V_LEFT = 5 }; /* of the DIM / 16 steps in depth */
enum { KEYS = ATTENTION_MMA_TILE, QUERIES = 64, DKV_STAGES = 4 };

struct dkv_shared {
  tile<KEYS> k, v;
  tile<QUERIES> q[DKV_STAGES], dout[DKV_STAGES];
  float lse[DKV_STAGES][QUERIES], delta[DKV_STAGES][QUERIES];
  ring_bars<DKV_STAGES> bars;
  uint64_t kv_full;
};

/* A block's keys: positions [key0, key0 + keys) of the sequence that begins at row `begin`. */
struct key_place {
  int g, key0, keys, count, end;
  int64_t begin;
};

__device__ __forceinline__ void dkv_copier(struct dkv_shared &sh, const struct attention_call &c,
                                           const struct key_place &p) {
  const copy_lane lane = copy_lane_of(c.d);
  const ptrdiff_t to_v = (const bf16 *)c.v - (const bf16 *)c.k;
  const bf16 *k =
      copy_from((const bf16 *)c.k + p.g * c.kv_group, c.kv_ld) + (p.begin + p.key0) * c.kv_ld;
  copy_rows<KEYS>(sh.k, lane, k, c.kv_ld, p.keys);
  copy_rows<KEYS>(sh.v, lane, k + to_v, c.kv_ld, p.keys);
  barrier_arrive_after_copies(&sh.kv_full);
  ring_at<DKV_STAGES> at;
  for (int head = p.g * c.r; head < (p.g + 1) * c.r; head++) {
    for (int first = p.key0; first < p.end; first += QUERIES, at.next()) {
      int64_t row = p.begin + first;
      int rows = p.count - first;
      const bf16 *q = (const bf16 *)c.q + p.g * c.q_group + (head - p.g * c.r) * c.d;
      const bf16 *dout = (const bf16 *)c.dout + head * c.d;
      barrier_wait(&sh.bars.empty[at.stage], at.parity ^ 1);
      copy_rows<QUERIES>(sh.q[at.stage], lane, copy_from(q, c.q_ld) + row * c.q_ld, c.q_ld, rows);
      copy_rows<QUERIES>(sh.dout[at.stage], lane, copy_from(dout, c.dout_ld) + row * c.dout_ld,
                         c.dout_ld, rows);
      copy_column<QUERIES>(sh.lse[at.stage], c.lse + row * c.lse_ld + head, c.lse_ld, rows);
      copy_column<QUERIES>(sh.delta[at.stage], c.delta + row * (c.kv_heads * c.r) + head,
                           c.kv_heads * c.r, rows);
      barrier_arrive_after_copies(&sh.bars.full[at.stage]);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/* p: from scores (keys `key` + lane/4 + 8 half, queries from `first`) to probabilities. */
__device__ __forceinline__ void dkv_probabilities(float (&p)[32], const float *lse, int first,
                                                  int key, const struct attention_call &c) {
  int lane = threadIdx.x % 32;
  float scale = c.scale * LOG2_E;
#pragma unroll
  for (int n = 0; n < QUERIES / 8; n++) {
    float2 x = load_two_here(&lse[8 * n + lane % 4 * 2]);
    x.x *= LOG2_E;
    x.y *= LOG2_E;
#pragma unroll
    for (int i = 4 * n; i < 4 * n + 4; i++) p[i] = exp2_fast(p[i] * scale - (i % 2 ? x.y : x.x));
  }
  if (first < key + 15 || (c.window > 0 && first + QUERIES - 1 - key >= c.window)) {
    int query = first + lane % 4 * 2;
    key += lane / 4;
#pragma unroll
    for (int i = 0; i < 32; i++) {
      if (!attention_sees(query + i / 4 * 8 + i % 2, key + i / 2 % 2 * 8, c.window)) p[i] = 0;
    }
  }
}

/* dP becomes dS = P (dP - delta); P as left operands. */
__device__ __forceinline__ void dkv_ds(float (&dp)[32], const uint32_t (&p)[QUERIES / 16][4],
                                       const float *delta) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < QUERIES / 8; n++) {
    float2 x = load_two_here(&delta[8 * n + lane % 4 * 2]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float2 weight = unpack_two(p[n / 2][n % 2 * 2 + half]);
      float *to = &dp[4 * n + 2 * half];
      to[0] = weight.x * (to[0] - x.x);
      to[1] = weight.y * (to[1] - x.y);
    }
  }
}

/* Where a warpgroup is in its block's tiles of queries: all of one head, then of the next. */
struct dkv_at {
  ring_at<DKV_STAGES> ring;
  int head, first; /* of the group; the tile's first query */
};

/* Goes on from `at` to a tile that sees keys of this warpgroup (from `mine` on) and waits for it;
 * lets go of those before it. False: there is none. */
__device__ __forceinline__ bool dkv_find(struct dkv_shared &sh, const struct attention_call &c,
                                         const struct key_place &p, int mine, struct dkv_at &at) {
  for (;; at.ring.next(), at.first += QUERIES) {
    if (at.first >= p.end) {
      at.first = p.key0;
      if (++at.head == c.r) return false;
    }
    barrier_wait_for_products(&sh.bars.full[at.ring.stage], at.ring.parity);
    if (at.first + QUERIES > mine && (c.window == 0 || at.first - (mine + 63) < c.window))
      return true;
    ring_release(sh.bars, at.ring.stage);
  }
}

__device__ __forceinline__ void
dkv_multiplier(struct dkv_shared &sh, const struct attention_call &c, const struct key_place &p) {
  int row0 = uniform(threadIdx.x / WARPGROUP) * 64, warp_row = threadIdx.x / 32 * 16;
  int before = -1; /* stage of the tile whose dS waits for its product */
  float dk[64], dv[64];
  uint32_t v[V_LEFT][4], w[QUERIES / 16][4]; /* w: P, then dS */
  struct dkv_at at = {{}, 0, p.key0};
#pragma unroll
  for (int i = 0; i < 64; i++) dk[i] = dv[i] = 0;
#pragma unroll
  for (int i = 0; i < QUERIES / 4; i++) w[i / 4][i % 4] = 0;
  barrier_wait_for_products(&sh.kv_full, 0);
  load_left(v, sh.v, warp_row);
  for (; dkv_find(sh, c, p, p.key0 + row0, at); at.ring.next(), at.first += QUERIES) {
    int stage = uniform(at.ring.stage);
    float s[32], dp[32];
    wgmma_fence();
    score(s, sh.k, row0, sh.q[stage]);
    wgmma_commit();
    mix<QUERIES>(dk, w, sh.q[before < 0 ? stage : before]); /* the first time of zeros */
    wgmma_commit();
    wgmma_wait<1>();
    sums_ready(s);
    dkv_probabilities(s, sh.lse[stage], at.first, p.key0 + warp_row, c);
    wgmma_wait<0>();
    sums_ready(dk);
    left_ready(w);
    if (before >= 0) ring_release(sh.bars, before);
    before = stage;
    as_left(w, s);
    wgmma_fence();
    score(dp, v, sh.v, row0, sh.dout[stage]);
    wgmma_commit();
    mix<QUERIES>(dv, w, sh.dout[stage]);
    wgmma_commit();
    wgmma_wait<1>();
    sums_ready(dp);
    dkv_ds(dp, w, sh.delta[stage]);
    wgmma_wait<0>();
    sums_ready(dv);
    left_ready(w);
    as_left(w, dp);
  }
  if (before >= 0) {
    wgmma_fence();
    mix<QUERIES>(dk, w, sh.q[before]);
    wgmma_commit();
    wgmma_wait<0>();
    sums_ready(dk);
    left_ready(w);
    ring_release(sh.bars, before);
  }
  int64_t to = (p.begin + p.key0 + warp_row) * c.dqkv_ld + p.g * c.kv_group;
  float scale[2] = {c.scale, c.scale}, one[2] = {1, 1};
  store_sums(dk, scale, (bf16 *)c.dk + to, c.dqkv_ld, p.keys - warp_row, c.d);
  store_sums(dv, one, (bf16 *)c.dv + to, c.dqkv_ld, p.keys - warp_row, c.d);
}

/* Grid: tiles of keys x groups. */
__global__ void __launch_bounds__(SM90_THREADS, 1) sm90_dkv(const struct attention_call c) {
  extern __shared__ char raw[];
  auto &sh = *reinterpret_cast<struct dkv_shared *>(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
  struct attention_item item;
  if (!attention_item_of<KEYS>(c, blockIdx.x / c.kv_heads, false, &item)) return;
  struct key_place p = {
      (int)blockIdx.x % c.kv_heads, item.tile * KEYS, 0, item.count, 0, item.begin};
  p.keys = min((int)KEYS, item.count - p.key0);
  p.end = attention_queries_end(p.key0 + p.keys - 1, item.count, c.window);
  if (threadIdx.x == 0) {
    ring_init(sh.bars);
    barrier_init(&sh.kv_full, WARPGROUP);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= 2 * WARPGROUP) {
    registers_down<COPIER_REGISTERS>();
    dkv_copier(sh, c, p);
  } else {
    registers_up<MULTIPLIER_REGISTERS>();
    dkv_multiplier(sh, c, p);
  }
}

/* dQ: blocks stay and take tiles of 128 queries of a head, a warpgroup 64, against tiles of 64
 * keys. Queries and output gradients become fragments at once, so that the next tile's can come. */
enum { DQ_QUERIES = ATTENTION_MMA_TILE, DQ_KEYS = 64, DQ_STAGES = 4 };

/* One tile of queries: where it is and the keys it sees. rows 0: there is none. */
struct query_place {
  int head, g, row0, rows, lo, hi, begin;
};

struct dq_shared {
  tile<DQ_QUERIES> q, dout, out;
  tile<DQ_KEYS> k[DQ_STAGES], v[DQ_STAGES];
  float lse[DQ_QUERIES];
  ring_bars<1> q_bars;
  ring_bars<DQ_STAGES> bars;
  struct query_place place; /* of q, dout and out */
};

__device__ __forceinline__ void find(const struct attention_call &c, int unit,
                                     struct query_place *p) {
  struct attention_item item;
  int heads = c.kv_heads * c.r;
  p->rows = 0;
  if (!attention_item_of<DQ_QUERIES>(c, unit / heads, true, &item)) return;
  p->head = unit % heads;
  p->g = p->head / c.r;
  p->row0 = item.tile * DQ_QUERIES;
  p->rows = min((int)DQ_QUERIES, item.count - p->row0);
  p->begin = item.begin;
  attention_keys(p->row0, p->row0 + p->rows - 1, c.window, &p->lo, &p->hi);
}

__device__ __forceinline__ void dq_copier(struct dq_shared &sh, const struct attention_call &c) {
  ring_at<1> qa;
  ring_at<DQ_STAGES> at;
  const copy_lane lane = copy_lane_of(c.d);
  const ptrdiff_t to_v = (const bf16 *)c.v - (const bf16 *)c.k;
  int unit = blockIdx.x; /* the first thread's */
  for (;;) {
    copiers_sync(); /* nobody needs the last place */
    if (threadIdx.x % WARPGROUP == 0) {
      struct query_place next;
      find(c, unit, &next);
      unit = unit_after(c, unit);
      barrier_wait(&sh.q_bars.empty[0], qa.parity ^ 1);
      sh.place = next;
      barrier_arrive(&sh.q_bars.full[0]);
    }
    copiers_sync();
    const struct query_place &p = sh.place;
    if (p.rows == 0) {
      barrier_arrive(&sh.q_bars.full[0]);
      break;
    }
    int64_t row = p.begin + p.row0;
    const bf16 *q = (const bf16 *)c.q + row * c.q_ld + p.g * c.q_group + p.head % c.r * c.d;
    const bf16 *dout = (const bf16 *)c.dout + row * c.dout_ld + p.head * c.d;
    const bf16 *out = (const bf16 *)c.out + row * c.out_ld + p.head * c.d;
    copy_rows<DQ_QUERIES>(sh.q, lane, copy_from(q, c.q_ld), c.q_ld, p.rows);
    copy_rows<DQ_QUERIES>(sh.dout, lane, copy_from(dout, c.dout_ld), c.dout_ld, p.rows);
    copy_rows<DQ_QUERIES>(sh.out, lane, copy_from(out, c.out_ld), c.out_ld, p.rows);
    copy_column<DQ_QUERIES>(sh.lse, c.lse + row * c.lse_ld + p.head, c.lse_ld, p.rows);
    barrier_arrive_after_copies(&sh.q_bars.full[0]);
    qa.next();
    int key0 = (p.hi - 1) / DQ_KEYS * DQ_KEYS, lo = p.lo, hi = p.hi;
    const bf16 *k = copy_from((const bf16 *)c.k + p.g * c.kv_group, c.kv_ld) +
                    ((int64_t)p.begin + key0) * c.kv_ld;
    for (; key0 + DQ_KEYS > lo; key0 -= DQ_KEYS, k -= DQ_KEYS * c.kv_ld, at.next()) {
      barrier_wait(&sh.bars.empty[at.stage], at.parity ^ 1);
      copy_rows<DQ_KEYS>(sh.k[at.stage], lane, k, c.kv_ld, hi - key0);
      copy_rows<DQ_KEYS>(sh.v[at.stage], lane, k + to_v, c.kv_ld, hi - key0);
      barrier_arrive_after_copies(&sh.bars.full[at.stage]);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/* s: from scores of queries (from `first`, this warp's) against keys from key0 to probabilities. */
__device__ __forceinline__ void dq_probabilities(float (&s)[32], const float (&lse)[2], int first,
                                                 int key0, const struct attention_call &c) {
  int lane = threadIdx.x % 32;
  float scale = c.scale * LOG2_E;
#pragma unroll
  for (int i = 0; i < 32; i++) s[i] = exp2_fast(s[i] * scale - lse[i / 2 % 2]);
  if (key0 + DQ_KEYS - 1 > first || (c.window > 0 && first + 15 - key0 >= c.window)) {
    int query = first + lane / 4, key = key0 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i++) {
      if (!attention_sees(query + i / 2 % 2 * 8, key + i / 4 * 8 + i % 2, c.window)) s[i] = 0;
    }
  }
}

/* delta = dout . out of this thread's two rows, of which each of four lanes has a quarter. */
__device__ __forceinline__ void dq_delta(float (&delta)[2], const uint32_t (&dout)[DIM / 16][4],
                                         const tile<DQ_QUERIES> &out, int row0) {
  uint32_t o[DIM / 16][4];
  load_left(o, out, row0);
  delta[0] = delta[1] = 0;
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float2 x = unpack_two(dout[k][j]), y = unpack_two(o[k][j]);
      delta[j % 2] += x.x * y.x + x.y * y.y;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    delta[half] += __shfl_xor_sync(0xffffffffu, delta[half], 1);
    delta[half] += __shfl_xor_sync(0xffffffffu, delta[half], 2);
  }
}

__device__ __forceinline__ void dq_multiplier(struct dq_shared &sh,
                                              const struct attention_call &c) {
  int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32; /* 8 warps, 128 rows */
  ring_at<1> qa;
  ring_at<DQ_STAGES> at;
  for (;;) {
    barrier_wait(&sh.q_bars.full[0], qa.parity);
    struct query_place p = sh.place;
    p = {uniform(p.head), uniform(p.g),  uniform(p.row0), uniform(p.rows),
         uniform(p.lo),   uniform(p.hi), uniform(p.begin)};
    if (p.rows == 0) break;
    uint32_t q[DIM / 16][4], dout[DIM / 16][4], w[DQ_KEYS / 16][4];
    float dq[64], lse[2], delta[2];
    int before = -1; /* stage of the tile whose last product is under way */
#pragma unroll
    for (int i = 0; i < 64; i++) dq[i] = 0;
    load_left(q, sh.q, warp_row);
    load_left(dout, sh.dout, warp_row);
    dq_delta(delta, dout, sh.out, warp_row);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = warp_row + lane / 4 + 8 * half;
      lse[half] = sh.lse[row] * LOG2_E;
      if (lane % 4 == 0 && row < p.rows)
        c.delta[(int64_t)(p.begin + p.row0 + row) * (c.kv_heads * c.r) + p.head] = delta[half];
    }
    ring_release(sh.q_bars, 0);
    qa.next();
    for (int key0 = (p.hi - 1) / DQ_KEYS * DQ_KEYS; key0 + DQ_KEYS > p.lo;
         key0 -= DQ_KEYS, at.next()) {
      float s[32], dp[32];
      barrier_wait_for_products(&sh.bars.full[at.stage], at.parity);
      int stage = uniform(at.stage);
      wgmma_fence();
      score(s, q, sh.k[stage]);
      wgmma_commit();
      score(dp, dout, sh.v[stage]);
      wgmma_commit();
      wgmma_wait<2>();
      sums_ready(dq);
      left_ready(w);
      if (before >= 0) ring_release(sh.bars, before);
      before = stage;
      wgmma_wait<1>();
      sums_ready(s);
      dq_probabilities(s, lse, p.row0 + warp_row, key0, c);
      wgmma_wait<0>();
      sums_ready(dp);
#pragma unroll
      for (int i = 0; i < 32; i++) dp[i] = s[i] * (dp[i] - delta[i / 2 % 2]);
      as_left(w, dp);
      wgmma_fence();
      mix<DQ_KEYS>(dq, w, sh.k[stage]);
      wgmma_commit();
    }
    wgmma_wait<0>();
    sums_ready(dq);
    if (before >= 0) ring_release(sh.bars, before);
    float scale[2] = {c.scale, c.scale};
    bf16 *to = (bf16 *)c.dq + (int64_t)(p.begin + p.row0 + warp_row) * c.dqkv_ld + p.g * c.q_group +
               p.head % c.r * c.d;
    store_sums(dq, scale, to, c.dqkv_ld, p.rows - warp_row, c.d);
  }
}

__global__ void __launch_bounds__(SM90_THREADS, 1) sm90_dq(const struct attention_call c) {
  extern __shared__ char raw[];
  auto &sh = *reinterpret_cast<struct dq_shared *>(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
  if (threadIdx.x == 0) {
    ring_init_described(sh.q_bars);
    ring_init(sh.bars);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= 2 * WARPGROUP) {
    registers_down<COPIER_REGISTERS>();
    dq_copier(sh, c);
  } else {
    registers_up<MULTIPLIER_REGISTERS>();
    dq_multiplier(sh, c);
  }
}

template <class K>
mt_err launch(struct mt_cuda *cuda, K *kernel, int64_t grid, size_t bytes,
              const struct attention_call *c) {
  bytes += 1024; /* tiles begin at multiples of 1024 */
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
      "attention_bwd"));
  kernel<<<(unsigned)grid, SM90_THREADS, bytes, cuda->stream>>>(*c);
  return mt_cuda_launched("attention_bwd");
}

} // namespace

mt_err mt_cuda_attention_sm90_bwd(struct mt_cuda *cuda, const struct attention_call *c) {
  int64_t grid = (int64_t)c->item_grid * c->kv_heads, units = grid * c->r;
  static_assert(sizeof(struct dq_shared) + 1024 <= SM90_SHARED_BYTES, "a block's");
  static_assert(sizeof(struct dkv_shared) + 1024 <= SM90_SHARED_BYTES, "a block's");
  MT_TRY(launch(cuda, sm90_dq, units < cuda->sm_count ? units : cuda->sm_count,
                sizeof(struct dq_shared), c));
  return launch(cuda, sm90_dkv, grid, sizeof(struct dkv_shared), c);
}
