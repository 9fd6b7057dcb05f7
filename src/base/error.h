/* Errors are values: every fallible function returns mt_err, 0 is success everywhere, and only
 * cli/ turns one into an exit status.
 *
 * The message that explains an error (naming the file, key, shape or rank at fault) is kept per
 * thread, as errno is: passing a message buffer through every call would put one more argument on
 * some three hundred functions. A thread that hands its error to another copies the text over
 * (mt_error_message there, mt_fail here). */
#ifndef MT_BASE_ERROR_H
#define MT_BASE_ERROR_H

#define MT_ERR_LIST(X)                                                                             \
  X(OK, "success")                                                                                 \
  X(EINVAL, "invalid argument")                                                                    \
  X(ENOMEM, "out of memory")                                                                       \
  X(EIO, "input/output error")                                                                     \
  X(ENOENT, "not found")                                                                           \
  X(EFORMAT, "malformed data")                                                                     \
  X(ESHAPE, "shape mismatch")                                                                      \
  X(EUNSUPPORTED, "not supported")                                                                 \
  X(ENUMERIC, "NaN or infinity")                                                                   \
  X(EINTERRUPTED, "interrupted")                                                                   \
  X(EEND, "end of data")                                                                           \
  X(EDEVICE, "device error")                                                                       \
  X(ECOMM, "communication error")

typedef enum mt_err {
#define X(name, text) MT_##name,
  MT_ERR_LIST(X)
#undef X
      MT_ERR_COUNT
} mt_err;

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

/* Static English name of an error; never NULL, also for values out of range. */
const char *mt_err_name(mt_err err);

/* Sets this thread's message (printf-style, truncated at 1 KiB) and returns err. */
mt_err mt_fail(mt_err err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Prepends "context: " to this thread's message and returns err; does nothing when err is MT_OK.
 * Used where a caller knows what the callee does not (which file, which layer). */
mt_err mt_context(mt_err err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* This thread's last message; "" when none. Valid until the thread's next mt_fail/mt_context. */
const char *mt_error_message(void);

#endif
