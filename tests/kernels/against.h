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
static void workspace_for(struct mt_backend *be, const struct mt_recipe *recipe,
                          const struct size *z, bool poisoned) {
  bool large = z->t > 256;
  static void *garbage;
  static size_t garbage_bytes;
  struct mt_limits l = {.tokens = large ? 1024 : 256,
                        .rows = large ? 2048 : 768,
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
  } else if (!poisoned) {
    return;
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
  bool kept_types;   /* the formats of gradients or states had a part in it */
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
  workspace_for(be, c.recipe, &sizes[size], true);
  cases[op].run(&c, &sizes[size], acc);
  release_all(&c);
  return (struct outcome){c.worst, c.worst_name, c.kept_types};
}

/* bf16-states is bf16 but for gradients and states: what has neither is held against the reference
 * there, at all sizes, and here at the smallest alone. */
static void against_reference(const char *backend, const char *recipe) {
  double tolerance = mt_recipe_find(recipe)->op_tolerance;
  bool states_only = strcmp(recipe, "bf16-states") == 0;
  int failures = 0;
  for (int op = 0; op < CASES; op++) {
    double worst = 0;
    bool kept_types = false;
    for (int size = 0; size < SIZES; size++) {
      if (size > 0 && states_only && !kept_types) break;
      for (int acc = 0; acc < 2; acc++) {
        struct outcome o = run_case(backend, 2, recipe, op, size, acc, 0);
        kept_types |= o.kept_types;
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

/* The bits of a case's outputs, of whatever it found in the workspace where that is not poisoned.
 */
static inline uint64_t bits_of(const char *backend, int threads, const struct mt_recipe *recipe,
                               int op, const struct size *z, int acc, bool poisoned,
                               bool *kept_types) {
  struct mt_backend *be = opened(backend, threads);
  struct bench_case c = {.be = be, .recipe = recipe, .bits_only = true};
  OK(mt_backend_ref_create(&c.ref_be));
  c.rng = mt_rng_make((uint64_t)op, 2);
  workspace_for(be, recipe, z, poisoned);
  cases[op].run(&c, z, acc);
  release_all(&c);
  *kept_types = c.kept_types;
  return c.bits;
}

/* Same inputs: the same bits from run to run, and on a host whatever the thread count. At ragged
 * sizes and at large ones, where many blocks or threads meet in a sum: one whose order they race
 * for shows there. The reference makes operands but no results: it took nearly all of the time. */
static inline void repeats_its_bits(const char *backend) {
  static const char *const recipes[] = {"fp32", "bf16", "bf16-states"};
  const struct size *const sides[] = {&sizes[3], &large_size};
  bool host = strncmp(backend, "cuda", 4) != 0;
  for (int i = 0; i < 6; i++) {
    const struct mt_recipe *recipe = mt_recipe_find(recipes[i / 2]);
    const struct size *z = sides[i % 2];
    for (int way = 0; way < 2 * CASES; way++) {
      int op = way / 2;
      bool kept;
      uint64_t first = bits_of(backend, 2, recipe, op, z, way % 2, true, &kept);
      if (strcmp(recipe->name, "bf16-states") == 0 && !kept) continue; /* as in bf16 */
      for (int run = 1; run < 3; run++) {
        if (bits_of(backend, 2, recipe, op, z, way % 2, false, &kept) != first)
          fail_msg("%s %s, %d tokens, differs from run to run", cases[op].name, recipe->name, z->t);
      }
      if (host && bits_of(backend, 1, recipe, op, z, way % 2, true, &kept) != first)
        fail_msg("%s %s, %d tokens, depends on threads", cases[op].name, recipe->name, z->t);
    }
  }
}

#endif
