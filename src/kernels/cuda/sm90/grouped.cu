/* Grouped products on Hopper: wgmma fed by TMA.
 *
 * Persistent clusters of two blocks; a block makes tiles of 128 x TILE_N. One thread loads (TMA, a
 * ring of stages of 64 along the depth, the shared operand by multicast), two warpgroups multiply
 * 64 rows each and hand their sums to TMA (grouped_out.cuh). Which operand lies how:
 *   forward  a = x  [rows, depth]      b = w [n, depth]
 *   dgrad    a = dy [rows, depth]      b = w [depth, n]
 *   wgrad    a = dy [depth, m]         b = x [depth, n], depth = a group's rows
 * Nothing is ever transposed: wgmma reads bf16 either way. */
#include "kernels/cuda/sm90/grouped_maps.cuh"
#include "kernels/cuda/sm90/grouped_out.cuh"
#include "kernels/cuda/sm90/grouped_ring.cuh"

struct job {
  const int32_t *offsets;
  void *c;
  int groups, rows, m, n, k;
  int64_t ldc;
  int accumulate;
  struct unit_source units;
  double *partial; /* wgrad: [blocks] of the squares of c, or NULL */
};

/* One kernel: what it computes, its tile, how it divides 227 KB of shared memory into stages and
 * slots for output. On an H100 256 x 4 stages x 2 slots was as fast as or faster than 256 x 3 x 4,
 * 192 x 4 x 3 and, for float32, 192 x 3 x 6 (all of a tile staged). */
template <int KIND_, class C_, int TILE_N_, int STAGES_, int SLOTS_> struct design {
  typedef C_ C;
  static constexpr int KIND = KIND_, TILE_N = TILE_N_, STAGES = STAGES_, SLOTS = SLOTS_;
  static constexpr bool WGRAD = KIND == GROUPED_WGRAD;
  static constexpr int B_BYTES = TILE_N * DEPTH * 2, STAGE_BYTES = A_BYTES + B_BYTES;
  static constexpr int CHUNK_COLS = 128 / (int)sizeof(C), CHUNKS = TILE_N / CHUNK_COLS;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES, OUT_BYTES = SLOTS * CHUNK_BYTES;
  static constexpr int SHARED_BYTES = RING_BYTES + 2 * OUT_BYTES + (int)sizeof(struct control);
  static_assert(CHUNKS % SLOTS == 0 && STAGES <= 8 && SHARED_BYTES <= 232448, "does not fit");

  static __device__ __forceinline__ bool find(const struct job &j, const struct control *s,
                                              struct walk *at, int unit, int rank,
                                              struct place *p) {
    return find_unit<WGRAD, TILE_N>(j, s, at, unit, rank, p);
  }
};

template <class S>
__device__ __forceinline__ int step_count(const struct job &j, const struct place &p) {
  return ((S::WGRAD ? p.end - p.begin : j.k) + DEPTH - 1) / DEPTH;
}

/* The loading thread's whole life. A stage is loaded again once the multipliers of both blocks have
 * left it, since both blocks write to both. */
template <class S>
__device__ __forceinline__ void load_all(const struct job &j, const CUtensorMap *map_a,
                                         const CUtensorMap *map_b, const struct control *s,
                                         uint32_t tiles, int rank) {
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  struct ring r = {0, 1}; /* the first waits find the ring empty */
  struct walk at = {0, 0};
  struct place p;
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<true>(&s->units, j.units, &u)) {
    int steps = step_count<S>(j, p);
    for (int i = 0; i < steps; i++) {
      uint32_t bar = full + (uint32_t)r.stage * 8, a = tiles + (uint32_t)(r.stage * S::STAGE_BYTES);
      uint32_t b = a + A_BYTES;
      barrier_wait(empty + (uint32_t)r.stage * 8, r.parity);
      barrier_expect(bar, S::STAGE_BYTES);
      if (p.shares_b) {
        load_a<S, false>(a, map_a, bar, p, 0, i * DEPTH);
        load_a<S, false>(a, map_a, bar, p, 1, i * DEPTH);
        load_b<S, true>(b, map_b, bar, p, rank, i * DEPTH);
      } else {
        load_a<S, true>(a, map_a, bar, p, rank, i * DEPTH);
        load_b<S, false>(b, map_b, bar, p, 0, i * DEPTH);
        load_b<S, false>(b, map_b, bar, p, 1, i * DEPTH);
      }
      advance<S::STAGES>(&r);
    }
  }
}

