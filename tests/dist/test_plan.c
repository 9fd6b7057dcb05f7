/* A plan against real steps over ranks: memory to the byte, also of what grows, and bytes sent,
 * from the communicators' counters. Every token goes to every expert, so rows are shared evenly. */
#include "dist/sharded.h"
#include "data/dataset.h"
#include "temp_dir.h"
#include "train/bench.h"
#include "train/plan.h"
#include "train/step.h"

enum { MICRO = 2, ALL_EXPERTS = 12, SAMPLES = 4, LENGTH = 8 };

static const char text[] =
    "{\"model_type\":\"mixtral\",\"hidden_size\":24,\"intermediate_size\":10,"
    "\"num_hidden_layers\":3,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":6,"
    "\"num_local_experts\":12,\"num_experts_per_tok\":12,\"vocab_size\":19,"
    "\"rms_norm_eps\":1e-5,\"rope_theta\":100.0,\"output_router_logits\":true,"
    "\"router_aux_loss_coef\":0.1}";

/* Of widths that 8 bits take. */
static const char wide[] =
    "{\"model_type\":\"mixtral\",\"hidden_size\":64,\"intermediate_size\":32,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":16,"
    "\"num_local_experts\":12,\"num_experts_per_tok\":12,\"vocab_size\":19,"
    "\"rms_norm_eps\":1e-5,\"rope_theta\":100.0,\"output_router_logits\":true,"
    "\"router_aux_loss_coef\":0.1}";

/* What the backend has given out. */
static struct {
  mt_err (*alloc)(struct mt_backend *be, size_t size_bytes, void **out);
  void (*free)(struct mt_backend *be, void *p, size_t size_bytes);
  size_t bytes;
} given;

static mt_err alloc_seen(struct mt_backend *be, size_t size_bytes, void **out) {
  given.bytes += size_bytes;
  return given.alloc(be, size_bytes, out);
}

static void free_seen(struct mt_backend *be, void *p, size_t size_bytes) {
  if (p) given.bytes -= size_bytes;
  given.free(be, p, size_bytes);
}

static void watch(struct mt_backend *be) {
  given.alloc = be->mem_alloc;
  given.free = be->mem_free;
  given.bytes = 0;
  be->mem_alloc = alloc_seen;
  be->mem_free = free_seen;
}

static void steps(struct run *mine, struct mt_ranks *ranks) {
  static const struct mt_optimizer_options oo = {.lr = 1e-4,
                                                 .beta1 = 0.9,
                                                 .beta2 = 0.99,
                                                 .eps = 1e-8,
                                                 .clip = 1,
                                                 .schedule = MT_SCHEDULE_CONSTANT};
  struct mt_optimizer opt;
  struct mt_step_queue q;
  struct mt_step_result r;
  struct mt_batch b[MICRO], *micro[MICRO];
  for (int i = 0; i < MICRO; i++) {
    uint64_t seed = (uint64_t)(world.rank * MICRO + i + 1);
    OK(mt_random_batch(&b[i], 0, SAMPLES, LENGTH, mine->m.config.vocab, seed));
    micro[i] = &b[i];
  }
  OK(mt_optimizer_create(&opt, &mine->m, &oo));
  OK(mt_step_queue_create(&q, &opt, false));
  q.ranks = ranks;
  OK(mt_step_run(&q, micro, MICRO, &r));
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&opt);
  for (int i = 0; i < MICRO; i++) mt_batch_destroy(&b[i]);
}

static void same_bytes(const char *what, double planned, double real) {
  if (planned != real)
    fail_msg("rank %d: %s: planned %.17g bytes, really %.17g", world.rank, what, planned, real);
}

