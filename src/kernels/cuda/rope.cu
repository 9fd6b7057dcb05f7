/* Rotary positions and the cache of keys and values. Formulas: docs/math.md, "RoPE". */
#include "kernels/cuda/device.cuh"

extern "C" mt_err mt_cuda_rope_table(struct mt_backend *be, const struct mt_rope_table_args *a) {
  (void)be;
  MT_TRY(mt_check_rope_table(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: rope_table");
}

extern "C" mt_err mt_cuda_rope(struct mt_backend *be, const struct mt_rope_args *a) {
  (void)be;
  MT_TRY(mt_check_rope(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: rope");
}

extern "C" mt_err mt_cuda_kv_append(struct mt_backend *be, const struct mt_kv_append_args *a) {
  (void)be;
  MT_TRY(mt_check_kv_append(a));
  return mt_fail(MT_EUNSUPPORTED, "cuda: kv_append");
}
