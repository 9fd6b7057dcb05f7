/* Sums of gradients beside backward: the same bits as behind it, and most of the time of transfers
 * is hidden, with communicators that let each take 20 ms and a backward that takes its time, of
 * whole models and of stages. And tokens that travel in chunks beside experts that take theirs. */
#include "dist/sharded.h"

#include <math.h>
#include <time.h>

#include "par/ranks.h"

/* STAGE_LAYERS: of two stages together; the embedding's transfers, which nothing hides, are few. */
enum { PENDING = 64, DELAY_MS = 20, WORK_MS = 12, TRIES = 60, STAGE_LAYERS = 8 };
static double delay_ms = DELAY_MS, work_ms = WORK_MS; /* less where no time is looked at */

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static void sleep_ms(double ms) {
  if (ms > 0) nanosleep(&(struct timespec){.tv_nsec = (long)(ms * 1e6)}, NULL);
}

/* What a communicator was before it was slowed, and what is under way there. */
static struct slow {
  struct mt_comm *c, real;
  struct {
    void *impl;
    double due_ms;
  } pending[PENDING];
  /* > 0: a wire that takes one transfer after the other, so long for each byte of a unit; 0: each
   * transfer takes delay_ms, beside the others. */
  double unit_byte_ms, free_ms;
} slow[5];
static int transfers;

static struct slow *slow_of(const struct mt_comm *c) {
  for (size_t i = 0; i < sizeof slow / sizeof *slow; i++) {
    if (slow[i].c == c) return &slow[i];
  }
  return NULL;
}

static mt_err begun(struct mt_comm *c, size_t unit_bytes, const struct mt_transfer *t) {
  struct slow *s = slow_of(c);
  int i = 0;
  double from_ms = now_ms(), takes_ms = delay_ms;
  if (s->unit_byte_ms > 0) {
    from_ms = fmax(from_ms, s->free_ms);
    takes_ms = (double)unit_bytes * s->unit_byte_ms;
  }
  s->free_ms = from_ms + takes_ms;
  while (i < PENDING && s->pending[i].impl) i++;
  if (i == PENDING) return mt_fail(MT_ECOMM, "too many transfers");
  s->pending[i].impl = t->impl;
  s->pending[i].due_ms = s->free_ms;
  transfers++;
  return MT_OK;
}

static double left_ms(struct mt_comm *c, const struct mt_transfer *t, bool forget) {
  struct slow *s = slow_of(c);
  for (int i = 0; i < PENDING; i++) {
    if (s->pending[i].impl != t->impl) continue;
    if (forget) s->pending[i].impl = NULL;
    return s->pending[i].due_ms - now_ms();
  }
  return 0;
}

static mt_err slow_all_to_all(struct mt_comm *c, const void *send, struct mt_parts parts,
                              void *recv, struct mt_parts places, size_t unit_bytes,
                              struct mt_transfer *t) {
  MT_TRY(slow_of(c)->real.all_to_all(c, send, parts, recv, places, unit_bytes, t));
  return begun(c, unit_bytes, t);
}

static mt_err slow_all_gather(struct mt_comm *c, void *buf, struct mt_parts parts,
                              size_t unit_bytes, struct mt_transfer *t) {
  MT_TRY(slow_of(c)->real.all_gather(c, buf, parts, unit_bytes, t));
  return begun(c, unit_bytes, t);
}

static mt_err slow_wait(struct mt_comm *c, struct mt_transfer *t) {
  sleep_ms(left_ms(c, t, true));
  return slow_of(c)->real.wait(c, t);
}

static mt_err slow_test(struct mt_comm *c, struct mt_transfer *t, bool *done) {
  *done = false;
  return left_ms(c, t, false) > 0 ? MT_OK : slow_of(c)->real.test(c, t, done);
}

static void slow_down(struct mt_comm *c, int i) {
  if (c->size == 1) return;
  slow[i] = (struct slow){.c = c, .real = *c};
  c->all_to_all = slow_all_to_all;
  c->all_gather = slow_all_gather;
  c->wait = slow_wait;
  c->test = slow_test;
}

