/* Hugging Face's tensors of each row of the parameter table. One description serves import, export,
 * conversion and freezing. */
#ifndef MT_HF_NAMES_H
#define MT_HF_NAMES_H

#include "model/params.h"

enum mt_hf_layout {
  MT_HF_PER_EXPERT, /* block_sparse_moe.experts.N.w1.weight, as the hub has them */
  MT_HF_PACKED,     /* mlp.experts.gate_up_proj [E,2F,H], as transformers holds them */
  MT_HF_LAYOUT_COUNT
};

/* One tensor of a checkpoint and where its rows lie in the parameter (rows of the last dimension):
 * block b, rows [b*block_rows, (b+1)*block_rows) of the tensor, are rows
 * [param_row + b*param_stride, + block_rows) of the parameter. */
struct mt_hf_tensor {
  char name[128];
  int rank;
  int64_t dim[MT_MAX_RANK];
  int64_t blocks, block_rows, param_row, param_stride;
};

/* Tensors that make up a parameter, and the i-th of them. */
int mt_hf_tensor_count(const struct mt_config *c, enum mt_hf_layout layout,
                       const struct mt_param *p);
struct mt_hf_tensor mt_hf_tensor_at(const struct mt_config *c, enum mt_hf_layout layout,
                                    const struct mt_param *p, int i);

/* Elements of one row and number of rows of a parameter. */
int64_t mt_param_row_elems(const struct mt_param *p);
int64_t mt_param_rows(const struct mt_param *p);

/* Clears `learns` on every row whose tensors' names (either layout) or own name match a pattern of
 * fnmatch(3). Errors: MT_EINVAL for a pattern that matches nothing; MT_EUNSUPPORTED for one that
 * matches only part of a fused row, naming what goes together. */
mt_err mt_hf_freeze(const struct mt_config *c, struct mt_params *params,
                    const char *const *patterns, int count);

/* The rows of what a shard (NULL: everything) holds, out (=), and, unless NULL, of the whole model,
 * whole (=), frozen by patterns. These are matched in the whole model: of what is here one may
 * match nothing. Errors: MT_ENOMEM, those of mt_hf_freeze. */
mt_err mt_hf_params(const struct mt_config *c, const struct mt_shard *shard,
                    const char *const *patterns, int count, struct mt_params *whole,
                    struct mt_params *out);

#endif
