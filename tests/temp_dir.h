/* A directory of its own for a test, and files in it. */
#ifndef TESTS_TEMP_DIR_H
#define TESTS_TEMP_DIR_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/files.h"
#include "ok.h"

/* The call fails with this error and its message holds this text. */
#define FAILS(call, error, text)                                                                   \
  do {                                                                                             \
    mt_err fails_err_ = (call);                                                                    \
    if (fails_err_ != (error)) {                                                                   \
      fail_msg("%s gave '%s' (%s), expected '%s'", #call, mt_err_name(fails_err_),                 \
               mt_error_message(), mt_err_name(error));                                            \
    }                                                                                              \
    if (!strstr(mt_error_message(), text)) {                                                       \
      fail_msg("%s: message '%s' does not name '%s'", #call, mt_error_message(), text);            \
    }                                                                                              \
  } while (0)

static inline void temp_dir(char out[MT_PATH_MAX]) {
  const char *root = getenv("TMPDIR");
  snprintf(out, MT_PATH_MAX, "%s/moetune-test-XXXXXX", root ? root : "/tmp");
  assert_non_null(mkdtemp(out));
}

static inline void temp_file(const char *dir, const char *name, const void *data, size_t size) {
  char path[MT_PATH_MAX];
  OK(mt_path_join(path, dir, name));
  OK(mt_file_write_atomic(path, data, size));
}

static inline void temp_text(const char *dir, const char *name, const char *text) {
  temp_file(dir, name, text, strlen(text));
}

static inline void temp_copy(const char *from_dir, const char *name, const char *to_dir) {
  char from[MT_PATH_MAX], to[MT_PATH_MAX];
  OK(mt_path_join(from, from_dir, name));
  OK(mt_path_join(to, to_dir, name));
  OK(mt_file_copy(from, to));
}

#endif
