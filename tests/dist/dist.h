/* Tests over ranks: started by mpirun, every rank runs the same tests and rank 0 alone prints. */
#ifndef TESTS_DIST_DIST_H
#define TESTS_DIST_DIST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>

#include <string.h>
#include <time.h>

#include "kernels/registry.h"
#include "par/nccl.h"

static struct mt_world world;
static struct mt_comm everyone; /* over the host's memory */
/* Where the tests' tensors lie: a GPU's memory after on_gpu, else the host's. */
static struct mt_backend dist_be;

#define OK(call)                                                                                   \
  do {                                                                                             \
    mt_err ok_err_ = (call);                                                                       \
    if (ok_err_) fail_msg("rank %d: %s: %s", world.rank, #call, mt_error_message());               \
  } while (0)

/* A group's communicators over the host's memory and over the backend's, which may be the same. */
static inline void open_comms(const struct mt_mesh *m, enum mt_group group, struct mt_comm *host,
                              struct mt_comm *c) {
  OK(mt_world_group(&world, m, group, host));
  if (dist_be.memory_used)
    OK(mt_comm_device(host, &dist_be, c));
  else
    *c = *host;
}

static inline void close_comms(struct mt_comm *host, struct mt_comm *c) {
  if (dist_be.memory_used) mt_comm_destroy(c);
  mt_comm_destroy(host);
}

enum { DIST_SKIPPED = 77 };

/* Each way, mesh and cut fewer times and fewer steps: for many ranks on GPUs, where starting NCCL
 * or sharing one GPU takes its time. All of it runs in test_shared. */
static bool brief;

/* NCCL where this host has a GPU for each rank, else its substitute; MOETUNE_SHARED_GPU=1 asks for
 * that anywhere. */
static inline bool on_gpu(void) {
  int device, gpus = mt_cuda_device_count();
  if (gpus == 0) return false;
  if (world.local_size > gpus) assert_int_equal(setenv("MOETUNE_SHARED_GPU", "1", 1), 0);
  OK(mt_world_gpu(&world, gpus, &device));
  OK(mt_backend_cuda_create(&dist_be, false, device));
  printf("%s\n", mt_nccl_shared() ? "ranks share a GPU: NCCL's substitute" : "over NCCL");
  return true;
}

static struct timespec case_began;

static inline int begin_case(void **state) {
  (void)state;
  clock_gettime(CLOCK_MONOTONIC, &case_began);
  return 0;
}

/* *state: its name. */
static inline int end_case(void **state) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  double ns = (double)(t.tv_nsec - case_began.tv_nsec);
  printf("  %s: %.1f s\n", (const char *)*state,
         (double)(t.tv_sec - case_began.tv_sec) + 1e-9 * ns);
  return 0;
}

static inline int run_cases(const struct CMUnitTest *tests, size_t count) {
  struct CMUnitTest timed[32];
  if (brief) printf("in brief\n");
  assert_true(count <= sizeof timed / sizeof *timed);
  for (size_t i = 0; i < count; i++) {
    timed[i] = tests[i];
    timed[i].setup_func = begin_case;
    timed[i].teardown_func = end_case;
    timed[i].initial_state = (void *)(uintptr_t)tests[i].name;
  }
  /* One of them or several: MOETUNE_TEST=PATTERN. */
  if (getenv("MOETUNE_TEST")) cmocka_set_test_filter(getenv("MOETUNE_TEST"));
  return _cmocka_run_group_tests("dist", timed, count, NULL, NULL);
}

/* A rank that fails brings the others down: they would wait for it. */
#define DIST_RUN(tests)                                                                            \
  do {                                                                                             \
    int failed = run_cases(tests, sizeof tests / sizeof *tests);                                   \
    if (failed) mt_world_abort(&world, "tests failed");                                            \
    mt_backend_destroy(&dist_be);                                                                  \
    dist_close();                                                                                  \
    return failed;                                                                                 \
  } while (0)

static inline int dist_open(void) {
  if (mt_world_open(&world, 60)) {
    fprintf(stderr, "%s\n", mt_error_message());
    return 1;
  }
  setvbuf(stdout, NULL, _IOLBF, 0); /* what has been said stays said, should somebody end this */
  const struct mt_mesh flat = {.world = world.size,
                               .dp = world.size,
                               .ep = 1,
                               .pp = 1,
                               .rank = world.rank,
                               .dp_rank = world.rank};
  OK(mt_world_group(&world, &flat, MT_GROUP_WORLD, &everyone));
  return world.rank != 0 && !freopen("/dev/null", "w", stdout);
}

static inline void dist_close(void) {
  mt_comm_destroy(&everyone);
  mt_world_close(&world);
}

#define DIST_MAIN(tests)                                                                           \
  int main(void) {                                                                                 \
    if (dist_open()) return 1;                                                                     \
    OK(mt_backend_cpu_create(&dist_be, 1));                                                        \
    DIST_RUN(tests);                                                                               \
  }

/* The same on GPUs, for programs that are skipped where there are none. */
#define DIST_GPU_MAIN(tests)                                                                       \
  int main(void) {                                                                                 \
    if (dist_open()) return 1;                                                                     \
    if (!on_gpu()) {                                                                               \
      printf("skipped: no NVIDIA GPU is visible, or this build has no CUDA\n");                    \
      dist_close();                                                                                \
      return DIST_SKIPPED;                                                                         \
    }                                                                                              \
    brief = world.size > 2 || mt_nccl_shared();                                                    \
    DIST_RUN(tests);                                                                               \
  }

#endif
