/* Experts over ranks: each rank with a batch of its own, against one rank that takes all batches
 * one after another. Losses, gradients of dense parameters (summed over ranks) and of experts. */
#include "dist/sharded.h"
#include "par/exchange.h"

enum { PASSES = 2 };

/* Relative L2 of mine, at rows from `first` on, against all. */
static double off_by(const struct mt_param *whole, const double *mine, int64_t first, int64_t n) {
  double d = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    double want = at(&whole->grad, first + i);
    d += (mine[i] - want) * (mine[i] - want);
    norm += want * want;
  }
  return sqrt(d) / (sqrt(norm) + 1e-12);
}

/* A gradient, summed over the members of c in their order. */
static double *summed(struct mt_comm *c, const struct mt_param *p) {
  int64_t n = mt_param_count(p), start[16], count[16];
  double *all = calloc((size_t)(n * c->size), sizeof *all);
  assert_non_null(all);
  for (int r = 0; r < c->size; r++) count[r] = n, start[r] = r * n;
  for (int64_t i = 0; i < n; i++) all[c->rank * n + i] = at(&p->grad, i);
  OK(mt_comm_all_gather(c, all, (struct mt_parts){count, start}, sizeof *all, NULL));
  for (int r = 1; r < c->size; r++) {
    for (int64_t i = 0; i < n; i++) all[i] += all[r * n + i];
  }
  return all;
}

/* The passes of all readers in one model. The auxiliary loss joins the batches of one pass, so here
 * it is left out. */
static double alone(struct run *whole, int readers) {
  struct mt_loss loss;
  double sum = 0;
  for (int pass = 0; pass < PASSES; pass++) {
    for (int r = 0; r < readers; r++) {
      struct small_batch b;
      batch_of(&b, whole->m.config.vocab, r, pass);
      struct mt_pass p = {.batch = &b.b, .loss_scale = 0.05, .accumulate = pass + r > 0};
      OK(mt_model_train_pass(&whole->m, &p, &loss));
      sum += loss.cross_entropy_sum;
    }
  }
  return sum;
}

static void compare(const struct run *mine, const struct run *whole, struct mt_comm *data,
                    struct mt_comm *dense, double bound) {
  for (int i = 0; i < mine->m.params.count; i++) {
    const struct mt_param *p = &mine->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    double *g = summed(p->sync == MT_SYNC_EXPERT ? data : dense, p);
    int64_t n = mt_param_count(p);
    double off = off_by(w, g, p->first * (mt_param_count(w) / w->dim[0]), n);
    if (!(off <= bound)) fail_msg("rank %d: %s is off by %.2g", world.rank, p->name, off);
    free(g);
  }
}

static void equal_to_one(const char *recipe, struct mt_model_options options, int ep,
                         double bound) {
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct mt_comm expert, data, dense;
  OK(mt_mesh_make(&c, world.size, world.rank, ep, 1, &mesh));
  OK(mt_world_group(&world, &mesh, MT_GROUP_EXPERT, &expert));
  OK(mt_world_group(&world, &mesh, MT_GROUP_DATA, &data));
  OK(mt_world_group(&world, &mesh, MT_GROUP_DENSE, &dense));
  struct mt_shard shard = {(int)mesh.expert_begin, (int)mesh.expert_end};
  struct run whole, mine;
  open_run(&whole, recipe, options, &c, NULL);
  small_weights(&whole.m, 3);
  open_run(&mine, recipe, options, &c, &shard);
  take_weights(&mine, &whole);
  OK(mt_exchange_over(&mine.m, &expert, &dense));
  double want = alone(&whole, mesh.dp * mesh.ep), got = 0;
  for (int pass = 0; pass < PASSES; pass++) {
    struct small_batch b;
    struct mt_loss loss;
    batch_of(&b, c.vocab, mt_mesh_reader(&mesh), pass);
    struct mt_pass p = {.batch = &b.b, .loss_scale = 0.05, .accumulate = pass > 0};
    OK(mt_model_train_pass(&mine.m, &p, &loss));
    got += loss.cross_entropy_sum;
  }
  double sums[16];
  int64_t start[16], count[16];
  for (int r = 0; r < dense.size; r++) start[r] = r, count[r] = 1;
  sums[dense.rank] = got;
  OK(mt_comm_all_gather(&dense, sums, (struct mt_parts){count, start}, sizeof *sums, NULL));
  got = 0;
  for (int r = 0; r < dense.size; r++) got += sums[r];
  if (!(fabs(got - want) <= bound * fabs(want))) fail_msg("loss %.12g, alone %.12g", got, want);
  compare(&mine, &whole, &data, &dense, bound);
  mt_exchange_close(&mine.m);
  close_run(&mine);
  close_run(&whole);
  mt_comm_destroy(&expert);
  mt_comm_destroy(&data);
  mt_comm_destroy(&dense);
}

