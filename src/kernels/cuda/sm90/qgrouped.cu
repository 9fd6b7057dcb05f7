/* Products of FP8 operands on Hopper (layouts: backend/qtensor.h): wgmma on e4m3 fed by TMA.
 *
 * The skeleton is grouped.cu's: persistent clusters of two blocks, tiles of 128 x 256, a ring of
 * stages of 128 bytes along the depth, which are here 128 elements and one block of scales. Every
 * operand lies with its depth contiguous, for the tensor cores read 8-bit elements in no other way.
 *   rows   a = x or dy [rows, depth], scales 1 x 128; b = w [n, depth], scales 128 x 128
 *   wgrad  a = dy      [m, tokens],   scales 1 x 128; b = x [n, tokens], scales 1 x 128
 * Tensor cores keep about 14 bits of a sum, so sums of 128 products (one stage) are multiplied by
 * their scales and added up in float32 by the ordinary cores. A warpgroup makes 128 rows of 128
 * columns, 64 rows at a time: while it adds, the other one's products run. Scales come into the
 * ring with their stage: b's of wgrad as they lie, the others, which lie anywhere, by a warp beside
 * the loading thread. */
#include "kernels/cuda/sm90/qgrouped.cuh"

#include "kernels/cuda/sm90/grouped_out.cuh"
#include "kernels/cuda/sm90/grouped_ring.cuh"

enum { Q_DEPTH = 128, Q_TILE_N = 256, HALF_N = Q_TILE_N / 2, HALF_B = HALF_N * Q_DEPTH };

struct qjob {
  const int32_t *offsets; /* wgrad: of the column copies */
  const float *a_scale, *b_scale;
  void *c;
  double *partial; /* wgrad: of each block, of the squares of what is stored; or NULL */
  int groups, rows, m, n, k;
  int64_t a_scale_ld, ldc; /* a_scale [depth / 128][a_scale_ld]; wgrad: b_scale [tokens / 128][n] */
  int accumulate;
  struct unit_source units;
};

/* A stage's scales: a's of the tile's rows, then b's: of the tile's columns, or for rows one of
 * each half of them. */
template <bool WGRAD_, class C_> struct qdesign {
  typedef C_ C;
  static constexpr bool WGRAD = WGRAD_;
  static constexpr int STAGES = 3, SLOTS = 4;
  static constexpr int STAGE_BYTES = A_BYTES + 2 * HALF_B;
  static constexpr int SCALE_BYTES = (TILE_M + (WGRAD ? (int)Q_TILE_N : 4)) * (int)sizeof(float);
  static constexpr int CHUNK_COLS = 128 / (int)sizeof(C), CHUNKS = HALF_N / CHUNK_COLS;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES, OUT_BYTES = SLOTS * CHUNK_BYTES;
  static constexpr int SCALES_AT = RING_BYTES + 2 * OUT_BYTES;
  static constexpr int CONTROL_AT = SCALES_AT + STAGES * SCALE_BYTES;
  static constexpr int SHARED_BYTES = CONTROL_AT + (int)sizeof(struct control);
  static_assert((int)A_BYTES == TILE_M * Q_DEPTH && STAGES <= 8, "a's tile, the ring's barriers");
  static_assert(SLOTS % CHUNKS == 0 && SHARED_BYTES <= 232448, "does not fit");

  static __device__ __forceinline__ bool find(const struct qjob &j, const struct control *s,
                                              struct walk *at, int unit, int rank,
                                              struct place *p) {
    return find_unit<WGRAD, Q_TILE_N>(j, s, at, unit, rank, p);
  }
};

template <class S>
__device__ __forceinline__ int step_count(const struct qjob &j, const struct place &p) {
  return ((S::WGRAD ? p.end - p.begin : j.k) + Q_DEPTH - 1) / Q_DEPTH;
}

