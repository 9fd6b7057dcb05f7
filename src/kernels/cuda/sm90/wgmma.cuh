/* The order of a warpgroup's products: what every kernel with wgmma needs around them. */
#ifndef MT_KERNELS_CUDA_SM90_WGMMA_CUH
#define MT_KERNELS_CUDA_SM90_WGMMA_CUH

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
/* The same number in every lane, in a way that the compiler sees: what hangs on a warp's number or
 * came from shared memory would else have every descriptor worked out in each lane, and moved for
 * each product. */
__device__ __forceinline__ int uniform(int x) {
  return __reduce_max_sync(0xffffffffu, x);
}
/* Sums are not to be read before this point, where the products are done. */
template <int N> __device__ __forceinline__ void sums_ready(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#endif
