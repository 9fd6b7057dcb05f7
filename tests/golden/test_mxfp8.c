/* Eight-bit formats: every code, every rounding, and MXFP8 blocks byte for byte as the fixture has
 * them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/fp8.h"
#include "base/rng.h"
#include "io/safetensors.h"
#include "kernels/registry.h"
#include "quant/blocks.h"
#include "quant/linear.h"

#define OK(call)                                                                                   \
  do {                                                                                             \
    if (call) fail_msg("%s: %s", #call, mt_error_message());                                       \
  } while (0)

struct format {
  const char *name;
  float (*decode)(uint8_t);
  uint8_t (*encode)(float);
  uint8_t top; /* code of the largest number */
};

static uint8_t encode_e4m3(float f) {
  return mt_f32_to_e4m3(f);
}

static const struct format formats[] = {{"e4m3", mt_e4m3_to_f32, encode_e4m3, 0x7e},
                                        {"e5m2", mt_e5m2_to_f32, mt_f32_to_e5m2, 0x7b}};

static void values_are_those_of_the_formats(void **state) {
  (void)state;
  const struct {
    uint8_t code;
    float e4m3, e5m2;
  } known[] = {{0x00, 0, 0},     {0x01, 0x1p-9f, 0x1p-16f}, {0x07, 0x1.cp-7f, 0x1.cp-14f},
               {0x38, 1, 0.5f},  {0x3c, 1.5f, 1},           {0x7b, 352, 57344},
               {0xb8, -1, -0.5f}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    assert_true(mt_e4m3_to_f32(known[i].code) == known[i].e4m3);
    assert_true(mt_e5m2_to_f32(known[i].code) == known[i].e5m2);
  }
  assert_true(mt_e4m3_to_f32(0x7e) == 448);
  assert_true(isnan(mt_e4m3_to_f32(0x7f)) && isnan(mt_e4m3_to_f32(0xff)));
  assert_true(isinf(mt_e5m2_to_f32(0x7c)) && isnan(mt_e5m2_to_f32(0x7d)));
  assert_true(mt_e8m0_to_f32(127) == 1 && mt_e8m0_to_f32(0) == 0x1p-127f &&
              mt_e8m0_to_f32(254) == 0x1p127f && isnan(mt_e8m0_to_f32(255)));
}

/* Each number between two codes goes to the nearer one, in the middle to the even one. */
static void rounding_is_to_nearest_even(void **state) {
  (void)state;
  for (size_t f = 0; f < 2; f++) {
    const struct format *x = &formats[f];
    for (int code = 0; code <= x->top; code++) {
      float v = x->decode((uint8_t)code);
      assert_int_equal(x->encode(v), code);
      assert_int_equal(x->encode(-v), code | 0x80);
      if (code == x->top) break;
      float next = x->decode((uint8_t)(code + 1)), middle = v + (next - v) / 2;
      int even = code % 2 ? code + 1 : code;
      assert_int_equal(x->encode(middle), even);
      assert_int_equal(x->encode(-middle), even | 0x80);
      assert_int_equal(x->encode(nextafterf(middle, 0)), code);
      assert_int_equal(x->encode(nextafterf(middle, next)), code + 1);
    }
    float top = x->decode(x->top);
    const float over[] = {nextafterf(top, INFINITY), top * 1.03f, top * 1.07f, 1e30f, INFINITY};
    for (size_t i = 0; i < sizeof over / sizeof *over; i++) {
      assert_int_equal(x->encode(over[i]), x->top);
      assert_int_equal(x->encode(-over[i]), x->top | 0x80);
    }
    assert_int_equal(x->encode(1e-30f), 0);
    assert_true(isnan(x->decode(x->encode(NAN))));
  }
}

/* The scale by logarithms in float64, for random and for awkward magnitudes. */
static void scales_are_the_least_that_fit(void **state) {
  (void)state;
  struct mt_rng r = mt_rng_make(1, 2);
  for (int i = 0; i < 200000; i++) {
    float x =
        ldexpf(1 + (float)mt_rng_below(&r, 1 << 23) / (1 << 23), (int)mt_rng_below(&r, 250) - 125);
    if (i % 3 == 0) x = ldexpf(448, (int)mt_rng_below(&r, 230) - 120);
    if (i % 6 == 0) x = nextafterf(x, i % 12 ? 0 : INFINITY);
    double k = ceil(log2((double)x / 448));
    while (ldexp(448, (int)k) < (double)x) k++; /* the logarithm may be rounded */
    while (ldexp(448, (int)k - 1) >= (double)x) k--;
    k = k < -127 ? -127 : k;
    assert_int_equal(mt_e8m0_scale(x), (int)k + 127);
  }
  assert_int_equal(mt_e8m0_scale(0), 0);
  assert_int_equal(mt_e8m0_scale(1e-44f), 0);
  assert_int_equal(mt_e8m0_scale(INFINITY), 254);
  assert_int_equal(mt_e8m0_scale(NAN), 255);
}

