/* Errors of moetune's C API: every function that can fail returns mt_err, 0 is success everywhere,
 * and nothing in the library prints, exits or aborts in its stead. */
#ifndef MOETUNE_ERROR_H
#define MOETUNE_ERROR_H

/* What the libraries export. */
#ifndef MT_API
#define MT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, text): MT_name in enum mt_err, `text` from mt_err_name. */
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
#define MT_ERR_ENUM(name, text) MT_##name,
  MT_ERR_LIST(MT_ERR_ENUM)
#undef MT_ERR_ENUM
      MT_ERR_COUNT
} mt_err;

/* Static English name of an error; never NULL, also for values out of range. */
MT_API const char *mt_err_name(mt_err err);

/* What the calling thread's last failed call has to say, naming the file, key, tensor or shape at
 * fault; "" before the first. Kept per thread, as errno is: another thread does not see it. Valid
 * until the thread's next failure. */
MT_API const char *mt_error_message(void);

#ifdef __cplusplus
}
#endif

#endif