static void same_traffic(const struct mt_plan *plan, struct mt_ranks *r) {
  const struct mt_comm *expert = &r->comm[MT_GROUP_EXPERT], *dense = &r->comm[MT_GROUP_DENSE],
                       *data = &r->comm[MT_GROUP_DATA];
  const struct mt_plan_traffic *t = &plan->sent;
  int64_t sent[] = {dense->sent[MT_COMM_ALL_TO_ALL].bytes, data->sent[MT_COMM_ALL_TO_ALL].bytes,
                    r->late[MT_SYNC_EXPERT].sent[MT_COMM_ALL_GATHER].bytes};
  int calls = 2 * (int)dense->sent[MT_COMM_ALL_TO_ALL].calls,
      expert_calls = 2 * (int)data->sent[MT_COMM_ALL_TO_ALL].calls;
  if (calls > t->dense_calls || expert_calls > t->expert_calls ||
      (r->mesh.pp == 1 && (calls != t->dense_calls || expert_calls != t->expert_calls)))
    fail_msg("sums in %d and %d calls, planned %d and %d", calls, expert_calls, t->dense_calls,
             t->expert_calls);
  if (r->mesh.pp > 1) { /* whose layers and parameters are fewer elsewhere */
    int64_t bytes = r->comm[MT_GROUP_PIPE].sent[MT_COMM_SEND].bytes;
    if ((double)bytes > t->stages) same_bytes("stages", t->stages, (double)bytes);
    int64_t most = (double)bytes == t->stages;
    OK(mt_ranks_sum_stage_counts(r, &most, 1));
    assert_true(most >= 1);
    return;
  }
  same_bytes("exchange", t->counts + t->tokens + t->probabilities,
             (double)expert->sent[MT_COMM_ALL_TO_ALL].bytes);
  /* Parts differ by what they are multiples of: all ranks' together are exact. */
  OK(mt_ranks_sum_counts(r, sent, 3));
  same_bytes("dense gradients", t->dense / 2 * world.size, (double)sent[0]);
  same_bytes("experts' gradients out", t->experts / 2 * world.size, (double)sent[1]);
  same_bytes("experts' gradients back", t->experts / 2 * world.size, (double)sent[2]);
}

/* The plan is of one of the stages, and of shares and sums of the rank that has most: those who
 * have other numbers have fewer bytes, and someone has these. */
static void same_memory(const struct mt_plan *plan, const struct run *mine, struct mt_ranks *r) {
  const struct mt_memory real = mt_model_memory(&mine->m);
  const struct mt_plan_memory here = {.parameters = real.parameters,
                                      .gradients = real.gradients,
                                      .optimizer = real.optimizer,
                                      .activations = real.activations,
                                      .exchange = given.bytes,
                                      .sums = mt_ranks_sum_bytes(r)};
  const struct mt_plan_memory *m = &plan->memory;
  size_t all = here.parameters + here.gradients + here.optimizer + here.activations +
               here.exchange + here.sums;
  int64_t same = all == m->total && here.parameters == m->parameters &&
                 here.gradients == m->gradients && here.optimizer == m->optimizer &&
                 here.activations == m->activations && here.exchange == m->exchange &&
                 here.sums == m->sums;
  if (all > m->total || (!same && r->mesh.pp == 1 && plan->zero == 0)) {
    same_bytes("parameters", (double)m->parameters, (double)here.parameters);
    same_bytes("gradients", (double)m->gradients, (double)here.gradients);
    same_bytes("optimizer", (double)m->optimizer, (double)here.optimizer);
    same_bytes("activations", (double)m->activations, (double)here.activations);
    same_bytes("rows of other ranks", (double)m->exchange, (double)here.exchange);
    if (here.sums > m->sums) same_bytes("sums", (double)m->sums, (double)here.sums);
  }
  OK(mt_ranks_sum_counts(r, &same, 1));
  if (r->mesh.pp > 1) OK(mt_ranks_sum_stage_counts(r, &same, 1));
  assert_true(same >= 1);
}