static const struct mt_st_tensor *tensor(const struct mt_st_file *f, const char *name,
                                         const char *suffix) {
  char full[64];
  snprintf(full, sizeof full, "%s.%s", name, suffix);
  const struct mt_st_tensor *t = mt_st_find(f, full);
  if (!t) fail_msg("no %s in the fixture", full);
  return t;
}

/* The row copy of x that the operation makes on a backend. */
static void quantize_on(const char *backend, const struct mt_st_tensor *x, uint8_t *row,
                        uint8_t *scale) {
  struct mt_backend be;
  struct mt_limits l = {
      .tokens = 64, .rows = 64, .hidden = 64, .ffn = 64, .experts = 1, .vocab = 64};
  int64_t rows = x->dim[0], cols = x->dim[1];
  struct mt_operand o = {.format = MT_Q_MXFP8};
  size_t bytes = mt_operand_bytes(MT_Q_MXFP8, rows, cols, 1, MT_SIDE_ROW);
  void *source;
  char *host = malloc(bytes);
  OK(mt_backend_create(&be, backend, 2));
  be.workspace_size_bytes = be.workspace_bytes(&be, &l);
  OK(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
  OK(be.mem_alloc(&be, x->size_bytes, &source));
  OK(be.mem_alloc(&be, bytes, &o.memory));
  OK(be.upload(&be, source, x->data, x->size_bytes));
  OK(mt_operand_make(&be, &o, mt_mat(source, MT_F32, rows, cols), rows, MT_SIDE_ROW, NULL));
  OK(be.download(&be, host, o.memory, bytes));
  memcpy(row, host + (o.q.row - (uint8_t *)o.memory), (size_t)(rows * cols));
  memcpy(scale, host + ((uint8_t *)o.q.row_scale - (uint8_t *)o.memory),
         (size_t)(rows * cols / 32));
  be.mem_free(&be, o.memory, bytes);
  be.mem_free(&be, source, x->size_bytes);
  be.mem_free(&be, be.workspace, be.workspace_size_bytes);
  mt_backend_destroy(&be);
  free(host);
}

static void blocks_are_those_of_the_fixture(void **state) {
  (void)state;
  static const char *const cases[] = {"bf16", "edges", "normal", "small",
                                      "ties", "wide",  "special"};
  static const char *const backends[] = {"ref", "cpu", "cuda", "cuda-portable"};
  struct mt_st_file f;
  OK(mt_st_open(MT_SOURCE_DIR "/tests/golden/mxfp8.safetensors", &f));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const struct mt_st_tensor *x = tensor(&f, cases[i], "x"), *scale = tensor(&f, cases[i], "e8m0");
    int64_t rows = x->dim[0], cols = x->dim[1];
    float *v = malloc(x->size_bytes);
    uint8_t *row = malloc((size_t)(rows * cols)), *s = malloc((size_t)(rows * cols / 32));
    memcpy(v, x->data, x->size_bytes);
    struct mt_tensor t = mt_mat(v, MT_F32, rows, cols);
    OK(mt_mxfp8_quantize(&t, row, s, NULL, NULL));
    assert_memory_equal(s, scale->data, scale->size_bytes);
    if (strcmp(cases[i], "special") != 0)
      assert_memory_equal(row, tensor(&f, cases[i], "e4m3")->data, (size_t)(rows * cols));
    for (size_t b = 0; b < sizeof backends / sizeof *backends; b++) {
      if (strncmp(backends[b], "cuda", 4) == 0 && mt_cuda_device_count() == 0) continue;
      quantize_on(backends[b], x, row, s);
      assert_memory_equal(s, scale->data, scale->size_bytes);
      if (strcmp(cases[i], "special") != 0)
        assert_memory_equal(row, tensor(&f, cases[i], "e4m3")->data, (size_t)(rows * cols));
    }
    free(v), free(row), free(s);
  }
  mt_st_close(&f);
}

