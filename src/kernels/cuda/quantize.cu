/* Quantizing to 8 bits, by itself and joined with SwiGLU, on any GPU. A block of threads takes a
 * tile of 128 rows of one group and 128 columns: whole blocks of either format in either direction.
 * Rows are quantized from registers as they are read, columns from shared memory. */
#include "kernels/cuda/quantize.cuh"
#include "kernels/cuda/swiglu.cuh"

enum { TILE = MT_Q_PAD, THREADS = 256, WARPS = THREADS / 32, GROUPS_MOST = MT_OPS_MAX_EXPERTS };

/* Elements between rows of a tile in shared memory: neighbouring threads read neighbouring columns,
 * and lanes that read down a column meet few of each other's banks. */
template <class T> constexpr int stride_of = TILE + 4 / (int)sizeof(T);

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

__device__ static struct place place_of(const struct groups &g, int64_t band, int64_t col,
                                        int64_t cols) {
  struct place p = {band * TILE, band * TILE, col, 0, 0};
  int64_t end = g.rows;
  if (g.offsets) {
    int low = 0, high = g.count; /* the group whose rows these are: the last that begins before */
    if (p.at >= g.padded[g.count]) return p;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (g.padded[middle] <= p.at)
        low = middle;
      else
        high = middle;
    }
    p.row = g.offsets[low] + (p.at - g.padded[low]);
    end = g.offsets[low + 1];
  }
  p.rows = (int)(end - p.row < TILE ? end - p.row : TILE);
  p.cols = (int)(cols - col < TILE ? cols - col : TILE);
  return p;
}

/* Four elements of one row by each lane, in the blocks of a row. */
template <bool FP8>
__device__ void write_row(const struct mt_qtensor &q, const struct place &p, int64_t row,
                          const float (&v)[4]) {
  int lane = threadIdx.x % 32, first = lane * 4;
  unsigned top = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) top = max(top, magnitude_bits(v[i]));
#pragma unroll
  for (int i = FP8 ? 16 : 4; i > 0; i /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, i));
  unsigned byte = scale_byte<FP8>(top);
  int64_t all = q.dim[1], block = (p.col + first) / (FP8 ? 128 : 32);
  bool leader = FP8 ? lane == 0 : lane % 8 == 0;
  if (leader && first < p.cols) {
    put_scale<FP8>(q.row_scale, FP8 ? block * q.scale_ld + row : row * ((all + 31) / 32) + block,
                   byte);
  }
  float by = scale_inverse(byte);
  uint8_t *to = q.row + row * all + p.col + first;
  uint8_t e[4];
#pragma unroll
  for (int i = 0; i < 4; i++) e[i] = to_e4m3(v[i] * by);
  if (first + 4 <= p.cols && ((uintptr_t)to & 3) == 0) {
    *(uchar4 *)to = make_uchar4(e[0], e[1], e[2], e[3]);
    return;
  }
  for (int i = 0; i < 4 && first + i < p.cols; i++) to[i] = e[i];
}

/* The tile's columns in MX: two threads a column, each with 64 rows. (Two columns a lane, kept in
 * registers between scale and elements, take twice the time.) A weight ends with its rows; past
 * those of a group are zeros, whatever its scale. */
template <class T>
__device__ void write_columns_mx(const struct mt_qtensor &q, const struct place &p,
                                 const T (*tile)[stride_of<T>]) {
  int c = threadIdx.x % TILE, begin = threadIdx.x / TILE * (TILE / 2);
  int64_t all = q.dim[1];
  int rows = q.weight ? p.rows : TILE;
  if (c >= p.cols) return;
  for (int r = begin; r < begin + TILE / 2 && r < rows; r += 32) {
    unsigned top = 0;
#pragma unroll 8
    for (int i = 0; i < 32; i++) top = max(top, magnitude_bits(to_float(tile[r + i][c])));
    unsigned byte = scale_byte<false>(top);
    float by = scale_inverse(byte);
    ((uint8_t *)q.col_scale)[(p.at + r) / 32 * all + p.col + c] = (uint8_t)byte;
#pragma unroll 8
    for (int i = 0; i < 32; i++) {
      if (r + i >= rows) break;
      q.col[(p.at + r + i) * all + p.col + c] =
          r + i < p.rows ? to_e4m3(to_float(tile[r + i][c]) * by) : 0;
    }
  }
}

