/* What ranks add up, and the order of what they have sent. */
#include "kernels/cuda/rows.cuh"

enum { PLAN_THREADS = 128, JOIN_THREADS = 256, SUM_THREADS = 256 };

struct arrivals {
  const int32_t *sent; /* [ranks][experts+1] */
  int ranks, experts;
  int64_t rows;
  int32_t *offsets, *order, *back;
};

/* Integers: any order of adding gives the same. */
static __device__ int32_t block_total(int32_t x, int32_t *shared) {
  x = __reduce_add_sync(0xffffffffu, x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  int32_t sum = 0;
  for (int w = 0; w < PLAN_THREADS / 32; w++) sum += shared[w];
  __syncthreads();
  return sum;
}

/* A block a sender and expert: what lies before its rows in both orders, then its rows. */
static __global__ void __launch_bounds__(PLAN_THREADS) place_arrivals(struct arrivals a) {
  __shared__ int32_t shared[PLAN_THREADS / 32];
  int i = (int)blockIdx.x / a.experts, e = (int)blockIdx.x % a.experts, wide = a.experts + 1;
  int32_t arrived = 0, first = 0, of_expert = 0;
  for (int p = threadIdx.x; p < a.ranks; p += PLAN_THREADS) {
    const int32_t *sent = a.sent + (int64_t)p * wide;
    if (p < i) arrived += sent[a.experts] - sent[0];
    of_expert += sent[e] - sent[0]; /* rows of earlier experts, from anyone */
    if (p < i) first += sent[e + 1] - sent[e];
  }
  arrived = block_total(arrived, shared);
  of_expert = block_total(of_expert, shared);
  first = block_total(first, shared) + of_expert;
  const int32_t *own = a.sent + (int64_t)i * wide;
  arrived += own[e] - own[0];
  int32_t rows = own[e + 1] - own[e];
  for (int32_t n = threadIdx.x; n < rows; n += PLAN_THREADS) {
    if (first + n >= a.rows || arrived + n >= a.rows) break;
    a.order[first + n] = arrived + n;
    a.back[arrived + n] = first + n;
  }
  if (threadIdx.x != 0) return;
  if (i == 0) a.offsets[e] = of_expert;
  if (i == a.ranks - 1 && e == a.experts - 1) a.offsets[a.experts] = first + rows;
}

extern "C" mt_err mt_cuda_arrival_plan(struct mt_backend *be,
                                       const struct mt_arrival_plan_args *a) {
  MT_TRY(mt_check_arrival_plan(a));
  mt_cuda_counts_forget(be, a->offsets, (size_t)(a->expert_count + 1) * sizeof(int32_t));
  struct arrivals p = {a->sent,    a->rank_count, a->expert_count, a->row_count,
                       a->offsets, a->order,      a->back};
  place_arrivals<<<(unsigned)(a->rank_count * a->expert_count), PLAN_THREADS, 0,
                   mt_cuda_of(be)->stream>>>(p);
  return mt_cuda_launched("arrival_plan");
}

/* A thread a number of each kind; the last of the counts is that of the tokens. */
static __global__ void __launch_bounds__(JOIN_THREADS)
    join_records(const char *records, size_t record, int ranks, int n, float *aux_sums,
                 int32_t *aux_count, int32_t *valid_count) {
  for (int e = threadIdx.x; e < n; e += JOIN_THREADS) {
    float sum = 0;
    int32_t count = 0;
    for (int i = 0; i < ranks; i++) {
      const char *at = records + record * i;
      sum += ((const float *)at)[e];
      count += ((const int32_t *)(at + n * sizeof(float)))[e];
    }
    aux_sums[e] = sum;
    if (e < n - 1)
      aux_count[e] = count;
    else
      *valid_count = count;
  }
}

extern "C" mt_err mt_cuda_aux_join(struct mt_backend *be, const struct mt_aux_join_args *a) {
  MT_TRY(mt_check_aux_join(a));
  MT_TRY(mt_cuda_format("aux_join", &a->aux_sums));
  int n = (int)a->aux_sums.dim[0];
  join_records<<<1, JOIN_THREADS, 0, mt_cuda_of(be)->stream>>>(
      (const char *)a->records, mt_aux_record_bytes(n, MT_F32), a->rank_count, n,
      (float *)a->aux_sums.data, a->aux_count, a->valid_count);
  return mt_cuda_launched("aux_join");
}

template <class G, int V>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_parts(struct mat<const G> parts, int count, G *__restrict__ out, int64_t n,
              int accumulate) {
  int64_t i = ((int64_t)blockIdx.x * SUM_THREADS + threadIdx.x) * V;
  if (i >= n) return;
  float sum[V];
  load_floats<G, V>(parts.p + i, sum);
#pragma unroll 4
  for (int p = 1; p < count; p++) {
    float x[V];
    load_floats<G, V>(row_of(parts, p) + i, x);
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] += x[j];
  }
  if (accumulate) {
    float old[V];
    load_floats<G, V>(out + i, old);
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = old[j] + sum[j];
  }
  store_row<G, V>(out + i, sum);
}

extern "C" mt_err mt_cuda_parts_sum(struct mt_backend *be, const struct mt_parts_sum_args *a) {
  MT_TRY(mt_check_parts_sum(a));
  MT_TRY(mt_cuda_format("parts_sum", &a->out));
  int64_t n = a->out.dim[0];
  if (n == 0) return MT_OK;
  MT_CUDA_BY_GRAD(a->out.dtype, {
    using T = G;
    MT_CUDA_BY_WIDTH(rows_wide(&a->parts) && rows_wide(&a->out), {
      sum_parts<G, V><<<(unsigned)div_up(n, (int64_t)SUM_THREADS * V), SUM_THREADS, 0,
                        mt_cuda_of(be)->stream>>>(mat_of<const G>(&a->parts), (int)a->parts.dim[0],
                                                  (G *)a->out.data, n, a->accumulate);
    });
  });
  return mt_cuda_launched("parts_sum");
}
