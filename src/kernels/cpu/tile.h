/* The register tile of all products: MR rows x NV vectors of accumulators, NV loads and a
 * broadcast fit the register file. */
#ifndef MT_KERNELS_CPU_TILE_H
#define MT_KERNELS_CPU_TILE_H

#include <stdbool.h>
#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined __AVX512F__
enum { VW = 16, MR = 8 };
#elif defined __AVX__
enum { VW = 8, MR = 4 };
#else
enum { VW = 4, MR = 4 };
#endif
enum { NV = 3, NR = NV * VW };

typedef float vec __attribute__((vector_size(VW * 4), aligned(4), may_alias));

static inline vec splat(float x) {
#if defined __AVX512F__
  return (vec)_mm512_set1_ps(x);
#elif defined __AVX__
  return (vec)_mm256_set1_ps(x);
#else
  return (vec){x, x, x, x};
#endif
}

/* acc + s * x. In assembly, because the compilers' own choice among the three forms of the
 * instruction costs register moves, and folded loads cost more loads than the core can do. */
static inline vec multiply_add(vec acc, vec s, vec x) {
#if defined __AVX512F__ || defined __FMA__
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(s), "v"(x));
  return acc;
#else
  return acc + s * x;
#endif
}

/* Lines that a tile asks the cache for while it computes: four runs of kc/16 lines, `step` bytes
 * apart. They hide the memory's latency behind the arithmetic: what the next tiles will read. */
struct runs {
  const char *start[4];
  int64_t step;
};

#define TILE_STEP(k)                                                                               \
  do {                                                                                             \
    vec x[NV];                                                                                     \
    _Pragma("GCC unroll 3") for (int v = 0; v < nv; v++) {                                         \
      x[v] = *(const vec *)(bk + (k)*NR + v * VW);                                                 \
    }                                                                                              \
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) {                                         \
      vec s = splat(ak[i * rs + (k)*cs]);                                                          \
      _Pragma("GCC unroll 3") for (int v = 0; v < nv; v++) {                                       \
        acc[i][v] = multiply_add(acc[i][v], s, x[v]);                                              \
      }                                                                                            \
    }                                                                                              \
  } while (0)

/* What becomes of a tile: = or +=, or = past the caches, for results that are not read soon: it
 * spares reading each line before it is overwritten. Streaming wants c aligned to a vector, ldc to
 * VW, and tile_stream_fence before another thread reads. */
enum tile_store { TILE_SET, TILE_ADD, TILE_STREAM };

static inline void stream(float *p, vec x) {
#if defined __AVX512F__
  _mm512_stream_ps(p, (__m512)x);
#elif defined __AVX__
  _mm256_stream_ps(p, (__m256)x);
#else
  *(vec *)p = x;
#endif
}

static inline void tile_stream_fence(void) {
#if defined __AVX__
  _mm_sfence();
#endif
}

/* c[mr][nv * VW] = or += a * b over kc; element (i, k) of a at i*rs + k*cs; b is
 * [kc][NR]. mr and nv are constants at every call. */
static inline __attribute__((always_inline)) void
tile(const int mr, const int nv, int64_t kc, const float *a, int64_t rs, int64_t cs, const float *b,
     float *c, int64_t ldc, enum tile_store how, const struct runs *ahead) {
  vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < mr; i++) {
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) acc[i][v] = splat(0);
  }
  const float *ak = a, *bk = b;
  for (int quarter = 0; quarter < 4; quarter++) {
    const char *line = ahead->start[quarter];
    for (int64_t n = kc / 16; n > 0; n--) {
      __builtin_prefetch(line, 0, 2);
      line += ahead->step;
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) TILE_STEP(k);
      ak += 4 * cs;
      bk += 4 * NR;
    }
  }
  for (int64_t n = kc % 16; n > 0; n--) {
    TILE_STEP(0);
    ak += cs;
    bk += NR;
  }
  /* All loads before all stores: rows 2^n bytes apart would seem to alias one another. */
  if (how == TILE_ADD) {
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 3
      for (int v = 0; v < nv; v++) acc[i][v] += *(const vec *)(c + i * ldc + v * VW);
    }
  }
  if (how == TILE_STREAM) {
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 3
      for (int v = 0; v < nv; v++) stream(c + i * ldc + v * VW, acc[i][v]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < mr; i++) {
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) *(vec *)(c + i * ldc + v * VW) = acc[i][v];
  }
}

#endif
