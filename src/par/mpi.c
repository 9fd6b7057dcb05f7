/* MPI: the world, and communicators over host memory. Everything is started without blocking and
 * waited for by asking, so that a peer that has died or hangs is noticed in time. */
#include "par/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

#ifdef MOETUNE_MPI

#include <mpi.h>
#include <sched.h>
#include <time.h>

enum { UNITS = 8, PLACE_BYTES = 160 };
enum { TAG_ASK = 1, TAG_ANSWER };

/* What the ranks tell each other where a call takes too long: who waits where. Who does not answer
 * is the one that all wait for. */
struct mt_watch {
  MPI_Comm comm;
  int rank, size;
  double patience_s; /* beyond the time-out, for work of a known size */
  char doing[64];
  char mine[PLACE_BYTES];     /* what is being sent */
  char (*place)[PLACE_BYTES]; /* of each rank, as it answered; "": it has not */
};

/* A transfer under way. */
struct slot {
  bool used;
  MPI_Request request;
  int ints[]; /* [4][size]: counts and starts, which MPI reads until it is done */
};

/* State of one group. Messages are counted in units, so that MPI's int is enough however many bytes
 * move. */
struct group {
  MPI_Comm comm;
  struct slot **slot; /* as many as were ever under way at a time */
  int slot_count;
  struct {
    size_t bytes;
    MPI_Datatype type;
  } unit[UNITS];
  int unit_count;
  struct mt_watch *watch;
  int first, stride; /* member p is rank first + p * stride of the world */
};

static struct group *group_of(const struct mt_comm *c) {
  return c->impl;
}

static mt_err mpi_check(const struct mt_comm *c, int code, const char *what) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  if (code == MPI_SUCCESS) return MT_OK;
  MPI_Error_string(code, text, &length);
  return mt_fail(MT_ECOMM, "%s group, member %d of %d, %s: %s", c->name, c->rank, c->size, what,
                 text);
}

static mt_err unit_type(const struct mt_comm *c, size_t bytes, MPI_Datatype *out) {
  struct group *g = group_of(c);
  for (int i = 0; i < g->unit_count; i++) {
    if (g->unit[i].bytes == bytes) {
      *out = g->unit[i].type;
      return MT_OK;
    }
  }
  if (g->unit_count == UNITS) MPI_Type_free(&g->unit[--g->unit_count].type);
  MT_TRY(mpi_check(c, MPI_Type_contiguous((int)bytes, MPI_BYTE, out), "making a type"));
  MT_TRY(mpi_check(c, MPI_Type_commit(out), "making a type"));
  g->unit[g->unit_count].bytes = bytes;
  g->unit[g->unit_count++].type = *out;
  return MT_OK;
}

static mt_err take_slot(const struct mt_comm *c, struct mt_transfer *t, struct slot **out) {
  struct group *g = group_of(c);
  struct slot *s = NULL;
  for (int i = 0; i < g->slot_count && !s; i++) {
    if (!g->slot[i]->used) s = g->slot[i];
  }
  if (!s) {
    struct slot **more = realloc(g->slot, ((size_t)g->slot_count + 1) * sizeof(struct slot *));
    if (more) g->slot = more;
    if (more) s = calloc(1, sizeof *s + 4 * (size_t)c->size * sizeof(int));
    if (!s) return mt_fail(MT_ENOMEM, "%s group: %d transfers", c->name, g->slot_count + 1);
    g->slot[g->slot_count++] = s;
  }
  s->used = true;
  s->request = MPI_REQUEST_NULL;
  t->impl = *out = s;
  return MT_OK;
}

static mt_err narrow(const struct mt_comm *c, const int64_t *from, int *to) {
  for (int p = 0; p < c->size; p++) {
    if (from[p] < 0 || from[p] > INT32_MAX) {
      return mt_fail(MT_ECOMM, "%s group: %lld units in one part", c->name, (long long)from[p]);
    }
    to[p] = (int)from[p];
  }
  return MT_OK;
}

/* A started call's outcome; the slot is free again where it failed. */
static mt_err started(const struct mt_comm *c, struct mt_transfer *t, int code) {
  mt_err err = mpi_check(c, code, t->what);
  if (!err) return MT_OK;
  ((struct slot *)t->impl)->used = false;
  t->impl = NULL;
  return err;
}

