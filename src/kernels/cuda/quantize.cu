/* Quantizing to 8 bits, by itself and joined with SwiGLU, on any GPU. */
#include "kernels/cuda/quantize_packed.cuh"
#include "kernels/cuda/swiglu.cuh"

enum { GROUPS_MOST = MT_OPS_MAX_EXPERTS };

/* Sources: of each of their tiles, four neighbours of a row, v (= where there are any). For bf16
 * with elements two to a register (quantize_packed.cuh): which row of the inputs a row is made of,
 * where input i lies and bytes from one of its rows to the next, what the row is weighted with;
 * make() makes a lane's elements of the tiles, and sums that put_dots() has of two rows, of which
 * `left` are there. */
template <class T> struct plain_source {
  static constexpr int TILES = 1, INPUTS = 1;
  struct mat<const T> x;
  const int32_t *row_source;
  int top_k;
  bool is_wide;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[1][4]) const {
    if (row_source) row = row_source[row] / top_k;
    if (first < p.cols) read_four<T>(row_of(x, row) + p.col + first, p.cols - first, is_wide, v[0]);
  }
  bool packed() const { return packed_reads(x.p, x.ld); }
  __device__ int from(int64_t row) const { return row_source ? row_source[row] / top_k : (int)row; }
  __device__ const T *input(int) const { return x.p; }
  __device__ unsigned stride(int) const { return (unsigned)(x.ld * sizeof(T)); }
  __device__ float weight(int64_t) const { return 1.0f; }
  __device__ void make(const uint32_t (&x)[1][OWN_WORDS], float, uint32_t (&y)[1][OWN_WORDS],
                       float (&)[2]) const {
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) y[0][i] = x[0][i];
  }
  __device__ float *dots_to(const struct place &, const struct seat &) const {
    return NULL;
  }
  __device__ void put_dots(float *, int, const float (&)[2][2]) const {}
};

template <class T> struct swiglu_source {
  static constexpr int TILES = 1, INPUTS = 2;
  struct mat<const T> gate_up;
  const float *row_prob;
  int64_t f;
  bool is_wide;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[1][4]) const {
    if (first >= p.cols) return;
    const T *gate = row_of(gate_up, row) + p.col + first;
    float g[4], u[4], weight = row_prob ? row_prob[row] : 1.0f;
    read_four<T>(gate, p.cols - first, is_wide, g);
    read_four<T>(gate + f, p.cols - first, is_wide, u);
#pragma unroll
    for (int i = 0; i < 4; i++) v[0][i] = rounded<T>(swiglu_at<T>(g[i], u[i], weight));
  }
  bool packed() const {
    return packed_reads(gate_up.p, gate_up.ld);
  }
  __device__ int from(int64_t row) const {
    return (int)row;
  }
  __device__ const T *input(int i) const {
    return gate_up.p + i * f;
  }
  __device__ unsigned stride(int) const {
    return (unsigned)(gate_up.ld * sizeof(T));
  }
  __device__ float weight(int64_t row) const {
    return row_prob ? row_prob[row] : 1.0f;
  }
  __device__ void make(const uint32_t (&x)[2][OWN_WORDS], float weight, uint32_t (&y)[1][OWN_WORDS],
                       float (&)[2]) const {
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++)
      y[0][i] = pair_of(swiglu_at<T>(low_float(x[0][i]), low_float(x[1][i]), weight),
                        swiglu_at<T>(high_float(x[0][i]), high_float(x[1][i]), weight));
  }
  __device__ float *dots_to(const struct place &, const struct seat &) const {
    return NULL;
  }
  __device__ void put_dots(float *, int, const float (&)[2][2]) const {}
};

/* What SwiGLU's backward reads. parts: [strips][R] what each strip of F adds to drow_prob, or NULL.
 */
template <class T> struct gradient_inputs {
  struct mat<const T> dh, gate_up;
  const float *row_prob;
  float *parts;
  int64_t f, rows;
  bool is_wide;
  __device__ void add_part(const struct place &p, int64_t row, float dot) const {
    if (!parts) return;
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) parts[p.col / TILE * rows + row] = dot;
  }
};

/* The gradients of gate and up, and h, of the same columns: everything is read once. For widths
 * where no block is of gate and up. */
