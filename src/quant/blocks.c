#include "quant/blocks.h"

#include "base/fp8.h"

/* Columns handled at a time: a tile of 32 or 128 rows of them stays in the cache. */
enum { STRIP = 128 };

static int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static mt_err check(const char *what, const struct mt_tensor *x) {
  if (x->dtype == MT_F32 || x->dtype == MT_BF16) return MT_OK;
  return mt_fail(MT_EUNSUPPORTED, "%s: quantizing %s", what, mt_dtype_name(x->dtype));
}

/* Elements [at, at + n) of a row as float32. */
static void read_row(const struct mt_tensor *x, int64_t row, int64_t at, int64_t n, float *to) {
  if (x->dtype == MT_F32) {
    memcpy(to, (const float *)x->data + row * x->ld + at, (size_t)n * sizeof *to);
    return;
  }
  const uint16_t *from = (const uint16_t *)x->data + row * x->ld + at;
  for (int64_t i = 0; i < n; i++) to[i] = mt_bf16_to_f32(from[i]);
}

/* Magnitudes compared as integers: a NaN is larger than all numbers, so it stays. */
static uint32_t magnitude(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u & 0x7fffffffu;
}

static float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static float fp8_scale(uint32_t amax, float *inverse) {
  uint8_t byte = mt_fp8_scale(as_float(amax));
  *inverse = mt_e8m0_inverse(byte);
  return mt_e8m0_to_f32(byte);
}

static void encode(const float *x, int64_t n, float inverse, uint8_t *to) {
  for (int64_t i = 0; i < n; i++) to[i] = mt_f32_to_e4m3(x[i] * inverse);
}

static uint32_t largest(const float *x, int64_t n) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; i++) top = magnitude(x[i]) > top ? magnitude(x[i]) : top;
  return top;
}

/* A tile of 32 rows and a strip of columns: both ways from one reading. */
static void mx_tile(const struct mt_tensor *x, int64_t row0, int64_t rows, int64_t col0,
                    int64_t cols, uint8_t *row, uint8_t *row_scale, uint8_t *col,
                    uint8_t *col_scale) {
  float v[MT_MX_BLOCK][STRIP], inverse[STRIP];
  uint32_t top[STRIP] = {0};
  int64_t all = x->dim[1], blocks = ceil_div(all, MT_MX_BLOCK);
  for (int64_t r = 0; r < rows; r++) {
    read_row(x, row0 + r, col0, cols, v[r]);
    for (int64_t c = 0; row && c < cols; c += MT_MX_BLOCK) {
      int64_t n = least(MT_MX_BLOCK, cols - c), at = (row0 + r) * blocks + (col0 + c) / MT_MX_BLOCK;
      uint8_t scale = mt_e8m0_scale(as_float(largest(v[r] + c, n)));
      row_scale[at] = scale;
      encode(v[r] + c, n, mt_e8m0_inverse(scale), row + (row0 + r) * all + col0 + c);
    }
    for (int64_t c = 0; col && c < cols; c++)
      top[c] = magnitude(v[r][c]) > top[c] ? magnitude(v[r][c]) : top[c];
  }
  if (!col) return;
  for (int64_t c = 0; c < cols; c++) {
    uint8_t scale = mt_e8m0_scale(as_float(top[c]));
    col_scale[row0 / MT_MX_BLOCK * all + col0 + c] = scale;
    inverse[c] = mt_e8m0_inverse(scale);
  }
  for (int64_t r = 0; r < rows; r++) {
    uint8_t *to = col + (row0 + r) * all + col0;
    for (int64_t c = 0; c < cols; c++) to[c] = mt_f32_to_e4m3(v[r][c] * inverse[c]);
  }
}

mt_err mt_mxfp8_quantize(const struct mt_tensor *x, uint8_t *row, uint8_t *row_scale, uint8_t *col,
                         uint8_t *col_scale) {
  MT_TRY(check("mxfp8", x));
  int64_t rows = x->dim[0], cols = x->dim[1];
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t r = 0; r < rows; r += MT_MX_BLOCK) {
    for (int64_t c = 0; c < cols; c += STRIP) {
      mx_tile(x, r, least(MT_MX_BLOCK, rows - r), c, least(STRIP, cols - c), row, row_scale, col,
              col_scale);
    }
  }
  return MT_OK;
}

static void write_value(struct mt_tensor *y, int64_t row, int64_t col, float f) {
  if (y->dtype == MT_F32)
    ((float *)y->data)[row * y->ld + col] = f;
  else
    ((uint16_t *)y->data)[row * y->ld + col] = mt_f32_to_bf16(f);
}

static mt_err dequantize(const uint8_t *e, const uint8_t *scale, struct mt_tensor *y,
                         bool columns) {
  MT_TRY(check("mxfp8 back", y));
  float value[256];
  int64_t rows = y->dim[0], cols = y->dim[1], blocks = ceil_div(cols, MT_MX_BLOCK);
  for (int i = 0; i < 256; i++) value[i] = mt_e4m3_to_f32((uint8_t)i);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < cols; c++) {
      int64_t at = columns ? r / MT_MX_BLOCK * cols + c : r * blocks + c / MT_MX_BLOCK;
      write_value(y, r, c, value[e[r * cols + c]] * mt_e8m0_to_f32(scale[at]));
    }
  }
  return MT_OK;
}

