/* SwiGLU of one element, the same bits in every kernel that has it. Formulas: docs/math.md,
 * "SwiGLU". Operations are named so that the compiler fuses none differently from place to place.
 */
#ifndef MT_KERNELS_CUDA_SWIGLU_CUH
#define MT_KERNELS_CUDA_SWIGLU_CUH

#include "kernels/cuda/device.cuh"

/* The fast functions are off by a few units of float32's last place: nothing that bfloat16 shows,
 * and they keep the arithmetic under the memory's time. An overflowing e^-x gives 0, as it must. */
template <class T> __device__ __forceinline__ float sigmoid(float x);
template <> __device__ __forceinline__ float sigmoid<float>(float x) {
  return 1.0f / (1.0f + expf(-x));
}
template <> __device__ __forceinline__ float sigmoid<bf16>(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(x, -1.4426950408889634f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(__fadd_rn(1.0f, e)));
  return s;
}

template <class T> __device__ __forceinline__ float swiglu_at(float gate, float up, float weight) {
  return __fmul_rn(__fmul_rn(__fmul_rn(gate, sigmoid<T>(gate)), up), weight);
}

/* From dh to the gradients of gate and up; h again; the element's share of drow_prob is added. */
struct swiglu_gradient {
  float gate, up, h;
};
template <class T>
__device__ __forceinline__ struct swiglu_gradient swiglu_bwd_at(float gate, float up, float dh,
                                                                float weight, float *drow_prob) {
  float sig = sigmoid<T>(gate), silu = __fmul_rn(gate, sig), value = __fmul_rn(silu, up);
  *drow_prob = __fmaf_rn(dh, value, *drow_prob);
  dh = __fmul_rn(dh, weight);
  float slope = __fmaf_rn(silu, __fsub_rn(1.0f, sig), sig); /* of silu */
  return {__fmul_rn(__fmul_rn(dh, up), slope), __fmul_rn(dh, silu), __fmul_rn(value, weight)};
}

#endif
