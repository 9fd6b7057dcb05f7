/* Tiles of bf16 that become FP8, where widths (of weights heights too) are multiples of 128: the
 * bytes of quantize_tile.cuh, with elements two to a register. Half warp u has rows 8 u to 8 u + 7
 * of the tile and its lane l columns 8 l to 8 l + 7. Each thread has all its elements copied to a
 * place of shared memory that it alone reads (everything is on its way before the first is used,
 * and takes no registers), makes the tiles' elements of them in the same place, and reads them
 * again once the scales are known. */
#ifndef MT_KERNELS_CUDA_QUANTIZE_PACKED_CUH
#define MT_KERNELS_CUDA_QUANTIZE_PACKED_CUH

#include "kernels/cuda/quantize_tile.cuh"

enum {
  OWN_ROWS = 8,              /* and columns: 16 bytes of a row */
  OWN_WORDS = OWN_ROWS / 2,  /* of two elements */
  UNITS = TILE / OWN_ROWS,   /* half warps; lanes of one; words of 8 bytes of a column */
  TILE_SLOTS = TILE * UNITS, /* of 16 bytes */
  TILE_WORDS = TILE / 2,     /* of two columns */
  TOPS_SLOTS = UNITS * TILE_WORDS / 4,
  WEIGHT_BLOCKS = 5 /* with a weight's tile each: Hopper has the registers */
};

/* Shared memory: the inputs; tops of columns by half warp; what columns are multiplied with. Not
 * more than so many blocks fit a multiprocessor of Hopper. */
template <class Source>
constexpr size_t packed_bytes = 16 * (Source::INPUTS * TILE_SLOTS +
                                      Source::TILES * (TOPS_SLOTS + TILE_WORDS / 4));
template <class Source>
constexpr int packed_blocks = Source::INPUTS == 1   ? 4
                              : Source::INPUTS == 2 ? 3
                                                    : 2;

