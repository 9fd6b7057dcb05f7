/* Pipeline stages on the CPU, and how long they wait for each other. */
#include "dist/pipeline_cases.h"

#include <time.h>

static void reference_equals_one_rank(void **state) {
  (void)state;
  stages_on_every_mesh("fp64", (struct near){1e-10, 1e-10, 1e-10, true, true});
}

static void float32_equals_one_rank(void **state) {
  (void)state;
  stages_on_every_mesh("fp32", (struct near){1e-5, 5e-5, 1e-4, true, true});
}

/* Operations that take as long as is told, whoever else is on the machine. In a sanitizer's build
 * all else takes its time as well, which is no measure: the steps are made once, and bubbles held
 * to what they should be without one. */
enum { FORWARD_MS = 25, BACKWARD_MS = 50, TRIES = SANITIZED ? 1 : 40 };

static bool near_bubble(double got, double want) {
  return fabs(got - want) <= 0.1 * want;
}

static mt_err (*router_forward)(struct mt_backend *be, const struct mt_router_fwd_args *a);
static mt_err (*router_backward)(struct mt_backend *be, const struct mt_router_bwd_args *a);

static void last(int ms) {
  nanosleep(&(struct timespec){.tv_nsec = ms * 1000000L}, NULL);
}

static mt_err slow_forward(struct mt_backend *be, const struct mt_router_fwd_args *a) {
  last(FORWARD_MS);
  return router_forward(be, a);
}

static mt_err slow_backward(struct mt_backend *be, const struct mt_router_bwd_args *a) {
  last(BACKWARD_MS);
  return router_backward(be, a);
}

/* Of up to TRIES steps the bubble of the shortest, which others on the machine disturbed least; no
 * more are made once that is what is wanted. */
static double bubble_of(const struct mt_mesh *mesh, const struct mt_config *c, bool sequential,
                        int micro_count, double want) {
  const struct order o = {
      sequential, {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true}};
  struct run mine;
  struct mt_ranks ranks;
  struct mt_optimizer adamw;
  struct mt_step_queue q;
  struct mt_step_result r;
  struct small_batch b[MICRO_MOST];
  struct mt_batch *micro[MICRO_MOST];
  open_stage(&mine, &ranks, mesh, c, "fp32", &o, micro_count);
  small_weights(&mine.m, 3);
  router_forward = mine.be->ops.router_fwd;
  router_backward = mine.be->ops.router_bwd;
  mine.be->ops.router_fwd = slow_forward;
  mine.be->ops.router_bwd = slow_backward;
  OK(mt_optimizer_create(&adamw, &mine.m, &adam));
  OK(mt_step_queue_create(&q, &adamw, false));
  q.ranks = &ranks;
  for (int i = 0; i < micro_count; i++) {
    small_batch(&b[i], c->vocab, (uint64_t)i + 1);
    micro[i] = &b[i].b;
  }
  double bubble = 1e9, least = 1e9;
  for (int step = 0; step < TRIES && !near_bubble(bubble, want); step++) {
    OK(mt_comm_barrier(&ranks.comm[MT_GROUP_WORLD]));
    OK(mt_step_run(&q, micro, micro_count, &r));
    double ms = r.ms;
    OK(mt_ranks_sum_stages(&ranks, &ms, 1));
    if (ms < least) least = ms, bubble = r.bubble;
  }
  assert_int_equal(r.stage_count, mesh->pp);
  double own = r.stage_wait_s[mesh->pp_rank] - r.phase_s[MT_PHASE_PIPELINE];
  assert_true(fabs(own) < 1e-9);
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&adamw);
  mt_ranks_close(&ranks);
  close_run(&mine);
  return bubble;
}

/* The same of held-out batches, which go forward alone: what all stages wait, of the time of all.
 */
