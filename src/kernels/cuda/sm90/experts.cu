/* The experts' products joined with SwiGLU on Hopper: grouped.cu's kernel with another end.
 *
 *   up    a tile is 128 rows by 128 columns of gate and the same 128 of up: b's stage holds 128
 * rows of w's first half and 128 of its second, so that d[i] and d[i + 64] are one column's gate
 *         and up. h comes of both as they are stored.
 *   down  a tile is 128 rows by 256 columns of dh, which stays in registers.
 *
 * After a tile's last step along the depth the ring gives as many stages more as its columns of h
 * have chunks of 64, for what goes in and out there: six boxes of 64 rows x 64 columns, gate, up
 * and h of both warpgroups. For down the loading thread fills in gate and up, which so arrive while
 * the products still run; the gradients take their places. TMA writes the boxes out; the stage is
 * left once they have been read, which a warpgroup's first warp sees to one chunk later, or for the
 * last chunk during the next tile's first products. */
#include "kernels/cuda/sm90/grouped_maps.cuh"
#include "kernels/cuda/sm90/grouped_out.cuh"
#include "kernels/cuda/sm90/grouped_ring.cuh"
#include "kernels/cuda/swiglu.cuh"

struct experts_job {
  const int32_t *offsets;
  const float *row_prob;  /* [rows] or NULL */
  float *parts;           /* [tiles along n][rows] or NULL */
  int groups, rows, n, k; /* n: columns of h */
  struct unit_source units;
};

/* Offsets of the boxes in a stage, warpgroup 0's; the other's lie next to them. */
enum { GATE_BOX = 0, UP_BOX = 2 * CHUNK_BYTES, H_BOX = 4 * CHUNK_BYTES };

template <int KIND_> struct joined {
  static constexpr int KIND = KIND_, TILE_N = 256, STAGES = 4;
  static constexpr bool WGRAD = false, UP = KIND == GROUPED_FWD;
  static constexpr int B_BYTES = TILE_N * DEPTH * 2, STAGE_BYTES = A_BYTES + B_BYTES;
  static constexpr int COLS = UP ? TILE_N / 2 : TILE_N, CHUNKS = COLS / 64; /* of h */
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
  static constexpr int SHARED_BYTES = RING_BYTES + (int)sizeof(struct control);
  static_assert(6 * CHUNK_BYTES <= STAGE_BYTES && SHARED_BYTES <= 232448, "does not fit");

  static __device__ __forceinline__ bool find(const struct experts_job &j, const struct control *s,
                                              struct walk *at, int unit, int rank,
                                              struct place *p) {
    return find_rows(at, s->offsets, j.groups, (j.n + COLS - 1) / COLS, unit, rank, p);
  }
};

/* Half h of b's tile: for up, gate's rows and up's. */
template <class S, bool BOTH>
__device__ __forceinline__ void load_w(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                       const struct experts_job &j, const struct place &p, int h,
                                       int k0) {
  if (S::UP)
    tma_3d<BOTH>(dst + (uint32_t)(h * S::B_BYTES / 2), map, bar, k0, p.n * S::COLS + h * j.n, p.g);
  else
    load_b<S, BOTH>(dst, map, bar, p, h, k0);
}

/* The stage for chunk c of the tile's columns. For down with what there is of gate and up: rows
 * past the group's end come as zeros, warpgroups and chunks without work get nothing. */
template <class S>
__device__ __forceinline__ void load_chunk(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                           const struct experts_job &j, const struct place &p,
                                           int c) {
  int col = p.n * S::COLS + c * 64, rows = p.end - p.begin;
  int halves = S::UP || col >= j.n ? 0 : min(2, (rows - p.m * TILE_M + 63) / 64);
  barrier_expect(bar, (uint32_t)(2 * halves * CHUNK_BYTES));
  for (int h = 0; h < halves; h++) {
    int row = RAGGED_ROWS - rows + p.m * TILE_M + h * 64;
    uint32_t to = dst + (uint32_t)(h * CHUNK_BYTES);
    tma_4d<false>(to + GATE_BOX, map, bar, col, row, RAGGED_ROWS, p.end);
    tma_4d<false>(to + UP_BOX, map, bar, j.n + col, row, RAGGED_ROWS, p.end);
  }
}

