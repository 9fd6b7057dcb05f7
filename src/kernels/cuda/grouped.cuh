/* What the kernels of grouped products share: the way from a work item's number to its expert and
 * its place there. Counts of rows are device data, so each block finds its own work. */
#ifndef MT_KERNELS_CUDA_GROUPED_CUH
#define MT_KERNELS_CUDA_GROUPED_CUH

#include "kernels/cuda/device.cuh"

/* Without offsets there is one group of all rows (a dense product). */
__device__ __forceinline__ int group_begin(const int32_t *offsets, int64_t rows, int g) {
  if (!offsets) return g == 0 ? 0 : (int)rows;
  return offsets[g];
}

/* Output tiles of one matrix, mt x nt of them, so ordered that those in flight at one time make up
 * a block about as wide as it is high: m runs fastest through panels of `panel` tiles. Panels as
 * high as an expert has rows read each weight once. */
struct tile_at {
  int m, n;
};
__device__ __forceinline__ struct tile_at tile_in_panels(int i, int mt, int nt, int panel) {
  int first = i / (panel * nt) * panel, left = mt - first, high = left < panel ? left : panel;
  int r = i - first * nt;
  return {first + r % high, r / high};
}

#endif