static mt_err mpi_all_to_all(struct mt_comm *c, const void *send, struct mt_parts parts, void *recv,
                             struct mt_parts places, size_t unit_bytes, struct mt_transfer *t) {
  struct slot *s = NULL;
  MPI_Datatype type = MPI_DATATYPE_NULL;
  MT_TRY(unit_type(c, unit_bytes, &type));
  MT_TRY(take_slot(c, t, &s));
  int *n = s->ints, size = c->size;
  MT_TRY(narrow(c, parts.count, n));
  MT_TRY(narrow(c, parts.start, n + size));
  MT_TRY(narrow(c, places.count, n + 2 * size));
  MT_TRY(narrow(c, places.start, n + 3 * size));
  return started(c, t,
                 MPI_Ialltoallv(send, n, n + size, type, recv, n + 2 * size, n + 3 * size, type,
                                group_of(c)->comm, &s->request));
}

static mt_err mpi_all_gather(struct mt_comm *c, void *buf, struct mt_parts parts, size_t unit_bytes,
                             struct mt_transfer *t) {
  struct slot *s = NULL;
  MPI_Datatype type = MPI_DATATYPE_NULL;
  MT_TRY(unit_type(c, unit_bytes, &type));
  MT_TRY(take_slot(c, t, &s));
  MT_TRY(narrow(c, parts.count, s->ints));
  MT_TRY(narrow(c, parts.start, s->ints + c->size));
  return started(c, t,
                 MPI_Iallgatherv(MPI_IN_PLACE, 0, type, buf, s->ints, s->ints + c->size, type,
                                 group_of(c)->comm, &s->request));
}

/* A message about to be started. */
struct message {
  struct slot *s;
  MPI_Datatype type;
  int count;
  MPI_Comm comm;
};

/* MPI counts in int: a message of 2 GiB or more is one of units of 2, 4, ... bytes. Elements of
 * four bytes fit up to 8 GiB whatever their number. */
static mt_err open_message(const struct mt_comm *c, struct mt_transfer *t, size_t size_bytes,
                           struct message *m) {
  size_t unit = 1;
  while (size_bytes / unit > INT32_MAX) unit *= 2;
  *m = (struct message){.count = (int)(size_bytes / unit), .comm = group_of(c)->comm};
  if (size_bytes % unit != 0) {
    return mt_fail(MT_ECOMM, "%s group: a message of %zu bytes", c->name, size_bytes);
  }
  MT_TRY(unit_type(c, unit, &m->type));
  return take_slot(c, t, &m->s);
}

static mt_err mpi_broadcast(struct mt_comm *c, void *buf, size_t size_bytes, int root,
                            struct mt_transfer *t) {
  struct message m;
  MT_TRY(open_message(c, t, size_bytes, &m));
  return started(c, t, MPI_Ibcast(buf, m.count, m.type, root, m.comm, &m.s->request));
}

static mt_err mpi_send(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                       struct mt_transfer *t) {
  struct message m;
  MT_TRY(open_message(c, t, size_bytes, &m));
  return started(c, t, MPI_Isend(buf, m.count, m.type, to, 0, m.comm, &m.s->request));
}

static mt_err mpi_recv(struct mt_comm *c, void *buf, size_t size_bytes, int from,
                       struct mt_transfer *t) {
  struct message m;
  MT_TRY(open_message(c, t, size_bytes, &m));
  return started(c, t, MPI_Irecv(buf, m.count, m.type, from, 0, m.comm, &m.s->request));
}

static mt_err mpi_barrier(struct mt_comm *c, struct mt_transfer *t) {
  struct slot *s = NULL;
  MT_TRY(take_slot(c, t, &s));
  return started(c, t, MPI_Ibarrier(group_of(c)->comm, &s->request));
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void tell(struct mt_watch *w, int to, int tag) {
  MPI_Request request;
  if (MPI_Isend(w->mine, PLACE_BYTES, MPI_CHAR, to, tag, w->comm, &request) == MPI_SUCCESS)
    MPI_Request_free(&request);
}

/* Answers who asks, and notes answers. */
static void listen(struct mt_watch *w, const struct mt_comm *c, const char *what) {
  for (int there = 1; there;) {
    MPI_Status status;
    char text[PLACE_BYTES];
    if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, w->comm, &there, &status) || !there) return;
    if (MPI_Recv(text, PLACE_BYTES, MPI_CHAR, status.MPI_SOURCE, status.MPI_TAG, w->comm,
                 MPI_STATUS_IGNORE))
      return;
    text[PLACE_BYTES - 1] = '\0';
    snprintf(w->place[status.MPI_SOURCE], PLACE_BYTES, "%s", text);
    snprintf(w->mine, PLACE_BYTES, "%s of the %s group%s%s", what, c->name, *w->doing ? ", " : "",
             w->doing);
    if (status.MPI_TAG == TAG_ASK) tell(w, status.MPI_SOURCE, TAG_ANSWER);
  }
}

