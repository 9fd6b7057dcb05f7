/* Grouped products on Hopper: wgmma fed by TMA.
 *
 * Persistent clusters of two blocks; a block makes tiles of 128 x TILE_N. One thread loads (TMA, a
 * ring of stages of 64 along the depth, the shared operand by multicast), two warpgroups multiply
 * 64 rows each and write their sums from registers. Which operand lies how:
 *   forward  a = x  [rows, depth]      b = w [n, depth]
 *   dgrad    a = dy [rows, depth]      b = w [depth, n]
 *   wgrad    a = dy [depth, m]         b = x [depth, n], depth = a group's rows
 * Nothing is ever transposed: wgmma reads bf16 either way. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/sm90/gemm_ptx.cuh"
#include "kernels/cuda/sm90/grouped_tile.cuh"

enum {
  DEPTH = 64, /* of a stage: one row of the 128-byte swizzle */
  THREADS = 3 * 128,
  MULTIPLIER_WARPS = 8,
  A_BYTES = TILE_M * DEPTH * 2,
  HALF_A = A_BYTES / 2,
  SLAB = 64 * DEPTH * 2, /* 64 along m or n, where the depth is not contiguous */
  GROUPS_MOST = 512,
};
/* Rows of a group as a tensor of 2^30 rows that ends with the group (see ragged_map). */
enum { RAGGED_ROWS = 1 << 30 };

template <int TILE_N> constexpr int b_bytes = TILE_N *DEPTH * 2;
template <int TILE_N> constexpr int stages = TILE_N == 256 ? 4 : 6;

struct job {
  const int32_t *offsets;
  void *c;
  int groups, rows, m, n, k;
  int64_t ldc;
  int accumulate;
};

/* Shared memory past the ring. */
struct control {
  uint64_t full[8], empty[8];
  int offsets[GROUPS_MOST + 1];
};
template <int TILE_N>
constexpr int shared_bytes = 1024 + stages<TILE_N> *(A_BYTES +
                                                     b_bytes<TILE_N>)+(int)sizeof(struct control);

/* A position in the ring. */
struct ring {
  int stage;
  uint32_t parity;
};
template <int STAGES> __device__ __forceinline__ void advance(struct ring *r) {
  if (++r->stage == STAGES) r->stage = 0, r->parity ^= 1;
}

template <int KIND, int TILE_N>
__device__ __forceinline__ bool find(const struct job &j, const struct control *s, struct walk *at,
                                     int unit, int rank, struct place *p) {
  int nt = (j.n + TILE_N - 1) / TILE_N;
  if (KIND == GROUPED_WGRAD)
    return find_matrix(s->offsets, j.groups, (j.m + TILE_M - 1) / TILE_M, nt, unit, rank, p);
  return find_rows(at, s->offsets, j.groups, nt, unit, rank, p);
}

template <int KIND>
__device__ __forceinline__ int step_count(const struct job &j, const struct place &p) {
  return ((KIND == GROUPED_WGRAD ? p.end - p.begin : j.k) + DEPTH - 1) / DEPTH;
}

/* Half h of a's tile at depth k0: 64 rows, or for wgrad 64 columns. */
template <int KIND, bool BOTH>
__device__ __forceinline__ void load_a(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                       const struct place &p, int h, int k0) {
  int at = p.m * TILE_M + h * 64;
  dst += (uint32_t)(h * HALF_A);
  if (KIND == GROUPED_WGRAD) {
    int row = RAGGED_ROWS - (p.end - p.begin) + k0;
    if (BOTH)
      tma_4d_both(dst, map, bar, at, row, RAGGED_ROWS, p.end);
    else
      tma_4d(dst, map, bar, at, row, RAGGED_ROWS, p.end);
  } else {
    if (BOTH)
      tma_2d_both(dst, map, bar, k0, p.begin + at);
    else
      tma_2d(dst, map, bar, k0, p.begin + at);
  }
}

