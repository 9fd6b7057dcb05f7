/* Operations whose matrices have more than 2^31 elements: what their last rows (or the last expert,
 * or the last parameters) give must be, to the bit, what the same rows give by themselves. A large
 * micro-batch's gate and up, the states of a few layers and the weights of many experts are that
 * large. Needs 40 GB of the GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/device.h"
#include "base/rng.h"
#include "gpu/gpu.h"
#include "ok.h"
#include "quant/linear.h"

enum { TAIL = 256, GROUPS = 2, NARROW = 64, FFN = 14336, WIDE = 2 * FFN, HIDDEN = 4096 };
static const int64_t ROWS = 81920;  /* of WIDE: 2.35e9 elements */
static const int64_t TALL = 600000; /* of HIDDEN: 2.46e9 */
static const int64_t EXPERTS = 20;  /* of WIDE x HIDDEN: 2.35e9 */
static const size_t ROOM = 40000000000u, WORKSPACE = (size_t)8 << 30;

static struct mt_backend be;
static uint64_t seed;

/* All that a case has taken. */
static struct {
  void *p;
  size_t bytes;
} taken[64];
static int taken_count;

static void *room(size_t bytes) {
  void *p;
  assert_true(taken_count < 64);
  OK(be.mem_alloc(&be, bytes, &p));
  OK(be.zero(&be, p, bytes));
  taken[taken_count].p = p, taken[taken_count++].bytes = bytes;
  return p;
}

static void give_back(void) {
  while (taken_count > 0) {
    taken_count--;
    be.mem_free(&be, taken[taken_count].p, taken[taken_count].bytes);
  }
}

static struct mt_tensor grid(enum mt_dtype dtype, int64_t rows, int64_t cols) {
  return mt_mat(room((size_t)(rows * cols) * mt_dtype_bytes(dtype)), dtype, rows, cols);
}

/* Between low and high. */
static void *numbers(size_t n, enum mt_dtype dtype, double low, double high) {
  struct mt_rng rng = mt_rng_make(++seed, 0);
  float *x = malloc(n * sizeof *x);
  void *raw = malloc(n * mt_dtype_bytes(dtype));
  assert_true(x && raw);
  for (size_t i = 0; i < n; i++) x[i] = (float)(low + (high - low) * mt_rng_uniform(&rng));
  mt_dtype_convert(raw, dtype, x, MT_F32, n);
  free(x);
  return raw;
}

static struct mt_tensor random_grid(enum mt_dtype dtype, int64_t rows, int64_t cols, double scale) {
  struct mt_tensor t = grid(dtype, rows, cols);
  void *raw = numbers((size_t)(rows * cols), dtype, -scale, scale);
  OK(be.upload(&be, t.data, raw, mt_bytes(&t)));
  free(raw);
  return t;
}

/* The same TAIL rows as the last of many, zeros before them, and by themselves. */
struct pair {
  struct mt_tensor far, near;
};
#define AT(p) (k ? (p).near : (p).far)

static struct mt_tensor last_rows(const struct mt_tensor *far) {
  return mt_rows(far, far->dim[0] - TAIL, TAIL);
}

/* low NAN: an output. */
static struct pair pair_of(enum mt_dtype dtype, int64_t rows, int64_t cols, double low) {
  struct pair p = {grid(dtype, rows, cols), grid(dtype, TAIL, cols)};
  struct mt_tensor end = last_rows(&p.far);
  size_t bytes = mt_bytes(&p.near);
  void *raw = numbers((size_t)(TAIL * cols), dtype, low, 1);
  if (isnan(low)) memset(raw, 0xff, bytes);
  OK(be.upload(&be, p.near.data, raw, bytes));
  OK(be.upload(&be, end.data, raw, bytes));
  free(raw);
  return p;
}
static struct pair in(int64_t rows, int64_t cols) {
  return pair_of(MT_BF16, rows, cols, -1);
}
static struct pair out(int64_t rows, int64_t cols) {
  return pair_of(MT_BF16, rows, cols, NAN);
}
static struct mt_tensor column(struct mt_tensor t) {
  return mt_vec(t.data, t.dtype, t.dim[0]);
}

