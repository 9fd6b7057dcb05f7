/* AdamW whose state is kept in bfloat16: rounding at random is right on average, by numbers that
 * depend on seed, tensor, element and step alone. */
#include "kernels/bed.h"
#include "kernels/rounding.h"

enum { N = 1 << 18 };

/* What one update without gradient leaves of weights that were all 1 in each element: 1 - lr wd. */
static double *decayed(struct bed *b, double decay, uint64_t seed, uint32_t tensor, int64_t step) {
  double *one = host_mem(b, N * sizeof *one), *zero = host_mem(b, N * sizeof *zero);
  for (int i = 0; i < N; i++) one[i] = 1;
  struct mt_tensor v = mt_vec(NULL, MT_BF16, N);
  struct mt_adamw_segment s = {.master = filled(b, v, one),
                               .grad = filled(b, v, zero),
                               .m = filled(b, v, zero),
                               .v = filled(b, v, zero),
                               .decay = 1,
                               .tensor = tensor};
  DO(b, adamw, .segments = &s, .segment_count = 1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
     .values = adamw_values(b, decay, 1, step, seed));
  return values(b, &s.master);
}

/* Whether a mean of N numbers that lie on one of two neighbours `spacing` apart is what it should
 * be: within five standard deviations of the mean. */
static bool unbiased(double mean, double want, double spacing) {
  double up = fmod(want, spacing) / spacing;
  return fabs(mean - want) < 5 * spacing * sqrt(up * (1 - up) / N);
}

static double mean(const double *x) {
  double sum = 0;
  for (int i = 0; i < N; i++) sum += x[i];
  return sum / N;
}

static void the_mean_stays(struct bed *b) {
  static const double decays[] = {1e-3, 1e-4, 2e-3, 1.0 / 256 - 1e-5};
  const double spacing = 1.0 / 256; /* of bfloat16 below 1 */
  for (int k = 0; k < 4; k++) {
    double *w = decayed(b, decays[k], 5, 2, k + 1), want = (double)(1.0f - (float)decays[k]);
    double got = mean(w);
    for (int i = 0; i < N; i++) assert_true(w[i] == 1 || w[i] == 1 - spacing);
    if (!unbiased(got, want, spacing)) fail_msg("mean %.8f, not %.8f", got, want);
    /* Planted: a bias of a sixty-fourth of the spacing, and rounding to nearest. */
    assert_false(unbiased(got + spacing / 64, want, spacing));
    double nearest = (double)mt_bf16_to_f32(mt_f32_to_bf16((float)want));
    assert_false(unbiased(nearest, want, spacing));
    bed_clear(b);
  }
}

/* Which elements went up is like the throws of a coin: no neighbour, step, seed or tensor tells
 * about another. */
static void choices_are_independent(struct bed *b) {
  const double half = 1.0 / 512; /* up and down alike */
  double *first = decayed(b, half, 5, 2, 1),
         *others[] = {decayed(b, half, 5, 2, 2), decayed(b, half, 6, 2, 1),
                      decayed(b, half, 5ull << 32, 2, 1), decayed(b, half, 5, 3, 1)};
  double *again = decayed(b, half, 5, 2, 1);
  expect_same(b, "again", again, first, N);
  for (int k = 0; k < 4 + 16; k++) {
    int lag = k < 4 ? 0 : k - 3, equal = 0;
    for (int i = 0; i + lag < N; i++) equal += (k < 4 ? others[k] : first)[i + lag] == first[i];
    /* Five standard deviations. */
    if (!(fabs((double)equal / N - 0.5) < 2.5 / sqrt(N))) fail_msg("pair %d: %d equal", k, equal);
  }
}

/* The inline generator is base/rng.h's, on the counter that the comment names. */
static void bits_are_philox(void **state) {
  (void)state;
  for (uint64_t block = 0; block < 1000; block++) {
    uint64_t at = block * 0x10000001ull, seed = 0x0123456789abcdefull + block;
    uint32_t counter[4] = {(uint32_t)at, (uint32_t)(at >> 32), 9, 4 * (7 + 1) + MT_ROUND_M};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, want[4], got[4];
    mt_philox(counter, key, 7, want);
    mt_rounding_bits(seed, 7, MT_ROUND_V, 9, at, &got[0], &got[1], &got[2], &got[3]);
    assert_memory_equal(got, want, sizeof want);
    assert_int_equal(mt_rounding_pick(got, 5, MT_ROUND_WEIGHT), want[2] >> 16);
    assert_int_equal(mt_rounding_pick(got, 5, MT_ROUND_M), (want[2] >> 16 & 0xff) << 8 | 0x80);
    assert_int_equal(mt_rounding_pick(got, 5, MT_ROUND_V), (want[2] >> 24) << 8 | 0x80);
  }
}

