/* The ranks that one run is made of: started by mpirun or srun, or this process alone. MPI carries
 * what is on the host; who has a GPU adds NCCL for what is there (par/nccl.h). */
#ifndef MT_PAR_WORLD_H
#define MT_PAR_WORLD_H

#include "par/comm.h"
#include "par/mesh.h"

struct mt_world {
  int rank, size;
  int local_rank, local_size; /* among those of this host */
  int cores; /* this rank's share of those that it may run on; 0: alone, or unknown */
  double timeout_s;
  bool mpi;
  bool settled; /* the last meeting has left an error, which is everyone's; false again by whoever
                   goes on all the same */
  struct mt_comm all;     /* everyone, before there is a mesh */
  struct mt_watch *watch; /* the communicators' */
};
/* Starts MPI where a launcher has started this process (its environment tells), and gives rank and
 * size; otherwise a world of one, for which MPI is never touched. timeout_s: how long any call
 * waits for its peers. Once a process. Errors: MT_EUNSUPPORTED in a build without MPI under a
 * launcher of several ranks, MT_ECOMM. */
mt_err mt_world_open(struct mt_world *w, double timeout_s);
/* Ends MPI. Every other communicator must be gone. */
void mt_world_close(struct mt_world *w);

/* What this rank is at, for the messages of calls that take too long. w may be NULL. */
void mt_world_doing(struct mt_world *w, const char *what);
/* Peers may take so much longer than the time-out from now on: what they do (reading, writing) is
 * known to take its time. 0: no longer. w may be NULL. */
void mt_world_patience(struct mt_world *w, double seconds);

/* Everyone brings its error, MT_OK mostly, and what it wants, and all leave with the same: *wish
 * (= , may be NULL) the largest of them; the error of the lowest rank that has one, which its
 * message names unless all have the same. Collective; w may be NULL or one rank: err it is. What
 * failed in a communicator (MT_ECOMM) does not meet and returns at once: others may never come. */
mt_err mt_world_meet(struct mt_world *w, mt_err err, int *wish);

/* Refuses a rank whose lines ("name: value\n") are not rank 0's, naming the first that differs.
 * Collective. Errors, on all ranks: MT_EINVAL. */
mt_err mt_world_same(struct mt_world *w, const char *what, const char *lines);

/* The end of a run, collective where all is well. Who brings an error waits a few seconds for the
 * others to bring theirs: then rank 0 prints the message and all return the error without one. If
 * they do not come, prints it with this rank's name and brings all down. */
mt_err mt_world_end(struct mt_world *w, mt_err err);

/* A host communicator of a group of the mesh. Collective over the world. Errors: MT_ECOMM. */
mt_err mt_world_group(const struct mt_world *w, const struct mt_mesh *mesh, enum mt_group group,
                      struct mt_comm *out);

/* Prints the message with this rank's name and brings every rank down, exit status 1. Does not
 * return where there are other ranks. */
void mt_world_abort(const struct mt_world *w, const char *message);

#endif
