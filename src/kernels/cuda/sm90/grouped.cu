/* Grouped products on Hopper: wgmma fed by TMA. */
#include "kernels/cuda/device.cuh"

extern "C" bool mt_cuda_grouped_sm90_takes(const struct mt_backend *be,
                                           const struct mt_cuda_grouped *p) {
  (void)be;
  (void)p;
  return false;
}

extern "C" mt_err mt_cuda_grouped_sm90(struct mt_backend *be, const struct mt_cuda_grouped *p) {
  (void)be;
  (void)p;
  return mt_fail(MT_EUNSUPPORTED, "cuda: grouped products on Hopper");
}
