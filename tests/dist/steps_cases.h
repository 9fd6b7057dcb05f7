/* Steps of many ranks against those of one rank that has all their batches as one: losses, norms,
 * loads and parameters after ten updates with clipping, accumulation, uneven routing, the auxiliary
 * loss, and ranks whose batch is small. And the same bits twice, with sums beside backward and
 * behind it. */
#ifndef TESTS_DIST_STEPS_CASES_H
#define TESTS_DIST_STEPS_CASES_H

#include "dist/steps.h"

enum { MICRO = 2 };

static double worst_step; /* of all comparisons of parameters so far */

/* Bytes of a sync class's gradients, as they are summed. */
static int64_t class_bytes(const struct mt_model *m, enum mt_sync sync) {
  int64_t n = 0;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    int64_t units = (mt_param_count(p) + MT_BUCKET_UNIT - 1) / MT_BUCKET_UNIT;
    if (p->sync == sync) n += units * MT_BUCKET_UNIT;
  }
  return n * (int64_t)mt_dtype_bytes(m->recipe->grad);
}

/* What docs/parallelism.md says leaves the ranks for the gradients of n of them: (n-1)/n of the
 * bytes each when the parts go out, so (n-1) times them in all, once a micro-batch where gradients
 * are sharded; and as many when the sums come back. */
static void bytes_are_those_of_the_formulas(struct run *mine, struct mt_ranks *r, int micro) {
  int64_t out = steps_run() * (mine->m.options.zero > 1 ? micro : 1);
  const struct mt_comm *dense = r->tensor[MT_GROUP_DENSE], *data = r->tensor[MT_GROUP_DATA];
  int64_t sent[] = {dense->sent[MT_COMM_ALL_TO_ALL].bytes, data->sent[MT_COMM_ALL_TO_ALL].bytes,
                    data->sent[MT_COMM_ALL_GATHER].bytes +
                        r->late[MT_SYNC_EXPERT].sent[MT_COMM_ALL_GATHER].bytes};
  int64_t d = class_bytes(&mine->m, MT_SYNC_DENSE), x = class_bytes(&mine->m, MT_SYNC_EXPERT);
  /* What comes back is sums of gradients or, where those are cut, weights that operations read. */
  size_t whole = mt_dtype_bytes(mine->m.recipe->grad), read = mt_dtype_bytes(mine->m.recipe->act);
  int64_t back = mine->m.options.zero > 0 ? x / (int64_t)whole * (int64_t)read : x;
  OK(mt_ranks_sum_counts(r, sent, 3));
  assert_int_equal(sent[0], out * d * (dense->size - 1));
  assert_int_equal(sent[1], out * x * (data->size - 1) * r->mesh.ep);
  assert_int_equal(sent[2], steps_run() * back * (data->size - 1) * r->mesh.ep);
}

/* A communicator whose exchanges of parts and gatherings happen only when they are waited for: who
 * writes too early to what is sent shows, and who does not wait. */
static struct { struct mt_comm *c, real; } late_comm[4];
static struct late_call {
  struct mt_comm *c;
  bool gathering;
  void *send, *recv;
  size_t unit_bytes;
  int64_t numbers[4][RANKS_MOST];
} late_call[64];

static mt_err put_off(struct mt_comm *c, struct late_call call, struct mt_parts parts,
                      struct mt_parts places, struct mt_transfer *t) {
  const int64_t *from[] = {parts.count, parts.start, places.count, places.start};
  for (size_t i = 0; i < sizeof late_call / sizeof *late_call; i++) {
    if (late_call[i].send) continue;
    late_call[i] = call;
    late_call[i].c = c;
    for (int k = 0; k < 4; k++)
      memcpy(late_call[i].numbers[k], from[k], (size_t)c->size * sizeof(int64_t));
    t->impl = &late_call[i];
    return MT_OK;
  }
  return mt_fail(MT_ECOMM, "too many transfers");
}

static mt_err late_exchange(struct mt_comm *c, const void *send, struct mt_parts parts, void *recv,
                            struct mt_parts places, size_t unit_bytes, struct mt_transfer *t) {
  struct late_call call = {NULL, false, (void *)(uintptr_t)send, recv, unit_bytes, {{0}}};
  return put_off(c, call, parts, places, t);
}

static mt_err late_gather(struct mt_comm *c, void *buf, struct mt_parts parts, size_t unit_bytes,
                          struct mt_transfer *t) {
  return put_off(c, (struct late_call){NULL, true, buf, NULL, unit_bytes, {{0}}}, parts, parts, t);
}