/* Half h of a's tile, 64 rows, and of b's, 128 rows, at depth k0. */
template <class S, bool BOTH>
__device__ __forceinline__ void load_a8(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                        const struct place &p, int h, int k0) {
  int at = p.m * TILE_M + h * 64;
  if (S::WGRAD)
    tma_2d<BOTH>(dst + (uint32_t)(h * HALF_A), map, bar, p.begin + k0, at);
  else
    tma_2d<BOTH>(dst + (uint32_t)(h * HALF_A), map, bar, k0, p.begin + at);
}
template <class S, bool BOTH>
__device__ __forceinline__ void load_b8(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                        const struct place &p, int h, int k0) {
  int at = p.n * Q_TILE_N + h * HALF_N;
  if (S::WGRAD)
    tma_2d<BOTH>(dst + (uint32_t)(h * HALF_B), map, bar, p.begin + k0, at);
  else
    tma_3d<BOTH>(dst + (uint32_t)(h * HALF_B), map, bar, k0, at, p.g);
}

/* Contiguous bytes, a multiple of 16, to this block's shared memory. */
__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, uint32_t bytes,
                                          uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar)
               : "memory");
}

/* The loading thread's whole life (see grouped.cu). */
template <class S>
__device__ __forceinline__ void load_all(const struct qjob &j, const CUtensorMap *map_a,
                                         const CUtensorMap *map_b, const struct control *s,
                                         uint32_t tiles, int rank) {
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  struct ring r = {0, 1}; /* the first waits find the ring empty */
  struct walk at = {0, 0};
  struct place p;
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<true>(&s->units, j.units, &u)) {
    int steps = step_count<S>(j, p), col = p.n * Q_TILE_N;
    uint32_t scales = S::WGRAD && col < j.n ? (uint32_t)min(Q_TILE_N, j.n - col) * 4 : 0;
    for (int i = 0; i < steps; i++) {
      uint32_t bar = full + (uint32_t)r.stage * 8, a = tiles + (uint32_t)(r.stage * S::STAGE_BYTES);
      uint32_t b = a + A_BYTES;
      barrier_wait(empty + (uint32_t)r.stage * 8, r.parity);
      barrier_expect(bar, (uint32_t)S::STAGE_BYTES + scales);
      if (S::WGRAD && scales) {
        bulk_load(tiles + (uint32_t)(S::SCALES_AT + r.stage * S::SCALE_BYTES + TILE_M * 4),
                  j.b_scale + (int64_t)(p.begin / Q_DEPTH + i) * j.n + col, scales, bar);
      }
      if (p.shares_b) {
        load_a8<S, false>(a, map_a, bar, p, 0, i * Q_DEPTH);
        load_a8<S, false>(a, map_a, bar, p, 1, i * Q_DEPTH);
        load_b8<S, true>(b, map_b, bar, p, rank, i * Q_DEPTH);
      } else {
        load_a8<S, true>(a, map_a, bar, p, rank, i * Q_DEPTH);
        load_b8<S, false>(b, map_b, bar, p, 0, i * Q_DEPTH);
        load_b8<S, false>(b, map_b, bar, p, 1, i * Q_DEPTH);
      }
      advance<S::STAGES>(&r);
    }
  }
}

/* Four bytes to shared memory, whenever they come; then an arrival at bar for all this thread's. */
__device__ __forceinline__ void copy_word(uint32_t dst, const float *src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src))
               : "memory");
}
__device__ __forceinline__ void arrive_after_copies(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

/* A warp's whole life: a's scales, and for rows b's. Rows past the group's end, which are not
 * written, take the last one's. */
template <class S>
__device__ __forceinline__ void load_scales(const struct qjob &j, const struct control *s,
                                            uint32_t tiles, int rank) {
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  int lane = (int)threadIdx.x % 32, tall = (j.n + Q_DEPTH - 1) / Q_DEPTH;
  struct ring r = {0, 1};
  struct walk at = {0, 0};
  struct place p;
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<false>(&s->units, j.units, &u)) {
    int steps = step_count<S>(j, p), most = (S::WGRAD ? j.m : p.end - p.begin) - 1, row[4];
#pragma unroll
    for (int i = 0; i < 4; i++) row[i] = min(p.m * TILE_M + lane + 32 * i, most);
    const float *a = j.a_scale + (S::WGRAD ? p.begin / Q_DEPTH * j.a_scale_ld : p.begin);
    const float *b = NULL;
    if (!S::WGRAD)
      b = j.b_scale + ((int64_t)p.g * tall + min(p.n * 2 + lane % 2, tall - 1)) * steps;
    for (int i = 0; i < steps; i++, a += j.a_scale_ld) {
      uint32_t to = tiles + (uint32_t)(S::SCALES_AT + r.stage * S::SCALE_BYTES + lane * 4);
      barrier_wait(empty + (uint32_t)r.stage * 8, r.parity);
#pragma unroll
      for (int k = 0; k < 4; k++) copy_word(to + (uint32_t)(k * 128), a + row[k]);
      if (!S::WGRAD && lane < 2) copy_word(to + TILE_M * 4, b + i);
      arrive_after_copies(full + (uint32_t)r.stage * 8);
      advance<S::STAGES>(&r);
    }
  }
}

