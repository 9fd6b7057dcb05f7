/* Pieces of the BF16 attention kernels: asynchronous copies into swizzled shared memory, fragments
 * from there, mma.sync.m16n8k16 (PTX ISA 9.7.14, "Matrix fragments for mma.m16n8k16").
 *
 * A tile in shared memory: rows of DP bf16 (64 or 128), each 16-byte piece at index
 * piece ^ (row % 8), so that the 8 rows that one ldmatrix phase reads lie in different banks. */
#ifndef MT_KERNELS_CUDA_ATTENTION_MMA_CUH
#define MT_KERNELS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/attention.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes, or 16 zeros; src then is not read and may lie anywhere. */
__device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
               "r"(real ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy4(uint32_t dst, const void *src, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src),
               "r"(real ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

/* Bytes from a tile's beginning to a 16-byte piece of a row. */
template <int DP> __device__ __forceinline__ uint32_t piece_at(int row, int piece) {
  return (uint32_t)(row * DP * 2 + ((piece ^ (row & 7)) << 4));
}

/* Starts copying ROWS rows of a head (ld elements apart) into a tile; zeros past `rows` and d. */
template <int ROWS, int DP, int THREADS>
__device__ __forceinline__ void copy_tile(uint32_t dst, const bf16 *src, int64_t ld, int rows,
                                          int d) {
  constexpr int PIECES = DP / 8, STEP = THREADS / PIECES;
  static_assert(THREADS % PIECES == 0 && ROWS % STEP == 0 && STEP % 8 == 0, "whole turns");
  int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
  bool inside = piece * 8 < d;
  const bf16 *from = src + row * ld + piece * 8;
  dst += piece_at<DP>(row, piece);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; i++) {
    bool real = inside && row + i * STEP < rows;
    copy16(dst + i * STEP * DP * 2, real ? from + i * STEP * ld : src, real);
  }
}

/* 16 bytes to global memory; an ordinary store of a struct may come out as four. */
__device__ __forceinline__ void store16(void *dst, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(dst)),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ void fragment(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
__device__ __forceinline__ void fragment_turned(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack_two(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t *>(&v);
}

/* This lane's address of a fragment's rows; `column_bytes(k)` of it moves along the row.
 * Left operand: rows row0 + 0..15 of the tile, columns 16 k + 0..15.
 * Right operand stored as [n][k] (keys against queries): rows n, the same columns.
 * Right operand stored as [k][n] (values): rows k, read turned. */
template <int DP> struct operand {
  uint32_t at;    /* of this lane's row */
  uint32_t flips; /* what the row's swizzle and the lane's half do to a piece's index, in bytes */

  /* Left operands, and right operands read turned: lanes 16..31 take the second 8 columns. */
  __device__ __forceinline__ static operand by_rows(uint32_t tile, int row0) {
    int lane = threadIdx.x % 32;
    return {tile + (uint32_t)((row0 + lane % 16) * DP * 2),
            (uint32_t)(((lane / 16) ^ (lane & 7)) << 4)};
  }
  /* Right operands as stored: lanes 16..31 take the second 8 rows. */
  __device__ __forceinline__ static operand by_columns(uint32_t tile, int row0) {
    int lane = threadIdx.x % 32;
    return {tile + (uint32_t)((row0 + lane % 8 + lane / 16 * 8) * DP * 2),
            (uint32_t)((((lane / 8) & 1) ^ (lane & 7)) << 4)};
  }
  /* 16 columns from 16 k, rows 16 n further down. The swizzle stays within 128 bytes. */
  __device__ __forceinline__ uint32_t of(int n, int k) const {
    return at + (uint32_t)(n * 16 * DP * 2 + k / 4 * 128) + (((uint32_t)(k % 4) << 5) ^ flips);
  }
};

/* acc[m][n] += left rows (M tiles of 16) . right rows (N tiles of 8), DP deep. */
template <int DP, int M, int N>
__device__ __forceinline__ void dots(float (&acc)[M][N][4], const operand<DP> &left,
                                     const operand<DP> &right) {
#pragma unroll
  for (int k = 0; k < DP / 16; k++) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) fragment(a[m], left.of(m, k));
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
      uint32_t b[4];
      fragment(b, right.of(n, k));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma(acc[m][2 * n], a[m], b[0], b[1]);
        mma(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/* acc[m][:] += weights (M tiles of 16 x K tiles of 16) . rows of the right tile, DP columns. */
template <int DP, int M, int K>
__device__ __forceinline__ void mix(float (&acc)[M][DP / 8][4], const uint32_t (&w)[M][K][4],
                                    const operand<DP> &right) {
#pragma unroll
  for (int k = 0; k < K; k++) {
#pragma unroll
    for (int n = 0; n < DP / 16; n++) {
      uint32_t b[4];
      fragment_turned(b, right.of(k, n));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma(acc[m][2 * n], w[m][k], b[0], b[1]);
        mma(acc[m][2 * n + 1], w[m][k], b[2], b[3]);
      }
    }
  }
}

/* Sums of 16 x 16 become a left operand: lanes hold the same rows in both. */
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c0)[4],
                                        const float (&c1)[4]) {
  a[0] = pack_two(c0[0], c0[1]);
  a[1] = pack_two(c0[2], c0[3]);
  a[2] = pack_two(c1[0], c1[1]);
  a[3] = pack_two(c1[2], c1[3]);
}

/* 16 rows of sums, times a factor of the rows lane/4 and lane/4 + 8, as bf16 rows from `dst` on:
 * through the warp's own rows of a tile, so that a row leaves in 16-byte pieces. */
template <int DP>
__device__ __forceinline__ void store_tile(uint32_t tile, int row0, const float (&acc)[DP / 8][4],
                                           float factor, float factor8, bf16 *dst, int64_t ld,
                                           int rows, int d) {
  int lane = threadIdx.x % 32, row = row0 + lane / 4;
  __syncwarp(); /* other lanes may have read these rows */
#pragma unroll
  for (int n = 0; n < DP / 8; n++) {
    uint32_t at = tile + piece_at<DP>(row, n) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at),
                 "r"(pack_two(acc[n][0] * factor, acc[n][1] * factor))
                 : "memory");
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 8 * DP * 2),
                 "r"(pack_two(acc[n][2] * factor8, acc[n][3] * factor8))
                 : "memory");
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < DP / 16; i++) {
    int n = lane + 32 * i, r = n / (DP / 8), piece = n % (DP / 8);
    uint32_t v[4];
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(tile + piece_at<DP>(row0 + r, piece))
                 : "memory");
    if (r < rows && piece * 8 < d) store16(dst + r * ld + piece * 8, v);
  }
}

#endif
