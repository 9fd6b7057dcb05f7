#include "kernels/cpu/pack.h"

#include <string.h>

#include "kernels/cpu/tile.h"

#ifdef __AVX512F__
static inline __attribute__((always_inline)) void transpose(const float *in, int64_t in_ld,
                                                            float *out, int64_t out_ld) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(in + i * in_ld);
    /* Pairs, then quads within 128-bit lanes; then the lanes themselves in two steps. */
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(out + i * out_ld, _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_ps(out + (8 + i) * out_ld, _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_ps(out + (4 + i) * out_ld, _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_ps(out + (12 + i) * out_ld, _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd));
  }
}
#elif defined __AVX__
static inline __attribute__((always_inline)) void transpose(const float *in, int64_t in_ld,
                                                            float *out, int64_t out_ld) {
  __m256 r[8], t[8], u[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(in + i * in_ld);
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * out_ld, _mm256_permute2f128_ps(u[i], u[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * out_ld, _mm256_permute2f128_ps(u[i], u[4 + i], 0x31));
  }
}
#else
static inline void transpose(const float *in, int64_t in_ld, float *out, int64_t out_ld) {
  for (int i = 0; i < VW; i++) {
    for (int j = 0; j < VW; j++) out[j * out_ld + i] = in[i * in_ld + j];
  }
}
#endif

static void load_run(const void *data, enum mt_dtype dtype, int64_t offset, int64_t n, float *out) {
  if (dtype == MT_F32) {
    memcpy(out, (const float *)data + offset, (size_t)n * sizeof *out);
  } else {
    const uint16_t *h = (const uint16_t *)data + offset;
    for (int64_t i = 0; i < n; i++) out[i] = mt_bf16_to_f32(h[i]);
  }
}

/* One panel of `lanes` columns whose rows are contiguous. */
static void pack_straight(const struct cpu_vector *b, int64_t k0, int64_t kc, int64_t j0,
                          int64_t lanes, float *out) {
  if (lanes == NR && b->dtype == MT_F32) {
    const float *src = (const float *)b->data + k0 * b->stride_k + j0;
    for (int64_t k = 0; k < kc; k++) {
#pragma GCC unroll 3
      for (int v = 0; v < NV; v++) {
        *(vec *)(out + k * NR + v * VW) = *(const vec *)(src + k * b->stride_k + v * VW);
      }
    }
    return;
  }
  for (int64_t k = 0; k < kc; k++) {
    load_run(b->data, b->dtype, (k0 + k) * b->stride_k + j0, lanes, out + k * NR);
    for (int64_t j = lanes; j < NR; j++) out[k * NR + j] = 0;
  }
}

/* One panel of `lanes` columns that are themselves contiguous. */
static void pack_transposed(const struct cpu_vector *b, int64_t k0, int64_t kc, int64_t j0,
                            int64_t lanes, float *out) {
  for (int64_t j = 0; j < NR; j += VW) {
    for (int64_t k = 0; k < kc; k += VW) {
      int64_t nk = kc - k < VW ? kc - k : VW, offset = (j0 + j) * b->stride_j + k0 + k;
      if (b->dtype == MT_F32 && j + VW <= lanes && nk == VW) {
        transpose((const float *)b->data + offset, b->stride_j, out + k * NR + j, NR);
        continue;
      }
      float in[VW][VW], turned[VW][VW];
      memset(in, 0, sizeof in);
      for (int64_t r = 0; r < VW && j + r < lanes; r++) {
        load_run(b->data, b->dtype, offset + r * b->stride_j, nk, in[r]);
      }
      transpose(in[0], VW, turned[0], VW);
      for (int64_t n = 0; n < nk; n++) memcpy(out + (k + n) * NR + j, turned[n], sizeof turned[n]);
    }
  }
}

void mt_cpu_pack_vector(const struct cpu_vector *b, int64_t k0, int64_t kc, int64_t j0, int64_t jn,
                        float *out) {
  for (int64_t j = 0; j < jn; j += NR) {
    int64_t lanes = jn - j < NR ? jn - j : NR;
    if (b->stride_j == 1)
      pack_straight(b, k0, kc, j0 + j, lanes, out + j * kc);
    else
      pack_transposed(b, k0, kc, j0 + j, lanes, out + j * kc);
  }
}

void mt_cpu_pack_columns(const struct cpu_broadcast *a, int64_t i0, int64_t in, int64_t k0,
                         int64_t kc, float *out) {
  int64_t i = 0;
  if (a->dtype == MT_F32) {
    /* Two panels at a time: a cache line of the source is read once, two streams are written. */
    for (; i + 2 * MR <= in; i += 2 * MR) {
      const float *src = (const float *)a->data + k0 * a->stride_k + i0 + i;
      float *low = out + i * kc, *high = low + MR * kc;
      for (int64_t k = 0; k < kc; k++) {
        float both[2 * MR];
        memcpy(both, src + k * a->stride_k, sizeof both);
        memcpy(low + k * MR, both, sizeof both / 2);
        memcpy(high + k * MR, both + MR, sizeof both / 2);
      }
    }
  }
  for (; i < in; i += MR) {
    int64_t n = in - i < MR ? in - i : MR;
    for (int64_t k = 0; k < kc; k++) {
      float *dst = out + i * kc + k * MR;
      load_run(a->data, a->dtype, (k0 + k) * a->stride_k + i0 + i, n, dst);
      for (int64_t r = n; r < MR; r++) dst[r] = 0;
    }
  }
}

void mt_cpu_copy_rows(const struct cpu_broadcast *a, int64_t i0, int64_t in, int64_t k0, int64_t kc,
                      float *out) {
  int64_t i = 0;
  for (; i < in; i++) load_run(a->data, a->dtype, (i0 + i) * a->stride_i + k0, kc, out + i * kc);
  for (; i % MR; i++) memset(out + i * kc, 0, (size_t)kc * sizeof *out);
}
