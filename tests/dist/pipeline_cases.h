/* Models cut into stages against one rank that has all of it: losses, norms, loads and parameters
 * after ten updates with accumulation, clipping, the auxiliary loss and lengths that differ; both
 * orders, with and without recomputation, with experts over ranks and several readers; the same
 * bits twice; bytes as the formulas say; evaluation and decoding; memory of a stage alone; and how
 * long stages wait for each other. */
#ifndef TESTS_DIST_PIPELINE_CASES_H
#define TESTS_DIST_PIPELINE_CASES_H

#include "dist/steps.h"
#include "model/decode.h"

enum { STAGE_LAYERS = 5, STAGE_MICRO = 5 };

static double worst_stage; /* of all comparisons of parameters so far */

static struct mt_config layered(int layers) {
  struct mt_config c = config();
  c.layers = layers;
  for (int l = 0; l < layers; l++) c.layer[l].renormalize = true;
  return c;
}

struct order {
  bool sequential;
  struct mt_model_options options;
};

/* A stage's model among ranks. */
static void join_stage(struct run *mine, struct mt_ranks *ranks, const struct mt_config *c,
                       const char *recipe, const struct order *o, int micro_count) {
  const struct mt_mesh *mesh = &ranks->mesh;
  struct mt_shard shard = mt_ranks_shard(mesh);
  struct mt_model_options options = o->options;
  options.sharers = mt_ranks_sharers(mesh);
  options.in_flight = mt_stage_in_flight(o->sequential, mesh->pp_rank, mesh->pp, micro_count);
  open_run(mine, recipe, options, c, &shard);
  join_anew(ranks, &mine->m);
  int comms = ranks->gpu_back.impl != NULL;
  for (int g = 0; g < MT_GROUP_COUNT; g++) comms += ranks->gpu[g].impl != NULL;
  assert_int_equal(comms, dist_be.memory_used ? mt_ranks_gpu_comms(mesh) : 0);
  ranks->pipeline.sequential = o->sequential;
}

/* And among those of a mesh, which are its alone. */
static inline void open_stage(struct run *mine, struct mt_ranks *ranks, const struct mt_mesh *mesh,
                              const struct mt_config *c, const char *recipe, const struct order *o,
                              int micro_count) {
  OK(mt_ranks_open(ranks, &world, mesh));
  join_stage(mine, ranks, c, recipe, o, micro_count);
}

/* Tokens of a micro-batch as they go from stage to stage, over all steps. */
static int64_t tokens_sent(int reader, int vocab) {
  int64_t tokens = 0;
  for (int pass = 0; pass < steps_run() * STAGE_MICRO; pass++) {
    struct small_batch s;
    batch_of(&s, vocab, reader, pass);
    if (pass % 3 == 0) s.b.token_count = s.b.valid_count;
    tokens += mt_batch_rows(&s.b);
  }
  return tokens;
}

/* docs/parallelism.md. */
static void messages_are_those_of_the_formulas(const struct run *mine, const struct mt_ranks *r) {
  const struct mt_config *c = &mine->m.config;
  const struct mt_mesh *mesh = &r->mesh;
  int64_t act = (int64_t)mt_dtype_bytes(mine->m.recipe->act), e = c->experts,
          s = (int64_t)mt_dtype_bytes(mine->m.recipe->stat), p = mesh->pp;
  int64_t hidden = tokens_sent(mt_mesh_reader(mesh), c->vocab) * c->hidden * act, sent = 0;
  if (mesh->pp_rank + 1 < p)
    sent += hidden + (int64_t)steps_run() * STAGE_MICRO * ((e + 1) * s + 4 * e);
  if (mesh->pp_rank > 0) sent += hidden + (int64_t)steps_run() * STAGE_MICRO * (e + 1) * s;
  const struct mt_comm *pipe = r->tensor[MT_GROUP_PIPE], *host = &r->comm[MT_GROUP_PIPE];
  const struct mt_comm *back = r->pipeline.back;
  int64_t messages = pipe->sent[MT_COMM_SEND].bytes;
  if (back != pipe) messages += back->sent[MT_COMM_SEND].bytes;
  assert_int_equal(messages, sent);
  int64_t gathered = pipe->sent[MT_COMM_ALL_GATHER].bytes;
  if (host != pipe) gathered += host->sent[MT_COMM_ALL_GATHER].bytes;
  assert_int_equal(gathered, steps_run() * (p - 1) * 8 * (1 + 4 + c->layers * e + p + 1));
}

