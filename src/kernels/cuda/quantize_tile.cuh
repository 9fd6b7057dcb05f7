/* Tiles that become 8 bits, in a block of threads: 128 rows of one group by 128 columns, which are
 * whole blocks of either format in either direction. Warp w has rows 16 w to 16 w + 15 and lane l
 * columns 4 l to 4 l + 3: a row's blocks are found with shuffles as it is read, a column's as
 * maxima in shared memory; meanwhile each thread keeps its elements in a place of shared memory
 * that it alone reads. */
#ifndef MT_KERNELS_CUDA_QUANTIZE_TILE_CUH
#define MT_KERNELS_CUDA_QUANTIZE_TILE_CUH

#include "kernels/cuda/quantize.cuh"

enum { TILE = MT_Q_PAD, THREADS = 256, WARPS = THREADS / 32, WARP_ROWS = TILE / WARPS };

/* Blocks along a tile's columns, and words of a column turned, with one that is not used, so that
 * neither way of going through them meets a bank twice. */
template <bool FP8> constexpr int column_blocks = FP8 ? 1 : TILE / 32;
enum { TURNED_WORDS = TILE / 4 + 1 };

struct groups {
  const int32_t *offsets, *padded; /* NULL: one group of all rows */
  int count;
  int64_t rows;
};

/* Rows [row, row + rows) of the operand, in the column copy from `at` on; columns from col on. */
struct place {
  int64_t row, at, col;
  int rows, cols;
};

/* Whole warps must call it. */
__device__ static struct place place_of(const struct groups &g, int64_t band, int64_t col,
                                        int64_t cols) {
  struct place p = {band * TILE, band * TILE, col, 0, 0};
  int64_t end = g.rows;
  if (g.offsets) {
    /* The group whose rows these are, the last that begins before; one read a lane, not one after
     * the other. */
    int low = -1, total = g.padded[g.count];
#pragma unroll 1
    for (int i = 0; i < g.count; i += 32) {
      int group = i + (int)threadIdx.x % 32;
      low += __popc(__ballot_sync(0xffffffffu, group < g.count && g.padded[group] <= p.at));
    }
    if (p.at >= total) return p;
    p.row = g.offsets[low] + (p.at - g.padded[low]);
    end = g.offsets[low + 1];
  }
  p.rows = (int)(end - p.row < TILE ? end - p.row : TILE);
  p.cols = (int)(cols - col < TILE ? cols - col : TILE);
  return p;
}

/* Where four elements of the thread lie. */
template <class T> __device__ __forceinline__ T *own_four(T *tile, int row) {
  return tile + row * TILE + threadIdx.x % 32 * 4;
}

/* Four elements of one row by each lane, in the blocks of a row. */
template <bool FP8>
__device__ __forceinline__ void write_row(const struct mt_qtensor &q, const struct place &p,
                                          int64_t row, const float (&v)[4]) {
  int first = threadIdx.x % 32 * 4;
  unsigned byte = row_scale_byte<FP8>(v);
  int64_t all = q.dim[1], block = (p.col + first) / (FP8 ? 128 : 32);
  if (row_leader<FP8>() && first < p.cols) {
    put_scale<FP8>(q.row_scale, FP8 ? block * q.scale_ld + row : row * ((all + 31) / 32) + block,
                   byte);
  }
  float by = scale_inverse(byte);
  write_four(q.row + row * all + p.col + first,
             four_e4m3(v[0] * by, v[1] * by, v[2] * by, v[3] * by), p.cols - first);
}

/* The thread's columns' scales: bytes from the tile's maxima, written by the first warp of a block
 * of rows. */
template <bool FP8>
__device__ __forceinline__ void column_scales(const struct mt_qtensor &q, const struct place &p,
                                              const unsigned *tops, int rows, float (&by)[4]) {
  int warp = threadIdx.x / 32, first = threadIdx.x % 32 * 4;
  int block = FP8 ? 0 : warp / 2;
  bool leader = FP8 ? warp == 0 : warp % 2 == 0 && block * 32 < rows;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    unsigned byte = scale_byte<FP8>(tops[block * TILE + first + i]);
    by[i] = scale_inverse(byte);
    if (leader && first + i < p.cols) {
      put_scale<FP8>(q.col_scale, (p.at / (FP8 ? TILE : 32) + block) * q.dim[1] + p.col + first + i,
                     byte);
    }
  }
}

/* Rows row to row + 3 of the thread's columns, each column's as one word. The first `valid` rows of
 * the tile count, others are zeros whatever the scale. */