/* The loading thread's whole life (see grouped.cu). */
template <class S>
__device__ __forceinline__ void load_all(const struct experts_job &j, const CUtensorMap *map_a,
                                         const CUtensorMap *map_w, const CUtensorMap *map_in,
                                         const struct control *s, uint32_t tiles, int rank) {
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  struct ring r = {0, 1}; /* the first waits find the ring empty */
  struct walk at = {0, 0};
  struct place p;
  int steps = (j.k + DEPTH - 1) / DEPTH;
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<true>(&s->units, j.units, &u)) {
    for (int i = 0; i < steps + S::CHUNKS; i++) {
      uint32_t bar = full + (uint32_t)r.stage * 8, a = tiles + (uint32_t)(r.stage * S::STAGE_BYTES);
      uint32_t b = a + A_BYTES;
      barrier_wait(empty + (uint32_t)r.stage * 8, r.parity);
      if (i >= steps) {
        load_chunk<S>(a, map_in, bar, j, p, i - steps);
      } else {
        barrier_expect(bar, S::STAGE_BYTES);
        if (p.shares_b) {
          load_a<S, false>(a, map_a, bar, p, 0, i * DEPTH);
          load_a<S, false>(a, map_a, bar, p, 1, i * DEPTH);
          load_w<S, true>(b, map_w, bar, j, p, rank, i * DEPTH);
        } else {
          load_a<S, true>(a, map_a, bar, p, rank, i * DEPTH);
          load_w<S, false>(b, map_w, bar, j, p, 0, i * DEPTH);
          load_w<S, false>(b, map_w, bar, j, p, 1, i * DEPTH);
        }
      }
      advance<S::STAGES>(&r);
    }
  }
}

/* A pair of bf16 as float32. */
__device__ __forceinline__ float low_of(uint32_t v) {
  return __uint_as_float(v << 16);
}
__device__ __forceinline__ float high_of(uint32_t v) {
  return __uint_as_float(v & 0xffff0000u);
}

/* Chunk c to the boxes from `at` on (this warpgroup's). Words 0 and 2 of a group of matrices belong
 * to the thread's upper row, 1 and 3 to its lower one, 8 further on: weight[0], weight[1]. */
__device__ __forceinline__ void up_chunk(const float (&d)[128], int c, uint32_t at,
                                         const float (&weight)[2]) {
  int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 % 4 * 16 + (lane & 15);
#pragma unroll
  for (int b = 0; b < 8; b += 2) { /* blocks of 8 columns, 16 bytes */
    int i = 4 * (8 * c + b);
    uint32_t gate[4], up[4], h[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      gate[k] = pair_of(d[i + 2 * k], d[i + 2 * k + 1]);
      up[k] = pair_of(d[64 + i + 2 * k], d[64 + i + 2 * k + 1]);
      h[k] = pair_of(swiglu_at<bf16>(low_of(gate[k]), low_of(up[k]), weight[k & 1]),
                     swiglu_at<bf16>(high_of(gate[k]), high_of(up[k]), weight[k & 1]));
    }
    uint32_t to = at + (uint32_t)(row * 128 + (((b + (lane >> 4)) ^ (row & 7)) << 4));
    store_matrices(to + GATE_BOX, gate);
    store_matrices(to + UP_BOX, up);
    store_matrices(to + H_BOX, h);
  }
}

