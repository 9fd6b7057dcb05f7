/* What the programs here share: random data made on the device, comparing, medians. */
#ifndef MT_BENCH_COMMON_CUH
#define MT_BENCH_COMMON_CUH

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/device.cuh"

extern "C" {
#include "kernels/registry.h"
}

#define CHECK(call)                                                                                \
  do {                                                                                             \
    cudaError_t e_ = (call);                                                                       \
    if (e_ != cudaSuccess) die(#call, cudaGetErrorString(e_));                                     \
  } while (0)
#define OK(call)                                                                                   \
  do {                                                                                             \
    if (call) die(#call, mt_error_message());                                                      \
  } while (0)

static inline void die(const char *what, const char *why) {
  printf("%s: %s\n", what, why);
  exit(1);
}

__device__ static inline uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
template <class T> __global__ void fill_normal(T *p, size_t n, uint32_t seed, float scale) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t a = mix((uint32_t)i * 2 + seed), b = mix(a ^ 0x9e3779b9u ^ (uint32_t)(i >> 31));
    float u = ((float)(a >> 8) + 1) / 16777217.0f, v = (float)(b >> 8) / 16777216.0f;
    p[i] = from_float<T>(scale * sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}

/* top[0]: the largest difference, top[1]: the largest value, as bits of non-negative floats. */
template <class T> __global__ void compare(const T *a, const T *b, size_t n, unsigned *top) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  float off = 0, most = 0;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) {
    float x = to_float(a[i]), y = to_float(b[i]), d = fabsf(x - y);
    off = fmaxf(off, isnan(d) ? INFINITY : d);
    most = fmaxf(most, fabsf(y));
  }
  atomicMax(&top[0], __float_as_uint(off));
  atomicMax(&top[1], __float_as_uint(most));
}

static inline void *device_memory(size_t bytes) {
  void *p;
  CHECK(cudaMalloc(&p, bytes ? bytes : 4));
  return p;
}

/* On the default stream: synchronise before a backend's stream reads it. */
static inline void fill(void *p, enum mt_dtype dtype, size_t n, uint32_t seed) {
  MT_CUDA_BY_FORMAT(dtype, (fill_normal<T><<<1024, 256>>>((T *)p, n, seed, 1.0f)););
}

/* The largest difference over the largest value of b. */
static inline double difference(const void *a, const void *b, enum mt_dtype dtype, size_t n) {
  unsigned *top = (unsigned *)device_memory(2 * sizeof *top), host[2];
  CHECK(cudaMemset(top, 0, 2 * sizeof *top));
  MT_CUDA_BY_FORMAT(dtype, (compare<T><<<1024, 256>>>((const T *)a, (const T *)b, n, top)););
  CHECK(cudaMemcpy(host, top, sizeof host, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(top));
  float off, most;
  memcpy(&off, &host[0], 4);
  memcpy(&most, &host[1], 4);
  return most > 0 ? (double)off / (double)most : (double)off;
}

static inline int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static inline double median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, by_size);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

#endif
