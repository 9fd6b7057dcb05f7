/* What the kernels share: formats as float32, vectors of 16 bytes, sums over warps and blocks. */
#ifndef MT_KERNELS_CUDA_DEVICE_CUH
#define MT_KERNELS_CUDA_DEVICE_CUH

#include <cuda_bf16.h>

#include "kernels/cuda/cuda.h"

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

/* N elements of T moved as one access of N * sizeof(T) bytes; the pointer must be so aligned. */
template <class T, int N> struct alignas(sizeof(T) * N) pack { T x[N]; };
/* Elements of one 16-byte access. */
template <class T> constexpr int wide = 16 / sizeof(T);

template <class T, int N> __device__ __forceinline__ void load_floats(const T *p, float (&out)[N]) {
  pack<T, N> v = *reinterpret_cast<const pack<T, N> *>(p);
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = to_float(v.x[i]);
}
template <class T, int N> __device__ __forceinline__ void store_floats(T *p, const float (&in)[N]) {
  pack<T, N> v;
#pragma unroll
  for (int i = 0; i < N; i++) v.x[i] = from_float<T>(in[i]);
  *reinterpret_cast<pack<T, N> *>(p) = v;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}
/* The sum over the block, in every thread, in a fixed order; all threads must call it. `shared`
 * holds 33 floats and may be used again after the next barrier. */
__device__ __forceinline__ float block_sum(float x, float *shared) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = warp_sum(lane < warps ? shared[lane] : 0.0f);
    if (lane == 0) shared[32] = x;
  }
  __syncthreads();
  return shared[32];
}

static inline bool aligned_to(const void *p, size_t bytes) {
  return ((uintptr_t)p & (bytes - 1)) == 0;
}

/* Runs the statements with T as the element type of the format. */
#define MT_CUDA_BY_FORMAT(dtype, ...)                                                              \
  do {                                                                                             \
    if ((dtype) == MT_F32) {                                                                       \
      using T = float;                                                                             \
      __VA_ARGS__                                                                                  \
    } else {                                                                                       \
      using T = bf16;                                                                              \
      __VA_ARGS__                                                                                  \
    }                                                                                              \
  } while (0)

#endif
