/* Pieces of Hopper's attention kernels: tiles in the 128-byte swizzle, barriers between the warps
 * that copy and those that multiply, warpgroup products (PTX ISA, "wgmma.mma_async", "mbarrier").
 *
 * Head dimension 128 (less is padded with zeros). A tile of ROWS rows lies as two halves of 64
 * columns, [2][ROWS][64] bf16: a row of a half is 128 bytes, its 16-byte piece p at p ^ (row % 8).
 *
 * Copies are cp.async, not TMA: a sequence ends anywhere in the packed row, and what lies behind it
 * must come as zeros, since 0 * NaN of the padding would spoil a sum. */
#ifndef MT_KERNELS_CUDA_SM90_ATTENTION_WGMMA_CUH
#define MT_KERNELS_CUDA_SM90_ATTENTION_WGMMA_CUH

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/sm90/wgmma.cuh"

/* A block: two warpgroups multiply, one copies. */
enum { DIM = 128, WARPGROUP = 128, SM90_THREADS = 3 * WARPGROUP, MULTIPLIERS = 2 * WARPGROUP };
enum { SM90_SHARED_BYTES = 227 * 1024 }; /* the most of a block */

template <int ROWS> struct tile { bf16 x[2][ROWS][64]; };
template <int ROWS> constexpr uint32_t half_bytes = ROWS * 128;

template <int N> __device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Barriers. */
__device__ __forceinline__ void barrier_init(uint64_t *bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
/* This thread's arrival, once all its copies so far are there. */
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t *bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar))
               : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *bar, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n .reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
  } while (!done);
}
/* For wgmma, which reads through another proxy than cp.async writes through. */
__device__ __forceinline__ void barrier_wait_for_products(uint64_t *bar, uint32_t parity) {
  barrier_wait(bar, parity);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* A buffer of STAGES places, each filled and emptied in turn. */
template <int STAGES> struct ring_bars { uint64_t full[STAGES], empty[STAGES]; };
template <int STAGES> __device__ __forceinline__ void ring_init(ring_bars<STAGES> &r) {
  for (int i = 0; i < STAGES; i++) {
    barrier_init(&r.full[i], WARPGROUP);
    barrier_init(&r.empty[i], MULTIPLIERS);
  }
}
/* A position in it. The first round of filling must not wait: the copier's parity is the other. */
template <int STAGES> struct ring_at {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage < STAGES) return;
    stage = 0;
    parity ^= 1;
  }
};
/* A place whose contents the copiers' first thread describes, with an arrival of its own. */
__device__ __forceinline__ void ring_init_described(ring_bars<1> &r) {
  barrier_init(&r.full[0], WARPGROUP + 1);
  barrier_init(&r.empty[0], MULTIPLIERS);
}
/* Every lane arrives. One behind __syncwarp would do, and takes as long; but racecheck of
 * compute-sanitizer counts the arriving lane alone, and reports the other lanes' reads. */
template <int STAGES>
__device__ __forceinline__ void ring_release(ring_bars<STAGES> &r, int stage) {
  __syncwarp(); /* together again, for products */
  barrier_arrive(&r.empty[stage]);
}

/* Copying rows of a head into a tile, zeros past the last and past d: a thread of the copying
 * warpgroup has one 16-byte piece of every 8th row. What it needs is worked out once. */
struct copy_lane {
  int row;    /* its first, or one past all where it has nothing but zeros to write */
  int at;     /* bytes into a tile of 128-byte rows */
  bool right; /* of the tile's halves */
};
__device__ __forceinline__ copy_lane copy_lane_of(int d) {
  int row = threadIdx.x % WARPGROUP / 16, piece = threadIdx.x % 16;
  return {piece * 8 < d ? row : 1 << 30, row * 128 + ((piece % 8 ^ row) << 4), piece >= 8};
}
/* This thread's part of the rows that begin at src. */
__device__ __forceinline__ const bf16 *copy_from(const bf16 *src, int64_t ld) {
  return src + threadIdx.x % WARPGROUP / 16 * ld + threadIdx.x % 16 * 8;
}
template <int ROWS>
__device__ __forceinline__ void copy_rows(tile<ROWS> &to, const copy_lane &lane, const bf16 *from,
                                          int64_t ld, int rows) {
  uint32_t dst = shared_address(&to) + lane.at + (lane.right ? half_bytes<ROWS> : 0);
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    copy16(dst + i * 1024, from, lane.row + 8 * i < rows);
    from += 8 * ld;
  }
}

