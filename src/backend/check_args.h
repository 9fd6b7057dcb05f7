/* What the checks of arguments (check.h) are made of; for check.c and check_quant.c alone. */
#ifndef MT_BACKEND_CHECK_ARGS_H
#define MT_BACKEND_CHECK_ARGS_H

#include "backend/check.h"

enum mt_presence { REQUIRED, OPTIONAL };
enum { ANY_ROWS = -1 };

/* One argument against what it must be; dtype MT_DTYPE_COUNT: any of F32, BF16, F64. Errors:
 * MT_ESHAPE naming operation, argument and both shapes. */
mt_err mt_check_tensor(const char *op, const char *arg, const struct mt_tensor *t,
                       enum mt_presence need, enum mt_dtype dtype, int rank, int64_t d0, int64_t d1,
                       int64_t d2);
mt_err mt_check_present(const char *op, const char *arg, const void *p);

/* The statistics' format that goes with an activation format. */
static inline enum mt_dtype stat_of(const struct mt_tensor *act) {
  return act->dtype == MT_F64 ? MT_F64 : MT_F32;
}

/* Of the operation `op` with arguments `a`. */
#define V1(arg, need, dtype, n) MT_TRY(mt_check_tensor(op, #arg, &a->arg, need, dtype, 1, n, 1, 1))
#define M2(arg, need, dtype, n, m)                                                                 \
  MT_TRY(mt_check_tensor(op, #arg, &a->arg, need, dtype, 2, n, m, 1))
#define PTR(arg) MT_TRY(mt_check_present(op, #arg, a->arg))

#endif