/* d: dh. The gradients go where gate and up were; each thread reads its own words alone. */
__device__ __forceinline__ void down_chunk(const float (&d)[128], int c, uint32_t at,
                                           const float (&weight)[2], float (&dot)[2]) {
  int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 % 4 * 16 + (lane & 15);
  uint32_t gate[4][4], up[4][4];
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    uint32_t from = at + (uint32_t)(row * 128 + (((b + (lane >> 4)) ^ (row & 7)) << 4));
    load_matrices(gate[b / 2], from + GATE_BOX);
    load_matrices(up[b / 2], from + UP_BOX);
  }
  __syncwarp(); /* matrices are of the whole warp: all are read before one is written */
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    int i = 4 * (8 * c + b);
    uint32_t h[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint32_t g = gate[b / 2][k], u = up[b / 2][k];
      struct swiglu_gradient x =
          swiglu_bwd_at<bf16>(low_of(g), low_of(u), d[i + 2 * k], weight[k & 1], &dot[k & 1]);
      struct swiglu_gradient y =
          swiglu_bwd_at<bf16>(high_of(g), high_of(u), d[i + 2 * k + 1], weight[k & 1], &dot[k & 1]);
      gate[b / 2][k] = pair_of(x.gate, y.gate);
      up[b / 2][k] = pair_of(x.up, y.up);
      h[k] = pair_of(x.h, y.h);
    }
    uint32_t to = at + (uint32_t)(row * 128 + (((b + (lane >> 4)) ^ (row & 7)) << 4));
    store_matrices(to + GATE_BOX, gate[b / 2]);
    store_matrices(to + UP_BOX, up[b / 2]);
    store_matrices(to + H_BOX, h);
  }
}

/* The warpgroup's first warp leaves the stage that TMA was still to read; it is `owed` no more. */
__device__ __forceinline__ void settle(uint32_t empty, int *owed) {
  if (*owed < 0) return;
  if (threadIdx.x % 32 == 0) tma_read_done();
  __syncwarp();
  leave(empty, *owed);
  *owed = -1;
}

/* Row i (0, 1) of the thread's two rows: within the group or not. */
__device__ __forceinline__ int thread_row(int i) {
  return (int)threadIdx.x / 32 % 4 * 16 + (int)threadIdx.x % 32 / 4 + 8 * i;
}

/* The sums of a tile on their way out, through the next CHUNKS stages. owed: as in settle, of the
 * first warp alone. The last stage may stay owed: what the ring loads next needs it not. */
template <class S>
__device__ __forceinline__ void write_chunks(const struct experts_job &j, const float (&d)[128],
                                             const CUtensorMap *map_out, const CUtensorMap *map_h,
                                             const struct place &p, int half, uint32_t tiles,
                                             uint32_t full, uint32_t empty, struct ring *r,
                                             int *owed, const float (&weight)[2], float (&dot)[2]) {
  bool first_warp = threadIdx.x / 32 % 4 == 0, leader = threadIdx.x % 128 == 0;
  int row = RAGGED_ROWS - (p.end - p.begin) + p.m * TILE_M + half * 64;
#pragma unroll
  for (int c = 0; c < S::CHUNKS; c++) {
    int col = p.n * S::COLS + c * 64, stage = r->stage;
    uint32_t at = tiles + (uint32_t)(stage * S::STAGE_BYTES + half * CHUNK_BYTES);
    barrier_wait(full + (uint32_t)stage * 8, r->parity);
    advance<S::STAGES>(r);
    if (col >= j.n) {
      settle(empty, owed);
      leave(empty, stage);
      continue;
    }
    if (S::UP)
      up_chunk(d, c, at, weight);
    else
      down_chunk(d, c, at, weight, dot);
    writes_for_tma();
    part_sync(1 + half, 128);
    settle(empty, owed);
    if (leader) {
      tma_put_4d(map_out, at + GATE_BOX, col, row, RAGGED_ROWS, p.end);
      tma_put_4d(map_out, at + UP_BOX, j.n + col, row, RAGGED_ROWS, p.end);
      tma_put_4d(map_h, at + H_BOX, col, row, RAGGED_ROWS, p.end);
      tma_commit();
    }
    __syncwarp();
    if (first_warp)
      *owed = stage;
    else
      leave(empty, stage);
  }
}

/* This tile's part of its rows' drow_prob: four threads have a row. */
__device__ __forceinline__ void write_parts(const struct experts_job &j, const struct place &p,
                                            int row, int rows, float (&dot)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], 1);
    dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], 2);
    if (threadIdx.x % 4 == 0 && row + thread_row(i) < rows)
      j.parts[(int64_t)p.n * j.rows + p.begin + row + thread_row(i)] = dot[i];
  }
}

