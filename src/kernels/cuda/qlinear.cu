/* Products of 8-bit operands. FP8 on Hopper goes to its own kernels (sm90/qgrouped.cuh), MXFP8 on
 * Blackwell to cuBLASLt (mxproducts.cuh); on other GPUs and in other shapes and formats the
 * operands become bf16, exactly (down to 2^-133), and are multiplied as any other. */
#include "kernels/cuda/mxproducts.cuh"
#include "kernels/cuda/quantize.cuh"
#include "kernels/cuda/sm90/qgrouped.cuh"
#include "kernels/cuda/turned.cuh"

extern "C" {
#include "backend/dequant.h"
#include "backend/qstored.h"
}

/* What products themselves take of the scratch: sums of squares, in parts. */
enum { PRODUCTS_BYTES = 64 << 10, STRIP = 32 };

/* Whether Hopper's kernels take a product of rows in groups with [groups, n, k], in all three
 * directions; with fewer rows or groups they do then, too. Widths that the recipe refuses are those
 * of a part that is not there, or not in 8 bits (limits of one room have them 1). */
static bool hopper_takes(int64_t rows, int64_t groups, int64_t n, int64_t k) {
  enum { WIDTH = 16 }; /* the recipe's width_multiple */
  struct mt_cuda_qgrouped p = {};
  bool all = true;
  if (n % WIDTH != 0 || k % WIDTH != 0) return true;
  p.groups = (int)groups;
  for (int way = 0; way < 3; way++) {
    p.wgrad = way == 2;
    p.c_dtype = p.wgrad ? MT_F32 : MT_BF16;
    p.m = p.wgrad ? n : rows;
    p.n = p.ldc = way == 0 ? n : k;
    p.k = way == 0 ? k : way == 1 ? n : mt_q_col_rows(rows, groups);
    all &= mt_cuda_qgrouped_sm90_fits(&p);
  }
  return all;
}

/* Of a whole model: every product of FP8 operands goes to Hopper's kernels, and none is brought
 * back to bf16. */
static bool hopper_takes_all(const struct mt_backend *be, const struct mt_limits *l) {
  int64_t q = l->heads * l->head_dim, qkv = q + 2 * l->kv_heads * l->head_dim;
  if (be->capability != 90 || l->qformat != MT_Q_FP8 || l->act != MT_BF16) return false;
  if (l->rows < 1 || l->tokens < 1) return false;
  return hopper_takes(l->rows, l->experts, 2 * l->ffn, l->hidden) &&
         hopper_takes(l->rows, l->experts, l->hidden, l->ffn) &&
         hopper_takes(l->tokens, 1, qkv, l->hidden) && hopper_takes(l->tokens, 1, l->hidden, q);
}

/* For weights that dgrad must turn, whichever of the model's is largest. */
static size_t turned_bytes(const struct mt_limits *l) {
  int64_t q = l->heads * l->head_dim, qkv = q + 2 * l->kv_heads * l->head_dim;
  const struct mt_cuda_turned of[] = {mt_cuda_turned_of(l->experts, 2 * l->ffn, l->hidden),
                                      mt_cuda_turned_of(l->experts, l->hidden, l->ffn),
                                      mt_cuda_turned_of(1, qkv, l->hidden),
                                      mt_cuda_turned_of(1, l->hidden, q)};
  size_t most = 0;
  for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
    if (of[i].bytes > most) most = of[i].bytes;
  }
  return most;
}

extern "C" size_t mt_cuda_qlinear_bytes(const struct mt_backend *be, const struct mt_limits *l) {
  size_t item = l->act == MT_F32 ? sizeof(float) : sizeof(bf16);
  size_t count = mt_dequant_elements(l, l->experts);
  if (count == 0) return 0;
  if (hopper_takes_all(be, l)) return turned_bytes(l);
  /* On Blackwell both: what its library declines is brought back. */
  size_t back = count * item + PRODUCTS_BYTES,
         native = mt_cuda_mx_chip(be) ? mt_cuda_mx_bytes(l) : 0;
  return back > native ? back : native;
}

