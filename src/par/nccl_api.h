/* What is used of NCCL, as a table of functions: NCCL itself, loaded when it is first needed, so
 * that a program runs where it is not, or a substitute for ranks that share a GPU.
 *
 * The types are those of NCCL's binary interface, which has not changed since 2.7 (nccl_load.c
 * compares them with nccl.h where that is there). At least version 2.13 is asked for:
 * ncclGetLastError. */
#ifndef MT_PAR_NCCL_API_H
#define MT_PAR_NCCL_API_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"

enum { MT_NCCL_SUCCESS = 0, MT_NCCL_SYSTEM_ERROR = 2, MT_NCCL_INVALID = 4, MT_NCCL_BYTES = 1 };
enum { MT_NCCL_LEAST = 21300 }; /* as ncclGetVersion counts */

struct mt_nccl_id {
  char internal[128];
};
typedef struct ncclComm *mt_nccl_comm;

/* X(name, arguments): ncclResult_t nccl<name>(arguments). */
#define MT_NCCL_LIST(X)                                                                            \
  X(GetVersion, (int *version))                                                                    \
  X(GetUniqueId, (struct mt_nccl_id * id))                                                         \
  X(CommInitRank, (mt_nccl_comm * comm, int size, struct mt_nccl_id id, int rank))                 \
  X(CommDestroy, (mt_nccl_comm comm))                                                              \
  X(CommAbort, (mt_nccl_comm comm))                                                                \
  X(CommGetAsyncError, (mt_nccl_comm comm, int *error))                                            \
  X(GroupStart, (void))                                                                            \
  X(GroupEnd, (void))                                                                              \
  X(Send,                                                                                          \
    (const void *buf, size_t count, int type, int peer, mt_nccl_comm comm, cudaStream_t stream))   \
  X(Recv, (void *buf, size_t count, int type, int peer, mt_nccl_comm comm, cudaStream_t stream))

struct mt_nccl_api {
  const char *name;
#define X(fn, args) int(*fn) args;
  MT_NCCL_LIST(X)
#undef X
  const char *(*GetErrorString)(int result);
  const char *(*GetLastError)(mt_nccl_comm comm);
};

/* libnccl.so.2, or what MOETUNE_NCCL in the environment names. Errors: MT_EUNSUPPORTED naming what
 * the loader says, or a version that is too old. */
mt_err mt_nccl_load(struct mt_nccl_api *api);

/* The substitute: ranks of one host, 16 at most, on one GPU or several that reach each other.
 * Every rank puts what it sends into a mailbox of device memory that all others map (CUDA IPC), or
 * of host memory where IPC cannot be had. */
struct mt_nccl_api mt_nccl_substitute(void);

/* Calls that all ranks must come to, each on a thread of its own: who comes alone, because another
 * has failed, would wait there for good. false: it has not come to its end within the limit (or
 * there was no thread for it), and is left to itself; it writes to nothing of the caller's. */
struct mt_nccl_start {
  struct mt_nccl_id id;
  int device, rank, size;
  double limit_s;
};
/* CommInitRank: *comm (=), *result (=) what it has returned. */
bool mt_nccl_start_within(const struct mt_nccl_api *api, const struct mt_nccl_start *start,
                          mt_nccl_comm *comm, int *result);
/* end: CommDestroy or CommAbort, which NCCL makes all ranks of a host come to. */
bool mt_nccl_end_within(int (*end)(mt_nccl_comm), mt_nccl_comm comm, int device, double limit_s);

#endif
