/* Communicators over a GPU's memory: NCCL's grouped sends and receives on a stream of their own,
 * and a thread that notices when they do not come to an end. */
#include "par/nccl.h"

#include <stdlib.h>
#include <string.h>

#ifdef MOETUNE_WITH_CUDA

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>

#include "base/log.h"
#include "par/nccl_api.h"

/* FLIGHTS: transfers that may be under way at a time; who starts more waits for the oldest. */
enum { FLIGHTS = 256, MESSAGES = 64, WATCH_MS = 20, REST_S = 5, FAILURE_BYTES = 512 };

enum state { GATHERING, LAUNCHING, UNDER_WAY };

/* Calls that were launched as one. */
struct flight {
  enum state state;
  cudaEvent_t ready; /* on the backend's stream: what it reads is there */
  cudaEvent_t done;  /* recorded behind it */
  const char *what;
  double since_s; /* when it was launched */
};

struct message {
  void *buf;
  size_t size_bytes;
  int peer;
  bool out;
};

/* State of one communicator. */
struct group {
  struct mt_nccl_api api;
  _Atomic(mt_nccl_comm) comm; /* NULL once it is given up, which the watcher may do at any time */
  struct mt_backend *be;
  cudaStream_t stream;
  cudaEvent_t joined; /* on this stream: all before a join */
  struct flight flight[FLIGHTS];
  uint64_t first, next; /* flights first .. next - 1 are not known to be done */
  struct message message[MESSAGES];
  int message_count;
  void *token; /* device memory of a barrier's bytes */
  size_t token_bytes;
  pthread_mutex_t lock; /* of first, next, the flights' states and the failure */
  pthread_t watcher;
  bool watched, stop;
  bool grouped; /* between NCCL's GroupStart and GroupEnd */
  bool failed;
  char failure[FAILURE_BYTES];
};

