/* Products of 8-bit operands where nothing is rounded: they must be those of the numbers
 * themselves; that the recipes' tolerances see one block's wrong scale; and blocks of other
 * things than numbers; and rows that travel. */
#include "base/fp8.h"
#include "kernels/bed.h"
#include "quant/linear.h"

static const struct {
  const char *recipe;
  enum mt_qformat format;
} formats[] = {{"mxfp8", MT_Q_MXFP8}, {"fp8", MT_Q_FP8}};
enum { FORMATS = 2, GROUPS = 3 };

/* Ragged: an empty group, one below a block, one above. */
static const int32_t offsets[GROUPS + 1] = {0, 0, 21, 170};
enum { ROWS = 170, IN = 192, OUT = 160 };

struct products {
  struct bed *b;
  enum mt_qformat format;
  struct mt_tensor x, w, dy; /* F64 on ref */
  const int32_t *offsets, *padded;
  struct mt_qtensor qx, qw, qdy;
};

/* Whole numbers below 8 times a power of two of the square of blocks that they lie in: exact in
 * blocks along rows and along columns, and no two neighbouring blocks have one scale. */
static void exact_numbers(struct bed *b, double *v, int64_t rows, int64_t cols, int block) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < cols; c++) {
      int exponent = (int)((r / block * 5 + c / block * 3) % 11) - 5;
      v[r * cols + c] = ldexp((double)mt_rng_below(&b->rng, 15) - 7, exponent);
    }
  }
}

static struct mt_qtensor quantized(struct products *p, struct mt_tensor x) {
  struct mt_row_groups g = {.offsets = p->offsets, .padded = p->padded, .count = GROUPS};
  size_t bytes = mt_operand_bytes(p->format, ROWS, x.dim[1], GROUPS, MT_SIDE_BOTH);
  struct mt_operand o = {.format = p->format, .memory = dev_mem(p->b, bytes)};
  memset(o.memory, 0x7f, bytes);
  OK(mt_operand_make(&p->b->be, &o, x, ROWS, MT_SIDE_BOTH, &g));
  return o.q;
}

static struct products make_products(struct bed *b, enum mt_qformat format, bool exact) {
  struct products p = {.b = b, .format = format};
  int block = mt_q_block(format);
  double *x = normals(b, ROWS * IN, 1), *dy = normals(b, ROWS * OUT, 1),
         *w = normals(b, GROUPS * OUT * IN, 0.3);
  int32_t *padded = ints(b, NULL, GROUPS + 1);
  if (exact) {
    /* Of each group by itself, since blocks begin anew with it. */
    for (int g = 0; g < GROUPS; g++) {
      int64_t rows = offsets[g + 1] - offsets[g];
      exact_numbers(b, x + offsets[g] * IN, rows, IN, block);
      exact_numbers(b, dy + offsets[g] * OUT, rows, OUT, block);
      exact_numbers(b, w + g * OUT * IN, OUT, IN, block);
    }
  }
  p.offsets = ints(b, offsets, GROUPS + 1);
  DO(b, pad_offsets, .offsets = p.offsets, .group_count = GROUPS, .padded = padded);
  p.padded = padded;
  p.x = act(b, x, ROWS, IN);
  p.dy = act(b, dy, ROWS, OUT);
  p.w = filled(b, mt_cube(NULL, b->recipe->act, GROUPS, OUT, IN), w);
  p.qx = quantized(&p, p.x);
  p.qdy = quantized(&p, p.dy);
  void *memory = dev_mem(b, mt_qweight_bytes(format, 3, p.w.dim, MT_SIDE_BOTH));
  mt_qweight_shape(&p.qw, format, 3, p.w.dim, MT_SIDE_BOTH, memory);
  DO(b, quantize_weight, .w = p.w, .q = p.qw);
  return p;
}

enum { FWD, DGRAD, WGRAD, PRODUCTS };

