/* The ranks that one run is made of: started by mpirun or srun, or this process alone. MPI carries
 * what is on the host; who has a GPU adds NCCL for what is there (par/nccl.h). */
#ifndef MT_PAR_WORLD_H
#define MT_PAR_WORLD_H

#include "par/comm.h"
#include "par/mesh.h"

/* Starts MPI where a launcher has started this process (its environment tells) or `force` says so,
 * and gives rank and size; otherwise a world of one, for which MPI is never touched. timeout_s: how
 * long any call waits for its peers. Errors: MT_EUNSUPPORTED in a build without MPI under a
 * launcher of several ranks, MT_ECOMM. */
struct mt_world {
  int rank, size;
  double timeout_s;
  bool mpi;
};
mt_err mt_world_open(struct mt_world *w, double timeout_s);
/* Ends MPI. Every communicator must be gone. */
void mt_world_close(struct mt_world *w);

/* A host communicator of a group of the mesh. Collective over the world. Errors: MT_ECOMM. */
mt_err mt_world_group(const struct mt_world *w, const struct mt_mesh *mesh, enum mt_group group,
                      struct mt_comm *out);

/* Prints the message with this rank's name and brings every rank down, exit status 1. Does not
 * return where there are other ranks. */
void mt_world_abort(const struct mt_world *w, const char *message);

#endif
