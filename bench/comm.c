/* What the communicators of GPUs reach: all-to-all and sums of gradients of 1 MB to 1 GB a rank,
 * beside NCCL's own grouped sends and receives on the same buffers without anything around them.
 *   mpirun -n RANKS comm [MOST_MB]
 * Bandwidths are bytes that leave a rank a second (a sum: 2 (n-1)/n of its bytes). */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/registry.h"
#include "par/nccl.h"
#include "par/sum.h"

#ifdef MOETUNE_WITH_CUDA
#include "par/nccl_api.h"

enum { RANKS_MOST = 64, STAMPS = 100 };

#define TRY(call)                                                                                  \
  do {                                                                                             \
    if (call) {                                                                                    \
      fprintf(stderr, "%s: %s\n", #call, mt_error_message());                                      \
      mt_world_abort(&b->world, mt_error_message());                                               \
      return 1;                                                                                    \
    }                                                                                              \
  } while (0)
#define NCCL(call)                                                                                 \
  do {                                                                                             \
    int result_ = (call);                                                                          \
    if (result_) {                                                                                 \
      fprintf(stderr, "%s: %s\n", #call, b->api.GetErrorString(result_));                          \
      return 1;                                                                                    \
    }                                                                                              \
  } while (0)

struct bench {
  struct mt_world world;
  struct mt_backend be;
  struct mt_comm host, comm;
  struct mt_sum sum;
  struct mt_nccl_api api;
  mt_nccl_comm raw;
  char *from, *to;
};

/* One all-to-all of `bytes` a rank in equal parts. */
static int ours(struct bench *b, size_t bytes) {
  int64_t count[RANKS_MOST], start[RANKS_MOST];
  int n = b->world.size;
  for (int p = 0; p < n; p++) {
    count[p] = (int64_t)bytes / n;
    start[p] = p * count[p];
  }
  struct mt_parts parts = {count, start};
  TRY(mt_comm_all_to_all(&b->comm, b->from, parts, b->to, parts, 1, NULL));
  return 0;
}

static int raw(struct bench *b, size_t bytes) {
  size_t part = bytes / (size_t)b->world.size;
  NCCL(b->api.GroupStart());
  for (int p = 0; p < b->world.size; p++) {
    NCCL(b->api.Send(b->from + (size_t)p * part, part, MT_NCCL_BYTES, p, b->raw, b->be.stream));
    NCCL(b->api.Recv(b->to + (size_t)p * part, part, MT_NCCL_BYTES, p, b->raw, b->be.stream));
  }
  NCCL(b->api.GroupEnd());
  return 0;
}

static int sum(struct bench *b, size_t bytes) {
  int64_t own, owned;
  TRY(mt_sum_bucket(&b->sum, &b->comm, b->from, MT_F32, (int64_t)(bytes / sizeof(float)), &own,
                    &owned));
  return 0;
}

/* Seconds of one call, of several that follow each other. */
static int seconds_of(struct bench *b, int (*call)(struct bench *, size_t), size_t bytes,
                      double *seconds) {
  int repeats = bytes < (64u << 20) ? 20 : 5;
  for (int i = 0; i < 2; i++) {
    if (call(b, bytes)) return 1;
  }
  TRY(b->be.sync(&b->be));
  TRY(mt_comm_barrier(&b->host));
  TRY(b->be.stamp(&b->be, 0));
  for (int i = 0; i < repeats; i++) {
    if (call(b, bytes)) return 1;
  }
  TRY(b->be.stamp(&b->be, 1));
  TRY(b->be.stamp_read(&b->be, 0, 1, seconds));
  TRY(mt_comm_failed(&b->comm));
  *seconds /= repeats;
  return 0;
}

static int open_all(struct bench *b, size_t most) {
  void *p;
  int device;
  struct mt_config c = {.layers = 1, .experts = 1};
  struct mt_mesh mesh;
  struct mt_nccl_id id;
  TRY(mt_world_open(&b->world, 60));
  TRY(mt_world_gpu(&b->world, mt_cuda_device_count(), &device));
  TRY(mt_backend_cuda_create(&b->be, false, device));
  TRY(mt_mesh_make(&c, b->world.size, b->world.rank, 1, 1, &mesh));
  TRY(mt_world_group(&b->world, &mesh, MT_GROUP_WORLD, &b->host));
  TRY(mt_comm_device(&b->host, &b->be, &b->comm));
  if (mt_nccl_shared())
    b->api = mt_nccl_substitute();
  else
    TRY(mt_nccl_load(&b->api));
  if (b->world.rank == 0) NCCL(b->api.GetUniqueId(&id));
  TRY(mt_comm_broadcast(&b->host, &id, sizeof id, 0));
  NCCL(b->api.CommInitRank(&b->raw, b->world.size, id, b->world.rank));
  b->sum.be = &b->be;
  TRY(b->be.mem_alloc(&b->be, most, &p));
  b->from = p;
  TRY(b->be.mem_alloc(&b->be, most, &p));
  b->to = p;
  TRY(b->be.zero(&b->be, b->from, most));
  return 0;
}

int main(int argc, char **argv) {
  struct bench *b = calloc(1, sizeof *b);
  size_t most = (size_t)(argc > 1 ? strtol(argv[1], NULL, 10) : 1024) << 20;
  if (!b || open_all(b, most)) return 1;
  int n = b->world.size;
  double share = (double)(n - 1) / n;
  if (b->world.rank == 0) {
    printf("%d ranks, %s, %s\n", n, b->be.description, b->api.name);
    printf("%8s  %22s  %22s  %22s\n", "MB", "all-to-all", "NCCL's send/receive", "sum of float32");
    printf("%8s  %11s %10s  %11s %10s  %11s %10s\n", "", "us", "GB/s", "us", "GB/s", "us", "GB/s");
  }
  for (size_t bytes = 1 << 20; bytes <= most; bytes *= 4) {
    double t[3];
    if (seconds_of(b, ours, bytes, &t[0]) || seconds_of(b, raw, bytes, &t[1]) ||
        seconds_of(b, sum, bytes, &t[2]))
      return 1;
    if (b->world.rank != 0) continue;
    printf("%8zu", bytes >> 20);
    for (int i = 0; i < 3; i++)
      printf("  %11.1f %10.2f", 1e6 * t[i], (i == 2 ? 2 : 1) * share * (double)bytes / t[i] / 1e9);
    printf("\n");
  }
  (void)b->api.CommDestroy(b->raw);
  mt_sum_free(&b->sum);
  b->be.mem_free(&b->be, b->from, most);
  b->be.mem_free(&b->be, b->to, most);
  mt_comm_destroy(&b->comm);
  mt_comm_destroy(&b->host);
  mt_backend_destroy(&b->be);
  mt_world_close(&b->world);
  free(b);
  return 0;
}

#else

int main(void) {
  fprintf(stderr, "this build has no CUDA\n");
  return 1;
}

#endif
