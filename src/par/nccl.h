/* Communicators over the memory of a GPU. */
#ifndef MT_PAR_NCCL_H
#define MT_PAR_NCCL_H

#include "backend/device.h"
#include "par/world.h"

/* The members of `host`, a communicator over host memory that the group's first messages go
 * through, exchange what is in the backend's memory: through NCCL, or through its substitute
 * (mt_nccl_shared). Collective. The backend outlives it.
 *
 * Transfers run on a stream of their own, behind what the backend's stream has been given before;
 * `wait` lets that stream wait, not the host. Messages (send, recv) set out together when one of
 * them is waited for or another call is made: so those that cross do not wait for each other. A
 * barrier alone makes the host wait.
 *
 * A thread watches: a transfer that is not done within the time-out, once those before it are and
 * what it reads is there, or an error that NCCL reports, ends the communicator; what is on the
 * stream then runs through, and this and every later call fails (mt_comm_failed) with a message
 * that names rank, group and call.
 *
 * Errors: MT_EUNSUPPORTED in a build without CUDA or where NCCL cannot be loaded; MT_ECOMM. */
mt_err mt_comm_device(struct mt_comm *host, struct mt_backend *be, struct mt_comm *out);

/* Whether ranks that share a GPU are wanted: MOETUNE_SHARED_GPU=1 in the environment. NCCL does not
 * take them; its substitute, for tests, does. */
bool mt_nccl_shared(void);

/* The GPU of this rank, by its number on its host. Errors: MT_EINVAL where a host has more ranks
 * than GPUs, unless they share them, or each is shown one alone (CUDA_VISIBLE_DEVICES). */
mt_err mt_world_gpu(const struct mt_world *w, int gpu_count, int *device);

#endif
