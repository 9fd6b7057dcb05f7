/* Replayed steps, without a GPU: on a backend that notes operations and runs them again. */
#include "model/graph_cases.h"
#include "model/recorder.h"

static void replayed_steps_are_launched_ones(void **state) {
  (void)state;
  recorder.refuse = 0;
  replay_gives_the_same_bits("cpu", recorder_prepare, false);
}

static struct course_options plain(enum mt_experts_strategy experts) {
  return (struct course_options){.recipe = "bf16",
                                 .config = course_config(false),
                                 .model = {.experts = experts,
                                           .blocks = MT_BLOCKS_FUSED,
                                           .aux_coef = 0.02,
                                           .z_coef = 0.01,
                                           .training = true},
                                 .micro_count = 1,
                                 .lengths = 3,
                                 .graphs = true,
                                 .prepare = recorder_prepare};
}

static struct course train(const struct course_options *o) {
  struct course c = {0};
  struct small_model s;
  small_open(&s, "cpu", o->recipe, &o->config, o->model);
  run_course(&s, o, 0, COURSE_STEPS, &c);
  small_close(&s);
  return c;
}

/* A backend that fails to make graphs costs nothing but the graphs. */
static void a_refused_graph_is_launched(void **state) {
  (void)state;
  struct course_options o = plain(MT_EXPERTS_GROUPED);
  struct course want, got;
  recorder.refuse = 0;
  want = train(&o);
  for (int refused = 1; refused < 100; refused += 98) {
    recorder.refuse = refused;
    got = train(&o);
    same_course("refused", &want, &got, 0);
    assert_int_equal(got.failures, refused < 3 ? refused : 3); /* then it is asked no more */
    assert_int_equal(got.graphs, refused < 3 ? want.graphs : 0);
    assert_true(got.replayed[COURSE_STEPS - 1] == (refused < 3));
  }
  recorder.refuse = 0;
}

static void few_graphs_are_made(void **state) {
  (void)state;
  struct course_options o = plain(MT_EXPERTS_GROUPED);
  struct course few, many;
  o.micro_count = COURSE_MICRO;
  o.lengths = 3;
  few = train(&o);
  assert_int_equal(few.graphs, 7); /* three lengths with and without accumulation, the update */
  o.lengths = 5;
  many = train(&o);
  assert_int_equal(many.graphs, MT_GRAPHS);
  assert_int_equal(mt_graph_lengths(1), 7);
  assert_int_equal(mt_graph_lengths(4), 3);
}

static void count_ready(void *context, struct mt_param *param) {
  (void)param;
  ++*(int *)context;
}

/* Whoever asks for finished gradients gets them in every step, and a profile every operation. */
static void nobody_is_left_out(void **state) {
  (void)state;
  struct course_options o = plain(MT_EXPERTS_GROUPED);
  struct course c = {0};
  struct small_model s;
  int ready = 0;
  small_open(&s, "cpu", o.recipe, &o.config, o.model);
  s.m.grad_ready = count_ready;
  s.m.grad_ready_context = &ready;
  run_course(&s, &o, 0, COURSE_STEPS, &c);
  assert_int_equal(ready, COURSE_STEPS * s.m.params.count);
  assert_int_equal(c.graphs, 0);
  s.m.grad_ready = NULL;
  s.be.profile = &s;
  run_course(&s, &o, 0, COURSE_STEPS, &c);
  assert_int_equal(c.graphs, 0);
  small_close(&s);
  o = plain(MT_EXPERTS_LOOP); /* it reads counts on the host */
  c = train(&o);
  assert_int_equal(c.graphs, 0);
}

/* From the beginning of a step to the end of its launch nothing is waited for; the loop over
 * experts, which reads counts, shows that it would be seen. And a replayed step calls no operation
 * one by one. */
