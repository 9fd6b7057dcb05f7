/* Operands brought into the order that tiles read. */
#ifndef MT_KERNELS_CPU_PACK_H
#define MT_KERNELS_CPU_PACK_H

#include "kernels/cpu/gemm.h"

/* Rows [k0, k0+kc) x columns [j0, j0+jn) of b as panels of NR columns: out[panel][kc][NR], spare
 * lanes zero. */
void mt_cpu_pack_vector(const struct cpu_vector *b, int64_t k0, int64_t kc, int64_t j0, int64_t jn,
                        float *out);

/* Rows [i0, i0+in) of a, contiguous along i, as panels of MR rows: out[panel][kc][MR], spare rows
 * zero. */
void mt_cpu_pack_columns(const struct cpu_broadcast *a, int64_t i0, int64_t in, int64_t k0,
                         int64_t kc, float *out);

/* Rows [i0, i0+in) of a, contiguous along k: out[in rounded up to MR][kc], spare rows zero. */
void mt_cpu_copy_rows(const struct cpu_broadcast *a, int64_t i0, int64_t in, int64_t k0, int64_t kc,
                      float *out);

#endif