/* Asks everyone where they wait, for a few seconds, and says who does not answer: first of this
 * group, else of the world; where all do, somebody who waits elsewhere. */
static void call_roll(struct mt_comm *c, const char *what, char *out, size_t size_bytes) {
  struct group *g = group_of(c);
  struct mt_watch *w = g->watch;
  double begin = now_s(), limit = c->timeout_s < 3 ? c->timeout_s : 3;
  snprintf(w->mine, PLACE_BYTES, "%s of the %s group%s%s", what, c->name, *w->doing ? ", " : "",
           w->doing);
  for (int p = 0; p < w->size; p++) {
    if (p != w->rank) tell(w, p, TAG_ASK);
  }
  while (now_s() - begin < limit) {
    listen(w, c, what);
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
  }
  snprintf(w->place[w->rank], PLACE_BYTES, "%s", w->mine);
  for (int p = 0; p < c->size + w->size; p++) {
    int rank = p < c->size ? g->first + p * g->stride : p - c->size;
    if (*w->place[rank]) continue;
    snprintf(out, size_bytes, "rank %d does not answer: it is gone or hangs", rank);
    return;
  }
  for (int p = 0; p < w->size; p++) {
    if (strcmp(w->place[p], w->mine) == 0) continue;
    snprintf(out, size_bytes, "rank %d waits elsewhere, in %.120s", p, w->place[p]);
    return;
  }
  snprintf(out, size_bytes, "all ranks are there");
}

static mt_err too_late(struct mt_comm *c, const char *what, double waited) {
  char who[256];
  const struct mt_watch *w = group_of(c)->watch;
  call_roll(c, what, who, sizeof who);
  return mt_fail(MT_ECOMM, "%s%s%s group, member %d of %d: %s not done after %.0f s: %s", w->doing,
                 *w->doing ? ": " : "", c->name, c->rank, c->size, what, waited, who);
}

static mt_err mpi_test(struct mt_comm *c, struct mt_transfer *t, bool *done) {
  struct slot *s = t->impl;
  int over = 0;
  MT_TRY(mpi_check(c, MPI_Test(&s->request, &over, MPI_STATUS_IGNORE), t->what));
  *done = over != 0; /* what is over stays so: a wait finds it */
  return MT_OK;
}

static mt_err mpi_wait(struct mt_comm *c, struct mt_transfer *t) {
  struct slot *s = t->impl;
  struct mt_watch *w = group_of(c)->watch;
  double begin = now_s(), listened = begin;
  for (int done = 0;;) {
    MT_TRY(mpi_check(c, MPI_Test(&s->request, &done, MPI_STATUS_IGNORE), t->what));
    if (done) break;
    double now = now_s(), waited = now - begin;
    if (waited > c->timeout_s + w->patience_s) return too_late(c, t->what, waited);
    if (now - listened > 0.05) {
      listen(w, c, t->what);
      listened = now;
    }
    /* Ranks may be more than cores; who waits long leaves them to the others. */
    if (waited < 1e-3)
      sched_yield();
    else
      nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  }
  s->used = false;
  return MT_OK;
}

