/* Quantizing to 8 bits, by itself and joined with SwiGLU. Work is cut into tiles of 128 rows of one
 * group and 128 columns, which hold whole blocks of either format in either direction; a tile is
 * made once, in float32, and written to both copies. */
#include <omp.h>

#include "base/fp8.h"
#include "kernels/cpu/cpu.h"

enum { TILE = MT_Q_PAD, TILE_FLOATS = TILE * TILE };

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Rows [row, row + rows) of the operand, columns [col, col + cols); in the column copy they begin
 * at row `at`. v: [TILE][TILE] float32. */
struct tile {
  int64_t row, rows, at, col, cols;
  float *v;
};

/* Magnitudes compared as integers: a NaN is larger than all numbers, so it stays. */
static inline uint32_t magnitude(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u & 0x7fffffffu;
}
static inline uint8_t scale_of(enum mt_qformat format, uint32_t top) {
  float amax;
  memcpy(&amax, &top, 4);
  return format == MT_Q_FP8 ? mt_fp8_scale(amax) : mt_e8m0_scale(amax);
}

static uint32_t largest(const float *x, int64_t n) {
  uint32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) top = magnitude(x[i]) > top ? magnitude(x[i]) : top;
  return top;
}

static void put_scale(enum mt_qformat format, void *scales, int64_t at, uint8_t byte) {
  if (format == MT_Q_FP8)
    ((float *)scales)[at] = mt_e8m0_to_f32(byte);
  else
    ((uint8_t *)scales)[at] = byte;
}

static void encode(const float *x, int64_t n, float by, uint8_t *to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = mt_f32_to_e4m3(x[i] * by);
}

static void write_rows(const struct tile *t, const struct mt_qtensor *q) {
  int64_t b = mt_q_block(q->format), all = q->dim[1], blocks = mt_q_blocks(q->format, all);
  for (int64_t r = 0; r < t->rows; r++) {
    const float *v = t->v + r * TILE;
    int64_t row = t->row + r;
    for (int64_t c = 0; c < t->cols; c += b) {
      int64_t n = least(b, t->cols - c), block = (t->col + c) / b;
      uint8_t byte = scale_of(q->format, largest(v + c, n));
      put_scale(q->format, q->row_scale,
                q->format == MT_Q_FP8 ? block * q->scale_ld + row : row * blocks + block, byte);
      encode(v + c, n, mt_e8m0_inverse(byte), q->row + row * all + t->col + c);
    }
  }
}

/* Rows [r, r + n) of the tile as one block of each column: what its elements are multiplied with,
 * and their scales from scales[at] on. */
static void column_scales(const struct tile *t, int64_t r, int64_t n, const struct mt_qtensor *q,
                          float *by) {
  uint32_t top[TILE] = {0};
  for (int64_t i = r; i < r + n; i++) {
    const float *v = t->v + i * TILE;
#pragma omp simd
    for (int64_t c = 0; c < t->cols; c++)
      top[c] = magnitude(v[c]) > top[c] ? magnitude(v[c]) : top[c];
  }
  int64_t at = (t->at + r) / mt_q_block(q->format) * q->dim[1] + t->col;
  for (int64_t c = 0; c < t->cols; c++) {
    uint8_t byte = scale_of(q->format, top[c]);
    put_scale(q->format, q->col_scale, at + c, byte);
    by[c] = mt_e8m0_inverse(byte);
  }
}