static void add_loss(struct mt_loss *to, const struct mt_loss *loss) {
  to->cross_entropy_sum += loss->cross_entropy_sum;
  to->target_count += loss->target_count;
  to->correct_count += loss->correct_count;
  to->aux += loss->aux;
}

/* More batches than a stage has places for, of lengths that differ; each in a memory that is used
 * anew, as a loader's is. */
static void evaluation_is_the_same(struct run *mine, struct mt_ranks *r, struct run *whole,
                                   struct near near) {
  enum { FIRST = 70, BATCHES = 9 };
  static struct small_batch b;
  static struct joined j;
  struct mt_loss got = {0}, want = {0}, one;
  double bound = near.loss * 10;
  int vocab = mine->m.config.vocab, readers = mt_mesh_readers(&r->mesh);
  for (int i = 0; i < BATCHES; i++) {
    batch_of(&b, vocab, mt_mesh_reader(&r->mesh), FIRST + i);
    if (i % 3 == 1) b.b.token_count = b.b.valid_count;
    OK(mt_pipeline_eval(&r->pipeline, i, &b.b, &one));
    bool last = r->mesh.pp_rank + 1 == r->mesh.pp;
    assert_int_equal(one.target_count, last ? b.b.target_count : 0);
    add_loss(&got, &one);
    if (world.rank != 0 && i + 1 < BATCHES) continue; /* the last one's logits all have */
    join(&j, vocab, readers, FIRST + i);
    OK(mt_model_eval_pass(&whole->m, &j.b, &one));
    add_loss(&want, &one);
  }
  OK(mt_comm_broadcast(&everyone, &want, sizeof want, 0));
  OK(mt_pipeline_eval_end(&r->pipeline, &got));
  int64_t counts[] = {got.target_count, got.correct_count};
  OK(mt_ranks_sum(r, &got.cross_entropy_sum, 1));
  OK(mt_ranks_sum_counts(r, counts, 2));
  assert_int_equal(counts[0], want.target_count);
  if (near.exact) assert_int_equal(counts[1], want.correct_count);
  assert_true(fabs(got.cross_entropy_sum - want.cross_entropy_sum) <=
              bound * want.cross_entropy_sum);
  assert_true(fabs(got.aux - want.aux) <= bound * want.aux);
  /* The first reader's tokens are the first of all. */
  enum { ROWS = 3 };
  int n = ROWS * mine->m.config.vocab;
  float *mine_are = malloc((size_t)n * sizeof *mine_are), *all = malloc((size_t)n * sizeof *all);
  assert_true(mine_are && all);
  memset(mine_are, 0xff, (size_t)n * sizeof *mine_are);
  OK(mt_pipeline_logits(&r->pipeline, 0, ROWS, mine_are));
  OK(mt_model_logits(&whole->m, 0, ROWS, all));
  for (int i = 0; i < n && mt_mesh_reader(&r->mesh) == 0; i++)
    assert_true(fabs((double)(mine_are[i] - all[i])) <= bound + 1e-6);
  free(mine_are);
  free(all);
}

