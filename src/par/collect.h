/* What of a parameter lies on other ranks, brought to rank 0 piece by piece, for files. */
#ifndef MT_PAR_COLLECT_H
#define MT_PAR_COLLECT_H

#include "par/ranks.h"

/* The forms of a parameter that files keep: X(form, field). */
#define MT_FORM_LIST(X) X(COMPUTE, compute) X(MASTER, master) X(M, m) X(V, v)
enum mt_form {
#define X(form, field) MT_FORM_##form,
  MT_FORM_LIST(X)
#undef X
      MT_FORM_COUNT
};

/* The form of a parameter; no data where it is not kept whole here. */
struct mt_tensor mt_param_form(const struct mt_param *p, enum mt_form form);
/* With sharded state, what is kept of a form instead: elements of the rank's share of the class
 * (mt_buckets_run). */
struct mt_tensor mt_model_share(const struct mt_model *m, enum mt_sync sync, enum mt_form form);

/* Elements [begin, begin + count) of the whole parameter's form, whoever holds them: on rank 0
 * out (=) has them; on others it is scratch of that size. `whole` is a row of the whole model's
 * table. Every rank calls it, with the same arguments; who holds nothing of it returns at once.
 * r->whole is set. Errors: MT_ECOMM, MT_ENOMEM. */
mt_err mt_ranks_collect(struct mt_ranks *r, const struct mt_param *whole, enum mt_form form,
                        int64_t begin, int64_t count, void *out);

#endif
