#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024 };
static _Thread_local char message[MESSAGE_BYTES];

const char *mt_err_name(mt_err err) {
  static const char *const names[] = {
#define X(name, text) text,
      MT_ERR_LIST(X)
#undef X
  };
  return (unsigned)err < MT_ERR_COUNT ? names[err] : "unknown error";
}

mt_err mt_fail(mt_err err, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  /* Formatted aside: an argument may be the old message itself. */
  char fresh[MESSAGE_BYTES];
  vsnprintf(fresh, sizeof fresh, fmt, ap);
  va_end(ap);
  memcpy(message, fresh, sizeof message);
  return err;
}

mt_err mt_context(mt_err err, const char *fmt, ...) {
  if (!err) return err;
  va_list ap;
  va_start(ap, fmt);
  char fresh[MESSAGE_BYTES];
  int n = vsnprintf(fresh, sizeof fresh, fmt, ap);
  va_end(ap);
  size_t used = n < 0 ? 0 : (size_t)n < sizeof fresh ? (size_t)n : sizeof fresh - 1;
  const char *parts[] = {": ", message};
  for (int i = 0; i < 2; i++) {
    size_t room = sizeof fresh - 1 - used, take = strlen(parts[i]);
    if (take > room) take = room;
    memcpy(fresh + used, parts[i], take);
    used += take;
  }
  fresh[used] = '\0';
  memcpy(message, fresh, sizeof message);
  return err;
}

const char *mt_error_message(void) {
  return message;
}
