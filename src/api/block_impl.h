/* How blocks are made. */
#ifndef MT_API_BLOCK_IMPL_H
#define MT_API_BLOCK_IMPL_H

#include "api/blocks.h"
#include "base/error.h"
#include "quant/linear.h"

/* *b (=) zeroed memory of size_bytes, whose first member is the block. Errors: MT_EINVAL for widths
 * out of range. */
mt_err mt_block_make(struct mt_space *s, const struct mt_block_kind *kind, size_t size_bytes,
                     int64_t in, int64_t out, int64_t groups, struct mt_block **b);
/* Hands the block out, or frees it where err says that its making failed; returns err. */
mt_err mt_block_finish(struct mt_block *b, mt_err err, mt_block **out);
/* Frees it, owned or not. */
void mt_block_release(struct mt_block *b);

#endif