/* One column of a tile turned, by a warp: `rows` elements from to on, four a lane, of which the
 * first `valid` count and others are zeros, whatever the scale. */
template <class T>
__device__ __forceinline__ void write_turned(const T (*tile)[stride_of<T>], int c, float by,
                                             uint8_t *to, int rows, int valid) {
  int first = threadIdx.x % 32 * 4;
  uint8_t e[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    e[i] = first + i < valid ? to_e4m3(to_float(tile[first + i][c]) * by) : 0;
  if (first + 4 <= rows && ((uintptr_t)to & 3) == 0) {
    *(uchar4 *)(to + first) = make_uchar4(e[0], e[1], e[2], e[3]);
    return;
  }
  for (int i = 0; i < 4 && first + i < rows; i++) to[first + i] = e[i];
}

/* In FP8, 1 x 128 along the rows, transposed. */
template <class T>
__device__ void write_columns_fp8(const struct mt_qtensor &q, const struct place &p,
                                  const T (*tile)[stride_of<T>]) {
  int lane = threadIdx.x % 32;
  for (int c = threadIdx.x / 32; c < p.cols; c += WARPS) {
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) top = max(top, magnitude_bits(to_float(tile[lane * 4 + i][c])));
#pragma unroll
    for (int i = 16; i > 0; i /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, i));
    unsigned byte = scale_byte<true>(top);
    if (lane == 0) put_scale<true>(q.col_scale, p.at / TILE * q.dim[1] + p.col + c, byte);
    write_turned<T>(tile, c, scale_inverse(byte), q.col + (p.col + c) * q.col_rows + p.at, TILE,
                    p.rows);
  }
}

/* Reads a tile through the source (rows of zeros past the last), writes both copies. */
template <class T, bool FP8, class Source>
__global__ void __launch_bounds__(THREADS)
    quantize_tiles(Source source, struct groups g, struct mt_qtensor q) {
  extern __shared__ __align__(16) char raw[];
  T(*tile)[stride_of<T>] = (T(*)[stride_of<T>])raw;
  struct place p = place_of(g, blockIdx.y, (int64_t)blockIdx.x * TILE, q.dim[1]);
  int lane = threadIdx.x % 32;
  if (p.rows <= 0) return;
  for (int r = threadIdx.x / 32; r < TILE; r += WARPS) {
    float v[4] = {0, 0, 0, 0};
    if (r < p.rows) {
      source.load(p, p.row + r, lane * 4, v);
      if (q.row) write_row<FP8>(q, p, p.row + r, v);
    }
    if (!q.col) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) tile[r][lane * 4 + i] = from_float<T>(v[i]);
  }
  if (!q.col) return;
  __syncthreads();
  if (FP8)
    write_columns_fp8<T>(q, p, tile);
  else
    write_columns_mx<T>(q, p, tile);
}

/* Four neighbours of a row that has `left` more from p on. */
template <class T>
__device__ __forceinline__ void read_four(const T *p, int64_t left, bool is_wide, float (&v)[4]) {
  if (is_wide && left >= 4) {
    load_floats<T, 4>(p, v);
    return;
  }
  for (int i = 0; i < 4; i++) v[i] = i < left ? to_float(p[i]) : 0.0f;
}

template <class T> struct plain_source {
  struct mat<const T> x;
  const int32_t *row_source;
  int top_k;
  bool is_wide;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[4]) const {
    if (row_source) row = row_source[row] / top_k;
    if (first < p.cols) read_four<T>(row_of(x, row) + p.col + first, p.cols - first, is_wide, v);
  }
};

template <class T> struct swiglu_source {
  struct mat<const T> gate_up;
  const float *row_prob;
  int64_t f;
  bool is_wide;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[4]) const {
    if (first >= p.cols) return;
    const T *gate = row_of(gate_up, row) + p.col + first;
    float u[4], weight = row_prob ? row_prob[row] : 1.0f;
    read_four<T>(gate, p.cols - first, is_wide, v);
    read_four<T>(gate + f, p.cols - first, is_wide, u);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_float(from_float<T>(swiglu_at<T>(v[i], u[i], weight)));
  }
};

/* Columns [0, F): the gate's gradient, [F, 2F): up's; or, where `again`, h. parts, with again:
 * [strips][R] what each strip adds to drow_prob. */