/* The warpgroup's 64 rows out, in as many rounds as the slots make of them; only the first has to
 * wait for nothing but copies of the tile before. Squares are added up (total +=) while the first
 * round's copies leave. */
template <class S>
__device__ __forceinline__ void write_tile(const struct job &j, const float (&d)[S::TILE_N / 2],
                                           const CUtensorMap *map, uint32_t out,
                                           const struct place &p, int half, double *total) {
  bool leader = threadIdx.x % 128 == 0;
  int row = p.m * TILE_M + half * 64, col = p.n * S::TILE_N;
#pragma unroll
  for (int first = 0; first < S::CHUNKS; first += S::SLOTS) {
    if (leader) tma_read_done();
    part_sync(1 + half, 128);
#pragma unroll
    for (int i = 0; i < S::SLOTS; i++)
      stage_chunk(d, first + i, out + (uint32_t)(i * CHUNK_BYTES), (typename S::C *)NULL);
    writes_for_tma();
    part_sync(1 + half, 128);
    if (leader)
      put_chunks<S, S::SLOTS>(map, out, p, row, col + first * S::CHUNK_COLS, j.n, j.accumulate);
    if (S::WGRAD && first == 0 && j.partial) *total += squares<typename S::C>(d);
  }
}

/* A warp's 16 rows of a matrix whose group is empty, and what stands there where it is added to. */
template <class S>
__device__ __forceinline__ void write_zeros(typename S::C *c, int64_t ldc, int rows_left,
                                            int cols_left) {
  constexpr int WIDE = wide<typename S::C>;
  int cols = min(S::TILE_N, cols_left);
  for (int r = 0; r < min(16, rows_left); r++) {
    for (int col = (int)(threadIdx.x % 32) * WIDE; col < cols; col += 32 * WIDE)
      *reinterpret_cast<uint4 *>(c + r * ldc + col) = make_uint4(0, 0, 0, 0);
  }
}

/* A multiplying warpgroup's whole life; half: its 64 rows of each tile. */
template <class S>
__device__ __forceinline__ void multiply_all(const struct job &j, const CUtensorMap *map_c,
                                             struct control *s, uint32_t tiles, int rank,
                                             int half) {
  typedef typename S::C C;
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  uint32_t mine = tiles + (uint32_t)(half * HALF_A);
  uint32_t out = tiles + (uint32_t)(S::RING_BYTES + half * S::OUT_BYTES);
  struct ring r = {0, 0};
  struct walk at = {0, 0};
  struct place p;
  float d[S::TILE_N / 2];
  double total = 0;
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<false>(&s->units, j.units, &u)) {
    int steps = step_count<S>(j, p);
    int row = p.m * TILE_M + half * 64, col = p.n * S::TILE_N;
    int rows = S::WGRAD ? j.m : p.end - p.begin;
    if (row >= rows || !p.inside) { /* nothing to make, but the ring goes on */
      pass_stages<S>(&r, steps, full, empty);
      continue;
    }
    if (S::WGRAD && steps == 0) {
      int warp_row = row + (int)threadIdx.x / 32 % 4 * 16;
      C *c = (C *)j.c + ((int64_t)p.g * j.m + warp_row) * j.ldc + col;
      int rows_left = rows - warp_row, cols_left = j.n - col;
      if (!j.accumulate) write_zeros<S>(c, j.ldc, rows_left, cols_left);
      if (j.accumulate && j.partial)
        total += old_squares(c, j.ldc, min(16, rows_left), min(S::TILE_N, cols_left));
      continue;
    }
    multiply_tile<S>(d, &r, steps, full, empty, mine, tiles + A_BYTES, [] {});
    if (sizeof(C) == 2 && j.accumulate) {
      int64_t first = S::WGRAD ? (int64_t)p.g * j.m : p.begin;
      add_old(d, (const bf16 *)j.c + (first + row) * j.ldc + col, j.ldc, rows - row, j.n - col);
    }
    write_tile<S>(j, d, map_c, out, p, half, &total);
  }
  if (S::WGRAD && j.partial) {
    add_squares(s, total, false);
    write_partial(s, j.partial);
  }
  if (threadIdx.x % 128 == 0) tma_all_done();
}

