/* Communicators: what a group of ranks does together. A table of functions, so that one rank
 * (self), MPI, NCCL and a substitute for tests run the same code above.
 *
 * There is no reduction in it: sums over ranks are made of an exchange of parts and a sum in the
 * order of ranks (par/sum.h), which costs the bytes of a ring, gives the same bits every time
 * whatever the library below would do, and adds in float32 what travels in bf16.
 *
 * Calls are collective: every member makes the same ones in the same order. `start` returns at
 * once; between it and `wait` the buffers belong to the communicator. After wait, what is launched
 * on the backend sees the result: on a host the transfer is over then, on a GPU the stream waits,
 * not the host.
 *
 * Errors: MT_ECOMM naming rank, group and call, also when a peer does not come within the time-out
 * (MT_EDEVICE, MT_ENOMEM: what a GPU or this host could not give); the communicator is of no use
 * afterwards and the process must end (mt_world_abort). */
#ifndef MT_PAR_COMM_H
#define MT_PAR_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* What is counted. */
enum mt_comm_kind {
  MT_COMM_ALL_TO_ALL,
  MT_COMM_ALL_GATHER,
  MT_COMM_BROADCAST,
  MT_COMM_SEND,
  MT_COMM_KINDS
};

/* Where a message's parts lie, in units of unit_bytes: part p of a buffer is units
 * [start[p], start[p] + count[p]). Host arrays of one entry a member, free again on return. */
struct mt_parts {
  const int64_t *count, *start;
};

struct mt_transfer {
  void *impl; /* the communicator's; NULL: nothing under way */
  const char *what;
};

struct mt_comm {
  const char *name; /* of the group, for messages */
  int rank, size;
  double timeout_s;
  struct {
    int64_t calls, bytes; /* that left this rank for another one */
  } sent[MT_COMM_KINDS];
  /* Part p of send goes to member p, where it arrives as part `rank` of recv (own parts too). */
  mt_err (*all_to_all)(struct mt_comm *c, const void *send, struct mt_parts parts, void *recv,
                       struct mt_parts places, size_t unit_bytes, struct mt_transfer *t);
  /* Member p's own part p of buf goes to everyone. */
  mt_err (*all_gather)(struct mt_comm *c, void *buf, struct mt_parts parts, size_t unit_bytes,
                       struct mt_transfer *t);
  mt_err (*broadcast)(struct mt_comm *c, void *buf, size_t size_bytes, int root,
                      struct mt_transfer *t);
  /* One message between two members; those of a pair keep their order. */
  mt_err (*send)(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                 struct mt_transfer *t);
  mt_err (*recv)(struct mt_comm *c, void *buf, size_t size_bytes, int from, struct mt_transfer *t);
  mt_err (*barrier)(struct mt_comm *c, struct mt_transfer *t);
  mt_err (*wait)(struct mt_comm *c, struct mt_transfer *t);
  mt_err (*test)(struct mt_comm *c, struct mt_transfer *t, bool *done); /* or NULL */
  mt_err (*set_out)(struct mt_comm *c); /* or NULL: messages set out when they are started */
  mt_err (*failed)(struct mt_comm *c);  /* or NULL: wait has told */
  mt_err (*settle)(struct mt_comm *c, double limit_s, bool *over); /* or NULL: nothing to settle */
  mt_err (*join)(struct mt_comm *c);                               /* or NULL: see mt_comm_join */
  void (*destroy)(struct mt_comm *c);
  void *stream; /* what transfers run on, in the order of the calls (CUDA: cudaStream_t), or NULL */
  void *impl;
};

/* A group of this rank alone. */
struct mt_comm mt_comm_self(const char *name);
void mt_comm_destroy(struct mt_comm *c); /* safe on a zeroed one */
/* What has gone wrong since with transfers that have been waited for: MT_ECOMM. Once the work that
 * used them is done and this says MT_OK, they have arrived. */
mt_err mt_comm_failed(struct mt_comm *c);

/* What is launched on the backend from here on comes behind all that c's stream has been given so
 * far, transfers and (mt_backend.on_stream) operations. Nothing to do where c has none. */
mt_err mt_comm_join(struct mt_comm *c);

/* For who ends, with transfers under way perhaps: once it returns, no buffer of theirs is touched
 * any more, since they are over, or have been given up after limit_s. *over (=) says which; false
 * also where the communicator itself would have waited longer for others to end it with this rank
 * (NCCL), which is of no use afterwards but to be destroyed. Errors: MT_ECOMM where a transfer is
 * not over and cannot be given up (MPI's); its buffers must be let be until the process ends. */
mt_err mt_comm_settle(struct mt_comm *c, double limit_s, bool *over);

/* The calls, counted; what a group of one would send around does not reach the table. Host buffers
 * for self and MPI. Each waits unless t is given. */
mt_err mt_comm_all_to_all(struct mt_comm *c, const void *send, struct mt_parts parts, void *recv,
                          struct mt_parts places, size_t unit_bytes, struct mt_transfer *t);
mt_err mt_comm_all_gather(struct mt_comm *c, void *buf, struct mt_parts parts, size_t unit_bytes,
                          struct mt_transfer *t);
/* Each member's record, member p's at buf + p * record_bytes, goes to everyone; it waits. */
mt_err mt_comm_gather_each(struct mt_comm *c, void *buf, size_t record_bytes);
mt_err mt_comm_broadcast(struct mt_comm *c, void *buf, size_t size_bytes, int root);
mt_err mt_comm_send(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                    struct mt_transfer *t);
mt_err mt_comm_recv(struct mt_comm *c, void *buf, size_t size_bytes, int from,
                    struct mt_transfer *t);
mt_err mt_comm_wait(struct mt_comm *c, struct mt_transfer *t);
/* Messages that have been started and may still be gathered set out now. */
mt_err mt_comm_set_out(struct mt_comm *c);
/* Whether a wait would return at once, and what is under way goes on meanwhile. *done (=): false
 * also where a communicator cannot tell. */
mt_err mt_comm_test(struct mt_comm *c, struct mt_transfer *t, bool *done);
/* Returns when everyone has come. */
mt_err mt_comm_barrier(struct mt_comm *c);

#endif
