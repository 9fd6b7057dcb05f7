/* Internal to hf/: rows of a parameter as they lie in the files. */
#ifndef MT_HF_SOURCE_H
#define MT_HF_SOURCE_H

#include "hf/checkpoint.h"

struct mt_hf_rows {
  const uint8_t *data;
  enum mt_dtype dtype;
  int64_t count; /* rows that follow each other from here */
};

/* NULL when absent. shard may be NULL. */
const struct mt_st_tensor *mt_hf_find(const struct mt_hf_checkpoint *h, const char *name,
                                      int *shard);

/* Where row `row` of a parameter lies in an opened checkpoint. */
mt_err mt_hf_source_rows(const struct mt_hf_checkpoint *h, const struct mt_param *p, int64_t row,
                         struct mt_hf_rows *out);

#endif
