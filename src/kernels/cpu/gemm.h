/* Products in float32 for every layout that linear layers need, grouped over experts.
 *
 * The roles are chosen so that weights are streamed once and never packed: activations (tokens) are
 * the packed, vectorised operand; weights are broadcast element by element from where they lie.
 *   forward  y[j,i]  = sum_k w[i,k]  x[j,k]    i out feature, j token
 *   dgrad    dx[j,i] = sum_k w[k,i]  dy[j,k]   i in feature,  j token
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

/* The vectorised operand before packing: element (k, j) likewise. */
struct cpu_vector {
  const void *data;
  enum mt_dtype dtype;
  int64_t stride_k, stride_j;
};

/* The result: element (i, j) likewise; (acc). */
struct cpu_result {
  void *data;
  enum mt_dtype dtype;
  int64_t stride_i, stride_j;
  int accumulate;
};

struct cpu_product {
  struct cpu_broadcast a;
  struct cpu_vector b;
  struct cpu_result c;
  int64_t i_count, j_count, k_count;
};

/* Floats of shared workspace that a product (or the sum over a group's products) takes packed. */
size_t mt_cpu_packed_floats(int64_t j_count, int64_t k_count);

/* Runs `count` independent products on be's threads. Bits do not depend on the thread count.
 * `packed` holds the sum of their mt_cpu_packed_floats. A product with k_count 0 writes zeros. */
void mt_cpu_products(const struct mt_backend *be, struct cpu_product *products, int count,
                     float *packed);

/* The same on the calling thread, in two parts, so that one packed operand serves several products
 * (attention's tiles): pack p->b; run p with it. scratch: CPU_PRODUCT_FLOATS floats. */
void mt_cpu_pack_here(const struct cpu_product *p, float *packed);
void mt_cpu_product_here(const struct cpu_product *p, const float *packed, float *scratch);

#endif
