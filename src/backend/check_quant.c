/* Checks of the operations on 8-bit operands. */
#include "backend/check_args.h"

/* A weight's dimensions are rank, d0..d2; activations' [d0, d1]. copies: bits 1 row, 2 col. groups:
 * of the rows that the column copy must have room for. */
enum { ROW = 1, COL = 2, ROW_TURNED = 5 };
static mt_err want_q(const char *op, const char *arg, const struct mt_qtensor *q, int copies,
                     int64_t groups, int rank, int64_t d0, int64_t d1, int64_t d2) {
  bool weight = groups == 0;
  if (q->format != MT_Q_MXFP8 && q->format != MT_Q_FP8)
    return mt_fail(MT_EUNSUPPORTED, "%s: %s has 8-bit format %d", op, arg, (int)q->format);
  if (q->weight != weight || q->rank != rank || q->dim[0] != d0 || q->dim[1] != d1 ||
      (rank > 2 && q->dim[2] != d2)) {
    return mt_fail(MT_ESHAPE, "%s: %s is %s [%lld,%lld,%lld] of rank %d, expected [%lld,%lld,%lld]",
                   op, arg, q->weight ? "a weight" : "rows", (long long)q->dim[0],
                   (long long)q->dim[1], (long long)q->dim[2], q->rank, (long long)d0,
                   (long long)d1, (long long)d2);
  }
  if (((copies & ROW) && !q->row) || ((copies & COL) && !q->col) || (!q->row && !q->col) ||
      (q->row && !q->row_scale) || (q->col && !q->col_scale))
    return mt_fail(MT_ESHAPE, "%s: %s lacks a copy or its scales", op, arg);
  if (weight) return MT_OK;
  if (q->row && q->format == MT_Q_FP8 && (q->scale_ld < d0 || q->scale_ld % 4 != 0)) {
    return mt_fail(MT_ESHAPE, "%s: %s has %lld scales a line for %lld rows", op, arg,
                   (long long)q->scale_ld, (long long)d0);
  }
  if (q->col && (q->col_rows < mt_q_col_rows(d0, groups) || q->col_rows % MT_Q_PAD != 0)) {
    return mt_fail(MT_ESHAPE, "%s: %s has columns of %lld for %lld rows in %lld groups", op, arg,
                   (long long)q->col_rows, (long long)d0, (long long)groups);
  }
  return MT_OK;
}

static int64_t groups_of(const int32_t *offsets, int group_count) {
  return offsets ? group_count : 1;
}

static mt_err both_offsets(const char *op, const int32_t *offsets, const int32_t *padded,
                           int group_count) {
  if (!offsets && !padded) return MT_OK;
  if (offsets && padded && group_count > 0) return MT_OK;
  return mt_fail(MT_ESHAPE, "%s: offsets %s, padded %s, %d groups", op, offsets ? "given" : "NULL",
                 padded ? "given" : "NULL", group_count);
}

mt_err mt_check_pad_offsets(const struct mt_pad_offsets_args *a) {
  const char *op = "pad_offsets";
  PTR(offsets);
  PTR(padded);
  if (a->group_count < 1) return mt_fail(MT_ESHAPE, "%s: %d groups", op, a->group_count);
  return MT_OK;
}

mt_err mt_check_quantize(const struct mt_quantize_args *a) {
  const char *op = "quantize";
  int64_t r = a->q.dim[0];
  MT_TRY(both_offsets(op, a->offsets, a->padded, a->group_count));
  if (a->row_source && (a->top_k < 1 || !a->offsets))
    return mt_fail(MT_ESHAPE, "%s: rows gathered, top %d, without offsets", op, a->top_k);
  M2(x, REQUIRED, MT_DTYPE_COUNT, a->row_source ? ANY_ROWS : r, a->q.dim[1]);
  return want_q(op, "q", &a->q, 0, groups_of(a->offsets, a->group_count), 2, r, a->x.dim[1], 1);
}

static mt_err want_records(const char *op, const void *records, enum mt_qformat format) {
  MT_TRY(mt_check_present(op, "records", records));
  if (format != MT_Q_MXFP8 && format != MT_Q_FP8)
    return mt_fail(MT_EUNSUPPORTED, "%s: 8-bit format %d", op, (int)format);
  if ((uintptr_t)records % 16 == 0) return MT_OK;
  return mt_fail(MT_ESHAPE, "%s: records begin at no multiple of 16", op);
}

mt_err mt_check_pack_rows(const struct mt_pack_rows_args *a) {
  const char *op = "pack_rows";
  MT_TRY(want_records(op, a->records, a->format));
  if (a->row_count < 0 || (a->row_source && a->top_k < 1))
    return mt_fail(MT_ESHAPE, "%s: %lld rows, top %d", op, (long long)a->row_count, a->top_k);
  M2(x, REQUIRED, MT_DTYPE_COUNT, a->row_source ? ANY_ROWS : a->row_count, a->x.dim[1]);
  return MT_OK;
}

mt_err mt_check_unpack_rows(const struct mt_unpack_rows_args *a) {
  const char *op = "unpack_rows";
  MT_TRY(want_records(op, a->records, a->format));
  M2(xs, REQUIRED, MT_DTYPE_COUNT, ANY_ROWS, a->xs.dim[1]);
  return MT_OK;
}

mt_err mt_check_quantize_weight(const struct mt_quantize_weight_args *a) {
  const char *op = "quantize_weight";
  const int64_t *d = a->w.dim;
  if (a->w.rank < 2) return mt_fail(MT_ESHAPE, "%s: weight of rank %d", op, a->w.rank);
  MT_TRY(mt_check_tensor(op, "w", &a->w, REQUIRED, MT_DTYPE_COUNT, a->w.rank, d[0], d[1], d[2]));
  return want_q(op, "q", &a->q, 0, 0, a->w.rank, d[0], d[1], d[2]);
}

