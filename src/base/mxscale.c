#include "base/mxscale.h"

#include <string.h>

void mt_mx_swizzle(const uint8_t *scales, int64_t outer, int64_t blocks, uint8_t *to) {
  memset(to, 0, (size_t)mt_mx_scale_bytes(outer, blocks));
  for (int64_t i = 0; i < outer; i++) {
    for (int64_t j = 0; j < blocks; j++)
      to[mt_mx_scale_index(i, j, blocks)] = scales[i * blocks + j];
  }
}

void mt_mx_unswizzle(const uint8_t *from, int64_t outer, int64_t blocks, uint8_t *scales) {
  for (int64_t i = 0; i < outer; i++) {
    for (int64_t j = 0; j < blocks; j++)
      scales[i * blocks + j] = from[mt_mx_scale_index(i, j, blocks)];
  }
}
