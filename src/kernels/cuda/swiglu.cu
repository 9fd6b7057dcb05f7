/* SwiGLU. Formulas: docs/math.md, "SwiGLU". One block a row, bound by memory. */
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/swiglu.cuh"

struct swiglu_rows {
  int64_t f;
  const float *row_prob;    /* [R] or NULL */
  const int32_t *row_count; /* [1] or NULL */
  float *drow_prob;         /* [R] or NULL */
};

template <class T, int V>
__global__ void __launch_bounds__(256)
    swiglu_fwd(struct mat<const T> gate_up, struct mat<T> h, struct swiglu_rows p) {
  int64_t r = blockIdx.x;
  if (p.row_count && r >= *p.row_count) return;
  const T *gate = row_of(gate_up, r), *up = gate + p.f;
  T *to = row_of(h, r);
  float weight = p.row_prob ? p.row_prob[r] : 1.0f;
  for (int64_t i = threadIdx.x * V; i < p.f; i += blockDim.x * V) {
    float g[V], u[V];
    load_floats<T, V>(gate + i, g);
    load_floats<T, V>(up + i, u);
#pragma unroll
    for (int j = 0; j < V; j++) u[j] = swiglu_at<T>(g[j], u[j], weight);
    store_floats<T, V>(to + i, u);
  }
}

/* dgate_up may be gate_up and h may be dh: a thread reads its elements before it writes them, and
 * no other thread touches them. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    swiglu_bwd(struct mat<const T> dh, struct mat<const T> gate_up, struct mat<T> dgate_up,
               struct mat<T> h, struct swiglu_rows p) {
  __shared__ float shared[33];
  int64_t r = blockIdx.x;
  if (p.row_count && r >= *p.row_count) return;
  const T *gate = row_of(gate_up, r), *up = gate + p.f, *pdh = row_of(dh, r);
  T *dgate = row_of(dgate_up, r), *dup = dgate + p.f, *ph = h.p ? row_of(h, r) : NULL;
  float weight = p.row_prob ? p.row_prob[r] : 1.0f, dot = 0;
  for (int64_t i = threadIdx.x * V; i < p.f; i += blockDim.x * V) {
    float g[V], u[V], d[V], out[V];
    load_floats<T, V>(gate + i, g);
    load_floats<T, V>(up + i, u);
    load_floats<T, V>(pdh + i, d);
#pragma unroll
    for (int j = 0; j < V; j++) {
      struct swiglu_gradient d_at = swiglu_bwd_at<T>(g[j], u[j], d[j], weight, &dot);
      g[j] = d_at.gate, u[j] = d_at.up, out[j] = d_at.h;
    }
    store_floats<T, V>(dgate + i, g);
    store_floats<T, V>(dup + i, u);
    if (ph) store_floats<T, V>(ph + i, out);
  }
  if (!p.drow_prob) return;
  dot = block_sum(dot, shared);
  if (threadIdx.x == 0) p.drow_prob[r] = dot;
}

/* The second half of a row starts F elements on: it is aligned where h is. */
static bool halves_wide(const struct mt_tensor *gate_up, const struct mt_tensor *h) {
  return rows_wide(gate_up) && h->dim[1] * (int64_t)mt_dtype_bytes(h->dtype) % 16 == 0;
}

extern "C" mt_err mt_cuda_swiglu_fwd(struct mt_backend *be, const struct mt_swiglu_fwd_args *a) {
  MT_TRY(mt_check_swiglu_fwd(a));
  MT_TRY(mt_cuda_format("swiglu_fwd", &a->h));
  int64_t r = a->h.dim[0], f = a->h.dim[1];
  if (r == 0 || f == 0) return MT_OK;
  struct swiglu_rows p = {f, (const float *)a->row_prob.data, a->row_count, NULL};
  MT_CUDA_BY_FORMAT(a->h.dtype, {
    MT_CUDA_BY_WIDTH(halves_wide(&a->gate_up, &a->h) && rows_wide(&a->h), {
      swiglu_fwd<T, V><<<(unsigned)r, row_threads(f, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->gate_up), mat_of<T>(&a->h), p);
    });
  });
  return mt_cuda_launched("swiglu_fwd");
}

extern "C" mt_err mt_cuda_swiglu_bwd(struct mt_backend *be, const struct mt_swiglu_bwd_args *a) {
  MT_TRY(mt_check_swiglu_bwd(a));
  MT_TRY(mt_cuda_format("swiglu_bwd", &a->dh));
  int64_t r = a->dh.dim[0], f = a->dh.dim[1];
  if (r == 0) return MT_OK;
  struct swiglu_rows p = {f, (const float *)a->row_prob.data, a->row_count,
                          (float *)a->drow_prob.data};
  bool fits = halves_wide(&a->gate_up, &a->dh) && halves_wide(&a->dgate_up, &a->dh) &&
              rows_wide(&a->dh) && rows_wide(&a->h);
  MT_CUDA_BY_FORMAT(a->dh.dtype, {
    MT_CUDA_BY_WIDTH(fits, {
      swiglu_bwd<T, V><<<(unsigned)r, row_threads(f, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->dh), mat_of<const T>(&a->gate_up), mat_of<T>(&a->dgate_up),
          mat_of<T>(&a->h), p);
    });
  });
  return mt_cuda_launched("swiglu_bwd");
}
