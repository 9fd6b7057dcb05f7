/* How much memory it takes to hold both operands of a product of 8-bit operands in another format:
 * what backends without such products need. */
#ifndef MT_BACKEND_DEQUANT_H
#define MT_BACKEND_DEQUANT_H

#include "backend/device.h"

/* Elements of the largest product's operands, `groups` matrices of a weight at a time. */
static inline size_t mt_dequant_elements(const struct mt_limits *l, int64_t groups) {
  if (l->qformat == MT_Q_NONE) return 0;
  int64_t h = l->hidden, f = 2 * l->ffn, q = l->heads * l->head_dim;
  int64_t qkv = q + 2 * l->kv_heads * l->head_dim;
  int64_t rows = mt_q_col_rows(l->rows, l->experts), tokens = mt_q_padded(l->tokens);
  /* Two matrices of rows (wgrad), or one and weights; each up to 256 bytes further on. */
  int64_t wide = f > h ? f : h, dense = qkv > h ? qkv : h;
  int64_t experts =
      rows * (f + h) > rows * wide + groups * f * h ? rows * (f + h) : rows * wide + groups * f * h;
  int64_t attention =
      tokens * (qkv + h) > tokens * dense + qkv * h ? tokens * (qkv + h) : tokens * dense + qkv * h;
  return (size_t)(experts > attention ? experts : attention) + 256;
}

#endif