template <class S>
__global__ __cluster_dims__(2, 1, 1)
    __launch_bounds__(THREADS, 1) void grouped_wgmma(const __grid_constant__ CUtensorMap map_a,
                                                     const __grid_constant__ CUtensorMap map_b,
                                                     const __grid_constant__ CUtensorMap map_c,
                                                     const __grid_constant__ struct job j) {
  extern __shared__ __align__(1024) unsigned char memory[];
  struct control *s = (struct control *)(memory + S::RING_BYTES + 2 * S::OUT_BYTES);
  uint32_t tiles = shared_address(memory);
  int rank = (int)cluster_rank();

  for (int g = (int)threadIdx.x; g <= j.groups; g += THREADS)
    s->offsets[g] = j.offsets ? j.offsets[g] : g * j.rows;
  if (threadIdx.x == 0) {
    if (tiles % 1024 != 0) __trap(); /* the swizzle counts on it */
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    prefetch_map(&map_c);
    init_ring<S>(s, false);
  }
  __syncthreads();
  cluster_sync();

  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) load_all<S>(j, &map_a, &map_b, s, tiles, rank);
    if (threadIdx.x == UNITS_THREAD && j.units.counters) hand_out<S>(j, s, rank);
    __syncwarp();
  } else {
    registers_up<232>();
    multiply_all<S>(j, &map_c, s, tiles, rank, uniform((int)threadIdx.x / 128) - 1);
  }
  cluster_sync(); /* a block must not leave while the other may still write to it */
}

template <class S> static mt_err make_maps(const mt_cuda_grouped *p, CUtensorMap *m) {
  if (S::WGRAD) {
    MT_TRY(ragged_map(&m[0], p->a, p->m, p->lda, DEPTH));
    MT_TRY(ragged_map(&m[1], p->b, p->n, p->ldb, DEPTH));
    return matrices_map(&m[2], p->c_dtype, p->c, p->groups, p->m, p->n, p->ldc, 64);
  }
  cuuint64_t lda = 2 * (cuuint64_t)p->lda, dim[2] = {(cuuint64_t)p->k, (cuuint64_t)p->rows_most};
  MT_TRY(encode(&m[0], MT_BF16, p->a, 2, dim, &lda, 64));
  MT_TRY(ragged_map(&m[2], p->c, p->n, p->ldc, 64));
  if (S::KIND == GROUPED_FWD)
    return matrices_map(&m[1], MT_BF16, p->b, p->groups, p->n, p->k, p->ldb, S::TILE_N / 2);
  return matrices_map(&m[1], MT_BF16, p->b, p->groups, p->k, p->n, p->ldb, DEPTH);
}

