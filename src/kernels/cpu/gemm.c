#include "kernels/cpu/gemm.h"

#include <omp.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#include "kernels/cpu/cpu.h"

/* Register tile MR x (NV vectors): accumulators, NV loads and a broadcast fit the register file. */
#ifdef __AVX512F__
enum { VW = 16, MR = 8 };
#else
enum { VW = 8, MR = 4 };
#endif
enum { NV = 3, NR = NV * VW };
/* Block sizes: a packed block KC x JC (590 KB) lies in L2 beside the IC x JC result. */
enum { KC = 512, JC = 6 * NR, IC = 64 };

typedef float vec __attribute__((vector_size(VW * 4), aligned(4), may_alias));

static inline vec splat(float x) {
#ifdef __AVX512F__
  return (vec)_mm512_set1_ps(x);
#else
  return (vec){x, x, x, x, x, x, x, x};
#endif
}

_Static_assert(IC *JC + IC * KC <= CPU_PRODUCT_FLOATS, "block buffers fit the thread's scratch");

/* out[8 cols][8] (leading dimension out_ld) = in[8 rows][8] transposed. */
static inline void transpose8(const float *in, int64_t in_ld, float *out, int64_t out_ld) {
#ifdef __AVX__
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
#else
  for (int i = 0; i < 8; i++) {
    for (int j = 0; j < 8; j++) out[j * out_ld + i] = in[i * in_ld + j];
  }
#endif
}

static int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

size_t mt_cpu_packed_floats(int64_t j_count, int64_t k_count) {
  return (size_t)round_up(j_count, NR) * (size_t)k_count;
}

static inline float load(const void *data, enum mt_dtype dtype, int64_t offset) {
  return dtype == MT_F32 ? ((const float *)data)[offset]
                         : mt_bf16_to_f32(((const uint16_t *)data)[offset]);
}

static void load_run(const void *data, enum mt_dtype dtype, int64_t offset, int64_t n, float *out) {
  if (dtype == MT_F32) {
    memcpy(out, (const float *)data + offset, (size_t)n * sizeof *out);
  } else {
    const uint16_t *h = (const uint16_t *)data + offset;
    for (int64_t i = 0; i < n; i++) out[i] = mt_bf16_to_f32(h[i]);
  }
}

/* Packs rows [k0, k0+kc) of one panel of `lanes` <= NR columns: out[kc][NR], spare lanes zero. */
static void pack_panel(const struct cpu_vector *b, int64_t k0, int64_t kc, int64_t j0,
                       int64_t lanes, float *out) {
  if (b->stride_j == 1) {
    for (int64_t k = 0; k < kc; k++) {
      load_run(b->data, b->dtype, (k0 + k) * b->stride_k + j0, lanes, out + k * NR);
      for (int64_t j = lanes; j < NR; j++) out[k * NR + j] = 0;
    }
    return;
  }
  for (int64_t j = 0; j < NR; j += 8) {
    for (int64_t k = 0; k < kc; k += 8) {
      float in[8][8];
      bool whole = b->dtype == MT_F32 && j + 8 <= lanes && k + 8 <= kc;
      if (whole) {
        transpose8((const float *)b->data + (j0 + j) * b->stride_j + k0 + k, b->stride_j,
                   out + k * NR + j, NR);
        continue;
      }
      memset(in, 0, sizeof in);
      int64_t nk = kc - k < 8 ? kc - k : 8;
      for (int64_t r = 0; r < 8 && j + r < lanes; r++) {
        load_run(b->data, b->dtype, (j0 + j + r) * b->stride_j + k0 + k, nk, in[r]);
      }
      for (int64_t n = 0; n < nk; n++) {
        for (int64_t r = 0; r < 8; r++) out[(k + n) * NR + j + r] = in[r][n];
      }
    }
  }
}

/* c[MR][NR] (ld JC) (= when first, else +=) a * b over kc; element (i, k) of a at i*rs + k*cs. */
static inline __attribute__((always_inline)) void tile(const int nv, int64_t kc, const float *a,
                                                       int64_t rs, int64_t cs, const float *b,
                                                       float *c, bool first) {
  vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) acc[i][v] = splat(0);
  }
  for (int64_t k = 0; k < kc; k++) {
    vec x[NV];
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) x[v] = *(const vec *)(b + k * NR + v * VW);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      vec s = splat(a[i * rs + k * cs]);
#pragma GCC unroll 3
      for (int v = 0; v < nv; v++) acc[i][v] += s * x[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) {
      vec *p = (vec *)(c + i * JC + v * VW);
      if (!first) acc[i][v] += *p;
      *p = acc[i][v];
    }
  }
}

