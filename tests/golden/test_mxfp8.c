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
#include "quant/linear.h"
#include "ok.h"

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

static const char *const backends[] = {"ref", "cpu", "cuda", "cuda-portable"};
enum { BACKENDS = sizeof backends / sizeof *backends };

/* Both copies of a host tensor as a backend's operation makes them; q's pointers are into host. */
struct made {
  char *host;
  struct mt_qtensor q;
};
static struct made quantized(const char *backend, const struct mt_tensor *x, enum mt_qformat format,
                             bool weight) {
  struct mt_backend be;
  struct mt_limits l = {
      .tokens = 64, .rows = 64, .hidden = 64, .ffn = 64, .experts = 1, .vocab = 64};
  struct mt_tensor source = *x;
  struct made m;
  size_t bytes = weight ? mt_qweight_bytes(format, 2, x->dim, MT_SIDE_BOTH)
                        : mt_operand_bytes(format, x->dim[0], x->dim[1], 1, MT_SIDE_BOTH);
  size_t source_bytes = (size_t)(x->dim[0] * x->ld) * mt_dtype_bytes(x->dtype);
  struct mt_operand o = {.format = format};
  OK(mt_backend_create(&be, backend, 2));
  be.workspace_size_bytes = be.workspace_bytes(&be, &l);
  OK(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
  OK(be.mem_alloc(&be, source_bytes, &source.data));
  OK(be.mem_alloc(&be, bytes, &o.memory));
  OK(be.upload(&be, source.data, x->data, source_bytes));
  m.host = malloc(bytes);
  memset(m.host, 0x7f, bytes);
  OK(be.upload(&be, o.memory, m.host, bytes));
  if (weight) {
    mt_qweight_shape(&o.q, format, 2, x->dim, MT_SIDE_BOTH, o.memory);
    OK(be.ops.quantize_weight(&be, &(struct mt_quantize_weight_args){.w = source, .q = o.q}));
    mt_qweight_shape(&m.q, format, 2, x->dim, MT_SIDE_BOTH, m.host);
  } else {
    struct mt_operand there = {.format = format, .memory = m.host};
    OK(mt_operand_make(&be, &o, source, x->dim[0], MT_SIDE_BOTH, NULL));
    mt_operand_shape(&there, x->dim[0], x->dim[1], MT_SIDE_BOTH, NULL);
    m.q = there.q;
  }
  OK(be.download(&be, m.host, o.memory, bytes));
  be.mem_free(&be, o.memory, bytes);
  be.mem_free(&be, source.data, source_bytes);
  be.mem_free(&be, be.workspace, be.workspace_size_bytes);
  mt_backend_destroy(&be);
  return m;
}

static bool lacks_gpu(const char *backend) {
  return strncmp(backend, "cuda", 4) == 0 && mt_cuda_device_count() == 0;
}

static void blocks_are_those_of_the_fixture(void **state) {
  (void)state;
  static const char *const cases[] = {"bf16", "edges", "normal", "small",
                                      "ties", "wide",  "special"};
  struct mt_st_file f;
  OK(mt_st_open(MT_SOURCE_DIR "/tests/golden/mxfp8.safetensors", &f));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const struct mt_st_tensor *x = tensor(&f, cases[i], "x"), *scale = tensor(&f, cases[i], "e8m0");
    int64_t rows = x->dim[0], cols = x->dim[1];
    float *v = malloc(x->size_bytes);
    memcpy(v, x->data, x->size_bytes);
    struct mt_tensor t = mt_mat(v, MT_F32, rows, cols);
    for (size_t b = 0; b < BACKENDS; b++) {
      if (lacks_gpu(backends[b])) continue;
      struct made m = quantized(backends[b], &t, MT_Q_MXFP8, false);
      assert_memory_equal(m.q.row_scale, scale->data, scale->size_bytes);
      if (strcmp(cases[i], "special") != 0)
        assert_memory_equal(m.q.row, tensor(&f, cases[i], "e4m3")->data, (size_t)(rows * cols));
      free(m.host);
    }
    free(v);
  }
  mt_st_close(&f);
}

/* Ragged sizes, a row stride, both formats. */
enum { ROWS = 293, COLS = 341, LD = 350, PADDED = 384 };

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

static float widest(float top, float x) {
  return fmaxf(top, fabsf(x));
}

/* MXFP8: each element of either copy is the source over the scale of its 32, which is its
 * largest's.
 */