static mt_err late_wait(struct mt_comm *c, struct mt_transfer *t) {
  const struct mt_comm *real = NULL;
  struct late_call *call = t->impl;
  if (!call->send) return MT_OK; /* it has happened: see all_happen */
  for (size_t i = 0; i < sizeof late_comm / sizeof *late_comm; i++) {
    if (late_comm[i].c == c) real = &late_comm[i].real;
  }
  struct mt_parts parts = {call->numbers[0], call->numbers[1]};
  struct mt_parts places = {call->numbers[2], call->numbers[3]};
  if (call->gathering)
    MT_TRY(real->all_gather(c, call->send, parts, call->unit_bytes, t));
  else
    MT_TRY(real->all_to_all(c, call->send, parts, call->recv, places, call->unit_bytes, t));
  call->send = NULL;
  return t->impl ? real->wait(c, t) : MT_OK;
}

/* On a stream all has happened before what comes next. */
static mt_err all_happen(struct mt_comm *c) {
  (void)c;
  for (size_t i = 0; i < sizeof late_call / sizeof *late_call; i++) {
    struct mt_transfer t = {.impl = &late_call[i]};
    if (late_call[i].send) MT_TRY(late_wait(late_call[i].c, &t));
  }
  return MT_OK;
}

static void make_timely(void) {
  for (size_t i = 0; i < sizeof late_comm / sizeof *late_comm; i++) {
    struct mt_comm *c = late_comm[i].c;
    if (!c) continue;
    c->all_to_all = late_comm[i].real.all_to_all;
    c->all_gather = late_comm[i].real.all_gather;
    c->wait = late_comm[i].real.wait;
    c->test = late_comm[i].real.test;
    c->join = late_comm[i].real.join;
    late_comm[i].c = NULL;
  }
}

static void make_late(struct mt_ranks *r) {
  struct mt_comm *c[] = {r->tensor[MT_GROUP_DENSE], r->tensor[MT_GROUP_DATA],
                         &r->late[MT_SYNC_DENSE], &r->late[MT_SYNC_EXPERT]};
  for (int i = 0; i < 4; i++) {
    late_comm[i].c = c[i];
    late_comm[i].real = *c[i];
    if (c[i]->size == 1) continue;
    c[i]->all_to_all = late_exchange;
    c[i]->all_gather = late_gather;
    c[i]->wait = late_wait;
    c[i]->test = NULL;
    c[i]->join = c[i]->join ? all_happen : NULL;
  }
}

/* Exchanges of dense gradients that had left when backward last came to its end, the embedding. */
static struct {
  mt_err (*real)(struct mt_backend *be, const struct mt_embed_bwd_args *a);
  const struct mt_comm *dense;
  int64_t left;
} at_the_end;

static mt_err backward_ends(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  at_the_end.left = at_the_end.dense->sent[MT_COMM_ALL_TO_ALL].calls;
  return at_the_end.real(be, a);
}

/* Steps whose sums must have begun while backward went on, most of them, or none. */
static void run_with_sums(struct run *mine, struct mt_ranks *r, int micro, struct numbers *n) {
  const struct mt_comm *dense = r->tensor[MT_GROUP_DENSE];
  at_the_end.real = mine->be->ops.embed_bwd;
  at_the_end.dense = dense;
  mine->be->ops.embed_bwd = backward_ends;
  run_together(mine, r, micro, n);
  mine->be->ops.embed_bwd = at_the_end.real;
  int sums = 0, times = steps_run() * (mine->m.options.zero > 1 ? micro : 1);
  for (int i = 0; i < r->buckets.count; i++) sums += r->buckets.item[i].sync == MT_SYNC_DENSE;
  if (dense->size == 1) return;
  for (int k = 0; dist_be.memory_used && k < MT_SYNC_COUNT; k++) /* these are the host's */
    assert_int_equal(r->late[k].sent[MT_COMM_ALL_GATHER].calls, 0);
  assert_int_equal(dense->sent[MT_COMM_ALL_TO_ALL].calls, times * sums);
  int64_t waited = times * sums - at_the_end.left;
  if (r->behind ? waited != sums : 2 * waited >= sums)
    fail_msg("%lld of %d sums began after backward", (long long)waited, sums);
}

/* How gradients and state are cut, and which earlier run must have had the same bits. */
static const struct {
  int zero;
  int64_t bucket_elements; /* 1000: several a class, cut through parameters */
  int micro;               /* with one the bits are those of gradients that are whole */
  int same_as;
  bool late;   /* what is on its way is read as late as can be */
  bool behind; /* sums follow backward */
} cuts[] = {{0, 1000, MICRO, -1, false, false}, {0, 1000, MICRO, 0, false, true},
            {1, 1000, MICRO, 0, false, false},  {2, 0, MICRO, -1, false, false},
            {2, 0, MICRO, 3, true, false},      {0, 0, MICRO, -1, true, false},
            {1, 0, MICRO, 5, false, true},      {2, 100, MICRO, -1, true, false},
            {0, 0, 1, -1, false, false},        {2, 0, 1, 8, false, false},
            {0, 1000, 1, -1, true, false},      {2, 1000, 1, 10, true, false}};