/* Ragged sizes, a row stride, both formats. */
enum { ROWS = 293, COLS = 341, LD = 350 };

static void *source(enum mt_dtype dtype, struct mt_tensor *t) {
  struct mt_rng r = mt_rng_make(7, dtype);
  void *data = malloc(ROWS * LD * mt_dtype_bytes(dtype));
  for (int i = 0; i < ROWS * LD; i++) {
    float x = (float)(mt_rng_normal(&r) * exp(3 * mt_rng_normal(&r)));
    if (i / LD % 50 == 3) x = 0; /* whole rows of zeros */
    mt_dtype_convert((char *)data + (size_t)i * mt_dtype_bytes(dtype), dtype, &x, MT_F32, 1);
  }
  *t = mt_mat(data, dtype, ROWS, COLS);
  t->ld = LD;
  return data;
}

static float value(const struct mt_tensor *t, int64_t r, int64_t c) {
  float x;
  size_t item = mt_dtype_bytes(t->dtype);
  mt_dtype_convert(&x, MT_F32, (const char *)t->data + (size_t)(r * t->ld + c) * item, t->dtype, 1);
  return x;
}

static void both_ways_are_the_source_rounded_once(void **state) {
  (void)state;
  for (int way = 0; way < 2; way++) {
    struct mt_tensor x;
    void *data = source(way ? MT_BF16 : MT_F32, &x);
    enum { RB = (ROWS + 31) / 32, CB = (COLS + 31) / 32 };
    uint8_t *row = malloc(ROWS * COLS), *col = malloc(ROWS * COLS);
    static uint8_t row_scale[ROWS * CB], col_scale[RB * COLS], alone[ROWS * CB];
    static float back[ROWS * COLS];
    OK(mt_mxfp8_quantize(&x, row, row_scale, col, col_scale));
    for (int r = 0; r < ROWS; r++) {
      for (int c = 0; c < COLS; c++) {
        double s = (double)mt_e8m0_to_f32(row_scale[r * CB + c / 32]);
        double k = (double)mt_e8m0_to_f32(col_scale[r / 32 * COLS + c]);
        assert_int_equal(row[r * COLS + c], mt_f32_to_e4m3((float)((double)value(&x, r, c) / s)));
        assert_int_equal(col[r * COLS + c], mt_f32_to_e4m3((float)((double)value(&x, r, c) / k)));
      }
    }
    struct mt_tensor y = mt_mat(back, MT_F32, ROWS, COLS);
    OK(mt_mxfp8_dequantize_columns(col, col_scale, &y));
    for (int i = 0; i < ROWS * COLS; i++) {
      float s = mt_e8m0_to_f32(col_scale[i / COLS / 32 * COLS + i % COLS]);
      assert_true(back[i] == mt_e4m3_to_f32(col[i]) * s);
    }
    OK(mt_mxfp8_dequantize_rows(row, row_scale, &y));
    /* What is made of what came back is the same: nothing is rounded twice. */
    uint8_t *again = malloc(ROWS * COLS);
    OK(mt_mxfp8_quantize(&y, again, alone, NULL, NULL));
    for (int i = 0; i < ROWS * COLS; i++) {
      float a = mt_e4m3_to_f32(again[i]) * mt_e8m0_to_f32(alone[i / COLS * CB + i % COLS / 32]);
      assert_true(a == back[i]);
    }
    free(again), free(row), free(col), free(data);
  }
}

