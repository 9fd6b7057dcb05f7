/* Embedding lookup, its gradient, and the residual add: bound by memory. */
#include "kernels/cuda/rows.cuh"

/* One block a token. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    embed_rows(const int32_t *__restrict__ ids, struct mat<const T> table, struct mat<T> out,
               int64_t h) {
  const T *from = row_of(table, ids[blockIdx.x]);
  T *to = row_of(out, blockIdx.x);
  for (int64_t i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    *reinterpret_cast<pack<T, V> *>(to + i) = *reinterpret_cast<const pack<T, V> *>(from + i);
  }
}

extern "C" mt_err mt_cuda_embed_fwd(struct mt_backend *be, const struct mt_embed_fwd_args *a) {
  MT_TRY(mt_check_embed_fwd(a));
  MT_TRY(mt_cuda_format("embed_fwd", &a->out));
  int64_t t = a->out.dim[0], h = a->out.dim[1];
  if (t == 0 || h == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->out.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->table) && rows_wide(&a->out), {
      embed_rows<T, V><<<(unsigned)t, row_threads(h, V), 0, mt_cuda_of(be)->stream>>>(
          a->ids, mat_of<const T>(&a->table), mat_of<T>(&a->out), h);
    });
  });
  return mt_cuda_launched("embed_fwd");
}

/* The gradient of the table: every id's tokens are listed, the list is put in token order, and one
 * block (for each stretch of columns) adds them up in that order. Integer atomics place tokens in
 * the lists; where they land depends on timing, what is added in which order does not. */
struct occurrences {
  int32_t *count;  /* [V] tokens with this id */
  int32_t *used;   /* [1] entries of list that are given out; right after count: zeroed with it */
  int32_t *begin;  /* [V] first entry of the id's list */
  int32_t *slot;   /* [T] the token's entry within the list, as the atomics had it */
  int32_t *list;   /* [T] */
  int32_t *sorted; /* [T] the same lists in token order */
};

static size_t occurrences_ints(int64_t vocab, int64_t tokens) {
  return (size_t)(2 * vocab + 1 + 3 * tokens);
}

extern "C" size_t mt_cuda_embed_bytes(const struct mt_limits *l) {
  return occurrences_ints(l->vocab, l->tokens) * sizeof(int32_t);
}

__global__ void count_ids(const int32_t *ids, const int32_t *valid, int64_t tokens,
                          struct occurrences o) {
  int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (t < tokens && t < *valid) o.slot[t] = atomicAdd(&o.count[ids[t]], 1);
}

/* The token that came first to the counter takes room for its id. */
__global__ void place_ids(const int32_t *ids, const int32_t *valid, int64_t tokens,
                          struct occurrences o) {
  int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= tokens || t >= *valid || o.slot[t] != 0) return;
  o.begin[ids[t]] = atomicAdd(o.used, o.count[ids[t]]);
}

__global__ void list_ids(const int32_t *ids, const int32_t *valid, int64_t tokens,
                         struct occurrences o) {
  int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (t < tokens && t < *valid) o.list[o.begin[ids[t]] + o.slot[t]] = (int32_t)t;
}

/* One warp a token: its place in order is the number of earlier tokens in its list. The work is the
 * sum of squares of the ids' counts: small for text, and spread over all warps when it is not. */
__global__ void sort_ids(const int32_t *ids, const int32_t *valid, int64_t tokens,
                         struct occurrences o) {
  int64_t t = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  int lane = threadIdx.x % 32;
  if (t >= tokens || t >= *valid) return;
  int32_t begin = o.begin[ids[t]], count = o.count[ids[t]], before = 0;
  for (int32_t i = lane; i < count; i += 32) before += o.list[begin + i] < (int32_t)t;
  before = __reduce_add_sync(0xffffffffu, before);
  if (lane == 0) o.sorted[begin + before] = (int32_t)t;
}

/* Block (t, stretch of columns) adds up the id of token t where t holds the id's first slot. */
template <class T, class G, int V>
__global__ void __launch_bounds__(128)
    add_rows_by_id(const int32_t *ids, const int32_t *valid, struct occurrences o,
                   struct mat<const T> dout, struct mat<G> dtable, int64_t h, int accumulate) {
  int64_t t = blockIdx.x, i = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (t >= *valid || o.slot[t] != 0 || i >= h) return;
  const int32_t *list = o.sorted + o.begin[ids[t]];
  int32_t count = o.count[ids[t]];
  float sum[V] = {0};
#pragma unroll 4
  for (int32_t n = 0; n < count; n++) {
    float x[V];
    load_floats<T, V>(row_of(dout, list[n]) + i, x);
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] += x[j];
  }
  G *to = row_of(dtable, ids[t]) + i;
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (accumulate) sum[j] += to_float(to[j]);
    to[j] = from_float<G>(sum[j]);
  }
}

