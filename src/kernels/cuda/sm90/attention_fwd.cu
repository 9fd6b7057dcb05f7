/* Attention forward on Hopper (FlashAttention-3: Shah et al. 2024, arXiv:2407.08608, section 3).
 * Blocks stay and take tiles of 128 queries of one head; a warpgroup copies, two multiply 64
 * queries each, which stay in registers. The next tile's scores are under way while this one's
 * probabilities meet the values, and the exponentials run beside both. */
#include "kernels/cuda/sm90/attention_wgmma.cuh"

namespace {

enum { BM = ATTENTION_MMA_TILE, BN = 128, STAGES = 2 };
/* Registers of a thread after the start: 128 * (2 * 232 + 40) of 65536. */
enum { MULTIPLIER_REGISTERS = 232, COPIER_REGISTERS = 40 };

/* One tile of queries: where it is and the keys it sees. rows 0: there is none. */
struct place {
  int head, g, rows, first, lo, hi;
  int row, begin; /* its first row; its sequence's */
};

struct fwd_shared {
  tile<BM> q;
  tile<BN> k[STAGES], v[STAGES];
  ring_bars<1> q_bars;
  ring_bars<STAGES> k_bars, v_bars;
  struct place place; /* of q */
};

__device__ __forceinline__ void find(const struct attention_call &c, int unit, struct place *p) {
  struct attention_item item;
  int heads = c.kv_heads * c.r;
  p->rows = 0;
  if (!attention_item_of<BM>(c, unit / heads, true, &item)) return;
  int row0 = item.tile * BM;
  p->head = unit % heads;
  p->g = p->head / c.r;
  p->rows = min((int)BM, item.count - row0);
  p->first = c.offset + row0;
  p->row = item.begin + row0;
  p->begin = item.begin;
  attention_keys(p->first, p->first + p->rows - 1, c.window, &p->lo, &p->hi);
}

__device__ __forceinline__ void copier(struct fwd_shared &sh, const struct attention_call &c) {
  ring_at<1> qa;
  ring_at<STAGES> at;
  const copy_lane lane = copy_lane_of(c.d);
  const ptrdiff_t to_v = (const bf16 *)c.v - (const bf16 *)c.k;
  int unit = blockIdx.x; /* the first thread's */
  for (;;) {
    copiers_sync(); /* nobody needs the last place */
    if (threadIdx.x % WARPGROUP == 0) {
      struct place next;
      find(c, unit, &next);
      unit = unit_after(c, unit);
      barrier_wait(&sh.q_bars.empty[0], qa.parity ^ 1);
      sh.place = next;
      barrier_arrive(&sh.q_bars.full[0]);
    }
    copiers_sync();
    const struct place &p = sh.place;
    if (p.rows == 0) {
      barrier_arrive(&sh.q_bars.full[0]);
      break;
    }
    const bf16 *q =
        (const bf16 *)c.q + (int64_t)p.row * c.q_ld + p.g * c.q_group + p.head % c.r * c.d;
    copy_rows<BM>(sh.q, lane, copy_from(q, c.q_ld), c.q_ld, p.rows);
    barrier_arrive_after_copies(&sh.q_bars.full[0]);
    qa.next();
    int key0 = (p.hi - 1) / BN * BN, lo = p.lo, hi = p.hi;
    const bf16 *k = copy_from((const bf16 *)c.k + p.g * c.kv_group, c.kv_ld) +
                    ((int64_t)p.begin + key0) * c.kv_ld;
    for (; key0 + BN > lo; key0 -= BN, k -= BN * c.kv_ld) {
      barrier_wait(&sh.k_bars.empty[at.stage], at.parity ^ 1);
      copy_rows<BN>(sh.k[at.stage], lane, k, c.kv_ld, hi - key0);
      barrier_arrive_after_copies(&sh.k_bars.full[at.stage]);
      barrier_wait(&sh.v_bars.empty[at.stage], at.parity ^ 1);
      copy_rows<BN>(sh.v[at.stage], lane, k + to_v, c.kv_ld, hi - key0);
      barrier_arrive_after_copies(&sh.v_bars.full[at.stage]);
      at.next();
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/* The running softmax of a thread's two rows. */
struct rows_state {
  float top[2], sum[2];
};

/* Scores of queries from `mine` (this warpgroup's first) against keys from key0 become
 * probabilities relative to the largest so far; shrink: what earlier sums are to be multiplied by.
 */
__device__ __forceinline__ void softmax(float (&s)[64], struct rows_state &st, float (&shrink)[2],
                                        int mine, int key0, int window, float scale) {
  int lane = threadIdx.x % 32;
  if (key0 + BN - 1 > mine || (window > 0 && mine + 63 - key0 >= window)) {
    int query = mine + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4, key = key0 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++) {
      if (!attention_sees(query + i / 2 % 2 * 8, key + i / 4 * 8 + i % 2, window)) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float top = st.top[half];
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float base = top == -INFINITY ? 0.0f : top * scale;
    shrink[half] = exp2_fast(st.top[half] * scale - base);
    st.top[half] = top;
    float sum = 0;
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) {
      s[i] = exp2_fast(s[i] * scale - base);
      s[i + 1] = exp2_fast(s[i + 1] * scale - base);
      sum += s[i] + s[i + 1];
    }
    st.sum[half] = st.sum[half] * shrink[half] + sum;
  }
}

__device__ __forceinline__ void finish(const struct attention_call &c, const struct place &p,
                                       const float (&o)[64], struct rows_state &st) {
  int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16; /* 8 warps, 128 rows */
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = st.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    inverse[half] = 1.0f / sum;
    int row = row0 + lane / 4 + 8 * half;
    if (c.lse && lane % 4 == 0 && row < p.rows)
      c.lse[(int64_t)(p.row + row) * c.lse_ld + p.head] = st.top[half] * c.scale + logf(sum);
  }
  store_sums(o, inverse, (bf16 *)c.out + (int64_t)(p.row + row0) * c.out_ld + p.head * c.d,
             c.out_ld, p.rows - row0, c.d);
}

/* The two multiplying warpgroups take turns in starting products (FlashAttention-3, section 3.1):
 * while one's run, the other has its exponentials. A tenth faster at 8192 keys. Barriers 2 and 3 of
 * the block; both warpgroups go through the same tiles. */
__device__ __forceinline__ void turn_wait(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(2 + group) : "memory");
}
__device__ __forceinline__ void turn_give(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(3 - group) : "memory");
}

