#include "base/rng.h"

#include <math.h>

void mt_philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < rounds; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

struct mt_rng mt_rng_make(uint64_t seed, uint64_t stream) {
  return (struct mt_rng){.seed = seed, .stream = stream};
}

uint32_t mt_rng_u32(struct mt_rng *r) {
  uint64_t block = r->position / 4;
  uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)r->stream,
                         (uint32_t)(r->stream >> 32)};
  uint32_t key[2] = {(uint32_t)r->seed, (uint32_t)(r->seed >> 32)}, out[4];
  mt_philox(counter, key, 10, out);
  return out[r->position++ % 4];
}

uint32_t mt_rng_below(struct mt_rng *r, uint32_t bound) {
  uint32_t floor = (uint32_t)(-bound) % bound;
  for (;;) {
    uint64_t m = (uint64_t)mt_rng_u32(r) * bound;
    if ((uint32_t)m >= floor) return (uint32_t)(m >> 32);
  }
}

double mt_rng_uniform(struct mt_rng *r) {
  uint64_t hi = mt_rng_u32(r) >> 5, lo = mt_rng_u32(r) >> 6;
  return (double)(hi * 67108864u + lo) * (1.0 / 9007199254740992.0);
}

double mt_rng_normal(struct mt_rng *r) {
  double u = 1.0 - mt_rng_uniform(r), v = mt_rng_uniform(r);
  return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

void mt_rng_shuffle(struct mt_rng *r, uint32_t *items, uint32_t n) {
  for (uint32_t i = n; i > 1; i--) {
    uint32_t j = mt_rng_below(r, i), t = items[i - 1];
    items[i - 1] = items[j];
    items[j] = t;
  }
}