/* w: its rank follows from offsets; out and in as the tensors that it meets have them. */
static mt_err want_q_weight(const char *op, const struct mt_qtensor *w, const int32_t *offsets,
                            int copies, int64_t out, int64_t in) {
  if (!offsets) return want_q(op, "w", w, copies, 0, 2, out, in, 1);
  return want_q(op, "w", w, copies, 0, 3, w->dim[0], out, in);
}

static mt_err same_format(const char *op, const struct mt_qtensor *a, const struct mt_qtensor *b) {
  if (a->format == b->format) return MT_OK;
  return mt_fail(MT_ESHAPE, "%s: operands of 8-bit formats %d and %d", op, (int)a->format,
                 (int)b->format);
}

/* out [m, wide] of rows in [m, deep] and a weight, of which `copy` is read. */
static mt_err rows_product(const char *op, const char *in_name, const struct mt_qtensor *in,
                           const struct mt_qtensor *w, const char *out_name,
                           const struct mt_tensor *out, const int32_t *offsets, int copy) {
  int64_t m = out->dim[0], wide = out->dim[1], deep = in->dim[1];
  MT_TRY(mt_check_tensor(op, out_name, out, REQUIRED, MT_DTYPE_COUNT, 2, m, wide, 1));
  MT_TRY(same_format(op, in, w));
  MT_TRY(want_q(op, in_name, in, ROW, 1, 2, m, deep, 1));
  return copy == ROW ? want_q_weight(op, w, offsets, copy, wide, deep)
                     : want_q_weight(op, w, offsets, copy, deep, wide);
}

mt_err mt_check_qlinear_fwd(const struct mt_qlinear_fwd_args *a) {
  return rows_product("qlinear_fwd", "x", &a->x, &a->w, "y", &a->y, a->offsets, ROW);
}

/* FP8's square blocks are the same either way. */
mt_err mt_check_qlinear_dgrad(const struct mt_qlinear_dgrad_args *a) {
  int copy = a->w.format == MT_Q_FP8 && !a->w.col ? ROW_TURNED : COL;
  return rows_product("qlinear_dgrad", "dy", &a->dy, &a->w, "dx", &a->dx, a->offsets, copy);
}

mt_err mt_check_qlinear_wgrad(const struct mt_qlinear_wgrad_args *a) {
  const char *op = "qlinear_wgrad";
  int rank = a->dw.rank;
  int64_t n = a->dy.dim[1], k = a->x.dim[1], groups = rank == 3 ? a->dw.dim[0] : 1;
  MT_TRY(both_offsets(op, a->offsets, a->padded, (int)groups));
  if (rank != (a->offsets ? 3 : 2))
    return mt_fail(MT_ESHAPE, "%s: weight of rank %d %s offsets", op, rank,
                   a->offsets ? "with" : "without");
  MT_TRY(mt_check_tensor(op, "dw", &a->dw, REQUIRED, MT_DTYPE_COUNT, rank, rank == 3 ? groups : n,
                         rank == 3 ? n : k, k));
  MT_TRY(same_format(op, &a->dy, &a->x));
  MT_TRY(want_q(op, "dy", &a->dy, COL, groups, 2, a->x.dim[0], n, 1));
  MT_TRY(want_q(op, "x", &a->x, COL, groups, 2, a->x.dim[0], k, 1));
  if (a->dy.col_rows != a->x.col_rows)
    return mt_fail(MT_ESHAPE, "%s: columns of %lld and %lld", op, (long long)a->dy.col_rows,
                   (long long)a->x.col_rows);
  if (a->sumsq && a->dw.ld != a->dw.dim[rank - 1])
    return mt_fail(MT_ESHAPE, "%s: squares of rows %lld apart", op, (long long)a->dw.ld);
  return MT_OK;
}

mt_err mt_check_swiglu_quantize_fwd(const struct mt_swiglu_quantize_fwd_args *a) {
  const char *op = "swiglu_quantize_fwd";
  int64_t r = a->h.dim[0], f = a->h.dim[1];
  MT_TRY(both_offsets(op, a->offsets, a->padded, a->group_count));
  M2(gate_up, REQUIRED, MT_DTYPE_COUNT, r, 2 * f);
  V1(row_prob, OPTIONAL, stat_of(&a->gate_up), r);
  return want_q(op, "h", &a->h, 0, groups_of(a->offsets, a->group_count), 2, r, f, 1);
}

mt_err mt_check_swiglu_quantize_bwd(const struct mt_swiglu_quantize_bwd_args *a) {
  const char *op = "swiglu_quantize_bwd";
  int64_t r = a->dh.dim[0], f = a->dh.dim[1], groups = groups_of(a->offsets, a->group_count);
  MT_TRY(both_offsets(op, a->offsets, a->padded, a->group_count));
  M2(dh, REQUIRED, MT_DTYPE_COUNT, r, f);
  M2(gate_up, REQUIRED, a->dh.dtype, r, 2 * f);
  V1(row_prob, OPTIONAL, stat_of(&a->dh), r);
  V1(drow_prob, OPTIONAL, stat_of(&a->dh), r);
  MT_TRY(want_q(op, "dgate_up", &a->dgate_up, 0, groups, 2, r, 2 * f, 1));
  if (a->h.format == MT_Q_NONE) return MT_OK;
  MT_TRY(same_format(op, &a->dgate_up, &a->h));
  return want_q(op, "h", &a->h, 0, groups, 2, r, f, 1);
}
