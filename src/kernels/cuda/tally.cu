/* A micro-batch's numbers for the step's report: one block, since there is little to add up. */
#include "kernels/cuda/device.cuh"

enum { TALLY_THREADS = 1024 };

/* The sum over the block in thread 0, in a fixed order. */
static __device__ double tree_of(double x, double *shared) {
  shared[threadIdx.x] = x;
  for (int half = TALLY_THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  double sum = shared[0];
  __syncthreads();
  return sum;
}

static __global__ void __launch_bounds__(TALLY_THREADS)
    tally(const float *loss, const int32_t *correct, int64_t rows, const float *aux,
          const float *z_loss, const double *aux_weight, double *sums, const int32_t *load,
          int32_t *load_sums, int64_t load_count, int accumulate) {
  __shared__ double shared[TALLY_THREADS];
  double l = 0, c = 0;
  for (int64_t t = threadIdx.x; t < rows; t += TALLY_THREADS) {
    l += (double)loss[t];
    c += (double)correct[t];
  }
  l = tree_of(l, shared);
  c = tree_of(c, shared);
  if (threadIdx.x == 0) {
    sums[0] = (accumulate ? sums[0] : 0.0) + l;
    sums[1] = (accumulate ? sums[1] : 0.0) + c;
    sums[2] = (accumulate ? sums[2] : 0.0) + *aux_weight * (double)*aux;
    sums[3] = (accumulate ? sums[3] : 0.0) + (z_loss ? *aux_weight * (double)*z_loss : 0.0);
  }
  for (int64_t i = threadIdx.x; i < load_count; i += TALLY_THREADS) {
    load_sums[i] = (accumulate ? load_sums[i] : 0) + load[i];
  }
}

extern "C" mt_err mt_cuda_tally(struct mt_backend *be, const struct mt_tally_args *a) {
  MT_TRY(mt_check_tally(a));
  MT_TRY(mt_cuda_format("tally", &a->loss));
  tally<<<1, TALLY_THREADS, 0, mt_cuda_of(be)->stream>>>(
      (const float *)a->loss.data, a->correct, a->loss.dim[0], (const float *)a->aux.data,
      (const float *)a->z_loss.data, a->aux_weight, a->sums, a->load, a->load_sums, a->load_count,
      a->accumulate);
  return mt_cuda_launched("tally");
}