/* 16 bytes, or zeros where bytes = 0. */
__device__ __forceinline__ void copy_slot(uint4 *to, const char *from, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
      "l"(from), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void copies_end() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/* All but the last LEFT groups of copies have come. */
template <int LEFT> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void read_slot(const uint4 *slot, uint32_t (&x)[OWN_WORDS]) {
  uint4 v = *slot;
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ __forceinline__ float low_float(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_float(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  uint32_t pair;
  memcpy(&pair, &v, sizeof pair);
  return pair;
}
/* Two products with powers of two. Either they are exact or below 2^-126 and thus zeros of e4m3,
 * as float32 has them too. */
__device__ __forceinline__ uint32_t scaled(uint32_t pair, uint32_t by) {
  __nv_bfloat162 a, b;
  memcpy(&a, &pair, sizeof a), memcpy(&b, &by, sizeof b);
  a = __hmul2(a, b);
  memcpy(&pair, &a, sizeof pair);
  return pair;
}
/* As integers, NaNs are the largest (magnitude_bits). */
__device__ __forceinline__ uint32_t magnitudes(uint32_t pair) {
  return pair & 0x7fff7fffu;
}
/* Of the lower or higher elements of two pairs, one pair. */
__device__ __forceinline__ uint32_t lower_of(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t higher_of(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}
/* The scale's inverse as bfloat16, which it is. */
__device__ __forceinline__ uint32_t inverse_bits(unsigned byte) {
  return __float_as_uint(scale_inverse(byte)) >> 16;
}

/* One of 16 lanes' seats. */
struct seat {
  unsigned lane, unit;
  int row; /* the first of its eight */
};
__device__ __forceinline__ struct seat own_seat() {
  unsigned unit = threadIdx.x / UNITS;
  return {threadIdx.x % UNITS, unit, (int)unit * OWN_ROWS};
}
/* What the lane that has the half warp's row r in hand has (lane r of 16 has row 8 half + r % 8 of
 * the warp's 16). */
template <class V> __device__ __forceinline__ V of_row(V mine, int r) {
  return __shfl_sync(0xffffffffu, mine, (threadIdx.x / 16 % 2) * OWN_ROWS + r);
}

/* Has all inputs' elements copied, two rows a group. */
template <class Source>
__device__ __forceinline__ void fetch(const Source &source, const struct place &p,
                                      const struct seat &s, uint4 *own) {
  int warp_row = (int)(threadIdx.x / 32 * 16 + s.lane);
  unsigned from = warp_row < p.rows ? (unsigned)source.from(p.row + warp_row) : 0u;
  const char *base[Source::INPUTS];
#pragma unroll
  for (int i = 0; i < Source::INPUTS; i++)
    base[i] = (const char *)(source.input(i) + p.col + s.lane * OWN_ROWS);
#pragma unroll
  for (int r = 0; r < OWN_ROWS; r++) {
    uint64_t row = of_row(from, r); /* times 32 bits: one instruction an address */
    int bytes = s.row + r < p.rows ? 16 : 0;
#pragma unroll
    for (int i = 0; i < Source::INPUTS; i++)
      copy_slot(own + i * TILE_SLOTS + r * UNITS, base[i] + row * source.stride(i), bytes);
    if (r % 2) copies_end();
  }
}

/* Largest magnitudes: rows 2 i and 2 i + 1 of the lane's own columns in row[i], of its columns. */
struct own_tops {
  uint32_t row[OWN_ROWS / 2], col[OWN_WORDS];
};

/* Makes two rows of each tile of what has come, in place. left: of the half warp's from its first
 * on, how many are there. */
template <class Source>
__device__ __forceinline__ void make_pair(const Source &source, float weight, int left, uint4 *own,
                                          int pair, float *dots_to,
                                          struct own_tops (&tops)[Source::TILES]) {
  constexpr int TILES = Source::TILES;
  float dots[2][2] = {};
  uint32_t all[TILES][2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    uint32_t x[Source::INPUTS][OWN_WORDS], y[TILES][OWN_WORDS];
    uint4 *slot = own + (2 * pair + k) * UNITS;
#pragma unroll
    for (int i = 0; i < Source::INPUTS; i++) read_slot(slot + i * TILE_SLOTS, x[i]);
    source.make(x, of_row(weight, 2 * pair + k), y, dots[k]);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      if (Source::INPUTS > 1) slot[t * TILE_SLOTS] = make_uint4(y[t][0], y[t][1], y[t][2], y[t][3]);
      all[t][k] = 0;
#pragma unroll
      for (int i = 0; i < OWN_WORDS; i++) {
        uint32_t m = magnitudes(y[t][i]);
        tops[t].col[i] = __vmaxu2(tops[t].col[i], m);
        all[t][k] = __vmaxu2(all[t][k], m);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; t++)
    tops[t].row[pair] = __vmaxu2(lower_of(all[t][0], all[t][1]), higher_of(all[t][0], all[t][1]));
  source.put_dots(dots_to ? dots_to + 2 * pair : NULL, left - 2 * pair, dots);
}

/* Over the half warp: of each four lanes, the l-th get rows 2 l and 2 l + 1. Exchanging halves of
 * what there is takes 5 shuffles, and each row's scale is then computed in two lanes, not in 16. */
__device__ __forceinline__ uint32_t pair_tops(const uint32_t (&row)[OWN_ROWS / 2]) {
  bool high = threadIdx.x & 8, odd = threadIdx.x & 4;
  uint32_t a = high ? row[2] : row[0], b = high ? row[3] : row[1];
  a = __vmaxu2(a, __shfl_xor_sync(0xffffffffu, high ? row[0] : row[2], 8));
  b = __vmaxu2(b, __shfl_xor_sync(0xffffffffu, high ? row[1] : row[3], 8));
  uint32_t top = __vmaxu2(odd ? b : a, __shfl_xor_sync(0xffffffffu, odd ? a : b, 4));
  top = __vmaxu2(top, __shfl_xor_sync(0xffffffffu, top, 2));
  return __vmaxu2(top, __shfl_xor_sync(0xffffffffu, top, 1));
}

/* Likewise sums of the half warp's two rows, dots[row][half of the lane's columns]: of row l in
 * lane 4 l. In warp_sum's order, had each lane four columns. */
__device__ __forceinline__ float pair_dots(const float (&dots)[2][2]) {
  bool high = threadIdx.x & 8, odd = threadIdx.x & 4;
  float a = high ? dots[0][1] : dots[0][0], b = high ? dots[1][1] : dots[1][0];
  a += __shfl_xor_sync(0xffffffffu, high ? dots[0][0] : dots[0][1], 8);
  b += __shfl_xor_sync(0xffffffffu, high ? dots[1][0] : dots[1][1], 8);
  float sum = odd ? b : a;
  sum += __shfl_xor_sync(0xffffffffu, odd ? a : b, 4);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 8);
}

/* The tile's rows: their scales, then their elements. */
__device__ __forceinline__ void write_rows_packed(const struct mt_qtensor &q, const struct place &p,
                                                  const struct seat &s, const uint4 *own,
                                                  const uint32_t (&tops)[OWN_ROWS / 2]) {
  int left = p.rows - s.row, r = s.lane / 4 * 2 + s.lane % 2; /* the lane's row */
  uint32_t top = pair_tops(tops);
  unsigned byte = scale_byte<true>(s.lane % 2 ? top & 0xffff0000u : top << 16);
  if (s.lane % 4 < 2 && r < left)
    put_scale<true>(q.row_scale, p.col / TILE * q.scale_ld + p.row + s.row + r, byte);
  uint32_t inverse = inverse_bits(byte) * 0x10001u;
  int64_t ld = q.dim[1];
  uint8_t *to = q.row + (p.row + s.row) * ld + p.col + s.lane * OWN_ROWS;
#pragma unroll
  for (int k = 0; k < OWN_ROWS; k++, to += ld) {
    uint32_t by = __shfl_sync(0xffffffffu, inverse, threadIdx.x / 16 % 2 * 16 + k / 2 * 4 + k % 2);
    uint32_t x[OWN_WORDS];
    read_slot(own + k * UNITS, x);
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) x[i] = scaled(x[i], by);
    uint2 bytes =
        make_uint2(four_e4m3(low_float(x[0]), high_float(x[0]), low_float(x[1]), high_float(x[1])),
                   four_e4m3(low_float(x[2]), high_float(x[2]), low_float(x[3]), high_float(x[3])));
    if (k < left) *(uint2 *)to = bytes;
  }
}

/* Two columns of the tile by one thread: their scales, and by[] for all. */
__device__ __forceinline__ void put_column_scales(const struct mt_qtensor &q, const struct place &p,
                                                  int word, const uint32_t *tops, uint32_t *by) {
  uint32_t top = 0;
#pragma unroll
  for (int u = 0; u < UNITS; u++) top = __vmaxu2(top, tops[u * TILE_WORDS + word]);
  unsigned low = scale_byte<true>(top << 16), high = scale_byte<true>(top & 0xffff0000u);
  by[word] = inverse_bits(low) | inverse_bits(high) << 16;
  float *to = (float *)q.col_scale + p.at / TILE * q.dim[1] + p.col + 2 * word;
  *(float2 *)to = make_float2(scale_value(low), scale_value(high));
}

/* A tile's columns: the thread's eight rows of a column are 8 bytes, at a place of the column that
 * differs from lane to lane, so that neither way of going through them meets a bank twice. Columns
 * from `to` on, ld apart. All threads must call it. */
__device__ __forceinline__ void put_turned(uint2 *turned, const uint32_t (&word)[2][OWN_ROWS],
                                           const struct seat &s, uint8_t *to, int64_t ld) {
#pragma unroll
  for (int c = 0; c < OWN_ROWS; c++)
    turned[(s.lane * OWN_ROWS + c) * UNITS + (s.unit ^ s.lane)] =
        make_uint2(word[0][c], word[1][c]);
  __syncthreads();
  /* Half warps have columns in turn, 16 i + unit, and their lanes 8 bytes of one. */
  to += s.unit * ld + s.lane * OWN_ROWS;
  int64_t step = UNITS * ld;
  unsigned at = s.lane ^ s.unit / OWN_ROWS;
  turned += s.unit * UNITS;
#pragma unroll
  for (unsigned i = 0; i < TILE / UNITS; i++, to += step)
    *(uint2 *)to = turned[i * UNITS * UNITS + (at ^ 2 * i)];
}

/* The tile's columns, turned through its own memory. All threads must call it. */
__device__ __forceinline__ void write_columns_packed(const struct mt_qtensor &q,
                                                     const struct place &p, const struct seat &s,
                                                     uint4 *tile, const uint4 *by_all) {
  const uint4 *own = tile + s.row * UNITS + s.lane;
  uint32_t by[OWN_WORDS], word[2][OWN_ROWS];
  int left = p.rows - s.row; /* rows beyond are zeros whatever the scale: a NaN's are not yet */
  read_slot(by_all + s.lane, by);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int more = left - 4 * h;
    uint32_t keep = more >= 4 ? 0xffffffffu : more <= 0 ? 0u : 0xffffffffu >> 8 * (4 - more);
    uint32_t x[4][OWN_WORDS];
#pragma unroll
    for (int k = 0; k < 4; k++) read_slot(own + (4 * h + k) * UNITS, x[k]);
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) x[k][i] = scaled(x[k][i], by[i]);
      word[h][2 * i] = keep & four_e4m3(low_float(x[0][i]), low_float(x[1][i]), low_float(x[2][i]),
                                        low_float(x[3][i]));
      word[h][2 * i + 1] = keep & four_e4m3(high_float(x[0][i]), high_float(x[1][i]),
                                            high_float(x[2][i]), high_float(x[3][i]));
    }
  }
  __syncthreads(); /* all have read theirs */
  put_turned((uint2 *)tile, word, s, q.col + p.col * q.col_rows + p.at, q.col_rows);
}