static void write_columns(const struct tile *t, const struct mt_qtensor *q) {
  float by[TILE];
  int64_t all = q->dim[1], filled = mt_q_padded(t->rows);
  if (q->format == MT_Q_FP8) {
    column_scales(t, 0, t->rows, q, by);
    for (int64_t c = 0; c < t->cols; c++) {
      uint8_t *to = q->col + (t->col + c) * q->col_rows + t->at;
      for (int64_t r = 0; r < t->rows; r++) to[r] = mt_f32_to_e4m3(t->v[r * TILE + c] * by[c]);
      memset(to + t->rows, 0, (size_t)(filled - t->rows));
    }
    return;
  }
  int64_t b = mt_q_block(q->format);
  for (int64_t r = 0; r < filled; r += b) {
    int64_t n = t->rows - r < 0 ? 0 : least(b, t->rows - r);
    column_scales(t, r, n, q, by);
    for (int64_t i = r; i < r + b; i++) {
      uint8_t *to = q->col + (t->at + i) * all + t->col;
      const float *v = t->v + i * TILE;
      if (i >= t->rows) {
        memset(to, 0, (size_t)t->cols);
        continue;
      }
#pragma omp simd
      for (int64_t c = 0; c < t->cols; c++) to[c] = mt_f32_to_e4m3(v[c] * by[c]);
    }
  }
}

static void write_tile(const struct tile *t, const struct mt_qtensor *q) {
  if (q->row) write_rows(t, q);
  if (q->col) write_columns(t, q);
}

static mt_err ready(const struct mt_backend *be, const char *op, const struct mt_tensor *x) {
  MT_TRY(mt_cpu_format(op, x));
  if (!be->workspace) return mt_fail(MT_EINVAL, "%s: the cpu backend has no workspace", op);
  return MT_OK;
}

mt_err mt_cpu_pad_offsets(struct mt_backend *be, const struct mt_pad_offsets_args *a) {
  (void)be;
  MT_TRY(mt_check_pad_offsets(a));
  a->padded[0] = 0;
  for (int g = 0; g < a->group_count; g++) {
    a->padded[g + 1] = a->padded[g] + (int32_t)mt_q_padded(a->offsets[g + 1] - a->offsets[g]);
  }
  return MT_OK;
}

/* Rows in groups, cut into tiles' rows: the i-th, counted over all groups. */
struct bands {
  const int32_t *offsets, *padded;
  int group_count;
  int64_t rows;
};
static int64_t band_count(const struct bands *b) {
  return (b->offsets ? b->padded[b->group_count] : mt_q_padded(b->rows)) / TILE;
}
static struct tile band(const struct bands *b, int64_t i) {
  struct tile t = {.at = i * TILE};
  int64_t begin = 0, end = b->rows, first = 0;
  if (b->offsets) {
    int g = 0;
    while (b->padded[g + 1] <= t.at) g++;
    begin = b->offsets[g], end = b->offsets[g + 1], first = b->padded[g];
  }
  t.row = begin + t.at - first;
  t.rows = least(TILE, end - t.row);
  return t;
}

static void read_tile(const struct mt_quantize_args *a, const struct tile *t) {
  struct mt_tensor x = mt_cols(&a->x, t->col, t->cols);
  for (int64_t r = 0; r < t->rows; r++) {
    int64_t row = a->row_source ? a->row_source[t->row + r] / a->top_k : t->row + r;
    float *to = t->v + r * TILE;
    const float *from = cpu_read(&x, row, t->cols, to);
    if (from != to) memcpy(to, from, (size_t)t->cols * sizeof *to);
  }
}

mt_err mt_cpu_quantize(struct mt_backend *be, const struct mt_quantize_args *a) {
  MT_TRY(mt_check_quantize(a));
  MT_TRY(ready(be, "quantize", &a->x));
  struct bands b = {a->offsets, a->padded, a->group_count, a->q.dim[0]};
  int64_t cols = a->q.dim[1], strips = (cols + TILE - 1) / TILE, count = band_count(&b) * strips;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    struct tile t = band(&b, i / strips);
    t.col = i % strips * TILE;
    t.cols = least(TILE, cols - t.col);
    t.v = mt_cpu_thread_scratch(be, omp_get_thread_num());
    read_tile(a, &t);
    write_tile(&t, &a->q);
  }
  return MT_OK;
}