static mt_err zero_rows(struct mt_backend *be, const struct mt_tensor *t) {
  size_t item = mt_dtype_bytes(t->dtype);
  if (mt_count(t) == 0) return MT_OK;
  return mt_cuda_check(cudaMemset2DAsync(t->data, (size_t)t->ld * item, 0, (size_t)t->dim[1] * item,
                                         (size_t)t->dim[0], mt_cuda_of(be)->stream),
                       "embed_bwd: zeroing the table's gradient");
}

static mt_err sort_by_id(struct mt_backend *be, const struct mt_embed_bwd_args *a,
                         struct occurrences *o) {
  int64_t t = a->dout.dim[0], v = a->dtable.dim[0];
  cudaStream_t s = mt_cuda_of(be)->stream;
  void *scratch;
  MT_TRY(mt_cuda_scratch(be, "embed_bwd", occurrences_ints(v, t) * sizeof(int32_t), &scratch));
  o->count = (int32_t *)scratch;
  o->used = o->count + v;
  o->begin = o->used + 1;
  o->slot = o->begin + v;
  o->list = o->slot + t;
  o->sorted = o->list + t;
  MT_TRY(mt_cuda_check(cudaMemsetAsync(o->count, 0, (size_t)(v + 1) * sizeof(int32_t), s),
                       "embed_bwd: zeroing counts"));
  unsigned blocks = (unsigned)div_up(t, 256);
  count_ids<<<blocks, 256, 0, s>>>(a->ids, a->valid_count, t, *o);
  MT_TRY(mt_cuda_launched("embed_bwd"));
  place_ids<<<blocks, 256, 0, s>>>(a->ids, a->valid_count, t, *o);
  MT_TRY(mt_cuda_launched("embed_bwd"));
  list_ids<<<blocks, 256, 0, s>>>(a->ids, a->valid_count, t, *o);
  MT_TRY(mt_cuda_launched("embed_bwd"));
  sort_ids<<<(unsigned)div_up(t, 8), 256, 0, s>>>(a->ids, a->valid_count, t, *o);
  return mt_cuda_launched("embed_bwd");
}

extern "C" mt_err mt_cuda_embed_bwd(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  MT_TRY(mt_check_embed_bwd(a));
  MT_TRY(mt_cuda_format("embed_bwd", &a->dout));
  int64_t t = a->dout.dim[0], h = a->dtable.dim[1];
  if (!a->accumulate) MT_TRY(zero_rows(be, &a->dtable));
  if (t == 0 || h == 0) return MT_OK;
  struct occurrences o;
  MT_TRY(sort_by_id(be, a, &o));
  MT_CUDA_BY_FORMAT(a->dout.dtype, {
    MT_CUDA_BY_GRAD(a->dtable.dtype, {
      MT_CUDA_BY_WIDTH(rows_wide(&a->dout), {
        dim3 grid((unsigned)t, (unsigned)div_up(h, 128 * V));
        add_rows_by_id<T, G, V><<<grid, 128, 0, mt_cuda_of(be)->stream>>>(
            a->ids, a->valid_count, o, mat_of<const T>(&a->dout), mat_of<G>(&a->dtable), h,
            a->accumulate);
      });
    });
  });
  return mt_cuda_launched("embed_bwd");
}

/* y may be a or b: each element is read and written by one thread. */
template <class T, int V>
__global__ void __launch_bounds__(256)
    add_rows(struct mat<const T> a, struct mat<const T> b, struct mat<T> y, int64_t h) {
  const T *pa = row_of(a, blockIdx.x), *pb = row_of(b, blockIdx.x);
  T *py = row_of(y, blockIdx.x);
  for (int64_t i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    float va[V], vb[V];
    load_floats<T, V>(pa + i, va);
    load_floats<T, V>(pb + i, vb);
#pragma unroll
    for (int j = 0; j < V; j++) va[j] += vb[j];
    store_floats<T, V>(py + i, va);
  }
}

extern "C" mt_err mt_cuda_add(struct mt_backend *be, const struct mt_add_args *a) {
  MT_TRY(mt_check_add(a));
  MT_TRY(mt_cuda_format("add", &a->y));
  int64_t t = a->y.dim[0], h = a->y.dim[1];
  if (t == 0 || h == 0) return MT_OK;
  MT_CUDA_BY_FORMAT(a->y.dtype, {
    MT_CUDA_BY_WIDTH(rows_wide(&a->a) && rows_wide(&a->b) && rows_wide(&a->y), {
      add_rows<T, V><<<(unsigned)t, row_threads(h, V), 0, mt_cuda_of(be)->stream>>>(
          mat_of<const T>(&a->a), mat_of<const T>(&a->b), mat_of<T>(&a->y), h);
    });
  });
  return mt_cuda_launched("add");
}