/* A multiplying warpgroup's whole life; half: its 64 rows of each tile. */
template <class S>
__device__ __forceinline__ void
multiply_all(const struct experts_job &j, const CUtensorMap *map_out, const CUtensorMap *map_h,
             const struct control *s, uint32_t tiles, int rank, int half) {
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  uint32_t mine = tiles + (uint32_t)(half * HALF_A);
  struct ring r = {0, 0};
  struct walk at = {0, 0};
  struct place p;
  int steps = (j.k + DEPTH - 1) / DEPTH, owed = -1;
  float d[128];
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<false>(&s->units, j.units, &u)) {
    int row = p.m * TILE_M + half * 64, rows = p.end - p.begin;
    if (row >= rows || !p.inside) { /* nothing to make, but the ring goes on */
      settle(empty, &owed);
      pass_stages<S>(&r, steps + S::CHUNKS, full, empty);
      continue;
    }
    float weight[2] = {1, 1}, dot[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (j.row_prob && row + thread_row(i) < rows)
        weight[i] = j.row_prob[p.begin + row + thread_row(i)];
    }
    multiply_tile<S>(d, &r, steps, full, empty, mine, tiles + A_BYTES,
                     [&] { settle(empty, &owed); });
    write_chunks<S>(j, d, map_out, map_h, p, half, tiles, full, empty, &r, &owed, weight, dot);
    if (!S::UP && j.parts) write_parts(j, p, row, rows, dot);
  }
  if (threadIdx.x % 128 == 0) tma_all_done(); /* what is owed nobody waits for any more */
}

/* map_in, map_out: gate_up before and after, the same for up. */
template <class S>
__global__ __cluster_dims__(2, 1, 1)
    __launch_bounds__(THREADS, 1) void experts_wgmma(const __grid_constant__ CUtensorMap map_a,
                                                     const __grid_constant__ CUtensorMap map_w,
                                                     const __grid_constant__ CUtensorMap map_in,
                                                     const __grid_constant__ CUtensorMap map_out,
                                                     const __grid_constant__ CUtensorMap map_h,
                                                     const __grid_constant__ struct experts_job j) {
  extern __shared__ __align__(1024) unsigned char memory[];
  struct control *s = (struct control *)(memory + S::RING_BYTES);
  uint32_t tiles = shared_address(memory);
  int rank = (int)cluster_rank();

  for (int g = (int)threadIdx.x; g <= j.groups; g += THREADS) s->offsets[g] = j.offsets[g];
  if (threadIdx.x == 0) {
    if (tiles % 1024 != 0) __trap(); /* the swizzle counts on it */
    prefetch_map(&map_a);
    prefetch_map(&map_w);
    prefetch_map(&map_out);
    prefetch_map(&map_h);
    if (!S::UP) prefetch_map(&map_in);
    init_ring<S>(s, false);
  }
  __syncthreads();
  cluster_sync();

  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) load_all<S>(j, &map_a, &map_w, &map_in, s, tiles, rank);
    if (threadIdx.x == UNITS_THREAD && j.units.counters) hand_out<S>(j, s, rank);
    __syncwarp();
  } else {
    registers_up<232>();
    multiply_all<S>(j, &map_out, &map_h, s, tiles, rank, uniform((int)threadIdx.x / 128) - 1);
  }
  cluster_sync(); /* a block must not leave while the other may still write to it */
}

/* What both operations have: x or dy, the weight, gate_up before and after, h. */
struct experts_tensors {
  const struct mt_tensor *a, *w, *in, *out, *h;
};

static bool rows_fit(const struct mt_tensor *t) {
  return t->ld % 8 == 0 && aligned_to(t->data, 16);
}