/* A tile of a weight in one block of 128 x 128, and its transpose. */
static void write_square(const struct tile *t, const struct mt_qtensor *q) {
  uint32_t top = 0;
  int64_t n = q->dim[0], k = q->dim[1], i = t->row / TILE, j = t->col / TILE;
  for (int64_t r = 0; r < t->rows; r++) {
    uint32_t here = largest(t->v + r * TILE, t->cols);
    top = here > top ? here : top;
  }
  uint8_t byte = scale_of(MT_Q_FP8, top), e[TILE];
  if (q->row) put_scale(MT_Q_FP8, q->row_scale, i * mt_q_blocks(MT_Q_FP8, k) + j, byte);
  if (q->col) put_scale(MT_Q_FP8, q->col_scale, j * mt_q_blocks(MT_Q_FP8, n) + i, byte);
  for (int64_t r = 0; r < t->rows; r++) {
    encode(t->v + r * TILE, t->cols, mt_e8m0_inverse(byte), e);
    if (q->row) memcpy(q->row + (t->row + r) * k + t->col, e, (size_t)t->cols);
    for (int64_t c = 0; q->col && c < t->cols; c++) q->col[(t->col + c) * n + t->row + r] = e[c];
  }
}

/* MX: columns' blocks end with the weight, so that nothing is padded. */
static void write_weight_columns(const struct tile *t, const struct mt_qtensor *q) {
  float by[TILE];
  int64_t b = mt_q_block(q->format);
  for (int64_t r = 0; r < t->rows; r += b) {
    int64_t n = least(b, t->rows - r);
    column_scales(t, r, n, q, by);
    for (int64_t i = r; i < r + n; i++) {
      uint8_t *to = q->col + (t->row + i) * q->dim[1] + t->col;
      const float *v = t->v + i * TILE;
#pragma omp simd
      for (int64_t c = 0; c < t->cols; c++) to[c] = mt_f32_to_e4m3(v[c] * by[c]);
    }
  }
}

mt_err mt_cpu_quantize_weight(struct mt_backend *be, const struct mt_quantize_weight_args *a) {
  MT_TRY(mt_check_quantize_weight(a));
  MT_TRY(ready(be, "quantize_weight", &a->w));
  bool many = a->w.rank == 3;
  int64_t n = a->w.dim[a->w.rank - 2], k = a->w.dim[a->w.rank - 1];
  int64_t bands = (n + TILE - 1) / TILE, strips = (k + TILE - 1) / TILE;
  int64_t count = (many ? a->w.dim[0] : 1) * bands * strips;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    int64_t g = i / (bands * strips);
    struct mt_qtensor q = many ? mt_q_slice(&a->q, g) : a->q;
    struct mt_quantize_args from = {.x = many ? mt_slice(&a->w, g) : a->w};
    struct tile t = {.row = i / strips % bands * TILE, .col = i % strips * TILE};
    t.at = t.row;
    t.rows = least(TILE, n - t.row);
    t.cols = least(TILE, k - t.col);
    t.v = mt_cpu_thread_scratch(be, omp_get_thread_num());
    read_tile(&from, &t);
    if (q.format == MT_Q_FP8) {
      write_square(&t, &q);
      continue;
    }
    if (q.row) write_rows(&t, &q);
    if (q.col) write_weight_columns(&t, &q);
  }
  return MT_OK;
}

/* Rounds a row of a tile as swiglu_fwd and swiglu_bwd do when they store it. */
static void round_row(enum mt_dtype dtype, float *x, int64_t n) {
  if (dtype != MT_BF16) return;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = mt_bf16_to_f32(mt_f32_to_bf16(x[i]));
}

/* A row's gate and up, columns [col, col + n) of each, as float32. */
static void read_gate_up(const struct mt_tensor *gate_up, int64_t row, int64_t col, int64_t n,
                         float *buffer, const float **gate, const float **up) {
  struct mt_tensor g = mt_cols(gate_up, col, n);
  struct mt_tensor u = mt_cols(gate_up, gate_up->dim[1] / 2 + col, n);
  *gate = cpu_read(&g, row, n, buffer);
  *up = cpu_read(&u, row, n, buffer + TILE);
}

static float prob_of(const struct mt_tensor *row_prob, int64_t row) {
  return row_prob->data ? ((const float *)row_prob->data)[row] : 1.0f;
}