template <class T> struct gradients_source {
  static constexpr int TILES = 3, INPUTS = 3;
  struct gradient_inputs<T> in;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[3][4]) const {
    float dot = 0, weight = in.row_prob ? in.row_prob[row] : 1.0f, g[4], u[4], dy[4];
    if (first < p.cols) {
      const T *gate = row_of(in.gate_up, row) + p.col + first;
      read_four<T>(gate, p.cols - first, in.is_wide, g);
      read_four<T>(gate + in.f, p.cols - first, in.is_wide, u);
      read_four<T>(row_of(in.dh, row) + p.col + first, p.cols - first, in.is_wide, dy);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        struct swiglu_gradient d = swiglu_bwd_at<T>(g[i], u[i], dy[i], weight, &dot);
        v[0][i] = rounded<T>(d.gate), v[1][i] = rounded<T>(d.up), v[2][i] = rounded<T>(d.h);
      }
    }
    in.add_part(p, row, dot);
  }
  bool packed() const {
    return packed_reads(in.gate_up.p, in.gate_up.ld) && packed_reads(in.dh.p, in.dh.ld);
  }
  __device__ int from(int64_t row) const {
    return (int)row;
  }
  __device__ const T *input(int i) const {
    return i < 2 ? in.gate_up.p + i * in.f : in.dh.p;
  }
  __device__ unsigned stride(int i) const {
    return (unsigned)((i < 2 ? in.gate_up.ld : in.dh.ld) * sizeof(T));
  }
  __device__ float weight(int64_t row) const {
    return in.row_prob ? in.row_prob[row] : 1.0f;
  }
  __device__ void make(const uint32_t (&x)[3][OWN_WORDS], float weight, uint32_t (&y)[3][OWN_WORDS],
                       float (&dots)[2]) const {
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
      float *dot = &dots[i / 2]; /* of four neighbours, as load() has them */
      struct swiglu_gradient a =
          swiglu_bwd_at<T>(low_float(x[0][i]), low_float(x[1][i]), low_float(x[2][i]), weight, dot);
      struct swiglu_gradient b = swiglu_bwd_at<T>(high_float(x[0][i]), high_float(x[1][i]),
                                                  high_float(x[2][i]), weight, dot);
      y[0][i] = pair_of(a.gate, b.gate), y[1][i] = pair_of(a.up, b.up), y[2][i] = pair_of(a.h, b.h);
    }
  }
  /* Where the lane puts the sums it has at last (pair_dots), if it does. */
  __device__ float *dots_to(const struct place &p, const struct seat &s) const {
    if (!in.parts || s.lane % 4 != 0 || s.lane >= 8) return NULL;
    return in.parts + p.col / TILE * in.rows + p.row + s.row + s.lane / 4;
  }
  __device__ void put_dots(float *to, int left, const float (&dots)[2][2]) const {
    if (!in.parts) return;
    float dot = pair_dots(dots);
    if (to && (int)(threadIdx.x / 4 % 2) < left) *to = dot;
  }
};

/* For the others, and where three tiles do not fit: columns [0, F): the gate's gradient, [F, 2F):
 * up's; or, where `again`, h. */
template <class T> struct gradient_source {
  static constexpr int TILES = 1, INPUTS = 0; /* not packed */
  struct gradient_inputs<T> in;
  bool again;
  __device__ void load(const struct place &p, int64_t row, int first, float (&v)[1][4]) const {
    float dot = 0, weight = in.row_prob ? in.row_prob[row] : 1.0f;
    const T *gate = row_of(in.gate_up, row), *dh = row_of(in.dh, row);
    for (int i = 0; i < 4 && first + i < p.cols; i++) {
      int64_t c = p.col + first + i;
      bool up = !again && c >= in.f;
      if (up) c -= in.f;
      struct swiglu_gradient d = swiglu_bwd_at<T>(to_float(gate[c]), to_float(gate[in.f + c]),
                                                  to_float(dh[c]), weight, &dot);
      v[0][i] = rounded<T>(again ? d.h : up ? d.up : d.gate);
    }
    in.add_part(p, row, dot);
  }
};

template <class Source>
using tiles_kernel = void (*)(Source, struct groups, int64_t, struct outputs<Source::TILES>);

template <class Source>
static mt_err launch_kernel(struct mt_backend *be, const char *op, tiles_kernel<Source> kernel,
                            size_t shared, const Source &source, const struct groups &g,
                            int64_t width, const struct outputs<Source::TILES> &out) {
  bool many = out.q[0].rank == 3;
  int64_t strips = div_up(width, TILE);
  int64_t bands = mt_q_col_rows(g.rows, g.offsets ? g.count : 1) / TILE;
  if (strips == 0 || bands == 0) return MT_OK;
  if (bands > 65535) /* of a grid's second dimension */
    return mt_fail(MT_EUNSUPPORTED, "%s: %lld rows", op, (long long)g.rows);
  MT_TRY(mt_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), op));
  dim3 grid((unsigned)strips, (unsigned)bands, many ? (unsigned)out.q[0].dim[0] : 1);
  kernel<<<grid, THREADS, shared, mt_cuda_of(be)->stream>>>(source, g, width, out);
  return mt_cuda_launched(op);
}

template <class T, bool FP8, class Source>
static mt_err launch(struct mt_backend *be, const char *op, const Source &source,
                     const struct groups &g, int64_t width,
                     const struct outputs<Source::TILES> &out) {
  return launch_kernel<Source>(be, op, quantize_tiles<T, FP8, Source>,
                               tiles_bytes<T, FP8, Source::TILES>, source, g, width, out);
}