static void *fetched(const struct mt_tensor *t) {
  void *p = malloc(mt_bytes(t));
  assert_non_null(p);
  OK(be.download(&be, p, t->data, mt_bytes(t)));
  return p;
}

static void same_bits(const char *what, struct mt_tensor a, struct mt_tensor b) {
  unsigned char *x = fetched(&a), *y = fetched(&b);
  size_t n = mt_bytes(&a), zeros = 0;
  assert_true(n == mt_bytes(&b));
  for (size_t i = 0; i < n; i++) zeros += y[i] == 0;
  if (memcmp(x, y, n) != 0) fail_msg("%s: other numbers past 2^31 elements", what);
  if (zeros > n / 2) fail_msg("%s: nothing was made", what);
  free(x), free(y);
}
static void same(const char *what, const struct pair *p) {
  same_bits(what, last_rows(&p->far), p->near);
}

/* Rows in two groups: the second is the last TAIL rows. */
static int32_t *offsets[2], *padded[2];
static void make_offsets(int64_t rows) {
  const int32_t far[] = {0, (int32_t)rows - TAIL, (int32_t)rows}, near[] = {0, 0, TAIL};
  for (int k = 0; k < 2; k++) {
    offsets[k] = room(sizeof far), padded[k] = room(sizeof far);
    OK(be.upload(&be, offsets[k], k ? near : far, sizeof far));
    OK(be.ops.pad_offsets(&be, &(struct mt_pad_offsets_args){offsets[k], GROUPS, padded[k]}));
  }
}

static struct mt_tensor weights(int64_t n, int64_t k) {
  struct mt_tensor w = random_grid(MT_BF16, GROUPS * n, k, 0.1);
  return mt_cube(w.data, MT_BF16, GROUPS, n, k);
}

static void grouped_products(void **state) {
  (void)state;
  make_offsets(ROWS);
  struct pair x = in(ROWS, NARROW), y = out(ROWS, WIDE), dx = out(ROWS, NARROW);
  struct mt_tensor w = weights(WIDE, NARROW), dw[2];
  for (int k = 0; k < 2; k++) {
    OK(be.ops.linear_fwd(&be, &(struct mt_linear_fwd_args){AT(x), w, AT(y), offsets[k]}));
    OK(be.ops.linear_dgrad(&be, &(struct mt_linear_dgrad_args){AT(y), w, AT(dx), offsets[k], 0}));
    dw[k] = mt_cube(grid(MT_F32, GROUPS * WIDE, NARROW).data, MT_F32, GROUPS, WIDE, NARROW);
    OK(be.ops.linear_wgrad(&be, &(struct mt_linear_wgrad_args){
                                    .dy = AT(y), .x = AT(x), .dw = dw[k], .offsets = offsets[k]}));
  }
  same("linear_fwd", &y);
  same("linear_dgrad", &dx);
  same_bits("linear_wgrad", mt_slice(&dw[0], 1), mt_slice(&dw[1], 1));
}

static void swiglu(void **state) {
  (void)state;
  make_offsets(ROWS);
  struct pair gu = in(ROWS, WIDE), p = pair_of(MT_F32, ROWS, 1, 0), h = out(ROWS, FFN);
  struct pair dh = in(ROWS, FFN), dgu = out(ROWS, WIDE), dp = pair_of(MT_F32, ROWS, 1, NAN);
  for (int k = 0; k < 2; k++) {
    const int32_t *rows = offsets[k] + GROUPS;
    OK(be.ops.swiglu_fwd(&be, &(struct mt_swiglu_fwd_args){AT(gu), column(AT(p)), rows, AT(h)}));
    OK(be.ops.swiglu_bwd(&be, &(struct mt_swiglu_bwd_args){.dh = AT(dh),
                                                           .gate_up = AT(gu),
                                                           .row_prob = column(AT(p)),
                                                           .row_count = rows,
                                                           .dgate_up = AT(dgu),
                                                           .drow_prob = column(AT(dp))}));
  }
  same("swiglu_fwd", &h);
  same("swiglu_bwd", &dgu);
  same("swiglu_bwd's drow_prob", &dp);
}

