/* Norms of experts' weights, straight from the files. */
#include <math.h>
#include <stdlib.h>

#include "base/error.h"
#include "hf/source.h"

enum { PIECE = 4096 };

static mt_err add_rows(const struct mt_hf_checkpoint *h, const struct mt_param *p, int64_t row,
                       int64_t rows, double *sum) {
  double wide[PIECE];
  int64_t n = mt_param_row_elems(p);
  for (int64_t end = row + rows; row < end;) {
    struct mt_hf_rows from;
    MT_TRY(mt_hf_source_rows(h, p, row, &from));
    if (from.count > end - row) from.count = end - row;
    size_t item = mt_dtype_bytes(from.dtype), left = (size_t)(from.count * n);
    for (size_t at = 0; at < left; at += PIECE) {
      size_t count = left - at < PIECE ? left - at : PIECE;
      double s = 0;
      mt_dtype_convert(wide, MT_F64, from.data + at * item, from.dtype, count);
#pragma omp simd reduction(+ : s)
      for (size_t i = 0; i < count; i++) s += wide[i] * wide[i];
      *sum += s;
    }
    mt_map_forget(from.data, left * item);
    row += from.count;
  }
  return MT_OK;
}

static mt_err norms_of(const struct mt_hf_checkpoint *h, const struct mt_params *params, int layer,
                       int expert, struct mt_hf_expert_norms *out) {
  const struct mt_param *up = mt_params_find(params, MT_PARAM_GATE_UP, layer);
  const struct mt_param *down = mt_params_find(params, MT_PARAM_DOWN, layer);
  int64_t f = h->config.ffn, hidden = h->config.hidden;
  double gate_sum = 0, up_sum = 0, down_sum = 0;
  MT_TRY(add_rows(h, up, expert * 2 * f, f, &gate_sum));
  MT_TRY(add_rows(h, up, expert * 2 * f + f, f, &up_sum));
  MT_TRY(add_rows(h, down, expert * hidden, hidden, &down_sum));
  *out = (struct mt_hf_expert_norms){sqrt(gate_sum), sqrt(up_sum), sqrt(down_sum)};
  return MT_OK;
}

mt_err mt_hf_expert_norms(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                          int layer, struct mt_hf_expert_norms *out) {
  mt_err worst = MT_OK;
#pragma omp parallel for schedule(dynamic)
  for (int e = 0; e < h->config.experts; e++) {
    mt_err err = norms_of(h, params, layer, e, &out[e]);
    if (err) {
#pragma omp critical(expert_norms)
      worst = err;
    }
  }
  return worst ? mt_fail(worst, "%s: the experts of layer %d cannot be read", h->dir, layer)
               : MT_OK;
}