__device__ __forceinline__ float scale_at(const struct mt_qstored &s, int64_t g, int64_t row,
                                          int64_t col) {
  int64_t at = mt_qstored_scale(&s, g, row, col);
  return s.fp8 ? ((const float *)s.scales)[at] : scale_value(((const uint8_t *)s.scales)[at]);
}

/* A copy as stored to [matrices][rows][cols]. */
template <class T>
__global__ void __launch_bounds__(256) restore(const __grid_constant__ struct mt_qstored s, T *to) {
  int64_t g = blockIdx.z, rows = s.rows, cols = s.cols, ld = s.ld;
  const uint8_t *e = s.e + g * rows * ld;
  to += g * rows * cols;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    int64_t c = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 4;
    for (int i = 0; i < 4 && c < cols; i++, c++)
      to[row * cols + c] = from_float<T>(from_e4m3(e[row * ld + c]) * scale_at(s, g, row, c));
  }
}

/* The same, 16 elements a thread, which have one scale, or (columns of MX) one each, side by side.
 */
template <class T, bool ONE_EACH>
__global__ void __launch_bounds__(256)
    restore_wide(const __grid_constant__ struct mt_qstored s, T *to) {
  int64_t g = blockIdx.z, c = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 16;
  int64_t rows = s.rows, cols = s.cols, ld = s.ld;
  const uint8_t *e = s.e + g * rows * ld;
  to += g * rows * cols;
  if (c >= cols) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    pack<uint8_t, 16> in = *(const pack<uint8_t, 16> *)(e + row * ld + c), scale;
    float by = 0, v[wide<T>];
    if (ONE_EACH)
      scale =
          *(const pack<uint8_t, 16> *)((const uint8_t *)s.scales + mt_qstored_scale(&s, g, row, c));
    else
      by = scale_at(s, g, row, c);
#pragma unroll
    for (int i = 0; i < 16; i += wide<T>) {
#pragma unroll
      for (int j = 0; j < wide<T>; j++)
        v[j] = from_e4m3(in.x[i + j]) * (ONE_EACH ? scale_value(scale.x[i + j]) : by);
      store_floats<T, wide<T>>(to + row * cols + c + i, v);
    }
  }
}

/* The same to [matrices][cols][rows]. */
template <class T>
__global__ void __launch_bounds__(STRIP * 8)
    restore_turned(const __grid_constant__ struct mt_qstored s, T *to) {
  __shared__ T tile[STRIP][STRIP + 1];
  int64_t g = blockIdx.z, col0 = (int64_t)blockIdx.x * STRIP;
  int64_t rows = s.rows, cols = s.cols, ld = s.ld;
  const uint8_t *e = s.e + g * rows * ld;
  to += g * rows * cols;
  for (int64_t row0 = (int64_t)blockIdx.y * STRIP; row0 < rows;
       row0 += (int64_t)gridDim.y * STRIP) {
    for (int i = threadIdx.y; i < STRIP; i += 8) {
      int64_t row = row0 + i, col = col0 + threadIdx.x;
      if (row < rows && col < cols)
        tile[i][threadIdx.x] =
            from_float<T>(from_e4m3(e[row * ld + col]) * scale_at(s, g, row, col));
    }
    __syncthreads();
    for (int i = threadIdx.y; i < STRIP; i += 8) {
      int64_t row = row0 + threadIdx.x, col = col0 + i;
      if (row < rows && col < cols) to[col * rows + row] = tile[threadIdx.x][i];
    }
    __syncthreads();
  }
}

static struct mt_qstored row_copy(const struct mt_qtensor *q) {
  return mt_qstored_rows(q, 0, q->dim[q->rank - 2]);
}

/* Rows: the first of the column copy that count. */
static struct mt_qstored col_copy(const struct mt_qtensor *q, int64_t rows) {
  /* FP8 weights are turned as they are, scales too: nothing is won by turning them back. */
  if (q->format == MT_Q_FP8 && q->weight && q->row) return row_copy(q);
  return mt_qstored_cols(q, 0, rows);
}

/* For restore_wide. */
static bool wide_enough(const struct mt_qstored *c) {
  if (c->cols % 16 != 0 || c->ld % 16 != 0 || !aligned_to(c->e, 16)) return false;
  if (c->wide != 1) return true;
  return c->scale_ld % 16 == 0 && c->scale_count % 16 == 0 && aligned_to(c->scales, 16);
}