static void the_host_does_not_wait(void **state) {
  (void)state;
  for (int loop = 0; loop < 2; loop++) {
    struct course_options o = plain(loop ? MT_EXPERTS_LOOP : MT_EXPERTS_GROUPED);
    struct mt_optimizer_options oo = {.lr = 0.01,
                                      .beta1 = 0.9,
                                      .beta2 = 0.95,
                                      .eps = 1e-8,
                                      .clip = 1,
                                      .schedule = MT_SCHEDULE_CONSTANT};
    struct mt_optimizer opt;
    struct mt_step_queue q;
    struct small_model s;
    struct small_batch b;
    struct mt_step_result r;
    small_open(&s, "cpu", o.recipe, &o.config, o.model);
    recorder_prepare(&s.be);
    OK(mt_optimizer_create(&opt, &s.m, &oo));
    OK(mt_step_queue_create(&q, &opt, true));
    recorder.waits = 0;
    for (int step = 0; step < 8; step++) {
      struct mt_batch *micro[] = {&b.b};
      ragged_batch(&b, s.m.config.vocab, 2, (uint64_t)step);
      recorder.outside_calls = 0;
      recorder.watched = true;
      OK(mt_step_begin(&q));
      OK(mt_step_launch(&q, micro, 1));
      recorder.watched = false;
      OK(mt_step_take(&q, &r));
      if (step > 1) assert_true((recorder.outside_calls == 0) == !loop);
    }
    assert_true((recorder.waits == 0) == !loop);
    mt_step_queue_destroy(&q);
    mt_optimizer_destroy(&opt);
    small_close(&s);
  }
}

/* Many steps under way give what they give one by one, and one wait serves for several. */
static void one_wait_for_many_steps(void **state) {
  (void)state;
  enum { AHEAD = 8, STAY = 2 };
  struct course_options o = plain(MT_EXPERTS_GROUPED);
  struct course want = train(&o);
  struct mt_optimizer_options oo = course_adam();
  struct mt_optimizer opt;
  struct mt_step_queue q;
  struct small_model s;
  struct mt_step_result r;
  bool done;
  int taken = 0;
  small_open(&s, "cpu", o.recipe, &o.config, o.model);
  recorder_prepare(&s.be);
  s.be.steps_ahead = AHEAD;
  OK(mt_optimizer_create(&opt, &s.m, &oo));
  OK(mt_step_queue_create(&q, &opt, true));
  OK(mt_step_done(&q, &done));
  assert_false(done);
  OK(mt_step_wait(&q, 0)); /* nothing to wait for */
  for (int step = 0; step < COURSE_STEPS; step++) {
    struct small_batch b;
    struct mt_batch *micro[] = {&b.b};
    ragged_batch(&b, s.m.config.vocab, o.lengths, (uint64_t)(step * (COURSE_MICRO + 1)));
    OK(mt_step_begin(&q));
    OK(mt_step_launch(&q, micro, 1));
    if (!mt_step_full(&q) && step + 1 < COURSE_STEPS) continue;
    int stay = step + 1 < COURSE_STEPS ? STAY : 0;
    recorder.waits = 0;
    recorder.watched = true;
    OK(mt_step_wait(&q, stay));
    recorder.watched = false;
    assert_int_equal(recorder.waits, 1);
    assert_int_equal(recorder.last_wait, 2 * ((step - stay) % AHEAD) + 1); /* ends that step */
    for (; q.count > stay; taken++) {
      OK(mt_step_take(&q, &r));
      assert_int_equal(r.step, taken + 1);
      assert_true(r.loss == want.loss[taken] && r.grad_norm == want.norm[taken]);
    }
  }
  assert_int_equal(taken, COURSE_STEPS);
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&opt);
  small_close(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(replayed_steps_are_launched_ones),
      cmocka_unit_test(a_refused_graph_is_launched),
      cmocka_unit_test(few_graphs_are_made),
      cmocka_unit_test(nobody_is_left_out),
      cmocka_unit_test(the_host_does_not_wait),
      cmocka_unit_test(one_wait_for_many_steps),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