__device__ __forceinline__ void multiplier(struct fwd_shared &sh, const struct attention_call &c) {
  int group = uniform(threadIdx.x / WARPGROUP), row0 = group * 64;
  float scale = c.scale * LOG2_E;
  ring_at<1> qa;
  ring_at<STAGES> at;
  if (group == 1) turn_give(1);
  for (;;) {
    barrier_wait(&sh.q_bars.full[0], qa.parity);
    struct place p = sh.place;
    p = {uniform(p.head), uniform(p.g),  uniform(p.rows), uniform(p.first),
         uniform(p.lo),   uniform(p.hi), uniform(p.row),  uniform(p.begin)};
    if (p.rows == 0) break;
    float s[64], o[64], shrink[2];
    uint32_t q[DIM / 16][4], w[BN / 16][4];
    struct rows_state st = {{-INFINITY, -INFINITY}, {0, 0}};
    int key0 = (p.hi - 1) / BN * BN, mine = p.first + row0;
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0;
    load_left(q, sh.q, threadIdx.x / 32 * 16);
    ring_release(sh.q_bars, 0);
    qa.next();
    barrier_wait_for_products(&sh.k_bars.full[at.stage], at.parity);
    wgmma_fence();
    score(s, q, sh.k[uniform(at.stage)]);
    wgmma_commit();
    wgmma_wait<0>();
    sums_ready(s);
    ring_release(sh.k_bars, at.stage);
    softmax(s, st, shrink, mine, key0, c.window, scale);
    as_left(w, s);
    for (key0 -= BN; key0 + BN > p.lo; key0 -= BN) {
      ring_at<STAGES> before = at;
      at.next();
      barrier_wait_for_products(&sh.k_bars.full[at.stage], at.parity);
      turn_wait(group);
      wgmma_fence();
      score(s, q, sh.k[uniform(at.stage)]);
      wgmma_commit();
      barrier_wait_for_products(&sh.v_bars.full[before.stage], before.parity);
      wgmma_fence();
      mix<BN>(o, w, sh.v[uniform(before.stage)]);
      wgmma_commit();
      turn_give(group);
      wgmma_wait<1>();
      sums_ready(s);
      ring_release(sh.k_bars, at.stage);
      softmax(s, st, shrink, mine, key0, c.window, scale);
      wgmma_wait<0>();
      sums_ready(o);
      left_ready(w);
      ring_release(sh.v_bars, before.stage);
#pragma unroll
      for (int i = 0; i < 64; i++) o[i] *= shrink[i / 2 % 2];
      as_left(w, s);
    }
    barrier_wait_for_products(&sh.v_bars.full[at.stage], at.parity);
    wgmma_fence();
    mix<BN>(o, w, sh.v[uniform(at.stage)]);
    wgmma_commit();
    wgmma_wait<0>();
    sums_ready(o);
    ring_release(sh.v_bars, at.stage);
    at.next();
    finish(c, p, o, st);
  }
}

__global__ void __launch_bounds__(SM90_THREADS, 1) sm90_fwd(const struct attention_call c) {
  extern __shared__ char raw[];
  auto &sh = *reinterpret_cast<struct fwd_shared *>(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
  if (threadIdx.x == 0) {
    ring_init_described(sh.q_bars);
    ring_init(sh.k_bars);
    ring_init(sh.v_bars);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= 2 * WARPGROUP) {
    registers_down<COPIER_REGISTERS>();
    copier(sh, c);
  } else {
    registers_up<MULTIPLIER_REGISTERS>();
    multiplier(sh, c);
  }
}

} // namespace

bool mt_cuda_attention_sm90_takes(const struct mt_cuda *cuda, const struct attention_call *c) {
  return !cuda->portable && cuda->capability == 90 && c->d > 64 &&
         sizeof(struct fwd_shared) + 1024 <= cuda->shared_optin_bytes;
}

mt_err mt_cuda_attention_sm90_fwd(struct mt_cuda *cuda, const struct attention_call *c) {
  size_t bytes = sizeof(struct fwd_shared) + 1024; /* tiles begin at multiples of 1024 */
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(sm90_fwd, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
      "attention_fwd"));
  int64_t units = (int64_t)c->item_grid * c->kv_heads * c->r;
  int64_t grid = units < cuda->sm_count ? units : cuda->sm_count;
  sm90_fwd<<<(unsigned)grid, SM90_THREADS, bytes, cuda->stream>>>(*c);
  return mt_cuda_launched("attention_fwd");
}