template <class T>
__device__ __forceinline__ void four_rows(T *tile, int row, int valid, const float (&by)[4],
                                          uint32_t (&word)[4]) {
  float v[4][4];
#pragma unroll
  for (int k = 0; k < 4; k++) load_floats<T, 4>(own_four(tile, row + k), v[k]);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    word[i] = four_e4m3(v[0][i] * by[i], v[1][i] * by[i], v[2][i] * by[i], v[3][i] * by[i]);
    if (row + 4 > valid) word[i] &= row >= valid ? 0u : 0xffffffffu >> 8 * (row + 4 - valid);
  }
}

/* The tile's columns in MX, which stay as they lie. A weight ends with its rows (rows < TILE). */
template <class T>
__device__ __forceinline__ void write_columns_mx(const struct mt_qtensor &q, const struct place &p,
                                                 T *tile, const unsigned *tops) {
  int first = threadIdx.x % 32 * 4, begin = threadIdx.x / 32 * WARP_ROWS;
  int rows = q.weight ? p.rows : (int)TILE;
  float by[4], v[4];
  column_scales<false>(q, p, tops, rows, by);
  uint8_t *to = q.col + (p.at + begin) * q.dim[1] + p.col + first;
#pragma unroll 4
  for (int r = begin; r < begin + WARP_ROWS; r++, to += q.dim[1]) {
    if (r >= rows || first >= p.cols) break;
    load_floats<T, 4>(own_four(tile, r), v);
    uint32_t e = four_e4m3(v[0] * by[0], v[1] * by[1], v[2] * by[2], v[3] * by[3]);
    write_four(to, r < p.rows ? e : 0, p.cols - first);
  }
}

/* A tile turned, through its own memory: the thread's words of four rows each, then columns from
 * `to` on, `ld` apart, by a warp each. All threads must call it; rows, cols: what is written. */
__device__ __forceinline__ void write_turned(uint32_t *tile, const uint32_t (&word)[4][4],
                                             uint8_t *to, int64_t ld, int rows, int cols) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads(); /* all have read theirs */
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int c = lane * 4 + i, r = warp * 4 + k;
      tile[c * TURNED_WORDS + (r ^ (c >> 5))] = word[k][i];
    }
  }
  __syncthreads();
  for (int c = warp; c < cols; c += WARPS)
    write_four(to + c * ld + lane * 4, tile[c * TURNED_WORDS + (lane ^ (c >> 5))], rows - lane * 4);
}

/* In FP8, 1 x 128 along the rows, transposed. */
template <class T>
__device__ __forceinline__ void write_columns_fp8(const struct mt_qtensor &q, const struct place &p,
                                                  T *tile, const unsigned *tops) {
  float by[4];
  uint32_t word[4][4];
  column_scales<true>(q, p, tops, TILE, by);
#pragma unroll
  for (int k = 0; k < 4; k++)
    four_rows<T>(tile, threadIdx.x / 32 * WARP_ROWS + 4 * k, p.rows, by, word[k]);
  write_turned((uint32_t *)tile, word, q.col + p.col * q.col_rows + p.at, q.col_rows, TILE, p.cols);
}

/* Where a source's tiles go: tile t is columns shift[t] further on in q[t]; absent copies are NULL.
 */
template <int COUNT> struct outputs {
  struct mt_qtensor q[COUNT];
  int64_t shift[COUNT];
};

template <class T, bool FP8, int TILES>
constexpr size_t tiles_bytes = TILES *(TILE *TILE * sizeof(T) +
                                       column_blocks<FP8> * TILE * sizeof(unsigned));

/* A weight's matrix g, in MX. */
__device__ static void take_matrix(struct mt_qtensor *q, int64_t g) {
  int64_t n = q->dim[1], k = q->dim[2];
  q->dim[0] = n, q->dim[1] = k;
  if (q->row) q->row += g * n * k, q->row_scale = (uint8_t *)q->row_scale + g * n * ((k + 31) / 32);
  if (q->col) q->col += g * n * k, q->col_scale = (uint8_t *)q->col_scale + g * ((n + 31) / 32) * k;
}

/* Reads tiles through the source (rows of zeros past the last), writes both copies of each. A
 * weight of rank 3 has rows of all matrices one below the other. */