/* One product of the 8-bit operands; its count and numbers. */
static double *product(struct products *p, int which, int64_t *count) {
  struct bed *b = p->b;
  struct mt_tensor y = which == FWD ? act(b, NULL, ROWS, OUT)
                       : which == DGRAD
                           ? act(b, NULL, ROWS, IN)
                           : filled(b, mt_cube(NULL, b->recipe->grad, GROUPS, OUT, IN), NULL);
  if (which == FWD) DO(b, qlinear_fwd, .x = p->qx, .w = p->qw, .y = y, .offsets = p->offsets);
  if (which == DGRAD)
    DO(b, qlinear_dgrad, .dy = p->qdy, .w = p->qw, .dx = y, .offsets = p->offsets);
  if (which == WGRAD)
    DO(b, qlinear_wgrad, .dy = p->qdy, .x = p->qx, .dw = y, .offsets = p->offsets,
       .padded = p->padded);
  *count = mt_count(&y);
  return values(b, &y);
}

static double *product_of_numbers(struct products *p, int which) {
  struct bed *b = p->b;
  struct mt_tensor y = which == FWD ? act(b, NULL, ROWS, OUT)
                       : which == DGRAD
                           ? act(b, NULL, ROWS, IN)
                           : filled(b, mt_cube(NULL, b->recipe->grad, GROUPS, OUT, IN), NULL);
  if (which == FWD) DO(b, linear_fwd, .x = p->x, .w = p->w, .y = y, .offsets = p->offsets);
  if (which == DGRAD) DO(b, linear_dgrad, .dy = p->dy, .w = p->w, .dx = y, .offsets = p->offsets);
  if (which == WGRAD) DO(b, linear_wgrad, .dy = p->dy, .x = p->x, .dw = y, .offsets = p->offsets);
  return values(b, &y);
}

static void exact_operands_give_the_numbers_products(void **state) {
  (void)state;
  static const char *const names[] = {"fwd", "dgrad", "wgrad"};
  struct bed b;
  bed_open(&b, "ref", "fp64");
  for (int f = 0; f < FORMATS; f++) {
    struct products p = make_products(&b, formats[f].format, true);
    for (int i = 0; i < PRODUCTS; i++) {
      int64_t n;
      double *got = product(&p, i, &n);
      expect_same(&b, names[i], got, product_of_numbers(&p, i), n);
    }
    bed_clear(&b);
  }
  bed_close(&b);
}

/* Doubles the scale of one block of a copy, and back (halved). */
static void spoil(enum mt_qformat format, void *scales, int64_t at, bool back) {
  if (format == MT_Q_FP8)
    ((float *)scales)[at] *= back ? 0.5f : 2.0f;
  else
    ((uint8_t *)scales)[at] = (uint8_t)(((uint8_t *)scales)[at] + (back ? -1 : 1));
}

static void a_scale_of_one_block_is_seen(void **state) {
  (void)state;
  struct bed b;
  bed_open(&b, "ref", "fp64");
  for (int f = 0; f < FORMATS; f++) {
    enum mt_qformat format = formats[f].format;
    double tolerance = mt_recipe_find(formats[f].recipe)->op_tolerance;
    struct products p = make_products(&b, format, false);
    for (int i = 0; i < PRODUCTS; i++) {
      /* Of each operand, a block that rows of the last group meet. */
      void *scales[2] = {i == FWD     ? p.qx.row_scale
                         : i == DGRAD ? p.qdy.row_scale
                                      : p.qdy.col_scale,
                         i == FWD     ? p.qw.row_scale
                         : i == DGRAD ? p.qw.col_scale
                                      : p.qx.col_scale};
      int64_t at[2] = {100,
                       i == WGRAD ? (MT_Q_PAD / mt_q_block(format) + 1) * (int64_t)IN + 3 : 17};
      if (i == WGRAD) at[0] = (MT_Q_PAD / mt_q_block(format)) * (int64_t)OUT + 5;
      if (i != WGRAD && format == MT_Q_FP8) at[1] = 2 * 4 + 1; /* matrix 2 of 2 x 2 blocks */
      if (i != WGRAD && format == MT_Q_MXFP8) at[1] = (int64_t)OUT * IN / 32 * 2 + 17;
      for (int o = 0; o < 2; o++) {
        int64_t n;
        double *right = product(&p, i, &n);
        spoil(format, scales[o], at[o], false);
        double off = distance(product(&p, i, &n), right, n);
        spoil(format, scales[o], at[o], true);
        if (off <= tolerance)
          fail_msg("%s: product %d, operand %d: a doubled scale is off by %.2g of %.2g",
                   formats[f].recipe, i, o, off, tolerance);
      }
    }
    bed_clear(&b);
  }
  bed_close(&b);
}