mt_err mt_mxfp8_dequantize_rows(const uint8_t *row, const uint8_t *row_scale, struct mt_tensor *y) {
  return dequantize(row, row_scale, y, false);
}

mt_err mt_mxfp8_dequantize_columns(const uint8_t *col, const uint8_t *col_scale,
                                   struct mt_tensor *y) {
  return dequantize(col, col_scale, y, true);
}

/* A tile of 128 x 128 in 1 x 128 blocks, both ways. */
static void fp8_tile(const struct mt_tensor *x, int64_t row0, int64_t rows, int64_t col0,
                     int64_t cols, uint8_t *row, float *row_scale, uint8_t *col, float *col_scale) {
  float v[STRIP], inverse[STRIP];
  uint32_t top[STRIP] = {0};
  int64_t all_rows = x->dim[0], all_cols = x->dim[1];
  for (int64_t r = 0; r < rows; r++) {
    read_row(x, row0 + r, col0, cols, v);
    if (row) {
      float by;
      row_scale[(row0 + r) * ceil_div(all_cols, MT_FP8_BLOCK) + col0 / MT_FP8_BLOCK] =
          fp8_scale(largest(v, cols), &by);
      encode(v, cols, by, row + (row0 + r) * all_cols + col0);
    }
    for (int64_t c = 0; col && c < cols; c++)
      top[c] = magnitude(v[c]) > top[c] ? magnitude(v[c]) : top[c];
  }
  if (!col) return;
  for (int64_t c = 0; c < cols; c++) {
    col_scale[(col0 + c) * ceil_div(all_rows, MT_FP8_BLOCK) + row0 / MT_FP8_BLOCK] =
        fp8_scale(top[c], &inverse[c]);
  }
  for (int64_t r = 0; r < rows; r++) {
    read_row(x, row0 + r, col0, cols, v);
    for (int64_t c = 0; c < cols; c++)
      col[(col0 + c) * all_rows + row0 + r] = mt_f32_to_e4m3(v[c] * inverse[c]);
  }
}

mt_err mt_fp8_quantize(const struct mt_tensor *x, uint8_t *row, float *row_scale, uint8_t *col,
                       float *col_scale) {
  MT_TRY(check("fp8", x));
  int64_t rows = x->dim[0], cols = x->dim[1];
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t r = 0; r < rows; r += MT_FP8_BLOCK) {
    for (int64_t c = 0; c < cols; c += MT_FP8_BLOCK) {
      fp8_tile(x, r, least(MT_FP8_BLOCK, rows - r), c, least(MT_FP8_BLOCK, cols - c), row,
               row_scale, col, col_scale);
    }
  }
  return MT_OK;
}

static void weight_tile(const struct mt_tensor *x, int64_t row0, int64_t rows, int64_t col0,
                        int64_t cols, uint8_t *w, float *scale, uint8_t *turned,
                        float *turned_scale) {
  float v[STRIP], inverse;
  uint32_t top = 0;
  int64_t all_rows = x->dim[0], all_cols = x->dim[1];
  for (int64_t r = 0; r < rows; r++) {
    read_row(x, row0 + r, col0, cols, v);
    uint32_t here = largest(v, cols);
    top = here > top ? here : top;
  }
  float s = fp8_scale(top, &inverse);
  int64_t i = row0 / MT_FP8_BLOCK, j = col0 / MT_FP8_BLOCK;
  scale[i * ceil_div(all_cols, MT_FP8_BLOCK) + j] = s;
  if (turned) turned_scale[j * ceil_div(all_rows, MT_FP8_BLOCK) + i] = s;
  for (int64_t r = 0; r < rows; r++) {
    uint8_t *to = w + (row0 + r) * all_cols + col0;
    read_row(x, row0 + r, col0, cols, v);
    encode(v, cols, inverse, to);
    for (int64_t c = 0; turned && c < cols; c++) turned[(col0 + c) * all_rows + row0 + r] = to[c];
  }
}

mt_err mt_fp8_quantize_weight(const struct mt_tensor *x, uint8_t *w, float *scale, uint8_t *turned,
                              float *turned_scale) {
  MT_TRY(check("fp8", x));
  int64_t rows = x->dim[0], cols = x->dim[1];
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t r = 0; r < rows; r += MT_FP8_BLOCK) {
    for (int64_t c = 0; c < cols; c += MT_FP8_BLOCK) {
      weight_tile(x, r, least(MT_FP8_BLOCK, rows - r), c, least(MT_FP8_BLOCK, cols - c), w, scale,
                  turned, turned_scale);
    }
  }
  return MT_OK;
}

int64_t mt_mx_scale_bytes(int64_t rows, int64_t blocks) {
  return ceil_div(rows, 128) * ceil_div(blocks, 4) * 512;
}

void mt_mx_swizzle(const uint8_t *scales, int64_t rows, int64_t blocks, uint8_t *to) {
  memset(to, 0, (size_t)mt_mx_scale_bytes(rows, blocks));
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < blocks; j++)
      to[mt_mx_scale_index(i, j, blocks)] = scales[i * blocks + j];
  }
}

void mt_mx_unswizzle(const uint8_t *from, int64_t rows, int64_t blocks, uint8_t *scales) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < blocks; j++)
      scales[i * blocks + j] = from[mt_mx_scale_index(i, j, blocks)];
  }
}