/* A backward in which each gradient takes its time; then what listens to finished ones. */
static void (*listener)(void *context, struct mt_param *p);
static void *listener_context;

static void take_time(void *context, struct mt_param *p) {
  (void)context;
  sleep_ms(work_ms);
  if (listener) listener(listener_context, p);
}

enum way { BEHIND, BESIDE, NONE };

struct asked {
  struct mt_ranks *ranks;
  enum way way;
};

/* What comes before a backward; sharded gradients always are summed as they become ready: who is
 * not told of them finds only the last ones, at the end. */
static mt_err before_backward(void *context, int micro, int micro_count) {
  const struct asked *a = context;
  struct mt_model *m = a->ranks->model;
  a->ranks->behind = a->way != BESIDE;
  if (a->way != NONE) MT_TRY(mt_ranks_begin(a->ranks, micro, micro_count));
  listener = a->way == BESIDE ? m->grad_ready : NULL;
  listener_context = m->grad_ready_context;
  m->grad_ready = take_time;
  return MT_OK;
}

/* One backward, of stages one each, and its sums; gradients (=), where they are whole, as they are
 * then. Returns how long it took. */
static double sum_once(struct run *mine, struct mt_ranks *r, enum way way, char *gradients) {
  struct small_batch b;
  struct asked asked = {r, way};
  double sumsq, begin = now_ms();
  struct mt_pass pass = {.batch = &b.b, .loss_scale = 0.01, .aux_weight = 1};
  batch_of(&b, mine->m.config.vocab, mt_mesh_reader(&r->mesh), 0);
  if (mt_ranks_staged(r)) {
    r->pipeline.begin = before_backward;
    r->pipeline.begin_context = &asked;
    OK(mt_pipeline_run(&r->pipeline, &pass, 1));
  } else {
    OK(mt_model_pass_load(&mine->m, &pass));
    OK(before_backward(&asked, 0, 1));
    OK(mt_model_pass_launch(&mine->m, &pass));
  }
  mine->m.grad_ready = NULL;
  if (way != NONE) OK(mt_ranks_gradients(r, &sumsq));
  double took = now_ms() - begin;
  bool whole = way != NONE && mine->m.options.zero == 0;
  for (int i = 0; whole && i < mine->m.params.count; i++) {
    const struct mt_tensor *g = &mine->m.params.row[i].grad;
    memcpy(gradients, g->data, mt_bytes(g));
    gradients += mt_bytes(g);
  }
  return took;
}

/* Whether what is hidden is asked for: of more ranks than that too little is, which are more than
 * cores; and a sanitizer's build, in which work takes long, is no measure. */
static bool hiding_counts(void) {
  return world.size > 1 && world.size <= 4 && !SANITIZED;
}

/* Of stages the first is looked at, which is the last to come to its sums: those of the others run
 * while it works, whichever way. */
