/* A finished tile on its way out: from the multipliers' registers into shared memory, from there by
 * TMA while the next tile is being made. Every warpgroup has its own staging memory, SLOTS chunks
 * of 64 rows x 128 bytes in 128-byte swizzle. */
#ifndef MT_KERNELS_CUDA_SM90_GROUPED_OUT_CUH
#define MT_KERNELS_CUDA_SM90_GROUPED_OUT_CUH

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/sm90/grouped_ring.cuh"

enum { CHUNK_BYTES = 64 * 128 };

__device__ __forceinline__ uint32_t pair_of(float x, float y) {
  __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<uint32_t *>(&v);
}

/* Where sums are added to bf16 that is there: in float32, rounded once. c: the warpgroup's first
 * element. wgmma leaves row 16 warp + lane / 4 (+ 8) and columns 8 i + 2 (lane % 4) (+ 1) in
 * d[4 i ..]. */
template <int COUNT>
__device__ __forceinline__ void add_old(float (&d)[COUNT], const bf16 *c, int64_t ldc,
                                        int rows_left, int cols_left) {
  int lane = threadIdx.x % 32, row = (int)threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + 8 * half >= rows_left) continue;
    const bf16 *from = c + (row + 8 * half) * ldc;
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
      int col = 8 * i + 2 * (lane % 4);
      if (col >= cols_left) continue;
      float old[2];
      load_floats<bf16, 2>(from + col, old);
      d[4 * i + 2 * half] += old[0];
      d[4 * i + 2 * half + 1] += old[1];
    }
  }
}

/* The sum of squares of a thread's part of a tile as it will be stored: of at most 128 numbers in
 * float32 (a square of bf16 is exact there), or in float64 where float32's range does not do, since
 * a square is infinite or all are next to nothing. (Roundings one by one there: words in common
 * with the first sums would be held for it.) */
__device__ __forceinline__ void stored_pair(float x, float y, float (&out)[2], bf16 *) {
  uint32_t v = pair_of(x, y);
  out[0] = __uint_as_float(v << 16), out[1] = __uint_as_float(v & 0xffff0000u);
}
__device__ __forceinline__ void stored_pair(float x, float y, float (&out)[2], float *) {
  out[0] = x, out[1] = y;
}
template <class C, int COUNT> __device__ __forceinline__ double squares(const float (&d)[COUNT]) {
  float sum[4] = {0, 0, 0, 0}, x[2];
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) {
    stored_pair(d[i], d[i + 1], x, (C *)NULL);
    sum[i % 4] = fmaf(x[0], x[0], sum[i % 4]);
    sum[i % 4 + 1] = fmaf(x[1], x[1], sum[i % 4 + 1]);
  }
  float all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  if (all > 1e-30f && all < 1e37f) return (double)all;
  double wide = 0;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    double y = (double)to_float(from_float<C>(d[i]));
    wide += y * y;
  }
  return wide;
}

/* Of what stands in `rows` rows already; a warp's work, each lane's part of it. */
template <class C>
__device__ __noinline__ double old_squares(const C *c, int64_t ldc, int rows, int cols) {
  double sum = 0;
  for (int r = 0; r < rows; r++) {
    for (int col = (int)threadIdx.x % 32; col < cols; col += 32) {
      double x = (double)to_float(c[r * ldc + col]);
      sum += x * x;
    }
  }
  return sum;
}

/* A multiplying warp's sum (=, or += where more is set) from its lanes' parts; then the block's,
 * always in one order. */
__device__ __forceinline__ void add_squares(struct control *s, double part, bool more) {
  int warp = (int)threadIdx.x / 32 - 4;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) part += __shfl_xor_sync(0xffffffffu, part, i);
  if (threadIdx.x % 32 == 0) s->squares[warp] = part + (more ? s->squares[warp] : 0);
}
__device__ __forceinline__ void write_partial(const struct control *s, double *partial) {
  part_sync(3, 2 * 128);
  if (threadIdx.x != 128) return;
  double total = s->squares[0];
  for (int i = 1; i < MULTIPLIER_WARPS; i++) total += s->squares[i];
  partial[blockIdx.x] = total;
}

/* Chunk number `chunk` along the columns to the slot at `to`. */
template <int COUNT>
__device__ __forceinline__ void stage_chunk(const float (&d)[COUNT], int chunk, uint32_t to,
                                            bf16 *) {
  int lane = threadIdx.x % 32, warp = (int)threadIdx.x / 32 % 4;
  int row = 16 * warp + (lane & 7) + 8 * ((lane >> 3) & 1);
#pragma unroll
  for (int b = 0; b < 8; b += 2) { /* blocks of 8 columns, 16 bytes */
    int i = chunk * 8 + b;
    uint32_t v[4] = {pair_of(d[4 * i], d[4 * i + 1]), pair_of(d[4 * i + 2], d[4 * i + 3]),
                     pair_of(d[4 * i + 4], d[4 * i + 5]), pair_of(d[4 * i + 6], d[4 * i + 7])};
    int column = b + (lane >> 4);
    store_matrices(to + (uint32_t)(row * 128 + ((column ^ (row & 7)) << 4)), v);
  }
}
/* float32: 8 rows of 32 bytes at a time. Odd rows write two blocks further on than even ones, for
 * with the swizzle neighbours' halves of a block lie in the same banks. */
template <int COUNT>
__device__ __forceinline__ void stage_chunk(const float (&d)[COUNT], int chunk, uint32_t to,
                                            float *) {
  int lane = threadIdx.x % 32, warp = (int)threadIdx.x / 32 % 4;
  bool odd = lane & 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = 16 * warp + lane / 4 + 8 * half;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      int i = 4 * (chunk * 4 + b) + 2 * half, l = 4 * (chunk * 4 + (b ^ 2)) + 2 * half;
      float x = odd ? d[l] : d[i], y = odd ? d[l + 1] : d[i + 1];
      int column = 2 * (odd ? b ^ 2 : b) + (lane >> 1 & 1);
      uint32_t at = to + (uint32_t)(row * 128 + ((column ^ (row & 7)) << 4) + (lane & 1) * 8);
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
    }
  }
}

/* One thread: COUNT chunks from `out` on to c from (row, col) of p's group on, what lies within its
 * n columns; float32 is added to what is there where `accumulate` is set. S: as in
 * grouped_ring.cuh, and C, CHUNK_COLS. */
template <class S, int COUNT>
__device__ __forceinline__ void put_chunks(const CUtensorMap *map, uint32_t out,
                                           const struct place &p, int row, int col, int n,
                                           int accumulate) {
#pragma unroll
  for (int i = 0; i < COUNT; i++, out += CHUNK_BYTES, col += S::CHUNK_COLS) {
    if (col >= n) continue;
    if (!S::WGRAD)
      tma_put_4d(map, out, col, RAGGED_ROWS - (p.end - p.begin) + row, RAGGED_ROWS, p.end);
    else if (sizeof(typename S::C) == 4 && accumulate)
      tma_add_3d(map, out, col, row, p.g);
    else
      tma_put_3d(map, out, col, row, p.g);
  }
  tma_commit();
}

#endif