/* One number of each of ROWS rows, zeros past `rows`. */
template <int ROWS>
__device__ __forceinline__ void copy_column(float *to, const float *src, int64_t ld, int rows) {
  int row = threadIdx.x % WARPGROUP;
  if (row < ROWS) copy4(shared_address(to + row), src + (row < rows ? row * ld : 0), row < rows);
}

/* Two numbers of shared memory, read where this stands: read earlier, all of a tile's would be in
 * registers at once. */
__device__ __forceinline__ float2 load_two_here(const float *from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(shared_address(from))
               : "memory");
  return x;
}
__device__ __forceinline__ float2 unpack_two(uint32_t two) {
  return {__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u)};
}

/* Products. Sums of a warpgroup: 64 rows, thread's rows lane/4 and lane/4 + 8 of its warp's 16;
 * d[4 n + i] is column 8 n + lane%4*2 + i%2 of row i/2. */
template <int N> __device__ __forceinline__ void left_ready(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+r"(a[i][j])::"memory");
  }
}

/* Groups of 8 rows are 1024 bytes apart; `apart`: bytes between the halves, where the depth runs
 * down the rows. */
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t start, uint32_t apart) {
  return (uint64_t)((start & 0x3ffff) >> 4) | (uint64_t)(apart >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* The same, not worked out before this point: outside of the loop there would be one for every
 * step, more than registers can hold. */
__device__ __forceinline__ uint64_t descriptor_here(uint32_t start, uint32_t apart) {
  uint64_t x = tile_descriptor(start, apart);
  asm volatile("" : "+l"(x));
  return x;
}

#define MT_SUMS_4(d, i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MT_SUMS_16(d, i)                                                                           \
  MT_SUMS_4(d, (i)), MT_SUMS_4(d, (i) + 4), MT_SUMS_4(d, (i) + 8), MT_SUMS_4(d, (i) + 12)
#define MT_NAMES_32                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MT_NAMES_64                                                                                \
  MT_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
              "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* d += a b^T (or =), 16 deep: a, b descriptors of tiles whose rows the depth runs along. */
__device__ __forceinline__ void wgmma_ss(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MT_NAMES_64
               "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
               : MT_SUMS_16(d, 0), MT_SUMS_16(d, 16), MT_SUMS_16(d, 32), MT_SUMS_16(d, 48)
               : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MT_NAMES_32
               "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
               : MT_SUMS_16(d, 0), MT_SUMS_16(d, 16)
               : "l"(a), "l"(b), "r"(add));
}
/* The same with a in registers. */
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                         int add) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MT_NAMES_32
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
               : MT_SUMS_16(d, 0), MT_SUMS_16(d, 16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                         int add) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MT_NAMES_64
               "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"
               : MT_SUMS_16(d, 0), MT_SUMS_16(d, 16), MT_SUMS_16(d, 32), MT_SUMS_16(d, 48)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/* d += a b, b a tile whose columns the depth runs along. */
