/* The cases of 8-bit operands. Bytes are compared as bytes: scales and elements are exact functions
 * of the source. What no operation may touch is poisoned on both sides and must stay so. */
#ifndef TESTS_KERNELS_QUANT_CASES_H
#define TESTS_KERNELS_QUANT_CASES_H

#include "kernels/compare.h"
#include "quant/linear.h"

enum { POISON = 0x7f }; /* NaN as an element and, in float32, as a scale */

static const enum mt_qformat q_formats[] = {MT_Q_MXFP8, MT_Q_FP8};

struct dual_q {
  const char *name;
  struct mt_qtensor dev, ref;
  void *dev_memory, *ref_memory;
  size_t bytes;
};

static struct dual_q dual_q_memory(struct bench_case *c, const char *name, size_t bytes) {
  struct dual_q x = {.name = name, .bytes = bytes};
  x.dev_memory = own_dev(c, bytes);
  x.ref_memory = own(c, bytes);
  memset(x.ref_memory, POISON, bytes);
  OK(c->be->upload(c->be, x.dev_memory, x.ref_memory, bytes));
  return x;
}

/* Rows of activations in so many groups. */
static struct dual_q dual_rows(struct bench_case *c, const char *name, enum mt_qformat format,
                               int64_t rows, int64_t cols, int groups, int sides) {
  struct dual_q x = dual_q_memory(c, name, mt_operand_bytes(format, rows, cols, groups, sides));
  struct mt_row_groups g = {.count = groups};
  struct mt_operand o = {.format = format, .memory = x.dev_memory};
  mt_operand_shape(&o, rows, cols, sides, &g);
  x.dev = o.q;
  o.memory = x.ref_memory;
  mt_operand_shape(&o, rows, cols, sides, &g);
  x.ref = o.q;
  return x;
}

/* groups 0: of rank 2. */
static struct dual_q dual_weight(struct bench_case *c, const char *name, enum mt_qformat format,
                                 int64_t groups, int64_t n, int64_t k) {
  int64_t dim[3] = {groups ? groups : n, groups ? n : k, k};
  int rank = groups ? 3 : 2;
  struct dual_q x = dual_q_memory(c, name, mt_qweight_bytes(format, rank, dim, MT_SIDE_BOTH));
  mt_qweight_shape(&x.dev, format, rank, dim, MT_SIDE_BOTH, x.dev_memory);
  mt_qweight_shape(&x.ref, format, rank, dim, MT_SIDE_BOTH, x.ref_memory);
  return x;
}

static void expect_bytes(struct bench_case *c, const char *name, const void *dev, const void *want,
                         size_t bytes) {
  uint8_t *got = own(c, bytes);
  OK(c->be->download(c->be, got, dev, bytes));
  mix_bits(c, got, bytes);
  if (c->plant != 0 && bytes > 0) got[bytes / 2] ^= 1;
  if (memcmp(got, want, bytes) == 0) return;
  c->worst = INFINITY;
  c->worst_name = name;
}

static void expect_q(struct bench_case *c, const struct dual_q *x) {
  expect_bytes(c, x->name, x->dev_memory, x->ref_memory, x->bytes);
}

/* What the reference made, on the device too. */
static void share_q(struct bench_case *c, const struct dual_q *x) {
  OK(c->be->upload(c->be, x->dev_memory, x->ref_memory, x->bytes));
}

/* Where groups begin in column copies. */
static struct dual_ints padded_of(struct bench_case *c, const struct plan *p, int groups) {
  struct dual_ints x = ints(c, groups + 1, NULL);
  OK(c->ref_be.ops.pad_offsets(&c->ref_be,
                               &(struct mt_pad_offsets_args){p->offsets.ref, groups, x.ref}));
  OK(c->be->upload(c->be, x.dev, x.ref, (size_t)(groups + 1) * sizeof(int32_t)));
  return x;
}

#define Q(field, x) (dev.field = (x).dev, ref.field = (x).ref)
#define GROUPS                                                                                     \
  dev.offsets = p.offsets.dev, ref.offsets = p.offsets.ref, dev.padded = padded.dev,               \
  ref.padded = padded.ref
#define OWN_GROUPS(op_args)                                                                        \
  (op_args).offsets = p.offsets.dev, (op_args).padded = padded.dev, (op_args).group_count = z->e

static void case_pad_offsets(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct plan p = plan_of(c, z);
  struct dual_ints padded = ints(c, z->e + 1, NULL);
  ARGS(pad_offsets, N(group_count, z->e); dev.offsets = p.offsets.dev; ref.offsets = p.offsets.ref;
       dev.padded = padded.dev; ref.padded = padded.ref;)
  RUN(pad_offsets);
  expect_ints(c, "padded", &padded);
}