static void on_mesh(int ep, int pp, int zero) {
  struct mt_model_options options = {.experts = MT_EXPERTS_GROUPED,
                                     .blocks = MT_BLOCKS_FUSED,
                                     .training = true,
                                     .aux_coef = 0.1,
                                     .bucket_elements = 4096,
                                     .zero = zero};
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct mt_ranks r;
  struct run mine, whole;
  if (pp > 1) c.layers = STAGE_LAYERS;
  for (int l = 0; l < c.layers; l++) c.layer[l].renormalize = true;
  OK(mt_mesh_make(&c, world.size, world.rank, ep, pp, &mesh));
  struct mt_shard shard = mt_ranks_shard(&mesh);
  open_run(&whole, "fp32", options, &c, NULL);
  small_weights(&whole.m, 3);
  options.sharers = mt_ranks_sharers(&mesh);
  options.in_flight = pp > 1 ? 1 : 0;
  bool looked_at = hiding_counts() && mesh.pp_rank == 0;
  if (!hiding_counts()) delay_ms = DELAY_MS / 10.0, work_ms = WORK_MS / 10.0;
  open_run(&mine, "fp32", options, &c, &shard);
  take_weights(&mine, &whole);
  OK(mt_ranks_open(&r, &world, &mesh));
  OK(mt_ranks_join(&r, &mine.m));
  size_t bytes = mine.m.gradients.capacity_bytes;
  char *behind = calloc(1, bytes), *beside = calloc(1, bytes);
  assert_true(behind && beside);
  double alone = 1e9, after = 1e9; /* the least of three, as others may disturb */
  for (int i = 0; i < 3; i++) alone = fmin(alone, sum_once(&mine, &r, NONE, behind));
  slow_down(&r.comm[MT_GROUP_DENSE], 0);
  slow_down(&r.comm[MT_GROUP_DATA], 1);
  slow_down(&r.late[MT_SYNC_DENSE], 2);
  slow_down(&r.late[MT_SYNC_EXPERT], 3);
  for (int i = 0; i < 3; i++) {
    transfers = 0;
    after = fmin(after, sum_once(&mine, &r, BEHIND, behind));
  }
  /* The sums over ranks of the auxiliary loss, which the last stage makes, and of the norm are no
   * gradients. */
  int of_sums = transfers - (mesh.pp_rank + 1 == pp) - 1;
  double all = of_sums * delay_ms, hidden = -1, during = 0, not_yet = 1;
  if (zero > 1) after = alone + all; /* at the end they would be on their way together */
  /* The machine may be busy with others; all ranks go on until each has seen it. */
  for (int i = 0; i < TRIES && not_yet > 0; i++) {
    during = sum_once(&mine, &r, BESIDE, beside);
    if (zero == 0) assert_memory_equal(behind, beside, bytes);
    hidden = fmax(hidden, (after - during) / all);
    not_yet = hidden < 0.6 && looked_at;
    OK(mt_ranks_sum(&r, &not_yet, 1));
    OK(mt_ranks_sum_stages(&r, &not_yet, 1));
  }
  if (looked_at) {
    if (world.rank == 0) {
      printf(
          "ep %d, pp %d, zero %d: %d transfers of gradients; backward %.0f ms, %.0f ms with sums "
          "behind it, %.0f ms beside it: %.0f%% hidden\n",
          ep, pp, zero, of_sums, alone, after, during, 100 * hidden);
    }
    if (!(hidden >= 0.6)) fail_msg("ep %d, pp %d: only %.0f%% hidden", ep, pp, 100 * hidden);
  }
  delay_ms = DELAY_MS, work_ms = WORK_MS;
  free(behind), free(beside);
  mt_ranks_close(&r);
  close_run(&mine);
  close_run(&whole);
}

static void most_is_hidden(void **state) {
  (void)state;
  for (int ep = 1; ep <= world.size && ep <= 4; ep++) {
    if (world.size % ep == 0 && EXPERTS % ep == 0) on_mesh(ep, 1, 0);
  }
  on_mesh(1, 1, 1);
  on_mesh(1, 1, 2);
}

static void most_is_hidden_of_stages(void **state) {
  (void)state;
  if (world.size % 2 != 0 || world.size < 4) skip();
  for (int ep = 1; ep <= 2; ep++) {
    if (world.size % (2 * ep) == 0) on_mesh(ep, 2, 0);
  }
  on_mesh(1, 2, 1);
  on_mesh(1, 2, 2);
}

/* ---- chunks of tokens ---- */

/* EXPERTS_MS: what the experts of a layer take in each pass, all chunks together, in one of its two
 * products that are joined with SwiGLU. */
enum { EXPERTS_MS = 120, CHUNKS = 4 };
/* Transfers of a layer's two passes for a chunk: tokens and outputs, twice each; beside them counts
 * and twice probabilities. */
enum { OF_TOKENS = 4, OF_ALL = 7 };

static struct mt_ops real_ops;
static double experts_ms;

static mt_err busy_up(struct mt_backend *be, const struct mt_experts_up_fwd_args *a) {
  sleep_ms(experts_ms);
  return real_ops.experts_up_fwd(be, a);
}

static mt_err busy_down(struct mt_backend *be, const struct mt_experts_down_dgrad_args *a) {
  sleep_ms(experts_ms);
  return real_ops.experts_down_dgrad(be, a);
}

/* A model whose experts lie on all ranks, and take their time. */
struct busy {
  struct run run;
  struct mt_ranks ranks;
  char *gradients;
  size_t bytes;
};

