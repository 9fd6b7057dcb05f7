/* Grouped products on any GPU from sm_80 on: bf16 through mma.sync, float32 through FFMA. Blocks of
 * 256 threads make one 128 x 128 tile of an output each; the grid has as many as rows_most allows,
 * those that find no work leave. */
#include "kernels/cuda/grouped.cuh"

enum { BM = 128, BN = 128, THREADS = 256, PANEL = 16 };

/* wide_*: rows of that operand can be read as aligned 16-byte vectors; pairs_c: two neighbours of
 * an even column can be written at once. (Matrices follow one another in b and c: a whole number of
 * vectors a row keeps all of them aligned.) */
struct job {
  const void *a, *b;
  void *c;
  const int32_t *offsets;
  int groups;
  int64_t rows, m, n, k, lda, ldb, ldc;
  bool accumulate, wide_a, wide_b, pairs_c;
};

/* One block's work. Operands and output begin at the tile's first element; *_left: what there is
 * of rows, columns and depth from there on. */
struct work {
  int64_t a, b, c; /* offsets in elements */
  int64_t m_left, n_left, depth;
};

/* FWD and DGRAD: warp 0 looks for the tile's group, 32 groups a step; the others wait for it. */
__device__ static bool find_rows(const struct job &j, struct work *w, bool b_rows_are_k) {
  __shared__ int found[4]; /* group, index among its tiles, first row, end */
  int nt = (int)((j.n + BN - 1) / BN), lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    int before = 0, id = (int)blockIdx.x;
    if (lane == 0) found[0] = -1;
    __syncwarp();
    for (int g0 = 0; g0 < j.groups; g0 += 32) {
      int g = g0 + lane, begin = 0, end = 0;
      if (g < j.groups) {
        begin = group_begin(j.offsets, j.rows, g);
        end = group_begin(j.offsets, j.rows, g + 1);
      }
      int tiles = (end - begin + BM - 1) / BM * nt, upto = tiles;
#pragma unroll
      for (int i = 1; i < 32; i *= 2) {
        int other = __shfl_up_sync(0xffffffffu, upto, i);
        if (lane >= i) upto += other;
      }
      upto += before;
      if (id < upto && id >= upto - tiles) {
        found[0] = g, found[1] = id - (upto - tiles), found[2] = begin, found[3] = end;
      }
      before = __shfl_sync(0xffffffffu, upto, 31);
      if (before > id) break;
    }
  }
  __syncthreads();
  if (found[0] < 0) return false;
  struct tile_at t = tile_in_panels(found[1], (found[3] - found[2] + BM - 1) / BM, nt, PANEL);
  int64_t row = found[2] + (int64_t)t.m * BM, column = (int64_t)t.n * BN;
  w->a = row * j.lda;
  w->b = (int64_t)found[0] * (b_rows_are_k ? j.k : j.n) * j.ldb +
         (b_rows_are_k ? column : column * j.ldb);
  w->c = row * j.ldc + column;
  w->m_left = found[3] - row, w->n_left = j.n - column, w->depth = j.k;
  return true;
}

/* WGRAD: every group has the same tiles, its rows are the depth. */
__device__ static bool find_matrix(const struct job &j, struct work *w) {
  int mt = (int)((j.m + BM - 1) / BM), nt = (int)((j.n + BN - 1) / BN);
  int g = (int)blockIdx.x / (mt * nt);
  if (g >= j.groups) return false;
  struct tile_at t = tile_in_panels((int)blockIdx.x % (mt * nt), mt, nt, PANEL);
  int64_t begin = group_begin(j.offsets, j.rows, g), end = group_begin(j.offsets, j.rows, g + 1);
  int64_t row = (int64_t)t.m * BM, column = (int64_t)t.n * BN;
  w->a = begin * j.lda + row;
  w->b = begin * j.ldb + column;
  w->c = ((int64_t)g * j.m + row) * j.ldc + column;
  w->m_left = j.m - row, w->n_left = j.n - column, w->depth = end - begin;
  return true;
}

template <bool A_COLUMNS, bool B_ROWS> __device__ bool find(const struct job &j, struct work *w) {
  if (A_COLUMNS) return find_matrix(j, w);
  return find_rows(j, w, B_ROWS);
}

/* bf16. An operand's tile is kept as it is stored: [128][32] where its depth is contiguous,
 * [32][128] where it is not (ldmatrix transposes those). */
enum { BK = 32, STAGES = 4, TILE_BYTES = 128 * BK * 2, CHUNK = 8 };

/* Byte offset of 16-byte chunk c of row r; rows that ldmatrix reads together lie in different
 * banks. */
