/* The ring of stages between the thread that loads and the warpgroups that multiply, and what both
 * do with a stage. S, a kernel's design, says KIND, WGRAD, TILE_N, STAGES, B_BYTES, STAGE_BYTES and
 * find: whether there is such a unit, and which tile of it is this block's (grouped_tile.cuh). */
#ifndef MT_KERNELS_CUDA_SM90_GROUPED_RING_CUH
#define MT_KERNELS_CUDA_SM90_GROUPED_RING_CUH

#include "kernels/cuda/sm90/gemm_ptx.cuh"
#include "kernels/cuda/sm90/grouped_maps.cuh"
#include "kernels/cuda/sm90/grouped_tile.cuh"
#include "kernels/cuda/sm90/grouped_units.cuh"

enum {
  DEPTH = 64, /* of a stage: one row of the 128-byte swizzle */
  THREADS = 3 * 128,
  MULTIPLIER_WARPS = 8,
  A_BYTES = TILE_M * DEPTH * 2,
  HALF_A = A_BYTES / 2,
  SLAB = 64 * DEPTH * 2, /* 64 along m or n, where the depth is not contiguous */
  GROUPS_MOST = 512,
};

/* Shared memory past the ring and the staging memory. */
struct control {
  uint64_t full[8], empty[8];
  struct unit_places units;
  double squares[MULTIPLIER_WARPS];
  int offsets[GROUPS_MOST + 1];
};

/* What such a find is for tiles of TILE_N columns; wgrad's of matrices [m, n]. */
template <bool WGRAD, int TILE_N, class J>
__device__ __forceinline__ bool find_unit(const J &j, const struct control *s, struct walk *at,
                                          int unit, int rank, struct place *p) {
  int nt = (j.n + TILE_N - 1) / TILE_N;
  if (WGRAD)
    return find_matrix(s->offsets, j.groups, (j.m + TILE_M - 1) / TILE_M, nt, unit, rank, p);
  return find_rows(at, s->offsets, j.groups, nt, unit, rank, p);
}

/* The life of the thread that hands units out (grouped_units.cuh). */
template <class S, class J>
__device__ __forceinline__ void hand_out(const J &j, const struct control *s, int rank) {
  struct walk at = {0, 0};
  struct place p;
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<true>(&s->units, j.units, &u))
    take_unit(&s->units, j.units, rank, &u);
  end_units(j.units, rank);
}

/* A position in the ring. */
struct ring {
  int stage;
  uint32_t parity;
};
template <int STAGES> __device__ __forceinline__ void advance(struct ring *r) {
  if (++r->stage == STAGES) r->stage = 0, r->parity ^= 1;
}

/* One thread readies the barriers: a stage is filled by its bytes and an arrival of each of the
 * loading threads, 1 or with `beside` a warp besides, and free again once the multiplying warps of
 * both blocks of the cluster are done with it, of this block each lane where there is more in it
 * than products read (`beside`). */
template <class S> __device__ __forceinline__ void init_ring(struct control *s, bool beside) {
  int arrivals = beside ? 1 + 32 : 1;
  init_units(&s->units, MULTIPLIER_WARPS + (beside ? 3 : 2));
  for (int i = 0; i < S::STAGES; i++) {
    barrier_init(shared_address(&s->full[i]), arrivals);
    barrier_init(shared_address(&s->empty[i]), MULTIPLIER_WARPS * (beside ? 32 + 1 : 2));
  }
  barrier_init_done();
}

/* Half h of a's tile at depth k0: 64 rows, or for wgrad 64 columns. */
template <class S, bool BOTH>
__device__ __forceinline__ void load_a(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                       const struct place &p, int h, int k0) {
  int at = p.m * TILE_M + h * 64;
  dst += (uint32_t)(h * HALF_A);
  if (S::WGRAD)
    tma_4d<BOTH>(dst, map, bar, at, RAGGED_ROWS - (p.end - p.begin) + k0, RAGGED_ROWS, p.end);
  else
    tma_2d<BOTH>(dst, map, bar, k0, p.begin + at);
}

