/* Checksums and content hashes: XXH3 of 128 bits (https://xxhash.com). They find damage and tell
 * contents apart; they are no protection against somebody who means to deceive. */
#ifndef MT_BASE_HASH_H
#define MT_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct mt_hash {
  uint64_t low, high;
};

enum { MT_HASH_TEXT = 33 }; /* 32 hexadecimal digits, as xxhsum -H2 prints them, and the end */

struct mt_hash mt_hash_bytes(const void *data, size_t size_bytes);
bool mt_hash_equal(struct mt_hash a, struct mt_hash b);
void mt_hash_text(struct mt_hash h, char out[MT_HASH_TEXT]);

/* The hash (=) of a regular file's contents and its size (=, may be NULL), read in pieces.
 * Errors: MT_ENOENT, MT_EIO naming the path (also for what is no regular file), MT_ENOMEM. */
mt_err mt_hash_file(const char *path, struct mt_hash *out, uint64_t *size_bytes);

#endif
