/* What all tests share. OK(call): a test fails where a call does, with its message. Who wants more
 * in it (tests/dist: the rank) defines another before this is included. */
#ifndef TESTS_OK_H
#define TESTS_OK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/error.h"

/* A build whose cases look at memory and undefined behaviour, several times as slowly: where they
 * would run long for numbers, statistics or the clock, they do so without a sanitizer alone, and
 * say it. */
#if defined(__SANITIZE_ADDRESS__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

#ifndef OK
#define OK(call)                                                                                   \
  do {                                                                                             \
    mt_err ok_err_ = (call);                                                                       \
    if (ok_err_) fail_msg("%s: %s", #call, mt_error_message());                                    \
  } while (0)
#endif

#endif