static void expect_mx(const struct mt_tensor *x, const struct mt_qtensor *q) {
  enum { CB = (COLS + 31) / 32 };
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLS; c++) {
      float along = 0, down = 0;
      for (int i = c / 32 * 32; i < c / 32 * 32 + 32 && i < COLS; i++)
        along = widest(along, value(x, r, i));
      for (int i = r / 32 * 32; i < r / 32 * 32 + 32 && i < ROWS; i++)
        down = widest(down, value(x, i, c));
      uint8_t s = ((uint8_t *)q->row_scale)[r * CB + c / 32];
      uint8_t k = ((uint8_t *)q->col_scale)[r / 32 * COLS + c];
      double v = (double)value(x, r, c);
      assert_int_equal(s, mt_e8m0_scale(along));
      assert_int_equal(k, mt_e8m0_scale(down));
      assert_int_equal(q->row[r * COLS + c], mt_f32_to_e4m3((float)(v / mt_e8m0_to_f32(s))));
      assert_int_equal(q->col[r * COLS + c], mt_f32_to_e4m3((float)(v / mt_e8m0_to_f32(k))));
    }
  }
  for (int i = ROWS * COLS; i < PADDED * COLS; i++) assert_int_equal(q->col[i], 0);
}

static void mx_blocks_are_the_source_rounded_once(void **state) {
  (void)state;
  for (int way = 0; way < 2; way++) {
    struct mt_tensor x;
    void *data = source(way ? MT_BF16 : MT_F32, &x);
    for (size_t b = 0; b < BACKENDS; b++) {
      if (lacks_gpu(backends[b])) continue;
      struct made m = quantized(backends[b], &x, MT_Q_MXFP8, false);
      expect_mx(&x, &m.q);
      free(m.host);
    }
    free(data);
  }
}

/* FP8: 1 x 128 both ways, and a weight's 128 x 128, turned as it is. */
static void expect_fp8(const struct mt_tensor *x, const struct mt_qtensor *q,
                       const struct mt_qtensor *w) {
  enum { RB = (ROWS + 127) / 128, CB = (COLS + 127) / 128 };
  static float top_row[ROWS][CB], top_col[COLS][RB], top[RB][CB];
  const float *rs = q->row_scale, *cs = q->col_scale, *ws = w->row_scale, *turned = w->col_scale;
  memset(top_row, 0, sizeof top_row), memset(top_col, 0, sizeof top_col);
  memset(top, 0, sizeof top);
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLS; c++) {
      float a = value(x, r, c);
      top_row[r][c / 128] = widest(top_row[r][c / 128], a);
      top_col[c][r / 128] = widest(top_col[c][r / 128], a);
      top[r / 128][c / 128] = widest(top[r / 128][c / 128], a);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLS; c++) {
      float v = value(x, r, c), s = rs[c / 128 * q->scale_ld + r], k = cs[r / 128 * COLS + c];
      float b = ws[r / 128 * CB + c / 128];
      assert_true(
          s == (top_row[r][c / 128] > 0 ? mt_e8m0_to_f32(mt_e8m0_scale(top_row[r][c / 128])) : 1));
      assert_true(k == mt_e8m0_to_f32(mt_e8m0_scale(top_col[c][r / 128])));
      assert_true(b == mt_e8m0_to_f32(mt_e8m0_scale(top[r / 128][c / 128])));
      assert_true(b == turned[c / 128 * RB + r / 128]);
      assert_int_equal(q->row[r * COLS + c], mt_f32_to_e4m3(v / s));
      assert_int_equal(q->col[c * PADDED + r], mt_f32_to_e4m3(v / k));
      assert_int_equal(w->row[r * COLS + c], mt_f32_to_e4m3(v / b));
      assert_int_equal(w->col[c * ROWS + r], w->row[r * COLS + c]);
    }
  }
}

static void fp8_blocks_are_the_source_rounded_once(void **state) {
  (void)state;
  struct mt_tensor x, whole;
  void *data = source(MT_BF16, &x);
  uint16_t *packed = malloc(ROWS * COLS * sizeof *packed); /* a weight has no row stride */
  for (int r = 0; r < ROWS; r++)
    memcpy(packed + r * COLS, (uint16_t *)data + r * LD, COLS * sizeof *packed);
  whole = mt_mat(packed, MT_BF16, ROWS, COLS);
  for (size_t b = 0; b < BACKENDS; b++) {
    if (lacks_gpu(backends[b])) continue;
    struct made m = quantized(backends[b], &x, MT_Q_FP8, false);
    struct made w = quantized(backends[b], &whole, MT_Q_FP8, true);
    assert_int_equal(m.q.col_rows, PADDED);
    expect_fp8(&x, &m.q, &w.q);
    free(m.host), free(w.host);
  }
  free(packed), free(data);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(values_are_those_of_the_formats),
      cmocka_unit_test(rounding_is_to_nearest_even),
      cmocka_unit_test(scales_are_the_least_that_fit),
      cmocka_unit_test(blocks_are_those_of_the_fixture),
      cmocka_unit_test(mx_blocks_are_the_source_rounded_once),
      cmocka_unit_test(fp8_blocks_are_the_source_rounded_once),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