/* Ragged widths in both formats, then whole blocks, which have kernels of their own. */
static int64_t width_of(const struct size *z, int i) {
  return i < 2 ? z->f : mt_q_col_rows(z->f, 1);
}

/* Way 1: rows gathered into groups. */
static void case_quantize(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 4; i++) {
    int64_t f = width_of(z, i);
    struct plan p = plan_of(c, z);
    struct dual_ints padded = padded_of(c, &p, z->e);
    struct dual x = A("x", 'r', 3, z->t, f, 0);
    struct dual_q q = dual_rows(c, "q", q_formats[i % 2], acc ? z->t * z->k : z->t, f,
                                acc ? z->e : 1, MT_SIDE_BOTH);
    ARGS(quantize, T(x, x); Q(q, q);)
    if (acc) {
      GROUPS, N(group_count, z->e), N(top_k, z->k);
      dev.row_source = p.row_source.dev, ref.row_source = p.row_source.ref;
    }
    RUN(quantize);
    expect_q(c, &q);
  }
}

/* Records of poison on both sides. */
struct records {
  uint8_t *dev, *ref;
  size_t bytes;
};
static struct records records_of(struct bench_case *c, enum mt_qformat format, int64_t rows,
                                 int64_t cols) {
  struct records x = {.bytes = (size_t)(rows * mt_q_record_bytes(format, cols))};
  x.dev = own_dev(c, x.bytes);
  x.ref = own(c, x.bytes);
  memset(x.ref, POISON, x.bytes);
  OK(c->be->upload(c->be, x.dev, x.ref, x.bytes));
  return x;
}

/* Way 1: gathered, with rows that come from nowhere. */
static void case_pack_rows(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 2; i++) {
    struct plan p = plan_of(c, z);
    struct dual x = A("x", 'r', 3, z->t, z->f, 0);
    int64_t rows = acc ? z->t * z->k : z->t;
    struct records records = records_of(c, q_formats[i], rows, z->f);
    ARGS(pack_rows, T(x, x); N(row_count, rows); N(format, q_formats[i]); dev.records = records.dev;
         ref.records = records.ref;)
    if (acc) {
      N(top_k, z->k);
      dev.row_source = p.row_source.dev, ref.row_source = p.row_source.ref;
    }
    RUN(pack_rows);
    expect_bytes(c, "records", records.dev, records.ref, records.bytes);
  }
}

/* Way 1: in the order that the rows came from, whose other records are not read. */
static void case_unpack_rows(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 2; i++) {
    struct dual x = A("x", 'r', 3, z->t, z->f, 0), xs = A("xs", 'n', 1, z->t, z->f, 0);
    struct records records = records_of(c, q_formats[i], z->t, z->f);
    struct dual_ints order = ints(c, z->t, NULL);
    OK(c->ref_be.ops.pack_rows(&c->ref_be, &(struct mt_pack_rows_args){.x = x.ref,
                                                                       .row_count = z->t,
                                                                       .format = q_formats[i],
                                                                       .records = records.ref}));
    OK(c->be->upload(c->be, records.dev, records.ref, records.bytes));
    for (int r = 0; r < z->t; r++) order.ref[r] = (int32_t)(z->t - 1 - r);
    OK(c->be->upload(c->be, order.dev, order.ref, (size_t)z->t * sizeof(int32_t)));
    ARGS(unpack_rows, T(xs, xs); N(format, q_formats[i]); dev.records = records.dev;
         ref.records = records.ref;)
    if (acc) dev.source = order.dev, ref.source = order.ref;
    RUN(unpack_rows);
    expect(c, &xs);
  }
}

/* Of the master's format, way 1 of the activations'; then of whole tiles, for which kernels may
 * have a way of their own. */
static void case_quantize_weight(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 4; i++) {
    int64_t n = i < 2 ? z->f : mt_q_col_rows(z->f, 1), k = i < 2 ? z->h : mt_q_col_rows(z->h, 1);
    struct dual w =
        dual(c, "w", acc ? ACT : STATE, 'r', 0.3, acc ? n : z->e, acc ? k : n, acc ? 0 : k);
    struct dual_q q = dual_weight(c, "q", q_formats[i % 2], acc ? 0 : z->e, n, k);
    ARGS(quantize_weight, T(w, w); Q(q, q);)
    RUN(quantize_weight);
    expect_q(c, &q);
  }
}