template <class T> struct gradient_source {
  struct mat<const T> dh, gate_up;
  const float *row_prob;
  float *parts;
  int64_t f, rows;
  bool again, is_wide;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[4]) const {
    float dot = 0, weight = row_prob ? row_prob[row] : 1.0f;
    const T *gate = row_of(gate_up, row), *d = row_of(dh, row);
    int64_t at = p.col + first;
    bool up = !again && at >= f;
    if (is_wide && first + 4 <= p.cols) { /* then F is a multiple of 4 */
      float g[4], u[4], dy[4];
      if (up) at -= f;
      load_floats<T, 4>(gate + at, g);
      load_floats<T, 4>(gate + f + at, u);
      load_floats<T, 4>(d + at, dy);
#pragma unroll
      for (int i = 0; i < 4; i++)
        v[i] = pick(swiglu_bwd_at<T>(g[i], u[i], dy[i], weight, &dot), up);
    } else {
      for (int i = 0; i < 4 && first + i < p.cols; i++) {
        int64_t c = p.col + first + i;
        up = !again && c >= f;
        if (up) c -= f;
        v[i] = pick(swiglu_bwd_at<T>(to_float(gate[c]), to_float(gate[f + c]), to_float(d[c]),
                                     weight, &dot),
                    up);
      }
    }
    if (!parts) return;
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) parts[p.col / TILE * rows + row] = dot;
  }
  __device__ float pick(const struct swiglu_gradient &d, bool up) const {
    return to_float(from_float<T>(again ? d.h : up ? d.up : d.gate));
  }
};

template <class T> constexpr size_t tile_bytes = TILE *stride_of<T> * sizeof(T);

template <class T, bool FP8, class Source>
static mt_err launch(struct mt_backend *be, const char *op, const Source &source,
                     const struct groups &g, const struct mt_qtensor *q) {
  int64_t strips = div_up(q->dim[1], TILE);
  int64_t bands = mt_q_col_rows(g.rows, g.offsets ? g.count : 1) / TILE;
  size_t shared = q->col ? tile_bytes<T> : 0;
  auto kernel = quantize_tiles<T, FP8, Source>;
  if (strips == 0 || bands == 0) return MT_OK;
  if (bands > 65535) /* of a grid's second dimension */
    return mt_fail(MT_EUNSUPPORTED, "%s: %lld rows", op, (long long)g.rows);
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)tile_bytes<T>),
      op));
  kernel<<<dim3((unsigned)strips, (unsigned)bands), THREADS, shared, mt_cuda_of(be)->stream>>>(
      source, g, *q);
  return mt_cuda_launched(op);
}

template <class T, class Source>
static mt_err launch_by_format(struct mt_backend *be, const char *op, const Source &source,
                               const struct groups &g, const struct mt_qtensor *q) {
  if (q->format == MT_Q_FP8) return launch<T, true, Source>(be, op, source, g, q);
  return launch<T, false, Source>(be, op, source, g, q);
}

__global__ void __launch_bounds__(GROUPS_MOST)
    pad_offsets(const int32_t *offsets, int count, int32_t *padded) {
  __shared__ int32_t rows[GROUPS_MOST];
  int g = threadIdx.x;
  if (g < count) rows[g] = (offsets[g + 1] - offsets[g] + MT_Q_PAD - 1) / MT_Q_PAD * MT_Q_PAD;
  __syncthreads();
  int32_t sum = 0;
  for (int i = 0; i < g && i < count; i++) sum += rows[i];
  if (g < count) padded[g] = sum;
  if (g == count - 1) padded[count] = sum + rows[g];
}

extern "C" mt_err mt_cuda_pad_offsets(struct mt_backend *be, const struct mt_pad_offsets_args *a) {
  MT_TRY(mt_check_pad_offsets(a));
  if (a->group_count > GROUPS_MOST)
    return mt_fail(MT_EUNSUPPORTED, "pad_offsets: %d groups", a->group_count);
  pad_offsets<<<1, GROUPS_MOST, 0, mt_cuda_of(be)->stream>>>(a->offsets, a->group_count, a->padded);
  MT_TRY(mt_cuda_launched("pad_offsets"));
  return mt_cuda_counts_note(be, a);
}

/* Whether rows, and a half of gate_up from F on, can be read four elements at a time. */
static bool fours(const struct mt_tensor *t, int64_t f) {
  size_t four = 4 * mt_dtype_bytes(t->dtype);
  return aligned_to(t->data, four) && t->ld % 4 == 0 && f % 4 == 0;
}