static int cuts_run = (int)(sizeof cuts / sizeof *cuts);

/* Ranks of a whole model's mesh, which one model after another joins. */
static void open_ranks(struct mt_ranks *r, int ep) {
  struct mt_config c = config();
  struct mt_mesh mesh;
  OK(mt_mesh_make(&c, world.size, world.rank, ep, 1, &mesh));
  OK(mt_ranks_open(r, &world, &mesh));
}

static void steps_equal_to_one(const char *recipe, struct mt_model_options options,
                               struct mt_ranks *ranks, struct near near) {
  struct mt_config c = config();
  struct numbers want[MICRO + 1] = {0}, got[sizeof cuts / sizeof *cuts] = {0};
  struct mt_shard shard = mt_ranks_shard(&ranks->mesh);
  struct run whole[MICRO + 1], before, mine;
  options.aux_coef = 0.1;
  options.z_coef = 0.05;
  struct mt_model_options wide = options;
  wide.token_capacity = RANKS_MOST * SMALL_TOKENS;
  wide.sequence_capacity = RANKS_MOST * SMALL_SEQUENCES;
  open_run(&before, recipe, options, &c, NULL);
  small_weights(&before.m, 3);
  for (int micro = 1; micro <= MICRO; micro++) {
    open_run(&whole[micro], recipe, wide, &c, NULL);
    take_weights(&whole[micro], &before);
    run_alone(&whole[micro], world.size, micro, &want[micro]);
  }
  options.sharers = mt_ranks_sharers(&ranks->mesh);
  for (int run = 0; run < cuts_run; run++) {
    /* Which bits are the same does not depend on how experts run. */
    if (options.experts == MT_EXPERTS_LOOP && cuts[run].same_as >= 0) continue;
    options.zero = cuts[run].zero;
    options.bucket_elements = cuts[run].bucket_elements;
    open_run(&mine, recipe, options, &c, &shard);
    take_weights(&mine, &before);
    take_cut_masters(&mine, &before);
    join_anew(ranks, &mine.m);
    int micro = cuts[run].micro;
    ranks->behind = cuts[run].behind;
    if (cuts[run].late) make_late(ranks);
    run_with_sums(&mine, ranks, micro, &got[run]);
    make_timely();
    same_numbers(&got[run], &want[micro], near);
    if (cuts[run].same_as >= 0) {
      const struct numbers *same = &got[cuts[run].same_as];
      assert_memory_equal(got[run].loss, same->loss, sizeof same->loss);
      assert_memory_equal(got[run].norm, same->norm, sizeof same->norm);
    }
    bytes_are_those_of_the_formulas(&mine, ranks, micro);
    double off = parameters_off(&mine, &whole[micro], &before);
    if (off > worst_step) worst_step = off;
    if (!(off <= near.parameters)) fail_msg("parameters are off by %.2g of what they moved", off);
    mt_ranks_leave(ranks);
    close_run(&mine);
  }
  for (int micro = 1; micro <= MICRO; micro++) close_run(&whole[micro]);
  close_run(&before);
}

/* Whatever ranks cut among them, the same bits: of weights in 8 bits too, which are made of whole
 * masters, and of states that are rounded at random. */
static void cut_steps_are_the_same(const char *recipe, struct mt_ranks *ranks) {
  static const struct {
    int zero;
    int64_t bucket_elements;
  } ways[] = {{0, 0}, {1, 0}, {2, 0}, {1, 1000}, {2, 1000}};
  struct mt_config c = config();
  struct run before, mine;
  struct numbers got[sizeof ways / sizeof *ways] = {0};
  size_t ways_run = brief ? 3 : sizeof ways / sizeof *ways;
  c.hidden = 64, c.ffn = 96, c.head_dim = 16; /* what 8-bit products take */
  c.layers = 2, c.experts = world.size % 3 == 0 ? 6 : 8;
  struct mt_mesh mesh;
  OK(mt_mesh_make(&c, world.size, world.rank, ranks->mesh.ep, 1, &mesh)); /* of other experts */
  ranks->mesh = mesh;
  struct mt_shard shard = mt_ranks_shard(&mesh);
  struct mt_model_options options = {
      .experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true, .aux_coef = 0.1};
  open_run(&before, recipe, options, &c, NULL);
  small_weights(&before.m, 3);
  options.sharers = mt_ranks_sharers(&mesh);
  for (size_t i = 0; i < ways_run; i++) {
    options.zero = ways[i].zero;
    options.bucket_elements = ways[i].bucket_elements;
    open_run(&mine, recipe, options, &c, &shard);
    take_weights(&mine, &before);
    take_cut_masters(&mine, &before);
    OK(mt_model_quantize_weights(&mine.m));
    join_anew(ranks, &mine.m);
    OK(mt_ranks_quantize(ranks));
    run_together(&mine, ranks, 1, &got[i]);
    int first = ways[i].bucket_elements ? 3 : 0; /* squares are added up bucket by bucket */
    if (memcmp(got[i].loss, got[0].loss, sizeof got[i].loss) != 0 && first == 0)
      fail_msg("%s, ep %d, zero %d: other losses", recipe, mesh.ep, ways[i].zero);
    assert_memory_equal(&got[i], &got[first], sizeof got[i]);
    mt_ranks_leave(ranks);
    close_run(&mine);
  }
  for (int s = 1; s < steps_run(); s++) assert_true(got[0].loss[s] != got[0].loss[0]);
  close_run(&before);
}