/* A zero block, a NaN, an infinity, and padding, in both formats. */
static void special_blocks(struct bed *b) {
  enum { R = 33, C = 128 };
  double *v = normals(b, R * C, 1);
  for (int64_t c = 0; c < C; c++) v[c] = 0, v[C + c] = c == 40 ? NAN : 1, v[2 * C + c] = 1;
  v[2 * C + 70] = -INFINITY;
  struct mt_tensor x = act(b, v, R, C);
  for (int f = 0; f < FORMATS; f++) {
    enum mt_qformat format = formats[f].format;
    size_t bytes = mt_operand_bytes(format, R, C, 1, MT_SIDE_BOTH);
    struct mt_operand o = {.format = format, .memory = dev_mem(b, bytes)};
    uint8_t *got = host_mem(b, bytes);
    memset(got, 0x7f, bytes);
    OK(b->be.upload(&b->be, o.memory, got, bytes));
    OK(mt_operand_make(&b->be, &o, x, R, MT_SIDE_BOTH, NULL));
    OK(b->be.download(&b->be, got, o.memory, bytes));
    o.memory = got;
    mt_operand_shape(&o, R, C, MT_SIDE_BOTH, NULL);
    for (int64_t c = 0; c < C; c++) assert_int_equal(o.q.row[c] & 0x7f, 0);
    assert_int_equal(o.q.row[C + 40] & 0x7f, 0x7f);
    if (format == MT_Q_MXFP8) {
      const uint8_t *s = o.q.row_scale;
      assert_int_equal(s[0], 0);
      assert_int_equal(s[4 + 1], 255);
      assert_int_equal(s[8 + 2], 254);
    } else {
      const float *s = o.q.row_scale;
      assert_true(s[0] == 1 && isnan(s[1]) && s[2] == 0x1p127f);
      for (int64_t c = 0; c < C; c++)
        for (int64_t r = R; r < MT_Q_PAD; r++) assert_int_equal(o.q.col[c * o.q.col_rows + r], 0);
    }
    for (int64_t i = R * C; format == MT_Q_MXFP8 && i < MT_Q_PAD * C; i++)
      assert_int_equal(o.q.col[i], 0);
  }
}
ON_EVERY_BACKEND(special_blocks)

/* The row copy of an operand in float32: its numbers, whatever bytes they have. */
static float row_number(const struct mt_qtensor *q, int64_t r, int64_t c) {
  int64_t cols = q->dim[1], blocks = mt_q_blocks(q->format, cols), k = c / mt_q_block(q->format);
  float scale = q->format == MT_Q_FP8
                    ? ((const float *)q->row_scale)[k * q->scale_ld + r]
                    : mt_e8m0_to_f32(((const uint8_t *)q->row_scale)[r * blocks + k]);
  return mt_e4m3_to_f32(q->row[r * cols + c]) * scale;
}

/* The row copy of x, on the host. */
static struct mt_qtensor row_copy(struct bed *b, enum mt_qformat format, struct mt_tensor x) {
  int64_t rows = x.dim[0], cols = x.dim[1];
  size_t bytes = mt_operand_bytes(format, rows, cols, 1, MT_SIDE_ROW);
  struct mt_operand o = {.format = format, .memory = dev_mem(b, bytes)};
  uint8_t *got = host_mem(b, bytes);
  OK(mt_operand_make(&b->be, &o, x, rows, MT_SIDE_ROW, NULL));
  OK(b->be.download(&b->be, got, o.memory, bytes));
  o.memory = got;
  mt_operand_shape(&o, rows, cols, MT_SIDE_ROW, NULL);
  return o.q;
}

/* A row that travelled in 8 bits: its record has the bytes of the row copy made where it came from,
 * and the row copy made where it arrives has the same numbers, bit for bit, whatever its blocks'
 * largest magnitudes are; the same bytes too but for blocks whose largest magnitude was in (1.75,
 * 1.8125] 2^e, where the scale is a half and elements twice as large. Zeros, a NaN and infinities
 * among them. */
