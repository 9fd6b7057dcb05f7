/* NCCL's substitute for ranks that share a GPU, which NCCL refuses: the same functions, so that
 * everything above the table runs as it does with NCCL.
 *
 * What goes from one rank to another passes through a mailbox, piece by piece: the sender copies a
 * piece into one of its slots and raises `sent`, the receiver copies it out and raises `taken`. It
 * is streams that copy and wait for the counters (stream memory operations), not the host: what
 * comes on the caller's, what leaves on another one that the caller's waits for at a group's end,
 * since a group's messages do not wait for each other. The counters lie in memory that the ranks'
 * processes share; the mailboxes in the senders' device memory, which the receivers map (CUDA
 * IPC), or in shared host memory where that cannot be had. */
#include "par/nccl_api.h"

#ifdef MOETUNE_WITH_CUDA

#include <cuda.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { RANKS_MOST = 16, OPS_MOST = 256, SLOTS = 8, PIECE_BYTES = 256 << 10, START_S = 60 };

/* A cache line each. */
struct box {
  _Alignas(64) _Atomic uint32_t sent;
  _Alignas(64) _Atomic uint32_t taken;
};

/* What the processes share; mailboxes in host memory follow it. */
struct page {
  _Atomic int arrived, ready, gone;
  _Atomic bool without_ipc;
  cudaIpcMemHandle_t mailbox[RANKS_MOST];
  struct box box[RANKS_MOST][RANKS_MOST]; /* [from][to] */
};

/* What the type that NCCL's callers know points to. */
struct ncclComm {
  int rank, size;
  struct page *page;
  size_t page_bytes;
  char *mailbox[RANKS_MOST];                    /* of each rank: [to][SLOTS][PIECE_BYTES] */
  char *own;                                    /* this rank's, in device memory */
  uint32_t sent[RANKS_MOST], taken[RANKS_MOST]; /* pieces that have been put on a stream */
  CUresult (*wait_value)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
  CUresult (*write_value)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
  cudaStream_t leaving; /* what is sent runs on it */
  cudaEvent_t begun, left;
  char page_name[sizeof(struct mt_nccl_id)];
};

struct op {
  char *buf;
  size_t left;
  int peer;
  bool out;
  mt_nccl_comm comm;
  cudaStream_t stream;
};

/* NCCL's groups belong to the calling thread, and its calls name no other place to keep them. */
static _Thread_local struct {
  int depth, count;
  struct op op[OPS_MOST];
} group;
static _Thread_local char last_error[256];

static int wrong(int result, const char *what, const char *why) {
  snprintf(last_error, sizeof last_error, "%s: %s", what, why);
  return result;
}

#define CUDA(call)                                                                                 \
  do {                                                                                             \
    cudaError_t cuda_error_ = (call);                                                              \
    if (cuda_error_ != cudaSuccess)                                                                \
      return wrong(MT_NCCL_SYSTEM_ERROR, #call, cudaGetErrorString(cuda_error_));                  \
  } while (0)

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Until all ranks have counted themselves, or some time has passed. */
static int meet(_Atomic int *count, int all) {
  double begin = now_s();
  atomic_fetch_add(count, 1);
  while (atomic_load(count) < all) {
    if (now_s() - begin > START_S) return wrong(MT_NCCL_SYSTEM_ERROR, "start", "a rank is missing");
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
  return MT_NCCL_SUCCESS;
}

static size_t mailbox_bytes(int size) {
  return (size_t)size * SLOTS * PIECE_BYTES;
}

static size_t page_bytes(int size) {
  size_t head = (sizeof(struct page) + 4095) / 4096 * 4096;
  return head + (size_t)size * mailbox_bytes(size);
}

/* Where a rank's mailbox in host memory begins. */
static char *host_mailbox(const struct ncclComm *c, int rank) {
  return (char *)c->page + c->page_bytes - (size_t)(c->size - rank) * mailbox_bytes(c->size);
}

static int get_version(int *version) {
  *version = MT_NCCL_LEAST;
  return MT_NCCL_SUCCESS;
}

/* The id is the shared memory's name. */
static int get_unique_id(struct mt_nccl_id *id) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "/moetune-%ld-%lld%09ld", (long)getpid(),
           (long long)t.tv_sec, t.tv_nsec);
  int fd = shm_open(id->internal, O_CREAT | O_EXCL | O_RDWR, 0600);
  if (fd < 0) return wrong(MT_NCCL_SYSTEM_ERROR, "shared memory", id->internal);
  close(fd);
  return MT_NCCL_SUCCESS;
}