template <bool ROWS_ARE_K> __device__ __forceinline__ uint32_t place(int r, int c) {
  if (ROWS_ARE_K) return (uint32_t)(r * 256 + ((c ^ (r & 7)) << 4));
  return (uint32_t)(r * 64 + ((c ^ ((r >> 1) & 3)) << 4));
}

__device__ __forceinline__ void copy_async(uint32_t dst, const void *src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
               : "memory");
}

/* The tile at depth k0 into shared memory; what lies outside becomes 0. */
template <bool ROWS_ARE_K>
__device__ __forceinline__ void load_tile(uint32_t dst, const bf16 *p, int64_t ld, int64_t mn_left,
                                          int64_t depth, int64_t k0, bool wide_rows) {
  constexpr int WIDTH = ROWS_ARE_K ? 128 / CHUNK : BK / CHUNK;
  int64_t rows_left = ROWS_ARE_K ? depth - k0 : mn_left;
  int64_t cols_left = ROWS_ARE_K ? mn_left : depth - k0;
  const bf16 *origin = p + (ROWS_ARE_K ? k0 * ld : k0);
#pragma unroll
  for (int i = 0; i < 128 * BK / CHUNK / THREADS; i++) {
    int chunk = (int)threadIdx.x + i * THREADS, r = chunk / WIDTH, c = chunk % WIDTH;
    int64_t left = r < rows_left ? cols_left - c * CHUNK : 0;
    int count = left < 0 ? 0 : left > CHUNK ? CHUNK : (int)left;
    const bf16 *src = origin + r * ld + c * CHUNK;
    uint32_t to = dst + place<ROWS_ARE_K>(r, c);
    if (wide_rows) {
      copy_async(to, count > 0 ? src : p, 2 * count);
    } else {
      uint32_t v[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < CHUNK; e++) {
        uint32_t bits = e < count ? (uint32_t)__bfloat16_as_ushort(src[e]) : 0;
        v[e / 2] |= bits << (16 * (e % 2));
      }
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
                   "r"(v[2]), "r"(v[3])
                   : "memory");
    }
  }
}

template <bool TRANSPOSE>
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t from) {
  if (TRANSPOSE) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
  }
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* One stage's products: a warp makes 64 x 32 of the tile, from (m0, n0) on. The four 8x8 matrices
 * that a lane's address selects from follow PTX's fragment layout of m16n8k16: for a they run along
 * m first, for b along k first. */
template <bool A_COLUMNS, bool B_ROWS>
__device__ __forceinline__ void multiply_stage(float (&acc)[4][4][4], uint32_t as, uint32_t bs,
                                               int m0, int n0) {
  int lane = threadIdx.x % 32, low = lane & 7, second = (lane >> 3) & 1, third = lane >> 4;
#pragma unroll
  for (int k = 0; k < BK; k += 16) {
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int m = m0 + 16 * i;
      uint32_t at = A_COLUMNS ? place<true>(k + low + 8 * third, m / 8 + second)
                              : place<false>(m + low + 8 * second, k / 8 + third);
      load_matrices<A_COLUMNS>(a[i], as + at);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int n = n0 + 16 * i;
      uint32_t at = B_ROWS ? place<true>(k + low + 8 * second, n / 8 + third)
                           : place<false>(n + low + 8 * third, k / 8 + second);
      load_matrices<B_ROWS>(b[i], bs + at);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int l = 0; l < 4; l++) {
        multiply(acc[i][l], a[i], b[l / 2][2 * (l % 2)], b[l / 2][2 * (l % 2) + 1]);
      }
    }
  }
}

template <class C> __device__ __forceinline__ void put(C *c, float x, bool accumulate) {
  *c = from_float<C>(accumulate ? x + to_float(*c) : x);
}