__device__ __forceinline__ void wgmma_rs_turned(float (&d)[64], const uint32_t (&a)[4],
                                                uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MT_NAMES_64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : MT_SUMS_16(d, 0), MT_SUMS_16(d, 16), MT_SUMS_16(d, 32), MT_SUMS_16(d, 48)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* d = rows [row0, row0 + 64) of a . all rows of b (2 N of them), a's first STEPS * 16 columns from
 * registers. */
template <int STEPS, int N, int A_ROWS, int B_ROWS>
__device__ __forceinline__ void score(float (&d)[N], const uint32_t (&left)[STEPS][4],
                                      const tile<A_ROWS> &a, int row0, const tile<B_ROWS> &b) {
  static_assert(N * 2 == B_ROWS, "a column each");
  uint64_t da = descriptor_here(shared_address(&a) + (uint32_t)(row0 * 128), 0),
           db = descriptor_here(shared_address(&b), 0);
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) {
    uint64_t bk = db + (k / 4 * half_bytes<B_ROWS> + k % 4 * 32) / 16;
    if (k < STEPS)
      wgmma_rs(d, left[k < STEPS ? k : 0], bk, k > 0);
    else
      wgmma_ss(d, da + (k / 4 * half_bytes<A_ROWS> + k % 4 * 32) / 16, bk, k > 0);
  }
}
/* The same with none, or all, of a in registers. */
template <int N, int A_ROWS, int B_ROWS>
__device__ __forceinline__ void score(float (&d)[N], const tile<A_ROWS> &a, int row0,
                                      const tile<B_ROWS> &b) {
  static_assert(N * 2 == B_ROWS, "a column each");
  uint64_t da = descriptor_here(shared_address(&a) + (uint32_t)(row0 * 128), 0),
           db = descriptor_here(shared_address(&b), 0);
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) {
    wgmma_ss(d, da + (k / 4 * half_bytes<A_ROWS> + k % 4 * 32) / 16,
             db + (k / 4 * half_bytes<B_ROWS> + k % 4 * 32) / 16, k > 0);
  }
}
template <int N, int B_ROWS>
__device__ __forceinline__ void score(float (&d)[N], const uint32_t (&a)[DIM / 16][4],
                                      const tile<B_ROWS> &b) {
  score(d, a, b, 0, b);
}
/* d += w . rows of b. */
template <int ROWS>
__device__ __forceinline__ void mix(float (&d)[64], const uint32_t (&w)[ROWS / 16][4],
                                    const tile<ROWS> &b) {
  uint64_t db = descriptor_here(shared_address(&b), half_bytes<ROWS>);
#pragma unroll
  for (int k = 0; k < ROWS / 16; k++) wgmma_rs_turned(d, w[k], db + k * 2048 / 16);
}

/* This warp's 16 rows of a tile, its first STEPS * 16 columns, as left operands. */
template <int STEPS, int ROWS>
__device__ __forceinline__ void load_left(uint32_t (&a)[STEPS][4], const tile<ROWS> &t, int row0) {
  int lane = threadIdx.x % 32, row = row0 + lane % 16;
  uint32_t at = shared_address(&t) + (uint32_t)(row * 128);
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    int piece = k % 4 * 2 + lane / 16;
    fragment(a[k], at + k / 4 * half_bytes<ROWS> + (uint32_t)((piece ^ (row & 7)) << 4));
  }
}

/* Sums, or what became of them, as left operands. */
template <int N>
__device__ __forceinline__ void as_left(uint32_t (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
  for (int k = 0; k < N / 8; k++) {
#pragma unroll
    for (int j = 0; j < 4; j++) a[k][j] = pack_two(d[8 * k + 2 * j], d[8 * k + 2 * j + 1]);
  }
}

/* The sums' rows, times a factor each, as bf16 rows to `dst` (this warp's first). Four lanes have a
 * row's pieces between them and turn them around, so that each has 16 bytes to write. */
__device__ __forceinline__ void store_sums(const float (&sums)[64], const float (&factor)[2],
                                           bf16 *dst, int64_t ld, int rows, int d) {
  int lane = threadIdx.x % 32, j = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < DIM / 8; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const float *s = &sums[4 * (n + m) + 2 * half];
        x[m] = pack_two(s[0] * factor[half], s[1] * factor[half]);
      }
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
          if (m & bit) continue;
          uint32_t y = __shfl_xor_sync(0xffffffffu, j & bit ? x[m] : x[m + bit], bit);
          if (j & bit)
            x[m] = y;
          else
            x[m + bit] = y;
        }
      }
      int column = (n + j) * 8;
      if (row < rows && column < d)
        *reinterpret_cast<uint4 *>(dst + row * ld + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

/* Units of work for blocks that stay: the first is the block's number, each other the next that no
 * block has. Who makes a unit does not change its bits. */
__device__ __forceinline__ int unit_after(const struct attention_call &c, int unit) {
  return (int)gridDim.x + (c.units_taken ? atomicAdd(c.units_taken, 1) : unit);
}
/* Of the copying warpgroup alone. */
__device__ __forceinline__ void copiers_sync() {
  asm volatile("bar.sync 1, 128;" ::: "memory");
}

#endif