static struct group *group_of(const struct mt_comm *c) {
  return c->impl;
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void sleep_ms(int ms) {
  nanosleep(&(struct timespec){.tv_nsec = 1000000L * ms}, NULL);
}

static mt_err cuda_check(const struct mt_comm *c, cudaError_t error, const char *what) {
  if (error == cudaSuccess) return MT_OK;
  return mt_fail(MT_EDEVICE, "%s group, member %d of %d, %s: %s", c->name, c->rank, c->size, what,
                 cudaGetErrorString(error));
}

static mt_err nccl_check(const struct mt_comm *c, int result, const char *what) {
  const struct mt_nccl_api *api = &group_of(c)->api;
  if (result == MT_NCCL_SUCCESS) return MT_OK;
  const char *more = api->GetLastError(group_of(c)->comm);
  return mt_fail(MT_ECOMM, "%s group, member %d of %d, %s: %s: %s%s%s", c->name, c->rank, c->size,
                 what, api->name, api->GetErrorString(result), more && *more ? ": " : "",
                 more ? more : "");
}

/* The first thing that goes wrong is what all later calls say. */
static mt_err failed(struct mt_comm *c) {
  struct group *g = group_of(c);
  mt_err err = MT_OK;
  pthread_mutex_lock(&g->lock);
  if (g->failed) err = mt_fail(MT_ECOMM, "%s", g->failure);
  pthread_mutex_unlock(&g->lock);
  return err;
}

/* With the lock. Ends NCCL's kernels, so that whoever waits for the stream goes on and learns why.
 */
static void give_up(struct mt_comm *c, const char *text) {
  struct group *g = group_of(c);
  if (g->failed) return;
  g->failed = true;
  snprintf(g->failure, sizeof g->failure, "%s", text);
  mt_nccl_comm comm = g->comm;
  g->comm = NULL;
  pthread_mutex_unlock(&g->lock); /* it waits for calls that are under way */
  if (comm) (void)mt_nccl_end_within(g->api.CommAbort, comm, g->be->device, REST_S);
  pthread_mutex_lock(&g->lock);
}

/* Whether an event is done, or what went wrong. That it is not is no error which the next check of
 * a launch should find. */
static cudaError_t query(cudaEvent_t event) {
  cudaError_t state = cudaEventQuery(event);
  if (state == cudaErrorNotReady) (void)cudaGetLastError();
  return state;
}

/* With the lock: takes what is done off the list, from the oldest on. */
static void land(struct group *g) {
  while (g->first < g->next) {
    struct flight *f = &g->flight[g->first % FLIGHTS];
    if (f->state != UNDER_WAY || query(f->done) == cudaErrorNotReady) return;
    g->first++;
    struct flight *oldest = &g->flight[g->first % FLIGHTS];
    double now = now_s(); /* it could not begin before */
    if (g->first < g->next && oldest->since_s < now) oldest->since_s = now;
  }
}

/* With the lock: how long others have kept the oldest flight waiting. What it reads may not be
 * there yet, while this rank's own stream is busy. */
static double kept_waiting_s(struct flight *f) {
  double now = now_s();
  if (f->state == GATHERING) return 0;
  if (f->state == UNDER_WAY && query(f->ready) == cudaErrorNotReady) f->since_s = now;
  return now - f->since_s;
}

static void *watch(void *context) {
  struct mt_comm *c = context;
  struct group *g = group_of(c);
  (void)cudaSetDevice(g->be->device);
  pthread_mutex_lock(&g->lock);
  while (!g->stop && !g->failed) {
    char text[FAILURE_BYTES];
    int error = MT_NCCL_SUCCESS;
    land(g);
    struct flight *f = g->first < g->next ? &g->flight[g->first % FLIGHTS] : NULL;
    const char *what = f ? f->what : "idle";
    double waited = f ? kept_waiting_s(f) : 0;
    if (g->comm && g->api.CommGetAsyncError(g->comm, &error) == MT_NCCL_SUCCESS &&
        error != MT_NCCL_SUCCESS) {
      snprintf(text, sizeof text, "%s group, member %d of %d, %s: %s: %s", c->name, c->rank,
               c->size, what, g->api.name, g->api.GetErrorString(error));
      give_up(c, text);
    } else if (waited > c->timeout_s) {
      snprintf(text, sizeof text,
               "%s group, member %d of %d: %s not done after %.0f s: a rank is gone or hangs",
               c->name, c->rank, c->size, what, waited);
      give_up(c, text);
    }
    pthread_mutex_unlock(&g->lock);
    sleep_ms(WATCH_MS);
    pthread_mutex_lock(&g->lock);
  }
  pthread_mutex_unlock(&g->lock);
  return NULL;
}

/* A place for a transfer that is about to be launched. */
static mt_err take_flight(struct mt_comm *c, const char *what, enum state state,
                          struct flight **out) {
  struct group *g = group_of(c);
  for (;;) {
    MT_TRY(failed(c));
    pthread_mutex_lock(&g->lock);
    if (g->next - g->first == FLIGHTS) land(g);
    bool room = g->next - g->first < FLIGHTS;
    if (room) {
      *out = &g->flight[g->next++ % FLIGHTS];
      (*out)->state = state;
      (*out)->what = what;
      (*out)->since_s = now_s();
    }
    pthread_mutex_unlock(&g->lock);
    if (room) return MT_OK;
    sleep_ms(1);
  }
}

static void enter(struct group *g, struct flight *f, enum state state) {
  pthread_mutex_lock(&g->lock);
  f->state = state;
  f->since_s = now_s();
  pthread_mutex_unlock(&g->lock);
}

/* What the backend's stream has been given so far comes first. */
static mt_err begin(struct mt_comm *c, struct flight *f) {
  struct group *g = group_of(c);
  MT_TRY(cuda_check(c, cudaEventRecord(f->ready, g->be->stream), "ready"));
  return cuda_check(c, cudaStreamWaitEvent(g->stream, f->ready, 0), "ready");
}

/* The flight is over when what has been launched is; or, on an error, it never was. */
static mt_err launched(struct mt_comm *c, struct flight *f, mt_err err) {
  struct group *g = group_of(c);
  if (!err) err = cuda_check(c, cudaEventRecord(f->done, g->stream), f->what);
  if (err) {
    char text[FAILURE_BYTES];
    snprintf(text, sizeof text, "%s", mt_error_message());
    MT_TRY(failed(c)); /* the watcher's reason comes before what it made fail */
    pthread_mutex_lock(&g->lock);
    give_up(c, text);
    pthread_mutex_unlock(&g->lock);
    return mt_fail(err, "%s", text);
  }
  enter(g, f, UNDER_WAY);
  return MT_OK;
}

static int send_to(struct group *g, const void *buf, size_t bytes, int peer) {
  return bytes == 0 ? MT_NCCL_SUCCESS
                    : g->api.Send(buf, bytes, MT_NCCL_BYTES, peer, g->comm, g->stream);
}

static int recv_from(struct group *g, void *buf, size_t bytes, int peer) {
  return bytes == 0 ? MT_NCCL_SUCCESS
                    : g->api.Recv(buf, bytes, MT_NCCL_BYTES, peer, g->comm, g->stream);
}

/* A group belongs to the thread: one that has been begun is ended whatever went wrong within, or
 * the next ones, of other communicators too, would be part of it. */
static int begin_group(struct group *g) {
  int result = g->api.GroupStart();
  g->grouped = result == 0;
  return result;
}
static int end_group(struct group *g, int result) {
  int end = g->grouped ? g->api.GroupEnd() : 0;
  g->grouped = false;
  return result ? result : end;
}

/* The messages that have been gathered set out. */
static mt_err flush(struct mt_comm *c) {
  struct group *g = group_of(c);
  if (g->message_count == 0) return MT_OK;
  struct flight *f = &g->flight[(g->next - 1) % FLIGHTS];
  enter(g, f, LAUNCHING);
  mt_err err = begin(c, f);
  int result = err ? 0 : begin_group(g);
  for (int i = 0; !err && result == 0 && i < g->message_count; i++) {
    struct message *m = &g->message[i];
    result = m->out ? send_to(g, m->buf, m->size_bytes, m->peer)
                    : recv_from(g, m->buf, m->size_bytes, m->peer);
  }
  g->message_count = 0;
  if (!err) result = end_group(g, result);
  if (!err) err = nccl_check(c, result, f->what);
  return launched(c, f, err);
}

static mt_err add_message(struct mt_comm *c, struct message m, struct mt_transfer *t) {
  struct group *g = group_of(c);
  struct flight *f = NULL;
  if (g->message_count == MESSAGES) MT_TRY(flush(c));
  if (g->message_count == 0)
    MT_TRY(take_flight(c, t->what, GATHERING, &f));
  else
    f = &g->flight[(g->next - 1) % FLIGHTS];
  g->message[g->message_count++] = m;
  t->impl = f;
  return failed(c);
}

static mt_err device_send(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                          struct mt_transfer *t) {
  struct message m = {(void *)(uintptr_t)buf, size_bytes, to, true};
  return add_message(c, m, t);
}

static mt_err device_recv(struct mt_comm *c, void *buf, size_t size_bytes, int from,
                          struct mt_transfer *t) {
  struct message m = {buf, size_bytes, from, false};
  return add_message(c, m, t);
}

/* A call begins: nothing gathered is left, and it has its place. */
static mt_err take_off(struct mt_comm *c, struct mt_transfer *t, struct flight **f) {
  MT_TRY(flush(c));
  MT_TRY(take_flight(c, t->what, LAUNCHING, f));
  t->impl = *f;
  return begin(c, *f);
}

static mt_err device_all_to_all(struct mt_comm *c, const void *send, struct mt_parts parts,
                                void *recv, struct mt_parts places, size_t unit_bytes,
                                struct mt_transfer *t) {
  struct group *g = group_of(c);
  struct flight *f;
  const char *from = send;
  char *to = recv;
  int own = c->rank;
  MT_TRY(take_off(c, t, &f));
  int result = begin_group(g);
  /* Everyone begins with itself and goes on with another peer, or all would send to the first at
   * once. Its own part is NCCL's to copy too, beside the others. */
  for (int i = 0; result == 0 && i < c->size; i++) {
    int p = (own + i) % c->size, q = (own + c->size - i) % c->size;
    result = send_to(g, from + (size_t)parts.start[p] * unit_bytes,
                     (size_t)parts.count[p] * unit_bytes, p);
    if (result == 0)
      result = recv_from(g, to + (size_t)places.start[q] * unit_bytes,
                         (size_t)places.count[q] * unit_bytes, q);
  }
  result = end_group(g, result);
  return launched(c, f, nccl_check(c, result, t->what));
}

/* What this member has goes to everyone whose share arrives in turn. */
static mt_err device_all_gather(struct mt_comm *c, void *buf, struct mt_parts parts,
                                size_t unit_bytes, struct mt_transfer *t) {
  struct group *g = group_of(c);
  struct flight *f;
  char *base = buf;
  int own = c->rank;
  MT_TRY(take_off(c, t, &f));
  int result = begin_group(g);
  for (int i = 1; result == 0 && i < c->size; i++) {
    int p = (own + i) % c->size, q = (own + c->size - i) % c->size;
    result = send_to(g, base + (size_t)parts.start[own] * unit_bytes,
                     (size_t)parts.count[own] * unit_bytes, p);
    if (result == 0)
      result = recv_from(g, base + (size_t)parts.start[q] * unit_bytes,
                         (size_t)parts.count[q] * unit_bytes, q);
  }
  result = end_group(g, result);
  return launched(c, f, nccl_check(c, result, t->what));
}

static mt_err device_broadcast(struct mt_comm *c, void *buf, size_t size_bytes, int root,
                               struct mt_transfer *t) {
  struct group *g = group_of(c);
  struct flight *f;
  MT_TRY(take_off(c, t, &f));
  int result = begin_group(g);
  for (int p = 0; result == 0 && c->rank == root && p < c->size; p++) {
    if (p != root) result = send_to(g, buf, size_bytes, p);
  }
  if (result == 0 && c->rank != root) result = recv_from(g, buf, size_bytes, root);
  result = end_group(g, result);
  return launched(c, f, nccl_check(c, result, t->what));
}

/* The host waits, as for nothing else. */
static mt_err device_barrier(struct mt_comm *c, struct mt_transfer *t) {
  struct group *g = group_of(c);
  int64_t *numbers = calloc(2 * (size_t)c->size, sizeof *numbers);
  if (!numbers) return mt_fail(MT_ENOMEM, "barrier of %d ranks", c->size);
  for (int i = 0; i < c->size; i++) numbers[i] = 1, numbers[c->size + i] = i;
  mt_err err = device_all_gather(c, g->token, (struct mt_parts){numbers, numbers + c->size}, 1, t);
  free(numbers);
  MT_TRY(err);
  cudaError_t state;
  const struct flight *f = t->impl;
  while ((state = query(f->done)) == cudaErrorNotReady) {
    MT_TRY(failed(c));
    nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  }
  MT_TRY(failed(c));
  return cuda_check(c, state, t->what);
}

static mt_err device_wait(struct mt_comm *c, struct mt_transfer *t) {
  struct group *g = group_of(c);
  const struct flight *f = t->impl;
  if (f->state == GATHERING) MT_TRY(flush(c));
  MT_TRY(cuda_check(c, cudaStreamWaitEvent(g->be->stream, f->done, 0), t->what));
  return failed(c);
}

static mt_err device_join(struct mt_comm *c) {
  struct group *g = group_of(c);
  MT_TRY(flush(c));
  MT_TRY(cuda_check(c, cudaEventRecord(g->joined, g->stream), "join"));
  MT_TRY(cuda_check(c, cudaStreamWaitEvent(g->be->stream, g->joined, 0), "join"));
  return failed(c);
}

/* Whether all that was launched is done; a run that ends well has waited for it. */
static bool comes_to_rest(struct group *g, double limit_s) {
  double begin = now_s();
  for (;;) {
    pthread_mutex_lock(&g->lock);
    land(g);
    bool rests = g->next - g->first == (g->message_count > 0) && !g->failed;
    bool late = g->failed || now_s() - begin > limit_s;
    pthread_mutex_unlock(&g->lock);
    if (rests || late) return rests;
    sleep_ms(1);
  }
}

/* Who ends because of an error must not wait for peers that do not come: they learn of it only when
 * this one is gone. */
static mt_err device_settle(struct mt_comm *c, double limit_s, bool *over) {
  struct group *g = group_of(c);
  double begin = now_s();
  bool rests = comes_to_rest(g, limit_s);
  *over = false;
  if (g->watched) { /* which may be giving up */
    pthread_mutex_lock(&g->lock);
    g->stop = true;
    pthread_mutex_unlock(&g->lock);
    pthread_join(g->watcher, NULL);
    g->watched = false;
  }
  mt_nccl_comm comm = g->comm;
  if (rests) {
    g->comm = NULL;
    double left_s = fmax(begin + limit_s - now_s(), 0);
    *over = !comm || mt_nccl_end_within(g->api.CommDestroy, comm, g->be->device, left_s);
    return MT_OK;
  }
  pthread_mutex_lock(&g->lock);
  give_up(c, "ended with transfers under way");
  pthread_mutex_unlock(&g->lock);
  return MT_OK;
}

static void device_destroy(struct mt_comm *c) {
  struct group *g = group_of(c);
  bool over;
  if (!g) return;
  (void)device_settle(c, c->timeout_s, &over); /* who ends after an error has done so before */
  for (int i = 0; i < FLIGHTS; i++) {
    if (g->flight[i].ready) (void)cudaEventDestroy(g->flight[i].ready);
    if (g->flight[i].done) (void)cudaEventDestroy(g->flight[i].done);
  }
  if (g->joined) (void)cudaEventDestroy(g->joined);
  if (g->stream) (void)cudaStreamDestroy(g->stream);
  if (g->token) g->be->mem_free(g->be, g->token, g->token_bytes);
  pthread_mutex_destroy(&g->lock);
  free((void *)(uintptr_t)c->name);
  free(g);
  c->impl = NULL;
}

/* It cannot be watched, since there is nothing to abort yet. */
static mt_err start_comm(struct mt_comm *host, struct mt_comm *c) {
  struct group *g = group_of(c);
  struct mt_nccl_id id;
  mt_nccl_comm comm = NULL;
  int result = c->rank == 0 ? g->api.GetUniqueId(&id) : 0;
  /* A member that failed before this sends nothing, and the others' time-out says so. */
  MT_TRY(nccl_check(c, result, "id"));
  MT_TRY(mt_comm_broadcast(host, &id, sizeof id, 0));
  struct mt_nccl_start start = {
      .id = id, .device = g->be->device, .rank = c->rank, .size = c->size, .limit_s = c->timeout_s};
  if (!mt_nccl_start_within(&g->api, &start, &comm, &result)) {
    return mt_fail(MT_ECOMM,
                   "%s group, member %d of %d: %s not started after %.0f s: a rank is gone or "
                   "hangs",
                   c->name, c->rank, c->size, g->api.name, c->timeout_s);
  }
  g->comm = comm;
  return nccl_check(c, result, "start");
}

static mt_err open_group(struct mt_comm *host, struct mt_comm *c) {
  struct group *g = group_of(c);
  if (mt_nccl_shared())
    g->api = mt_nccl_substitute();
  else
    MT_TRY(mt_nccl_load(&g->api));
  MT_TRY(cuda_check(c, cudaSetDevice(g->be->device), "choosing a GPU"));
  int low, high; /* transfers before the operations that they are beside */
  MT_TRY(cuda_check(c, cudaDeviceGetStreamPriorityRange(&low, &high), "making a stream"));
  MT_TRY(cuda_check(c, cudaStreamCreateWithPriority(&g->stream, cudaStreamNonBlocking, high),
                    "making a stream"));
  MT_TRY(cuda_check(c, cudaEventCreateWithFlags(&g->joined, cudaEventDisableTiming),
                    "making an event"));
  c->stream = g->stream;
  g->be->makes_way = true;
  for (int i = 0; i < 2 * FLIGHTS; i++) {
    struct flight *f = &g->flight[i / 2];
    MT_TRY(cuda_check(
        c, cudaEventCreateWithFlags(i % 2 ? &f->ready : &f->done, cudaEventDisableTiming),
        "making an event"));
  }
  MT_TRY(g->be->mem_alloc(g->be, (size_t)c->size, &g->token));
  g->token_bytes = (size_t)c->size;
  return start_comm(host, c);
}

mt_err mt_comm_device(struct mt_comm *host, struct mt_backend *be, struct mt_comm *out) {
  struct mt_comm c = {.rank = host->rank,
                      .size = host->size,
                      .timeout_s = host->timeout_s,
                      .all_to_all = device_all_to_all,
                      .all_gather = device_all_gather,
                      .broadcast = device_broadcast,
                      .send = device_send,
                      .recv = device_recv,
                      .barrier = device_barrier,
                      .wait = device_wait,
                      .set_out = flush,
                      .failed = failed,
                      .join = device_join,
                      .settle = device_settle,
                      .destroy = device_destroy};
  struct group *g = calloc(1, sizeof *g);
  *out = (struct mt_comm){0};
  char *name = malloc(strlen(host->name) + sizeof " (GPU)");
  if (!g || !name) {
    free(g);
    free(name);
    return mt_fail(MT_ENOMEM, "%s group", host->name);
  }
  memcpy(name, host->name, strlen(host->name));
  memcpy(name + strlen(host->name), " (GPU)", sizeof " (GPU)");
  c.name = name;
  c.impl = g;
  g->be = be;
  pthread_mutex_init(&g->lock, NULL);
  if (c.timeout_s <= 0) c.timeout_s = 120;
  mt_err err = open_group(host, &c);
  /* The watcher looks at the communicator where it stays. */
  *out = c;
  if (!err && pthread_create(&g->watcher, NULL, watch, out) != 0)
    err = mt_fail(MT_ENOMEM, "%s: no thread", c.name);
  g->watched = !err;
  if (err) {
    device_destroy(out);
    *out = (struct mt_comm){0};
  }
  return err;
}

#else

mt_err mt_comm_device(struct mt_comm *host, struct mt_backend *be, struct mt_comm *out) {
  *out = (struct mt_comm){0};
  return mt_fail(MT_EUNSUPPORTED, "%s group: this build has no CUDA, %s does not exchange",
                 host->name, be->name);
}

#endif