template <bool A_COLUMNS, bool B_ROWS, class C>
__global__ __launch_bounds__(THREADS, 2) void grouped_bf16(struct job j) {
  extern __shared__ __align__(128) unsigned char tiles[];
  struct work w;
  if (!find<A_COLUMNS, B_ROWS>(j, &w)) return;
  if (w.depth == 0 && j.accumulate) return;
  const bf16 *a = (const bf16 *)j.a + w.a, *b = (const bf16 *)j.b + w.b;
  uint32_t base = (uint32_t)__cvta_generic_to_shared(tiles);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int m0 = warp % 2 * 64, n0 = warp / 2 * 32;
  int steps = (int)((w.depth + BK - 1) / BK);
  float acc[4][4][4] = {};

  auto load = [&](int step) {
    if (step < steps) {
      uint32_t at = base + (uint32_t)(step % STAGES) * 2 * TILE_BYTES;
      load_tile<A_COLUMNS>(at, a, j.lda, w.m_left, w.depth, (int64_t)step * BK, j.wide_a);
      load_tile<B_ROWS>(at + TILE_BYTES, b, j.ldb, w.n_left, w.depth, (int64_t)step * BK, j.wide_b);
    }
    asm volatile("cp.async.commit_group;" ::: "memory"); /* also empty ones: the wait counts */
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);
  for (int s = 0; s < steps; s++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();
    load(s + STAGES - 1);
    uint32_t at = base + (uint32_t)(s % STAGES) * 2 * TILE_BYTES;
    multiply_stage<A_COLUMNS, B_ROWS>(acc, at, at + TILE_BYTES, m0, n0);
  }

  C *c = (C *)j.c + w.c;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int r = m0 + 16 * i + lane / 4 + 8 * half;
      if (r >= w.m_left) continue;
#pragma unroll
      for (int l = 0; l < 4; l++) {
        int col = n0 + 8 * l + 2 * (lane % 4);
        C *to = c + r * j.ldc + col;
        float x = acc[i][l][2 * half], y = acc[i][l][2 * half + 1];
        if (col + 1 < w.n_left && j.pairs_c) {
          float v[2] = {x, y}, old[2] = {0, 0};
          if (j.accumulate) load_floats<C, 2>(to, old);
          v[0] += old[0], v[1] += old[1];
          store_floats<C, 2>(to, v);
        } else {
          if (col < w.n_left) put(to, x, j.accumulate);
          if (col + 1 < w.n_left) put(to + 1, y, j.accumulate);
        }
      }
    }
  }
}

/* float32. Both tiles as [FK][128], so that a thread reads what it needs as vectors; a thread makes
 * 8 x 8 outputs: rows and columns 4 i .. 4 i + 3 and 64 more. */
enum { FK = 16, PITCH = 128 + 4, FCHUNKS = 128 * FK / 4 / THREADS };

struct four {
  float x[4];
};

template <bool ROWS_ARE_K>
__device__ __forceinline__ struct four fetch(const float *p, int64_t ld, int64_t mn_left,
                                             int64_t depth, int64_t k0, bool wide_rows, int chunk) {
  constexpr int WIDTH = ROWS_ARE_K ? 128 / 4 : FK / 4;
  int r = chunk / WIDTH, c = chunk % WIDTH * 4;
  int64_t rows_left = ROWS_ARE_K ? depth - k0 : mn_left;
  int64_t cols_left = ROWS_ARE_K ? mn_left : depth - k0;
  const float *src = p + (ROWS_ARE_K ? (k0 + r) * ld + c : r * ld + k0 + c);
  struct four v = {{0, 0, 0, 0}};
  if (r >= rows_left) return v;
  if (wide_rows && c + 4 <= cols_left) {
    float4 f = *reinterpret_cast<const float4 *>(src);
    v = {{f.x, f.y, f.z, f.w}};
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (c + i < cols_left) v.x[i] = src[i];
    }
  }
  return v;
}

template <bool ROWS_ARE_K>
__device__ __forceinline__ void keep(float *tile, const struct four &v, int chunk) {
  constexpr int WIDTH = ROWS_ARE_K ? 128 / 4 : FK / 4;
  int r = chunk / WIDTH, c = chunk % WIDTH * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (ROWS_ARE_K)
      tile[r * PITCH + c + i] = v.x[i];
    else
      tile[(c + i) * PITCH + r] = v.x[i];
  }
}

