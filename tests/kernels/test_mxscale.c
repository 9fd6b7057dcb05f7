/* Blackwell's order of MX's scales: the index, there and back, and the text that the GPU's kernel
 * runs, tile by tile on the host. */
#include "kernels/mxscale_cases.h"

static void the_index_is_the_documented_one(void **state) {
  (void)state;
  assert_int_equal(mt_mx_scale_index(0, 0, 4), 0);
  assert_int_equal(mt_mx_scale_index(1, 0, 4), 16);
  assert_int_equal(mt_mx_scale_index(32, 0, 4), 4);
  assert_int_equal(mt_mx_scale_index(127, 3, 4), 511);
  assert_int_equal(mt_mx_scale_index(0, 3, 4), 3);
  assert_int_equal(mt_mx_scale_index(0, 4, 5), 512);
  assert_int_equal(mt_mx_scale_index(128, 0, 5), 1024);
  for (int64_t k = 1; k < 700; k += 31) { /* in elements: tile = (i/128) ceil(K/128) + j/4 */
    for (int64_t i = 0; i < 300; i += 7) {
      for (int64_t j = 0; j < (k + 31) / 32; j++) {
        int64_t tile = i / 128 * ((k + 127) / 128) + j / 4;
        int64_t want = tile * 512 + (i % 32) * 16 + ((i % 128) / 32) * 4 + j % 4;
        assert_int_equal(mt_mx_scale_index(i, j, (k + 31) / 32), want);
      }
    }
  }
}

static void back_again_is_the_same_and_padding_is_zero(void **state) {
  (void)state;
  for (int64_t outer = 1; outer < 400; outer += outer < 130 ? 9 : 61) {
    for (int64_t blocks = 1; blocks < 23; blocks++) {
      int64_t n = mt_mx_scale_bytes(outer, blocks), all = outer * blocks, there = 0;
      assert_int_equal(n % 512, 0);
      uint8_t *a = malloc((size_t)all), *b = malloc((size_t)n), *c = calloc(1, (size_t)all);
      uint8_t *seen = calloc(1, (size_t)n);
      for (int64_t k = 0; k < all; k++) a[k] = (uint8_t)(k % 255 + 1);
      memset(b, 0xee, (size_t)n);
      mt_mx_swizzle(a, outer, blocks, b);
      for (int64_t i = 0; i < outer; i++)
        for (int64_t j = 0; j < blocks; j++) seen[mt_mx_scale_index(i, j, blocks)]++;
      for (int64_t k = 0; k < n; k++) {
        assert_true(seen[k] <= 1 && (b[k] != 0) == seen[k]);
        there += seen[k];
      }
      assert_int_equal(there, all);
      mt_mx_unswizzle(b, outer, blocks, c);
      assert_memory_equal(a, c, (size_t)all);
      free(a), free(b), free(c), free(seen);
    }
  }
}

static void tiles_are_those_of_each_operand(void **state) {
  (void)state;
  for (int i = 0; i < SCALE_CASES; i++) {
    struct scales_tried t;
    scales_make(&t, &scale_cases[i]);
    uint8_t *got = malloc((size_t)t.bytes);
    memset(got, SCALE_POISON, (size_t)t.bytes);
    int64_t tall = mt_mx_tiles_tall(&t.s), wide = mt_mx_tiles_wide(&t.s);
    for (int64_t k = 0; k < t.s.matrices * tall * wide; k++) {
      struct mt_mx_tile tile = mt_mx_tile_of(&t.s, k / wide / tall, k / wide % tall, k % wide);
      assert_true(tile.at >= -1 && tile.at + 512 <= t.bytes);
      for (int w = 0; tile.at >= 0 && w < 128; w++) {
        uint32_t word = mt_mx_tile_word(&t.s, &tile, w);
        for (int b = 0; b < 4; b++) got[tile.at + w * 4 + b] = (uint8_t)(word >> 8 * b);
      }
    }
    if (memcmp(got, t.want, (size_t)t.bytes) != 0) fail_msg("case %d differs", i);
    free(got);
    scales_free(&t);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_index_is_the_documented_one),
      cmocka_unit_test(back_again_is_the_same_and_padding_is_zero),
      cmocka_unit_test(tiles_are_those_of_each_operand),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