extern "C" mt_err mt_cuda_quantize(struct mt_backend *be, const struct mt_quantize_args *a) {
  MT_TRY(mt_check_quantize(a));
  MT_TRY(mt_cuda_format("quantize", &a->x));
  struct groups g = {a->offsets, a->padded, a->group_count, a->q.dim[0]};
  mt_err err = MT_OK;
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    struct plain_source<T> s = {
      mat_of<const T>(&a->x), a->row_source, a->top_k, fours(&a->x, 0)
    };
    err = launch_by_format<T>(be, "quantize", s, g, &a->q);
  });
  return err;
}

extern "C" mt_err mt_cuda_swiglu_quantize_fwd(struct mt_backend *be,
                                              const struct mt_swiglu_quantize_fwd_args *a) {
  MT_TRY(mt_check_swiglu_quantize_fwd(a));
  MT_TRY(mt_cuda_format("swiglu_quantize_fwd", &a->gate_up));
  int64_t f = a->h.dim[1];
  struct groups g = {a->offsets, a->padded, a->group_count, a->h.dim[0]};
  mt_err err = MT_OK;
  MT_CUDA_BY_FORMAT(a->gate_up.dtype, {
    struct swiglu_source<T> s = {
      mat_of<const T>(&a->gate_up), (const float *)a->row_prob.data, f, fours(&a->gate_up, f)
    };
    err = launch_by_format<T>(be, "swiglu_quantize_fwd", s, g, &a->h);
  });
  return err;
}

/* out[r] = the sum of row r's parts, in order. */
__global__ void __launch_bounds__(256)
    add_strips(const float *parts, int count, int64_t rows, const int32_t *row_count, float *out) {
  int64_t r = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (r >= rows || (row_count && r >= *row_count)) return;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < count; i++) sum += parts[i * rows + r];
  out[r] = sum;
}

extern "C" size_t mt_cuda_quantize_bytes(const struct mt_limits *l) {
  return l->qformat == MT_Q_NONE ? 0 : (size_t)(div_up(l->ffn, TILE) * l->rows) * sizeof(float);
}

template <class T>
static mt_err swiglu_backward(struct mt_backend *be, const struct mt_swiglu_quantize_bwd_args *a,
                              float *parts) {
  const char *op = "swiglu_quantize_bwd";
  int64_t f = a->dh.dim[1];
  struct groups g = {a->offsets, a->padded, a->group_count, a->dh.dim[0]};
  struct gradient_source<T> s = {
    mat_of<const T>(&a->dh), mat_of<const T>(&a->gate_up),
        (const float *)a->row_prob.data, NULL, f, g.rows, false,
        fours(&a->gate_up, f) && fours(&a->dh, f)
  };
  struct mt_qtensor h = a->h;
  MT_TRY((launch_by_format<T>(be, op, s, g, &a->dgate_up)));
  if (h.format == MT_Q_NONE) { /* for the sake of the parts alone: nothing is written */
    if (!parts) return MT_OK;
    h = a->dgate_up;
    h.dim[1] = f;
    h.row = h.col = NULL;
  }
  s.again = true;
  s.parts = parts;
  return launch_by_format<T>(be, op, s, g, &h);
}

extern "C" mt_err mt_cuda_swiglu_quantize_bwd(struct mt_backend *be,
                                              const struct mt_swiglu_quantize_bwd_args *a) {
  const char *op = "swiglu_quantize_bwd";
  MT_TRY(mt_check_swiglu_quantize_bwd(a));
  MT_TRY(mt_cuda_format(op, &a->dh));
  int64_t r = a->dh.dim[0], strips = div_up(a->dh.dim[1], TILE);
  void *parts = NULL;
  if (r == 0 || strips == 0) return MT_OK;
  if (a->drow_prob.data)
    MT_TRY(mt_cuda_scratch(be, op, (size_t)(strips * r) * sizeof(float), &parts));
  mt_err err = MT_OK;
  MT_CUDA_BY_FORMAT(a->dh.dtype, { err = swiglu_backward<T>(be, a, (float *)parts); });
  if (err || !parts) return err;
  add_strips<<<(unsigned)div_up(r, 256), 256, 0, mt_cuda_of(be)->stream>>>(
      (const float *)parts, (int)strips, r, a->offsets ? a->offsets + a->group_count : NULL,
      (float *)a->drow_prob.data);
  return mt_cuda_launched(op);
}