/* Takes the next part of the scratch and fills it with the operand as it is (not transposed). */
template <class T>
static mt_err bring_back(struct mt_backend *be, const char *op, const struct mt_qstored *c,
                         size_t *used, T **out) {
  void *scratch;
  size_t bytes = (size_t)(c->matrices * c->rows * c->cols) * sizeof(T), at = *used;
  MT_TRY(mt_cuda_scratch(be, op, at + bytes, &scratch));
  *out = (T *)((char *)scratch + at);
  *used = at + (bytes + 255) / 256 * 256;
  if (bytes == 0) return MT_OK;
  unsigned z = (unsigned)c->matrices, most = 32768;
  if (c->turned) {
    int64_t y = div_up(c->rows, STRIP);
    restore_turned<T><<<dim3((unsigned)div_up(c->cols, STRIP), y < most ? (unsigned)y : most, z),
                        dim3(STRIP, 8), 0, mt_cuda_of(be)->stream>>>(*c, *out);
  } else if (wide_enough(c)) {
    auto kernel = c->wide == 1 ? restore_wide<T, true> : restore_wide<T, false>;
    kernel<<<dim3((unsigned)div_up(c->cols, 4096), c->rows < most ? (unsigned)c->rows : most, z),
             256, 0, mt_cuda_of(be)->stream>>>(*c, *out);
  } else {
    restore<T>
        <<<dim3((unsigned)div_up(c->cols, 1024), c->rows < most ? (unsigned)c->rows : most, z), 256,
           0, mt_cuda_of(be)->stream>>>(*c, *out);
  }
  return mt_cuda_launched(op);
}

template <class T> static enum mt_dtype dtype_of(void) {
  return sizeof(T) == sizeof(float) ? MT_F32 : MT_BF16;
}

template <class T> static struct mt_tensor weight_of(const struct mt_qtensor *q, T *data) {
  if (q->rank == 3) return mt_cube(data, dtype_of<T>(), q->dim[0], q->dim[1], q->dim[2]);
  return mt_mat(data, dtype_of<T>(), q->dim[0], q->dim[1]);
}

/* Products of rows on Hopper: w's copy, [g,n,k] as it is read. */
static bool native_rows(const struct mt_backend *be, const struct mt_qtensor *x,
                        const struct mt_qtensor *w, bool col, const struct mt_tensor *c,
                        const int32_t *offsets, int accumulate, struct mt_cuda_qgrouped *p) {
  if (x->format != MT_Q_FP8 || w->format != MT_Q_FP8) return false;
  int last = w->rank - 1;
  *p = {.wgrad = false,
        .offsets = offsets,
        .groups = w->rank == 3 ? (int)w->dim[0] : 1,
        .m = x->dim[0],
        .n = w->dim[col ? last : last - 1],
        .k = w->dim[col ? last - 1 : last],
        .a = x->row,
        .b = col ? w->col : w->row,
        .a_scale = (const float *)x->row_scale,
        .b_scale = (const float *)(col ? w->col_scale : w->row_scale),
        .a_scale_ld = x->scale_ld,
        .c = c->data,
        .ldc = c->ld,
        .c_dtype = c->dtype,
        .accumulate = accumulate};
  return mt_cuda_qgrouped_sm90_takes(be, p);
}

template <class T>
static mt_err forward(struct mt_backend *be, const struct mt_qlinear_fwd_args *a) {
  struct mt_qstored x = row_copy(&a->x), w = row_copy(&a->w);
  size_t used = PRODUCTS_BYTES;
  T *px, *pw;
  MT_TRY(bring_back<T>(be, "qlinear_fwd", &x, &used, &px));
  MT_TRY(bring_back<T>(be, "qlinear_fwd", &w, &used, &pw));
  struct mt_linear_fwd_args l = {mt_mat(px, dtype_of<T>(), x.rows, x.cols), weight_of(&a->w, pw),
                                 a->y, a->offsets};
  return mt_cuda_linear_fwd(be, &l);
}

