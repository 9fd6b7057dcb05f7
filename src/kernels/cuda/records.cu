/* Rows that travel in 8 bits, a record each: a warp has 128 columns of a row, four a lane. */
#include "kernels/cuda/quantize.cuh"

enum { STRIP = 128, THREADS = 256, WARPS = THREADS / 32 };

template <class T, bool FP8>
__global__ void __launch_bounds__(THREADS)
    pack_rows(struct mat<const T> x, const int32_t *__restrict__ row_source, int top_k,
              int64_t rows, int64_t cols, bool is_wide, uint8_t *records, int64_t bytes) {
  int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, strip = (int64_t)blockIdx.y * STRIP;
  int lane = threadIdx.x % 32;
  if (r >= rows) return;
  int64_t source = row_source ? row_source[r] : r;
  if (source < 0) return;
  if (row_source) source /= top_k;
  int64_t first = strip + lane * 4, blocks = (cols + (FP8 ? 127 : 31)) / (FP8 ? 128 : 32);
  uint8_t *to = records + r * bytes;
  float v[4] = {0, 0, 0, 0};
  if (first < cols) read_four<T>(row_of(x, source) + first, cols - first, is_wide, v);
  unsigned byte = row_scale_byte<FP8>(v);
  float by = scale_inverse(byte);
  if (row_leader<FP8>() && first < cols) to[cols + first / (FP8 ? 128 : 32)] = (uint8_t)byte;
  write_four(to + first, four_e4m3(v[0] * by, v[1] * by, v[2] * by, v[3] * by),
             (int)min((int64_t)4, cols - first));
  if (blockIdx.y == 0 && cols + blocks + lane < bytes) to[cols + blocks + lane] = 0;
}

template <class T, bool FP8>
__global__ void __launch_bounds__(THREADS)
    unpack_rows(const uint8_t *__restrict__ records, int64_t bytes,
                const int32_t *__restrict__ source, struct mat<T> xs, int64_t rows, int64_t cols,
                bool is_wide) {
  int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  int64_t first = (int64_t)blockIdx.y * STRIP + threadIdx.x % 32 * 4;
  if (r >= rows || first >= cols) return;
  const uint8_t *from = records + (source ? source[r] : r) * bytes;
  float scale = scale_value(from[cols + first / (FP8 ? 128 : 32)]), v[4];
  T *to = row_of(xs, r) + first;
  if (first + 4 <= cols) {
    uchar4 e = *(const uchar4 *)(from + first);
    v[0] = from_e4m3(e.x) * scale, v[1] = from_e4m3(e.y) * scale;
    v[2] = from_e4m3(e.z) * scale, v[3] = from_e4m3(e.w) * scale;
    if (is_wide) {
      store_floats<T, 4>(to, v);
      return;
    }
    for (int i = 0; i < 4; i++) to[i] = from_float<T>(v[i]);
    return;
  }
  for (int i = 0; first + i < cols; i++) to[i] = from_float<T>(from_e4m3(from[first + i]) * scale);
}

/* Whether four neighbours from a multiple of four on can be read as one. */
static bool fours(const struct mt_tensor *t) {
  size_t unit = 4 * mt_dtype_bytes(t->dtype);
  return (uintptr_t)t->data % unit == 0 && t->ld % 4 == 0;
}

static dim3 grid_of(int64_t rows, int64_t cols) {
  return dim3((unsigned)div_up(rows, WARPS), (unsigned)div_up(cols, STRIP));
}

extern "C" mt_err mt_cuda_pack_rows(struct mt_backend *be, const struct mt_pack_rows_args *a) {
  MT_TRY(mt_check_pack_rows(a));
  MT_TRY(mt_cuda_format("pack_rows", &a->x));
  int64_t cols = a->x.dim[1], bytes = mt_q_record_bytes(a->format, cols);
  if (a->row_count == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->x.dtype, {
    auto kernel = a->format == MT_Q_FP8 ? pack_rows<T, true> : pack_rows<T, false>;
    kernel<<<grid_of(a->row_count, cols), THREADS, 0, mt_cuda_of(be)->stream>>>(
        mat_of<const T>(&a->x), a->row_source, a->top_k, a->row_count, cols, fours(&a->x),
        a->records, bytes);
  });
  return mt_cuda_launched("pack_rows");
}

extern "C" mt_err mt_cuda_unpack_rows(struct mt_backend *be, const struct mt_unpack_rows_args *a) {
  MT_TRY(mt_check_unpack_rows(a));
  MT_TRY(mt_cuda_format("unpack_rows", &a->xs));
  int64_t rows = a->xs.dim[0], cols = a->xs.dim[1], bytes = mt_q_record_bytes(a->format, cols);
  if (rows == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->xs.dtype, {
    auto kernel = a->format == MT_Q_FP8 ? unpack_rows<T, true> : unpack_rows<T, false>;
    kernel<<<grid_of(rows, cols), THREADS, 0, mt_cuda_of(be)->stream>>>(
        a->records, bytes, a->source, mat_of<T>(&a->xs), rows, cols, fours(&a->xs));
  });
  return mt_cuda_launched("unpack_rows");
}
