/* Eight-bit number formats (OCP 8-bit floating point, OFP8, and microscaling, MX v1.0).
 * e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; largest 448, least 2^-9, no infinity, NaN
 * is all ones. e5m2: bias 15, largest 57344, infinities and NaN as IEEE has them. e8m0: a power of
 * two, 2^(byte - 127); 255 is NaN.
 * To eight bits: nearest even, beyond the largest to the largest, NaN stays NaN. */
#ifndef MT_BASE_FP8_H
#define MT_BASE_FP8_H

#include <stdint.h>
#include <string.h>

float mt_e4m3_to_f32(uint8_t x);
float mt_e5m2_to_f32(uint8_t x);
uint8_t mt_f32_to_e5m2(float f);

/* Without branches, for loops that are to be vectorised. */
static inline uint8_t mt_f32_to_e4m3(float f) {
  uint32_t u, sign, small;
  memcpy(&u, &f, 4);
  sign = u >> 24 & 0x80u;
  u &= 0x7fffffffu;
  /* From 2^-6 on: 3 bits of mantissa stay; below, multiples of 2^-9, which adding 2^14 counts. */
  uint32_t normal = ((u + 0x7ffffu + (u >> 20 & 1u)) >> 20) - (120u << 3);
  float magnitude;
  memcpy(&magnitude, &u, 4);
  magnitude += 0x1p14f;
  memcpy(&small, &magnitude, 4);
  small -= 0x46800000u;                          /* 2^14 */
  uint32_t x = u < 0x3c800000u ? small : normal; /* 2^-6 */
  x = u >= 0x43e80000u ? 0x7eu : x;              /* from 464 on, halfway to a number there is not */
  x = u > 0x7f800000u ? 0x7fu : x;
  return (uint8_t)(x | sign);
}

static inline float mt_e8m0_to_f32(uint8_t x) {
  /* 2^-127 is below the least normal number; 255 becomes a NaN. */
  uint32_t u = x == 0 ? 0x00400000u : x == 255 ? 0x7fc00000u : (uint32_t)x << 23;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

/* The scale of a block whose largest magnitude is amax: the least power of two at which amax /
 * scale is at most 448, as e8m0; 2^-127 at least; NaN gives 255, infinity 254. */
static inline uint8_t mt_e8m0_scale(float amax) {
  uint32_t u;
  memcpy(&u, &amax, 4);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return 255;
  if (u == 0x7f800000u) return 254;
  /* 448 = 1.75 * 2^8: one more where the mantissa is over 1.75. */
  int32_t byte = (int32_t)(u >> 23) - 8 + ((u & 0x7fffffu) > 0x600000u);
  return (uint8_t)(byte > 0 ? byte : 0);
}

/* What a block's elements are multiplied with: exact. 2^-127 makes zeros. */
static inline float mt_e8m0_inverse(uint8_t scale) {
  uint32_t u = scale == 255   ? 0x7fc00000u
               : scale == 254 ? 0x00400000u /* 2^-127, no normal number */
               : scale == 0   ? 0
                              : (uint32_t)(254 - scale) << 23;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

/* The scale of FP8's blocks as an e8m0 byte: the same, but 1 for a block of zeros, and not below
 * 2^-126, whose inverse is a number still. */
static inline uint8_t mt_fp8_scale(float amax) {
  uint8_t byte = mt_e8m0_scale(amax);
  return amax == 0 ? 127 : byte == 0 ? 1 : byte;
}

#endif