/* d [64 x 128 of the warpgroup] += a b, or = where add is 0. */
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
               "}, %64, %65, p, 1, 1;\n}\n"
               : MT_SUMS_64(d, 0)
               : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ float shared_float(uint32_t from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ float2 shared_pair(uint32_t from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
  return x;
}

/* sums += part by its scales: up and low of the thread's two rows, and for wgrad those of its
 * columns, pairs 32 bytes apart from `columns` on, of which the first AHEAD are there already. */
enum { AHEAD = 4 };
template <class S>
__device__ __forceinline__ void add_part(float (&sums)[64], const float (&part)[64], float up,
                                         float low, float2 (&ahead)[AHEAD], uint32_t columns) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float2 by = {1, 1};
    if (S::WGRAD) {
      by = ahead[i % AHEAD];
      if (i + AHEAD < 16) ahead[i % AHEAD] = shared_pair(columns + (uint32_t)((i + AHEAD) * 32));
    }
    float *to = &sums[4 * i];
    to[0] = fmaf(part[4 * i], S::WGRAD ? up * by.x : up, to[0]);
    to[1] = fmaf(part[4 * i + 1], S::WGRAD ? up * by.y : up, to[1]);
    to[2] = fmaf(part[4 * i + 2], S::WGRAD ? low * by.x : low, to[2]);
    to[3] = fmaf(part[4 * i + 3], S::WGRAD ? low * by.y : low, to[3]);
  }
}

/* sums [128 x 128 of the warpgroup, by halves of 64 rows] (=): all of a tile. a, b: in the first
 * stage; scales: the first stage's; two: the second half of the rows is there. */
template <class S>
__device__ __forceinline__ void multiply_tile8(float (&sums)[2][64], struct ring *r, int steps,
                                               bool two, uint32_t full, uint32_t empty, uint32_t a,
                                               uint32_t b, uint32_t scales, int rank, int half) {
  float part[64];
  float2 ahead[AHEAD];
  uint32_t row = (threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4) * 4;
  uint32_t column = TILE_M * 4 + (uint32_t)half * (S::WGRAD ? HALF_N * 4 : 4);
  if (S::WGRAD) column += threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < 64; i++) sums[0][i] = sums[1][i] = 0;
  for (int step = 0; step < steps; step++) {
    int stage = r->stage;
    uint32_t at = (uint32_t)(stage * S::STAGE_BYTES);
    uint32_t by = scales + (uint32_t)(stage * S::SCALE_BYTES);
    barrier_wait(full + (uint32_t)stage * 8, r->parity);
    uint64_t db = tile_descriptor(b + at, 0);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (h == 1 && !two) break;
      uint64_t da = tile_descriptor(a + at + (uint32_t)(h * HALF_A), 0);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++)
        wgmma_e4m3(part, da + (uint64_t)(2 * i), db + (uint64_t)(2 * i), i > 0);
      wgmma_commit();
      float up = shared_float(by + row + (uint32_t)(h * 256));
      float low = shared_float(by + row + (uint32_t)(h * 256 + 32));
      float of_b = S::WGRAD ? 1.0f : shared_float(by + column);
