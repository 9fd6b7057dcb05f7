#include "base/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { PIECE_BYTES = 1 << 20 };

static struct mt_hash from_xxh(XXH128_hash_t h) {
  return (struct mt_hash){h.low64, h.high64};
}

struct mt_hash mt_hash_bytes(const void *data, size_t size_bytes) {
  return from_xxh(XXH3_128bits(data, size_bytes));
}

bool mt_hash_equal(struct mt_hash a, struct mt_hash b) {
  return a.low == b.low && a.high == b.high;
}

void mt_hash_text(struct mt_hash h, char out[MT_HASH_TEXT]) {
  snprintf(out, MT_HASH_TEXT, "%016" PRIx64 "%016" PRIx64, h.high, h.low);
}

static mt_err hash_fd(int fd, const char *path, XXH3_state_t *state, void *piece, uint64_t *size) {
  for (;;) {
    ssize_t n = read(fd, piece, PIECE_BYTES);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return mt_fail(MT_EIO, "cannot read '%s': %s", path, strerror(errno));
    if (n == 0) return MT_OK;
    XXH3_128bits_update(state, piece, (size_t)n);
    *size += (uint64_t)n;
  }
}

mt_err mt_hash_file(const char *path, struct mt_hash *out, uint64_t *size_bytes) {
  struct stat st;
  uint64_t size = 0;
  mt_err err = MT_OK;
  XXH3_state_t *state = NULL;
  void *piece = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not keep us waiting */
  if (fd < 0) {
    return mt_fail(errno == ENOENT ? MT_ENOENT : MT_EIO, "cannot open '%s': %s", path,
                   strerror(errno));
  }
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    err = mt_fail(MT_EIO, "'%s' is not a regular file", path);
    goto done;
  }
  state = XXH3_createState();
  piece = malloc(PIECE_BYTES);
  if (!state || !piece) {
    err = mt_fail(MT_ENOMEM, "hash of '%s'", path);
    goto done;
  }
  XXH3_128bits_reset(state);
  MT_GO(hash_fd(fd, path, state, piece, &size));
  *out = from_xxh(XXH3_128bits_digest(state));
  if (size_bytes) *size_bytes = size;
done:
  XXH3_freeState(state);
  free(piece);
  close(fd);
  return err;
}