static const struct mt_model_options ways[] = {
    {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true},
    {.experts = MT_EXPERTS_GROUPED,
     .blocks = MT_BLOCKS_UNFUSED,
     .recompute = MT_RECOMPUTE_MLP,
     .training = true},
    {.experts = MT_EXPERTS_LOOP, .blocks = MT_BLOCKS_FUSED, .training = true},
    {.experts = MT_EXPERTS_LOOP,
     .blocks = MT_BLOCKS_UNFUSED,
     .recompute = MT_RECOMPUTE_FULL,
     .training = true},
};

static void on_every_mesh(const char *recipe, double bound) {
  for (int ep = 1; ep <= world.size; ep++) {
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++)
      equal_to_one(recipe, ways[i], ep, bound);
  }
}

static void reference_equals_one_rank(void **state) {
  (void)state;
  on_every_mesh("fp64", 1e-12);
}

static void float32_equals_one_rank(void **state) {
  (void)state;
  on_every_mesh("fp32", 2e-5);
}

/* The auxiliary loss and its gradient do not depend on who holds which tokens: every rank has the
 * same one, and it is that of all batches as one. */
static void auxiliary_loss_is_of_all_tokens(void **state) {
  (void)state;
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct mt_comm expert, dense;
  if (world.size > EXPERTS || EXPERTS % world.size != 0) skip();
  OK(mt_mesh_make(&c, world.size, world.rank, world.size, 1, &mesh));
  OK(mt_world_group(&world, &mesh, MT_GROUP_EXPERT, &expert));
  OK(mt_world_group(&world, &mesh, MT_GROUP_DENSE, &dense));
  struct mt_shard shard = {(int)mesh.expert_begin, (int)mesh.expert_end};
  struct mt_model_options o = ways[0];
  o.aux_coef = 0.1;
  o.z_coef = 0.05;
  struct run whole, mine;
  open_run(&whole, "fp64", o, &c, NULL);
  small_weights(&whole.m, 3);
  open_run(&mine, "fp64", o, &c, &shard);
  take_weights(&mine, &whole);
  OK(mt_exchange_over(&mine.m, &expert, &dense));
  /* By hand, from what the layers of one model count in each batch. */
  double prob[EXPERTS] = {0}, want = 0, z = 0;
  int64_t chosen[EXPERTS] = {0}, tokens = 0;
  struct mt_loss loss;
  struct small_batch b;
  for (int r = 0; r < world.size; r++) {
    batch_of(&b, c.vocab, r, 0);
    OK(mt_model_eval_pass(&whole.m, &b.b, &loss));
    for (int e = 0; e < EXPERTS; e++) {
      prob[e] += at(&whole.m.acts.aux_prob, e);
      chosen[e] += whole.m.acts.aux_count[e];
    }
    tokens += b.b.valid_count * c.layers;
    z += at(&whole.m.acts.z_sum, 0);
  }
  for (int e = 0; e < EXPERTS; e++) {
    want += EXPERTS * ((double)chosen[e] / (double)tokens) * (prob[e] / (double)tokens);
  }
  batch_of(&b, c.vocab, mt_mesh_reader(&mesh), 0);
  OK(mt_model_eval_pass(&mine.m, &b.b, &loss));
  if (!(fabs(loss.aux - want) <= 1e-12 * want)) fail_msg("aux %.15g, not %.15g", loss.aux, want);
  z /= (double)tokens;
  if (!(fabs(loss.z - z) <= 1e-12 * z)) fail_msg("z-loss %.15g, not %.15g", loss.z, z);
  mt_exchange_close(&mine.m);
  close_run(&mine);
  close_run(&whole);
  mt_comm_destroy(&expert);
  mt_comm_destroy(&dense);
}

static void a_shard_that_does_not_fit_is_refused(void **state) {
  (void)state;
  struct mt_config c = config();
  struct mt_comm self = mt_comm_self("expert");
  struct mt_shard half = {EXPERTS / 2, EXPERTS};
  struct run mine;
  open_run(&mine, "fp32", ways[0], &c, &half);
  assert_int_equal(mt_exchange_over(&mine.m, &self, &self), MT_EINVAL);
  assert_non_null(strstr(mt_error_message(), "experts 12 to 24 of 24"));
  close_run(&mine);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(reference_equals_one_rank),
    cmocka_unit_test(float32_equals_one_rank),
    cmocka_unit_test(auxiliary_loss_is_of_all_tokens),
    cmocka_unit_test(a_shard_that_does_not_fit_is_refused),
};
DIST_MAIN(tests)