/* Half h of b's tile. */
template <int KIND, int TILE_N, bool BOTH>
__device__ __forceinline__ void load_b(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                       const struct place &p, int h, int k0) {
  int at = p.n * TILE_N + h * TILE_N / 2;
  dst += (uint32_t)(h * b_bytes<TILE_N> / 2);
  if (KIND == GROUPED_FWD) {
    if (BOTH)
      tma_3d_both(dst, map, bar, k0, at, p.g);
    else
      tma_3d(dst, map, bar, k0, at, p.g);
  } else {
#pragma unroll
    for (int slab = 0; slab < TILE_N / 128; slab++, at += 64, dst += SLAB) {
      if (KIND == GROUPED_DGRAD) {
        if (BOTH)
          tma_3d_both(dst, map, bar, at, k0, p.g);
        else
          tma_3d(dst, map, bar, at, k0, p.g);
      } else {
        int row = RAGGED_ROWS - (p.end - p.begin) + k0;
        if (BOTH)
          tma_4d_both(dst, map, bar, at, row, RAGGED_ROWS, p.end);
        else
          tma_4d(dst, map, bar, at, row, RAGGED_ROWS, p.end);
      }
    }
  }
}

/* The loading thread's whole life. A stage is loaded again once the multipliers of both blocks have
 * left it, since both blocks write to both. */
template <int KIND, int TILE_N>
__device__ __forceinline__ void load_all(const struct job &j, const CUtensorMap *map_a,
                                         const CUtensorMap *map_b, const struct control *s,
                                         uint32_t tiles, int rank) {
  constexpr int STAGE_BYTES = A_BYTES + b_bytes<TILE_N>;
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  struct ring r = {0, 1}; /* the first waits find the ring empty */
  struct walk at = {0, 0};
  struct place p;
  for (int unit = (int)blockIdx.x / 2; find<KIND, TILE_N>(j, s, &at, unit, rank, &p);
       unit += (int)gridDim.x / 2) {
    int steps = step_count<KIND>(j, p);
    for (int i = 0; i < steps; i++) {
      uint32_t bar = full + (uint32_t)r.stage * 8, a = tiles + (uint32_t)r.stage * STAGE_BYTES;
      uint32_t b = a + A_BYTES;
      barrier_wait(empty + (uint32_t)r.stage * 8, r.parity);
      barrier_expect(bar, STAGE_BYTES);
      if (p.shares_b) {
        load_a<KIND, false>(a, map_a, bar, p, 0, i * DEPTH);
        load_a<KIND, false>(a, map_a, bar, p, 1, i * DEPTH);
        load_b<KIND, TILE_N, true>(b, map_b, bar, p, rank, i * DEPTH);
      } else {
        load_a<KIND, true>(a, map_a, bar, p, rank, i * DEPTH);
        load_b<KIND, TILE_N, false>(b, map_b, bar, p, 0, i * DEPTH);
        load_b<KIND, TILE_N, false>(b, map_b, bar, p, 1, i * DEPTH);
      }
      advance<stages<TILE_N>>(&r);
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
template <int KIND, int TILE_N>
__device__ __forceinline__ void multiply_stage(float (&d)[TILE_N / 2], uint32_t a, uint32_t b,
                                               bool add) {
  constexpr int A_MN = KIND == GROUPED_WGRAD, B_MN = KIND != GROUPED_FWD;
  uint64_t da = tile_descriptor(a, A_MN ? SLAB : 0), db = tile_descriptor(b, B_MN ? SLAB : 0);
#pragma unroll
  for (int i = 0; i < DEPTH / 16; i++) {
    wgmma<A_MN, B_MN>(d, da + (uint64_t)(i * (A_MN ? 2048 : 32) / 16),
                      db + (uint64_t)(i * (B_MN ? 2048 : 32) / 16), add || i > 0);
  }
}

/* Four lanes hold 8 columns of a row, two each, of four (two) blocks of 8 columns; afterwards each
 * holds 16 bytes that lie together: of block lane % 4 all columns, or of float32 block lane % 2 the
 * columns of lane / 2 % 2. */
__device__ __forceinline__ void gather_columns(uint32_t (&v)[4]) {
  bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
    if (odd)
      v[i] = got;
    else
      v[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t got = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + 2], 2);
    if (high)
      v[i] = got;
    else
      v[i + 2] = got;
  }
}
__device__ __forceinline__ void gather_columns(float (&v)[4]) {
  bool odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float got = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 2], 1);
    if (odd)
      v[i] = got;
    else
      v[i + 2] = got;
  }
}