/* Rank 0 gives the memory its size; pages that nobody touches take none. */
static int map_page(struct ncclComm *c) {
  int fd = shm_open(c->page_name, O_RDWR, 0600);
  c->page_bytes = page_bytes(c->size);
  if (fd < 0) return wrong(MT_NCCL_SYSTEM_ERROR, "shared memory", c->page_name);
  void *p = MAP_FAILED;
  if (ftruncate(fd, (off_t)c->page_bytes) == 0)
    p = mmap(NULL, c->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (p == MAP_FAILED) return wrong(MT_NCCL_SYSTEM_ERROR, "mapping shared memory", c->page_name);
  c->page = p;
  return meet(&c->page->arrived, c->size);
}

/* Everyone's mailbox at an address here. Whoever cannot says so before all choose together. */
static int open_mailboxes(struct ncclComm *c) {
  struct page *p = c->page;
  bool ok = cudaMalloc((void **)&c->own, mailbox_bytes(c->size)) == cudaSuccess &&
            cudaIpcGetMemHandle(&p->mailbox[c->rank], c->own) == cudaSuccess;
  if (!ok) atomic_store(&p->without_ipc, true);
  int result = meet(&p->ready, c->size);
  for (int r = 0; result == 0 && !atomic_load(&p->without_ipc) && r < c->size; r++) {
    void *at = c->own;
    if (r != c->rank &&
        cudaIpcOpenMemHandle(&at, p->mailbox[r], cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
      atomic_store(&p->without_ipc, true);
      break;
    }
    c->mailbox[r] = at;
  }
  if (result == 0) result = meet(&p->ready, 2 * c->size);
  if (result != 0 || !atomic_load(&p->without_ipc)) return result;
  (void)cudaGetLastError(); /* what went wrong does no more harm */
  for (int r = 0; r < c->size; r++) {
    if (c->mailbox[r] && r != c->rank) (void)cudaIpcCloseMemHandle(c->mailbox[r]);
    c->mailbox[r] = host_mailbox(c, r);
  }
  return MT_NCCL_SUCCESS;
}

static int find_stream_operations(struct ncclComm *c) {
  enum cudaDriverEntryPointQueryResult found;
  void *wait = NULL, *write = NULL;
  CUDA(cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", &wait, 12000, cudaEnableDefault,
                                        &found));
  CUDA(cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &write, 12000, cudaEnableDefault,
                                        &found));
  *(void **)(&c->wait_value) = wait;
  *(void **)(&c->write_value) = write;
  if (wait && write) return MT_NCCL_SUCCESS;
  return wrong(MT_NCCL_SYSTEM_ERROR, "start", "the driver has no stream memory operations");
}

static int comm_destroy(mt_nccl_comm c);

static int start(struct ncclComm *c) {
  CUDA(cudaStreamCreateWithPriority(&c->leaving, cudaStreamNonBlocking, 0));
  CUDA(cudaEventCreateWithFlags(&c->begun, cudaEventDisableTiming));
  CUDA(cudaEventCreateWithFlags(&c->left, cudaEventDisableTiming));
  int result = map_page(c);
  if (result == 0) result = find_stream_operations(c);
  if (result != 0) return result;
  bool host = false;
  result = open_mailboxes(c);
  host = atomic_load(&c->page->without_ipc);
  size_t bytes = host ? c->page_bytes : (sizeof(struct page) + 4095) / 4096 * 4096;
  CUDA(cudaHostRegister(c->page, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable));
  return result;
}

static int comm_init_rank(mt_nccl_comm *out, int size, struct mt_nccl_id id, int rank) {
  *out = NULL;
  if (size < 1 || size > RANKS_MOST) return wrong(MT_NCCL_INVALID, "start", "16 ranks at most");
  struct ncclComm *c = calloc(1, sizeof *c);
  if (!c) return wrong(MT_NCCL_SYSTEM_ERROR, "start", "out of memory");
  c->rank = rank;
  c->size = size;
  memcpy(c->page_name, id.internal, sizeof c->page_name);
  int result = start(c);
  if (rank == 0) (void)shm_unlink(c->page_name); /* all have it, or will never */
  if (result == 0)
    *out = c;
  else
    (void)comm_destroy(c);
  return result;
}

