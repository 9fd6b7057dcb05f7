/* Times every operation of a backend: its table of functions is replaced by one that marks the
 * backend's clock before and after each call. */
#ifndef MT_TRAIN_PROFILE_H
#define MT_TRAIN_PROFILE_H

#include <stdbool.h>

#include "backend/device.h"

enum {
  MT_PROFILE_OPS = 0
#define X(op) +1
  MT_OP_LIST(X)
#undef X
};

struct mt_profile_row {
  double seconds, flops, bytes; /* sums; bytes: each operand once */
  int64_t calls;
};

/* What a call does: FLOPs of its products, bytes of its operands, each once. */
struct mt_work {
  double flops, bytes;
};

struct mt_profile {
  struct mt_backend *be;
  struct mt_ops inner;
  double sequence_length; /* of every sample, for attention's FLOPs */
  /* Of operations that are counted and not run. */
  double (*seconds)(const void *context, int op, struct mt_work work);
  const void *context;
  struct mt_profile_row row[MT_PROFILE_OPS];
  signed char pending[MT_STAMPS / 4]; /* operation of each pair of marks not yet read */
  int pending_count;
};

/* From now on be's operations are timed. One profile a backend at a time; p stays where it is. */
void mt_profile_begin(struct mt_profile *p, struct mt_backend *be, double sequence_length);
/* Reads what is pending and gives be its own operations back. */
mt_err mt_profile_end(struct mt_profile *p);

/* Fills be's table with operations that run nothing and touch no memory: each call is counted in
 * p's rows with the work it would do, and takes what `seconds` says (op: as in mt_op_name). */
void mt_profile_count(struct mt_profile *p, struct mt_backend *be, double sequence_length,
                      double (*seconds)(const void *context, int op, struct mt_work work),
                      const void *context);

/* What the machine can do, measured: FLOP a second of a large product, bytes a second of a copy. */
struct mt_ceilings {
  double flops_per_s, bytes_per_s;
};

/* One line an operation that was called, over `steps` steps: ms a step, calls a step, rate (FLOP/s
 * where the products are its floor, else bytes/s), share of all, time over the floor. json: members
 * of an object instead, without its braces. */
void mt_profile_print(const struct mt_profile *p, int steps, struct mt_ceilings c, bool json);

#endif