extern "C" mt_err mt_cuda_qlinear_fwd(struct mt_backend *be, const struct mt_qlinear_fwd_args *a) {
  MT_TRY(mt_check_qlinear_fwd(a));
  MT_TRY(mt_cuda_format("qlinear_fwd", &a->y));
  struct mt_cuda_qgrouped p;
  struct mt_cuda_mx_job j;
  bool done = false;
  if (a->x.dim[0] == 0) return MT_OK;
  if (mt_cuda_mx_chip(be) && mt_cuda_mx_fwd_job(a, &j))
    MT_TRY(mt_cuda_mx_run(be, "qlinear_fwd", &j, &done));
  if (done) return MT_OK;
  if (native_rows(be, &a->x, &a->w, false, &a->y, a->offsets, 0, &p))
    return mt_cuda_qgrouped_sm90(be, &p);
  return a->y.dtype == MT_F32 ? forward<float>(be, a) : forward<bf16>(be, a);
}

template <class T>
static mt_err dgrad(struct mt_backend *be, const struct mt_qlinear_dgrad_args *a) {
  struct mt_qstored dy = row_copy(&a->dy), w = col_copy(&a->w, a->w.dim[a->w.rank - 2]);
  size_t used = PRODUCTS_BYTES;
  T *py, *pw;
  MT_TRY(bring_back<T>(be, "qlinear_dgrad", &dy, &used, &py));
  MT_TRY(bring_back<T>(be, "qlinear_dgrad", &w, &used, &pw));
  struct mt_linear_dgrad_args l = {mt_mat(py, dtype_of<T>(), dy.rows, dy.cols),
                                   weight_of(&a->w, pw), a->dx, a->offsets, a->accumulate};
  return mt_cuda_linear_dgrad(be, &l);
}

/* On Hopper; a weight without a column copy is turned first, some experts at a time. *done false:
 * it takes none of it. */
static mt_err dgrad_native(struct mt_backend *be, const struct mt_qlinear_dgrad_args *a,
                           bool *done) {
  struct mt_qtensor w = a->w;
  struct mt_cuda_qgrouped p;
  int64_t matrices = w.rank == 3 ? w.dim[0] : 1;
  struct mt_cuda_turned t = mt_cuda_turned_of(matrices, w.dim[w.rank - 2], w.dim[w.rank - 1]);
  *done = true;
  if (w.col && native_rows(be, &a->dy, &w, true, &a->dx, a->offsets, a->accumulate, &p))
    return mt_cuda_qgrouped_sm90(be, &p);
  for (int64_t g = 0; !w.col && w.format == MT_Q_FP8 && g < matrices; g += t.at_once) {
    struct mt_qtensor part = w;
    void *scratch;
    if (part.rank == 3) part.dim[0] = matrices - g < t.at_once ? matrices - g : t.at_once;
    MT_TRY(mt_cuda_scratch(be, "qlinear_dgrad", t.bytes, &scratch));
    part.col = (uint8_t *)scratch, part.col_scale = part.col + t.scales_at;
    if (!native_rows(be, &a->dy, &part, true, &a->dx, a->offsets ? a->offsets + g : NULL,
                     a->accumulate, &p))
      break; /* at the first or never: it goes by widths and by more groups than are left */
    MT_TRY(mt_cuda_turn(be, &w, g, &part));
    MT_TRY(mt_cuda_qgrouped_sm90(be, &p));
    if (g + t.at_once >= matrices) return MT_OK;
  }
  *done = false;
  return MT_OK;
}

extern "C" mt_err mt_cuda_qlinear_dgrad(struct mt_backend *be,
                                        const struct mt_qlinear_dgrad_args *a) {
  MT_TRY(mt_check_qlinear_dgrad(a));
  MT_TRY(mt_cuda_format("qlinear_dgrad", &a->dx));
  struct mt_cuda_mx_job j;
  bool done = false;
  if (a->dy.dim[0] == 0) return MT_OK;
  if (mt_cuda_mx_chip(be) && mt_cuda_mx_dgrad_job(a, &j))
    MT_TRY(mt_cuda_mx_run(be, "qlinear_dgrad", &j, &done));
  if (done) return MT_OK;
  MT_TRY(dgrad_native(be, a, &done));
  if (done) return MT_OK;
  return a->dx.dtype == MT_F32 ? dgrad<float>(be, a) : dgrad<bf16>(be, a);
}