__device__ __forceinline__ void read_eight(float (&out)[8], const float *row, int i) {
  float4 low = *reinterpret_cast<const float4 *>(row + 4 * i);
  float4 high = *reinterpret_cast<const float4 *>(row + 64 + 4 * i);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

template <bool A_COLUMNS, bool B_ROWS, class C>
__global__ __launch_bounds__(THREADS, 1) void grouped_f32(struct job j) {
  __shared__ __align__(16) float as[2][FK * PITCH], bs[2][FK * PITCH];
  struct work w;
  if (!find<A_COLUMNS, B_ROWS>(j, &w)) return;
  if (w.depth == 0 && j.accumulate) return;
  const float *a = (const float *)j.a + w.a, *b = (const float *)j.b + w.b;
  int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  int steps = (int)((w.depth + FK - 1) / FK);
  float acc[8][8] = {};
  struct four va[FCHUNKS], vb[FCHUNKS];

  auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < FCHUNKS; i++) {
      int chunk = (int)threadIdx.x + i * THREADS;
      int64_t k0 = (int64_t)step * FK;
      va[i] = fetch<A_COLUMNS>(a, j.lda, w.m_left, w.depth, k0, j.wide_a, chunk);
      vb[i] = fetch<B_ROWS>(b, j.ldb, w.n_left, w.depth, k0, j.wide_b, chunk);
    }
  };
  load(0);
  for (int s = 0; s < steps; s++) {
#pragma unroll
    for (int i = 0; i < FCHUNKS; i++) {
      keep<A_COLUMNS>(as[s % 2], va[i], (int)threadIdx.x + i * THREADS);
      keep<B_ROWS>(bs[s % 2], vb[i], (int)threadIdx.x + i * THREADS);
    }
    __syncthreads();
    if (s + 1 < steps) load(s + 1);
#pragma unroll
    for (int k = 0; k < FK; k++) {
      float x[8], y[8];
      read_eight(x, as[s % 2] + k * PITCH, ty);
      read_eight(y, bs[s % 2] + k * PITCH, tx);
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int l = 0; l < 8; l++) acc[i][l] = fmaf(x[i], y[l], acc[i][l]);
      }
    }
  }

  C *c = (C *)j.c + w.c;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int r = 4 * ty + i % 4 + 64 * (i / 4);
    if (r >= w.m_left) continue;
#pragma unroll
    for (int l = 0; l < 8; l++) {
      int col = 4 * tx + l % 4 + 64 * (l / 4);
      if (col < w.n_left) put(c + r * j.ldc + col, acc[i][l], j.accumulate);
    }
  }
}

template <bool A_COLUMNS, bool B_ROWS, class C>
static mt_err launch(cudaStream_t stream, enum mt_dtype ab, const struct job *j, unsigned blocks) {
  if (ab == MT_F32) {
    grouped_f32<A_COLUMNS, B_ROWS, C><<<blocks, THREADS, 0, stream>>>(*j);
  } else {
    auto kernel = grouped_bf16<A_COLUMNS, B_ROWS, C>;
    int bytes = STAGES * 2 * TILE_BYTES;
    MT_TRY(mt_cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "grouped products"));
    kernel<<<blocks, THREADS, (size_t)bytes, stream>>>(*j);
  }
  return mt_cuda_launched("grouped products");
}

static bool reads_wide(const void *p, int64_t ld, enum mt_dtype dtype) {
  return aligned_to(p, 16) && ld * (int64_t)mt_dtype_bytes(dtype) % 16 == 0;
}

extern "C" mt_err mt_cuda_grouped_portable(struct mt_backend *be, const struct mt_cuda_grouped *p) {
  bool wgrad = p->kind == GROUPED_WGRAD;
  int64_t nt = (p->n + BN - 1) / BN;
  int64_t mt = wgrad ? (p->m + BM - 1) / BM * p->groups : p->rows_most / BM + p->groups;
  if (nt == 0 || mt == 0 || p->groups == 0 || (!wgrad && p->rows_most == 0)) return MT_OK;
  if (mt * nt > INT32_MAX || p->rows_most > INT32_MAX) {
    return mt_fail(MT_EUNSUPPORTED, "grouped products: %lld tiles", (long long)(mt * nt));
  }
  struct job j = {.a = p->a,
                  .b = p->b,
                  .c = p->c,
                  .offsets = p->offsets,
                  .groups = p->groups,
                  .rows = p->rows_most,
                  .m = p->m,
                  .n = p->n,
                  .k = p->k,
                  .lda = p->lda,
                  .ldb = p->ldb,
                  .ldc = p->ldc,
                  .accumulate = p->accumulate != 0,
                  .wide_a = reads_wide(p->a, p->lda, p->ab),
                  .wide_b = reads_wide(p->b, p->ldb, p->ab),
                  .pairs_c = aligned_to(p->c, 2 * mt_dtype_bytes(p->c_dtype)) && p->ldc % 2 == 0};
  cudaStream_t stream = mt_cuda_of(be)->stream;
  unsigned blocks = (unsigned)(mt * nt);
#define LAUNCH(a_columns, b_rows)                                                                  \
  (p->c_dtype == MT_F32 ? launch<a_columns, b_rows, float>(stream, p->ab, &j, blocks)              \
                        : launch<a_columns, b_rows, bf16>(stream, p->ab, &j, blocks))
  switch (p->kind) {
  case GROUPED_FWD:
    return LAUNCH(false, false);
  case GROUPED_DGRAD:
    return LAUNCH(false, true);
  default:
    return LAUNCH(true, true);
  }
#undef LAUNCH
}