/* quantize_tiles for bf16 and FP8, where packed_reads and packed_writes. */
template <class Source>
__global__ void __launch_bounds__(THREADS, packed_blocks<Source>)
    quantize_packed(Source source, struct groups g, int64_t width,
                    struct outputs<Source::TILES> out) {
  constexpr int TILES = Source::TILES;
  extern __shared__ __align__(16) unsigned char raw[];
  uint4 *tiles = (uint4 *)raw, *tops = tiles + Source::INPUTS * TILE_SLOTS;
  uint4 *by = tops + TILES * TOPS_SLOTS;
  struct seat s = own_seat();
  uint4 *own = tiles + s.row * UNITS + s.lane;
  struct place p = place_of(g, blockIdx.y, (int64_t)blockIdx.x * TILE, width);
  if (p.rows <= 0) return;
  fetch(source, p, s, own);
  int warp_row = (int)(threadIdx.x / 32 * 16 + s.lane);
  float weight = warp_row < p.rows ? source.weight(p.row + warp_row) : 1.0f;
  float *dots_to = source.dots_to(p, s);
  int left = p.rows - s.row;
  struct own_tops mine[TILES] = {};
  copies_wait<3>();
  make_pair(source, weight, left, own, 0, dots_to, mine);
  copies_wait<2>();
  make_pair(source, weight, left, own, 1, dots_to, mine);
  copies_wait<1>();
  make_pair(source, weight, left, own, 2, dots_to, mine);
  copies_wait<0>();
  make_pair(source, weight, left, own, 3, dots_to, mine);
  bool any = false;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    struct place at = p;
    at.col += out.shift[t];
    if (out.q[t].col) {
      const uint32_t *top = mine[t].col;
      tops[t * TOPS_SLOTS + s.unit * UNITS + s.lane] = make_uint4(top[0], top[1], top[2], top[3]);
      any = true;
    }
    if (out.q[t].row) write_rows_packed(out.q[t], at, s, own + t * TILE_SLOTS, mine[t].row);
  }
  if (!any) return;
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    struct place at = p;
    at.col += out.shift[t];
    if (out.q[t].col && (int)threadIdx.x / TILE_WORDS == t)
      put_column_scales(out.q[t], at, (int)threadIdx.x % TILE_WORDS,
                        (const uint32_t *)(tops + t * TOPS_SLOTS),
                        (uint32_t *)(by + t * TILE_WORDS / 4));
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    struct place at = p;
    at.col += out.shift[t];
    if (out.q[t].col)
      write_columns_packed(out.q[t], at, s, tiles + t * TILE_SLOTS, by + t * TILE_WORDS / 4);
  }
}