static void open_busy(struct busy *b, const struct run *whole, int chunks) {
  struct mt_model_options options = {
      .experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true, .chunks = chunks};
  struct mt_config c = config();
  struct mt_mesh mesh;
  OK(mt_mesh_make(&c, world.size, world.rank, world.size, 1, &mesh));
  struct mt_shard shard = mt_ranks_shard(&mesh);
  open_run(&b->run, "fp32", options, &c, &shard);
  take_weights(&b->run, whole);
  OK(mt_ranks_open(&b->ranks, &world, &mesh));
  OK(mt_ranks_join(&b->ranks, &b->run.m));
  real_ops = b->run.be->ops;
  b->run.be->ops.experts_up_fwd = busy_up;
  b->run.be->ops.experts_down_dgrad = busy_down;
  b->bytes = b->run.m.gradients.capacity_bytes;
  b->gradients = calloc(1, b->bytes);
  assert_non_null(b->gradients);
}

static void close_busy(struct busy *b) {
  free(b->gradients);
  mt_ranks_close(&b->ranks);
  close_run(&b->run);
}

/* Forward and backward. In ms; the same gradients each time. */
static double pass_ms(struct busy *b) {
  struct mt_model *m = &b->run.m;
  struct small_batch batch;
  struct mt_loss loss;
  batch_of(&batch, m->config.vocab, world.rank, 0);
  struct mt_pass pass = {.batch = &batch.b, .loss_scale = 0.01};
  double none = 0;
  experts_ms = (double)EXPERTS_MS / m->options.chunks;
  OK(mt_ranks_sum(&b->ranks, &none, 1)); /* all begin together */
  double begin = now_ms();
  OK(mt_model_train_pass(m, &pass, &loss));
  double took = now_ms() - begin;
  char first = 0;
  for (size_t i = 0; i < b->bytes && !first; i++) first |= b->gradients[i];
  if (first) assert_memory_equal(b->gradients, m->gradients.base, b->bytes);
  memcpy(b->gradients, m->gradients.base, b->bytes);
  return took;
}

/* wire: a transfer of all tokens takes DELAY_MS, of a chunk its share, and they wait for each
 * other: 60% of what those of one chunk take must be hidden. Else each transfer takes DELAY_MS,
 * however small: 60% of what all of them take. */
static void chunks_are_hidden(bool wire) {
  struct mt_config c = config();
  struct busy one, many;
  struct run whole;
  open_run(&whole, "fp32", (struct mt_model_options){.training = true}, &c, NULL);
  small_weights(&whole.m, 3);
  open_busy(&one, &whole, 1);
  open_busy(&many, &whole, CHUNKS);
  double alone = 1e9, apart = 0, beside = 0, hidden = -1, not_yet = 1;
  double cost = (double)DELAY_MS * c.layers * (wire ? OF_TOKENS : OF_ALL * CHUNKS);
  for (int i = 0; i < 4; i++) alone = fmin(alone, pass_ms(i % 2 ? &many : &one));
  struct mt_comm *slowed[] = {&one.ranks.comm[MT_GROUP_EXPERT], &many.ranks.comm[MT_GROUP_EXPERT]};
  for (int i = 0; i < 2; i++) {
    slow_down(slowed[i], i);
    if (wire) slow[i].unit_byte_ms = (double)DELAY_MS / (i ? CHUNKS : 1) / (4.0 * c.hidden);
  }
  for (int i = 0; i < TRIES && not_yet > 0; i++) {
    apart = pass_ms(&one);
    transfers = 0;
    beside = pass_ms(&many);
    assert_int_equal(transfers, OF_ALL * CHUNKS * c.layers);
    if (wire) assert_true(apart > 2.0 * EXPERTS_MS * c.layers + 0.9 * cost);
    hidden = fmax(hidden, 1 - (beside - alone) / cost);
    not_yet = hidden < 0.6 && hiding_counts();
    OK(mt_ranks_sum(&one.ranks, &not_yet, 1));
  }
  if (world.rank == 0) {
    printf("%s: experts' pass %.0f ms, %.0f ms with one chunk, %.0f ms with %d: %.0f%% hidden\n",
           wire ? "20 ms for all tokens" : "20 ms a transfer", alone, apart, beside, CHUNKS,
           100 * hidden);
  }
  if (hiding_counts() && !(hidden >= 0.6)) fail_msg("only %.0f%% hidden", 100 * hidden);
  close_busy(&many);
  close_busy(&one);
  close_run(&whole);
}