/* A weight's matrix g, tile by tile. FP8: one block a tile, and its transpose. */
template <class T, bool FP8>
__global__ void __launch_bounds__(THREADS)
    quantize_weight(const T *w, int64_t ld, int64_t n, int64_t k, bool is_wide,
                    struct mt_qtensor all) {
  extern __shared__ __align__(16) char raw[];
  __shared__ unsigned tops[WARPS];
  T(*tile)[stride_of<T>] = (T(*)[stride_of<T>])raw;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  struct mt_qtensor q = all;
  int64_t g = blockIdx.z, tall = FP8 ? (n + 127) / 128 : (n + 31) / 32,
          broad = FP8 ? (k + 127) / 128 : (k + 31) / 32, item = FP8 ? 4 : 1;
  struct place p = {(int64_t)blockIdx.y * TILE, (int64_t)blockIdx.y * TILE,
                    (int64_t)blockIdx.x * TILE, 0, 0};
  p.rows = (int)(n - p.row < TILE ? n - p.row : TILE);
  p.cols = (int)(k - p.col < TILE ? k - p.col : TILE);
  q.dim[0] = n, q.dim[1] = k;
  if (q.row)
    q.row += g * n * k, q.row_scale = (char *)q.row_scale + g * (FP8 ? tall : n) * broad * item;
  if (q.col)
    q.col += g * n * k, q.col_scale = (char *)q.col_scale + g * tall * (FP8 ? broad : k) * item;
  w += g * n * ld;
  unsigned top = 0;
  for (int r = warp; r < TILE; r += WARPS) {
    float v[4] = {0, 0, 0, 0};
    if (r < p.rows && lane * 4 < p.cols)
      read_four<T>(w + (p.row + r) * ld + p.col + lane * 4, p.cols - lane * 4, is_wide, v);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      top = max(top, magnitude_bits(v[i]));
      tile[r][lane * 4 + i] = from_float<T>(v[i]);
    }
    if (!FP8 && q.row && r < p.rows) write_row<false>(q, p, p.row + r, v);
  }
  if constexpr (!FP8) {
    __syncthreads();
    if (q.col) write_columns_mx<T>(q, p, tile);
  } else {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, i));
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) top = max(top, tops[i]);
    unsigned byte = scale_byte<true>(top);
    float by = scale_inverse(byte);
    if (threadIdx.x == 0) {
      if (q.row) put_scale<true>(q.row_scale, blockIdx.y * broad + blockIdx.x, byte);
      if (q.col) put_scale<true>(q.col_scale, blockIdx.x * tall + blockIdx.y, byte);
    }
    for (int r = warp; q.row && r < p.rows; r += WARPS) {
      for (int c = lane; c < p.cols; c += 32)
        q.row[(p.row + r) * k + p.col + c] = to_e4m3(to_float(tile[r][c]) * by);
    }
    for (int c = warp; q.col && c < p.cols; c += WARPS)
      write_turned<T>(tile, c, by, q.col + (p.col + c) * n + p.row, p.rows, p.rows);
  }
}

extern "C" mt_err mt_cuda_quantize_weight(struct mt_backend *be,
                                          const struct mt_quantize_weight_args *a) {
  const char *op = "quantize_weight";
  MT_TRY(mt_check_quantize_weight(a));
  MT_TRY(mt_cuda_format(op, &a->w));
  int64_t n = a->w.dim[a->w.rank - 2], k = a->w.dim[a->w.rank - 1];
  dim3 grid((unsigned)div_up(k, TILE), (unsigned)div_up(n, TILE),
            a->w.rank == 3 ? (unsigned)a->w.dim[0] : 1);
  if (n == 0 || k == 0 || grid.z == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->w.dtype, {
    auto kernel = a->q.format == MT_Q_FP8 ? quantize_weight<T, true> : quantize_weight<T, false>;
    MT_TRY(mt_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)tile_bytes<T>),
                         op));
    kernel<<<grid, THREADS, tile_bytes<T>, mt_cuda_of(be)->stream>>>((const T *)a->w.data, a->w.ld,
                                                                     n, k, fours(&a->w, 0), a->q);
  });
  return mt_cuda_launched(op);
}
