/* FP8 weights turned: what dgrad reads where a weight has no column copy. */
#ifndef MT_KERNELS_CUDA_TURNED_CUH
#define MT_KERNELS_CUDA_TURNED_CUH

#include "kernels/cuda/cuda.h"

/* Scratch for turning matrices of [n, k], so many at a time that it stays small but is one at
 * least. */
struct mt_cuda_turned {
  int64_t at_once; /* matrices */
  size_t matrix_bytes, scales_at, bytes;
};
struct mt_cuda_turned mt_cuda_turned_of(int64_t matrices, int64_t n, int64_t k);

/* Matrices [first, first + count) of the weight's row copy into the column copy that `to` describes
 * (=): q of rank 3 [count, n, k], or 2 where w has rank 2, its col and col_scale. Elements and
 * scales stay what they are, blocks are square. On the backend's stream. */
mt_err mt_cuda_turn(struct mt_backend *be, const struct mt_qtensor *w, int64_t first,
                    const struct mt_qtensor *to);

#endif