static void decoding_is_the_same(struct run *mine, struct mt_ranks *r, struct run *whole,
                                 double bound) {
  static const int32_t prompt[] = {3, 1, 4, 1, 5};
  enum { PROMPT = 5, MORE = 4, V = 19 };
  struct mt_kv_cache cache, all;
  float got[V], want[V];
  OK(mt_kv_cache_create(&cache, &mine->m, PROMPT + MORE));
  OK(mt_kv_cache_create(&all, &whole->m, PROMPT + MORE));
  for (int k = 0; k <= MORE; k++) {
    int32_t next = (int32_t)(7 * k % V);
    const int32_t *ids = k ? &next : prompt;
    int count = k ? 1 : PROMPT;
    memset(got, 0xff, sizeof got);
    OK(mt_pipeline_decode(&r->pipeline, &cache, ids, count, got));
    OK(mt_model_decode(&whole->m, &all, ids, count, want));
    for (int v = 0; v < V; v++) assert_true(fabs((double)(got[v] - want[v])) <= bound + 1e-6);
  }
  const int32_t wrong = V;
  assert_int_equal(mt_pipeline_decode(&r->pipeline, &cache, &wrong, 1, got), MT_ESHAPE);
  mt_kv_cache_destroy(&cache);
  mt_kv_cache_destroy(&all);
}

/* A model without gradients has one set of buffers and still two batches on their way. */
static void inference_is_the_same(struct run *whole, struct run *from, struct mt_ranks *ranks,
                                  const char *recipe, const struct order *order, struct near near) {
  struct order o = *order;
  struct run mine;
  o.options.training = false;
  join_stage(&mine, ranks, &whole->m.config, recipe, &o, 1);
  take_weights(&mine, from);
  evaluation_is_the_same(&mine, ranks, whole, near);
  decoding_is_the_same(&mine, ranks, whole, near.loss * 10);
  mt_ranks_leave(ranks);
  close_run(&mine);
}

/* What a stage takes is its share, and what was planned. */
static void memory_is_the_share(const struct run *mine, const struct run *whole,
                                struct mt_ranks *r) {
  struct mt_memory planned, has = mt_model_memory(&mine->m), all = mt_model_memory(&whole->m);
  OK(mt_model_plan(&mine->m.config, &mine->m.params, mine->m.recipe, mine->be, &mine->m.options,
                   &planned));
  assert_memory_equal(&planned, &has, sizeof has);
  int64_t elements[2] = {0, 0};
  for (int i = 0; i < mine->m.params.count; i++)
    elements[0] += mt_param_count(&mine->m.params.row[i]);
  for (int i = 0; i < whole->m.params.count; i++)
    elements[1] += mt_param_count(&whole->m.params.row[i]);
  assert_true(has.gradients < all.gradients);
  if (r->mesh.ep > 1) return;
  OK(mt_ranks_sum_stage_counts(r, elements, 1));
  assert_int_equal(elements[0], elements[1]);
}

static const struct order orders[] = {
    {false, {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .bucket_elements = 999}},
    {true,
     {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_UNFUSED, .recompute = MT_RECOMPUTE_FULL}},
    {false,
     {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .zero = 1, .bucket_elements = 999}},
    {false,
     {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .zero = 2, .bucket_elements = 999}},
    {false,
     {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .recompute = MT_RECOMPUTE_FULL}},
    {false, {.experts = MT_EXPERTS_LOOP, .blocks = MT_BLOCKS_FUSED, .recompute = MT_RECOMPUTE_MLP}},
    {true, {.experts = MT_EXPERTS_LOOP, .blocks = MT_BLOCKS_UNFUSED}},
    {true, {.experts = MT_EXPERTS_LOOP, .blocks = MT_BLOCKS_FUSED, .zero = 2}}};
enum { ORDERS = sizeof orders / sizeof *orders, GROUPED_ORDERS = 5 };
static int orders_run = ORDERS;

/* Numbers of orders[0], whose bits sharded state must have too. */
static struct numbers unsharded;

static void same_bits(const struct numbers *a, const struct numbers *b) {
  assert_memory_equal(a->loss, b->loss, sizeof a->loss);
  assert_memory_equal(a->norm, b->norm, sizeof a->norm);
}

/* runs: 2 to compare their bits too; whole gradients are summed beside backward in one of them,
 * behind it in the other. */