static void on_mesh(const char *path, const char *precision, int ep, int pp, int zero,
                    int recompute, int chunks, int dispatch) {
  const struct mt_plan_options o = {
      .path = path,
      .gpus = world.size,
      .ep_size = ep,
      .ep_chunks = chunks,
      .dispatch_precision = dispatch,
      .pp_size = pp,
      .micro_batches = MICRO,
      .batch_size = SAMPLES,
      .max_seq_length = LENGTH,
      .device = {.device = "cpu", .kernels = "native", .precision = precision, .threads = 1},
      .experts = MT_EXPERTS_GROUPED,
      .blocks = MT_BLOCKS_FUSED,
      .imbalance = 1,
      .machine = "h100"};
  struct mt_plan plan = {
      .gpus = world.size, .ep = ep, .pp = pp, .zero = zero, .recompute = recompute, .micro = MICRO};
  struct mt_planner p;
  struct mt_ranks ranks;
  struct mt_mesh mesh;
  struct run mine;
  OK(mt_planner_open(&p, &o));
  OK(mt_plan_mesh(&p, &plan));
  OK(mt_mesh_make(&p.config, world.size, world.rank, ep, pp, &mesh));
  struct mt_model_options mo = {.experts = MT_EXPERTS_GROUPED,
                                .blocks = MT_BLOCKS_FUSED,
                                .recompute = (enum mt_recompute)recompute,
                                .training = true,
                                .aux_coef = 0.1,
                                .token_capacity = p.token_capacity,
                                .sequence_capacity = SAMPLES};
  mo.zero = zero;
  mo.chunks = chunks;
  mo.dispatch = (enum mt_dispatch_precision)dispatch;
  mo.sharers = mt_ranks_sharers(&mesh);
  if (pp > 1) mo.in_flight = mt_stage_in_flight(false, mesh.pp_rank, pp, MICRO);
  struct mt_shard shard = mt_ranks_shard(&mesh);
  open_run(&mine, precision, mo, &p.config, &shard);
  small_weights(&mine.m, 3);
  OK(mt_ranks_open(&ranks, &world, &mesh));
  watch(mine.be);
  OK(mt_ranks_join(&ranks, &mine.m));
  steps(&mine, &ranks);
  given.bytes -= mt_ranks_sum_bytes(&ranks);
  if (world.size == 1) given.bytes = 0; /* a rank alone does not join */
  same_memory(&plan, &mine, &ranks);
  if (zero == 0) same_traffic(&plan, &ranks);
  mt_ranks_close(&ranks);
  mine.be->mem_alloc = given.alloc;
  mine.be->mem_free = given.free;
  close_run(&mine);
  mt_planner_close(&p);
}

static void plans_are_what_ranks_take(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  temp_dir(dir);
  temp_text(dir, "small.json", text);
  OK(mt_path_join(path, dir, "small.json"));
  for (int ep = 1; ep <= world.size; ep++) {
    if (world.size % ep != 0 || ALL_EXPERTS % ep != 0) continue;
    for (int recompute = 0; recompute <= MT_RECOMPUTE_FULL; recompute++) {
      for (int pp = 1; pp <= 3; pp++) {
        if (world.size % (ep * pp) != 0) continue;
        for (int zero = 0; zero <= (world.size > 1); zero++) {
          on_mesh(path, "fp32", ep, pp, zero, recompute, 1, 0);
          on_mesh(path, "bf16", ep, pp, zero, recompute, 1, 0);
          if (ep > 1) on_mesh(path, "fp32", ep, pp, zero, recompute, 3 + pp, 0);
        }
      }
    }
  }
  temp_text(dir, "wide.json", wide);
  OK(mt_path_join(path, dir, "wide.json"));
  for (int ep = 2; ep <= world.size; ep++) {
    if (world.size % ep != 0 || ALL_EXPERTS % ep != 0) continue;
    for (int dispatch = MT_DISPATCH_ACT; dispatch <= MT_DISPATCH_BOTH; dispatch++) {
      on_mesh(path, "mxfp8", ep, 1, 0, MT_RECOMPUTE_MLP, 1 + dispatch, dispatch);
      on_mesh(path, "fp8", ep, 1, 0, MT_RECOMPUTE_NONE, 1, dispatch);
    }
  }
  OK(mt_dir_remove(dir));
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(plans_are_what_ranks_take)};
DIST_MAIN(tests)