/* Calls of many ranks cannot be cancelled, and a message that is on its way not for certain. */
static mt_err mpi_settle(struct mt_comm *c, double limit_s, bool *over) {
  struct group *g = group_of(c);
  double begin = now_s();
  for (;;) {
    int under_way = 0;
    for (int i = 0; i < g->slot_count; i++) {
      struct slot *s = g->slot[i];
      int done = 0;
      if (s->used && MPI_Test(&s->request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) done = 1;
      if (done) s->used = false;
      under_way += s->used;
    }
    *over = under_way == 0;
    if (*over) return MT_OK;
    if (now_s() - begin > limit_s)
      return mt_fail(MT_ECOMM, "%s group, member %d of %d: %d transfers are still under way",
                     c->name, c->rank, c->size, under_way);
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
}

static void mpi_destroy(struct mt_comm *c) {
  struct group *g = group_of(c);
  if (!g) return;
  while (g->unit_count > 0) MPI_Type_free(&g->unit[--g->unit_count].type);
  if (g->comm != MPI_COMM_NULL) MPI_Comm_free(&g->comm);
  for (int i = 0; i < g->slot_count; i++) free(g->slot[i]);
  free(g->slot);
  free(g);
}

mt_err mt_world_group(const struct mt_world *w, const struct mt_mesh *mesh, enum mt_group group,
                      struct mt_comm *out) {
  struct mt_group_span span = mt_mesh_group(mesh, group);
  *out = mt_comm_self(mt_group_name(group));
  if (!w->mpi || w->size == 1) return MT_OK;
  struct group *g = calloc(1, sizeof *g);
  struct mt_comm c = {.name = out->name,
                      .rank = span.index,
                      .size = span.count,
                      .timeout_s = w->timeout_s,
                      .all_to_all = mpi_all_to_all,
                      .all_gather = mpi_all_gather,
                      .broadcast = mpi_broadcast,
                      .send = mpi_send,
                      .recv = mpi_recv,
                      .barrier = mpi_barrier,
                      .wait = mpi_wait,
                      .test = mpi_test,
                      .settle = mpi_settle,
                      .destroy = mpi_destroy,
                      .impl = g};
  mt_err err = MT_ENOMEM;
  if (g) {
    g->comm = MPI_COMM_NULL;
    g->watch = w->watch;
    g->first = span.first;
    g->stride = span.stride;
  }
  if (!g) {
    mt_fail(MT_ENOMEM, "%s group", c.name);
    goto done;
  }
  /* A group is known by its first member. */
  MT_GO(mpi_check(&c, MPI_Comm_split(MPI_COMM_WORLD, span.first, span.index, &g->comm), "split"));
  MPI_Comm_set_errhandler(g->comm, MPI_ERRORS_RETURN);
  *out = c;
done:
  if (err) mt_comm_destroy(&c);
  return err;
}

/* Whether a launcher has started this process: what Open MPI's mpirun, PMIx and PMI (srun, MPICH's
 * and Intel's launchers) leave in the environment. */
static bool launched(void) {
  static const char *const signs[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE"};
  for (size_t i = 0; i < sizeof signs / sizeof *signs; i++) {
    if (getenv(signs[i])) return true;
  }
  return false;
}

static mt_err open_watch(struct mt_world *w) {
  struct mt_comm all = {.name = "world", .rank = w->rank, .size = w->size};
  struct mt_watch *watch = calloc(1, sizeof *watch);
  if (!watch) return mt_fail(MT_ENOMEM, "watch over %d ranks", w->size);
  *watch = (struct mt_watch){.comm = MPI_COMM_NULL, .rank = w->rank, .size = w->size};
  w->watch = watch;
  watch->place = calloc((size_t)w->size, sizeof *watch->place);
  if (!watch->place) return mt_fail(MT_ENOMEM, "watch over %d ranks", w->size);
  MT_TRY(mpi_check(&all, MPI_Comm_dup(MPI_COMM_WORLD, &watch->comm), "start"));
  MPI_Comm_set_errhandler(watch->comm, MPI_ERRORS_RETURN);
  return MT_OK;
}

/* A core that several ranks may run on is shared by them, one that a rank is bound to is its own.
 */
static int share_of_cores(const cpu_set_t *of, int ranks, int mine) {
  double share = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    int sharers = 0;
    if (!CPU_ISSET(cpu, &of[mine])) continue;
    for (int r = 0; r < ranks; r++) sharers += CPU_ISSET(cpu, &of[r]) != 0;
    share += 1.0 / sharers;
  }
  return share > 0 && share < 1 ? 1 : (int)(share + 1e-6);
}

static mt_err count_cores(struct mt_world *w, const struct mt_comm *all, MPI_Comm host) {
  cpu_set_t *of = calloc((size_t)w->local_size, sizeof *of);
  if (!of) return mt_fail(MT_ENOMEM, "cores of %d ranks", w->local_size);
  sched_getaffinity(0, sizeof *of, &of[w->local_rank]); /* of a host of over 1024: none, unknown */
  mt_err err = mpi_check(
      all, MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, of, (int)sizeof *of, MPI_BYTE, host),
      "start");
  w->cores = share_of_cores(of, w->local_size, w->local_rank);
  free(of);
  return err;
}

static mt_err find_place_on_host(struct mt_world *w, const struct mt_comm *all) {
  MPI_Comm host;
  MT_TRY(mpi_check(
      all, MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, w->rank, MPI_INFO_NULL, &host),
      "start"));
  mt_err err = mpi_check(all, MPI_Comm_rank(host, &w->local_rank), "start");
  if (!err) err = mpi_check(all, MPI_Comm_size(host, &w->local_size), "start");
  if (!err) err = count_cores(w, all, host);
  MPI_Comm_free(&host);
  return err;
}