static void experts(void **state) {
  (void)state;
  make_offsets(ROWS);
  struct pair x = in(ROWS, NARROW), gu = out(ROWS, WIDE), h = out(ROWS, FFN), dgu = out(ROWS, WIDE);
  struct mt_tensor up = weights(WIDE, NARROW), down = weights(NARROW, FFN);
  for (int k = 0; k < 2; k++) {
    OK(be.ops.experts_up_fwd(
        &be, &(struct mt_experts_up_fwd_args){
                 .x = AT(x), .w = up, .offsets = offsets[k], .gate_up = AT(gu), .h = AT(h)}));
  }
  same("experts_up_fwd", &gu);
  same("experts_up_fwd's h", &h);
  for (int k = 0; k < 2; k++) {
    OK(be.ops.experts_down_dgrad(&be, &(struct mt_experts_down_dgrad_args){.dy = AT(x),
                                                                           .w = down,
                                                                           .offsets = offsets[k],
                                                                           .gate_up = AT(gu),
                                                                           .dgate_up = AT(dgu),
                                                                           .h = AT(h)}));
  }
  same("experts_down_dgrad", &dgu);
  same("experts_down_dgrad's h", &h);
}

/* A matrix in FP8, both ways. */
static struct mt_operand operand(struct mt_tensor x, int k) {
  struct mt_row_groups g = {.offsets = offsets[k], .padded = padded[k], .count = GROUPS};
  int64_t rows = x.dim[0];
  struct mt_operand o = {
      .format = MT_Q_FP8,
      .memory = room(mt_operand_bytes(MT_Q_FP8, rows, x.dim[1], GROUPS, MT_SIDE_BOTH))};
  OK(mt_operand_make(&be, &o, x, rows, MT_SIDE_BOTH, &g));
  return o;
}

static void eight_bits(void **state) {
  (void)state;
  make_offsets(ROWS);
  struct pair x = in(ROWS, HIDDEN), y = out(ROWS, WIDE), dx = out(ROWS, HIDDEN);
  struct mt_tensor w = weights(WIDE, HIDDEN), dw[2];
  struct mt_qtensor q;
  mt_qweight_shape(&q, MT_Q_FP8, 3, w.dim, MT_SIDE_BOTH,
                   room(mt_qweight_bytes(MT_Q_FP8, 3, w.dim, MT_SIDE_BOTH)));
  OK(be.ops.quantize_weight(&be, &(struct mt_quantize_weight_args){w, q}));
  for (int k = 0; k < 2; k++) {
    struct mt_operand a = operand(AT(x), k);
    OK(be.ops.qlinear_fwd(&be, &(struct mt_qlinear_fwd_args){a.q, q, AT(y), offsets[k]}));
    struct mt_operand b = operand(AT(y), k);
    OK(be.ops.qlinear_dgrad(&be, &(struct mt_qlinear_dgrad_args){
                                     .dy = b.q, .w = q, .dx = AT(dx), .offsets = offsets[k]}));
    dw[k] = mt_cube(grid(MT_BF16, GROUPS * WIDE, HIDDEN).data, MT_BF16, GROUPS, WIDE, HIDDEN);
    OK(be.ops.qlinear_wgrad(
        &be, &(struct mt_qlinear_wgrad_args){
                 .dy = b.q, .x = a.q, .dw = dw[k], .offsets = offsets[k], .padded = padded[k]}));
  }
  same("qlinear_fwd", &y);
  same("quantize and qlinear_dgrad", &dx);
  same_bits("quantize and qlinear_wgrad", mt_slice(&dw[0], 1), mt_slice(&dw[1], 1));
}

