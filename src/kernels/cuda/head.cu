/* Head with cross entropy. Formulas: docs/math.md, "Head and cross entropy". */
#include "kernels/cuda/device.cuh"

extern "C" size_t mt_cuda_head_bytes(const struct mt_limits *l) {
  (void)l;
  return 0;
}

extern "C" mt_err mt_cuda_head_loss(struct mt_backend *be, const struct mt_head_loss_args *a) {
  (void)be;
  MT_TRY(mt_check_head_loss(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: head_loss");
}
