/* Products in float32 for every layout that linear layers need, grouped over experts.
 *
 * One operand is broadcast element by element, where possible from where it lies; the other is
 * vectorised and packed block by block into the running thread's own cache:
 *   forward  y[i,j]  = sum_k x[i,k]  w[j,k]    i token,       j out feature
 *   dgrad    dx[i,j] = sum_k dy[i,k] w[k,j]    i token,       j in feature
 *   wgrad    dw[i,j] = sum_k dy[k,i] x[k,j]    i out feature, j in feature, k token
 * Blocking after Goto & van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
 */
#ifndef MT_KERNELS_CPU_GEMM_H
#define MT_KERNELS_CPU_GEMM_H

#include "backend/device.h"

/* The broadcast operand: element (i, k) at a[i * stride_i + k * stride_k]; one stride is 1. */
struct cpu_broadcast {
  const void *data;
  enum mt_dtype dtype;
  int64_t stride_i, stride_k;
};

/* The vectorised operand: element (k, j) likewise. */
struct cpu_vector {
  const void *data;
  enum mt_dtype dtype;
  int64_t stride_k, stride_j;
};

/* The result: element (i, j) at c[i * stride_i + j]; (acc). */
struct cpu_result {
  void *data;
  enum mt_dtype dtype;
  int64_t stride_i;
  int accumulate;
};

struct cpu_product {
  struct cpu_broadcast a;
  struct cpu_vector b;
  struct cpu_result c;
  int64_t i_count, j_count, k_count;
};

/* Runs `count` independent products on be's threads. Bits do not depend on the thread count.
 * A product with k_count 0 writes zeros (or adds nothing). Uses the threads' scratch. */
void mt_cpu_products(const struct mt_backend *be, const struct cpu_product *products, int count);

/* The same on the calling thread, in two parts, so that one packed operand serves several products
 * (attention's tiles): pack p->b whole; run p with it. k_count 1 to CPU_SMALL_K; c is F32.
 * packed: mt_cpu_packed_floats; scratch: CPU_PRODUCT_FLOATS floats. */
enum { CPU_SMALL_K = 512 };
size_t mt_cpu_packed_floats(int64_t j_count, int64_t k_count);
void mt_cpu_pack_here(const struct cpu_product *p, float *packed);
void mt_cpu_product_here(const struct cpu_product *p, const float *packed, float *scratch);

#endif