template <class T, bool FP8, class Source>
__global__ void __launch_bounds__(THREADS, Source::TILES == 1 ? 3 : 2)
    quantize_tiles(Source source, struct groups g, int64_t width,
                   struct outputs<Source::TILES> out) {
  constexpr int TILES = Source::TILES, AT_ONCE = TILES == 1 ? 4 : 2, BLOCKS = column_blocks<FP8>;
  extern __shared__ __align__(16) unsigned char raw[];
  T *tiles = (T *)raw;
  unsigned *tops = (unsigned *)(raw + TILES * TILE * TILE * sizeof(T)), top[TILES][4] = {};
  struct place p = place_of(g, blockIdx.y, (int64_t)blockIdx.x * TILE, width);
  int lane = threadIdx.x % 32, begin = threadIdx.x / 32 * WARP_ROWS;
  int64_t above = blockIdx.z * g.rows;
  if (p.rows <= 0) return;
  if (!FP8 && out.q[0].rank == 3) take_matrix(&out.q[0], blockIdx.z);
  for (int i = threadIdx.x; i < TILES * BLOCKS * TILE; i += THREADS) tops[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int r = begin; r < begin + WARP_ROWS; r += AT_ONCE) {
    float v[AT_ONCE][TILES][4] = {};
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      if (r + k < p.rows) source.load(p, above + p.row + r + k, lane * 4, v[k]);
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const struct mt_qtensor &q = out.q[t];
        struct place at = p;
        at.col += out.shift[t];
        if (q.row && r + k < p.rows) write_row<FP8>(q, at, p.row + r + k, v[k][t]);
        if (!q.col) continue;
        store_floats<T, 4>(own_four(tiles + t * TILE * TILE, r + k), v[k][t]);
#pragma unroll
        for (int i = 0; i < 4; i++) top[t][i] = max(top[t][i], magnitude_bits(v[k][t][i]));
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    int block = FP8 ? 0 : begin / 32;
#pragma unroll
    for (int i = 0; out.q[t].col && i < 4; i++)
      atomicMax(&tops[(t * BLOCKS + block) * TILE + lane * 4 + i], top[t][i]);
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    if (!out.q[t].col) continue;
    struct place at = p;
    at.col += out.shift[t];
    if (FP8)
      write_columns_fp8<T>(out.q[t], at, tiles + t * TILE * TILE, tops + t * BLOCKS * TILE);
    else
      write_columns_mx<T>(out.q[t], at, tiles + t * TILE * TILE, tops + t * BLOCKS * TILE);
  }
}

/* A weight's matrix blockIdx.z, tile by tile, in FP8: one block a tile, and its transpose. w: rows
 * ld apart; read_four as a source has it. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    quantize_weight(const T *w, int64_t ld, int64_t n, int64_t k, bool is_wide,
                    struct mt_qtensor q) {
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ unsigned top_of_all;
  T *tile = (T *)raw;
  int lane = threadIdx.x % 32, begin = threadIdx.x / 32 * WARP_ROWS;
  int64_t g = blockIdx.z, tall = (n + TILE - 1) / TILE, broad = (k + TILE - 1) / TILE;
  int64_t row = (int64_t)blockIdx.y * TILE, col = (int64_t)blockIdx.x * TILE;
  int rows = (int)min((int64_t)TILE, n - row), cols = (int)min((int64_t)TILE, k - col);
  unsigned top = 0;
  if (threadIdx.x == 0) top_of_all = 0;
  w += (g * n + row) * ld + col + lane * 4;
#pragma unroll 1
  for (int r = begin; r < begin + WARP_ROWS; r += 4) {
    float v[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (r + i < rows && lane * 4 < cols)
        read_four<T>(w + (r + i) * ld, cols - lane * 4, is_wide, v[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      store_floats<T, 4>(own_four(tile, r + i), v[i]);
#pragma unroll
      for (int c = 0; c < 4; c++) top = max(top, magnitude_bits(v[i][c]));
    }
  }
  __syncthreads();
  atomicMax(&top_of_all, top);
  __syncthreads();
  unsigned byte = scale_byte<true>(top_of_all);
  float by = scale_inverse(byte), all[4] = {by, by, by, by};
  if (threadIdx.x == 0 && q.row)
    put_scale<true>(q.row_scale, (g * tall + blockIdx.y) * broad + blockIdx.x, byte);
  if (threadIdx.x == 0 && q.col)
    put_scale<true>(q.col_scale, (g * broad + blockIdx.x) * tall + blockIdx.y, byte);
  for (int r = begin; q.row && r < begin + WARP_ROWS && r < rows; r++) {
    float v[4];
    load_floats<T, 4>(own_four(tile, r), v);
    write_four(q.row + (g * n + row + r) * k + col + lane * 4,
               four_e4m3(v[0] * by, v[1] * by, v[2] * by, v[3] * by), cols - lane * 4);
  }
  if (!q.col) return;
  uint32_t word[4][4];
#pragma unroll
  for (int i = 0; i < 4; i++) four_rows<T>(tile, begin + 4 * i, rows, all, word[i]);
  write_turned((uint32_t *)tile, word, q.col + (g * k + col) * n + row, n, rows, cols);
}

#endif
