#include "data/tokens.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK_ALIGN = 64, BYTE_ORDER_MARK = 0x01020304, MAX_THREADS = 16 };

struct header {
  char magic[8];
  uint32_t version, order;
  struct mt_hash key;
  struct mt_dataset_stats stats;
  uint64_t block_count, directory_at;
  struct mt_hash directory;
  struct mt_hash own; /* of all above */
};

static const char magic[8] = "MTTOKENS";

static mt_err io_error(const char *what, const char *path) {
  return mt_fail(MT_EIO, "cannot %s '%s': %s", what, path, strerror(errno));
}

mt_err mt_tokens_create(struct mt_tokens_writer *w, const char *dir) {
  *w = (struct mt_tokens_writer){.fd = -1, .at = sizeof(struct header)};
  if (!dir) {
    w->fd = memfd_create("moetune-tokens", MFD_CLOEXEC);
    return w->fd < 0 ? io_error("create", "(memory)") : MT_OK;
  }
  if (strlen(dir) >= sizeof w->dir) return mt_fail(MT_EINVAL, "path too long: '%.200s'", dir);
  snprintf(w->dir, sizeof w->dir, "%s", dir);
  w->fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0644);
  if (w->fd >= 0) return MT_OK;
  MT_TRY(mt_path_join(w->temp, dir, "moetune-tokens.tmp-XXXXXX"));
  w->fd = mkostemp(w->temp, O_CLOEXEC);
  if (w->fd >= 0) return MT_OK;
  w->temp[0] = '\0';
  return io_error("create a file in", dir);
}

static mt_err write_at(struct mt_tokens_writer *w, const void *data, size_t size, uint64_t at) {
  const char *p = data;
  while (size > 0) {
    ssize_t n = pwrite(w->fd, p, size, (off_t)at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      w->failed = true;
      return io_error("write tokens to", *w->dir ? w->dir : "(memory)");
    }
    p += n;
    at += (uint64_t)n;
    size -= (size_t)n;
  }
  return MT_OK;
}

mt_err mt_tokens_append(struct mt_tokens_writer *w, struct mt_tokens_record *record, size_t samples,
                        const void *payload, size_t payload_bytes) {
  size_t head = samples * sizeof *record;
  if (samples == 0) return MT_OK;
  if (w->block_count == w->block_capacity) {
    size_t capacity = w->block_capacity * 2 + 64;
    void *grown = realloc(w->block, capacity * sizeof *w->block);
    if (!grown) return mt_fail(MT_ENOMEM, "%zu blocks of tokens", capacity);
    w->block = grown;
    w->block_capacity = capacity;
  }
  for (size_t i = 0; i < samples; i++) record[i].at += head;
  uint64_t at = (w->at + BLOCK_ALIGN - 1) / BLOCK_ALIGN * BLOCK_ALIGN;
  const struct mt_tokens_block *last = w->block_count ? &w->block[w->block_count - 1] : NULL;
  struct mt_hash parts[2] = {mt_hash_bytes(record, head), mt_hash_bytes(payload, payload_bytes)};
  w->block[w->block_count] =
      (struct mt_tokens_block){.at = at,
                               .size_bytes = head + payload_bytes,
                               .first = last ? last->first + last->samples : 0,
                               .samples = samples,
                               .hash = mt_hash_bytes(parts, sizeof parts)};
  MT_TRY(write_at(w, record, head, at));
  MT_TRY(write_at(w, payload, payload_bytes, at + head));
  w->block_count++;
  w->at = at + head + payload_bytes;
  return MT_OK;
}

static mt_err map(struct mt_tokens *t, int fd, const char *path, size_t size) {
  void *p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) return io_error("map", path);
  const struct header *h = p;
  t->data = p;
  t->size_bytes = size;
  t->block = (const struct mt_tokens_block *)(t->data + h->directory_at);
  t->block_count = h->block_count;
  t->stats = h->stats;
  return MT_OK;
}

