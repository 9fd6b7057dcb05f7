/* Graphs for a backend on the host: operations are noted with their arguments instead of run, and
 * run when replayed. So what a graph would miss, because the host decides it anew each step, shows
 * without a GPU. */
#ifndef TESTS_MODEL_RECORDER_H
#define TESTS_MODEL_RECORDER_H

#include "backend/device.h"

enum { RECORDER_CALLS = 4096 };

struct recorded_call {
  mt_err (*run)(struct mt_backend *be, const struct recorded_call *call);
  void *workspace;
  size_t workspace_size_bytes;
  union {
#define X(op) struct mt_##op##_args op;
    MT_OP_LIST(X)
#undef X
    struct {
      void *p;
      size_t size_bytes;
    } zero;
    struct {
      struct mt_clock *clock;
      int phase;
      bool restart;
    } clock;
  } args;
};

struct recorded_graph {
  int count;
  struct recorded_call call[RECORDER_CALLS];
};

/* One backend at a time. */
static struct {
  struct mt_backend inner; /* as it was */
  struct recorded_graph *open;
  int refuse;    /* graphs that fail to come about from here on */
  int last_wait; /* the stamp that was waited for */
  int waits;     /* calls that make a host wait, or copy, while `watched` */
  bool watched;
  int outside_calls; /* operations and zeros that ran as they were called */
} recorder;

static inline struct recorded_call *note(struct mt_backend *be) {
  if (!recorder.open) {
    recorder.outside_calls++;
    return NULL;
  }
  assert_true(recorder.open->count < RECORDER_CALLS);
  struct recorded_call *c = &recorder.open->call[recorder.open->count++];
  c->workspace = be->workspace;
  c->workspace_size_bytes = be->workspace_size_bytes;
  return c;
}

#define X(op)                                                                                      \
  static inline mt_err again_##op(struct mt_backend *be, const struct recorded_call *c) {          \
    return recorder.inner.ops.op(be, &c->args.op);                                                 \
  }                                                                                                \
  static inline mt_err noted_##op(struct mt_backend *be, const struct mt_##op##_args *a) {         \
    struct recorded_call *c = note(be);                                                            \
    if (!c) return recorder.inner.ops.op(be, a);                                                   \
    c->run = again_##op;                                                                           \
    c->args.op = *a;                                                                               \
    return MT_OK;                                                                                  \
  }
MT_OP_LIST(X)
#undef X

static inline mt_err again_zero(struct mt_backend *be, const struct recorded_call *c) {
  return recorder.inner.zero(be, c->args.zero.p, c->args.zero.size_bytes);
}
static inline mt_err noted_zero(struct mt_backend *be, void *p, size_t size_bytes) {
  struct recorded_call *c = note(be);
  if (!c) return recorder.inner.zero(be, p, size_bytes);
  c->run = again_zero;
  c->args.zero.p = p, c->args.zero.size_bytes = size_bytes;
  return MT_OK;
}

static inline mt_err again_clock(struct mt_backend *be, const struct recorded_call *c) {
  return recorder.inner.clock_enter(be, c->args.clock.clock, c->args.clock.phase,
                                    c->args.clock.restart);
}
static inline mt_err noted_clock(struct mt_backend *be, struct mt_clock *clock, int phase,
                                 bool restart) {
  struct recorded_call *c = recorder.open ? note(be) : NULL;
  if (!c) return recorder.inner.clock_enter(be, clock, phase, restart);
  c->run = again_clock;
  c->args.clock.clock = clock, c->args.clock.phase = phase, c->args.clock.restart = restart;
  return MT_OK;
}

/* What must not happen within a graph, and what makes the host wait. */
static inline void host_call(bool waits) {
  assert_null(recorder.open);
  if (waits && recorder.watched) recorder.waits++;
}
static inline mt_err noted_upload(struct mt_backend *be, void *dst, const void *src, size_t bytes) {
  host_call(false);
  return recorder.inner.upload(be, dst, src, bytes);
}
static inline mt_err noted_later(struct mt_backend *be, void *dst, const void *src, size_t bytes) {
  host_call(false);
  return recorder.inner.download_later(be, dst, src, bytes);
}
static inline mt_err noted_download(struct mt_backend *be, void *dst, const void *src,
                                    size_t bytes) {
  host_call(true);
  return recorder.inner.download(be, dst, src, bytes);
}
static inline mt_err noted_sync(struct mt_backend *be) {
  host_call(true);
  return recorder.inner.sync(be);
}
static inline mt_err noted_stamp(struct mt_backend *be, int slot) {
  host_call(false);
  return recorder.inner.stamp(be, slot);
}
static inline mt_err noted_stamp_wait(struct mt_backend *be, int slot) {
  host_call(true);
  recorder.last_wait = slot;
  return recorder.inner.stamp_wait(be, slot);
}
static inline mt_err noted_stamp_read(struct mt_backend *be, int from, int to, double *seconds) {
  host_call(true);
  return recorder.inner.stamp_read(be, from, to, seconds);
}

static inline mt_err recorder_begin(struct mt_backend *be) {
  (void)be;
  assert_null(recorder.open);
  recorder.open = calloc(1, sizeof *recorder.open);
  assert_non_null(recorder.open);
  return MT_OK;
}
static inline mt_err recorder_end(struct mt_backend *be, void **graph) {
  struct recorded_graph *g = recorder.open;
  (void)be;
  assert_non_null(g);
  recorder.open = NULL;
  if (graph && recorder.refuse == 0) {
    *graph = g;
    return MT_OK;
  }
  free(g);
  if (!graph) return MT_OK;
  recorder.refuse--;
  return mt_fail(MT_EDEVICE, "refused");
}
static inline mt_err recorder_replay(struct mt_backend *be, void *graph) {
  struct recorded_graph *g = graph;
  for (int i = 0; i < g->count; i++) {
    be->workspace = g->call[i].workspace;
    be->workspace_size_bytes = g->call[i].workspace_size_bytes;
    MT_TRY(g->call[i].run(be, &g->call[i]));
  }
  be->workspace = NULL; /* what runs next must say which it means */
  be->workspace_size_bytes = 0;
  return MT_OK;
}
static inline void recorder_free(struct mt_backend *be, void *graph) {
  (void)be;
  free(graph);
}

static inline void recorder_prepare(struct mt_backend *be) {
  if (be->graph_begin == recorder_begin) return;
  recorder.inner = *be;
  recorder.open = NULL;
#define X(op) be->ops.op = noted_##op;
  MT_OP_LIST(X)
#undef X
  be->zero = noted_zero;
  be->clock_enter = noted_clock;
  be->upload = noted_upload;
  be->download = noted_download;
  be->download_later = noted_later;
  be->sync = noted_sync;
  be->stamp = noted_stamp;
  be->stamp_wait = noted_stamp_wait;
  be->stamp_read = noted_stamp_read;
  be->graph_begin = recorder_begin;
  be->graph_end = recorder_end;
  be->graph_replay = recorder_replay;
  be->graph_free = recorder_free;
}

#endif
