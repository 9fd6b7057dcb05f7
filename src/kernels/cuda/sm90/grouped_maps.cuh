/* Tensor maps of the grouped kernels, made on the host for each launch. */
#ifndef MT_KERNELS_CUDA_SM90_GROUPED_MAPS_CUH
#define MT_KERNELS_CUDA_SM90_GROUPED_MAPS_CUH

#include <cuda.h>

#include "kernels/cuda/cuda.h"

/* Rows of a group as a tensor of 2^30 rows that ends with the group (see ragged_map). */
enum { RAGGED_ROWS = 1 << 30 };

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* From the driver that runs, so that nothing links libcuda. */
static mt_err encoder(encode_fn *out) {
  static void *fn;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (!fn) {
    MT_TRY(mt_cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000,
                                                          cudaEnableDefault, &found),
                         "grouped products"));
    if (!fn || found != cudaDriverEntryPointSuccess)
      return mt_fail(MT_EDEVICE, "grouped products: the driver has no cuTensorMapEncodeTiled");
  }
  *out = (encode_fn)fn;
  return MT_OK;
}

/* rank dimensions, dim[0] contiguous, stride[i]: bytes between neighbours along dim[i + 1]; boxes
 * of 128 bytes x box_rows. What lies outside reads as 0 and is not written. */
static mt_err encode_as(CUtensorMap *map, CUtensorMapDataType type, size_t item, const void *base,
                        int rank, const cuuint64_t *dim, const cuuint64_t *stride, int box_rows) {
  encode_fn fn = NULL;
  cuuint32_t width = (cuuint32_t)(128 / item);
  cuuint32_t box[5] = {width, (cuuint32_t)box_rows, 1, 1, 1}, step[5] = {1, 1, 1, 1, 1};
  MT_TRY(encoder(&fn));
  CUresult result = fn(map, type, (cuuint32_t)rank, (void *)(uintptr_t)base, dim, stride, box, step,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return MT_OK;
  return mt_fail(MT_EDEVICE, "grouped products: tensor map of rank %d: error %d", rank,
                 (int)result);
}

static mt_err encode(CUtensorMap *map, enum mt_dtype dtype, const void *base, int rank,
                     const cuuint64_t *dim, const cuuint64_t *stride, int box_rows) {
  CUtensorMapDataType type =
      dtype == MT_F32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_as(map, type, mt_dtype_bytes(dtype), base, rank, dim, stride, box_rows);
}

/* bf16 rows of groups where a group's end must hold: what follows may be NaN and must read as 0,
 * and must not be written. The map knows no group: the third and fourth dimension only move the
 * start. Row i of a group [begin, end) has coordinates (2^30 - (end - begin) + i, 2^30, end); the
 * address 2^30 (2^34 - stride) + ... wraps around 2^64 to begin + i, and the second coordinate
 * passes its bound exactly at the group's end. Triton's ragged descriptors do the same. */
static mt_err ragged_map(CUtensorMap *map, const void *base, int64_t cols, int64_t ld,
                         int box_rows) {
  cuuint64_t row = 2 * (cuuint64_t)ld;
  cuuint64_t dim[4] = {(cuuint64_t)cols, RAGGED_ROWS, INT32_MAX, INT32_MAX};
  cuuint64_t stride[3] = {row, ((cuuint64_t)1 << 34) - row, row};
  return encode(map, MT_BF16, base, 4, dim, stride, box_rows);
}

/* [count, rows, cols], matrices one after another. */
static mt_err matrices_map(CUtensorMap *map, enum mt_dtype dtype, const void *base, int64_t count,
                           int64_t rows, int64_t cols, int64_t ld, int box_rows) {
  cuuint64_t row = mt_dtype_bytes(dtype) * (cuuint64_t)ld;
  cuuint64_t dim[3] = {(cuuint64_t)cols, (cuuint64_t)rows, (cuuint64_t)count};
  cuuint64_t stride[2] = {row, row * (cuuint64_t)rows};
  return encode(map, dtype, base, 3, dim, stride, box_rows);
}

#endif