static void special_numbers_stay(void **state) {
  (void)state;
  static const uint32_t bits[] = {0, 1, 0x8000, 0xffff};
  for (int i = 0; i < 4; i++) {
    assert_int_equal(mt_round_at_random(INFINITY, bits[i]), 0x7f80);
    assert_int_equal(mt_round_at_random(-INFINITY, bits[i]), 0xff80);
    assert_true(isnan(mt_bf16_to_f32(mt_round_at_random(NAN, bits[i]))));
    uint32_t low = 0x7f800001; /* a NaN whose upper half looks like an infinity */
    float nan;
    memcpy(&nan, &low, 4);
    assert_true(isnan(mt_bf16_to_f32(mt_round_at_random(nan, bits[i]))));
    assert_int_equal(mt_round_at_random(0.0f, bits[i]), 0);
    assert_int_equal(mt_round_at_random(-0.0f, bits[i]), 0x8000);
    /* What bfloat16 holds stays what it is. */
    assert_int_equal(mt_round_at_random(-1.5f, bits[i]), 0xbfc0);
  }
}

/* Moments and weight are rounded by numbers of their own; the update itself is float32's. */
static void what_is_kept_is_rounded_once(struct bed *b) {
  enum { FEW = 1003 };
  double *v0 = normals(b, FEW, 1e-3);
  for (int i = 0; i < FEW; i++) v0[i] *= v0[i];
  double *start[4] = {normals(b, FEW, 0.02), normals(b, FEW, 1e-3), normals(b, FEW, 1e-3), v0};
  struct mt_tensor narrow[4], exact[4];
  for (int k = 0; k < 4; k++) {
    narrow[k] = filled(b, mt_vec(NULL, MT_BF16, FEW), start[k]);
    exact[k] = filled(b, mt_vec(NULL, b->recipe->stat, FEW), start[k]);
  }
  for (int wide = 0; wide < 2; wide++) {
    struct mt_tensor *t = wide ? exact : narrow;
    struct mt_adamw_segment s = {
        .master = t[0], .grad = t[1], .m = t[2], .v = t[3], .decay = 1, .tensor = 4};
    DO(b, adamw, .segments = &s, .segment_count = 1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
       .values = adamw_values(b, 1e-3, 0.1, 3, 11));
  }
  static const enum mt_rounding purpose[] = {MT_ROUND_WEIGHT, 0, MT_ROUND_M, MT_ROUND_V};
  for (int k = 0; k < 4; k++) {
    if (k == 1) continue;
    double *got = values(b, &narrow[k]), *from = values(b, &exact[k]);
    for (int i = 0; i < FEW; i++) {
      uint32_t r[4];
      mt_rounding_bits(11, 4, purpose[k], 3, (uint64_t)i / 8, &r[0], &r[1], &r[2], &r[3]);
      uint16_t want = mt_round_at_random((float)from[i], mt_rounding_pick(r, i % 8, purpose[k]));
      if (got[i] != (double)mt_bf16_to_f32(want))
        fail_msg("%d of %d: %g, not %g", k, i, got[i], (double)mt_bf16_to_f32(want));
    }
  }
}

static void on_hosts(void (*property)(struct bed *b)) {
  static const char *const rows[][2] = {{"ref", "fp64"}, {"cpu", "bf16-states"}};
  for (int i = 0; i < 2; i++) {
    struct bed b;
    bed_open(&b, rows[i][0], rows[i][1]);
    property(&b);
    bed_close(&b);
  }
}

#define ON_HOSTS(name)                                                                             \
  static void test_##name(void **state) {                                                          \
    (void)state;                                                                                   \
    on_hosts(name);                                                                                \
  }

ON_HOSTS(the_mean_stays)
ON_HOSTS(choices_are_independent)
ON_HOSTS(what_is_kept_is_rounded_once)

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(bits_are_philox),
      cmocka_unit_test(special_numbers_stay),
      cmocka_unit_test(test_the_mean_stays),
      cmocka_unit_test(test_choices_are_independent),
      cmocka_unit_test(test_what_is_kept_is_rounded_once),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
