/* What every backend checks before it runs an operation: shapes, formats and leading dimensions
 * agree. MT_ESHAPE names the operation, the argument and both shapes. Values on the device
 * (offsets, ids) are not looked at. */
#ifndef MT_BACKEND_CHECK_H
#define MT_BACKEND_CHECK_H

#include "backend/ops.h"

#define X(op) mt_err mt_check_##op(const struct mt_##op##_args *a);
MT_OP_LIST(X)
#undef X

#endif