/* Whether quantize_packed can have it. */
template <class Source>
static bool packed_fits(const struct mt_backend *be, const Source &source, int64_t width,
                        const struct outputs<Source::TILES> &out) {
  bool fits = width % TILE == 0 && source.packed() &&
              packed_bytes<Source> <= mt_cuda_of(be)->shared_optin_bytes;
  for (int t = 0; t < Source::TILES; t++) fits = fits && packed_writes(&out.q[t]);
  return fits;
}

template <class T, class Source>
static mt_err launch_by_format(struct mt_backend *be, const char *op, const Source &source,
                               const struct groups &g, int64_t width,
                               const struct outputs<Source::TILES> &out) {
  if constexpr (sizeof(T) == sizeof(bf16) && Source::INPUTS > 0) {
    if (packed_fits(be, source, width, out))
      return launch_kernel<Source>(be, op, quantize_packed<Source>, packed_bytes<Source>, source, g,
                                   width, out);
  }
  if (out.q[0].format == MT_Q_FP8) return launch<T, true, Source>(be, op, source, g, width, out);
  return launch<T, false, Source>(be, op, source, g, width, out);
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
    err = launch_by_format<T>(be, "quantize", s, g, a->q.dim[1], {{a->q}, {0}});
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
    err = launch_by_format<T>(be, "swiglu_quantize_fwd", s, g, f, {{a->h}, {0}});
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

/* Whether a block's shared memory holds three tiles: not every GPU's does. */
template <class T> static bool three_fit(const struct mt_backend *be, enum mt_qformat format) {
  size_t need = format == MT_Q_FP8 ? tiles_bytes<T, true, 3> : tiles_bytes<T, false, 3>;
  return need <= mt_cuda_of(be)->shared_optin_bytes;
}

template <class T>
static mt_err swiglu_backward(struct mt_backend *be, const struct mt_swiglu_quantize_bwd_args *a,
                              float *parts) {
  const char *op = "swiglu_quantize_bwd";
  int64_t f = a->dh.dim[1];
  struct groups g = {a->offsets, a->padded, a->group_count, a->dh.dim[0]};
  struct gradient_inputs<T> in = {
    mat_of<const T>(&a->dh), mat_of<const T>(&a->gate_up),
        (const float *)a->row_prob.data, parts, f, g.rows, fours(&a->gate_up, f) && fours(&a->dh, f)
  };
  struct mt_qtensor h = a->h; /* absent, it has no copies */
  if (f % mt_q_block(a->dgate_up.format) == 0 && three_fit<T>(be, a->dgate_up.format)) {
    struct gradients_source<T> all = {
      in
    };
    return launch_by_format<T>(be, op, all, g, f, {{a->dgate_up, a->dgate_up, h}, {0, f, 0}});
  }
  struct gradient_source<T> s = {
    in, false
  };
  s.in.parts = NULL;
  MT_TRY((launch_by_format<T>(be, op, s, g, 2 * f, {{a->dgate_up}, {0}})));
  if (h.format == MT_Q_NONE) { /* for the sake of the parts alone: nothing is written */
    if (!parts) return MT_OK;
    h = a->dgate_up;
    h.row = h.col = NULL;
  }
  s.again = true;
  s.in.parts = parts;
  return launch_by_format<T>(be, op, s, g, f, {{h}, {0}});
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

extern "C" mt_err mt_cuda_quantize_weight(struct mt_backend *be,
                                          const struct mt_quantize_weight_args *a) {
  const char *op = "quantize_weight";
  MT_TRY(mt_check_quantize_weight(a));
  MT_TRY(mt_cuda_format(op, &a->w));
  int64_t n = a->w.dim[a->w.rank - 2], k = a->w.dim[a->w.rank - 1];
  dim3 grid((unsigned)div_up(k, TILE), (unsigned)div_up(n, TILE),
            a->w.rank == 3 ? (unsigned)a->w.dim[0] : 1);
  mt_err err = MT_OK;
  if (n == 0 || k == 0 || grid.z == 0) return MT_OK;
  if (packed_weight(&a->w, &a->q)) {
    quantize_weight_packed<<<grid, THREADS, 0, mt_cuda_of(be)->stream>>>(
        (const char *)a->w.data, (unsigned)(a->w.ld * sizeof(bf16)), n, k, a->q);
    return mt_cuda_launched(op);
  }
  MT_CUDA_BY_FORMAT(a->w.dtype, {
    if (a->q.format == MT_Q_FP8) {
      constexpr int shared = (int)(TILE * TILE * sizeof(T));
      auto kernel = quantize_weight<T>;
      MT_TRY(mt_cuda_check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), op));
      kernel<<<grid, THREADS, shared, mt_cuda_of(be)->stream>>>((const T *)a->w.data, a->w.ld, n, k,
                                                                fours(&a->w, 0), a->q);
      err = mt_cuda_launched(op);
    } else {
      struct plain_source<T> s = {
        mat_of<const T>(&a->w), NULL, 1, fours(&a->w, 0)
      };
      err = launch<T, false>(be, op, s, {NULL, NULL, 1, n}, k, {{a->q}, {0}});
    }
  });
  return err;
}