/* Random numbers as operands of the reference's making, the same bytes on both. */
static struct dual_q some_rows(struct bench_case *c, const char *name, enum mt_qformat format,
                               int64_t rows, int64_t cols, const struct plan *p,
                               const struct dual_ints *padded, int groups, int sides) {
  struct dual_q q = dual_rows(c, name, format, rows, cols, p ? groups : 1, sides);
  struct mt_quantize_args a = {.q = q.ref, .group_count = groups};
  double *v = own(c, (size_t)(rows * cols) * sizeof *v);
  for (int64_t i = 0; i < rows * cols; i++) v[i] = draw(c);
  a.x = mt_mat(v, MT_F64, rows, cols);
  if (p) a.offsets = p->offsets.ref, a.padded = padded->ref;
  OK(c->ref_be.ops.quantize(&c->ref_be, &a));
  share_q(c, &q);
  return q;
}

static struct dual_q some_weight(struct bench_case *c, enum mt_qformat format, int groups,
                                 int64_t n, int64_t k) {
  struct dual_q q = dual_weight(c, "w", format, groups, n, k);
  int64_t all = (groups ? groups : 1) * n * k;
  double *v = own(c, (size_t)all * sizeof *v);
  for (int64_t i = 0; i < all; i++) v[i] = 0.3 * draw(c);
  struct mt_quantize_weight_args a = {
      .w = groups ? mt_cube(v, MT_F64, groups, n, k) : mt_mat(v, MT_F64, n, k), .q = q.ref};
  OK(c->ref_be.ops.quantize_weight(&c->ref_be, &a));
  share_q(c, &q);
  return q;
}

static void case_qlinear_fwd(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 2; i++) {
    struct plan p = plan_of(c, z);
    struct dual_ints padded = padded_of(c, &p, z->e);
    int rows = acc ? z->t * z->k : z->t;
    struct dual_q x =
        some_rows(c, "x", q_formats[i], rows, z->h, acc ? &p : NULL, &padded, z->e, MT_SIDE_ROW);
    struct dual_q w = some_weight(c, q_formats[i], acc ? z->e : 0, z->f, z->h);
    struct dual y = A("y", 'n', 1, rows, z->f, 0);
    ARGS(qlinear_fwd, Q(x, x); Q(w, w); T(y, y);)
    if (acc) dev.offsets = p.offsets.dev, ref.offsets = p.offsets.ref;
    RUN(qlinear_fwd);
    expect(c, &y);
  }
}

/* Both formats, then FP8 whose weight has no column copy. */
static void case_qlinear_dgrad(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 3; i++) {
    enum mt_qformat format = i < 2 ? q_formats[i] : MT_Q_FP8;
    struct plan p = plan_of(c, z);
    struct dual_ints padded = padded_of(c, &p, z->e);
    int rows = acc ? z->t * z->k : z->t;
    struct dual_q dy =
        some_rows(c, "dy", format, rows, z->f, acc ? &p : NULL, &padded, z->e, MT_SIDE_ROW);
    struct dual_q w = some_weight(c, format, acc ? z->e : 0, z->f, z->h);
    struct dual dx = A("dx", i % 2 ? 'r' : 'n', 1, rows, z->h, 0);
    ARGS(qlinear_dgrad, Q(dy, dy); Q(w, w); T(dx, dx); N(accumulate, i % 2);)
    if (i == 2) dev.w.col = ref.w.col = NULL, dev.w.col_scale = ref.w.col_scale = NULL;
    if (acc) dev.offsets = p.offsets.dev, ref.offsets = p.offsets.ref;
    RUN(qlinear_dgrad);
    expect(c, &dx);
  }
}

/* FP8's own tensor cores make weight gradients, which may be float32: how much wider their sums'
 * bound is than an operation's. */
static double sum_slack(const struct bench_case *c, enum mt_qformat format) {
  double sum = mt_recipe_find("fp8")->sum_tolerance, op = c->recipe->op_tolerance;
  return format == MT_Q_FP8 && strcmp(c->be->name, "cuda") == 0 && sum > op ? sum / op : 1;
}

/* Both formats, each with = and +=. */
static void case_qlinear_wgrad(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 4; i++) {
    enum mt_qformat format = q_formats[i % 2];
    struct plan p = plan_of(c, z);
    struct dual_ints padded = padded_of(c, &p, z->e);
    int rows = acc ? z->t * z->k : z->t;
    const struct plan *groups = acc ? &p : NULL;
    struct dual_q dy = some_rows(c, "dy", format, rows, z->f, groups, &padded, z->e, MT_SIDE_COL);
    struct dual_q x = some_rows(c, "x", format, rows, z->h, groups, &padded, z->e, MT_SIDE_COL);
    struct dual dw =
        G("dw", i / 2 ? 'r' : 'n', 1, acc ? z->e : z->f, acc ? z->f : z->h, acc ? z->h : 0);
    struct dual sumsq = dual(c, "sumsq", MT_F64, 'n', 1, 1, 0, 0);
    ARGS(qlinear_wgrad, Q(dy, dy); Q(x, x); T(dw, dw); N(accumulate, i / 2);
         dev.sumsq = sumsq.dev.data; ref.sumsq = sumsq.ref.data;)
    if (acc) GROUPS;
    RUN(qlinear_wgrad);
    double slack = sum_slack(c, format);
    expect_scaled(c, &dw, slack);
    expect_scaled(c, &sumsq, slack * (GRAD == MT_BF16 ? 4 : 2));
  }
}

