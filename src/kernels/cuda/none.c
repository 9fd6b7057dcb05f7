/* Stands in for the CUDA backend in a build without it. */
#include "kernels/registry.h"

#ifndef MOETUNE_WITH_CUDA

int mt_cuda_device_count(void) {
  return 0;
}

int mt_cuda_capability(void) {
  return 90;
}

mt_err mt_backend_cuda_plan(struct mt_backend *be, bool portable) {
  (void)portable;
  *be = (struct mt_backend){0};
  return mt_fail(MT_EUNSUPPORTED, "this build has no CUDA (build with `make CUDA=1`)");
}

mt_err mt_backend_cuda_create(struct mt_backend *be, bool portable, int device) {
  (void)device;
  return mt_backend_cuda_plan(be, portable);
}

#endif