mt_err mt_cpu_swiglu_quantize_fwd(struct mt_backend *be,
                                  const struct mt_swiglu_quantize_fwd_args *a) {
  MT_TRY(mt_check_swiglu_quantize_fwd(a));
  MT_TRY(ready(be, "swiglu_quantize_fwd", &a->gate_up));
  struct bands b = {a->offsets, a->padded, a->group_count, a->h.dim[0]};
  int64_t f = a->h.dim[1], strips = (f + TILE - 1) / TILE, count = band_count(&b) * strips;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    struct tile t = band(&b, i / strips);
    float buffer[2 * TILE];
    t.col = i % strips * TILE;
    t.cols = least(TILE, f - t.col);
    t.v = mt_cpu_thread_scratch(be, omp_get_thread_num());
    for (int64_t r = 0; r < t.rows; r++) {
      const float *g, *u;
      read_gate_up(&a->gate_up, t.row + r, t.col, t.cols, buffer, &g, &u);
      mt_cpu_swiglu_row(g, u, prob_of(&a->row_prob, t.row + r), t.cols, t.v + r * TILE);
      round_row(a->gate_up.dtype, t.v + r * TILE, t.cols);
    }
    write_tile(&t, &a->h);
  }
  return MT_OK;
}

/* One tile of the gradients of gate and up (F columns apart) and of h. dp: [TILE] (+=). */
static void gradient_tile(const struct mt_swiglu_quantize_bwd_args *a, struct tile *t, float *dp) {
  float buffer[3 * TILE], *dg = t->v, *du = dg + TILE_FLOATS, *h = du + TILE_FLOATS;
  struct mt_tensor dh = mt_cols(&a->dh, t->col, t->cols);
  for (int64_t r = 0; r < t->rows; r++) {
    const float *g, *u, *d = cpu_read(&dh, t->row + r, t->cols, buffer + 2 * TILE);
    read_gate_up(&a->gate_up, t->row + r, t->col, t->cols, buffer, &g, &u);
    dp[r] += mt_cpu_swiglu_bwd_row(d, g, u, prob_of(&a->row_prob, t->row + r), t->cols,
                                   dg + r * TILE, du + r * TILE, h + r * TILE);
    round_row(a->dh.dtype, dg + r * TILE, t->cols);
    round_row(a->dh.dtype, du + r * TILE, t->cols);
    round_row(a->dh.dtype, h + r * TILE, t->cols);
  }
  t->v = h;
  if (a->h.format != MT_Q_NONE) write_tile(t, &a->h);
}

/* The gate's columns begin at 0, up's at F, which need not be a multiple of a block: its tiles are
 * then cut out of both. */
static void write_half(const struct tile *t, const struct mt_qtensor *q, float *v, int64_t col) {
  struct tile half = *t;
  half.v = v;
  half.col = col;
  write_tile(&half, q);
}

/* A tile of [gate | up] from column `col` on of rows that hold all of both. */
static void whole_row_tiles(const struct mt_swiglu_quantize_bwd_args *a, const struct tile *rows,
                            float *scratch) {
  int64_t f = a->dh.dim[1];
  float *out = scratch + 3 * TILE_FLOATS;
  for (int64_t col = 0; col < 2 * f; col += TILE) {
    struct tile t = *rows;
    float unused[TILE] = {0};
    t.col = col;
    t.cols = least(TILE, 2 * f - col);
    t.v = out;
    for (int64_t done = 0; done < t.cols;) {
      /* A run of columns of one half. */
      int64_t at = col + done, half = at < f ? 0 : 1, from = at - half * f;
      int64_t n = least(t.cols - done, f - from);
      struct tile part = *rows;
      struct mt_swiglu_quantize_bwd_args quiet = *a;
      quiet.h.format = MT_Q_NONE;
      part.col = from, part.cols = n, part.v = scratch;
      gradient_tile(&quiet, &part, unused);
      for (int64_t r = 0; r < t.rows; r++)
        memcpy(out + r * TILE + done, scratch + half * TILE_FLOATS + r * TILE,
               (size_t)n * sizeof *out);
      done += n;
    }
    write_tile(&t, &a->dgate_up);
  }
}

