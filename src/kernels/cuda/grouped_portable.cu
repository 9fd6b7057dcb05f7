/* Grouped products on any GPU from sm_80 on. */
#include "kernels/cuda/device.cuh"

extern "C" mt_err mt_cuda_grouped_portable(struct mt_backend *be, const struct mt_cuda_grouped *p) {
  (void)be;
  (void)p;
  return mt_fail(MT_EUNSUPPORTED, "cuda: grouped products");
}