/* Whether a source's inputs, of p and ld, can be read so; an output be written. */
static inline bool packed_reads(const void *p, int64_t ld) {
  return aligned_to(p, 16) && ld % OWN_ROWS == 0 && ld <= INT32_MAX;
}
static inline bool packed_writes(const struct mt_qtensor *q) {
  return q->format == MT_Q_NONE ||
         (q->format == MT_Q_FP8 && q->rank == 2 && q->dim[1] % TILE == 0 && aligned_to(q->row, 8) &&
          aligned_to(q->col, 8) && aligned_to(q->col_scale, 8) && q->col_rows % OWN_ROWS == 0);
}

/* The scale's byte of a tile of which each thread has `tops`. tops_of: a word a warp. All threads
 * must call it. */
__device__ __forceinline__ unsigned tile_scale_byte(uint32_t tops, uint32_t *tops_of) {
  uint32_t top = __reduce_max_sync(0xffffffffu, max(tops & 0xffffu, tops >> 16));
  if (threadIdx.x % 32 == 0) tops_of[threadIdx.x / 32] = top;
  __syncthreads();
  top = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i += 4) {
    uint4 v = *(const uint4 *)(tops_of + i);
    top = max(top, max(max(v.x, v.y), max(v.z, v.w)));
  }
  return scale_byte<true>(top << 16);
}

