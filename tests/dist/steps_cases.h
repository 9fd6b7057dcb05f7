/* Steps of many ranks against those of one rank that has all their batches as one: losses, norms,
 * loads and parameters after ten updates with clipping, accumulation, uneven routing, the auxiliary
 * loss, and ranks whose batch is small. And the same bits twice. */
#ifndef TESTS_DIST_STEPS_CASES_H
#define TESTS_DIST_STEPS_CASES_H

#include "dist/sharded.h"
#include "train/step.h"

enum { STEPS = 10, MICRO = 2, RANKS_MOST = 8 };

/* All ranks' batches of one micro-batch in a row. */
struct joined {
  struct mt_batch b;
  int32_t ids[RANKS_MOST * SMALL_TOKENS], positions[RANKS_MOST * SMALL_TOKENS],
      labels[RANKS_MOST * SMALL_TOKENS], cu[RANKS_MOST * SMALL_SEQUENCES + 1];
};

static void join(struct joined *j, int vocab, int ranks, int pass) {
  j->b = (struct mt_batch){
      .ids = j->ids, .positions = j->positions, .labels = j->labels, .cu_seqlens = j->cu};
  j->cu[0] = 0;
  for (int r = 0; r < ranks; r++) {
    struct small_batch s;
    int at = j->b.valid_count;
    batch_of(&s, vocab, r, pass);
    for (int i = 0; i < s.b.valid_count; i++) {
      j->ids[at + i] = s.ids[i];
      j->positions[at + i] = s.positions[i];
      j->labels[at + i] = s.labels[i];
    }
    for (int q = 0; q < s.b.sequence_count; q++) j->cu[++j->b.sequence_count] = at + s.cu[q + 1];
    j->b.valid_count += s.b.valid_count;
    j->b.target_count += s.b.target_count;
  }
  j->b.token_count = j->b.valid_count;
}

static const struct mt_optimizer_options adam = {
    .lr = 3e-3,
    .warmup_steps = 2,
    .total_steps = STEPS,
    .schedule = MT_SCHEDULE_CONSTANT,
    .beta1 = 0.9,
    .beta2 = 0.99,
    .eps = 1e-6, /* gradients of nothing but rounding move nothing */
    .weight_decay = 0.1,
    .clip = 1.0,
    .seed = 5};

struct numbers {
  double loss[STEPS], norm[STEPS];
  int64_t targets[STEPS], correct[STEPS], load[STEPS];
};

static void note(struct numbers *n, int step, const struct mt_step_result *r) {
  n->loss[step] = r->loss;
  n->norm[step] = r->grad_norm;
  n->targets[step] = r->target_count;
  n->correct[step] = r->correct_count;
  n->load[step] = r->load[3]; /* an expert of the first layer */
}

static void run_alone(struct run *whole, int ranks, struct numbers *n) {
  struct mt_optimizer o;
  struct mt_step_queue q;
  static struct joined j[MICRO];
  OK(mt_optimizer_create(&o, &whole->m, &adam));
  OK(mt_step_queue_create(&q, &o, false));
  for (int step = 0; step < STEPS; step++) {
    struct mt_batch *micro[MICRO];
    struct mt_step_result r;
    for (int i = 0; i < MICRO; i++) {
      join(&j[i], whole->m.config.vocab, ranks, step * MICRO + i);
      micro[i] = &j[i].b;
    }
    OK(mt_step_run(&q, micro, MICRO, &r));
    note(n, step, &r);
  }
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
}

static void run_together(struct run *mine, struct mt_ranks *ranks, struct numbers *n) {
  struct mt_optimizer o;
  struct mt_step_queue q;
  static struct small_batch b[MICRO];
  OK(mt_optimizer_create(&o, &mine->m, &adam));
  OK(mt_step_queue_create(&q, &o, false));
  q.ranks = ranks;
  for (int step = 0; step < STEPS; step++) {
    struct mt_batch *micro[MICRO];
    struct mt_step_result r;
    for (int i = 0; i < MICRO; i++) {
      batch_of(&b[i], mine->m.config.vocab, mt_mesh_reader(&ranks->mesh), step * MICRO + i);
      micro[i] = &b[i].b;
    }
    OK(mt_step_run(&q, micro, MICRO, &r));
    note(n, step, &r);
  }
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
}

static double worst_step; /* of all comparisons of parameters so far */