static void swiglu_in_eight_bits(void **state) {
  (void)state;
  make_offsets(ROWS);
  struct pair gu = in(ROWS, WIDE), dh = in(ROWS, FFN), y = out(ROWS, NARROW),
              dx = out(ROWS, NARROW);
  struct mt_tensor w = weights(NARROW, FFN), up = weights(WIDE, NARROW);
  struct mt_qtensor down, gate_up;
  mt_qweight_shape(&down, MT_Q_FP8, 3, w.dim, MT_SIDE_BOTH,
                   room(mt_qweight_bytes(MT_Q_FP8, 3, w.dim, MT_SIDE_BOTH)));
  mt_qweight_shape(&gate_up, MT_Q_FP8, 3, up.dim, MT_SIDE_BOTH,
                   room(mt_qweight_bytes(MT_Q_FP8, 3, up.dim, MT_SIDE_BOTH)));
  OK(be.ops.quantize_weight(&be, &(struct mt_quantize_weight_args){w, down}));
  OK(be.ops.quantize_weight(&be, &(struct mt_quantize_weight_args){up, gate_up}));
  for (int k = 0; k < 2; k++) {
    struct mt_row_groups g = {.offsets = offsets[k], .padded = padded[k], .count = GROUPS};
    int64_t rows = AT(gu).dim[0];
    struct mt_operand h = {.format = MT_Q_FP8}, dgu = h;
    h.memory = room(mt_operand_bytes(MT_Q_FP8, rows, FFN, GROUPS, MT_SIDE_ROW));
    dgu.memory = room(mt_operand_bytes(MT_Q_FP8, rows, WIDE, GROUPS, MT_SIDE_BOTH));
    mt_operand_shape(&h, rows, FFN, MT_SIDE_ROW, &g);
    mt_operand_shape(&dgu, rows, WIDE, MT_SIDE_BOTH, &g);
    OK(be.ops.swiglu_quantize_fwd(&be, &(struct mt_swiglu_quantize_fwd_args){.gate_up = AT(gu),
                                                                             .offsets = offsets[k],
                                                                             .padded = padded[k],
                                                                             .group_count = GROUPS,
                                                                             .h = h.q}));
    OK(be.ops.qlinear_fwd(&be, &(struct mt_qlinear_fwd_args){h.q, down, AT(y), offsets[k]}));
    OK(be.ops.swiglu_quantize_bwd(&be, &(struct mt_swiglu_quantize_bwd_args){.dh = AT(dh),
                                                                             .gate_up = AT(gu),
                                                                             .offsets = offsets[k],
                                                                             .padded = padded[k],
                                                                             .group_count = GROUPS,
                                                                             .dgate_up = dgu.q}));
    OK(be.ops.qlinear_dgrad(&be,
                            &(struct mt_qlinear_dgrad_args){
                                .dy = dgu.q, .w = gate_up, .dx = AT(dx), .offsets = offsets[k]}));
  }
  same("swiglu_quantize_fwd", &y);
  same("swiglu_quantize_bwd", &dx);
}

/* The last of many experts has the rows. */
static void weights_of_many_experts(void **state) {
  (void)state;
  struct mt_tensor x = random_grid(MT_BF16, TAIL, HIDDEN, 1), y[2], dx[2], dw[2];
  struct mt_tensor last = random_grid(MT_BF16, WIDE, HIDDEN, 0.1);
  struct mt_tensor all = grid(MT_BF16, EXPERTS * WIDE, HIDDEN), bf16 = {0};
  struct mt_tensor end = mt_rows(&all, (EXPERTS - 1) * WIDE, WIDE);
  OK(be.copy(&be, end.data, last.data, mt_bytes(&last)));
  for (int k = 0; k < 2; k++) {
    int64_t g = k ? 1 : EXPERTS;
    int32_t at[32] = {0}, *dev = room(sizeof at);
    at[g] = TAIL;
    OK(be.upload(&be, dev, at, sizeof at));
    struct mt_tensor w = mt_cube(k ? last.data : all.data, MT_BF16, g, WIDE, HIDDEN);
    y[k] = grid(MT_BF16, TAIL, WIDE), dx[k] = grid(MT_BF16, TAIL, HIDDEN);
    dw[k] = w, dw[k].data = grid(MT_BF16, g * WIDE, HIDDEN).data;
    OK(be.ops.linear_fwd(&be, &(struct mt_linear_fwd_args){x, w, y[k], dev}));
    OK(be.ops.linear_dgrad(&be, &(struct mt_linear_dgrad_args){y[k], w, dx[k], dev, 0}));
    OK(be.ops.linear_wgrad(
        &be, &(struct mt_linear_wgrad_args){.dy = y[k], .x = x, .dw = dw[k], .offsets = dev}));
  }
  same_bits("linear_fwd", y[0], y[1]);
  same_bits("linear_dgrad", dx[0], dx[1]);
  same_bits("linear_wgrad", mt_slice(&dw[0], EXPERTS - 1), mt_slice(&dw[1], 0));
  bf16 = mt_cube(all.data, MT_BF16, EXPERTS, WIDE, HIDDEN);
  struct mt_qtensor q[2];
  for (int k = 0; k < 2; k++) {
    struct mt_tensor w = k ? mt_cube(last.data, MT_BF16, 1, WIDE, HIDDEN) : bf16;
    size_t bytes = mt_qweight_bytes(MT_Q_FP8, 3, w.dim, MT_SIDE_BOTH);
    mt_qweight_shape(&q[k], MT_Q_FP8, 3, w.dim, MT_SIDE_BOTH, room(bytes));
    OK(be.ops.quantize_weight(&be, &(struct mt_quantize_weight_args){w, q[k]}));
  }
  struct mt_qtensor far = mt_q_slice(&q[0], EXPERTS - 1), near = mt_q_slice(&q[1], 0);
  enum { HALF = WIDE / 2 }; /* bytes, looked at as bf16 */
  same_bits("quantize_weight, rows", mt_mat(far.row, MT_BF16, HALF, HIDDEN),
            mt_mat(near.row, MT_BF16, HALF, HIDDEN));
  same_bits("quantize_weight, columns", mt_mat(far.col, MT_BF16, HALF, HIDDEN),
            mt_mat(near.col, MT_BF16, HALF, HIDDEN));
}