/* What a thread has of a tile: elements as pairs of bf16, then bytes, with one scale for all. */
__device__ __forceinline__ void convert_own(const uint32_t (&x)[OWN_ROWS][OWN_WORDS], uint32_t by,
                                            uint32_t (&bytes)[2][OWN_ROWS]) {
#pragma unroll
  for (int r = 0; r < OWN_ROWS; r++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint32_t a = scaled(x[r][2 * h], by), b = scaled(x[r][2 * h + 1], by);
      bytes[h][r] = four_e4m3(low_float(a), high_float(a), low_float(b), high_float(b));
    }
  }
}

/* Rows of four bytes, bytes[which columns][row], to columns of four, word[which rows][column]. */
__device__ __forceinline__ void turn_own(const uint32_t (&bytes)[2][OWN_ROWS],
                                         uint32_t (&word)[2][OWN_ROWS]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t *row = bytes[i % 2] + i / 2 * 4;
    uint32_t *col = word[i / 2] + i % 2 * 4;
    uint32_t a = __byte_perm(row[0], row[1], 0x5140), b = __byte_perm(row[2], row[3], 0x5140);
    uint32_t c = __byte_perm(row[0], row[1], 0x7362), d = __byte_perm(row[2], row[3], 0x7362);
    col[0] = lower_of(a, b), col[1] = higher_of(a, b);
    col[2] = lower_of(c, d), col[3] = higher_of(c, d);
  }
}

/* quantize_weight for bf16, where packed_weight. Both copies of a tile are of the same bytes, so
 * its elements are converted once; they stay in registers from the reads, all of which are on their
 * way before the first is used. w: rows `stride` bytes apart. */
__global__ static void __launch_bounds__(THREADS, WEIGHT_BLOCKS)
    quantize_weight_packed(const char *w, unsigned stride, int64_t n, int64_t k,
                           struct mt_qtensor q) {
  __shared__ __align__(16) uint2 turned[TILE * UNITS];
  __shared__ __align__(16) uint32_t tops_of[WARPS];
  struct seat s = own_seat();
  int64_t g = blockIdx.z, row = (int64_t)blockIdx.y * TILE, col = (int64_t)blockIdx.x * TILE;
  uint32_t x[OWN_ROWS][OWN_WORDS], tops = 0, bytes[2][OWN_ROWS], word[2][OWN_ROWS];
  w += (g * n + row + s.row) * stride + (col + s.lane * OWN_ROWS) * 2;
#pragma unroll
  for (unsigned r = 0; r < OWN_ROWS; r++)
    read_slot((const uint4 *)(w + (uint64_t)r * stride), x[r]);
#pragma unroll
  for (int r = 0; r < OWN_ROWS; r++) {
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) tops = __vmaxu2(tops, magnitudes(x[r][i]));
  }
  unsigned byte = tile_scale_byte(tops, tops_of);
  if (threadIdx.x == 0 && q.row)
    put_scale<true>(q.row_scale, (g * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, byte);
  if (threadIdx.x == 0 && q.col)
    put_scale<true>(q.col_scale, (g * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y, byte);
  convert_own(x, inverse_bits(byte) * 0x10001u, bytes);
  uint8_t *to = q.row + (g * n + row + s.row) * k + col + s.lane * OWN_ROWS;
#pragma unroll
  for (int r = 0; q.row && r < OWN_ROWS; r++, to += k)
    *(uint2 *)to = make_uint2(bytes[0][r], bytes[1][r]);
  if (!q.col) return;
  turn_own(bytes, word);
  put_turned(turned, word, s, q.col + (g * k + col) * n + row, n);
}

/* Whether quantize_weight_packed can have it. */
static inline bool packed_weight(const struct mt_tensor *w, const struct mt_qtensor *q) {
  return q->format == MT_Q_FP8 && w->dtype == MT_BF16 && w->dim[w->rank - 1] % TILE == 0 &&
         w->dim[w->rank - 2] % TILE == 0 && packed_reads(w->data, w->ld) && aligned_to(q->row, 8) &&
         aligned_to(q->col, 8);
}

#endif
