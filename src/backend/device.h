/* A backend: a device's memory and its table of operations. One process may hold several (tests
 * compare them). */
#ifndef MT_BACKEND_DEVICE_H
#define MT_BACKEND_DEVICE_H

#include "backend/ops.h"

/* What a backend must know to say how much workspace its operations need. */
struct mt_limits {
  int64_t tokens; /* T at most */
  int64_t rows;   /* R at most */
  int64_t hidden, ffn, experts, top_k, vocab;
  int64_t heads, kv_heads, head_dim;
  enum mt_dtype act;
  enum mt_qformat qformat; /* of products' operands; MT_Q_NONE: none in 8 bits */
};

/* Marks on the backend's clock that exist at a time. */
enum { MT_STAMPS = 4096, MT_STAMP_COUNTS = MT_STAMPS - 1 /* of an exchange's counts, read back */ };

/* Time by phases, counted on the device. */
enum { MT_CLOCK_PHASES = 14 };
struct mt_clock {
  uint64_t last_ns; /* when the phase that runs was entered */
  int64_t phase;    /* which that is, or -1 */
  uint64_t phase_ns[MT_CLOCK_PHASES];
};

struct mt_backend {
  const char *name;     /* "ref", "cpu", "cuda", "cuda-portable" */
  char description[96]; /* the device in words, or "" */
  struct mt_ops ops;
  int thread_count; /* host threads that operations may use */
  void *workspace;  /* set by the owner to workspace_bytes(limits), aligned to 256 */
  size_t workspace_size_bytes;
  void *impl;   /* the backend's own state, or NULL */
  void *stream; /* what operations run on (CUDA: cudaStream_t), or NULL where the host does */
  int device;   /* which of the host's devices this is */
  /* CUDA: 10 * major + minor of the chip whose own kernels are used, or that a plan is for; 0 where
   * none is used that one generation alone has. */
  int capability;
  /* Grouped products of operands in this format read the sizes of their groups back to the host,
   * once for each pad_offsets: no graph can hold them. MT_Q_NONE: none do. */
  enum mt_qformat counted_format;
  /* Set by who runs transfers beside operations: long kernels let them begin in their midst. */
  bool makes_way;
  void *profile; /* of whoever times the operations (train/profile.h), or NULL */

  /* Bytes that the operations need at most within the limits; a pure function. But for
   * what takes and gives back memory, all that follows runs on the stream, in order with the
   * operations. Errors: MT_ENOMEM where memory is taken, else MT_EDEVICE. */
  size_t (*workspace_bytes)(const struct mt_backend *be, const struct mt_limits *limits);
  mt_err (*mem_alloc)(struct mt_backend *be, size_t size_bytes, void **out);
  void (*mem_free)(struct mt_backend *be, void *p, size_t size_bytes);
  /* Host to device, device to host; src, which is no memory of host_alloc's, may be changed when
   * upload returns; download waits for the stream, as sync does. copy: within the device. */
  mt_err (*upload)(struct mt_backend *be, void *dst, const void *src, size_t size_bytes);
  mt_err (*download)(struct mt_backend *be, void *dst, const void *src, size_t size_bytes);
  /* As download, but returns at once: dst, which must be from host_alloc, holds the bytes once a
   * stamp taken afterwards has been waited for. */
  mt_err (*download_later)(struct mt_backend *be, void *dst, const void *src, size_t size_bytes);
  mt_err (*host_alloc)(struct mt_backend *be, size_t size_bytes, void **out); /* zeroed */
  void (*host_free)(struct mt_backend *be, void *p);
  mt_err (*zero)(struct mt_backend *be, void *p, size_t size_bytes);
  mt_err (*copy)(struct mt_backend *be, void *dst, const void *src, size_t size_bytes);
  mt_err (*sync)(struct mt_backend *be);
  /* Marks slot [0, MT_STAMPS) at this point of the stream; and the seconds from one marked slot to
   * a later one, waiting until the stream has passed it. stamp_passed: whether it has. */
  mt_err (*stamp)(struct mt_backend *be, int slot);
  mt_err (*stamp_passed)(struct mt_backend *be, int slot, bool *passed);
  mt_err (*stamp_wait)(struct mt_backend *be, int slot);
  mt_err (*stamp_read)(struct mt_backend *be, int from, int to, double *seconds);
  /* At this point of the stream: the time since the clock's last call goes to its phase, and the
   * given one begins (-1: none). restart: all phases begin at 0. *clock is the backend's memory. */
  mt_err (*clock_enter)(struct mt_backend *be, struct mt_clock *clock, int phase, bool restart);
  /* Graphs, or NULL where a backend has none: what is launched between begin and end is kept in
   * *graph instead of run, and runs at each replay, on the same memory. In between, no upload,
   * download, sync or stamp. end with graph NULL gives up what was begun, whatever state it is in.
   * Errors: MT_EDEVICE; then nothing is kept, and what comes next is launched as usual. */
  mt_err (*graph_begin)(struct mt_backend *be);
  mt_err (*graph_end)(struct mt_backend *be, void **graph);
  mt_err (*graph_replay)(struct mt_backend *be, void *graph);
  void (*graph_free)(struct mt_backend *be, void *graph);
  /* Operations launched from here on run on this stream, which is not the backend's own, or with
   * NULL on that again: only such as take no workspace. NULL where operations run on the host. */
  void (*on_stream)(struct mt_backend *be, void *stream);
  /* Names what the host launches from here on, for a profiler; NULL ends the innermost name. NULL
   * where no profiler would see it. */
  void (*range)(const char *name);
  /* Bytes of the device in use, by other processes too; NULL where the memory is the host's. */
  size_t (*memory_used)(const struct mt_backend *be);
  /* Steps that may be under way at a time: 1 where operations are done when they return. */
  int steps_ahead;
  double host_stamp_s[MT_STAMPS]; /* of backends on the host */
  void (*destroy)(struct mt_backend *be);
};

/* Frees what create took; safe on a zeroed struct. */
void mt_backend_destroy(struct mt_backend *be);

/* Name of operation i of MT_OP_LIST, NULL past the end; and a check that all are there:
 * MT_EUNSUPPORTED naming the first that is missing. */
const char *mt_op_name(int i);
mt_err mt_backend_check(const struct mt_backend *be);

/* The memory functions and the clock for backends whose memory is the host's. */
void mt_backend_use_host_memory(struct mt_backend *be);

#endif
