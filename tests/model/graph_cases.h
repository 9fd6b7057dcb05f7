/* Steps over rows of ever other lengths, with graphs and without: the same bits. */
#ifndef TESTS_MODEL_GRAPH_CASES_H
#define TESTS_MODEL_GRAPH_CASES_H

#include "model/small.h"
#include "train/step.h"

enum { COURSE_STEPS = 14, COURSE_MICRO = 3 };

/* What a training left behind. */
struct course {
  double loss[COURSE_STEPS], norm[COURSE_STEPS];
  uint64_t bits[COURSE_STEPS]; /* of every form of every parameter, after each half */
  bool replayed[COURSE_STEPS];
  int graphs, failures;
};

/* One to three samples of random lengths, padded to one of `lengths` lengths. */
static inline void ragged_batch(struct small_batch *s, int vocab, int lengths, uint64_t seed) {
  struct mt_rng r = mt_rng_make(seed, 31);
  int most = SMALL_TOKENS - 4 * (int)(seed % (uint64_t)lengths), at = 0;
  small_batch(s, vocab, seed);
  s->b.sequence_count = 1 + (int)mt_rng_below(&r, SMALL_SEQUENCES);
  s->b.token_count = most;
  s->b.target_count = 0;
  for (int q = 0; q < s->b.sequence_count; q++) {
    int length = 2 + (int)mt_rng_below(&r, (uint32_t)(most / s->b.sequence_count - 1));
    for (int i = 0; i < length; i++, at++) {
      s->ids[at] = (int32_t)mt_rng_below(&r, (uint32_t)vocab);
      s->positions[at] = i;
      s->labels[at] = MT_IGNORE;
      if (i > 0) s->labels[at - 1] = s->ids[at], s->b.target_count++;
    }
    s->cu[q + 1] = at;
  }
  s->b.valid_count = at;
  for (; at < SMALL_TOKENS; at++) {
    s->ids[at] = s->positions[at] = 0;
    s->labels[at] = MT_IGNORE;
  }
}

static inline uint64_t bits_of(struct small_model *s) {
  uint64_t bits = 0xcbf29ce484222325u; /* FNV-1a, by words */
  for (int i = 0; i < s->m.params.count; i++) {
    const struct mt_param *p = &s->m.params.row[i];
    const struct mt_tensor *forms[] = {&p->compute, &p->master, &p->m, &p->v, &p->grad};
    for (int f = 0; f < 5; f++) {
      size_t bytes = forms[f]->data ? mt_bytes(forms[f]) : 0;
      size_t words = (bytes + 7) / 8;
      uint64_t *raw = calloc(words + 1, sizeof *raw);
      assert_non_null(raw);
      OK(s->be.download(&s->be, raw, forms[f]->data, bytes));
      for (size_t k = 0; k < words; k++) bits = (bits ^ raw[k]) * 0x100000001b3u;
      free(raw);
    }
  }
  return bits;
}

struct course_options {
  const char *recipe;
  struct mt_config config;
  struct mt_model_options model;
  int micro_count, lengths;
  bool graphs;
  void (*prepare)(struct mt_backend *be); /* or NULL */
};

static inline struct mt_optimizer_options course_adam(void) {
  return (struct mt_optimizer_options){.lr = 0.02,
                                       .beta1 = 0.9,
                                       .beta2 = 0.95,
                                       .eps = 1e-8,
                                       .weight_decay = 0.1,
                                       .clip = 0.5,
                                       .schedule = MT_SCHEDULE_LINEAR,
                                       .warmup_steps = 3,
                                       .total_steps = 2 * COURSE_STEPS,
                                       .seed = 17};
}

/* `from` > 0: the model is handed over as `s` and goes on at that step. */
static inline void run_course(struct small_model *s, const struct course_options *o, int from,
                              int to, struct course *out) {
  struct mt_optimizer opt;
  struct mt_step_queue q;
  struct small_batch b[COURSE_MICRO];
  struct mt_batch *micro[COURSE_MICRO];
  struct mt_optimizer_options oo = course_adam();
  if (o->prepare) o->prepare(&s->be);
  OK(mt_optimizer_create(&opt, &s->m, &oo));
  OK(mt_step_queue_create(&q, &opt, o->graphs));
  opt.step = from;
  for (int step = from; step < to; step++) {
    struct mt_step_result r;
    for (int i = 0; i < o->micro_count; i++) {
      micro[i] = &b[i].b;
      ragged_batch(&b[i], s->m.config.vocab, o->lengths, (uint64_t)(step * (COURSE_MICRO + 1) + i));
    }
    OK(mt_step_run(&q, micro, o->micro_count, &r));
    out->loss[step] = r.loss;
    out->norm[step] = r.grad_norm;
    if ((step + 1) % (COURSE_STEPS / 2) == 0) out->bits[step] = bits_of(s);
    out->replayed[step] = r.replayed;
    for (int p = 0; p < MT_PHASE_PIPELINE; p++) /* nobody waits for a stage */
      assert_true(r.phase_s[p] > 0 && r.phase_s[p] * 1e3 <= 1.05 * r.ms + 0.1);
  }
  out->graphs = q.graphs.count;
  out->failures = q.graphs.failures;
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&opt);
}

