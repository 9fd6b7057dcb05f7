#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static enum mt_log_level threshold = MT_LOG_INFO;

void mt_log_set_level(enum mt_log_level level) {
  threshold = level;
}

enum mt_log_level mt_log_get_level(void) {
  return threshold;
}

void mt_log(enum mt_log_level level, const char *fmt, ...) {
  static const char *const prefix[] = {"error: ", "warning: ", "", "debug: "};
  if (level > threshold) return;
  va_list ap;
  va_start(ap, fmt);
  flockfile(stderr);
  fputs(prefix[level], stderr);
  vfprintf(stderr, fmt, ap);
  fputc('\n', stderr);
  funlockfile(stderr);
  va_end(ap);
}
