#include "base/fp8.h"

#include <math.h>

static float decode(uint8_t x, int mantissa_bits, int bias) {
  int magnitude = x & 0x7f, exponent = magnitude >> mantissa_bits;
  int mantissa = magnitude & ((1 << mantissa_bits) - 1);
  float f = exponent ? ldexpf(1 + ldexpf((float)mantissa, -mantissa_bits), exponent - bias)
                     : ldexpf((float)mantissa, 1 - bias - mantissa_bits);
  return x & 0x80 ? -f : f;
}

float mt_e4m3_to_f32(uint8_t x) {
  return (x & 0x7f) == 0x7f ? copysignf(NAN, x & 0x80 ? -1.0f : 1.0f) : decode(x, 3, 7);
}

float mt_e5m2_to_f32(uint8_t x) {
  int magnitude = x & 0x7f;
  if (magnitude == 0x7c) return x & 0x80 ? -INFINITY : INFINITY;
  return magnitude > 0x7c ? copysignf(NAN, x & 0x80 ? -1.0f : 1.0f) : decode(x, 2, 15);
}

uint8_t mt_f32_to_e5m2(float f) {
  uint32_t u, small;
  memcpy(&u, &f, 4);
  uint32_t sign = u >> 24 & 0x80u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint8_t)(0x7f | sign);
  if (u >= 0x47700000u) return (uint8_t)(0x7b | sign); /* from 61440 on */
  if (u < 0x38800000u) {                               /* below 2^-14: multiples of 2^-16 */
    float magnitude;
    memcpy(&magnitude, &u, 4);
    magnitude += 0x1p7f;
    memcpy(&small, &magnitude, 4);
    return (uint8_t)((small - 0x43000000u) | sign);
  }
  return (uint8_t)((((u + 0xfffffu + (u >> 21 & 1u)) >> 21) - (112u << 2)) | sign);
}