/* Relative to what the updates changed. */
static double parameters_off(const struct run *mine, const struct run *whole,
                             const struct run *before) {
  double off = 0, moved = 0;
  for (int i = 0; i < mine->m.params.count; i++) {
    const struct mt_param *p = &mine->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    const struct mt_param *v = mt_params_find(&before->m.params, p->kind, p->layer);
    int64_t first = p->first * (mt_param_count(w) / w->dim[0]);
    double *x = values_of(mine, &p->master), *y = values_of(whole, &w->master),
           *z = values_of(before, &v->master);
    for (int64_t k = 0; k < mt_param_count(p); k++) {
      double d = x[k] - y[first + k], u = y[first + k] - z[first + k];
      off += d * d;
      moved += u * u;
    }
    free(x);
    free(y);
    free(z);
  }
  return sqrt(off / moved);
}

/* How far steps may be from those of one rank. exact: what is counted is the same too, which
 * rounding may change (a token's second choice, a logit's place). */
struct near {
  double loss, norm, parameters; /* relative; the last to what the updates moved */
  bool exact;
  bool loops; /* over experts too: see gradients_on_every_mesh */
};

static void same_numbers(const struct numbers *a, const struct numbers *b, struct near n) {
  for (int s = 0; s < STEPS; s++) {
    bool same = fabs(a->loss[s] - b->loss[s]) <= n.loss * fabs(b->loss[s]) &&
                fabs(a->norm[s] - b->norm[s]) <= n.norm * fabs(b->norm[s]) &&
                a->targets[s] == b->targets[s] &&
                (!n.exact || (a->correct[s] == b->correct[s] && a->load[s] == b->load[s]));
    if (!same) {
      fail_msg("step %d: loss %.12g, not %.12g; norm %.12g, not %.12g; load %lld, not %lld", s,
               a->loss[s], b->loss[s], a->norm[s], b->norm[s], (long long)a->load[s],
               (long long)b->load[s]);
    }
  }
}

/* Bytes of a sync class's stretch of the gradients, as they are summed. */
static int64_t class_bytes(const struct mt_model *m, enum mt_sync sync) {
  char *begin = NULL, *end = NULL;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (p->sync != sync) continue;
    if (!begin) begin = p->grad.data;
    end = (char *)p->grad.data + mt_bytes(&p->grad);
  }
  return end - begin;
}

/* What docs/parallelism.md says leaves the ranks for the gradients of n of them: (n-1)/n of the
 * bytes each when the parts go out, so (n-1) times them in all; and as many when the sums come
 * back. */
static void bytes_are_those_of_the_formulas(struct run *mine, struct mt_ranks *r) {
  const struct mt_comm *dense = r->tensor[MT_GROUP_DENSE], *data = r->tensor[MT_GROUP_DATA];
  int64_t sent[] = {dense->sent[MT_COMM_ALL_TO_ALL].bytes, data->sent[MT_COMM_ALL_TO_ALL].bytes,
                    data->sent[MT_COMM_ALL_GATHER].bytes};
  int64_t d = class_bytes(&mine->m, MT_SYNC_DENSE), x = class_bytes(&mine->m, MT_SYNC_EXPERT);
  OK(mt_ranks_sum_counts(r, sent, 3));
  assert_int_equal(sent[0], STEPS * d * (dense->size - 1));
  for (int i = 1; i < 3; i++) assert_int_equal(sent[i], STEPS * x * (data->size - 1) * r->mesh.ep);
}

static void steps_equal_to_one(const char *recipe, struct mt_model_options options, int ep,
                               struct near near) {
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct numbers want, got, again;
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
  run_alone(&whole, world.size, &want);
  for (int run = 0; run < (dist_be.memory_used ? 2 : 3); run++) {
    struct mt_ranks ranks;
    open_run(&mine, recipe, options, &c, &shard);
    take_weights(&mine, &before);
    OK(mt_ranks_open(&ranks, &world, &mesh));
    OK(mt_ranks_join(&ranks, &mine.m));
    if (run == 2) ranks.bucket_elements = 1000; /* several a class, cut through parameters */
    struct numbers *n = run == 0 ? &got : &again;
    run_together(&mine, &ranks, n);
    same_numbers(n, &want, near);
    if (run == 1) assert_memory_equal(got.loss, again.loss, sizeof got.loss);
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
       .training = true}};
  for (int ep = 1; ep <= world.size; ep++) {
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    for (int i = 0; i < (near.loops ? 2 : 1); i++) steps_equal_to_one(recipe, ways[i], ep, near);
  }
}

#endif