static void most_of_the_exchange_is_hidden(void **state) {
  (void)state;
  if (world.size == 1 || EXPERTS % world.size != 0) skip();
  chunks_are_hidden(true);
  chunks_are_hidden(false);
}

/* What a rank has under way when its backward breaks. */
static struct mt_ranks *broken;
static int freed_early, freed;
static void (*really_free)(struct mt_backend *be, void *p, size_t size_bytes);

static bool under_way(struct mt_ranks *r) {
  bool all = true, over;
  for (int g = 0; g < MT_GROUP_COUNT; g++) all &= !mt_comm_settle(&r->comm[g], 0, &over) && over;
  for (int s = 0; s < MT_SYNC_COUNT; s++) all &= !mt_comm_settle(&r->late[s], 0, &over) && over;
  return !all;
}

static void free_and_look(struct mt_backend *be, void *p, size_t size_bytes) {
  freed++;
  freed_early += broken && under_way(broken);
  really_free(be, p, size_bytes);
}

static mt_err break_down(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  (void)be, (void)a;
  return mt_fail(MT_EDEVICE, "the embedding's gradient is lost");
}

/* The last operation of backward fails, with all other gradients on their way to a rank that has
 * not come so far yet: no memory is freed before they are there (the sanitizers' builds would see
 * it too), and the error's message stays. */
static void buffers_outlast_transfers(void **state) {
  (void)state;
  struct mt_model_options options = {.experts = MT_EXPERTS_GROUPED,
                                     .blocks = MT_BLOCKS_FUSED,
                                     .training = true,
                                     .zero = 1, /* sums that nobody sends around */
                                     .bucket_elements = 4096};
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct mt_ranks r;
  struct run mine;
  struct small_batch b;
  struct mt_pass pass = {.batch = &b.b, .loss_scale = 0.01, .aux_weight = 1};
  if (world.size == 1) skip();
  OK(mt_mesh_make(&c, world.size, world.rank, 1, 1, &mesh));
  options.sharers = mt_ranks_sharers(&mesh);
  struct mt_shard shard = mt_ranks_shard(&mesh);
  open_run(&mine, "fp32", options, &c, &shard);
  small_weights(&mine.m, 3);
  OK(mt_ranks_open(&r, &world, &mesh));
  OK(mt_ranks_join(&r, &mine.m));
  batch_of(&b, c.vocab, mt_mesh_reader(&mesh), 0);
  OK(mt_model_pass_load(&mine.m, &pass));
  OK(mt_ranks_begin(&r, 0, 1));
  mine.be->ops.embed_bwd = break_down;
  really_free = mine.be->mem_free;
  mine.be->mem_free = free_and_look;
  listener = mine.m.grad_ready;
  listener_context = mine.m.grad_ready_context;
  if (world.rank > 0) mine.m.grad_ready = take_time;
  assert_int_equal(mt_model_pass_launch(&mine.m, &pass), MT_EDEVICE);
  bool waits = under_way(&r);
  (void)break_down(NULL, NULL); /* its message again */
  broken = &r;
  mt_ranks_settle(&r);
  assert_non_null(strstr(mt_error_message(), "the embedding's gradient is lost"));
  mt_ranks_close(&r);
  broken = NULL;
  assert_true(freed > 0);
  assert_int_equal(freed_early, 0);
  if (world.rank == 0) assert_true(waits); /* or nothing has been shown */
  close_run(&mine);
  OK(mt_comm_barrier(&world.all));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(most_is_hidden), cmocka_unit_test(most_is_hidden_of_stages),
    cmocka_unit_test(most_of_the_exchange_is_hidden), cmocka_unit_test(buffers_outlast_transfers)};
DIST_MAIN(tests)