static void stages_equal_to_one(const char *recipe, const struct order *order,
                                struct mt_ranks *ranks, int runs, struct near near) {
  struct mt_config c = layered(STAGE_LAYERS);
  struct numbers want = {0}, got = {0}, again = {0};
  struct run whole, before, mine;
  struct order o = *order;
  o.options.aux_coef = 0.1;
  o.options.z_coef = 0.02;
  o.options.training = true;
  struct mt_model_options wide = o.options;
  wide.zero = 0;
  wide.token_capacity = RANKS_MOST * SMALL_TOKENS;
  wide.sequence_capacity = RANKS_MOST * SMALL_SEQUENCES;
  open_run(&before, recipe, wide, &c, NULL);
  small_weights(&before.m, 4); /* of whose tokens none is so near a tie that float32 turns it */
  open_run(&whole, recipe, wide, &c, NULL);
  take_weights(&whole, &before);
  run_alone(&whole, mt_mesh_readers(&ranks->mesh), STAGE_MICRO, &want);
  for (int run = 0; run < runs; run++) {
    join_stage(&mine, ranks, &c, recipe, &o, STAGE_MICRO);
    take_weights(&mine, &before);
    take_cut_masters(&mine, &before);
    struct numbers *n = run == 0 ? &got : &again;
    ranks->behind = run == 1;
    run_together(&mine, ranks, STAGE_MICRO, n);
    same_numbers(n, &want, near);
    assert_true((ranks->overlap != NULL) == (run == 0 || o.options.zero > 1));
    if (run == 1) assert_memory_equal(&got, &again, sizeof got);
    if (order == orders) unsharded = got;
    if (order->options.zero == 1) same_bits(&got, &unsharded);
    messages_are_those_of_the_formulas(&mine, ranks);
    double off = parameters_off(&mine, &whole, &before);
    if (off > worst_stage) worst_stage = off;
    if (!(off <= near.parameters)) fail_msg("parameters are off by %.2g of what they moved", off);
    if (run + 1 == runs && near.exact) { /* else their weights differ by now */
      evaluation_is_the_same(&mine, ranks, &whole, near);
      decoding_is_the_same(&mine, ranks, &whole, near.loss * 10);
    }
    if (run + 1 == runs) memory_is_the_share(&mine, &before, ranks);
    mt_ranks_leave(ranks);
    close_run(&mine);
  }
  take_weights(&whole, &before); /* as before its steps */
  if (order == orders) inference_is_the_same(&whole, &before, ranks, recipe, &o, near);
  close_run(&whole);
  close_run(&before);
}

/* Over ranks the loop over experts rounds otherwise than on one: experts_cases.h. */
static void stages_on_mesh(const char *recipe, int ep, int pp, struct near near) {
  struct mt_config c = layered(STAGE_LAYERS);
  struct mt_mesh mesh;
  struct mt_ranks ranks;
  OK(mt_mesh_make(&c, world.size, world.rank, ep, pp, &mesh));
  OK(mt_ranks_open(&ranks, &world, &mesh));
  for (int i = 0; i < orders_run && (ep == 1 || i < GROUPED_ORDERS); i++) {
    int zero = orders[i].options.zero;
    if (zero > 0 && world.size == pp) continue; /* nobody shares */
    bool twice = i % 3 == 0 || zero > 1;
    stages_equal_to_one(recipe, &orders[i], &ranks, twice && !(brief && zero > 1) ? 2 : 1, near);
  }
  ranks.well = true;
  mt_ranks_close(&ranks);
}

static void stages_on_every_mesh(const char *recipe, struct near near) {
  for (int pp = 2; pp <= STAGE_LAYERS; pp++) {
    for (int ep = 1; ep <= world.size; ep++) {
      if (world.size % (pp * ep) == 0 && EXPERTS % ep == 0) stages_on_mesh(recipe, ep, pp, near);
    }
  }
}

#endif