/* Half h of b's tile. */
template <class S, bool BOTH>
__device__ __forceinline__ void load_b(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                       const struct place &p, int h, int k0) {
  int at = p.n * S::TILE_N + h * S::TILE_N / 2;
  dst += (uint32_t)(h * S::B_BYTES / 2);
  if (S::KIND == GROUPED_FWD) {
    tma_3d<BOTH>(dst, map, bar, k0, at, p.g);
  } else {
#pragma unroll
    for (int slab = 0; slab < S::TILE_N / 128; slab++, at += 64, dst += SLAB) {
      if (S::KIND == GROUPED_DGRAD)
        tma_3d<BOTH>(dst, map, bar, at, k0, p.g);
      else
        tma_4d<BOTH>(dst, map, bar, at, RAGGED_ROWS - (p.end - p.begin) + k0, RAGGED_ROWS, p.end);
    }
  }
}

/* Tells both blocks that this warp has left the stage. */
__device__ __forceinline__ void leave(uint32_t empty, int stage) {
  uint32_t lane = threadIdx.x % 32;
  if (lane < 2) barrier_arrive_at(empty + (uint32_t)stage * 8, lane);
}

/* One stage: a's 64 rows of this warpgroup by all of b. Steps of 16 along the depth are 32 bytes
 * where it is contiguous, 16 rows of 128 bytes where it is not. */
template <class S>
__device__ __forceinline__ void multiply_stage(float (&d)[S::TILE_N / 2], uint32_t a, uint32_t b,
                                               bool add) {
  constexpr int A_MN = S::WGRAD, B_MN = S::KIND != GROUPED_FWD;
  uint64_t da = tile_descriptor(a, A_MN ? SLAB : 0), db = tile_descriptor(b, B_MN ? SLAB : 0);
#pragma unroll
  for (int i = 0; i < DEPTH / 16; i++) {
    wgmma<A_MN, B_MN>(d, da + (uint64_t)(i * (A_MN ? 2048 : 32) / 16),
                      db + (uint64_t)(i * (B_MN ? 2048 : 32) / 16), add || i > 0);
  }
}

/* All of a tile: d (=). a, b: this warpgroup's rows of a and all of b in the first stage. `first`
 * runs while the products of the first stage do. */
template <class S, class First>
__device__ __forceinline__ void multiply_tile(float (&d)[S::TILE_N / 2], struct ring *r, int steps,
                                              uint32_t full, uint32_t empty, uint32_t a, uint32_t b,
                                              First first) {
  int last = 0;
  for (int i = 0; i < steps; i++) {
    uint32_t stage = (uint32_t)(r->stage * S::STAGE_BYTES);
    barrier_wait(full + (uint32_t)r->stage * 8, r->parity);
    wgmma_fence();
    multiply_stage<S>(d, a + stage, b + stage, i > 0);
    wgmma_commit();
    if (i == 0) first();
    wgmma_wait<1>(); /* the stage before is done with */
    if (i > 0) leave(empty, last);
    last = r->stage;
    advance<S::STAGES>(r);
  }
  wgmma_wait<0>();
  sums_ready(d);
  leave(empty, last);
}

/* The same where every lane has read what came beside: this block, which brought it, waits for each
 * of them. */
__device__ __forceinline__ void leave_each(uint32_t empty, int stage, int rank) {
  barrier_arrive(empty + (uint32_t)stage * 8);
  if (threadIdx.x % 32 == 0) barrier_arrive_at(empty + (uint32_t)stage * 8, (uint32_t)rank ^ 1);
}

/* For a warpgroup with nothing to make: the ring goes on. */
template <class S>
__device__ __forceinline__ void pass_stages(struct ring *r, int count, uint32_t full,
                                            uint32_t empty) {
  for (int i = 0; i < count; i++) {
    barrier_wait(full + (uint32_t)r->stage * 8, r->parity);
    leave(empty, r->stage);
    advance<S::STAGES>(r);
  }
}

#endif