mt_err mt_tokens_finish(struct mt_tokens_writer *w, struct mt_hash key,
                        const struct mt_dataset_stats *stats, struct mt_tokens *out) {
  struct header h;
  size_t bytes = w->block_count * sizeof *w->block;
  uint64_t at = (w->at + BLOCK_ALIGN - 1) / BLOCK_ALIGN * BLOCK_ALIGN;
  memset(&h, 0, sizeof h); /* padding too: it is hashed */
  memcpy(h.magic, magic, sizeof magic);
  h.version = MT_TOKENS_VERSION;
  h.order = BYTE_ORDER_MARK;
  h.key = key;
  h.stats = *stats;
  h.block_count = w->block_count;
  h.directory_at = at;
  h.directory = mt_hash_bytes(w->block, bytes);
  h.own = mt_hash_bytes(&h, offsetof(struct header, own));
  MT_TRY(write_at(w, w->block, bytes, at));
  MT_TRY(write_at(w, &h, sizeof h, 0));
  return map(out, w->fd, w->dir, at + bytes);
}

mt_err mt_tokens_publish(struct mt_tokens_writer *w, const char *path) {
  if (fsync(w->fd) != 0) return io_error("sync", path);
  if (!*w->temp) {
    static _Atomic unsigned serial;
    char unnamed[64];
    int n = snprintf(w->temp, sizeof w->temp, "%s.tmp-%d-%u", path, (int)getpid(), serial++);
    if (n < 0 || n >= MT_PATH_MAX) {
      w->temp[0] = '\0';
      return mt_fail(MT_EINVAL, "path too long: '%.200s'", path);
    }
    snprintf(unnamed, sizeof unnamed, "/proc/self/fd/%d", w->fd);
    if (linkat(AT_FDCWD, unnamed, AT_FDCWD, w->temp, AT_SYMLINK_FOLLOW) != 0) {
      mt_err err = io_error("create", w->temp);
      w->temp[0] = '\0';
      return err;
    }
  }
  if (rename(w->temp, path) != 0) return io_error("rename to", path);
  w->temp[0] = '\0';
  return mt_path_sync(w->dir);
}

void mt_tokens_release(struct mt_tokens_writer *w) {
  if (w->fd >= 0) close(w->fd);
  if (*w->temp) unlink(w->temp);
  free(w->block);
  *w = (struct mt_tokens_writer){.fd = -1};
}

void mt_tokens_close(struct mt_tokens *t) {
  if (t->data) munmap((void *)(uintptr_t)t->data, t->size_bytes);
  *t = (struct mt_tokens){0};
}

const struct mt_tokens_record *mt_tokens_find(const struct mt_tokens *t, int64_t sample,
                                              const uint8_t **block) {
  size_t low = 0, high = t->block_count;
  while (high - low > 1) {
    size_t middle = low + (high - low) / 2;
    if (t->block[middle].first <= (uint64_t)sample)
      low = middle;
    else
      high = middle;
  }
  const struct mt_tokens_block *b = &t->block[low];
  *block = t->data + b->at;
  return (const struct mt_tokens_record *)*block + ((uint64_t)sample - b->first);
}

/* A file that is checked by several threads, block by block. Blocks are read, not mapped, so that
 * a large file does not fill the process's memory. */
struct check {
  int fd;
  int32_t vocab;
  const struct mt_tokens_block *block;
  size_t block_count;
  atomic_size_t next;
  atomic_bool damaged;
};