static void put_away(struct ncclComm *c) {
  bool host = c->page && atomic_load(&c->page->without_ipc);
  for (int r = 0; !host && r < c->size; r++) {
    if (c->mailbox[r] && r != c->rank) (void)cudaIpcCloseMemHandle(c->mailbox[r]);
  }
  if (c->page) {
    /* What others still map must not be freed. */
    (void)meet(&c->page->gone, c->size);
    (void)cudaHostUnregister(c->page);
    munmap(c->page, c->page_bytes);
  }
  if (c->own) (void)cudaFree(c->own);
  if (c->leaving) (void)cudaStreamDestroy(c->leaving);
  if (c->begun) (void)cudaEventDestroy(c->begun);
  if (c->left) (void)cudaEventDestroy(c->left);
  (void)cudaGetLastError();
  free(c);
}

/* The caller's streams are done; what others have not taken yet, they will. */
static int comm_destroy(mt_nccl_comm c) {
  double begin = now_s();
  for (int r = 0; c->page && r < c->size; r++) {
    struct box *b = &c->page->box[c->rank][r];
    while ((int32_t)(atomic_load(&b->taken) - c->sent[r]) < 0 && now_s() - begin < START_S) {
      nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
  }
  put_away(c);
  return MT_NCCL_SUCCESS;
}

/* Whatever the streams wait for has come, so that they run through; what they read then is not what
 * was sent. Nothing is given back: others may use it. */
static int comm_abort(mt_nccl_comm c) {
  for (int r = 0; r < c->size; r++) {
    atomic_store(&c->page->box[r][c->rank].sent, c->taken[r]);
    atomic_store(&c->page->box[c->rank][r].taken, c->sent[r]);
  }
  return MT_NCCL_SUCCESS;
}

static int get_async_error(mt_nccl_comm c, int *error) {
  (void)c;
  *error = MT_NCCL_SUCCESS;
  return MT_NCCL_SUCCESS;
}

static CUdeviceptr address_of(_Atomic uint32_t *counter) {
  void *p = NULL;
  return cudaHostGetDevicePointer(&p, (void *)counter, 0) == cudaSuccess
             ? (CUdeviceptr)(uintptr_t)p
             : (CUdeviceptr)(uintptr_t)counter;
}

static int wait_for(struct ncclComm *c, cudaStream_t stream, _Atomic uint32_t *counter,
                    uint32_t least) {
  if (c->wait_value(stream, address_of(counter), least, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS)
    return MT_NCCL_SUCCESS;
  return wrong(MT_NCCL_SYSTEM_ERROR, "waiting for a counter", "CUDA");
}

static int raise_to(struct ncclComm *c, cudaStream_t stream, _Atomic uint32_t *counter,
                    uint32_t value) {
  if (c->write_value(stream, address_of(counter), value, 0) == CUDA_SUCCESS) return MT_NCCL_SUCCESS;
  return wrong(MT_NCCL_SYSTEM_ERROR, "raising a counter", "CUDA");
}

/* The next piece of an operation. Pieces of a pair of ranks are numbered from 1; the slots of the
 * mailbox take turns. */
static int move_piece(struct op *o) {
  struct ncclComm *c = o->comm;
  size_t n = o->left < PIECE_BYTES ? o->left : PIECE_BYTES;
  int from = o->out ? c->rank : o->peer, to = o->out ? o->peer : c->rank;
  struct box *b = &c->page->box[from][to];
  cudaStream_t stream = o->out ? c->leaving : o->stream;
  uint32_t number = o->out ? ++c->sent[to] : ++c->taken[from];
  char *slot = c->mailbox[from] + ((size_t)to * SLOTS + number % SLOTS) * PIECE_BYTES;
  int result = o->out ? wait_for(c, stream, &b->taken, number - SLOTS)
                      : wait_for(c, stream, &b->sent, number);
  if (result != 0) return result;
  CUDA(cudaMemcpyAsync(o->out ? slot : o->buf, o->out ? o->buf : slot, n, cudaMemcpyDefault,
                       stream));
  o->buf += n;
  o->left -= n;
  return raise_to(c, stream, o->out ? &b->sent : &b->taken, number);
}

/* Up to SLOTS pieces of every pair in one direction, in the order of its operations. */
static int move_some(bool out, bool *more) {
  int served[RANKS_MOST] = {0}, result = MT_NCCL_SUCCESS;
  for (int i = 0; i < group.count; i++) {
    struct op *o = &group.op[i];
    while (result == 0 && o->out == out && o->left > 0 && served[o->peer] < SLOTS) {
      served[o->peer]++;
      result = move_piece(o);
      *more = true;
    }
  }
  return result;
}

/* Both directions take turns, though they are on streams of their own: where streams do at once
 * what they are given (tests/fake_cuda), a group of few pieces must come through all the same. */
static int run_group(void) {
  int result = MT_NCCL_SUCCESS;
  if (group.count == 0) return result;
  struct op *first = &group.op[0];
  struct ncclComm *c = first->comm;
  CUDA(cudaEventRecord(c->begun, first->stream));
  CUDA(cudaStreamWaitEvent(c->leaving, c->begun, 0));
  for (bool more = true; more && result == 0;) {
    more = false;
    result = move_some(true, &more);
    if (result == 0) result = move_some(false, &more);
  }
  CUDA(cudaEventRecord(c->left, c->leaving));
  CUDA(cudaStreamWaitEvent(first->stream, c->left, 0));
  return result;
}

/* Whatever comes of it, its operations are gone. */
static int end_group(void) {
  int result = run_group();
  group.count = 0;
  return result;
}

static int group_start(void) {
  group.depth++;
  return MT_NCCL_SUCCESS;
}

static int group_end(void) {
  if (group.depth < 1) return wrong(MT_NCCL_INVALID, "group", "ends before it begins");
  return --group.depth == 0 ? end_group() : MT_NCCL_SUCCESS;
}

static int add_op(struct op o) {
  if (!o.comm || o.peer < 0 || o.peer >= o.comm->size)
    return wrong(MT_NCCL_INVALID, "message", "no such rank");
  if (group.count == OPS_MOST) return wrong(MT_NCCL_INVALID, "group", "too many messages");
  if (group.count > 0 && (group.op[0].comm != o.comm || group.op[0].stream != o.stream))
    return wrong(MT_NCCL_INVALID, "group", "of one communicator and stream alone");
  group.op[group.count++] = o;
  return group.depth == 0 ? end_group() : MT_NCCL_SUCCESS;
}

static int send_bytes(const void *buf, size_t count, int type, int peer, mt_nccl_comm comm,
                      cudaStream_t stream) {
  if (type != MT_NCCL_BYTES) return wrong(MT_NCCL_INVALID, "send", "bytes alone");
  return add_op((struct op){(char *)(uintptr_t)buf, count, peer, true, comm, stream});
}

static int recv_bytes(void *buf, size_t count, int type, int peer, mt_nccl_comm comm,
                      cudaStream_t stream) {
  if (type != MT_NCCL_BYTES) return wrong(MT_NCCL_INVALID, "receive", "bytes alone");
  return add_op((struct op){buf, count, peer, false, comm, stream});
}

static const char *error_string(int result) {
  return result == MT_NCCL_SUCCESS   ? "no error"
         : result == MT_NCCL_INVALID ? "invalid argument"
                                     : "system error";
}

static const char *get_last_error(mt_nccl_comm comm) {
  (void)comm;
  return last_error;
}

struct mt_nccl_api mt_nccl_substitute(void) {
  return (struct mt_nccl_api){.name = "NCCL's substitute",
                              .GetVersion = get_version,
                              .GetUniqueId = get_unique_id,
                              .CommInitRank = comm_init_rank,
                              .CommDestroy = comm_destroy,
                              .CommAbort = comm_abort,
                              .CommGetAsyncError = get_async_error,
                              .GroupStart = group_start,
                              .GroupEnd = group_end,
                              .Send = send_bytes,
                              .Recv = recv_bytes,
                              .GetErrorString = error_string,
                              .GetLastError = get_last_error};
}

#endif