static bool takes(const struct mt_backend *be, const struct experts_tensors *t) {
  const struct mt_cuda *c = mt_cuda_of(be);
  const int64_t most = 1 << 28; /* coordinates and counts of tiles stay in 32 bits */
  int64_t rows = t->h->dim[0], n = t->h->dim[1], k = t->a->dim[1], groups = t->w->dim[0];
  if (c->capability != 90 || c->portable || t->h->dtype != MT_BF16) return false;
  if (groups < 1 || groups > GROUPS_MOST || rows < 1 || n < 64 || k < 8) return false;
  if (rows > most || n > most / 2 || k > most || n % 64 != 0 || k % 8 != 0) return false;
  if ((rows / TILE_M + groups) * (n / 128 + 1) > INT32_MAX) return false;
  return rows_fit(t->a) && rows_fit(t->w) && rows_fit(t->in) && rows_fit(t->out) && rows_fit(t->h);
}

template <class S>
static mt_err launch(struct mt_backend *be, const struct experts_tensors *t, const char *op,
                     struct experts_job *j) {
  struct mt_cuda *c = mt_cuda_of(be);
  auto kernel = experts_wgmma<S>;
  CUtensorMap a, w, in, out, h;
  int64_t rows = t->h->dim[0], n = t->h->dim[1], k = t->a->dim[1], groups = t->w->dim[0];
  cuuint64_t lda = 2 * (cuuint64_t)t->a->ld, dim[2] = {(cuuint64_t)k, (cuuint64_t)rows};
  MT_TRY(encode(&a, MT_BF16, t->a->data, 2, dim, &lda, 64));
  MT_TRY(matrices_map(&w, MT_BF16, t->w->data, groups, t->w->dim[1], t->w->dim[2], t->w->ld,
                      S::UP ? S::TILE_N / 2 : DEPTH));
  MT_TRY(ragged_map(&in, t->in->data, 2 * n, t->in->ld, 64));
  MT_TRY(ragged_map(&out, t->out->data, 2 * n, t->out->ld, 64));
  MT_TRY(ragged_map(&h, t->h->data, n, t->h->ld, 64));
  j->groups = (int)groups, j->rows = (int)rows, j->n = (int)n, j->k = (int)k;
  int64_t units = (n + S::COLS - 1) / S::COLS;
  units *= rows / TILE_M + groups; /* or fewer: a unit is two tiles, or one at the edge */
  int64_t clusters = unit_clusters(be, units, false, &j->units);
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED_BYTES),
      op));
  kernel<<<(unsigned)(2 * clusters), THREADS, S::SHARED_BYTES, c->stream>>>(a, w, in, out, h, *j);
  return mt_cuda_launched(op);
}

extern "C" bool mt_cuda_experts_up_sm90_takes(const struct mt_backend *be,
                                              const struct mt_experts_up_fwd_args *a) {
  struct experts_tensors t = {&a->x, &a->w, &a->gate_up, &a->gate_up, &a->h};
  return takes(be, &t);
}

extern "C" mt_err mt_cuda_experts_up_sm90(struct mt_backend *be,
                                          const struct mt_experts_up_fwd_args *a) {
  struct experts_tensors t = {&a->x, &a->w, &a->gate_up, &a->gate_up, &a->h};
  struct experts_job j = {.offsets = a->offsets, .row_prob = (const float *)a->row_prob.data};
  return launch<joined<GROUPED_FWD>>(be, &t, "experts_up_fwd", &j);
}

extern "C" bool mt_cuda_experts_down_sm90_takes(const struct mt_backend *be,
                                                const struct mt_experts_down_dgrad_args *a) {
  struct experts_tensors t = {&a->dy, &a->w, &a->gate_up, &a->dgate_up, &a->h};
  return takes(be, &t);
}

extern "C" mt_err mt_cuda_experts_down_sm90(struct mt_backend *be,
                                            const struct mt_experts_down_dgrad_args *a,
                                            float *parts) {
  static_assert(joined<GROUPED_DGRAD>::COLS == MT_CUDA_EXPERTS_COLS, "parts of drow_prob");
  struct experts_tensors t = {&a->dy, &a->w, &a->gate_up, &a->dgate_up, &a->h};
  struct experts_job j = {
      .offsets = a->offsets, .row_prob = (const float *)a->row_prob.data, .parts = parts};
  return launch<joined<GROUPED_DGRAD>>(be, &t, "experts_down_dgrad", &j);
}
