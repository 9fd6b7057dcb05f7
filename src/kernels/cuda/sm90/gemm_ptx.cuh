/* Hopper's instructions that the matrix kernels use: barriers in shared memory, bulk tensor copies
 * (TMA), warpgroup products (wgmma). Names and rules: the PTX manual, "mbarrier",
 * "cp.async.bulk.tensor", "wgmma.mma_async". Shared memory is named by its 32-bit address. */
#ifndef MT_KERNELS_CUDA_SM90_GEMM_PTX_CUH
#define MT_KERNELS_CUDA_SM90_GEMM_PTX_CUH

#include <cuda.h>
#include <stdint.h>

#include "kernels/cuda/sm90/wgmma.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n"
               "barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
/* Makes initialised barriers known to the cluster and to TMA; a cluster_sync must follow. */
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/* The one arrival, which also announces bytes that copies will bring. */
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
/* One of several arrivals at a barrier of this block: what the thread has read and written comes
 * first. */
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
/* Arrives at the barrier at the same place in block `rank` of the cluster. Orders no writes (a
 * release at cluster scope would wait for all of the thread's): what was read in shared memory is
 * read. */
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile("{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(bar),
               "r"(rank)
               : "memory");
}
/* Returns once the phase of this parity is over. */
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n .reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
  } while (!done);
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/* A box at coordinates (c0 the contiguous one) to dst in this block, or, where BOTH is set, to the
 * same place in both blocks of a cluster of two; each block's barrier counts its own bytes. */
#define MT_TMA_LOAD(rank)                                                                          \
  "cp.async.bulk.tensor." rank ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"
template <bool BOTH>
__device__ __forceinline__ void tma_2d(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0,
                                       int c1) {
  if (BOTH) {
    asm volatile(MT_TMA_LOAD("2d") ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "h"((uint16_t)3)
                 : "memory");
  } else {
    asm volatile(MT_TMA_LOAD("2d") " [%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map), "r"(bar),
                 "r"(c0), "r"(c1)
                 : "memory");
  }
}
template <bool BOTH>
__device__ __forceinline__ void tma_3d(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0,
                                       int c1, int c2) {
  if (BOTH) {
    asm volatile(
        MT_TMA_LOAD("3d") ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "h"((uint16_t)3)
        : "memory");
  } else {
    asm volatile(MT_TMA_LOAD("3d") " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst), "l"(map),
                 "r"(bar), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
  }
}
template <bool BOTH>
__device__ __forceinline__ void tma_4d(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0,
                                       int c1, int c2, int c3) {
  if (BOTH) {
    asm volatile(
        MT_TMA_LOAD("4d") ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"((uint16_t)3)
        : "memory");
  } else {
    asm volatile(MT_TMA_LOAD("4d") " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst), "l"(map),
                 "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
  }
}

/* The other way: a box of shared memory to global memory, or added to it there (float32; the sum is
 * made in the L2 cache). What lies outside the tensor is not written. The thread that starts copies
 * closes them with tma_commit and waits with tma_read_done before their memory is written again. */
__device__ __forceinline__ void tma_put_3d(const CUtensorMap *map, uint32_t src, int c0, int c1,
                                           int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          map),
      "r"(src), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void tma_add_3d(const CUtensorMap *map, uint32_t src, int c0, int c1,
                                           int c2) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group "
               "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ __forceinline__ void tma_put_4d(const CUtensorMap *map, uint32_t src, int c0, int c1,
                                           int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
               "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ __forceinline__ void tma_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void tma_read_done() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void tma_all_done() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
/* Makes this thread's ordinary writes to shared memory visible to TMA; a barrier must follow. */
__device__ __forceinline__ void writes_for_tma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* Barrier of `threads` threads, id 1 to 15. */
__device__ __forceinline__ void part_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Four 8x8 matrices of bf16 from the layout of a product's sums; lane l names the place of row l %
 * 8 of matrix l / 8. */
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
/* And back, each lane's address as above. */
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}

template <int N> __device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Descriptor of a tile in 128-byte swizzle, its start aligned to 1024 bytes (steps into it along
 * the depth excepted). Groups of 8 rows are 1024 bytes apart; `apart`: bytes between slabs of 64
 * along m or n, which only tiles whose depth is not contiguous have. */
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t start, uint32_t apart) {
  return (uint64_t)((start & 0x3ffff) >> 4) | (uint64_t)(apart >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#define MT_SUMS_4(d, i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MT_SUMS_16(d, i)                                                                           \
  MT_SUMS_4(d, (i)), MT_SUMS_4(d, (i) + 4), MT_SUMS_4(d, (i) + 8), MT_SUMS_4(d, (i) + 12)
#define MT_SUMS_64(d, i)                                                                           \
  MT_SUMS_16(d, (i)), MT_SUMS_16(d, (i) + 16), MT_SUMS_16(d, (i) + 32), MT_SUMS_16(d, (i) + 48)

/* d [64 x 256 or 128 of the warpgroup] += a b, or = where add is 0; *_MN: that operand's depth
 * is not what lies contiguously. */
template <int A_MN, int B_MN>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127"
      "}, %128, %129, p, 1, 1, %131, %132;\n}\n"
      : MT_SUMS_64(d, 0), MT_SUMS_64(d, 64)
      : "l"(a), "l"(b), "r"(add), "n"(A_MN), "n"(B_MN));
}
template <int A_MN, int B_MN>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
               "}, %64, %65, p, 1, 1, %67, %68;\n}\n"
               : MT_SUMS_64(d, 0)
               : "l"(a), "l"(b), "r"(add), "n"(A_MN), "n"(B_MN));
}

#endif
