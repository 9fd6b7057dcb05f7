/* Sums over the ranks of a group: an exchange of parts, each rank's addition of its part in the
 * order of ranks, and a gathering of the results. It costs the bytes of a ring, and the bits do not
 * depend on what the library below does. */
#ifndef MT_PAR_SUM_H
#define MT_PAR_SUM_H

#include "model/buckets.h"
#include "backend/device.h"
#include "par/comm.h"

/* Room for what other ranks send, in the backend's memory; it grows. */
struct mt_sum {
  struct mt_backend *be;
  void *parts;
  size_t parts_bytes;
  int64_t *numbers; /* host [4][numbers_size] */
  int numbers_size;
};

/* n elements cut for the members of a group, parts of equal size, but that the last ones may be
 * smaller or empty: *parts (=); and where the others' shares of this member's part arrive, one
 * behind the other: *places (=). Both point into numbers, host [4][c->size] (=). */
void mt_sum_places(int64_t *numbers, const struct mt_comm *c, int64_t n, struct mt_parts *parts,
                   struct mt_parts *places);

/* n elements at grad (=, backend's memory) become the sums over the group, in float32 or better,
 * rounded once. This rank has added up [*own, *own + *owned). With one member nothing is done and
 * all is its own. scatter alone leaves the other elements as they were, gather brings them. c
 * carries the backend's memory; its stream sees the results. Errors: MT_ENOMEM, MT_ECOMM. */
mt_err mt_sum_bucket(struct mt_sum *s, struct mt_comm *c, void *grad, enum mt_dtype dtype,
                     int64_t n, int64_t *own, int64_t *owned);
mt_err mt_sum_scatter(struct mt_sum *s, struct mt_comm *c, void *grad, enum mt_dtype dtype,
                      int64_t n, int64_t *own, int64_t *owned);
mt_err mt_sum_gather(struct mt_sum *s, struct mt_comm *c, void *grad, enum mt_dtype dtype,
                     int64_t n);
/* Gathers [from, from + count) of n elements that are cut for the members; the first of them lies
 * at buf. */
mt_err mt_sum_gather_run(struct mt_sum *s, struct mt_comm *c, void *buf, enum mt_dtype dtype,
                         int64_t n, int64_t from, int64_t count);

void mt_sum_free(struct mt_sum *s); /* safe on a zeroed one */

#endif
