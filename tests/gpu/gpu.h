/* Tests that need an NVIDIA GPU: without one they say so and exit 77, which CTest shows as skipped.
 * MOETUNE_TEST=PATTERN in the environment runs the matching tests of a program alone. */
#ifndef TESTS_GPU_GPU_H
#define TESTS_GPU_GPU_H

#include <stdio.h>
#include <stdlib.h>

#include "kernels/registry.h"

enum { GPU_SKIPPED = 77 };

#define GPU_OR_SKIP()                                                                              \
  do {                                                                                             \
    if (mt_cuda_device_count() == 0) {                                                             \
      printf("skipped: no NVIDIA GPU is visible, or this build has no CUDA\n");                    \
      return GPU_SKIPPED;                                                                          \
    }                                                                                              \
    if (getenv("MOETUNE_TEST")) cmocka_set_test_filter(getenv("MOETUNE_TEST"));                    \
  } while (0)

#endif
