/* Every operation of a backend against the float64 reference, on fresh random inputs, ragged sizes,
 * poisoned outputs, in a storage format. */
#ifndef TESTS_KERNELS_AGAINST_H
#define TESTS_KERNELS_AGAINST_H

#include "kernels/backend_cases.h"

/* One row an operation, from the list itself: one without a case does not compile. */
static const struct {
  const char *name;
  void (*run)(struct bench_case *c, const struct size *z, int acc);
} cases[] = {
#define X(op) {#op, case_##op},
    MT_OP_LIST(X)
#undef X
};
enum { CASES = sizeof cases / sizeof *cases };

/* Room for a case of any size, NaN throughout: what an operation reads there it must have written.
 * It stays from case to case, and so do the NaNs on the host: both are tens of megabytes on a GPU.
 */
static void workspace_for(struct mt_backend *be, const struct mt_recipe *recipe) {
  static void *garbage;
  static size_t garbage_bytes;
  struct mt_limits l = {.tokens = 256,
                        .rows = 768,
                        .hidden = 256,
                        .ffn = 256,
                        .experts = 16,
                        .top_k = 3,
                        .vocab = 512,
                        .heads = 16,
                        .kv_heads = 2,
                        .head_dim = 128,
                        .act = recipe->act,
                        .qformat = MT_Q_MXFP8};
  size_t bytes = be->workspace_bytes(be, &l);
  if (bytes != be->workspace_size_bytes) {
    be->mem_free(be, be->workspace, be->workspace_size_bytes);
    be->workspace_size_bytes = bytes;
    OK(be->mem_alloc(be, bytes, &be->workspace));
  }
  if (bytes > garbage_bytes) {
    free(garbage);
    garbage = malloc(bytes);
    assert_non_null(garbage);
    memset(garbage, 0xff, bytes);
    garbage_bytes = bytes;
  }
  OK(be->upload(be, be->workspace, garbage, bytes));
}

struct outcome {
  double error;
  const char *worst; /* the output that it was seen in */
  uint64_t bits;
};

/* A backend of this name that stays open until another is asked for: opening one on a GPU takes
 * longer than a case. */
static struct mt_backend *opened(const char *backend, int threads) {
  static struct mt_backend be;
  static char name[32];
  if (strcmp(name, backend) != 0 || be.thread_count != threads) {
    if (be.workspace) be.mem_free(&be, be.workspace, be.workspace_size_bytes);
    mt_backend_destroy(&be);
    OK(mt_backend_create(&be, backend, threads));
    be.thread_count = threads;
    snprintf(name, sizeof name, "%s", backend);
  }
  return &be;
}

static struct outcome run_case(const char *backend, int threads, const char *recipe, int op,
                               int size, int acc, double plant) {
  struct mt_backend *be = opened(backend, threads);
  struct bench_case c = {.be = be, .recipe = mt_recipe_find(recipe), .plant = plant};
  OK(mt_backend_ref_create(&c.ref_be));
  assert_non_null(c.recipe);
  c.rng = mt_rng_make((uint64_t)(op * 100 + size), 1);
  workspace_for(be, c.recipe);
  cases[op].run(&c, &sizes[size], acc);
  release_all(&c);
  return (struct outcome){c.worst, c.worst_name, c.bits};
}

static void against_reference(const char *backend, const char *recipe) {
  double tolerance = mt_recipe_find(recipe)->op_tolerance;
  int failures = 0;
  for (int op = 0; op < CASES; op++) {
    double worst = 0;
    for (int size = 0; size < SIZES; size++) {
      for (int acc = 0; acc < 2; acc++) {
        struct outcome o = run_case(backend, 2, recipe, op, size, acc, 0);
        worst = fmax(worst, o.error);
        if (o.error <= tolerance) continue;
        print_error("%s %s %s size %d way %d: %s is off by %.3g (tolerance %.1g)\n", backend,
                    recipe, cases[op].name, size, acc, o.worst, o.error, tolerance);
        failures++;
      }
    }
    print_message("  %-5s %-5s %-16s worst error %.2e of %.0e\n", backend, recipe, cases[op].name,
                  worst, tolerance);
  }
  assert_int_equal(failures, 0);
}

/* One element off by 1% of its size (a wrong scale, a dropped term) must be seen in every operation
 * and format. */
static inline void rejects_a_planted_bug(const char *backend) {
  const char *const recipes[] = {"fp32", "bf16"};
  for (int op = 0; op < CASES; op++) {
    for (int i = 0; i < 2; i++) {
      double tolerance = mt_recipe_find(recipes[i])->op_tolerance;
      double error = run_case(backend, 2, recipes[i], op, 2, 1, 0.01).error;
      if (error <= tolerance) fail_msg("%s %s: a planted bug passed", cases[op].name, recipes[i]);
    }
  }
}

/* Same inputs: the same bits from run to run, and on a host whatever the thread count. */
static inline void repeats_its_bits(const char *backend) {
  static const char *const recipes[] = {"fp32", "bf16", "bf16-states"};
  for (int op = 0; op < CASES; op++) {
    for (int way = 0; way < 6; way++) {
      const char *recipe = recipes[way / 2];
      uint64_t first = run_case(backend, 2, recipe, op, 3, way % 2, 0).bits;
      uint64_t again = run_case(backend, 2, recipe, op, 3, way % 2, 0).bits;
      if (again != first) fail_msg("%s %s differs from run to run", cases[op].name, recipe);
      if (strncmp(backend, "cuda", 4) == 0) continue;
      uint64_t single = run_case(backend, 1, recipe, op, 3, way % 2, 0).bits;
      if (single != first) fail_msg("%s %s depends on threads", cases[op].name, recipe);
    }
  }
}

#endif
