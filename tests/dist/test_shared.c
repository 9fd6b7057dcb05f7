/* The communicators of GPUs over NCCL's substitute, where no GPU is: src/par/nccl.c and
 * nccl_shared.c compiled against tests/fake_cuda, on a backend of the host that says that its
 * memory is a device's. */
#include "dist/experts_cases.h"
#include "dist/comm_cases.h"
#include "dist/pipeline_cases.h"
#include "dist/steps_cases.h"
#include "par/nccl_api.h"

#include <cuda.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

_Atomic int64_t fake_not_ready;
_Thread_local cudaError_t fake_last_error;

/* A stream that does things at once waits at once, as the callers' thread; who waits long leaves
 * the cores to the ranks that it waits for. */
static CUresult wait_value(CUstream stream, CUdeviceptr at, cuuint32_t least, unsigned flags) {
  _Atomic uint32_t *counter = (_Atomic uint32_t *)at;
  (void)stream, (void)flags;
  for (int asked = 0; (int32_t)(atomic_load(counter) - least) < 0; asked++) {
    if (asked < 100)
      sched_yield();
    else
      nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  }
  return CUDA_SUCCESS;
}

static CUresult write_value(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned flags) {
  (void)stream, (void)flags;
  atomic_store((_Atomic uint32_t *)at, value);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **fn, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  (void)version, (void)flags;
  *found = cudaDriverEntryPointSuccess;
  if (strcmp(name, "cuStreamWaitValue32") == 0)
    *(CUresult(**)(CUstream, CUdeviceptr, cuuint32_t, unsigned))fn = wait_value;
  else
    *(CUresult(**)(CUstream, CUdeviceptr, cuuint32_t, unsigned))fn = write_value;
  return cudaSuccess;
}

static size_t some_memory(const struct mt_backend *be) {
  (void)be;
  return 1;
}

static void gradients_float32(void **state) {
  (void)state;
  gradients_on_every_mesh("fp32", true, 2e-5, 2e-5);
}

static void tokens_in_eight_bits(void **state) {
  (void)state;
  dispatch_in_eight_bits_on_every_mesh("mxfp8");
}

static void other_weights(void **state) {
  (void)state;
  other_weights_are_seen("bf16");
}

static void auxiliary_loss_float32(void **state) {
  (void)state;
  auxiliary_loss_is_of_all("fp32", 1e-6);
}

static void steps_float32(void **state) {
  (void)state;
  steps_on_every_mesh("fp32", (struct near){1e-5, 1e-5, 1e-4, true, true});
}

static void steps_cut_over_the_ranks(void **state) {
  (void)state;
  cut_steps_on_every_mesh((const char *const[]){"bf16-states", "mxfp8"}, 2);
}

/* Messages in groups, each waited for at once. */
static void stages_float32(void **state) {
  (void)state;
  stages_on_every_mesh("fp32", (struct near){1e-5, 5e-5, 1e-4, true, true});
}

/* With one reader the same bits. With several, sums over rows are rounded otherwise, which sends a
 * token elsewhere now and then; what follows from that grows with the steps. */
static void stages_bf16(void **state) {
  (void)state;
  worst_stage = 0;
  steps_compared = 4;
  struct near same = {1e-12, 1e-6, 0, true, true}, many = {1e-3, 2e-2, 0.3, false, true};
  bool one_reader = world.size <= STAGE_LAYERS && world.size != 4; /* 4: pp 2 has two */
  stages_on_every_mesh("bf16", one_reader ? same : many);
  steps_compared = STEPS;
  print_message("  off by %.1e of what moved, at most\n", worst_stage);
}

static void ranks_need_gpus_of_their_own(void **state) {
  (void)state;
  struct mt_world w = {.rank = 9, .size = 12, .local_rank = 3, .local_size = 6};
  int device;
  OK(mt_world_gpu(&w, 6, &device));
  assert_int_equal(device, 3);
  OK(mt_world_gpu(&w, 2, &device));
  assert_int_equal(device, 1);
  assert_int_equal(unsetenv("MOETUNE_SHARED_GPU"), 0);
  assert_int_equal(mt_world_gpu(&w, 2, &device), MT_EINVAL);
  assert_non_null(strstr(mt_error_message(), "6 ranks on a host of 2 GPUs"));
  assert_int_equal(setenv("MOETUNE_SHARED_GPU", "1", 1), 0);
}

/* What is not done yet, be it that somebody waits for it or that no more can be under way, is no
 * error that the next launch of a kernel would find. */
static void not_yet_is_no_error(void **state) {
  (void)state;
  enum { MANY = 300, NOT_READY = 200 };
  static struct mt_comm c;
  int64_t parts[32];
  struct mt_transfer t[MANY];
  if (world.size == 1) skip();
  assert_true(2 * (size_t)world.size <= sizeof parts / sizeof *parts);
  for (int i = 0; i < world.size; i++) parts[i] = 1, parts[world.size + i] = i;
  OK(mt_comm_device(&everyone, &dist_be, &c));
  assert_int_equal(cudaGetLastError(), cudaSuccess);
  fake_not_ready = NOT_READY;
  OK(mt_comm_barrier(&c));
  assert_int_equal(cudaGetLastError(), cudaSuccess);
  struct both b = both((size_t)world.size, 0);
  fake_not_ready = NOT_READY;
  for (int i = 0; i < MANY; i++)
    OK(mt_comm_all_gather(&c, b.dev, (struct mt_parts){parts, parts + world.size}, 1, &t[i]));
  assert_true(fake_not_ready <= 0); /* there was no room for so many */
  assert_int_equal(cudaGetLastError(), cudaSuccess);
  OK(mt_comm_barrier(&c));
  done_with(b);
  mt_comm_destroy(&c);
}