/* The backend's own swiglu_fwd and quantize, one after the other, are the measure: the same bytes.
 */
static void case_swiglu_quantize_fwd(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 4; i++) {
    int64_t f = width_of(z, i);
    struct plan p = plan_of(c, z);
    struct dual_ints padded = padded_of(c, &p, z->e);
    int rows = z->t * z->k;
    struct dual gu = A("gate_up", 'r', 2, rows, 2 * f, 0), h = A("h", 'n', 1, rows, f, 0);
    struct dual prob = S("row_prob", 'r', 1, rows, 0, 0);
    struct dual_q joined = dual_rows(c, "h", q_formats[i % 2], rows, f, z->e, MT_SIDE_BOTH);
    struct dual_q apart = dual_rows(c, "h", q_formats[i % 2], rows, f, z->e, MT_SIDE_BOTH);
    struct mt_swiglu_quantize_fwd_args a = {.gate_up = gu.dev, .h = joined.dev};
    struct mt_swiglu_fwd_args s = {
        .gate_up = gu.dev, .row_count = p.offsets.dev + z->e, .h = h.dev};
    struct mt_quantize_args q = {.x = h.dev, .q = apart.dev};
    if (acc) a.row_prob = s.row_prob = prob.dev;
    OWN_GROUPS(a);
    OWN_GROUPS(q);
    OK(c->be->ops.swiglu_quantize_fwd(c->be, &a));
    OK(c->be->ops.swiglu_fwd(c->be, &s));
    OK(c->be->ops.quantize(c->be, &q));
    OK(c->be->download(c->be, apart.ref_memory, apart.dev_memory, apart.bytes));
    expect_bytes(c, "h", joined.dev_memory, apart.ref_memory, apart.bytes);
  }
}

/* Likewise; drow_prob beside the reference's. Way 1: without h and the probabilities. */
static void case_swiglu_quantize_bwd(struct bench_case *c, const struct size *z, int acc) {
  for (int i = 0; i < 4; i++) {
    int64_t f = width_of(z, i);
    struct plan p = plan_of(c, z);
    struct dual_ints padded = padded_of(c, &p, z->e);
    int rows = z->t * z->k;
    struct dual gu = A("gate_up", 'r', 2, rows, 2 * f, 0), dh = A("dh", 'r', 1, rows, f, 0);
    struct dual prob = S("row_prob", 'r', 1, rows, 0, 0);
    struct dual dprob = S("drow_prob", 'n', 1, rows, 0, 0);
    struct dual dgu = A("dgate_up", 'n', 1, rows, 2 * f, 0);
    struct dual h = A("h", 'n', 1, rows, f, 0);
    struct dual_q to[2], apart[2]; /* dgate_up and h */
    for (int o = 0; o < 2; o++) {
      int64_t cols = o ? f : 2 * f;
      int sides = o ? MT_SIDE_COL : MT_SIDE_BOTH;
      to[o] = dual_rows(c, o ? "h" : "dgate_up", q_formats[i % 2], rows, cols, z->e, sides);
      apart[o] = dual_rows(c, "apart", q_formats[i % 2], rows, cols, z->e, sides);
    }
    ARGS(swiglu_quantize_bwd, T(gate_up, gu); T(dh, dh); Q(dgate_up, to[0]); GROUPS;
         N(group_count, z->e);)
    struct mt_swiglu_bwd_args s = {.dh = dh.dev,
                                   .gate_up = gu.dev,
                                   .row_count = p.offsets.dev + z->e,
                                   .dgate_up = dgu.dev,
                                   .h = h.dev};
    if (!acc) T(row_prob, prob), T(drow_prob, dprob), Q(h, to[1]), s.row_prob = prob.dev;
    RUN(swiglu_quantize_bwd);
    OK(c->be->ops.swiglu_bwd(c->be, &s));
    for (int o = 0; o < (acc ? 1 : 2); o++) {
      struct mt_quantize_args q = {.x = o ? h.dev : dgu.dev, .q = apart[o].dev};
      OWN_GROUPS(q);
      OK(c->be->ops.quantize(c->be, &q));
      OK(c->be->download(c->be, apart[o].ref_memory, apart[o].dev_memory, apart[o].bytes));
      expect_bytes(c, to[o].name, to[o].dev_memory, apart[o].ref_memory, apart[o].bytes);
    }
    if (!acc) expect(c, &dprob);
  }
}

#undef GROUPS
#undef OWN_GROUPS
#endif