#pragma unroll
      for (int i = 0; S::WGRAD && i < AHEAD; i++)
        ahead[i] = shared_pair(by + column + (uint32_t)(i * 32));
      if (!S::WGRAD) up *= of_b, low *= of_b;
      wgmma_wait<0>();
      sums_ready(part);
      if (!S::WGRAD && (h == 1 || !two)) leave_each(empty, stage, rank);
      add_part<S>(sums[h], part, up, low, ahead, by + column);
    }
    if (S::WGRAD) leave_each(empty, stage, rank);
    advance<S::STAGES>(r);
  }
}

/* 64 rows of the warpgroup's columns out, from (row, col) of the group on, through CHUNKS slots
 * from `out` on; wait: TMA may still be reading there. */
template <class S>
__device__ __forceinline__ void write_half(const struct qjob &j, const float (&d)[64],
                                           const CUtensorMap *map, uint32_t out, bool wait,
                                           const struct place &p, int row, int col, int half) {
  bool leader = threadIdx.x % 128 == 0;
  if (wait) {
    if (leader) tma_read_done();
    part_sync(1 + half, 128);
  }
#pragma unroll
  for (int i = 0; i < S::CHUNKS; i++)
    stage_chunk(d, i, out + (uint32_t)(i * CHUNK_BYTES), (typename S::C *)NULL);
  writes_for_tma();
  part_sync(1 + half, 128);
  if (leader) put_chunks<S, S::CHUNKS>(map, out, p, row, col, j.n, j.accumulate);
}

/* The warpgroup's part of a matrix whose group is empty: 128 x 128 at most. */
template <class S>
__device__ __forceinline__ void write_zeros(typename S::C *c, int64_t ldc, int rows, int cols) {
  constexpr int WIDE = wide<typename S::C>;
  for (int r = (int)threadIdx.x % 128 / 32; r < min(TILE_M, rows); r += 4) {
    for (int col = (int)(threadIdx.x % 32) * WIDE; col < min(HALF_N, cols); col += 32 * WIDE)
      *reinterpret_cast<uint4 *>(c + r * ldc + col) = make_uint4(0, 0, 0, 0);
  }
}

/* A multiplying warpgroup's whole life; half: its 128 columns of each tile. */
template <class S>
__device__ __forceinline__ void multiply_all(const struct qjob &j, const CUtensorMap *map_c,
                                             struct control *s, uint32_t tiles, int rank,
                                             int half) {
  typedef typename S::C C;
  uint32_t full = shared_address(s->full), empty = shared_address(s->empty);
  uint32_t b = tiles + (uint32_t)(A_BYTES + half * HALF_B);
  uint32_t out = tiles + (uint32_t)(S::RING_BYTES + half * S::OUT_BYTES);
  struct ring r = {0, 0};
  struct walk at = {0, 0};
  struct place p;
  float sums[2][64];
  if (S::WGRAD && j.partial) add_squares(s, 0, false);
  for (struct units u = first_unit(); S::find(j, s, &at, u.unit, rank, &p);
       next_unit<false>(&s->units, j.units, &u)) {
    int steps = step_count<S>(j, p), row = p.m * TILE_M, col = p.n * Q_TILE_N + half * HALF_N;
    int rows = S::WGRAD ? j.m : p.end - p.begin;
    if (row >= rows || col >= j.n) { /* nothing to make, but the ring goes on */
      for (int i = 0; i < steps; i++, advance<S::STAGES>(&r)) {
        barrier_wait(full + (uint32_t)r.stage * 8, r.parity);
        leave_each(empty, r.stage, rank);
      }
      continue;
    }
    int64_t first = S::WGRAD ? (int64_t)p.g * j.m : p.begin;
    C *c = (C *)j.c + (first + row) * j.ldc + col;
    if (steps == 0) {
      if (!j.accumulate) write_zeros<S>(c, j.ldc, rows - row, j.n - col);
      if (S::WGRAD && j.accumulate && j.partial) {
        int first_row = (int)threadIdx.x / 32 % 4 * 32;
        add_squares(s,
                    old_squares(c + first_row * j.ldc, j.ldc, min(32, rows - row - first_row),
                                min((int)HALF_N, j.n - col)),
                    true);
      }
      continue;
    }
    bool two = row + 64 < rows;
    multiply_tile8<S>(sums, &r, steps, two, full, empty, tiles, b, tiles + S::SCALES_AT, rank,
                      half);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (h == 1 && !two) break;
      if (sizeof(C) == 2 && j.accumulate) {
        add_old(sums[h], (const bf16 *)j.c + (first + row + h * 64) * j.ldc + col, j.ldc,
                rows - row - h * 64, j.n - col);
      }
      constexpr int BOTH = S::SLOTS / S::CHUNKS - 1; /* whether there are slots for both halves */
      write_half<S>(j, sums[h], map_c, out + (uint32_t)(BOTH * h * S::CHUNKS * CHUNK_BYTES),
                    h == 0 || !BOTH, p, row + h * 64, col, half);
      if (S::WGRAD && j.partial) add_squares(s, squares<C>(sums[h]), true);
    }
  }
  if (S::WGRAD && j.partial) write_partial(s, j.partial);
  if (threadIdx.x % 128 == 0) tma_all_done();
}