/* The time-out is of what others take: what this rank's own stream takes to come to a transfer, all
 * micro-batches of a step perhaps, is not. */
static void own_work_is_no_time_out(void **state) {
  (void)state;
  static struct mt_comm c;
  int64_t parts[32];
  struct mt_transfer t;
  if (world.size == 1) skip();
  assert_true(2 * (size_t)world.size <= sizeof parts / sizeof *parts);
  for (int i = 0; i < world.size; i++) parts[i] = 1, parts[world.size + i] = i;
  OK(mt_comm_device(&everyone, &dist_be, &c));
  struct both b = both((size_t)world.size, 0);
  OK(mt_comm_barrier(&c));
  c.timeout_s = 0.3;
  fake_not_ready = INT64_MAX;
  OK(mt_comm_all_gather(&c, b.dev, (struct mt_parts){parts, parts + world.size}, 1, &t));
  nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
  OK(mt_comm_failed(&c));
  fake_not_ready = 0;
  OK(mt_comm_wait(&c, &t));
  OK(mt_comm_barrier(&everyone));
  done_with(b);
  mt_comm_destroy(&c);
}

/* Who is late for the start finds the others gone, and what starts beside them writes to nothing of
 * theirs (the sanitizers see it). */
static void a_late_start(void **state) {
  (void)state;
  struct mt_nccl_api api = mt_nccl_substitute();
  struct mt_nccl_id id;
  mt_nccl_comm late;
  struct mt_comm c;
  double timeout_s = everyone.timeout_s;
  if (world.size == 1) skip();
  if (world.rank == 0) {
    everyone.timeout_s = 0.5;
    assert_int_equal(mt_comm_device(&everyone, &dist_be, &c), MT_ECOMM);
    everyone.timeout_s = timeout_s;
    assert_non_null(strstr(mt_error_message(), "NCCL's substitute not started after"));
  } else {
    OK(mt_comm_broadcast(&everyone, &id, sizeof id, 0));
    nanosleep(&(struct timespec){.tv_sec = 2}, NULL);
    assert_int_equal(api.CommInitRank(&late, world.size, id, world.rank), MT_NCCL_SUCCESS);
  }
  OK(mt_comm_barrier(&everyone));
  nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL); /* rank 0's start ends now, too */
}

/* NCCL wants all ranks of a host for its end, too: who comes alone, because of an error, does not
 * wait for the others. */
static void an_end_alone(void **state) {
  (void)state;
  static struct mt_comm c;
  struct timespec begin, end;
  bool over;
  if (world.size == 1) skip();
  OK(mt_comm_device(&everyone, &dist_be, &c));
  OK(mt_comm_barrier(&c));
  if (world.rank != 0) nanosleep(&(struct timespec){.tv_sec = 3}, NULL);
  clock_gettime(CLOCK_MONOTONIC, &begin);
  OK(mt_comm_settle(&c, world.rank == 0 ? 0.2 : 60, &over));
  assert_int_equal(over, world.rank != 0);
  mt_comm_destroy(&c);
  clock_gettime(CLOCK_MONOTONIC, &end);
  assert_true(world.rank != 0 || end.tv_sec - begin.tv_sec <= 2);
  OK(mt_comm_barrier(&everyone));
}

/* Streams do what they are given at once, but for what steps_cases.h puts off. */
static void on_any_stream(struct mt_backend *be, void *stream) {
  (void)be, (void)stream;
  OK(all_happen(NULL));
}

static const struct CMUnitTest tests[] = {COMM_CASES,
                                          cmocka_unit_test(gradients_float32),
                                          cmocka_unit_test(tokens_in_eight_bits),
                                          cmocka_unit_test(auxiliary_loss_float32),
                                          cmocka_unit_test(other_weights),
                                          cmocka_unit_test(steps_float32),
                                          cmocka_unit_test(steps_cut_over_the_ranks),
                                          cmocka_unit_test(stages_float32),
                                          cmocka_unit_test(stages_bf16),
                                          cmocka_unit_test(not_yet_is_no_error),
                                          cmocka_unit_test(own_work_is_no_time_out),
                                          cmocka_unit_test(a_late_start),
                                          cmocka_unit_test(an_end_alone),
                                          cmocka_unit_test(ranks_need_gpus_of_their_own)};

int main(void) {
  if (setenv("MOETUNE_SHARED_GPU", "1", 1) != 0 || dist_open()) return 1;
  OK(mt_backend_cpu_create(&dist_be, 1));
  dist_be.memory_used = some_memory;
  dist_be.on_stream = on_any_stream;
  DIST_RUN(tests);
}