static double eval_bubble_of(const struct mt_mesh *mesh, const struct mt_config *c, int batches,
                             double want) {
  const struct order o = {
      false, {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true}};
  struct run mine;
  struct mt_ranks ranks;
  struct small_batch b;
  double bubble = 1e9, least = 1e18;
  open_stage(&mine, &ranks, mesh, c, "fp32", &o, 1);
  small_weights(&mine.m, 3);
  router_forward = mine.be->ops.router_fwd;
  mine.be->ops.router_fwd = slow_forward;
  const struct mt_clock *clock = &mine.m.acts.report->clock;
  for (int go = 0; go < TRIES && !near_bubble(bubble, want); go++) {
    struct mt_loss loss, total = {0};
    OK(mt_comm_barrier(&ranks.comm[MT_GROUP_WORLD]));
    OK(mt_phase_begin(&mine.m, MT_PHASE_EMBED));
    for (int i = 0; i < batches; i++) {
      small_batch(&b, c->vocab, (uint64_t)i + 1);
      OK(mt_pipeline_eval(&ranks.pipeline, i, &b.b, &loss));
      add_loss(&total, &loss);
    }
    OK(mt_pipeline_eval_end(&ranks.pipeline, &total));
    OK(mt_phase_end(&mine.m));
    double waited_all[2] = {(double)clock->phase_ns[MT_PHASE_PIPELINE], 0};
    for (int p = 0; p < MT_PHASE_COUNT; p++) waited_all[1] += (double)clock->phase_ns[p];
    OK(mt_ranks_sum_stages(&ranks, waited_all, 2));
    if (waited_all[1] < least) least = waited_all[1], bubble = waited_all[0] / waited_all[1];
  }
  mt_ranks_close(&ranks);
  close_run(&mine);
  return bubble;
}

/* Stages as long as each other: a layer each. */
static void bubbles_of_evaluations(void **state) {
  (void)state;
  enum { M = 12 };
  int p = world.size;
  struct mt_config c = layered(p);
  struct mt_mesh mesh;
  if (p < 2 || p > 4) skip();
  OK(mt_mesh_make(&c, world.size, world.rank, 1, p, &mesh));
  double want = (p - 1.0) / (M + p - 1.0), got = eval_bubble_of(&mesh, &c, M, want);
  print_message("  %d stages: bubble of an evaluation %.4f, %.4f expected\n", p, got, want);
  if (!SANITIZED && !near_bubble(got, want)) fail_msg("bubble %.4f, not %.4f", got, want);
}

static void bubbles_are_those_of_the_order(void **state) {
  (void)state;
  enum { M = 6 };
  int p = world.size;
  struct mt_config c = layered(p);
  struct mt_mesh mesh;
  if (p < 2 || p > 4) skip();
  OK(mt_mesh_make(&c, world.size, world.rank, 1, p, &mesh));
  for (int sequential = 0; sequential < 2; sequential++) {
    double want = sequential ? (p - 1.0) / p : (p - 1.0) / (M + p - 1.0);
    double got = bubble_of(&mesh, &c, sequential, M, want);
    print_message("  %d stages, %s: bubble %.4f, %.4f expected\n", p,
                  sequential ? "sequential" : "1F1B", got, want);
    if (!SANITIZED && !near_bubble(got, want)) fail_msg("bubble %.4f, not %.4f", got, want);
  }
}

/* What would run and be wrong. */
static void what_cannot_be_is_refused(void **state) {
  (void)state;
  struct mt_config c = layered(STAGE_LAYERS);
  struct mt_mesh mesh;
  if (world.size % 2 != 0) skip();
  c.tied_head = true;
  assert_int_equal(mt_mesh_make(&c, world.size, world.rank, 1, 2, &mesh), MT_EUNSUPPORTED);
  assert_non_null(strstr(mt_error_message(), "tie_word_embeddings"));
  struct mt_params params;
  const struct mt_shard half = {.layer_end = 2};
  assert_int_equal(mt_params_build(&c, &half, &params), MT_EUNSUPPORTED);
  c.tied_head = false;
  OK(mt_mesh_make(&c, world.size, world.rank, 1, 2, &mesh));
  const struct order o = {false, {.experts = MT_EXPERTS_GROUPED, .training = true}};
  struct run mine;
  struct mt_ranks ranks;
  open_stage(&mine, &ranks, &mesh, &c, "fp32", &o, 1); /* room for one */
  struct small_batch b;
  small_batch(&b, c.vocab, 1);
  const struct mt_pass pass = {.batch = &b.b}, passes[] = {pass, pass};
  mt_err err = mesh.pp_rank == 0 ? mt_pipeline_run(&ranks.pipeline, passes, 2) : MT_EINVAL;
  assert_int_equal(err, MT_EINVAL);
  struct mt_loss loss;
  assert_int_equal(mt_model_train_pass(&mine.m, &pass, &loss), MT_EINVAL);
  assert_non_null(strstr(mt_error_message(), "are a stage"));
  mt_ranks_close(&ranks);
  close_run(&mine);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(reference_equals_one_rank), cmocka_unit_test(float32_equals_one_rank),
    cmocka_unit_test(bubbles_are_those_of_the_order), cmocka_unit_test(bubbles_of_evaluations),
    cmocka_unit_test(what_cannot_be_is_refused)};
DIST_MAIN(tests)
