/* Experts over ranks: each rank with a batch of its own, against one rank that takes all batches
 * one after another. Losses, gradients of dense parameters (summed over ranks) and of experts. */
#ifndef TESTS_DIST_EXPERTS_CASES_H
#define TESTS_DIST_EXPERTS_CASES_H

#include "dist/sharded.h"
#include "par/exchange.h"
#include "par/ranks.h"

enum { PASSES = 2 };

/* Relative L2 of mine against all's, from `first` on. */
static double off_by(const double *whole, const double *mine, int64_t first, int64_t n) {
  double d = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    double want = whole[first + i];
    d += (mine[i] - want) * (mine[i] - want);
    norm += want * want;
  }
  return sqrt(d) / (sqrt(norm) + 1e-12);
}

/* A gradient, summed over the members of c in their order. */
static double *summed(struct mt_comm *c, const struct run *r, const struct mt_param *p) {
  int64_t n = mt_param_count(p), start[16], count[16];
  double *all = calloc((size_t)(n * c->size), sizeof *all), *mine = values_of(r, &p->grad);
  assert_non_null(all);
  for (int i = 0; i < c->size; i++) count[i] = n, start[i] = i * n;
  memcpy(all + c->rank * n, mine, (size_t)n * sizeof *mine);
  free(mine);
  OK(mt_comm_all_gather(c, all, (struct mt_parts){count, start}, sizeof *all, NULL));
  for (int i = 1; i < c->size; i++) {
    for (int64_t k = 0; k < n; k++) all[k] += all[i * n + k];
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

static double worst; /* of all comparisons so far */

static void compare(const struct run *mine, const struct run *whole, struct mt_comm *data,
                    struct mt_comm *dense, double bound) {
  for (int i = 0; i < mine->m.params.count; i++) {
    const struct mt_param *p = &mine->m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->m.params, p->kind, p->layer);
    double *g = summed(p->sync == MT_SYNC_EXPERT ? data : dense, mine, p);
    double *want = values_of(whole, &w->grad);
    int64_t n = mt_param_count(p);
    double off = off_by(want, g, p->first * (mt_param_count(w) / w->dim[0]), n);
    if (off > worst) worst = off;
    if (!(off <= bound)) fail_msg("rank %d: %s is off by %.2g", world.rank, p->name, off);
    free(g);
    free(want);
  }
}

/* Every logit the same: all tokens go to the first experts, and ranks but the first get no row. */
static void route_to_the_first(struct run *r) {
  for (int i = 0; i < r->m.params.count; i++) {
    struct mt_param *p = &r->m.params.row[i];
    if (p->kind != MT_PARAM_ROUTER) continue;
    OK(r->be->zero(r->be, p->compute.data, mt_bytes(&p->compute)));
    if (p->master.data) OK(r->be->zero(r->be, p->master.data, mt_bytes(&p->master)));
  }
}

/* UNPADDED: rows end with their tokens, which are fewer than the chunks on some ranks. */
enum lot { USUAL, LOPSIDED, ONE_EXPERT_EACH, UNPADDED };

/* A mesh's groups: the experts' and the dense parameters' over both memories, and the copies'. */
struct groups {
  int ep;
  struct mt_comm host_expert, expert, data, dense, tensor_dense;
};

static void open_groups(struct groups *g, int ep) {
  struct mt_config c = config();
  struct mt_mesh mesh;
  g->ep = ep;
  OK(mt_mesh_make(&c, world.size, world.rank, ep, 1, &mesh));
  open_comms(&mesh, MT_GROUP_EXPERT, &g->host_expert, &g->expert);
  open_comms(&mesh, MT_GROUP_DENSE, &g->dense, &g->tensor_dense);
  OK(mt_world_group(&world, &mesh, MT_GROUP_DATA, &g->data));
}

static void close_groups(struct groups *g) {
  close_comms(&g->host_expert, &g->expert);
  close_comms(&g->dense, &g->tensor_dense);
  mt_comm_destroy(&g->data);
}

static void gradients_equal_to_one(const char *recipe, struct mt_model_options options,
                                   struct groups *g, enum lot lot, double bound,
                                   double loss_bound) {
  int ep = g->ep;
  struct mt_config c = config();
  if (lot == ONE_EXPERT_EACH) c.experts = ep;
  if (mt_recipe_find(recipe)->qformat != MT_Q_NONE) c.hidden = 96, c.ffn = 160, c.head_dim = 32;
  struct mt_mesh mesh;
  OK(mt_mesh_make(&c, world.size, world.rank, ep, 1, &mesh));
  struct mt_shard shard = mt_ranks_shard(&mesh);
  struct run whole, mine;
  open_run(&whole, recipe, options, &c, NULL);
  small_weights(&whole.m, 3);
  if (lot == LOPSIDED) route_to_the_first(&whole);
  open_run(&mine, recipe, options, &c, &shard);
  take_weights(&mine, &whole);
  OK(mt_model_quantize_weights(&mine.m));
  OK(mt_exchange_over(&mine.m, &g->expert, &g->tensor_dense));
  /* What an earlier step left: the first pass takes nothing of it, without a row too. */
  size_t bytes = mine.m.gradients.capacity_bytes;
  void *left = malloc(bytes);
  memset(left, 0x7f, bytes);
  OK(mine.be->upload(mine.be, mine.m.gradients.base, left, bytes));
  free(left);
  double want = world.rank == 0 ? alone(&whole, mesh.dp * mesh.ep) : 0, got = 0;
  OK(mt_comm_broadcast(&everyone, &want, sizeof want, 0));
  take_from_rank_0(&whole, &whole.m.gradients);
  for (int pass = 0; pass < PASSES; pass++) {
    struct small_batch b;
    struct mt_loss loss;
    batch_of(&b, c.vocab, mt_mesh_reader(&mesh), pass);
    if (lot == UNPADDED) b.b.token_count = b.b.valid_count;
    struct mt_pass p = {.batch = &b.b, .loss_scale = 0.05, .accumulate = pass > 0};
    OK(mt_model_train_pass(&mine.m, &p, &loss));
    got += loss.cross_entropy_sum;
  }
  double sums[16];
  int64_t start[16], count[16];
  for (int r = 0; r < g->dense.size; r++) start[r] = r, count[r] = 1;
  sums[g->dense.rank] = got;
  OK(mt_comm_all_gather(&g->dense, sums, (struct mt_parts){count, start}, sizeof *sums, NULL));
  got = 0;
  for (int r = 0; r < g->dense.size; r++) got += sums[r];
  if (!(fabs(got - want) <= loss_bound * fabs(want)))
    fail_msg("loss %.12g, alone %.12g", got, want);
  compare(&mine, &whole, &g->data, &g->dense, bound);
  mt_exchange_close(&mine.m);
  close_run(&mine);
  close_run(&whole);
}

static const struct mt_model_options expert_ways[] = {
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

/* More ranks than that do not run every way in chunks: they are more than cores. */
enum { FEW = 4 };

static inline struct mt_model_options in_chunks(struct mt_model_options o, int chunks) {
  o.chunks = chunks;
  return o;
}

/* loops: the loop over experts too. On one rank it weighs outputs, over ranks hidden activations,
 * so that other numbers are rounded; in bf16 that sends a token elsewhere now and then. */
static void gradients_on_every_mesh(const char *recipe, bool loops, double bound,
                                    double loss_bound) {
  struct mt_config c = config();
  const struct mt_model_options *fused = &expert_ways[0];
  for (int ep = 1; ep <= world.size; ep++) {
    struct groups g;
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    open_groups(&g, ep);
    for (size_t i = 0; i < sizeof expert_ways / sizeof *expert_ways; i++) {
      const struct mt_model_options *way = &expert_ways[i];
      if (way->experts == MT_EXPERTS_LOOP && !loops) continue;
      bool whole = !brief || ep == 1 || i % 2 == 0; /* else by turns */
      if (whole) gradients_equal_to_one(recipe, *way, &g, USUAL, bound, loss_bound);
      if (ep > 1 && (brief ? !whole : i == 0 || world.size <= FEW))
        gradients_equal_to_one(recipe, in_chunks(*way, 4), &g, USUAL, bound, loss_bound);
    }
    for (int chunks = brief && ep > 1 ? 3 : 1; chunks <= (ep > 1 ? 3 : 1); chunks += 2) {
      struct mt_model_options way = in_chunks(*fused, chunks);
      gradients_equal_to_one(recipe, way, &g, LOPSIDED, bound, loss_bound);
      if (ep >= c.top_k)
        gradients_equal_to_one(recipe, way, &g, ONE_EXPERT_EACH, bound, loss_bound);
    }
    if (ep > 1) {
      struct mt_model_options most = in_chunks(*fused, MT_MAX_CHUNKS);
      gradients_equal_to_one(recipe, most, &g, UNPADDED, bound, loss_bound);
    }
    close_groups(&g);
  }
}

/* In 8 bits a block along the tokens has those of other ranks too, and not those of other chunks:
 * another scale, another rounding. */
static inline void gradients_in_eight_bits(const char *recipe, double bound, double loss_bound) {
  struct mt_model_options fused = {
      .experts = MT_EXPERTS_FUSED, .blocks = MT_BLOCKS_FUSED, .training = true};
  for (int ep = 1; ep <= world.size; ep++) {
    struct groups g;
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    open_groups(&g, ep);
    for (int chunks = 1; chunks <= (ep > 1 ? 4 : 1); chunks += 3) {
      gradients_equal_to_one(recipe, in_chunks(fused, chunks), &g, USUAL, bound, loss_bound);
      struct mt_model_options grouped = in_chunks(expert_ways[0], chunks);
      gradients_equal_to_one(recipe, grouped, &g, LOPSIDED, bound, loss_bound);
    }
    close_groups(&g);
  }
}

/* Bytes of tokens, outputs and all that goes with them so far. */
static inline int64_t exchanged(const struct groups *g) {
  return g->expert.sent[MT_COMM_ALL_TO_ALL].bytes;
}

/* Tokens that travel in 8 bits are those that the experts would have made of them: one pass gives
 * the same loss and the same gradients, to the bit, but for those whose operand has its blocks
 * along the tokens: of gate and up, and where gradients travel so too, of down. Those are rounded
 * twice.
 */
static inline void dispatch_in_eight_bits(const char *recipe, struct mt_model_options options,
                                          struct groups *g, enum lot lot) {
  struct mt_config c = config();
  if (lot == ONE_EXPERT_EACH) c.experts = g->ep;
  c.hidden = 96, c.ffn = 160, c.head_dim = 32;
  struct mt_mesh mesh;
  struct run whole, run[3];
  struct small_batch b;
  int64_t sent[3];
  double loss[3];
  OK(mt_mesh_make(&c, world.size, world.rank, g->ep, 1, &mesh));
  struct mt_shard shard = mt_ranks_shard(&mesh);
  open_run(&whole, recipe, (struct mt_model_options){.training = true}, &c, NULL);
  small_weights(&whole.m, 3);
  for (int i = MT_DISPATCH_ACT; i <= MT_DISPATCH_BOTH; i++) {
    options.dispatch = (enum mt_dispatch_precision)i;
    open_run(&run[i], recipe, options, &c, &shard);
    take_weights(&run[i], &whole);
    OK(mt_model_quantize_weights(&run[i].m));
    OK(mt_exchange_over(&run[i].m, &g->expert, &g->tensor_dense));
    struct mt_pass p = {.batch = &b.b, .loss_scale = 0.05};
    struct mt_loss l;
    batch_of(&b, c.vocab, mt_mesh_reader(&mesh), 0);
    sent[i] = exchanged(g);
    OK(mt_model_train_pass(&run[i].m, &p, &l));
    sent[i] = exchanged(g) - sent[i];
    loss[i] = l.cross_entropy_sum;
  }
  int64_t less = c.hidden * 2 - mt_q_record_bytes(run[0].m.recipe->qformat, c.hidden);
  assert_true(sent[0] > sent[1] && (sent[0] - sent[1]) % less == 0);
  assert_int_equal(sent[0] - sent[2], 2 * (sent[0] - sent[1]));
  for (int i = 1; i <= 2; i++) {
    assert_memory_equal(&loss[i], &loss[0], sizeof loss[0]);
    for (int k = 0; k < run[0].m.params.count; k++) {
      const struct mt_param *p = &run[0].m.params.row[k], *q = &run[i].m.params.row[k];
      bool twice = p->kind == MT_PARAM_GATE_UP || (i == 2 && p->kind == MT_PARAM_DOWN);
      double *want = values_of(&run[0], &p->grad), *got = values_of(&run[i], &q->grad);
      double off = off_by(want, got, 0, mt_param_count(p));
      if (twice ? !(off < 0.05) : off != 0)
        fail_msg("rank %d: %s of %s, dispatch %d: off by %.2g", world.rank, p->name, recipe, i,
                 off);
      free(want);
      free(got);
    }
  }
  for (int i = 0; i < 3; i++) {
    mt_exchange_close(&run[i].m);
    close_run(&run[i]);
  }
  close_run(&whole);
}

static inline void dispatch_in_eight_bits_on_every_mesh(const char *recipe) {
  struct mt_model_options fused = {
      .experts = MT_EXPERTS_FUSED, .blocks = MT_BLOCKS_FUSED, .training = true};
  for (int ep = 2; ep <= world.size; ep++) {
    struct groups g;
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    open_groups(&g, ep);
    dispatch_in_eight_bits(recipe, fused, &g, USUAL);
    if (world.size <= FEW) {
      dispatch_in_eight_bits(recipe, in_chunks(expert_ways[1], 3), &g, USUAL);
    }
    if (world.size <= FEW && !brief) {
      dispatch_in_eight_bits(recipe, in_chunks(expert_ways[2], 2), &g, USUAL);
    }
    if (ep >= config().top_k)
      dispatch_in_eight_bits(recipe, in_chunks(fused, 2), &g, ONE_EXPERT_EACH);
    close_groups(&g);
  }
}

/* The auxiliary loss and its gradient do not depend on who holds which tokens: every rank has the
 * same one, and it is that of all batches as one. */
static void auxiliary_loss_is_of_all(const char *recipe, double bound) {
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct mt_comm host_expert, expert, host_dense, dense;
  if (world.size > EXPERTS || EXPERTS % world.size != 0) skip();
  OK(mt_mesh_make(&c, world.size, world.rank, world.size, 1, &mesh));
  open_comms(&mesh, MT_GROUP_EXPERT, &host_expert, &expert);
  open_comms(&mesh, MT_GROUP_DENSE, &host_dense, &dense);
  struct mt_shard shard = mt_ranks_shard(&mesh);
  struct mt_model_options o = expert_ways[0];
  o.aux_coef = 0.1;
  o.z_coef = 0.05;
  struct run whole, mine;
  open_run(&whole, recipe, o, &c, NULL);
  small_weights(&whole.m, 3);
  open_run(&mine, recipe, o, &c, &shard);
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
    int32_t count[EXPERTS];
    double *sums = values_of(&whole, &whole.m.acts.aux_prob);
    OK(whole.be->download(whole.be, count, whole.m.acts.aux_count, sizeof count));
    for (int e = 0; e < EXPERTS; e++) {
      prob[e] += sums[e];
      chosen[e] += count[e];
    }
    free(sums);
    double *one = values_of(&whole, &whole.m.acts.z_sum);
    z += *one;
    free(one);
    tokens += b.b.valid_count * c.layers;
  }
  for (int e = 0; e < EXPERTS; e++) {
    want += EXPERTS * ((double)chosen[e] / (double)tokens) * (prob[e] / (double)tokens);
  }
  batch_of(&b, c.vocab, mt_mesh_reader(&mesh), 0);
  OK(mt_model_eval_pass(&mine.m, &b.b, &loss));
  if (!(fabs(loss.aux - want) <= bound * want)) fail_msg("aux %.15g, not %.15g", loss.aux, want);
  z /= (double)tokens;
  if (!(fabs(loss.z - z) <= bound * z)) fail_msg("z-loss %.15g, not %.15g", loss.z, z);
  mt_exchange_close(&mine.m);
  close_run(&mine);
  close_run(&whole);
  close_comms(&host_expert, &expert);
  close_comms(&host_dense, &dense);
}

#endif
