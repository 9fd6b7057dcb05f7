/* One packed row of samples: what the collator makes and the model consumes. Host memory. */
#ifndef MT_BACKEND_BATCH_H
#define MT_BACKEND_BATCH_H

#include <stdint.h>

enum { MT_IGNORE = -100 }; /* label of a position that is no target */

struct mt_batch {
  int token_count;     /* T: filled length, padded to the recipe's multiple or to a length
                          that the loader uses again */
  int valid_count;     /* tokens that are real; the rest is padding at the end */
  int sequence_count;  /* packed samples */
  int target_count;    /* labels that are not MT_IGNORE */
  int32_t *ids;        /* [T]; padding: 0 */
  int32_t *positions;  /* [T], from 0 in each sample; padding: 0 */
  int32_t *labels;     /* [T]: the NEXT token of the same sample, or MT_IGNORE (a sample's last
                          position always; padding too): already shifted */
  int32_t *cu_seqlens; /* [sequence_count+1], 0 .. valid_count */
  int64_t *lines;      /* [sequence_count]: where each sample came from (1-based line of the data
                          file), for messages */
  int token_capacity, sequence_capacity; /* what the arrays hold */
};

/* Rows that a pass runs over. A batch that has none is taken for one row of padding, so that
 * whatever a pass writes is written (gradients without a row: zeros). */
static inline int mt_batch_rows(const struct mt_batch *b) {
  return b->token_count > 0 ? b->token_count : 1;
}

#endif
