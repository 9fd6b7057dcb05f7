/* base/: errors, arena, random numbers, number formats. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/json.h"
#include "base/rng.h"

static void error_messages(void **state) {
  (void)state;
  assert_int_equal(mt_fail(MT_EIO, "file '%s'", "a"), MT_EIO);
  mt_context(MT_EIO, "layer %d", 3);
  assert_string_equal(mt_error_message(), "layer 3: file 'a'");
  mt_context(MT_OK, "never");
  assert_string_equal(mt_error_message(), "layer 3: file 'a'");
  mt_fail(MT_EINVAL, "again (%s)", mt_error_message());
  assert_string_equal(mt_error_message(), "again (layer 3: file 'a')");
  assert_string_equal(mt_err_name(MT_ESHAPE), "shape mismatch");
  assert_string_equal(mt_err_name((mt_err)999), "unknown error");
}

static void arena_plan_equals_use(void **state) {
  (void)state;
  static _Alignas(MT_ARENA_ALIGN) char memory[16384];
  struct mt_arena plan, real;
  size_t peak = 0;
  for (int pass = 0; pass < 2; pass++) {
    struct mt_arena *a = pass ? &real : &plan;
    if (pass)
      mt_arena_adopt(a, "real", memory, peak);
    else
      mt_arena_plan(a, "plan");
    void *p;
    assert_int_equal(mt_arena_alloc(a, 1000, &p), MT_OK);
    assert_true(pass == (p != NULL));
    size_t mark = mt_arena_mark(a);
    assert_int_equal(mt_arena_alloc(a, 5000, &p), MT_OK);
    assert_true((uintptr_t)p % MT_ARENA_ALIGN == 0);
    mt_arena_reset(a, mark);
    assert_int_equal(mt_arena_alloc(a, 1, &p), MT_OK);
    if (!pass) peak = a->peak_bytes;
  }
  assert_int_equal(real.peak_bytes, peak);
  void *p;
  assert_int_equal(mt_arena_alloc(&real, peak, &p), MT_ENOMEM);
  assert_non_null(strstr(mt_error_message(), "real"));
  assert_int_equal(mt_arena_alloc(&plan, SIZE_MAX - 10, &p), MT_ENOMEM);
  assert_true(peak <= sizeof memory);
}

/* What large files look like passes; what costs far more memory than it has bytes does not. */
static void bearable_json(void **state) {
  static const struct {
    const char *piece;
    bool good;
  } cases[] = {
      {"\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,0]},", true},
      {"\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]},", true},
      {"\"a\":\"b\",", true},
      {"[\"a\",\"b\"],", true},
      {"\"a\":1,", true},
      {"\"{[,\\\"{[,{[,\",", true},
      {"{},", false},
      {"[],", false},
      {"1,", false},
      {"[", false},
      {"\"\",", false},
  };
  enum { SIZE = 2 << 20 };
  char *text = malloc(SIZE + 256);
  (void)state;
  assert_non_null(text);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    size_t n = strlen(cases[i].piece), size = 0;
    for (; size < SIZE; size += n) memcpy(text + size, cases[i].piece, n);
    if (mt_json_bearable(text, size) != cases[i].good) fail_msg("%s", cases[i].piece);
    assert_true(mt_json_bearable(text, 1 << 20));
  }
  free(text);
}

/* Known-answer vectors of Random123 (kat_vectors, philox4x32-10). */
static void philox_known_answers(void **state) {
  (void)state;
  static const uint32_t cases[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
       0x94fdcceb, 0x5001e420, 0x24126ea1},
  };
  for (int i = 0; i < 3; i++) {
    uint32_t out[4];
    mt_philox(cases[i], cases[i] + 4, 10, out);
    assert_memory_equal(out, cases[i] + 6, sizeof out);
  }
  static const uint32_t seven[4] = {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48};
  uint32_t out[4];
  mt_philox(cases[0], cases[0] + 4, 7, out);
  assert_memory_equal(out, seven, sizeof out);
}

