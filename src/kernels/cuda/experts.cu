/* Products of the experts together with SwiGLU: one kernel on Hopper where it takes the shape, else
 * the product and then swiglu.cu's pass over its result. */
#include "kernels/cuda/rows.cuh"

extern "C" {
#include "backend/experts.h"
}

/* To hold the joined kernels against the two operations each: 0 keeps the latter. Up is joined only
 * where an expert has few rows: measured on an H100 at hidden 4096, ffn 14336, joined against apart
 * takes 1.36 to 1.59 ms at 512 rows an expert, 5.90 to 5.71 at 2048 and 12.1 to 11.9 at 4096 (its
 * epilogue, which writes three tiles, then outweighs the pass it saves); down takes 0.87 to 0.99,
 * 3.14 to 3.57 and 6.70 to 7.63 (bench/experts_joined). */
enum { UP_ON_SM90 = 1, DOWN_ON_SM90 = 1, UP_ROWS_MOST = 1024 };

static int64_t part_count(int64_t ffn) {
  return div_up(ffn, MT_CUDA_EXPERTS_COLS);
}

extern "C" size_t mt_cuda_experts_bytes(const struct mt_limits *l) {
  return (size_t)(part_count(l->ffn) * l->rows) * sizeof(float);
}

extern "C" mt_err mt_cuda_experts_up_fwd(struct mt_backend *be,
                                         const struct mt_experts_up_fwd_args *a) {
  MT_TRY(mt_check_experts_up_fwd(a));
  bool few = a->x.dim[0] <= UP_ROWS_MOST * a->w.dim[0];
  if (UP_ON_SM90 && few && mt_cuda_experts_up_sm90_takes(be, a)) {
    return mt_cuda_experts_up_sm90(be, a);
  }
  struct mt_linear_fwd_args product = mt_experts_up_product(a);
  struct mt_swiglu_fwd_args swiglu = mt_experts_up_swiglu(a);
  MT_TRY(mt_cuda_linear_fwd(be, &product));
  return mt_cuda_swiglu_fwd(be, &swiglu);
}

/* out[r] = the sum of row r's parts, in order. */
__global__ void __launch_bounds__(256)
    add_parts(const float *parts, int count, int64_t rows, const int32_t *row_count, float *out) {
  int64_t r = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (r >= *row_count) return;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < count; i++) sum += parts[i * rows + r];
  out[r] = sum;
}

static mt_err down_sm90(struct mt_backend *be, const struct mt_experts_down_dgrad_args *a) {
  int64_t rows = a->h.dim[0], count = part_count(a->h.dim[1]);
  if (!a->drow_prob.data) return mt_cuda_experts_down_sm90(be, a, NULL);
  void *parts;
  MT_TRY(mt_cuda_scratch(be, "experts_down_dgrad", (size_t)(count * rows) * sizeof(float), &parts));
  MT_TRY(mt_cuda_experts_down_sm90(be, a, (float *)parts));
  add_parts<<<(unsigned)div_up(rows, 256), 256, 0, mt_cuda_of(be)->stream>>>(
      (const float *)parts, (int)count, rows, a->offsets + a->w.dim[0], (float *)a->drow_prob.data);
  return mt_cuda_launched("experts_down_dgrad");
}

extern "C" mt_err mt_cuda_experts_down_dgrad(struct mt_backend *be,
                                             const struct mt_experts_down_dgrad_args *a) {
  MT_TRY(mt_check_experts_down_dgrad(a));
  if (DOWN_ON_SM90 && mt_cuda_experts_down_sm90_takes(be, a)) return down_sm90(be, a);
  struct mt_linear_dgrad_args product = mt_experts_down_product(a);
  struct mt_swiglu_bwd_args swiglu = mt_experts_down_swiglu(a);
  MT_TRY(mt_cuda_linear_dgrad(be, &product));
  return mt_cuda_swiglu_bwd(be, &swiglu);
}