static void records_arrive_as_they_left(struct bed *b) {
  enum { R = 96, C = 160 };
  double *v = normals(b, R * C, 1);
  for (int64_t r = 0; r < R; r++) { /* maxima over the mantissas, from row to row */
    for (int64_t c = 0; c < C; c += 32)
      v[r * C + c + r % 32] = ldexp(1 + (double)(r * 5 + c / 32) / (R * 5), (int)(r % 9) - 2);
  }
  for (int64_t c = 0; c < C; c++) v[c] = 0;
  v[C + 7] = NAN, v[2 * C + 7] = INFINITY, v[3 * C + 7] = -INFINITY;
  struct mt_tensor x = act(b, v, R, C), back = act(b, NULL, R, C);
  for (int f = 0; f < FORMATS; f++) {
    enum mt_qformat format = formats[f].format;
    int64_t record = mt_q_record_bytes(format, C), blocks = mt_q_blocks(format, C), others = 0;
    uint8_t *dev = dev_mem(b, (size_t)(R * record)), *sent = host_mem(b, (size_t)(R * record));
    DO(b, pack_rows, .x = x, .row_count = R, .format = format, .records = dev);
    DO(b, unpack_rows, .records = dev, .format = format, .xs = back);
    OK(b->be.download(&b->be, sent, dev, (size_t)(R * record)));
    struct mt_qtensor left = row_copy(b, format, x), arrived = row_copy(b, format, back);
    for (int64_t r = 0; r < R; r++) {
      assert_memory_equal(sent + r * record, left.row + r * C, C);
      for (int64_t k = 0; k < blocks; k++) {
        int64_t at = format == MT_Q_FP8 ? k * left.scale_ld + r : r * blocks + k;
        float scale = mt_e8m0_to_f32(sent[r * record + C + k]);
        float want = format == MT_Q_FP8 ? ((const float *)left.row_scale)[at]
                                        : mt_e8m0_to_f32(((const uint8_t *)left.row_scale)[at]);
        assert_memory_equal(&scale, &want, sizeof scale);
      }
      for (int64_t c = 0; c < C; c++) {
        float a = row_number(&left, r, c), z = row_number(&arrived, r, c);
        if (!(a == z || (isnan(a) && isnan(z)))) fail_msg("row %d, column %d", (int)r, (int)c);
        others += left.row[r * C + c] != arrived.row[r * C + c];
      }
    }
    assert_true(others > 0 && others < R * C / 4); /* such blocks were among them */
  }
}
ON_EVERY_BACKEND(records_arrive_as_they_left)

/* What does not fit is refused with a message. */
static void misfits_are_named(void **state) {
  (void)state;
  struct bed b;
  bed_open(&b, "cpu", "bf16");
  struct mt_operand o = {.format = MT_Q_FP8,
                         .memory = dev_mem(&b, mt_operand_bytes(MT_Q_FP8, 8, 64, 1, MT_SIDE_ROW))};
  mt_operand_shape(&o, 8, 64, MT_SIDE_ROW, NULL);
  struct mt_tensor x = act(&b, normals(&b, 8 * 32, 1), 8, 32);
  struct mt_quantize_args a = {.x = x, .q = o.q};
  assert_int_equal(b.be.ops.quantize(&b.be, &a), MT_ESHAPE);
  assert_non_null(strstr(mt_error_message(), "quantize: x is"));
  struct mt_tensor y = act(&b, NULL, 8, 16);
  struct mt_qlinear_fwd_args p = {.x = o.q, .w = o.q, .y = y};
  assert_int_equal(b.be.ops.qlinear_fwd(&b.be, &p), MT_ESHAPE);
  assert_non_null(strstr(mt_error_message(), "qlinear_fwd: w is rows"));
  o.q.scale_ld = 6;
  a.x = act(&b, normals(&b, 8 * 64, 1), 8, 64);
  a.q = o.q;
  assert_int_equal(b.be.ops.quantize(&b.be, &a), MT_ESHAPE);
  bed_close(&b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(exact_operands_give_the_numbers_products),
      cmocka_unit_test(a_scale_of_one_block_is_seen),
      cmocka_unit_test(test_special_blocks),
      cmocka_unit_test(test_records_arrive_as_they_left),
      cmocka_unit_test(misfits_are_named),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