static void rng_statistics(void **state) {
  (void)state;
  struct mt_rng r = mt_rng_make(1, 2);
  double sum = 0, square = 0;
  for (int i = 0; i < 20000; i++) {
    double x = mt_rng_normal(&r);
    sum += x, square += x * x;
  }
  assert_true(fabs(sum / 20000) < 0.03 && fabs(square / 20000 - 1) < 0.05);
  struct mt_rng again = mt_rng_make(1, 2);
  again.position = r.position;
  assert_int_equal(mt_rng_u32(&r), mt_rng_u32(&again));
  uint32_t items[64];
  for (uint32_t i = 0; i < 64; i++) items[i] = i;
  mt_rng_shuffle(&r, items, 64);
  uint64_t seen = 0;
  for (int i = 0; i < 64; i++) seen |= (uint64_t)1 << items[i];
  assert_true(seen == UINT64_MAX);
}

static void formats_round_to_even(void **state) {
  (void)state;
  assert_int_equal(mt_f32_to_bf16(1.0f + 0x1p-8f), 0x3f80);  /* tie to even: down */
  assert_int_equal(mt_f32_to_bf16(1.0f + 0x3p-8f), 0x3f82);  /* tie to even: up */
  assert_int_equal(mt_f32_to_bf16(0x1.fffffep127f), 0x7f80); /* overflow */
  assert_true(isnan(mt_bf16_to_f32(mt_f32_to_bf16(NAN))));
  uint32_t sneaky = 0x7f800001; /* a NaN whose payload lies in the dropped bits */
  float f;
  memcpy(&f, &sneaky, 4);
  assert_true(isnan(mt_bf16_to_f32(mt_f32_to_bf16(f))));
  /* Every finite half survives the round trip; ties go to even. */
  for (uint32_t h = 0; h < 0x10000; h++) {
    float x = mt_f16_to_f32((uint16_t)h);
    if (isnan(x))
      assert_true(isnan(mt_f16_to_f32(mt_f32_to_f16(x))));
    else
      assert_int_equal(mt_f32_to_f16(x), h);
  }
  assert_int_equal(mt_f32_to_f16(1.0f + 0x1p-11f), 0x3c00);
  assert_int_equal(mt_f32_to_f16(1.0f + 0x3p-11f), 0x3c02);
  assert_int_equal(mt_f32_to_f16(65519.0f), 0x7bff);
  assert_int_equal(mt_f32_to_f16(65520.0f), 0x7c00);
  assert_int_equal(mt_f32_to_f16(0x1p-25f), 0);
  assert_int_equal(mt_f32_to_f16(0x1.8p-25f), 1);
}

static void convert_formats(void **state) {
  (void)state;
  const float in[3] = {1.5f, -2.25f, 3e-5f};
  char raw[64];
  for (int d = MT_F32; d <= MT_F64; d++) {
    float out[3];
    assert_int_equal(mt_dtype_convert(raw + 1, (enum mt_dtype)d, in, MT_F32, 3), 0);
    assert_int_equal(mt_dtype_convert(out, MT_F32, raw + 1, (enum mt_dtype)d, 3), 0);
    for (int i = 0; i < 3; i++) assert_true(fabsf(out[i] - in[i]) <= fabsf(in[i]) * 0x1p-8f);
  }
  assert_int_equal(mt_dtype_convert(raw, MT_I32, in, MT_F32, 1), -1);
  assert_int_equal(mt_dtype_parse("BF16"), MT_BF16);
  assert_int_equal(mt_dtype_parse("F8_E4M3"), MT_DTYPE_COUNT);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(error_messages),        cmocka_unit_test(bearable_json),
      cmocka_unit_test(arena_plan_equals_use), cmocka_unit_test(philox_known_answers),
      cmocka_unit_test(rng_statistics),        cmocka_unit_test(formats_round_to_even),
      cmocka_unit_test(convert_formats),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
