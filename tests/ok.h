/* OK(call): a test fails where a call does, with its message. Who wants more in it (tests/dist: the
 * rank) defines another before this is included. */
#ifndef TESTS_OK_H
#define TESTS_OK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/error.h"

#ifndef OK
#define OK(call)                                                                                   \
  do {                                                                                             \
    mt_err ok_err_ = (call);                                                                       \
    if (ok_err_) fail_msg("%s: %s", #call, mt_error_message());                                    \
  } while (0)
#endif

#endif