static void blocks_of_128(void **state) {
  (void)state;
  enum { RB = (ROWS + 127) / 128, CB = (COLS + 127) / 128 };
  struct mt_tensor x;
  void *data = source(MT_BF16, &x);
  uint8_t *row = malloc(ROWS * COLS), *col = malloc(ROWS * COLS), *w = malloc(ROWS * COLS),
          *turned = malloc(ROWS * COLS);
  static float row_scale[ROWS * CB], col_scale[COLS * RB], scale[RB * CB], turned_scale[CB * RB];
  OK(mt_fp8_quantize(&x, row, row_scale, col, col_scale));
  OK(mt_fp8_quantize_weight(&x, w, scale, turned, turned_scale));
  float top_row[ROWS][CB] = {{0}}, top_col[COLS][RB] = {{0}}, top[RB][CB] = {{0}};
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLS; c++) {
      float a = fabsf(value(&x, r, c));
      top_row[r][c / 128] = fmaxf(top_row[r][c / 128], a);
      top_col[c][r / 128] = fmaxf(top_col[c][r / 128], a);
      top[r / 128][c / 128] = fmaxf(top[r / 128][c / 128], a);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLS; c++) {
      float v = value(&x, r, c), s = row_scale[r * CB + c / 128], k = col_scale[c * RB + r / 128];
      float b = scale[r / 128 * CB + c / 128];
      assert_true(
          s == (top_row[r][c / 128] > 0 ? mt_e8m0_to_f32(mt_e8m0_scale(top_row[r][c / 128])) : 1));
      assert_true(k == mt_e8m0_to_f32(mt_e8m0_scale(top_col[c][r / 128])));
      assert_true(b == mt_e8m0_to_f32(mt_e8m0_scale(top[r / 128][c / 128])));
      assert_true(b == turned_scale[c / 128 * RB + r / 128]);
      assert_int_equal(row[r * COLS + c], mt_f32_to_e4m3(v / s));
      assert_int_equal(col[c * ROWS + r], mt_f32_to_e4m3(v / k));
      assert_int_equal(w[r * COLS + c], mt_f32_to_e4m3(v / b));
      assert_int_equal(turned[c * ROWS + r], w[r * COLS + c]);
    }
  }
  free(row), free(col), free(w), free(turned), free(data);
}

static void a_nan_or_an_infinity_marks_its_block(void **state) {
  (void)state;
  float v[128 * 2];
  uint8_t e[128 * 2], s[8];
  float wide[2];
  for (int i = 0; i < 256; i++) v[i] = (float)(i % 7) - 3;
  v[40] = NAN, v[128 + 70] = -INFINITY;
  struct mt_tensor x = mt_mat(v, MT_F32, 2, 128);
  OK(mt_mxfp8_quantize(&x, e, s, NULL, NULL));
  const uint8_t want[8] = {s[0], 255, s[0], s[0], s[0], s[0], 254, s[0]};
  assert_memory_equal(s, want, 8);
  assert_true(isnan(mt_e4m3_to_f32(e[40])) && e[128 + 70] == 0xfe);
  assert_int_equal(e[0], mt_f32_to_e4m3(-3 / mt_e8m0_to_f32(s[0])));
  OK(mt_fp8_quantize(&x, e, wide, NULL, NULL));
  assert_true(isnan(wide[0]) && wide[1] == 0x1p127f && isnan(mt_e4m3_to_f32(e[40])));
  assert_int_equal(e[128 + 70], 0xfe);
}

static void blackwells_order_of_scales(void **state) {
  (void)state;
  const int64_t shapes[][2] = {{1, 1}, {128, 4}, {129, 5}, {300, 7}, {31, 12}};
  assert_int_equal(mt_mx_scale_index(0, 0, 4), 0);
  assert_int_equal(mt_mx_scale_index(1, 0, 4), 16);
  assert_int_equal(mt_mx_scale_index(32, 0, 4), 4);
  assert_int_equal(mt_mx_scale_index(0, 3, 4), 3);
  assert_int_equal(mt_mx_scale_index(0, 4, 5), 512);
  assert_int_equal(mt_mx_scale_index(128, 0, 5), 1024);
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    int64_t rows = shapes[i][0], blocks = shapes[i][1], n = mt_mx_scale_bytes(rows, blocks);
    uint8_t *a = malloc((size_t)(rows * blocks)), *b = malloc((size_t)n),
            *c = calloc(1, (size_t)(rows * blocks));
    int64_t there = 0;
    for (int64_t k = 0; k < rows * blocks; k++) a[k] = (uint8_t)(k % 255 + 1);
    memset(b, 0xee, (size_t)n);
    mt_mx_swizzle(a, rows, blocks, b);
    for (int64_t k = 0; k < n; k++) there += b[k] != 0;
    assert_int_equal(there, rows * blocks); /* the padding is zero, nothing lies over another */
    mt_mx_unswizzle(b, rows, blocks, c);
    assert_memory_equal(a, c, (size_t)(rows * blocks));
    free(a), free(b), free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(values_are_those_of_the_formats),
      cmocka_unit_test(rounding_is_to_nearest_even),
      cmocka_unit_test(scales_are_the_least_that_fit),
      cmocka_unit_test(blocks_are_those_of_the_fixture),
      cmocka_unit_test(both_ways_are_the_source_rounded_once),
      cmocka_unit_test(blocks_of_128),
      cmocka_unit_test(a_nan_or_an_infinity_marks_its_block),
      cmocka_unit_test(blackwells_order_of_scales),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
