/* NCCL's start and end, which have no limit of their own. */
#ifdef MOETUNE_WITH_CUDA

#include "par/nccl_api.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

/* What a call works with; not given back where it hangs. */
struct call {
  struct mt_nccl_api api;
  struct mt_nccl_start start;
  int (*end)(mt_nccl_comm);
  mt_nccl_comm comm;
  int device, result;
};

static void *run(void *context) {
  struct call *c = context;
  const struct mt_nccl_start *s = &c->start;
  (void)cudaSetDevice(c->device);
  c->result = c->end ? c->end(c->comm) : c->api.CommInitRank(&c->comm, s->size, s->id, s->rank);
  return NULL;
}

static struct timespec in_s(double seconds) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  double ns = (double)t.tv_nsec + 1e9 * (seconds - floor(seconds));
  t.tv_sec += (time_t)seconds + (ns >= 1e9);
  t.tv_nsec = (long)(ns >= 1e9 ? ns - 1e9 : ns);
  return t;
}

static bool within(struct call *c, double limit_s) {
  struct timespec until = in_s(limit_s);
  pthread_t thread;
  if (pthread_create(&thread, NULL, run, c) != 0) {
    free(c);
    return false;
  }
  if (pthread_timedjoin_np(thread, NULL, &until) == 0) return true;
  (void)pthread_detach(thread);
  return false;
}

bool mt_nccl_start_within(const struct mt_nccl_api *api, const struct mt_nccl_start *start,
                          mt_nccl_comm *comm, int *result) {
  struct call *c = malloc(sizeof *c);
  if (!c) return false;
  *c = (struct call){.api = *api, .start = *start, .device = start->device};
  if (!within(c, start->limit_s)) return false;
  *comm = c->comm, *result = c->result;
  free(c);
  return true;
}

bool mt_nccl_end_within(int (*end)(mt_nccl_comm), mt_nccl_comm comm, int device, double limit_s) {
  struct call *c = malloc(sizeof *c);
  if (!c) return false;
  *c = (struct call){.end = end, .comm = comm, .device = device};
  if (!within(c, limit_s)) return false;
  free(c);
  return true;
}

#else
typedef int mt_no_nccl_limits; /* C wants something in a file */
#endif