static bool read_at(int fd, void *data, size_t size, uint64_t at) {
  char *p = data;
  while (size > 0) {
    ssize_t n = pread(fd, p, size, (off_t)at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    p += n;
    at += (uint64_t)n;
    size -= (size_t)n;
  }
  return true;
}

/* Is the block what was written, and would reading its samples stay inside it? */
static bool sound(const struct check *c, const struct mt_tokens_block *b, const uint8_t *data) {
  size_t head = b->samples * sizeof(struct mt_tokens_record);
  struct mt_hash parts[2] = {mt_hash_bytes(data, head),
                             mt_hash_bytes(data + head, b->size_bytes - head)};
  if (!mt_hash_equal(mt_hash_bytes(parts, sizeof parts), b->hash)) return false;
  for (size_t i = 0; i < b->samples; i++) {
    const struct mt_tokens_record *r = (const struct mt_tokens_record *)data + i;
    if (r->count < 1 || r->at < head || r->at > b->size_bytes || r->at % sizeof(int32_t) ||
        (uint64_t)r->count * 5 > b->size_bytes - r->at) {
      return false;
    }
    const int32_t *id = (const int32_t *)(data + r->at);
    uint32_t most = 0;
    for (int32_t k = 0; k < r->count; k++) most = (uint32_t)id[k] > most ? (uint32_t)id[k] : most;
    if (most >= (uint32_t)c->vocab) return false;
  }
  return true;
}

static void *check_blocks(void *arg) {
  struct check *c = arg;
  uint8_t *buffer = NULL;
  size_t capacity = 0;
  for (size_t i; !c->damaged && (i = c->next++) < c->block_count;) {
    const struct mt_tokens_block *b = &c->block[i];
    if (b->size_bytes > capacity) {
      free(buffer);
      capacity = b->size_bytes;
      buffer = malloc(capacity);
    }
    if (!buffer || !read_at(c->fd, buffer, b->size_bytes, b->at) || !sound(c, b, buffer)) {
      c->damaged = true;
    }
  }
  free(buffer);
  return NULL;
}

static bool check_all(struct check *c, int threads) {
  pthread_t thread[MAX_THREADS];
  int started = 0, most = threads < MAX_THREADS ? threads : MAX_THREADS;
  while (started < most - 1 && (size_t)started + 1 < c->block_count &&
         pthread_create(&thread[started], NULL, check_blocks, c) == 0) {
    started++;
  }
  check_blocks(c);
  for (int i = 0; i < started; i++) pthread_join(thread[i], NULL);
  return !c->damaged;
}

/* The directory (freed by the caller) of a file whose header is sound; NULL when it is not. */
static struct mt_tokens_block *read_directory(int fd, const struct header *h, uint64_t file_bytes) {
  const size_t item = sizeof(struct mt_tokens_block);
  if (h->directory_at > file_bytes || h->directory_at % BLOCK_ALIGN ||
      h->block_count != (file_bytes - h->directory_at) / item ||
      (file_bytes - h->directory_at) % item) {
    return NULL;
  }
  struct mt_tokens_block *b = malloc(h->block_count * item + 1);
  if (!b) return NULL;
  bool good = read_at(fd, b, h->block_count * item, h->directory_at) &&
              mt_hash_equal(mt_hash_bytes(b, h->block_count * item), h->directory);
  uint64_t first = 0;
  for (uint64_t i = 0; good && i < h->block_count; i++) {
    good = b[i].at % BLOCK_ALIGN == 0 && b[i].at <= h->directory_at &&
           b[i].size_bytes <= h->directory_at - b[i].at && b[i].first == first &&
           b[i].samples > 0 && b[i].samples <= b[i].size_bytes / sizeof(struct mt_tokens_record);
    first += b[i].samples;
  }
  if (good && first == (uint64_t)h->stats.samples && first > 0) return b;
  free(b);
  return NULL;
}

mt_err mt_tokens_open(struct mt_tokens *t, const char *path, struct mt_hash key, int32_t vocab,
                      int threads) {
  struct header h;
  struct stat st;
  struct mt_tokens_block *block = NULL;
  mt_err err;
  *t = (struct mt_tokens){0};
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return errno == ENOENT ? mt_fail(MT_ENOENT, "no '%s'", path) : io_error("open", path);
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    err = mt_fail(MT_EFORMAT, "'%s' is not a regular file", path);
    goto done;
  }
  bool good = read_at(fd, &h, sizeof h, 0) && memcmp(h.magic, magic, sizeof magic) == 0 &&
              h.version == MT_TOKENS_VERSION && h.order == BYTE_ORDER_MARK &&
              mt_hash_equal(h.own, mt_hash_bytes(&h, offsetof(struct header, own))) &&
              mt_hash_equal(h.key, key);
  if (good) block = read_directory(fd, &h, (uint64_t)st.st_size);
  if (!block) {
    err = mt_fail(MT_EFORMAT, "'%s' is damaged", path);
    goto done;
  }
  struct check c = {.fd = fd, .vocab = vocab, .block = block, .block_count = h.block_count};
  if (!check_all(&c, threads)) {
    err = mt_fail(MT_EFORMAT, "'%s' is damaged", path);
    goto done;
  }
  err = map(t, fd, path, (size_t)st.st_size);
done:
  free(block);
  close(fd);
  return err;
}
