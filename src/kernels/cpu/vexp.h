/* e^x without libm: Cody-Waite reduction to |r| <= ln2/2 and a degree-6 polynomial (Cephes' expf
 * coefficients), written so that the compiler vectorises loops that call it. Under 2 ulp over the
 * whole range; 0 below -87.3, infinity above 88.7, NaN stays. */
#ifndef MT_KERNELS_CPU_VEXP_H
#define MT_KERNELS_CPU_VEXP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float cpu_exp_one(float x) {
  const float log2e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  /* Comparisons that leave NaN alone: it comes through r. */
  float y = x > 88.7228f ? 88.7228f : x;
  y = y < -87.33654f ? -87.33654f : y;
  float n = rintf(y * log2e);
  float r = y - n * ln2_hi - n * ln2_lo;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  /* 2^n in two factors, so that n = 128 does not overflow before the product. A NaN has no integer:
   * any exponent will do, p is NaN. */
  int32_t e = (int32_t)(n > -127.0f ? n : -127.0f), half = e >> 1;
  int32_t b0 = (half + 127) << 23, b1 = (e - half + 127) << 23;
  float f0, f1;
  memcpy(&f0, &b0, 4);
  memcpy(&f1, &b1, 4);
  float result = p * f0 * f1;
  result = x < -87.33654f ? 0.0f : result;
  return x > 88.7228f ? INFINITY : result;
}

#endif
