/* A tensor is a view: a pointer, a number format and a shape. It owns nothing. Row-major, rows of
 * the last dimension contiguous; consecutive rows are `ld` elements apart (ld == dim[rank-1]
 * unless the view is a column slice). */
#ifndef MT_BACKEND_TENSOR_H
#define MT_BACKEND_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"

enum { MT_MAX_RANK = 3 };

struct mt_tensor {
  void *data; /* device memory of the backend in use; NULL = absent */
  enum mt_dtype dtype;
  int rank;
  int64_t dim[MT_MAX_RANK];
  int64_t ld; /* elements between consecutive rows */
};

static inline struct mt_tensor mt_vec(void *data, enum mt_dtype dtype, int64_t n) {
  return (struct mt_tensor){data, dtype, 1, {n, 1, 1}, n};
}

static inline struct mt_tensor mt_mat(void *data, enum mt_dtype dtype, int64_t rows, int64_t cols) {
  return (struct mt_tensor){data, dtype, 2, {rows, cols, 1}, cols};
}

static inline struct mt_tensor mt_cube(void *data, enum mt_dtype dtype, int64_t n, int64_t rows,
                                       int64_t cols) {
  return (struct mt_tensor){data, dtype, 3, {n, rows, cols}, cols};
}

static inline int64_t mt_count(const struct mt_tensor *t) {
  int64_t n = 1;
  for (int i = 0; i < t->rank; i++) n *= t->dim[i];
  return n;
}

static inline size_t mt_bytes(const struct mt_tensor *t) {
  return (size_t)mt_count(t) * mt_dtype_bytes(t->dtype);
}

/* Rows [begin, begin + count) of a matrix. */
static inline struct mt_tensor mt_rows(const struct mt_tensor *t, int64_t begin, int64_t count) {
  struct mt_tensor v = *t;
  v.dim[0] = count;
  if (v.data) v.data = (char *)v.data + (size_t)(begin * t->ld) * mt_dtype_bytes(t->dtype);
  return v;
}

/* Columns [begin, begin + count) of a matrix; keeps ld. */
static inline struct mt_tensor mt_cols(const struct mt_tensor *t, int64_t begin, int64_t count) {
  struct mt_tensor v = *t;
  v.dim[1] = count;
  if (v.data) v.data = (char *)v.data + (size_t)begin * mt_dtype_bytes(t->dtype);
  return v;
}

/* Matrix i of a cube [n, rows, cols]. */
static inline struct mt_tensor mt_slice(const struct mt_tensor *t, int64_t i) {
  size_t offset = (size_t)(i * t->dim[1] * t->ld) * mt_dtype_bytes(t->dtype);
  return (struct mt_tensor){
      t->data ? (char *)t->data + offset : NULL, t->dtype, 2, {t->dim[1], t->dim[2], 1}, t->ld};
}

#endif