mt_err mt_cpu_swiglu_quantize_bwd(struct mt_backend *be,
                                  const struct mt_swiglu_quantize_bwd_args *a) {
  MT_TRY(mt_check_swiglu_quantize_bwd(a));
  MT_TRY(ready(be, "swiglu_quantize_bwd", &a->gate_up));
  struct bands b = {a->offsets, a->padded, a->group_count, a->dh.dim[0]};
  int64_t f = a->dh.dim[1], count = band_count(&b);
  bool halves_apart = f % mt_q_block(a->dgate_up.format) == 0;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float dp[TILE] = {0}, *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
    struct tile rows = band(&b, i);
    for (int64_t col = 0; col < f; col += TILE) {
      struct tile t = rows;
      t.col = col, t.cols = least(TILE, f - col), t.v = scratch;
      gradient_tile(a, &t, dp);
      if (!halves_apart) continue;
      write_half(&t, &a->dgate_up, scratch, col);
      write_half(&t, &a->dgate_up, scratch + TILE_FLOATS, f + col);
    }
    if (!halves_apart) whole_row_tiles(a, &rows, scratch);
    for (int64_t r = 0; a->drow_prob.data && r < rows.rows; r++)
      ((float *)a->drow_prob.data)[rows.row + r] = dp[r];
  }
  return MT_OK;
}

/* Rows that travel: a record each, one block of a row at a time. */
static void pack_row(const struct mt_pack_rows_args *a, int64_t row, uint8_t *to) {
  int64_t b = mt_q_block(a->format), cols = a->x.dim[1], blocks = mt_q_blocks(a->format, cols);
  for (int64_t c = 0; c < cols; c += b) {
    float buffer[TILE];
    int64_t n = least(b, cols - c);
    struct mt_tensor part = mt_cols(&a->x, c, n);
    const float *x = cpu_read(&part, row, n, buffer);
    uint8_t byte = scale_of(a->format, largest(x, n));
    to[cols + c / b] = byte;
    encode(x, n, mt_e8m0_inverse(byte), to + c);
  }
  memset(to + cols + blocks, 0, (size_t)(mt_q_record_bytes(a->format, cols) - cols - blocks));
}

mt_err mt_cpu_pack_rows(struct mt_backend *be, const struct mt_pack_rows_args *a) {
  MT_TRY(mt_check_pack_rows(a));
  MT_TRY(mt_cpu_format("pack_rows", &a->x));
  int64_t bytes = mt_q_record_bytes(a->format, a->x.dim[1]);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < a->row_count; r++) {
    int64_t source = a->row_source ? a->row_source[r] : r;
    if (source >= 0) pack_row(a, a->row_source ? source / a->top_k : r, a->records + r * bytes);
  }
  return MT_OK;
}

mt_err mt_cpu_unpack_rows(struct mt_backend *be, const struct mt_unpack_rows_args *a) {
  float number[256];
  MT_TRY(mt_check_unpack_rows(a));
  MT_TRY(mt_cpu_format("unpack_rows", &a->xs));
  for (int i = 0; i < 256; i++) number[i] = mt_e4m3_to_f32((uint8_t)i);
  int64_t b = mt_q_block(a->format), cols = a->xs.dim[1];
  int64_t bytes = mt_q_record_bytes(a->format, cols);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < a->xs.dim[0]; r++) {
    const uint8_t *from = a->records + (a->source ? a->source[r] : r) * bytes;
    for (int64_t c = 0; c < cols; c += b) {
      float buffer[TILE], scale = mt_e8m0_to_f32(from[cols + c / b]);
      int64_t n = least(b, cols - c);
      struct mt_tensor part = mt_cols(&a->xs, c, n);
      float *to = cpu_target(&part, r, buffer);
      for (int64_t i = 0; i < n; i++) to[i] = number[from[c + i]] * scale;
      cpu_write(&part, r, n, to);
    }
  }
  return MT_OK;
}