template <class S>
__global__ __cluster_dims__(2, 1, 1)
    __launch_bounds__(THREADS, 1) void grouped_e4m3(const __grid_constant__ CUtensorMap map_a,
                                                    const __grid_constant__ CUtensorMap map_b,
                                                    const __grid_constant__ CUtensorMap map_c,
                                                    const __grid_constant__ struct qjob j) {
  extern __shared__ __align__(1024) unsigned char memory[];
  struct control *s = (struct control *)(memory + S::CONTROL_AT);
  uint32_t tiles = shared_address(memory);
  int rank = (int)cluster_rank();

  for (int g = (int)threadIdx.x; g <= j.groups; g += THREADS)
    s->offsets[g] = j.offsets ? j.offsets[g] : g * j.rows;
  if (threadIdx.x == 0) {
    if (tiles % 1024 != 0) __trap(); /* the swizzle counts on it */
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    prefetch_map(&map_c);
    init_ring<S>(s, true);
  }
  __syncthreads();
  cluster_sync();

  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) load_all<S>(j, &map_a, &map_b, s, tiles, rank);
    if (threadIdx.x / 32 == 1) load_scales<S>(j, s, tiles, rank);
    if (threadIdx.x == UNITS_THREAD && j.units.counters) hand_out<S>(j, s, rank);
    __syncwarp();
  } else {
    registers_up<232>();
    multiply_all<S>(j, &map_c, s, tiles, rank, uniform((int)threadIdx.x / 128) - 1);
  }
  cluster_sync(); /* a block must not leave while the other may still write to it */
}

/* [count, rows, cols] bytes, boxes of 128 x box_rows; rank 2 where count is 0. */
static mt_err bytes_map(CUtensorMap *map, const uint8_t *base, int64_t count, int64_t rows,
                        int64_t cols, int box_rows) {
  cuuint64_t dim[3] = {(cuuint64_t)cols, (cuuint64_t)rows, (cuuint64_t)count};
  cuuint64_t stride[2] = {(cuuint64_t)cols, (cuuint64_t)(rows * cols)};
  return encode_as(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, base, count ? 3 : 2, dim, stride,
                   box_rows);
}