static inline void same_course(const char *what, const struct course *a, const struct course *b,
                               int from) {
  for (int i = from; i < COURSE_STEPS; i++) {
    if (a->loss[i] == b->loss[i] && a->norm[i] == b->norm[i] && a->bits[i] == b->bits[i]) continue;
    fail_msg("%s: step %d: loss %.17g, %.17g; norm %.17g, %.17g; parameters %s", what, i + 1,
             a->loss[i], b->loss[i], a->norm[i], b->norm[i],
             a->bits[i] == b->bits[i] ? "the same" : "differ");
  }
}

static inline struct mt_config course_config(bool large) {
  struct mt_config c = small_config();
  if (!large) return c;
  c.hidden = 256, c.ffn = 256, c.heads = 4, c.kv_heads = 2, c.head_dim = 128, c.vocab = 300;
  return c;
}

/* A model's parameters and optimizer states, to begin anew from: making them takes longest. */
struct kept_state {
  void *parameters, *optimizer;
};
static inline struct kept_state keep_state(struct small_model *s) {
  struct mt_arena *p = &s->m.parameters, *o = &s->m.optimizer;
  struct kept_state k = {malloc(p->capacity_bytes), malloc(o->capacity_bytes)};
  assert_true(k.parameters && k.optimizer);
  OK(s->be.download(&s->be, k.parameters, p->base, p->capacity_bytes));
  OK(s->be.download(&s->be, k.optimizer, o->base, o->capacity_bytes));
  return k;
}
static inline void restore_state(struct small_model *s, const struct kept_state *k) {
  struct mt_arena *p = &s->m.parameters, *o = &s->m.optimizer;
  OK(s->be.upload(&s->be, p->base, k->parameters, p->capacity_bytes));
  OK(s->be.upload(&s->be, o->base, k->optimizer, o->capacity_bytes));
  OK(s->be.sync(&s->be));
}

static inline void compare_courses(struct small_model *s, const struct kept_state *start,
                                   struct course_options o, const char *what) {
  struct course with = {0}, without = {0}, half = {0};
  int replayed = 0;
  o.graphs = false;
  restore_state(s, start);
  run_course(s, &o, 0, COURSE_STEPS, &without);
  assert_int_equal(without.graphs, 0);
  o.graphs = true;
  restore_state(s, start);
  run_course(s, &o, 0, COURSE_STEPS, &with);
  same_course(what, &with, &without, 0);
  restore_state(s, start);
  run_course(s, &o, 0, COURSE_STEPS / 2, &half);
  struct kept_state middle = keep_state(s);
  run_course(s, &o, 0, 1, &half); /* elsewhere in between */
  restore_state(s, &middle);
  run_course(s, &o, COURSE_STEPS / 2, COURSE_STEPS, &half);
  same_course(what, &half, &without, COURSE_STEPS / 2);
  free(middle.parameters);
  free(middle.optimizer);
  for (int i = 0; i < COURSE_STEPS; i++) replayed += with.replayed[i];
  print_message("  %s: %d graphs, %d of %d steps replayed, %d failures\n", what, with.graphs,
                replayed, COURSE_STEPS, with.failures);
  assert_in_range(with.graphs, 4, MT_GRAPHS);
  assert_int_equal(with.failures, 0);
  assert_int_equal(replayed, COURSE_STEPS - 1); /* all but the first */
  for (int i = 1; i < COURSE_STEPS; i++) assert_true(with.loss[i] != with.loss[i - 1]);
}

/* With graphs as without, and a second half that goes on from the first one's state. */
static inline void replay_gives_the_same_bits(const char *backend,
                                              void (*prepare)(struct mt_backend *be), bool large) {
  static const char *const recipes[] = {"fp32", "bf16", "bf16-states"};
  for (int way = 0; way < (large ? 3 : 6); way++) {
    struct course_options o = {.recipe = recipes[way % 3],
                               .config = course_config(large),
                               .lengths = 3,
                               .prepare = prepare};
    struct small_model s;
    o.model =
        (struct mt_model_options){.experts = MT_EXPERTS_GROUPED,
                                  .blocks = way < 3 ? MT_BLOCKS_FUSED : MT_BLOCKS_UNFUSED,
                                  .recompute = way < 3 ? MT_RECOMPUTE_NONE : MT_RECOMPUTE_FULL,
                                  .aux_coef = 0.02,
                                  .z_coef = 0.01,
                                  .training = true};
    small_open(&s, backend, o.recipe, &o.config, o.model);
    struct kept_state start = keep_state(&s);
    for (o.micro_count = 1; o.micro_count <= COURSE_MICRO; o.micro_count += COURSE_MICRO - 1) {
      char what[96];
      snprintf(what, sizeof what, "%s %s, %d micro-batches, way %d", backend, o.recipe,
               o.micro_count, way);
      compare_courses(&s, &start, o, what);
    }
    free(start.parameters);
    free(start.optimizer);
    small_close(&s);
  }
}

#endif