static void norms(void **state) {
  (void)state;
  struct pair x = in(TALL, HIDDEN), y = out(TALL, HIDDEN), r = pair_of(MT_F32, TALL, 1, NAN);
  struct pair dx = out(TALL, HIDDEN);
  struct mt_tensor w = column(random_grid(MT_BF16, HIDDEN, 1, 1));
  for (int k = 0; k < 2; k++) {
    OK(be.ops.rmsnorm_fwd(
        &be, &(struct mt_rmsnorm_fwd_args){
                 .x = AT(x), .weight = w, .eps = 1e-5F, .y = AT(y), .rstd = column(AT(r))}));
    OK(be.ops.rmsnorm_bwd(
        &be, &(struct mt_rmsnorm_bwd_args){
                 .dy = AT(y), .x = AT(x), .weight = w, .rstd = column(AT(r)), .dx = AT(dx)}));
  }
  same("rmsnorm_fwd", &y);
  same("rmsnorm_bwd", &dx);
}

/* Token t of the last TAIL has row t alone. */
static void permutation(void **state) {
  (void)state;
  struct pair x = in(TALL, HIDDEN), xs = out(TALL, HIDDEN), y = out(TALL, HIDDEN);
  int32_t *rows = malloc((size_t)TALL * sizeof *rows);
  assert_non_null(rows);
  for (int k = 0; k < 2; k++) {
    int64_t n = k ? TAIL : TALL;
    for (int64_t i = 0; i < n; i++) rows[i] = (int32_t)(i >= n - TAIL ? 2 * n - TAIL - 1 - i : i);
    int32_t *dev = room((size_t)n * sizeof *dev);
    OK(be.upload(&be, dev, rows, (size_t)n * sizeof *dev));
    OK(be.ops.dispatch_fwd(&be, &(struct mt_dispatch_fwd_args){AT(x), dev, 1, AT(xs)}));
    OK(be.ops.combine_fwd(&be, &(struct mt_combine_fwd_args){
                                   .ys = AT(xs), .token_row = dev, .top_k = 1, .y = AT(y)}));
  }
  free(rows);
  same("dispatch_fwd", &xs);
  same("combine_fwd", &y);
  same_bits("there and back", last_rows(&y.far), x.near);
}

static void embedding(void **state) {
  (void)state;
  struct pair table = in(TALL, HIDDEN), grad = in(TALL, HIDDEN);
  struct mt_tensor dout = random_grid(MT_BF16, TAIL, HIDDEN, 1), y[2];
  const int32_t valid = TAIL;
  int32_t ids[TAIL], *dev = room(sizeof ids), *count = room(sizeof valid);
  OK(be.upload(&be, count, &valid, sizeof valid));
  for (int k = 0; k < 2; k++) {
    for (int i = 0; i < TAIL; i++) ids[i] = (int32_t)((k ? TAIL : TALL) - 1 - i);
    OK(be.upload(&be, dev, ids, sizeof ids));
    y[k] = grid(MT_BF16, TAIL, HIDDEN);
    OK(be.ops.embed_fwd(&be,
                        &(struct mt_embed_fwd_args){.ids = dev, .table = AT(table), .out = y[k]}));
    OK(be.ops.embed_bwd(
        &be,
        &(struct mt_embed_bwd_args){
            .ids = dev, .valid_count = count, .dout = dout, .dtable = AT(grad), .accumulate = 1}));
  }
  same_bits("embed_fwd", y[0], y[1]);
  same("embed_bwd", &grad);
}

