/* A tokenised data set as a file: written as a stream of blocks by one thread at a time, then
 * mapped. The same file is the cache that a later run finds.
 *
 *   header | block ... | directory        all little-endian, blocks at multiples of 64 bytes
 *
 * A block: its samples' records, then each sample's ids (int32) and which of them are learned (one
 * byte each), padded to 4. The directory says where blocks lie and gives the XXH3-128 of each; the
 * header, written last, gives the directory's and its own. Files of another byte order, version or
 * key are as good as none; a file that does not check out is damaged. */
#ifndef MT_DATA_TOKENS_H
#define MT_DATA_TOKENS_H

#include "base/files.h"
#include "base/hash.h"
#include "data/dataset.h"

/* Part of every key. Raise it with the format, and whenever the same record may give other ids or
 * another mask: what was kept is then no longer found. */
enum { MT_TOKENS_VERSION = 1 };

struct mt_tokens_record {
  uint64_t at;          /* of the ids, from the block's beginning */
  int64_t line;         /* in the data file, from 1 */
  int32_t count, whole; /* tokens kept, and before the sample was cut */
};

struct mt_tokens_block {
  uint64_t at, size_bytes; /* in the file */
  uint64_t first, samples;
  struct mt_hash hash;
};

struct mt_tokens {
  const uint8_t *data; /* the mapping */
  size_t size_bytes;
  const struct mt_tokens_block *block; /* in the mapping */
  size_t block_count;
  struct mt_dataset_stats stats;
};

struct mt_tokens_writer {
  int fd;                                   /* -1: closed */
  bool failed;                              /* a write failed: another place may do */
  char dir[MT_PATH_MAX], temp[MT_PATH_MAX]; /* temp "": the file has no name yet */
  uint64_t at;
  struct mt_tokens_block *block;
  size_t block_count, block_capacity;
};

/* A file without a name in dir (under a temporary one where the file system cannot do that); dir
 * NULL: in memory. Errors: MT_EIO. */
mt_err mt_tokens_create(struct mt_tokens_writer *w, const char *dir);
/* One block: records, whose `at` counts from the payload's beginning (and is changed), and the
 * payload. Errors: MT_EIO (w->failed), MT_ENOMEM. */
mt_err mt_tokens_append(struct mt_tokens_writer *w, struct mt_tokens_record *record, size_t samples,
                        const void *payload, size_t payload_bytes);
/* Directory and header; the file is then mapped into out. */
mt_err mt_tokens_finish(struct mt_tokens_writer *w, struct mt_hash key,
                        const struct mt_dataset_stats *stats, struct mt_tokens *out);
/* Gives the finished file its name, over whatever has it, synced before. */
mt_err mt_tokens_publish(struct mt_tokens_writer *w, const char *path);
/* Closes; a file that was not published is gone once nobody maps it. */
void mt_tokens_release(struct mt_tokens_writer *w);

/* Maps a published file after checking every byte of it, on `threads` threads.
 * Errors: MT_ENOENT; MT_EFORMAT saying what is damaged; MT_EIO. */
mt_err mt_tokens_open(struct mt_tokens *t, const char *path, struct mt_hash key, int32_t vocab,
                      int threads);
void mt_tokens_close(struct mt_tokens *t);

const struct mt_tokens_record *mt_tokens_find(const struct mt_tokens *t, int64_t sample,
                                              const uint8_t **block);

#endif
