/* Steps of many ranks beside those of one rank that has all their batches as one. */
#ifndef TESTS_DIST_STEPS_H
#define TESTS_DIST_STEPS_H

#include "dist/sharded.h"
#include "train/step.h"

/* That rounding does not add up shows over ten steps; a sanitizer sees all in the first few, which
 * begin, go on and reuse what earlier ones left. */
enum { STEPS = 10, FEW_STEPS = 4, MICRO_MOST = 8, RANKS_MOST = 8 };

static inline int steps_run(void) {
  return brief || SANITIZED ? FEW_STEPS : STEPS;
}

/* All ranks' batches of one micro-batch in a row. */
struct joined {
  struct mt_batch b;
  int32_t ids[RANKS_MOST * SMALL_TOKENS], positions[RANKS_MOST * SMALL_TOKENS],
      labels[RANKS_MOST * SMALL_TOKENS], cu[RANKS_MOST * SMALL_SEQUENCES + 1];
};

static void join(struct joined *j, int vocab, int readers, int pass) {
  j->b = (struct mt_batch){
      .ids = j->ids, .positions = j->positions, .labels = j->labels, .cu_seqlens = j->cu};
  j->cu[0] = 0;
  for (int r = 0; r < readers; r++) {
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
  double loss[STEPS], aux[STEPS], z[STEPS], norm[STEPS];
  int64_t targets[STEPS], tokens[STEPS], correct[STEPS], load[STEPS];
};

static void note(struct numbers *n, int step, const struct mt_step_result *r, int loads) {
  n->loss[step] = r->loss;
  n->aux[step] = r->aux;
  n->z[step] = r->z;
  n->norm[step] = r->grad_norm;
  n->targets[step] = r->target_count;
  n->tokens[step] = r->token_count;
  n->correct[step] = r->correct_count;
  n->load[step] = 0;
  for (int i = 0; i < loads; i++) n->load[step] += (i + 1) * (int64_t)r->load[i];
}

/* How far steps may be from those of one rank. exact: what is counted is the same too, which
 * rounding may change (a token's second choice, a logit's place). */
struct near {
  double loss, norm, parameters; /* relative; the last to what the updates moved */
  bool exact;
  bool loops; /* over experts too: see gradients_on_every_mesh */
};

static int steps_compared = STEPS; /* whose numbers must be near */

static void same_numbers(const struct numbers *a, const struct numbers *b, struct near n) {
  for (int s = 0; s < steps_compared && s < steps_run(); s++) {
    bool same = fabs(a->loss[s] - b->loss[s]) <= n.loss * fabs(b->loss[s]) &&
                fabs(a->aux[s] - b->aux[s]) <= n.loss * fabs(b->aux[s]) &&
                fabs(a->z[s] - b->z[s]) <= n.loss * fabs(b->z[s]) &&
                fabs(a->norm[s] - b->norm[s]) <= n.norm * fabs(b->norm[s]) &&
                a->targets[s] == b->targets[s] && a->tokens[s] == b->tokens[s] &&
                (!n.exact || (a->correct[s] == b->correct[s] && a->load[s] == b->load[s]));
    if (!same) {
      fail_msg("step %d: loss %.12g, not %.12g; aux %.12g, not %.12g; norm %.12g, not %.12g; load "
               "%lld, not %lld",
               s, a->loss[s], b->loss[s], a->aux[s], b->aux[s], a->norm[s], b->norm[s],
               (long long)a->load[s], (long long)b->load[s]);
    }
  }
}

static int loads_of(const struct run *r) {
  return r->m.config.layers * r->m.config.experts;
}

/* On rank 0; its numbers and weights go to everyone. */
static void run_alone(struct run *whole, int readers, int micro_count, struct numbers *n) {
  struct mt_optimizer o;
  struct mt_step_queue q;
  static struct joined j[MICRO_MOST];
  OK(mt_optimizer_create(&o, &whole->m, &adam));
  OK(mt_step_queue_create(&q, &o, false));
  for (int step = 0; step < steps_run() && world.rank == 0; step++) {
    struct mt_batch *micro[MICRO_MOST];
    struct mt_step_result r;
    for (int i = 0; i < micro_count; i++) {
      join(&j[i], whole->m.config.vocab, readers, step * micro_count + i);
      micro[i] = &j[i].b;
    }
    OK(mt_step_run(&q, micro, micro_count, &r));
    note(n, step, &r, loads_of(whole));
  }
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
  OK(mt_comm_broadcast(&everyone, n, sizeof *n, 0));
  take_from_rank_0(whole, &whole->m.parameters);
}

/* Every third batch comes without padding: lengths differ from micro-batch to micro-batch. */
static void run_together(struct run *mine, struct mt_ranks *ranks, int micro_count,
                         struct numbers *n) {
  struct mt_optimizer o;
  struct mt_step_queue q;
  static struct small_batch b[MICRO_MOST];
  OK(mt_optimizer_create(&o, &mine->m, &adam));
  OK(mt_step_queue_create(&q, &o, false));
  q.ranks = ranks;
  for (int step = 0; step < steps_run(); step++) {
    struct mt_batch *micro[MICRO_MOST];
    struct mt_step_result r;
    for (int i = 0; i < micro_count; i++) {
      int pass = step * micro_count + i;
      batch_of(&b[i], mine->m.config.vocab, mt_mesh_reader(&ranks->mesh), pass);
      if (pass % 3 == 0) b[i].b.token_count = b[i].b.valid_count;
      micro[i] = &b[i].b;
    }
    OK(mt_step_run(&q, micro, micro_count, &r));
    note(n, step, &r, loads_of(mine));
  }
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
}

/* Another model joins; bytes are counted from here on. */
static inline void join_anew(struct mt_ranks *r, struct mt_model *m) {
  OK(mt_ranks_join(r, m));
  for (int g = 0; g < MT_GROUP_COUNT; g++) {
    memset(r->comm[g].sent, 0, sizeof r->comm[g].sent);
    memset(r->gpu[g].sent, 0, sizeof r->gpu[g].sent);
  }
  memset(r->gpu_back.sent, 0, sizeof r->gpu_back.sent);
  for (int k = 0; k < MT_SYNC_COUNT; k++) memset(r->late[k].sent, 0, sizeof r->late[k].sent);
}

/* Masters that are memory of their own: this rank's parts. */
static inline void take_cut_masters(struct run *to, const struct run *whole) {
  struct mt_piece *piece;
  int count;
  if (to->m.options.zero == 0 || to->m.recipe->act == to->m.recipe->state) return;
  OK(mt_model_pieces(&to->m, &piece, &count));
  for (int i = 0; i < count; i++) {
    const struct mt_param *p = &to->m.params.row[piece[i].row];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    size_t row = (size_t)(mt_param_count(w) / w->dim[0]), item = mt_dtype_bytes(w->master.dtype);
    size_t at = (size_t)p->first * row + (size_t)piece[i].first;
    OK(to->be->copy(to->be, piece[i].master.data, (const char *)w->master.data + at * item,
                    mt_bytes(&piece[i].master)));
  }
  OK(to->be->sync(to->be));
  free(piece);
}

/* Relative to what the updates changed. */
static double parameters_off(const struct run *mine, const struct run *whole,
                             const struct run *before) {
  double off = 0, moved = 0;
  for (int i = 0; i < mine->m.params.count; i++) {
    const struct mt_param *p = &mine->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    const struct mt_param *v = mt_params_find(&before->m.params, p->kind, p->layer);
    int64_t first = p->first * (mt_param_count(w) / w->dim[0]);
    bool kept = p->master.data; /* or cut over the ranks */
    double *x = values_of(mine, kept ? &p->master : &p->compute),
           *y = values_of(whole, kept ? &w->master : &w->compute),
           *z = values_of(before, kept ? &v->master : &v->compute);
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

#endif