/* The two layouts of a, and panels of fewer vectors at the ragged end. */
static void tile_rows(int nv, int64_t kc, const float *a, int64_t rs, const float *b, float *c,
                      bool first) {
  if (nv == 3)
    tile(3, kc, a, rs, 1, b, c, first);
  else if (nv == 2)
    tile(2, kc, a, rs, 1, b, c, first);
  else
    tile(1, kc, a, rs, 1, b, c, first);
}

static void tile_panel(int nv, int64_t kc, const float *a, const float *b, float *c, bool first) {
  if (nv == 3)
    tile(3, kc, a, 1, MR, b, c, first);
  else if (nv == 2)
    tile(2, kc, a, 1, MR, b, c, first);
  else
    tile(1, kc, a, 1, MR, b, c, first);
}

/* Columns of a (contiguous along i): out[IC/MR panels][kc][MR], spare rows zero. */
static void pack_columns(const struct cpu_broadcast *a, int64_t i0, int64_t in, int64_t k0,
                         int64_t kc, float *out) {
  for (int64_t k = 0; k < kc; k++) {
    int64_t offset = (k0 + k) * a->stride_k + i0;
    for (int64_t i = 0; i < in; i += MR) {
      float *dst = out + i * kc + k * MR;
      int64_t n = in - i < MR ? in - i : MR;
      if (n == MR && a->dtype == MT_F32) {
        memcpy(dst, (const float *)a->data + offset + i, MR * sizeof *dst);
        continue;
      }
      for (int64_t r = 0; r < MR; r++) dst[r] = r < n ? load(a->data, a->dtype, offset + i + r) : 0;
    }
  }
}

/* Rows of a (contiguous along k) that cannot be read in place: out[in rounded up][kc]. */
static void copy_rows(const struct cpu_broadcast *a, int64_t i0, int64_t in, int64_t k0, int64_t kc,
                      float *out) {
  for (int64_t i = 0; i < round_up(in, MR); i++) {
    if (i < in)
      load_run(a->data, a->dtype, (i0 + i) * a->stride_i + k0, kc, out + i * kc);
    else
      memset(out + i * kc, 0, (size_t)kc * sizeof *out);
  }
}

static void store_transposed(const struct cpu_product *p, int64_t i0, int64_t in, int64_t j0,
                             int64_t jn, const float *tiles) {
  const struct cpu_result *c = &p->c;
  for (int64_t j = 0; j < jn; j += 8) {
    for (int64_t i = 0; i < in; i += 8) {
      float out[8][8];
      transpose8(tiles + i * JC + j, JC, out[0], 8);
      int64_t nj = jn - j < 8 ? jn - j : 8, ni = in - i < 8 ? in - i : 8;
      for (int64_t r = 0; r < nj; r++) {
        int64_t offset = (j0 + j + r) * c->stride_j + i0 + i;
        if (c->dtype == MT_F32) {
          float *dst = (float *)c->data + offset;
          if (c->accumulate) {
            for (int64_t n = 0; n < ni; n++) dst[n] += out[r][n];
          } else if (ni == 8) {
            memcpy(dst, out[r], sizeof out[r]);
          } else {
            for (int64_t n = 0; n < ni; n++) dst[n] = out[r][n];
          }
        } else {
          uint16_t *dst = (uint16_t *)c->data + offset;
          for (int64_t n = 0; n < ni; n++) {
            float x = out[r][n] + (c->accumulate ? mt_bf16_to_f32(dst[n]) : 0);
            dst[n] = mt_f32_to_bf16(x);
          }
        }
      }
    }
  }
}

static void store_natural(const struct cpu_product *p, int64_t i0, int64_t in, int64_t j0,
                          int64_t jn, const float *tiles) {
  const struct cpu_result *c = &p->c;
  for (int64_t i = 0; i < in; i++) {
    float *dst = (float *)c->data + (i0 + i) * c->stride_i + j0;
    const float *src = tiles + i * JC;
    if (c->accumulate) {
      for (int64_t j = 0; j < jn; j++) dst[j] += src[j];
    } else {
      memcpy(dst, src, (size_t)jn * sizeof *dst);
    }
  }
}

