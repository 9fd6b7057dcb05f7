/* A data file (JSON lines) as tokens, and the batches made of it. */
#ifndef MT_DATA_DATASET_H
#define MT_DATA_DATASET_H

#include "backend/batch.h"
#include "data/template.h"

struct mt_dataset_options {
  const char *path;
  const struct mt_template *chat;
  int max_seq_length; /* tokens; a longer sample is cut */
  int32_t eos_id;
  bool train_on_prompt; /* every token is a target */
  bool skip_bad_lines;
  int threads; /* that tokenise; 0: one a core */
  const char
      *cache_dir; /* where tokens are kept for the next time, made if need be; NULL: nowhere */
};

struct mt_dataset_stats {
  int64_t samples, tokens, targets;
  int64_t truncated;   /* samples cut at max_seq_length */
  int64_t dropped;     /* samples left without a target */
  int64_t dropped_cut; /* of them those whose targets lay behind the cut */
  int64_t bad_lines, first_bad_line;
  int64_t longest; /* tokens, before cutting */
};

struct mt_dataset; /* read-only once waited for */

/* Starts reading and tokenising in a thread of its own, which has others help it. The file: one
 * JSON object a line (UTF-8, no key twice, 64 MiB at most), lines end in LF or CRLF, blank ones are
 * passed over, and so is a byte order mark; template.h says what an object may hold. The result
 * does not depend on the number of threads. The tokenizer must outlive the dataset.
 *
 * Tokens go into a file that is mapped, never into the process's memory, whatever the data's size:
 * one in cache_dir, found again by a hash of the data's content, the tokenizer, the template and
 * these options, and checked in every byte before it is used; without cache_dir (or where it
 * cannot be written) a nameless one in $TMPDIR or /tmp. A pipe is never cached. */
mt_err mt_dataset_open(const struct mt_tokenizer *tokenizer,
                       const struct mt_dataset_options *options, struct mt_dataset **out);
/* Waits for the thread. Errors: what went wrong there: MT_ENOENT, MT_EFORMAT naming FILE:LINE (a
 * malformed line, unless skip_bad_lines), or no usable sample in the file. */
mt_err mt_dataset_wait(struct mt_dataset *d);
/* Waits at most this long; false when there is more to do. *share (=): of the work, 0..1, -1 where
 * it is not known (a pipe). */
bool mt_dataset_wait_ms(struct mt_dataset *d, int ms, double *share);
/* Also gives up what is not yet done. */
void mt_dataset_close(struct mt_dataset *d);
struct mt_dataset_stats mt_dataset_stats(const struct mt_dataset *d);

/* How the tokens came to be. */
struct mt_dataset_origin {
  bool cached;       /* found, not made */
  const char *cache; /* the file that holds them; NULL: none that will stay */
  double seconds;    /* finding or making them */
  int64_t bytes;     /* of the data file that were tokenised */
};
struct mt_dataset_origin mt_dataset_origin(const struct mt_dataset *d);

/* $XDG_CACHE_HOME/moetune, else $HOME/.cache/moetune; "" when neither is set. */
void mt_dataset_cache_dir(char *out, size_t size_bytes);

/* Sample i: its tokens, which of them are targets, the line it came from. */
struct mt_sample {
  const int32_t *ids;
  const uint8_t *learn;
  int count;
  int64_t line;
};
struct mt_sample mt_dataset_sample(const struct mt_dataset *d, int64_t i);
/* Its tokens before it was cut. */
int mt_dataset_whole(const struct mt_dataset *d, int64_t i);

/* Room for a packed row. Errors: MT_ENOMEM. */
mt_err mt_batch_create(struct mt_batch *b, int token_capacity, int sequence_capacity);
void mt_batch_destroy(struct mt_batch *b);
/* Empties b, then packs: labels shifted, positions from 0 in each sample, a sample's first token no
 * target. Errors: MT_ESHAPE when there is no room. */
void mt_batch_begin(struct mt_batch *b);
mt_err mt_batch_add(struct mt_batch *b, const struct mt_sample *s);
/* To the next multiple within the capacity. */
void mt_batch_finish(struct mt_batch *b, int pad_multiple);
/* A batch without a sample becomes so many tokens of padding: operations want some. */
void mt_batch_pad(struct mt_batch *b, int pad_multiple);

struct mt_loader_options {
  int batch_size;    /* samples a micro-batch */
  int micro_batches; /* a step (gradient accumulation) */
  int max_seq_length, pad_multiple;
  int lengths; /* padded lengths of a row are to be at most so many; 0: any */
  uint64_t seed;
  int rank, world; /* that read data: this rank takes every world-th sample */
  bool shuffle;    /* anew each epoch, by (seed, epoch) alone */
};

/* Where the next sample of rank 0 comes from, those of the others right behind it: all the state a
 * resumed run needs, on any number of ranks. */
struct mt_position {
  int64_t epoch, index;
};

enum { MT_LENGTHS = 16 };

/* The padded lengths are chosen when the loader is made, by the data and the options alone: those
 * that add the fewest padding tokens to the first thousands of rows. A row longer than all of them,
 * which is rare, is padded to the multiple. */
struct mt_loader {
  struct mt_loader_options options;
  int length[MT_LENGTHS]; /* ascending */
  int length_count;
  const struct mt_dataset *data;
  struct mt_position next;
  uint32_t *order; /* of the epoch `order_epoch` */
  int64_t order_epoch;
  struct mt_batch *batch; /* [micro_batches] */
  struct mt_batch **list;
};

/* Errors: MT_ENOMEM; MT_EINVAL for counts out of range or when there are fewer samples than ranks.
 */
mt_err mt_loader_create(struct mt_loader *l, const struct mt_dataset *d,
                        const struct mt_loader_options *options);
void mt_loader_destroy(struct mt_loader *l);
/* Fills the step's micro-batches: l->list[0..micro_batches). A step that an epoch's end cuts short
 * goes on with the next epoch's beginning, so every step is full. The samples of a step (of its
 * micro-batches on all ranks) depend on their number alone. Allocates nothing. */
mt_err mt_loader_next(struct mt_loader *l);
/* One batch in file order; MT_EEND behind the last (the last may be short). For evaluation: all
 * ranks get as many, some of which may be padding alone. */
mt_err mt_loader_next_once(struct mt_loader *l, struct mt_batch **out);
/* Steps in one epoch, rounded up. */
int64_t mt_loader_steps_per_epoch(const struct mt_loader *l);
/* Tokens that a batch of these options can hold. */
int mt_loader_token_capacity(const struct mt_loader_options *o);

#endif
