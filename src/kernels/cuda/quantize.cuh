/* What kernels that quantize share: the scale of a block, elements, four of them at a time.
 * Numbers: base/fp8.h, whose functions these are once more. */
#ifndef MT_KERNELS_CUDA_QUANTIZE_CUH
#define MT_KERNELS_CUDA_QUANTIZE_CUH

#include <cuda_fp8.h>

#include "kernels/cuda/rows.cuh"

/* As an integer: a NaN is larger than all numbers, so it stays. */
__device__ __forceinline__ unsigned magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

/* The e8m0 byte of a block whose largest magnitude has these bits. FP8: 1 for zeros and not below
 * 2^-126. */
template <bool FP8> __device__ __forceinline__ unsigned scale_byte(unsigned top) {
  if (top > 0x7f800000u) return 255;
  if (top == 0x7f800000u) return 254;
  int byte = (int)(top >> 23) - 8 + ((top & 0x7fffffu) > 0x600000u);
  if (FP8) return top == 0 ? 127 : byte < 1 ? 1 : (unsigned)byte;
  return byte < 0 ? 0 : (unsigned)byte;
}
__device__ __forceinline__ float scale_value(unsigned byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : byte << 23);
}
__device__ __forceinline__ float scale_inverse(unsigned byte) {
  return __uint_as_float(byte == 255   ? 0x7fc00000u
                         : byte == 254 ? 0x00400000u
                         : byte == 0   ? 0u
                                       : (254u - byte) << 23);
}
__device__ __forceinline__ uint8_t to_e4m3(float x) {
  return (uint8_t)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
/* Four, the first in the lowest byte. */
__device__ __forceinline__ uint32_t four_e4m3(float a, float b, float c, float d) {
  uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  return low | (uint32_t)__nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3)
                   << 16;
}
/* As T holds it. */
template <class T> __device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}
__device__ __forceinline__ float from_e4m3(uint8_t x) {
  __half_raw h = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)x, __NV_E4M3);
  return __half2float(__half(h));
}

/* Four neighbours of a row that has `left` more from p on. */
template <class T>
__device__ __forceinline__ void read_four(const T *p, int64_t left, bool is_wide, float (&v)[4]) {
  if (is_wide && left >= 4) {
    load_floats<T, 4>(p, v);
    return;
  }
  for (int i = 0; i < 4; i++) v[i] = i < left ? to_float(p[i]) : 0.0f;
}

/* Four bytes, or as many as there are up to `left`. */
__device__ __forceinline__ void write_four(uint8_t *to, uint32_t bytes, int left) {
  if (left >= 4 && ((uintptr_t)to & 3) == 0) {
    *(uint32_t *)to = bytes;
    return;
  }
  for (int i = 0; i < 4 && i < left; i++) to[i] = (uint8_t)(bytes >> 8 * i);
}

/* The scale of the block of a row that a lane's four are of, 8 lanes' or (FP8) all 32; and whether
 * this lane is the one that writes it. */
template <bool FP8> __device__ __forceinline__ unsigned row_scale_byte(const float (&v)[4]) {
  unsigned top = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) top = max(top, magnitude_bits(v[i]));
#pragma unroll
  for (int i = FP8 ? 16 : 4; i > 0; i /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, i));
  return scale_byte<FP8>(top);
}
template <bool FP8> __device__ __forceinline__ bool row_leader() {
  return threadIdx.x % (FP8 ? 32 : 8) == 0;
}

template <bool FP8>
__device__ __forceinline__ void put_scale(void *scales, int64_t at, unsigned byte) {
  if (FP8)
    ((float *)scales)[at] = scale_value(byte);
  else
    ((uint8_t *)scales)[at] = (uint8_t)byte;
}

#endif
