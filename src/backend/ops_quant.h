/* Arguments of the operations on 8-bit operands: a part of ops.h, whose conventions hold. */
#ifndef MT_BACKEND_OPS_QUANT_H
#define MT_BACKEND_OPS_QUANT_H

#include "backend/qtensor.h"
#include "backend/tensor.h"

/* Eight-bit operands: qtensor.h has their layouts, docs/math.md, "Eight-bit blocks", the numbers.
 * In all of the following offsets and padded are device [group_count+1], or both NULL: one group of
 * all rows. Which copies an operand has (row, col or both) says what is written.
 *
 * padded[g] = where group g begins with every group before it filled up to MT_Q_PAD rows. Whenever
 * offsets have changed this runs again before what reads them with 8-bit operands: a backend may
 * note the groups' sizes here. */
struct mt_pad_offsets_args {
  const int32_t *offsets; /* [group_count+1] */
  int group_count;
  int32_t *padded; /* [group_count+1] (=) */
};

/* Row r of q is row r of x, or x[row_source[r] / top_k] with row_source (dispatch_fwd and quantize
 * in one). Rows at or past offsets[G] of the row copy, and of the column copy what is past
 * padded[G], are left as they are; padding in the column copy becomes zeros with finite scales. */
struct mt_quantize_args {
  struct mt_tensor x;        /* act [R,C], or [T,C] with row_source; any ld */
  const int32_t *row_source; /* [R] device, or NULL; not read at or past offsets[G] */
  int top_k;
  const int32_t *offsets, *padded;
  int group_count;
  struct mt_qtensor q; /* [R,C] (=) */
};

/* records[r] (=) x[row_source[r] / top_k] (or x[r]) as a record of mt_q_record_bytes; those with -1
 * are left as they are. */
struct mt_pack_rows_args {
  struct mt_tensor x;        /* act [T,C]; any ld */
  const int32_t *row_source; /* [R] device, or NULL: then T is R */
  int top_k;
  int64_t row_count; /* R */
  enum mt_qformat format;
  uint8_t *records; /* [R] (=), aligned to 16 */
};

/* xs[r] (=) record source[r] (or r) as numbers: element times scale, which is exact in act down to
 * 2^-133. Quantized again they give the same numbers, and but for blocks whose largest magnitude
 * was in (1.75, 1.8125] 2^e the same bytes (docs/math.md). */
struct mt_unpack_rows_args {
  const uint8_t *records;
  const int32_t *source; /* [R] device, or NULL */
  enum mt_qformat format;
  struct mt_tensor xs; /* act [R,C] (=); any ld */
};

struct mt_quantize_weight_args {
  struct mt_tensor
      w; /* F32 or BF16 (F64 on ref), [N,K] or [G,N,K]: the master where there is one */
  struct mt_qtensor q; /* the same shape, weight (=) */
};

/* The products of linear_fwd, linear_dgrad and linear_wgrad of 8-bit operands: element times scale
 * is exact, sums are float32 or better. A backend whose tensor cores keep fewer bits adds them up
 * in float32 every 128 elements at the latest. */
struct mt_qlinear_fwd_args {
  struct mt_qtensor x;    /* [M,K]: row */
  struct mt_qtensor w;    /* [N,K] or [G,N,K]: row */
  struct mt_tensor y;     /* act [M,N] (=); any ld */
  const int32_t *offsets; /* with a w of rank 3 */
};

struct mt_qlinear_dgrad_args {
  struct mt_qtensor dy; /* [M,N]: row */
  struct mt_qtensor w;  /* col; of FP8 row where there is no col */
  struct mt_tensor dx;  /* act [M,K] (acc) */
  const int32_t *offsets;
  int accumulate;
};

struct mt_qlinear_wgrad_args {
  struct mt_qtensor dy, x; /* [M,N], [M,K]: col, of equal col_rows */
  struct mt_tensor dw;     /* grad [N,K] or [G,N,K] (acc); contiguous where sumsq is given */
  const int32_t *offsets, *padded; /* with a dw of rank 3 */
  int accumulate;
  double *sumsq; /* as linear_wgrad's */
};

/* h as swiglu_fwd makes and rounds it, then quantize: one operation, and h is in 8 bits alone. */
struct mt_swiglu_quantize_fwd_args {
  struct mt_tensor gate_up;  /* act [R,2F] */
  struct mt_tensor row_prob; /* stat [R] or NULL */
  const int32_t *offsets, *padded;
  int group_count;
  struct mt_qtensor h; /* [R,F] (=) */
};

/* dgate_up and h as swiglu_bwd makes and rounds them, then quantize. */
struct mt_swiglu_quantize_bwd_args {
  struct mt_tensor dh;       /* act [R,F] */
  struct mt_tensor gate_up;  /* act [R,2F] */
  struct mt_tensor row_prob; /* stat [R] or NULL */
  const int32_t *offsets, *padded;
  int group_count;
  struct mt_qtensor dgate_up; /* [R,2F] (=) */
  struct mt_qtensor h;        /* [R,F] (=) for the down projection's wgrad, or absent */
  struct mt_tensor drow_prob; /* stat [R] (=), or NULL */
};

#endif
