/* Which unit a cluster makes next. By turns (every so many), or, where counters are given,
 * whichever nobody has begun: then a cluster that starts late, because other kernels (transfers
 * between GPUs) hold its multiprocessors, leaves its share to the others and nobody waits for it.
 * Where others wait for multiprocessors, several times as many clusters as run at a time make
 * `most` units each and end, so that whoever comes first need not wait for the whole kernel's end.
 *
 * A thread beside the loading one takes the next unit of the cluster, in its first block, while the
 * present one is made, and sends it to both blocks, where everyone reads it at the present one's
 * end: two places by turns, each with a barrier for what came and, in the first block, one for what
 * has been read. Units are taken in rising order, as find_rows wants them. */
#ifndef MT_KERNELS_CUDA_SM90_GROUPED_UNITS_CUH
#define MT_KERNELS_CUDA_SM90_GROUPED_UNITS_CUH

#include <limits.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/sm90/gemm_ptx.cuh"

/* Counters of the device, 0 between kernels: of a kernel's clusters, units begun beyond each one's
 * first, and clusters done. most: units of a cluster. counters NULL: by turns. */
struct unit_source {
  int *counters;
  int most;
};

struct unit_places {
  uint64_t come[2], read[2];
  int next[2];
};

/* A thread's position: its unit, and how many it has been told. */
struct units {
  int unit, told;
};

enum {
  UNITS_THREAD = 96, /* the last warp's of those that load */
  UNITS_ROUNDS = 4,  /* in which a kernel that makes way lets others begin */
  UNITS_LEAST = 2,   /* of a cluster then */
};

/* readers: warps of a block that ask for the next unit. */
__device__ __forceinline__ void init_units(struct unit_places *s, int readers) {
  for (int i = 0; i < 2; i++) {
    barrier_init(shared_address(&s->come[i]), 1);
    barrier_init(shared_address(&s->read[i]), 2 * readers);
  }
}

__device__ __forceinline__ struct units first_unit() {
  return {(int)blockIdx.x / 2, 0};
}

/* Four bytes to the same place of block `rank`; its barrier counts them. */
__device__ __forceinline__ void send_word(uint32_t to, uint32_t bar, uint32_t rank, int x) {
  asm volatile(
      "{\n .reg .b32 there, counts;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counts, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [counts];\n}" ::"r"(
          to),
      "r"(bar), "r"(rank), "r"(x)
      : "memory");
}

/* That thread, of both blocks, at a unit's beginning. */
__device__ __forceinline__ void take_unit(const struct unit_places *s, struct unit_source from,
                                          int rank, const struct units *u) {
  int place = u->told % 2;
  uint32_t come = shared_address(&s->come[place]);
  barrier_expect(come, sizeof(int));
  if (rank != 0) return;
  barrier_wait(shared_address(&s->read[place]), (uint32_t)(u->told / 2 % 2) ^ 1);
  int unit = u->told + 1 < from.most ? (int)gridDim.x / 2 + atomicAdd(from.counters, 1) : INT_MAX;
  send_word(shared_address(&s->next[place]), come, 0, unit);
  send_word(shared_address(&s->next[place]), come, 1, unit);
}

/* Every reader, at a unit's end. One lane of a warp says that it has read; alone: a thread by
 * itself, lane 0. */
template <bool ALONE>
__device__ __forceinline__ void next_unit(const struct unit_places *s, struct unit_source from,
                                          struct units *u) {
  if (!from.counters) {
    u->unit += (int)gridDim.x / 2;
    return;
  }
  int place = u->told % 2;
  barrier_wait(shared_address(&s->come[place]), (uint32_t)(u->told / 2 % 2));
  asm volatile("ld.shared.s32 %0, [%1];"
               : "=r"(u->unit)
               : "r"(shared_address(&s->next[place]))
               : "memory");
  u->unit = __reduce_max_sync(ALONE ? 1u : 0xffffffffu, u->unit); /* see uniform() */
  if (ALONE || threadIdx.x % 32 == 0)
    barrier_arrive_at(shared_address(&s->read[place]), 0); /* the number is there: max needed it */
  u->told++;
}

/* That thread, past its last unit: the last cluster of all leaves the counters as it found them. */
__device__ __forceinline__ void end_units(struct unit_source from, int rank) {
  unsigned last = gridDim.x / 2 - 1;
  if (rank == 0 && atomicInc((unsigned *)from.counters + 1, last) == last) *from.counters = 0;
}

/* How many clusters a kernel of at most so many units has, and where they take them (=). turns: by
 * turns, whatever else there is. */
static inline int64_t unit_clusters(const struct mt_backend *be, int64_t units, bool turns,
                                    struct unit_source *from) {
  const struct mt_cuda *c = mt_cuda_of(be);
  int64_t at_once = c->sm_count / 2, n = units < at_once ? units : at_once;
  *from = (struct unit_source){turns ? NULL : c->unit_counters, INT_MAX};
  if (turns || !be->makes_way || units <= at_once) return n;
  int64_t most = (units + UNITS_ROUNDS * at_once - 1) / (UNITS_ROUNDS * at_once);
  if (most < UNITS_LEAST) most = UNITS_LEAST;
  n = (units + most - 1) / most;
  from->most = (int)most;
  return n;
}

#endif
