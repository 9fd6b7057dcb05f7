/* The golden cases over ranks: what transformers computes, from a model whose experts or layers are
 * cut over two of them, or both (with four: ep=2 x dp=2, pp=2 x dp=2, ep=2 x pp=2). All readers
 * read the fixture's batch: mean loss and gradients stay those of one. */
#include "dist/dist.h"
#include "golden/model_cases.h"

static const struct bounds cpu_bounds = {"cpu", "fp32", 1e-5, 2e-5, 1e-5, 5e-6, 5e-5};
static const struct bounds ref_bounds = {"ref", "fp64", 1e-6, 2e-6, 1e-6, 1e-6, 5e-6};

/* What is here of a form of the whole parameter. */
static void take(const struct mt_param *p, const struct mt_tensor *to,
                 const struct mt_tensor *from) {
  size_t each = mt_bytes(from) / (size_t)from->dim[0];
  memcpy(to->data, (char *)from->data + (size_t)p->first * each, mt_bytes(to));
}

/* This rank's part of the case's model, in place of the whole one. */
static void cut(struct golden *g, const struct mt_mesh *mesh, struct mt_ranks *ranks) {
  struct mt_model whole = g->m;
  struct mt_params params;
  struct mt_model_options options = whole.options;
  options.shard = mt_ranks_shard(mesh);
  options.in_flight = mesh->pp > 1 ? mt_stage_in_flight(false, mesh->pp_rank, mesh->pp, 1) : 0;
  OK(mt_params_build(&whole.config, &options.shard, &params));
  OK(mt_model_create(&g->m, &whole.config, &params, whole.recipe, &g->be, &options));
  for (int i = 0; i < g->m.params.count; i++) {
    struct mt_param *p = &g->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole.params, p->kind, p->layer);
    take(p, &p->compute, &w->compute);
    take(p, &p->master, &w->master);
  }
  mt_model_destroy(&whole);
  OK(mt_ranks_open(ranks, &world, mesh));
  OK(mt_ranks_join(ranks, &g->m));
}

static int cases_run, ep, pp;

static void run_cut(const char *dir, const struct bounds *b) {
  struct golden g = {0};
  struct mt_mesh mesh;
  struct mt_ranks ranks;
  struct mt_optimizer o;
  struct mt_step_queue q;
  struct mt_step_result r;
  snprintf(g.dir, sizeof g.dir, "%s", dir);
  open_case(&g, b,
            (struct mt_model_options){.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED});
  if ((pp > 1 && g.m.config.tied_head) || g.m.config.experts % ep != 0) { /* refused */
    close_case(&g);
    return;
  }
  cases_run++;
  OK(mt_mesh_make(&g.m.config, world.size, world.rank, ep, pp, &mesh));
  cut(&g, &mesh, &ranks);
  struct mt_optimizer_options oo = adamw_of(&g);
  OK(mt_optimizer_create(&o, &g.m, &oo));
  OK(mt_step_queue_create(&q, &o, true));
  q.ranks = &ranks;
  struct mt_batch *micro[] = {&g.batch};
  struct mt_loss loss;
  if (pp > 1) {
    OK(mt_pipeline_eval(&ranks.pipeline, 0, &g.batch, &loss));
    OK(mt_pipeline_eval_end(&ranks.pipeline, &loss));
  } else {
    OK(mt_model_eval_pass(&g.m, &g.batch, &loss));
  }
  if (mesh.pp_rank + 1 == pp) check_logits(&g, b);
  for (size_t step = 0; step < 4; step++) {
    OK(mt_step_run(&q, micro, 1, &r));
    check_step(&g, b, step, &r);
  }
  int64_t seen = 0;
  check_held(&g, "after4.", false, b->after, &seen);
  OK(mt_ranks_sum_stage_counts(&ranks, &seen, 1));
  assert_int_equal(seen, json_array_size(json_object_get(g.json, "param_names")));
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
  mt_ranks_close(&ranks);
  close_case(&g);
}

static void on_reference(const char *dir) {
  run_cut(dir, &ref_bounds);
}

static void on_cpu(const char *dir) {
  run_cut(dir, &cpu_bounds);
}

static void every_case(int experts, int stages) {
  if (world.size % (experts * stages) != 0) skip(); /* nothing to cut so */
  ep = experts, pp = stages, cases_run = 0;
  each_case(cases_at_least(), on_cpu);
  assert_true(cases_run >= 2 || cases_at_least() == 0);
  if (world.size == experts * stages) each_case(cases_at_least(), on_reference); /* it is slow */
}

static void experts_agree(void **state) {
  (void)state;
  every_case(2, 1);
}
static void stages_agree(void **state) {
  (void)state;
  every_case(1, 2);
}
static void experts_in_stages_agree(void **state) {
  (void)state;
  every_case(2, 2);
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(experts_agree),
                                          cmocka_unit_test(stages_agree),
                                          cmocka_unit_test(experts_in_stages_agree)};
DIST_MAIN(tests)