/* c += v without reading it here: the sum is made in the L2 cache. Every element has one writer, so
 * the order is fixed. */
__device__ __forceinline__ void add_to(float *c, const float (&v)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(c), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

__device__ __forceinline__ uint32_t pair_of(float x, float y) {
  __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<uint32_t *>(&v);
}

/* The warp's 16 rows from registers to memory; c: row 0 of the warp, column 0 of the tile. wgmma
 * leaves row lane / 4 (+ 8) and columns 8 i + 2 (lane % 4) (+ 1) in d[4 i ..]. */
template <int TILE_N>
__device__ __forceinline__ void write_sums(float (&d)[TILE_N / 2], float *c, int64_t ldc,
                                           int rows_left, int cols_left, bool accumulate) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = lane / 4 + 8 * half;
    float *row = c + r * ldc;
#pragma unroll
    for (int i = 0; i < TILE_N / 8; i += 2) {
      float v[4] = {d[4 * i + 2 * half], d[4 * i + 2 * half + 1], d[4 * i + 4 + 2 * half],
                    d[4 * i + 4 + 2 * half + 1]};
      gather_columns(v);
      int col = 8 * (i + lane % 2) + 4 * (lane / 2 % 2);
      if (r >= rows_left || col >= cols_left) continue;
      if (accumulate)
        add_to(row + col, v);
      else
        *reinterpret_cast<float4 *>(row + col) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
}
template <int TILE_N>
__device__ __forceinline__ void write_sums(float (&d)[TILE_N / 2], bf16 *c, int64_t ldc,
                                           int rows_left, int cols_left, bool accumulate) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = lane / 4 + 8 * half;
    bf16 *row = c + r * ldc;
#pragma unroll
    for (int i = 0; i < TILE_N / 8; i += 4) {
      uint32_t v[4];
#pragma unroll
      for (int l = 0; l < 4; l++) {
        float x = d[4 * (i + l) + 2 * half], y = d[4 * (i + l) + 2 * half + 1];
        int col = 8 * (i + l) + 2 * (lane % 4);
        if (accumulate && r < rows_left && col < cols_left) {
          float old[2];
          load_floats<bf16, 2>(row + col, old);
          x += old[0], y += old[1];
        }
        v[l] = pair_of(x, y);
      }
      gather_columns(v);
      int col = 8 * (i + lane % 4);
      if (r < rows_left && col < cols_left)
        *reinterpret_cast<uint4 *>(row + col) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

/* A warp's rows of a matrix whose group is empty. */
template <int TILE_N, class C>
__device__ __forceinline__ void write_zeros(C *c, int64_t ldc, int rows_left, int cols_left) {
  int cols = min(TILE_N, cols_left);
  for (int r = 0; r < min(16, rows_left); r++) {
    for (int col = (int)(threadIdx.x % 32) * wide<C>; col < cols; col += 32 * wide<C>)
      *reinterpret_cast<uint4 *>(c + r * ldc + col) = make_uint4(0, 0, 0, 0);
  }
}

/* A multiplying warpgroup's whole life; half: its 64 rows of each tile. */
template <int KIND, int TILE_N, class C>
__device__ __forceinline__ void multiply_all(const struct job &j, const struct control *s,
                                             uint32_t tiles, int rank, int half) {
  constexpr int STAGES = stages<TILE_N>, STAGE_BYTES = A_BYTES + b_bytes<TILE_N>;
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  uint32_t mine = tiles + (uint32_t)(half * HALF_A);
  int warp = (int)threadIdx.x / 32 % 4;
  struct ring r = {0, 0};
  struct walk at = {0, 0};
  struct place p;
  float d[TILE_N / 2];
  for (int unit = (int)blockIdx.x / 2; find<KIND, TILE_N>(j, s, &at, unit, rank, &p);
       unit += (int)gridDim.x / 2) {
    int steps = step_count<KIND>(j, p);
    int row = p.m * TILE_M + half * 64, col = p.n * TILE_N;
    int rows = KIND == GROUPED_WGRAD ? j.m : p.end - p.begin;
    int64_t first = KIND == GROUPED_WGRAD ? (int64_t)p.g * j.m : p.begin;
    C *c = (C *)j.c + (first + row + warp * 16) * j.ldc + col;
    int rows_left = rows - row - warp * 16, cols_left = j.n - col;
    if (row >= rows || !p.inside) { /* nothing to make, but the ring goes on */
      for (int i = 0; i < steps; i++) {
        barrier_wait(full + (uint32_t)r.stage * 8, r.parity);
        leave(empty, r.stage);
        advance<STAGES>(&r);
      }
      continue;
    }
    if (steps == 0) {
      if (!j.accumulate) write_zeros<TILE_N>(c, j.ldc, rows_left, cols_left);
      continue;
    }
    int last = 0;
    for (int i = 0; i < steps; i++) {
      uint32_t stage = (uint32_t)r.stage * STAGE_BYTES;
      barrier_wait(full + (uint32_t)r.stage * 8, r.parity);
      wgmma_fence();
      multiply_stage<KIND, TILE_N>(d, mine + stage, tiles + A_BYTES + stage, i > 0);
      wgmma_commit();
      wgmma_wait<1>(); /* the stage before is done with */
      if (i > 0) leave(empty, last);
      last = r.stage;
      advance<STAGES>(&r);
    }
    wgmma_wait<0>();
    sums_ready(d);
    leave(empty, last);
    write_sums<TILE_N>(d, c, j.ldc, rows_left, cols_left, j.accumulate != 0);
  }
}

template <int KIND, int TILE_N, class C>
__global__ __cluster_dims__(2, 1, 1)
    __launch_bounds__(THREADS, 1) void grouped_wgmma(const __grid_constant__ CUtensorMap map_a,
                                                     const __grid_constant__ CUtensorMap map_b,
                                                     const struct job j) {
  extern __shared__ unsigned char raw[];
  constexpr int RING_BYTES = stages<TILE_N> * (A_BYTES + b_bytes<TILE_N>);
  unsigned char *aligned = raw + (1024 - (shared_address(raw) & 1023)) % 1024;
  struct control *s = (struct control *)(aligned + RING_BYTES);
  uint32_t tiles = shared_address(aligned);
  int rank = (int)cluster_rank();

  for (int g = (int)threadIdx.x; g <= j.groups; g += THREADS)
    s->offsets[g] = j.offsets ? j.offsets[g] : g * j.rows;
  if (threadIdx.x == 0) {
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    for (int i = 0; i < stages<TILE_N>; i++) {
      barrier_init(shared_address(&s->full[i]), 1);
      barrier_init(shared_address(&s->empty[i]), 2 * MULTIPLIER_WARPS);
    }
    barrier_init_done();
  }
  __syncthreads();
  cluster_sync();

  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) load_all<KIND, TILE_N>(j, &map_a, &map_b, s, tiles, rank);
    __syncwarp();
  } else {
    registers_up<232>();
    multiply_all<KIND, TILE_N, C>(j, s, tiles, rank, (int)threadIdx.x / 128 - 1);
  }
  cluster_sync(); /* a block must not leave while the other may still write to it */
}

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* From the driver that runs, so that nothing links libcuda. */
static mt_err encoder(encode_fn *out) {
  static void *fn;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (!fn) {
    MT_TRY(mt_cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000,
                                                          cudaEnableDefault, &found),
                         "grouped products"));
    if (!fn || found != cudaDriverEntryPointSuccess)
      return mt_fail(MT_EDEVICE, "grouped products: the driver has no cuTensorMapEncodeTiled");
  }
  *out = (encode_fn)fn;
  return MT_OK;
}