/* Rows [i0, i0+in) x columns [j0, j0+jn) of one product; j0 is a multiple of NR. */
static void run_block(const struct cpu_product *p, const float *packed, int64_t i0, int64_t in,
                      int64_t j0, int64_t jn, float *scratch) {
  float *tiles = scratch, *buffer = scratch + IC * JC;
  int64_t width = round_up(p->j_count, NR);
  bool columns = p->a.stride_i == 1 && p->a.stride_k != 1;
  bool in_place = !columns && p->a.dtype == MT_F32 && in % MR == 0;
  for (int64_t k0 = 0; k0 < p->k_count; k0 += KC) {
    int64_t kc = p->k_count - k0 < KC ? p->k_count - k0 : KC;
    if (columns)
      pack_columns(&p->a, i0, in, k0, kc, buffer);
    else if (!in_place)
      copy_rows(&p->a, i0, in, k0, kc, buffer);
    for (int64_t i = 0; i < in; i += MR) {
      for (int64_t j = 0; j < jn; j += NR) {
        const float *b = packed + k0 * width + (j0 + j) * kc;
        float *c = tiles + i * JC + j;
        int nv = (int)((jn - j < NR ? jn - j : NR) + VW - 1) / VW;
        if (columns) {
          tile_panel(nv, kc, buffer + i * kc, b, c, k0 == 0);
        } else if (in_place) {
          const float *a = (const float *)p->a.data + (i0 + i) * p->a.stride_i + k0;
          tile_rows(nv, kc, a, p->a.stride_i, b, c, k0 == 0);
        } else {
          tile_rows(nv, kc, buffer + i * kc, kc, b, c, k0 == 0);
        }
      }
    }
  }
  if (p->k_count == 0) memset(tiles, 0, sizeof(float) * IC * JC);
  if (p->c.stride_i == 1)
    store_transposed(p, i0, in, j0, jn, tiles);
  else
    store_natural(p, i0, in, j0, jn, tiles);
}

/* Panels x k-blocks of a product, as one list of packing tasks. */
static int64_t pack_tasks(const struct cpu_product *p) {
  return round_up(p->j_count, NR) / NR * ((p->k_count + KC - 1) / KC);
}

static void pack_task(const struct cpu_product *p, int64_t task, float *packed) {
  int64_t panels = round_up(p->j_count, NR) / NR;
  int64_t k0 = task / panels * KC, j0 = task % panels * NR;
  int64_t kc = p->k_count - k0 < KC ? p->k_count - k0 : KC;
  int64_t lanes = p->j_count - j0 < NR ? p->j_count - j0 : NR;
  pack_panel(&p->b, k0, kc, j0, lanes, packed + k0 * panels * NR + j0 * kc);
}

void mt_cpu_pack_here(const struct cpu_product *p, float *packed) {
  for (int64_t n = 0; n < pack_tasks(p); n++) pack_task(p, n, packed);
}

static int64_t block_tasks(const struct cpu_product *p) {
  return ((p->i_count + IC - 1) / IC) * ((p->j_count + JC - 1) / JC);
}

static void block_task(const struct cpu_product *p, int64_t task, const float *packed,
                       float *scratch) {
  /* i varies fastest: neighbouring tasks share the packed columns. */
  int64_t blocks = (p->i_count + IC - 1) / IC;
  int64_t i0 = task % blocks * IC, j0 = task / blocks * JC;
  int64_t in = p->i_count - i0 < IC ? p->i_count - i0 : IC;
  int64_t jn = p->j_count - j0 < JC ? p->j_count - j0 : JC;
  run_block(p, packed, i0, in, j0, jn, scratch);
}

void mt_cpu_product_here(const struct cpu_product *p, const float *packed, float *scratch) {
  for (int64_t n = 0; n < block_tasks(p); n++) block_task(p, n, packed, scratch);
}

void mt_cpu_products(const struct mt_backend *be, struct cpu_product *products, int count,
                     float *packed) {
  int64_t packs = 0, blocks = 0;
  for (int g = 0; g < count; g++) {
    packs += pack_tasks(&products[g]);
    blocks += block_tasks(&products[g]);
  }
  if (blocks == 0) return;
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(dynamic, 4)
    for (int64_t n = 0; n < packs; n++) {
      float *base = packed;
      int64_t task = n;
      int g = 0;
      for (; task >= pack_tasks(&products[g]); g++) {
        task -= pack_tasks(&products[g]);
        base += mt_cpu_packed_floats(products[g].j_count, products[g].k_count);
      }
      pack_task(&products[g], task, base);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < blocks; n++) {
      const float *base = packed;
      int64_t task = n;
      int g = 0;
      for (; task >= block_tasks(&products[g]); g++) {
        task -= block_tasks(&products[g]);
        base += mt_cpu_packed_floats(products[g].j_count, products[g].k_count);
      }
      block_task(&products[g], task, base, scratch);
    }
  }
}
