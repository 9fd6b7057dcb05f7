/* A directory in memory that a fuzzer puts its input's files into. */
#ifndef MT_TESTS_FUZZ_FILES_H
#define MT_TESTS_FUZZ_FILES_H

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/files.h"
#include "base/log.h"

static char fuzz_dir[64];

static inline void fuzz_gone(void) {
  (void)mt_dir_remove(fuzz_dir);
}

static inline const char *fuzz_path(const char *name) {
  static char path[MT_PATH_MAX];
  if (!*fuzz_dir) {
    const char *root = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(fuzz_dir, sizeof fuzz_dir, "%s/moetune-fuzz-XXXXXX", root);
    if (!mkdtemp(fuzz_dir)) abort();
    atexit(fuzz_gone);
    mt_log_set_level(MT_LOG_ERROR);
  }
  snprintf(path, sizeof path, "%s/%s", fuzz_dir, name);
  return path;
}

static inline const char *fuzz_file(const char *name, const void *data, size_t size) {
  const char *path = fuzz_path(name);
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
  close(fd);
  return path;
}

/* The input up to its next 0 byte, and what is behind it. */
static inline size_t fuzz_part(const uint8_t **data, size_t *size, const uint8_t **part) {
  const uint8_t *end = *size ? memchr(*data, 0, *size) : NULL;
  size_t n = end ? (size_t)(end - *data) : *size, used = end ? n + 1 : n;
  *part = *data;
  if (used) *data += used;
  *size -= used;
  return n;
}

#endif
