/* AdamW of one element in float32, and stochastic rounding of what is kept in bfloat16: one text
 * for the CPU and for GPUs, so that both give the same bits. Every product that a sum follows is
 * written as one fma: nothing is left for a compiler to contract in its own way.
 * Formulas: docs/math.md, "AdamW and clipping", "Stochastic rounding". */
#ifndef MT_KERNELS_ROUNDING_H
#define MT_KERNELS_ROUNDING_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MT_SHARED static __device__ __forceinline__
#else
#define MT_SHARED static inline __attribute__((always_inline))
#endif

struct mt_adamw_factors {
  float beta1, beta2, step_size, root_c2, eps;
};

MT_SHARED void mt_adamw_one(float *w, float *m, float *v, float g, float keep, float scale,
                            struct mt_adamw_factors u) {
  g *= scale;
  *m = fmaf(u.beta1, *m, (1.0f - u.beta1) * g);
  *v = fmaf(u.beta2, *v, (1.0f - u.beta2) * g * g);
  float change = u.step_size * *m / fmaf(sqrtf(*v), u.root_c2, u.eps);
  *w = fmaf(*w, keep, -change);
}

/* What a random number is for. */
enum mt_rounding { MT_ROUND_WEIGHT, MT_ROUND_M, MT_ROUND_V, MT_ROUND_PURPOSES };
enum { MT_ROUND_BLOCK = 8 }; /* elements that one call of Philox serves */

/* Philox4x32-7 (base/rng.h has ten rounds; seven are the fewest that pass every test of Salmon et
 * al., and here they are what the update would wait for), inline and without arrays that a
 * vectoriser would have to keep. Element i of tensor n at a step gets 16 bits of block i / 8 for
 * the weight, and 16 more that its moments share: counter (block, step, 4 (n + 1) + purpose) of 64,
 * 32 and 32 bits, with M's number for V too, key seed. Streams of mt_rng have 0 in the last word.
 */
MT_SHARED void mt_rounding_bits(uint64_t seed, uint32_t tensor, uint32_t purpose, uint32_t step,
                                uint64_t block, uint32_t *o0, uint32_t *o1, uint32_t *o2,
                                uint32_t *o3) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = step,
           c3 = 4 * (tensor + 1) + (purpose == MT_ROUND_V ? MT_ROUND_M : purpose);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (int round = 0; round < 7; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  *o0 = c0, *o1 = c1, *o2 = c2, *o3 = c3;
}

/* What is added before the lower 16 bits are cut off, from the 16 bits of an element: all of them
 * for a weight; for a moment 8 of them, above half of what they leave out, which keeps the mean. */
MT_SHARED uint32_t mt_rounding_addend(uint32_t bits16, uint32_t purpose) {
  return purpose == MT_ROUND_WEIGHT ? bits16
         : purpose == MT_ROUND_M    ? (bits16 << 8 & 0xff00u) | 0x80u
                                    : (bits16 & 0xff00u) | 0x80u;
}

/* The addend of element `at` (0 to 7) of a block. */
MT_SHARED uint32_t mt_rounding_pick(const uint32_t word[4], int at, uint32_t purpose) {
  return mt_rounding_addend(word[at / 2] >> (16 * (at % 2)) & 0xffffu, purpose);
}

/* x to bfloat16: up with the probability of the distance to the lower neighbour, by 16 random
 * bits. Infinities stay, and a NaN stays a NaN. */
MT_SHARED uint16_t mt_round_at_random(float x, uint32_t bits16) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t finite = (u + bits16) >> 16;
  uint32_t special = u >> 16 | ((u & 0x7fffffu) ? 0x40u : 0u);
  return (uint16_t)((u & 0x7f800000u) == 0x7f800000u ? special : finite);
}

#endif