/* rank dimensions, dim[0] contiguous, stride[i]: bytes between neighbours along dim[i + 1]; boxes
 * of 64 x box_rows. What lies outside reads as 0. */
static mt_err encode(CUtensorMap *map, const void *base, int rank, const cuuint64_t *dim,
                     const cuuint64_t *stride, int box_rows) {
  encode_fn fn = NULL;
  cuuint32_t box[5] = {64, (cuuint32_t)box_rows, 1, 1, 1}, step[5] = {1, 1, 1, 1, 1};
  MT_TRY(encoder(&fn));
  CUresult result =
      fn(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)rank, (void *)(uintptr_t)base, dim,
         stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return MT_OK;
  return mt_fail(MT_EDEVICE, "grouped products: tensor map of rank %d: error %d", rank,
                 (int)result);
}

/* Rows of groups where what follows a group must read as 0 (it may be NaN), by a map that knows no
 * group: the third and fourth dimension only move the start. Row i of a group [begin, end) has
 * coordinates (2^30 - (end - begin) + i, 2^30, end); the address 2^30 (2^34 - stride) + ... wraps
 * around 2^64 to begin + i, and the second coordinate passes its bound exactly at the group's end.
 * Triton's ragged descriptors do the same. */
static mt_err ragged_map(CUtensorMap *map, const void *base, int64_t cols, int64_t ld) {
  cuuint64_t row = 2 * (cuuint64_t)ld;
  cuuint64_t dim[4] = {(cuuint64_t)cols, RAGGED_ROWS, INT32_MAX, INT32_MAX};
  cuuint64_t stride[3] = {row, ((cuuint64_t)1 << 34) - row, row};
  return encode(map, base, 4, dim, stride, DEPTH);
}