template <class S> static mt_err launch(struct mt_backend *be, const struct mt_cuda_qgrouped *p) {
  struct mt_cuda *c = mt_cuda_of(be);
  auto kernel = grouped_e4m3<S>;
  CUtensorMap a, b, out;
  if (S::WGRAD) {
    MT_TRY(bytes_map(&a, p->a, 0, p->m, p->k, 64));
    MT_TRY(bytes_map(&b, p->b, 0, p->n, p->k, HALF_N));
    MT_TRY(matrices_map(&out, p->c_dtype, p->c, p->groups, p->m, p->n, p->ldc, 64));
  } else {
    MT_TRY(bytes_map(&a, p->a, 0, p->m, p->k, 64));
    MT_TRY(bytes_map(&b, p->b, p->groups, p->n, p->k, HALF_N));
    MT_TRY(ragged_map(&out, p->c, p->n, p->ldc, 64));
  }
  int64_t mt = S::WGRAD ? (p->m + TILE_M - 1) / TILE_M * p->groups : p->m / TILE_M + p->groups;
  struct unit_source source; /* or fewer units: one is two tiles, or one at the edge */
  int64_t clusters =
      unit_clusters(be, mt * ((p->n + Q_TILE_N - 1) / Q_TILE_N), p->sumsq != NULL, &source);
  struct qjob j = {.offsets = p->offsets,
                   .a_scale = p->a_scale,
                   .b_scale = p->b_scale,
                   .c = p->c,
                   .partial = NULL,
                   .groups = p->groups,
                   .rows = (int)(S::WGRAD ? p->k : p->m),
                   .m = (int)p->m,
                   .n = (int)p->n,
                   .k = (int)p->k,
                   .a_scale_ld = p->a_scale_ld,
                   .ldc = p->ldc,
                   .accumulate = p->accumulate,
                   .units = source};
  void *partial = NULL;
  int blocks = (int)(2 * clusters);
  if (p->sumsq) MT_TRY(mt_cuda_scratch(be, "fp8 products", blocks * sizeof(double), &partial));
  j.partial = (double *)partial;
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED_BYTES),
      "fp8 products"));
  kernel<<<(unsigned)blocks, THREADS, S::SHARED_BYTES, c->stream>>>(a, b, out, j);
  MT_TRY(mt_cuda_launched("fp8 products"));
  return p->sumsq ? mt_cuda_sum_partials(be, j.partial, blocks, p->sumsq) : MT_OK;
}

extern "C" bool mt_cuda_qgrouped_sm90_fits(const struct mt_cuda_qgrouped *p) {
  const int64_t most = 1 << 28; /* coordinates and counts of tiles stay in 32 bits */
  if (p->c_dtype != MT_BF16 && !(p->wgrad && p->c_dtype == MT_F32)) return false;
  if (p->groups < 1 || p->groups > GROUPS_MOST || p->m < 1 || p->n < 1 || p->k < 1) return false;
  if (p->m > most || p->n > most || p->k > most) return false;
  int64_t mt = p->wgrad ? (p->m / TILE_M + 1) * p->groups : p->m / TILE_M + p->groups;
  if (mt * (p->n / HALF_N + 1) > INT32_MAX) return false;
  return p->k % 16 == 0 && (p->n | p->ldc) % 8 == 0 && aligned_to(p->a, 16) &&
         aligned_to(p->b, 16) && aligned_to(p->c, 16) && aligned_to(p->b_scale, p->wgrad ? 16 : 4);
}

extern "C" bool mt_cuda_qgrouped_sm90_takes(const struct mt_backend *be,
                                            const struct mt_cuda_qgrouped *p) {
  const struct mt_cuda *c = mt_cuda_of(be);
  return c->capability == 90 && !c->portable && mt_cuda_qgrouped_sm90_fits(p);
}

/* float32 that is added to never comes into registers. */
extern "C" bool mt_cuda_qgrouped_sm90_sums(const struct mt_backend *be,
                                           const struct mt_cuda_qgrouped *p) {
  return p->wgrad && !(p->c_dtype == MT_F32 && p->accumulate) &&
         mt_cuda_of(be)->sm_count <= MT_CUDA_PARTIALS && mt_cuda_qgrouped_sm90_takes(be, p);
}

extern "C" mt_err mt_cuda_qgrouped_sm90(struct mt_backend *be, const struct mt_cuda_qgrouped *p) {
  if (!p->wgrad) return launch<qdesign<false, bf16>>(be, p);
  return p->c_dtype == MT_F32 ? launch<qdesign<true, float>>(be, p)
                              : launch<qdesign<true, bf16>>(be, p);
}