/* All parameters in one segment, against the last of them as a segment that begins there. */
static void update(void **state) {
  (void)state;
  struct pair w = in(TALL, HIDDEN), g = in(TALL, HIDDEN), m = in(TALL, HIDDEN);
  struct pair v = pair_of(MT_BF16, TALL, HIDDEN, 0);
  struct pair *all[] = {&w, &g, &m, &v};
  double *sums = room(2 * sizeof *sums), sum[2];
  struct mt_adamw_values at = mt_adamw_at(1e-3, 0.9, 0.95, 0.1, 3, 7), *values = room(sizeof at);
  OK(be.upload(&be, values, &at, sizeof at));
  for (int k = 0; k < 2; k++) {
    struct mt_tensor flat[4];
    for (int i = 0; i < 4; i++) {
      flat[i] = AT(*all[i]);
      flat[i] = mt_vec(flat[i].data, MT_BF16, mt_count(&flat[i]));
    }
    OK(be.ops.sumsq(&be, &(struct mt_sumsq_args){&flat[1], 1, NULL, 0, sums + k}));
    struct mt_adamw_segment s = {.master = flat[0],
                                 .grad = flat[1],
                                 .m = flat[2],
                                 .v = flat[3],
                                 .decay = 1,
                                 .first = k ? (TALL - TAIL) * HIDDEN : 0};
    OK(be.ops.adamw(&be, &(struct mt_adamw_args){.segments = &s,
                                                 .segment_count = 1,
                                                 .beta1 = 0.9,
                                                 .beta2 = 0.95,
                                                 .eps = 1e-8,
                                                 .values = values}));
  }
  OK(be.download(&be, sum, sums, sizeof sum));
  assert_true(sum[1] > 1e5 && fabs(sum[0] / sum[1] - 1) < 1e-12);
  for (int i = 0; i < 4; i++)
    if (i != 1) same("adamw", all[i]);
}

static const char *backend;

static int open_backend(void **state) {
  (void)state;
  OK(mt_backend_create(&be, backend, 1));
  be.workspace_size_bytes = WORKSPACE;
  OK(be.mem_alloc(&be, WORKSPACE, &be.workspace));
  return 0;
}

static int between(void **state) {
  (void)state;
  OK(be.sync(&be));
  give_back();
  return 0;
}

static int close_backend(void **state) {
  (void)state;
  be.mem_free(&be, be.workspace, WORKSPACE);
  mt_backend_destroy(&be);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_teardown(grouped_products, between),
      cmocka_unit_test_teardown(swiglu, between),
      cmocka_unit_test_teardown(experts, between),
      cmocka_unit_test_teardown(eight_bits, between),
      cmocka_unit_test_teardown(swiglu_in_eight_bits, between),
      cmocka_unit_test_teardown(weights_of_many_experts, between),
      cmocka_unit_test_teardown(norms, between),
      cmocka_unit_test_teardown(permutation, between),
      cmocka_unit_test_teardown(embedding, between),
      cmocka_unit_test_teardown(update, between),
  };
  int failed = 0;
  GPU_OR_SKIP();
  void *probe;
  OK(mt_backend_create(&be, "cuda", 1));
  if (be.mem_alloc(&be, ROOM, &probe)) {
    printf("skipped: the GPU has no 40 GB left\n");
    return GPU_SKIPPED;
  }
  be.mem_free(&be, probe, ROOM);
  mt_backend_destroy(&be);
  for (int i = 0; i < 2; i++) {
    backend = i ? "cuda-portable" : "cuda";
    printf("%s\n", backend);
    failed |= cmocka_run_group_tests(tests, open_backend, close_backend);
  }
  return failed;
}
