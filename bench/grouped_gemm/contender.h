/* What a way of making grouped products shows to bench/grouped_gemm.cu. */
#ifndef MT_BENCH_CONTENDER_H
#define MT_BENCH_CONTENDER_H

#include "kernels/cuda/cuda.h"

enum { GROUPS_MOST = 128 };

struct test {
  struct mt_cuda_grouped p;
  int32_t offsets[GROUPS_MOST + 1]; /* p.offsets as the host knows them; no model has that */
};

/* prepare: what does not depend on the operands' values, outside of the clock; *state NULL: this
 * product is not among what it takes. run: launches on the backend's stream. describe: a word about
 * what prepare chose, or NULL. */
struct contender {
  char letter;
  const char *name;
  mt_err (*prepare)(struct mt_backend *be, const struct test *t, void **state);
  mt_err (*run)(struct mt_backend *be, const struct test *t, void *state);
  void (*release)(void *state);
  const char *(*describe)(const void *state);
};

/* A contender that this build has not: name NULL. */
extern const struct contender bench_lt_loop, bench_lt_streams, bench_cublas_grouped, bench_cutlass;

/* Group g's part of a grouped product as a dense one. */
struct mt_cuda_product bench_product_of(const struct test *t, int g);
/* wgrad, = : zeros for groups without rows, which libraries leave out. */
mt_err bench_zero_empty(struct mt_backend *be, const struct test *t);

#endif