static bool native_wgrad(const struct mt_backend *be, const struct mt_qlinear_wgrad_args *a,
                         struct mt_cuda_qgrouped *p) {
  if (a->x.format != MT_Q_FP8 || a->dy.format != MT_Q_FP8) return false;
  /* One group is taken to the end of the columns, of which nothing is promised past the padding. */
  if (!a->offsets && a->x.col_rows != mt_q_col_rows(a->x.dim[0], 1)) return false;
  *p = {.wgrad = true,
        .offsets = a->padded,
        .groups = a->dw.rank == 3 ? (int)a->dw.dim[0] : 1,
        .m = a->dy.dim[1],
        .n = a->x.dim[1],
        .k = a->x.col_rows,
        .a = a->dy.col,
        .b = a->x.col,
        .a_scale = (const float *)a->dy.col_scale,
        .b_scale = (const float *)a->x.col_scale,
        .a_scale_ld = a->dy.dim[1],
        .c = a->dw.data,
        .ldc = a->dw.ld,
        .c_dtype = a->dw.dtype,
        .accumulate = a->accumulate};
  return mt_cuda_qgrouped_sm90_takes(be, p);
}

/* Chips with such products of their own, of no rows too; *done false: it is none of theirs.
 * *summed: sumsq has been made on the way. */
static mt_err wgrad_native(struct mt_backend *be, const char *op,
                           const struct mt_qlinear_wgrad_args *a, bool *done, bool *summed) {
  struct mt_cuda_qgrouped p;
  struct mt_cuda_mx_job j;
  *done = true;
  if (a->x.dim[0] == 0) {
    size_t width = mt_dtype_bytes(a->dw.dtype), rows = (size_t)(mt_count(&a->dw) / a->x.dim[1]);
    if (a->accumulate) return MT_OK;
    return mt_cuda_check(cudaMemset2DAsync(a->dw.data, (size_t)a->dw.ld * width, 0,
                                           (size_t)a->x.dim[1] * width, rows,
                                           mt_cuda_of(be)->stream),
                         op);
  }
  if (native_wgrad(be, a, &p)) {
    *summed = a->sumsq && mt_cuda_qgrouped_sm90_sums(be, &p);
    if (*summed) p.sumsq = a->sumsq;
    return mt_cuda_qgrouped_sm90(be, &p);
  }
  *done = false;
  if (!mt_cuda_mx_chip(be) || !mt_cuda_mx_wgrad_job(a, &j)) return MT_OK;
  return mt_cuda_mx_run(be, op, &j, done);
}

/* Groups are what they are in the column copies, padding included: its rows are zeros. */
extern "C" mt_err mt_cuda_qlinear_wgrad(struct mt_backend *be,
                                        const struct mt_qlinear_wgrad_args *a) {
  const char *op = "qlinear_wgrad";
  bool done, summed = false;
  MT_TRY(mt_check_qlinear_wgrad(a));
  MT_TRY(mt_cuda_format(op, &a->dw));
  MT_TRY(wgrad_native(be, op, a, &done, &summed));
  if (done) {
    if (!a->sumsq || summed) return MT_OK;
    struct mt_tensor all = mt_vec(a->dw.data, a->dw.dtype, mt_count(&a->dw));
    struct mt_sumsq_args sum = {.tensors = &all, .tensor_count = 1};
    sum.out = a->sumsq;
    return mt_cuda_sumsq(be, &sum);
  }
  int64_t rows = a->offsets ? a->x.col_rows : a->x.dim[0];
  struct mt_qstored dy = col_copy(&a->dy, rows), x = col_copy(&a->x, rows);
  size_t used = PRODUCTS_BYTES;
  bf16 *py, *px;
  MT_TRY(bring_back<bf16>(be, op, &dy, &used, &py));
  MT_TRY(bring_back<bf16>(be, op, &x, &used, &px));
  struct mt_linear_wgrad_args l = {mt_mat(py, MT_BF16, rows, a->dy.dim[1]),
                                   mt_mat(px, MT_BF16, rows, a->x.dim[1]),
                                   a->dw,
                                   a->padded,
                                   a->accumulate,
                                   a->sumsq};
  return mt_cuda_linear_wgrad(be, &l);
}
