/* Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
 * 1, 2, 3", SC'11). A number is a function of (seed, stream, counter) alone, so that the same bits
 * come out whatever the thread count, and a checkpoint stores two integers. */
#ifndef MT_BASE_RNG_H
#define MT_BASE_RNG_H

#include <stdint.h>

/* The raw function: out[4] (=) from a 128-bit counter and a 64-bit key, in 10 rounds for streams.
 */
void mt_philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t out[4]);

struct mt_rng {
  uint64_t seed;
  uint64_t stream;   /* what the numbers are for; streams never overlap */
  uint64_t position; /* numbers drawn so far; the whole state beside seed and stream */
};

struct mt_rng mt_rng_make(uint64_t seed, uint64_t stream);
uint32_t mt_rng_u32(struct mt_rng *r);
/* Uniform in [0, bound), unbiased (Lemire 2019); bound >= 1. */
uint32_t mt_rng_below(struct mt_rng *r, uint32_t bound);
/* Uniform in [0, 1), 53 bits. */
double mt_rng_uniform(struct mt_rng *r);
/* Standard normal (Box-Muller). */
double mt_rng_normal(struct mt_rng *r);
/* Fisher-Yates over n items. */
void mt_rng_shuffle(struct mt_rng *r, uint32_t *items, uint32_t n);

#endif
