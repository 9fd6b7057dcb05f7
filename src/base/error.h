/* Errors are values: every fallible function returns mt_err, 0 is success everywhere, and only
 * cli/ turns one into an exit status. The list of them is public (moetune/error.h).
 *
 * The message that explains an error (naming the file, key, shape or rank at fault) is kept per
 * thread, as errno is: passing a message buffer through every call would put one more argument on
 * some three hundred functions. A thread that hands its error to another copies the text over
 * (mt_error_message there, mt_fail here). */
#ifndef MT_BASE_ERROR_H
#define MT_BASE_ERROR_H

#include "moetune/error.h"

#define MT_TRY(call)                                                                               \
  do {                                                                                             \
    mt_err mt_try_err_ = (call);                                                                   \
    if (mt_try_err_) return mt_try_err_;                                                           \
  } while (0)

/* As MT_TRY, for functions with one exit: sets `err` and jumps to `done`. */
#define MT_GO(call)                                                                                \
  do {                                                                                             \
    err = (call);                                                                                  \
    if (err) goto done;                                                                            \
  } while (0)

/* Sets this thread's message (printf-style, truncated at 1 KiB) and returns err. */
mt_err mt_fail(mt_err err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Prepends "context: " to this thread's message and returns err; does nothing when err is MT_OK.
 * Used where a caller knows what the callee does not (which file, which layer). */
mt_err mt_context(mt_err err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
