/* Ranks on GPUs: every call of their communicators, experts over ranks, steps and stages, over NCCL
 * where each rank has a GPU, and over its substitute where they must share one. With more than two
 * ranks in brief (dist.h). MOETUNE_TEST=PATTERN runs the matching cases alone; each says how long
 * it took. */
#include "dist/comm_cases.h"
#include "dist/experts_cases.h"
#include "dist/pipeline_cases.h"
#include "dist/steps_cases.h"

/* bf16 against bf16: what a row gives does not depend on where it is worked out, sums over rows do.
 */
static void gradients(void **state) {
  (void)state;
  gradients_on_every_mesh("fp32", true, 1e-5, 1e-6);
  print_message("  fp32: off by %.1e at most\n", worst);
  worst = 0;
  gradients_on_every_mesh("bf16", false, 1e-5, 1e-6);
  print_message("  bf16: off by %.1e at most\n", worst);
}

static void tokens_in_eight_bits(void **state) {
  (void)state;
  dispatch_in_eight_bits_on_every_mesh("mxfp8");
  dispatch_in_eight_bits_on_every_mesh("fp8");
}

static void auxiliary_loss(void **state) {
  (void)state;
  auxiliary_loss_is_of_all("fp32", 1e-5);
  auxiliary_loss_is_of_all("bf16", 1e-2);
}

static void steps_float32(void **state) {
  (void)state;
  cuts_run = 4; /* whole gradients beside backward and behind it, --zero 1 and 2; the rest by
                   test_shared */
  steps_on_every_mesh("fp32", (struct near){1e-6, 1e-5, 1e-4, true, true});
  print_message("  off by %.1e of what moved, at most\n", worst_step);
}

static void steps_bf16(void **state) {
  (void)state;
  worst_step = 0;
  cuts_run = 4;
  steps_on_every_mesh("bf16", (struct near){1e-5, 1e-4, 1e-3, false, false});
  print_message("  off by %.1e of what moved, at most\n", worst_step);
}

static void other_weights(void **state) {
  (void)state;
  other_weights_are_seen("bf16");
  if (!brief) other_weights_are_seen("fp8");
}

/* Whatever ranks cut among them, the same bits. */
static void steps_cut_over_the_ranks(void **state) {
  (void)state;
  cut_steps_on_every_mesh((const char *const[]){"bf16-states", "fp8", "fp8-states"}, 3);
}

/* Both orders, one a way of recomputing, and sharded state and gradients. */
static void stages_float32(void **state) {
  (void)state;
  orders_run = 4;
  stages_on_every_mesh("fp32", (struct near){1e-5, 5e-5, 1e-4, true, true});
  print_message("  off by %.1e of what moved, at most\n", worst_stage);
}

/* As in test_shared: a token goes elsewhere now and then, and the steps behind it with it. */
static void stages_bf16(void **state) {
  (void)state;
  int compared = steps_compared;
  worst_stage = 0;
  orders_run = brief ? 3 : 4;
  steps_compared = 4;
  stages_on_every_mesh("bf16", (struct near){1e-3, 2e-2, 0.3, false, true});
  steps_compared = compared;
  print_message("  off by %.1e of what moved, at most\n", worst_stage);
}

#ifdef MOETUNE_WITH_CUDA
#include "par/nccl_api.h"

/* NCCL by itself, where this rank is alone: what it sends to itself in a group arrives. */
static void nccl_is_called_as_it_wants(void **state) {
  (void)state;
  enum { N = 1 << 20 };
  struct mt_nccl_api api;
  struct mt_nccl_id id;
  mt_nccl_comm comm;
  if (world.size > 1 || mt_nccl_shared()) skip();
  if (mt_nccl_load(&api)) { /* there is none on this machine, or there is something wrong with it */
    if (getenv("MOETUNE_NCCL") || !strstr(mt_error_message(), "several GPUs need NCCL"))
      fail_msg("%s", mt_error_message());
    skip();
  }
  struct both from = both(N, 0x5a), to = both(N, 0);
  there(from);
  there(to);
  OK(dist_be.sync(&dist_be));
  assert_int_equal(api.GetUniqueId(&id), MT_NCCL_SUCCESS);
  assert_int_equal(api.CommInitRank(&comm, 1, id, 0), MT_NCCL_SUCCESS);
  assert_int_equal(api.GroupStart(), MT_NCCL_SUCCESS);
  assert_int_equal(api.Send(from.dev, N, MT_NCCL_BYTES, 0, comm, dist_be.stream), MT_NCCL_SUCCESS);
  assert_int_equal(api.Recv(to.dev, N, MT_NCCL_BYTES, 0, comm, dist_be.stream), MT_NCCL_SUCCESS);
  assert_int_equal(api.GroupEnd(), MT_NCCL_SUCCESS);
  here(to);
  assert_memory_equal(to.host, from.host, N);
  int error = -1;
  assert_int_equal(api.CommGetAsyncError(comm, &error), MT_NCCL_SUCCESS);
  assert_int_equal(error, MT_NCCL_SUCCESS);
  assert_int_equal(api.CommDestroy(comm), MT_NCCL_SUCCESS);
  done_with(from);
  done_with(to);
}
#else
static void nccl_is_called_as_it_wants(void **state) {
  (void)state;
  skip();
}
#endif

static const struct CMUnitTest tests[] = {cmocka_unit_test(nccl_is_called_as_it_wants),
                                          cmocka_unit_test(test_every_call),
                                          cmocka_unit_test(gradients),
                                          cmocka_unit_test(tokens_in_eight_bits),
                                          cmocka_unit_test(auxiliary_loss),
                                          cmocka_unit_test(other_weights),
                                          cmocka_unit_test(steps_float32),
                                          cmocka_unit_test(steps_bf16),
                                          cmocka_unit_test(steps_cut_over_the_ranks),
                                          cmocka_unit_test(stages_float32),
                                          cmocka_unit_test(stages_bf16),
                                          cmocka_unit_test(test_time_out)};
DIST_GPU_MAIN(tests)