template <class S> static mt_err launch(struct mt_backend *be, const struct mt_cuda_grouped *p) {
  struct mt_cuda *c = mt_cuda_of(be);
  auto kernel = grouped_wgmma<S>;
  CUtensorMap maps[3];
  MT_TRY(make_maps<S>(p, maps));
  int64_t nt = (p->n + S::TILE_N - 1) / S::TILE_N;
  int64_t mt =
      S::WGRAD ? (p->m + TILE_M - 1) / TILE_M * p->groups : p->rows_most / TILE_M + p->groups;
  /* More units than that there are not: a unit is two tiles, or one at the edge. */
  struct unit_source source; /* sums are of what a block made */
  int64_t clusters = unit_clusters(be, mt * nt, p->sumsq != NULL, &source);
  struct job j = {.offsets = p->offsets,
                  .c = p->c,
                  .groups = p->groups,
                  .rows = (int)p->rows_most,
                  .m = (int)p->m,
                  .n = (int)p->n,
                  .k = (int)p->k,
                  .ldc = p->ldc,
                  .accumulate = p->accumulate,
                  .units = source,
                  .partial = NULL};
  void *partial = NULL;
  size_t partial_bytes = (size_t)(2 * clusters) * sizeof(double);
  if (p->sumsq) MT_TRY(mt_cuda_scratch(be, "grouped products", partial_bytes, &partial));
  j.partial = (double *)partial;
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED_BYTES),
      "grouped products"));
  kernel<<<(unsigned)(2 * clusters), THREADS, S::SHARED_BYTES, c->stream>>>(maps[0], maps[1],
                                                                            maps[2], j);
  MT_TRY(mt_cuda_launched("grouped products"));
  return p->sumsq ? mt_cuda_sum_partials(be, j.partial, (int)(2 * clusters), p->sumsq) : MT_OK;
}

extern "C" bool mt_cuda_grouped_sm90_takes(const struct mt_backend *be,
                                           const struct mt_cuda_grouped *p) {
  const struct mt_cuda *c = mt_cuda_of(be);
  bool wgrad = p->kind == GROUPED_WGRAD;
  int64_t depth = wgrad ? p->m : p->k; /* what lies contiguously in a */
  if (c->capability != 90 || c->portable || p->ab != MT_BF16) return false;
  if (p->c_dtype != MT_BF16 && !(wgrad && p->c_dtype == MT_F32)) return false;
  if (p->groups < 1 || p->groups > GROUPS_MOST || p->rows_most < 1 || p->n < 1 || depth < 1)
    return false;
  const int64_t most = 1 << 28; /* coordinates and counts of tiles stay in 32 bits */
  if (p->rows_most > most || p->n > most || depth > most) return false;
  int64_t mt = wgrad ? (p->m / TILE_M + 1) * p->groups : p->rows_most / TILE_M + p->groups;
  if (mt * (p->n / 128 + 1) > INT32_MAX) return false;
  return (p->n | depth | p->lda | p->ldb | p->ldc) % 8 == 0 && aligned_to(p->a, 16) &&
         aligned_to(p->b, 16) && aligned_to(p->c, 16);
}

/* float32 that is added to never comes into registers. */
extern "C" bool mt_cuda_grouped_sm90_sums(const struct mt_backend *be,
                                          const struct mt_cuda_grouped *p) {
  return p->kind == GROUPED_WGRAD && !(p->c_dtype == MT_F32 && p->accumulate) &&
         mt_cuda_of(be)->sm_count <= MT_CUDA_PARTIALS && mt_cuda_grouped_sm90_takes(be, p);
}

extern "C" mt_err mt_cuda_grouped_sm90(struct mt_backend *be, const struct mt_cuda_grouped *p) {
#define LAUNCH(kind, C)                                                                            \
  (p->n > 128 ? launch<design<kind, C, 256, 4, 2>>(be, p)                                          \
              : launch<design<kind, C, 128, 6, 2>>(be, p))
  if (p->kind == GROUPED_FWD) return LAUNCH(GROUPED_FWD, bf16);
  if (p->kind == GROUPED_DGRAD) return LAUNCH(GROUPED_DGRAD, bf16);
  return p->c_dtype == MT_F32 ? LAUNCH(GROUPED_WGRAD, float) : LAUNCH(GROUPED_WGRAD, bf16);
#undef LAUNCH
}