static void cut_steps_on_every_mesh(const char *const *recipes, int count) {
  for (int ep = 1; ep <= world.size; ep++) {
    struct mt_ranks ranks;
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    open_ranks(&ranks, ep);
    for (int i = 0; i < count; i++) cut_steps_are_the_same(recipes[i], &ranks);
    ranks.well = true;
    mt_ranks_close(&ranks);
  }
}

/* One number of the last rank is another: every rank is told, and of which parameter, where
 * somebody shares it. */
static void other_weights_are_seen(const char *recipe) {
  struct mt_config c = config();
  if (mt_recipe_find(recipe)->qformat != MT_Q_NONE) c.hidden = 96, c.ffn = 160, c.head_dim = 32;
  for (int ep = 1; ep <= world.size; ep++) {
    struct mt_ranks ranks;
    struct run whole, mine;
    if (world.size % ep != 0 || c.experts % ep != 0) continue;
    open_ranks(&ranks, ep);
    struct mt_shard shard = mt_ranks_shard(&ranks.mesh);
    const struct mt_model_options options = {
        .experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true};
    open_run(&whole, recipe, options, &c, NULL);
    small_weights(&whole.m, 3);
    open_run(&mine, recipe, options, &c, &shard);
    take_weights(&mine, &whole);
    OK(mt_ranks_join(&ranks, &mine.m));
    OK(mt_ranks_same_weights(&ranks, "here"));
    for (int i = 0; i < mine.m.params.count; i++) {
      struct mt_param *p = &mine.m.params.row[i];
      struct mt_tensor *w = p->compute.data ? &p->compute : &p->master;
      size_t at = mt_bytes(w) - mt_dtype_bytes(w->dtype);
      uint64_t was, other;
      OK(mine.be->download(mine.be, &was, (char *)w->data + at, mt_dtype_bytes(w->dtype)));
      other = was ^ (uint64_t)0x40 << (w->dtype == MT_BF16 ? 0 : w->dtype == MT_F32 ? 16 : 45);
      if (world.rank == world.size - 1)
        OK(mine.be->upload(mine.be, (char *)w->data + at, &other, mt_dtype_bytes(w->dtype)));
      bool shared = p->sync == MT_SYNC_DENSE ? world.size > 1 : ranks.mesh.dp > 1;
      mt_err err = mt_ranks_same_weights(&ranks, "here");
      assert_int_equal(err, shared ? MT_EINVAL : MT_OK);
      if (shared && !strstr(mt_error_message(), p->name)) fail_msg("%s", mt_error_message());
      OK(mine.be->upload(mine.be, (char *)w->data + at, &was, mt_dtype_bytes(w->dtype)));
    }
    world.settled = false;
    ranks.well = true;
    mt_ranks_close(&ranks);
    close_run(&mine);
    close_run(&whole);
  }
}

static void steps_on_every_mesh(const char *recipe, struct near near) {
  static const struct mt_model_options ways[] = {
      {.experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .training = true},
      {.experts = MT_EXPERTS_LOOP,
       .blocks = MT_BLOCKS_FUSED,
       .recompute = MT_RECOMPUTE_MLP,
       .training = true,
       .chunks = 3}};
  for (int ep = 1; ep <= world.size; ep++) {
    struct mt_ranks ranks;
    if (world.size % ep != 0 || EXPERTS % ep != 0) continue;
    open_ranks(&ranks, ep);
    for (int i = 0; i < (near.loops ? 2 : 1); i++)
      steps_equal_to_one(recipe, ways[i], &ranks, near);
    if (ep > 1 && !brief) {
      struct mt_model_options chunked = ways[0];
      chunked.chunks = 4;
      int cuts_of_all = cuts_run;
      cuts_run = 2; /* the same bits beside backward and behind it */
      steps_equal_to_one(recipe, chunked, &ranks, near);
      cuts_run = cuts_of_all;
    }
    ranks.well = true;
    mt_ranks_close(&ranks);
  }
}

#endif
