/* What operations on rows share: views of matrices, the width of an access, sums over partial
 * rows. */
#ifndef MT_KERNELS_CUDA_ROWS_CUH
#define MT_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/device.cuh"

/* What a kernel needs of a matrix, or of a vector (then ld says nothing). */
template <class T> struct mat {
  T *p;
  int64_t ld;
};
template <class T> static inline struct mat<T> mat_of(const struct mt_tensor *t) {
  return {(T *)t->data, t->ld};
} template <class T> __device__ __forceinline__ T *row_of(struct mat<T> m, int64_t row) {
  return m.p + row * m.ld;
}

/* Whether the tensor's rows can be read and written 16 bytes at a time; an absent one can. */
static inline bool rows_wide(const struct mt_tensor *t) {
  if (!t->data) return true;
  int64_t item = (int64_t)mt_dtype_bytes(t->dtype);
  return aligned_to(t->data, 16) && t->dim[t->rank - 1] * item % 16 == 0 &&
         (t->rank == 1 || t->ld * item % 16 == 0);
}

/* Inside MT_CUDA_BY_FORMAT: runs the statements with V elements of T to an access. */
#define MT_CUDA_BY_WIDTH(is_wide, ...)                                                             \
  do {                                                                                             \
    if (is_wide) {                                                                                 \
      constexpr int V = wide<T>;                                                                   \
      __VA_ARGS__                                                                                  \
    } else {                                                                                       \
      constexpr int V = 1;                                                                         \
      __VA_ARGS__                                                                                  \
    }                                                                                              \
  } while (0)

/* Runs the statements with G as the element type of a parameter's gradient. */
#define MT_CUDA_BY_GRAD(dtype, ...)                                                                \
  do {                                                                                             \
    if ((dtype) == MT_F32) {                                                                       \
      using G = float;                                                                             \
      __VA_ARGS__                                                                                  \
    } else {                                                                                       \
      using G = bf16;                                                                              \
      __VA_ARGS__                                                                                  \
    }                                                                                              \
  } while (0)

/* A pack as one store: the compiler splits the assignment of a pack that lived across branches into
 * words, but it leaves assembly alone. p is global memory. */
template <class T, int V> __device__ __forceinline__ void store_pack(T *p, const pack<T, V> &v) {
  if constexpr (sizeof v == sizeof(uint4)) {
    uint4 word;
    memcpy(&word, &v, sizeof word);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w)
                 : "memory");
  } else if constexpr (sizeof v == sizeof(uint2)) {
    uint2 word;
    memcpy(&word, &v, sizeof word);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(word.x), "r"(word.y) : "memory");
  } else {
    *reinterpret_cast<pack<T, V> *>(p) = v;
  }
}
template <class T, int V> __device__ __forceinline__ void store_row(T *p, const float (&in)[V]) {
  pack<T, V> v;
#pragma unroll
  for (int i = 0; i < V; i++) v.x[i] = from_float<T>(in[i]);
  store_pack<T, V>(p, v);
}

/* V float32 statistics that lie beside V activations: at most 16 bytes an access. */
template <int V> __device__ __forceinline__ void load_stats(const float *p, float (&out)[V]) {
  constexpr int W = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    pack<float, W> v = *reinterpret_cast<const pack<float, W> *>(p + i);
#pragma unroll
    for (int j = 0; j < W; j++) out[i + j] = v.x[j];
  }
}
template <int V> __device__ __forceinline__ void store_stats(float *p, const float (&in)[V]) {
  constexpr int W = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    pack<float, W> v;
#pragma unroll
    for (int j = 0; j < W; j++) v.x[j] = in[i + j];
    store_pack<float, W>(p + i, v);
  }
}

/* Threads of a block that walks one row, `width` elements a thread and step. */
static inline unsigned row_threads(int64_t cols, int width) {
  int64_t n = ((cols + width - 1) / width + 31) / 32 * 32;
  return n < 32 ? 32 : n > 256 ? 256 : (unsigned)n;
}

static inline int64_t div_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

enum { COLUMN_STRANDS = 8 };

/* out[i / cols][i % cols] (acc) = sum over p of partial[p][i], i < n. Each of 8 strands takes every
 * eighth p, then the strands are added in order: the same bits each time. */
template <class G>
__global__ void __launch_bounds__(32 * COLUMN_STRANDS)
    column_sums(const float *__restrict__ partial, int parts, int64_t n, struct mat<G> out,
                int64_t cols, int accumulate) {
  __shared__ float strand[COLUMN_STRANDS][32];
  int64_t i = (int64_t)blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (i < n) {
#pragma unroll 4
    for (int p = threadIdx.y; p < parts; p += COLUMN_STRANDS) sum += partial[p * n + i];
  }
  strand[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= n) return;
  for (int s = 1; s < COLUMN_STRANDS; s++) sum += strand[s][threadIdx.x];
  G *to = row_of(out, i / cols) + i % cols;
  *to = from_float<G>(accumulate ? to_float(*to) + sum : sum);
}

/* The second stage of sums over rows: out is a gradient or statistic of n elements in all. */
static inline mt_err sum_columns(struct mt_backend *be, const char *op, const float *partial,
                                 int parts, const struct mt_tensor *out, int accumulate) {
  int64_t n = mt_count(out);
  if (n == 0) return MT_OK;
  MT_CUDA_BY_GRAD(out->dtype, {
    column_sums<G>
        <<<(unsigned)div_up(n, 32), dim3(32, COLUMN_STRANDS), 0, mt_cuda_of(be)->stream>>>(
            partial, parts, n, mat_of<G>(out), out->dim[out->rank - 1], accumulate);
  });
  return mt_cuda_launched(op);
}

#endif
