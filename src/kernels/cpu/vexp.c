#include "kernels/cpu/vexp.h"

#include "kernels/cpu/cpu.h"

void mt_cpu_exp(const float *x, float *out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = cpu_exp_one(x[i]);
}