template <int KIND, int TILE_N> static mt_err make_maps(const mt_cuda_grouped *p, CUtensorMap *m) {
  if (KIND == GROUPED_WGRAD) {
    MT_TRY(ragged_map(&m[0], p->a, p->m, p->lda));
    return ragged_map(&m[1], p->b, p->n, p->ldb);
  }
  cuuint64_t lda = 2 * (cuuint64_t)p->lda, ldb = 2 * (cuuint64_t)p->ldb;
  cuuint64_t k = (cuuint64_t)p->k, n = (cuuint64_t)p->n, g = (cuuint64_t)p->groups;
  cuuint64_t a_dim[2] = {k, (cuuint64_t)p->rows_most};
  MT_TRY(encode(&m[0], p->a, 2, a_dim, &lda, 64));
  if (KIND == GROUPED_FWD) {
    cuuint64_t dim[3] = {k, n, g}, stride[2] = {ldb, n * ldb};
    return encode(&m[1], p->b, 3, dim, stride, TILE_N / 2);
  }
  cuuint64_t dim[3] = {n, k, g}, stride[2] = {ldb, k * ldb};
  return encode(&m[1], p->b, 3, dim, stride, DEPTH);
}

template <int KIND, int TILE_N, class C>
static mt_err launch(struct mt_cuda *c, const struct mt_cuda_grouped *p) {
  auto kernel = grouped_wgmma<KIND, TILE_N, C>;
  bool wgrad = KIND == GROUPED_WGRAD;
  CUtensorMap maps[2];
  MT_TRY((make_maps<KIND, TILE_N>(p, maps)));
  int64_t nt = (p->n + TILE_N - 1) / TILE_N;
  int64_t mt = wgrad ? (p->m + TILE_M - 1) / TILE_M * p->groups : p->rows_most / TILE_M + p->groups;
  /* Not above the number of units: a tile row by itself is half as many units as columns. */
  int64_t clusters = c->sm_count / 2, units = mt * nt;
  if (clusters > units) clusters = units;
  struct job j = {.offsets = p->offsets,
                  .c = p->c,
                  .groups = p->groups,
                  .rows = (int)p->rows_most,
                  .m = (int)p->m,
                  .n = (int)p->n,
                  .k = (int)p->k,
                  .ldc = p->ldc,
                  .accumulate = p->accumulate};
  constexpr int bytes = shared_bytes<TILE_N>;
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "grouped products"));
  kernel<<<(unsigned)(2 * clusters), THREADS, bytes, c->stream>>>(maps[0], maps[1], j);
  return mt_cuda_launched("grouped products");
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

extern "C" mt_err mt_cuda_grouped_sm90(struct mt_backend *be, const struct mt_cuda_grouped *p) {
  struct mt_cuda *c = mt_cuda_of(be);
#define LAUNCH(kind, C) (p->n > 128 ? launch<kind, 256, C>(c, p) : launch<kind, 128, C>(c, p))
  if (p->kind == GROUPED_FWD) return LAUNCH(GROUPED_FWD, bf16);
  if (p->kind == GROUPED_DGRAD) return LAUNCH(GROUPED_DGRAD, bf16);
  return p->c_dtype == MT_F32 ? LAUNCH(GROUPED_WGRAD, float) : LAUNCH(GROUPED_WGRAD, bf16);
#undef LAUNCH
}
