/* A data file's lines -> samples -> blocks of tokens, on several threads in bounded memory. */
#ifndef MT_DATA_TOKENISE_H
#define MT_DATA_TOKENISE_H

#include <stdatomic.h>

#include "data/tokens.h"

struct mt_tokenise_job {
  const struct mt_tokenizer *tokenizer;
  const struct mt_dataset_options *options;
  int fd; /* read from where it stands to its end; may be a pipe */
  int threads;
  struct mt_tokens_writer *out;
  _Atomic int64_t *done_bytes; /* of the file, as they are written out */
  const atomic_bool *stop;
  /* Results. */
  struct mt_dataset_stats stats;
  int64_t lines;
  struct mt_hash content; /* of all that was read */
};

/* Threads take pieces of about 1 MiB, whole lines, and hand in their blocks in the file's order:
 * the output, and which error is reported, do not depend on their number. Memory: a few pieces a
 * thread, whatever the file's size (but for lines above 1 MiB, 64 MiB at most).
 * Errors: MT_EFORMAT naming FILE:LINE; MT_EIO; MT_ENOMEM; MT_EINTERRUPTED after *stop. */
mt_err mt_tokenise(struct mt_tokenise_job *job);

#endif
