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

#include "par/world.h"

static struct mt_world world;

#define OK(call)                                                                                   \
  do {                                                                                             \
    mt_err ok_err_ = (call);                                                                       \
    if (ok_err_) fail_msg("rank %d: %s: %s", world.rank, #call, mt_error_message());               \
  } while (0)

/* A rank that fails brings the others down: they would wait for it. */
#define DIST_MAIN(tests)                                                                           \
  int main(void) {                                                                                 \
    if (mt_world_open(&world, 60)) {                                                               \
      fprintf(stderr, "%s\n", mt_error_message());                                                 \
      return 1;                                                                                    \
    }                                                                                              \
    if (world.rank != 0 && !freopen("/dev/null", "w", stdout)) return 1;                           \
    int failed = cmocka_run_group_tests(tests, NULL, NULL);                                        \
    if (failed) mt_world_abort(&world, "tests failed");                                            \
    mt_world_close(&world);                                                                        \
    return failed;                                                                                 \
  }

#endif