mt_err mt_world_open(struct mt_world *w, double timeout_s) {
  int threads, ended = 0;
  mt_err err;
  *w = (struct mt_world){
      .size = 1, .local_size = 1, .timeout_s = timeout_s, .all = mt_comm_self("world")};
  if (!launched()) return MT_OK;
  struct mt_comm all = {.name = "world", .size = 1};
  MPI_Finalized(&ended);
  if (ended) return mt_fail(MT_ECOMM, "MPI has ended: a process can be one of many ranks once");
  MT_TRY(mpi_check(&all, MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &threads), "start"));
  w->mpi = true;
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MT_GO(mpi_check(&all, MPI_Comm_rank(MPI_COMM_WORLD, &w->rank), "start"));
  MT_GO(mpi_check(&all, MPI_Comm_size(MPI_COMM_WORLD, &w->size), "start"));
  MT_GO(find_place_on_host(w, &all));
  MT_GO(open_watch(w));
  struct mt_mesh flat = {
      .world = w->size, .dp = w->size, .ep = 1, .pp = 1, .rank = w->rank, .dp_rank = w->rank};
  MT_GO(mt_world_group(w, &flat, MT_GROUP_WORLD, &w->all));
done:
  if (err) mt_world_close(w);
  return err;
}

void mt_world_close(struct mt_world *w) {
  mt_comm_destroy(&w->all);
  if (w->watch) {
    if (w->watch->comm != MPI_COMM_NULL) MPI_Comm_free(&w->watch->comm);
    free(w->watch->place);
    free(w->watch);
  }
  if (w->mpi) MPI_Finalize();
  *w = (struct mt_world){.size = 1, .local_size = 1, .all = mt_comm_self("world")};
}

void mt_world_doing(struct mt_world *w, const char *what) {
  if (w && w->watch) snprintf(w->watch->doing, sizeof w->watch->doing, "%s", what);
}

void mt_world_patience(struct mt_world *w, double seconds) {
  if (w && w->watch) w->watch->patience_s = seconds;
}

void mt_world_abort(const struct mt_world *w, const char *message) {
  if (!w->mpi || w->size == 1) return;
  fprintf(stderr, "moetune: error: rank %d: %s\n", w->rank, message);
  fflush(NULL);
  MPI_Abort(MPI_COMM_WORLD, 1);
}

#else

mt_err mt_world_open(struct mt_world *w, double timeout_s) {
  const char *size = getenv("OMPI_COMM_WORLD_SIZE");
  if (!size) size = getenv("PMI_SIZE");
  if (!size && getenv("PMIX_RANK")) size = getenv("SLURM_STEP_NUM_TASKS");
  *w = (struct mt_world){
      .size = 1, .local_size = 1, .timeout_s = timeout_s, .all = mt_comm_self("world")};
  if (!size || strtol(size, NULL, 10) <= 1) return MT_OK;
  return mt_fail(MT_EUNSUPPORTED,
                 "started on %s ranks, but this build has no MPI: install it "
                 "(Debian: libopenmpi-dev) and build again",
                 size);
}

void mt_world_close(struct mt_world *w) {
  *w = (struct mt_world){.size = 1, .local_size = 1, .all = mt_comm_self("world")};
}

void mt_world_doing(struct mt_world *w, const char *what) {
  (void)w, (void)what;
}

void mt_world_patience(struct mt_world *w, double seconds) {
  (void)w, (void)seconds;
}

mt_err mt_world_group(const struct mt_world *w, const struct mt_mesh *mesh, enum mt_group group,
                      struct mt_comm *out) {
  (void)w, (void)mesh;
  *out = mt_comm_self(mt_group_name(group));
  return MT_OK;
}

void mt_world_abort(const struct mt_world *w, const char *message) {
  (void)w, (void)message;
}

#endif
