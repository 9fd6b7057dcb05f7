/* Steps of many ranks against those of one rank that has all their batches as one: losses, norms,
 * loads and parameters after ten updates with clipping, accumulation, uneven routing, the auxiliary
 * loss, and ranks whose batch is small. And the same bits twice. */
#ifndef TESTS_DIST_STEPS_CASES_H
#define TESTS_DIST_STEPS_CASES_H

#include "dist/steps.h"

enum { MICRO = 2 };

static double worst_step; /* of all comparisons of parameters so far */

/* Bytes of a sync class's stretch of the gradients, as they are summed. */
static int64_t class_bytes(const struct mt_model *m, enum mt_sync sync) {
  char *begin = NULL, *end = NULL;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (p->sync != sync) continue;
    if (!begin) begin = p->grad.data;
    end = (char *)p->grad.data + mt_bytes(&p->grad);
  }
  int64_t unit = MT_BUCKET_UNIT * (int64_t)mt_dtype_bytes(m->recipe->grad);
  return (end - begin + unit - 1) / unit * unit;
}

/* What docs/parallelism.md says leaves the ranks for the gradients of n of them: (n-1)/n of the
 * bytes each when the parts go out, so (n-1) times them in all; and as many when the sums come
 * back. */
static void bytes_are_those_of_the_formulas(struct run *mine, struct mt_ranks *r) {
  const struct mt_comm *dense = r->tensor[MT_GROUP_DENSE], *data = r->tensor[MT_GROUP_DATA];
  int64_t sent[] = {dense->sent[MT_COMM_ALL_TO_ALL].bytes, data->sent[MT_COMM_ALL_TO_ALL].bytes,
                    data->sent[MT_COMM_ALL_GATHER].bytes +
                        r->late[MT_SYNC_EXPERT].sent[MT_COMM_ALL_GATHER].bytes};
  int64_t d = class_bytes(&mine->m, MT_SYNC_DENSE), x = class_bytes(&mine->m, MT_SYNC_EXPERT);
  OK(mt_ranks_sum_counts(r, sent, 3));
  assert_int_equal(sent[0], STEPS * d * (dense->size - 1));
  for (int i = 1; i < 3; i++) assert_int_equal(sent[i], STEPS * x * (data->size - 1) * r->mesh.ep);
}

/* How gradients and state are cut, and which earlier run must have had the same bits. */
static const struct {
  int zero;
  int64_t bucket_elements; /* 1000: several a class, cut through parameters */
  int same_as;
} cuts[] = {{0, 0, -1}, {0, 0, 0}, {0, 1000, -1}, {1, 0, 0}, {1, 1000, 2}};
static int cuts_run = (int)(sizeof cuts / sizeof *cuts);

static void steps_equal_to_one(const char *recipe, struct mt_model_options options, int ep,
                               struct near near) {
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct numbers want, got[sizeof cuts / sizeof *cuts];
  OK(mt_mesh_make(&c, world.size, world.rank, ep, 1, &mesh));
  struct mt_shard shard = mt_ranks_shard(&mesh);
  struct run whole, before, mine;
  options.aux_coef = 0.1;
  options.z_coef = 0.05;
  struct mt_model_options wide = options;
  wide.token_capacity = RANKS_MOST * SMALL_TOKENS;
  wide.sequence_capacity = RANKS_MOST * SMALL_SEQUENCES;
  open_run(&before, recipe, options, &c, NULL);
  small_weights(&before.m, 3);
  open_run(&whole, recipe, wide, &c, NULL);
  take_weights(&whole, &before);
  run_alone(&whole, world.size, MICRO, &want);
  options.sharers = mt_ranks_sharers(&mesh);
  for (int run = 0; run < cuts_run; run++) {
    struct mt_ranks ranks;
    options.zero = cuts[run].zero;
    options.bucket_elements = cuts[run].bucket_elements;
    open_run(&mine, recipe, options, &c, &shard);
    take_weights(&mine, &before);
    OK(mt_ranks_open(&ranks, &world, &mesh));
    OK(mt_ranks_join(&ranks, &mine.m));
    run_together(&mine, &ranks, MICRO, &got[run]);
    same_numbers(&got[run], &want, near);
    if (cuts[run].same_as >= 0)
      assert_memory_equal(got[run].loss, got[cuts[run].same_as].loss, sizeof got[run].loss);
    bytes_are_those_of_the_formulas(&mine, &ranks);
    double off = parameters_off(&mine, &whole, &before);
    if (off > worst_step) worst_step = off;
    if (!(off <= near.parameters)) fail_msg("parameters are off by %.2g of what they moved", off);
    mt_ranks_close(&ranks);
    close_run(&mine);
  }
  close_run(&whole);
  close_run(&before);
}

static void steps_on_every_mesh(const char *recipe, struct near near) {
  static const struct mt_model_options ways[] = {
      {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true},
      {.experts = MT_EXPERTS_LOOP,
       .blocks = MT_BLOCKS_FUSED,
       .recompute = MT_RECOMPUTE_MLP,
       .training = true,
       .chunks = 3}};
  for (int ep = 1; ep <= world.size; ep++) {
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    for (int i = 0; i < (near.loops ? 2 : 1); i++) steps_equal_to_one(recipe, ways[i], ep, near);
    if (ep == 1) continue;
    struct mt_model_options chunked = ways[0];
    chunked.chunks = 4;
    int cuts_of_all = cuts_run;
    cuts_run = 2; /* the same bits twice */
    steps_equal_to_one(recipe, chunked, ep, near);
    cuts_run = cuts_of_all;
  }
}

#endif
