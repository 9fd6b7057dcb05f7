/* MX's scales from the quantizers' order to that of Blackwell's tensor cores: a block of threads a
 * tile, a thread a word. Scales are a 32nd of the elements, so that this pass costs little beside
 * the product that it is for. */
#include "kernels/cuda/mxscale.cuh"

__global__ void __launch_bounds__(128) order_scales(const __grid_constant__ struct mt_mx_scales s,
                                                    int64_t tall, int64_t wide, uint8_t *to) {
  int64_t i = (int64_t)blockIdx.x / wide, j = (int64_t)blockIdx.x % wide;
  struct mt_mx_tile t = mt_mx_tile_of(&s, i / tall, i % tall, j);
  int w = (int)threadIdx.x;
  if (t.at < 0) return;
  ((uint32_t *)(to + t.at))[w] = mt_mx_tile_word(&s, &t, w);
}

extern "C" mt_err mt_cuda_mx_scales(struct mt_backend *be, const struct mt_mx_scales *s,
                                    uint8_t *to) {
  int64_t tall = mt_mx_tiles_tall(s), wide = mt_mx_tiles_wide(s);
  int64_t tiles = s->matrices * tall * wide;
  if (tiles == 0) return MT_OK;
  if (tiles > INT32_MAX) /* of a grid */
    return mt_fail(MT_EUNSUPPORTED, "scales of %lld tiles", (long long)tiles);
  order_scales<<<(unsigned)tiles, 128, 0, mt_cuda_of(be)->stream>>>(*s, tall, wide, to);
  return mt_cuda_launched("order of scales");
}
