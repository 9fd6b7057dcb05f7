/* A function of a header that GPUs' code and the host's share. */
#ifndef MT_BASE_ON_BOTH_H
#define MT_BASE_ON_BOTH_H

#ifdef __CUDACC__
#define MT_ON_BOTH static __host__ __device__ __forceinline__
#else
#define MT_ON_BOTH static inline
#endif

#endif
