/* Rotary positions and the cache of keys and values. Formulas: docs/math.md, "RoPE". */
#include "kernels/cuda/rows.cuh"

/* By value in the kernel's parameters: the caller's array may be gone when the kernel runs. */
enum { MOST_PAIRS = 128 };
struct frequencies {
  double inv[MOST_PAIRS];
};

/* Angles reach thousands of radians: in float32 their error alone would be 1e-4. */
__global__ void rope_angles(const int32_t *__restrict__ positions, struct frequencies f,
                            int64_t rows, int pairs, struct mat<float> cos_out,
                            struct mat<float> sin_out) {
  int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, t = n / pairs;
  int i = (int)(n % pairs);
  if (t >= rows) return;
  double s, c;
  sincos((double)positions[t] * f.inv[i], &s, &c);
  row_of(cos_out, t)[i] = (float)c;
  row_of(sin_out, t)[i] = (float)s;
}

extern "C" mt_err mt_cuda_rope_table(struct mt_backend *be, const struct mt_rope_table_args *a) {
  MT_TRY(mt_check_rope_table(a));
  MT_TRY(mt_cuda_format("rope_table", &a->cos));
  int64_t rows = a->cos.dim[0], pairs = a->cos.dim[1];
  if (pairs > MOST_PAIRS) {
    return mt_fail(MT_EUNSUPPORTED, "rope_table: %lld pairs a head; the cuda backend takes %d",
                   (long long)pairs, MOST_PAIRS);
  }
  if (rows == 0 || pairs == 0) return MT_OK;
  struct frequencies f = {};
  for (int64_t i = 0; i < pairs; i++) f.inv[i] = a->inv_freq[i];
  rope_angles<<<(unsigned)div_up(rows * pairs, 128), 128, 0, mt_cuda_of(be)->stream>>>(
      a->positions, f, rows, (int)pairs, mat_of<float>(&a->cos), mat_of<float>(&a->sin));
  return mt_cuda_launched("rope_table");
}

struct heads {
  int kv, q_per_kv, dim;
};

/* One block a token; a thread turns V pairs of one head at a time. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    rope_rows(struct mat<T> qkv, struct mat<const float> cos_in, struct mat<const float> sin_in,
              struct heads n, float sign) {
  int half = n.dim / 2, steps = half / V, turned = n.q_per_kv + 1;
  T *row = row_of(qkv, blockIdx.x);
  const float *co = row_of(cos_in, blockIdx.x), *si = row_of(sin_in, blockIdx.x);
  for (int k = threadIdx.x; k < n.kv * turned * steps; k += blockDim.x) {
    int head = k / steps, i = k % steps * V;
    /* The value head of each group is passed over. */
    T *x = row + (int64_t)(head / turned * (turned + 1) + head % turned) * n.dim + i;
    float a[V], b[V], c[V], s[V], left[V], right[V];
    load_floats<T, V>(x, a);
    load_floats<T, V>(x + half, b);
    load_stats<V>(co + i, c);
    load_stats<V>(si + i, s);
#pragma unroll
    for (int j = 0; j < V; j++) {
      left[j] = a[j] * c[j] - b[j] * sign * s[j];
      right[j] = b[j] * c[j] + a[j] * sign * s[j];
    }
    store_floats<T, V>(x, left);
    store_floats<T, V>(x + half, right);
  }
}

static bool divides_16(int64_t elements, enum mt_dtype dtype) {
  return elements * (int64_t)mt_dtype_bytes(dtype) % 16 == 0;
}

extern "C" mt_err mt_cuda_rope(struct mt_backend *be, const struct mt_rope_args *a) {
  MT_TRY(mt_check_rope(a));
  MT_TRY(mt_cuda_format("rope", &a->qkv));
  int64_t t = a->qkv.dim[0], half = a->head_dim / 2;
  if (t == 0 || half == 0) return MT_OK;
  struct heads n = {a->kv_heads, a->q_per_kv, a->head_dim};
  bool fits = rows_wide(&a->qkv) && divides_16(half, a->qkv.dtype) && rows_wide(&a->cos) &&
              rows_wide(&a->sin);
  MT_CUDA_BY_FORMAT(a->qkv.dtype, {
    MT_CUDA_BY_WIDTH(fits, {
      unsigned threads = row_threads((int64_t)n.kv * (n.q_per_kv + 1) * half, V);
      rope_rows<T, V><<<(unsigned)t, threads, 0, mt_cuda_of(be)->stream>>>(
          mat_of<T>(&a->qkv), mat_of<const float>(&a->cos), mat_of<const float>(&a->sin), n,
          a->inverse ? -1.0f : 1.0f);
    });
  });
  return mt_cuda_launched("rope");
}

/* One block a token: K, then V, of every group. */
template <class T, int V>
__global__ void __launch_bounds__(256) kv_rows(struct mat<const T> qkv, struct mat<T> k_out,
                                               struct mat<T> v_out, int start, struct heads n) {
  const T *row = row_of(qkv, blockIdx.x);
  T *k = row_of(k_out, start + (int64_t)blockIdx.x),
    *v = row_of(v_out, start + (int64_t)blockIdx.x);
  for (int i = threadIdx.x * V; i < n.kv * n.dim; i += blockDim.x * V) {
    const T *from = row + (int64_t)(i / n.dim * (n.q_per_kv + 2) + n.q_per_kv) * n.dim + i % n.dim;
    *reinterpret_cast<pack<T, V> *>(k + i) = *reinterpret_cast<const pack<T, V> *>(from);
    *reinterpret_cast<pack<T, V> *>(v + i) = *reinterpret_cast<const pack<T, V> *>(from + n.dim);
  }
}

extern "C" mt_err mt_cuda_kv_append(struct mt_backend *be, const struct mt_kv_append_args *a) {
  MT_TRY(mt_check_kv_append(a));
  MT_TRY(mt_cuda_format("kv_append", &a->qkv));
  int64_t t = a->qkv.dim[0], width = (int64_t)a->kv_heads * a->head_dim;
  if (t == 0 || width == 0) return MT_OK;
  struct heads n = {a->kv_heads, a->q_per_kv, a->head_dim};
  bool fits = rows_wide(&a->qkv) && rows_wide(&a->k) && rows_wide(&a->v) &&
              divides_16(a->head_dim, a->qkv.dtype);
  MT_CUDA_BY_FORMAT(a->qkv.dtype, {
    MT_CUDA_BY_WIDTH(fits, {
      kv_rows<T, V><<<(unsigned)t, row_threads(width, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->qkv), mat_of<T>(&a->k), mat_of<T>(&a->v), a->start, n);
    });
  });
  return mt_cuda_launched("kv_append");
}
