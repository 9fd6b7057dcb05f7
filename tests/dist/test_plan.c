/* A plan against real steps over ranks: memory to the byte, also of what grows, and bytes sent,
 * from the communicators' counters. Every token goes to every expert, so rows are shared evenly. */
#include "dist/sharded.h"
#include "data/dataset.h"
#include "temp_dir.h"
#include "train/bench.h"
#include "train/plan.h"
#include "train/step.h"

enum { MICRO = 2, ALL_EXPERTS = 12, SAMPLES = 4, LENGTH = 8 };

#define MODEL(hidden, ffn, head)                                                                   \
  "{\"model_type\":\"mixtral\",\"hidden_size\":" hidden ",\"intermediate_size\":" ffn              \
  ",\"head_dim\":" head ","                                                                        \
  "\"num_hidden_layers\":3,\"num_attention_heads\":4,\"num_key_value_heads\":2,"                   \
  "\"num_local_experts\":12,\"num_experts_per_tok\":12,\"vocab_size\":19,"                         \
  "\"rms_norm_eps\":1e-5,\"rope_theta\":100.0,\"output_router_logits\":true,"                      \
  "\"router_aux_loss_coef\":0.1}"
static const char text[] = MODEL("24", "10", "6"), text_8bit[] = MODEL("64", "32", "16");

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

/* Of a step: the auxiliary losses once a micro-batch; targets and tokens, squares, and the report's
 * sums and loads. */
static int64_t gathered_records(const struct mt_ranks *r) {
  const struct mt_model *m = r->model;
  int64_t e = m->config.experts, stat = (int64_t)mt_dtype_bytes(m->recipe->stat);
  int64_t record = (e * (stat + 4) + stat + 4 + 7) / 8 * 8, others = world.size - 1;
  int64_t numbers = MICRO + 1 + 1 + 2 + m->config.layers * e;
  return others * (MICRO * record + numbers * 8);
}

static struct {
  int64_t bytes, calls, dense_bytes;
} before; /* the step: gathered of experts, and of dense ones */

static void same_traffic(const struct mt_plan *plan, struct mt_ranks *r) {
  const struct mt_comm *expert = &r->comm[MT_GROUP_EXPERT], *dense = &r->comm[MT_GROUP_DENSE],
                       *data = &r->comm[MT_GROUP_DATA];
  const struct mt_plan_traffic *t = &plan->sent;
  int64_t sent[] = {dense->sent[MT_COMM_ALL_TO_ALL].bytes, data->sent[MT_COMM_ALL_TO_ALL].bytes,
                    data->sent[MT_COMM_ALL_GATHER].bytes - before.bytes +
                        r->late[MT_SYNC_EXPERT].sent[MT_COMM_ALL_GATHER].bytes};
  /* Of dense ones as well: what else is gathered there are records, of the auxiliary losses and of
   * squares, whose sizes do not depend on the parameters. */
  int64_t back = dense->sent[MT_COMM_ALL_GATHER].bytes - before.dense_bytes +
                 r->late[MT_SYNC_DENSE].sent[MT_COMM_ALL_GATHER].bytes - gathered_records(r);
  int expert_calls =
      (int)(data->sent[MT_COMM_ALL_TO_ALL].calls + data->sent[MT_COMM_ALL_GATHER].calls -
            before.calls + r->late[MT_SYNC_EXPERT].sent[MT_COMM_ALL_GATHER].calls);
  /* As many sums of dense ones come back, where they are no weights that go row by row. */
  bool even = plan->zero == 0;
  int calls = even ? 2 * (int)dense->sent[MT_COMM_ALL_TO_ALL].calls : t->dense_calls;
  if (even && r->mesh.pp > 1) expert_calls = 2 * (int)data->sent[MT_COMM_ALL_TO_ALL].calls;
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
  OK(mt_ranks_sum_counts(r, &back, 1));
  same_bytes("dense gradients", t->dense * world.size, (double)(sent[0] + back));
  same_bytes("experts' gradients", t->experts * world.size, (double)(sent[1] + sent[2]));
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
  const struct mt_recipe *recipe = mt_recipe_find(precision);
  const struct mt_plan_options o = {.path = path,
                                    .gpus = world.size,
                                    .ep_size = ep,
                                    .ep_chunks = chunks,
                                    .dispatch_precision = dispatch,
                                    .pp_size = pp,
                                    .micro_batches = MICRO,
                                    .batch_size = SAMPLES,
                                    .max_seq_length = LENGTH,
                                    .device = {.device = "cpu",
                                               .kernels = "native",
                                               .precision = recipe->precision,
                                               .optim_state = recipe->states,
                                               .threads = 1},
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
  for (int sync = 0; sync < MT_SYNC_COUNT; sync++) {
    const struct mt_tensor *masters = &mine.m.share[sync].master;
    if (masters->data) OK(mine.be->zero(mine.be, masters->data, mt_bytes(masters)));
  }
  OK(mt_ranks_quantize(&ranks));
  before.bytes = ranks.comm[MT_GROUP_DATA].sent[MT_COMM_ALL_GATHER].bytes;
  before.calls = ranks.comm[MT_GROUP_DATA].sent[MT_COMM_ALL_GATHER].calls;
  before.dense_bytes = ranks.comm[MT_GROUP_DENSE].sent[MT_COMM_ALL_GATHER].bytes;
  steps(&mine, &ranks);
  given.bytes -= mt_ranks_sum_bytes(&ranks);
  if (world.size == 1) given.bytes = 0; /* a rank alone does not join */
  same_traffic(&plan, &ranks);
  same_memory(&plan, &mine, &ranks);
  mt_ranks_close(&ranks);
  mine.be->mem_alloc = given.alloc;
  mine.be->mem_free = given.free;
  close_run(&mine);
  mt_planner_close(&p);
}

static void plans_are_what_ranks_take(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], path_8bit[MT_PATH_MAX];
  temp_dir(dir);
  temp_text(dir, "small.json", text);
  OK(mt_path_join(path, dir, "small.json"));
  temp_text(dir, "8bit.json", text_8bit);
  OK(mt_path_join(path_8bit, dir, "8bit.json"));
  for (int ep = 1; ep <= world.size; ep++) {
    if (world.size % ep != 0 || ALL_EXPERTS % ep != 0) continue;
    for (int recompute = 0; recompute <= MT_RECOMPUTE_FULL; recompute++) {
      for (int pp = 1; pp <= 3; pp++) {
        if (world.size % (ep * pp) != 0) continue;
        for (int zero = 0; zero <= (world.size > 1 ? 2 : 0); zero++) {
          on_mesh(path, "fp32", ep, pp, zero, recompute, 1, 0);
          on_mesh(path, "bf16", ep, pp, zero, recompute, 1, 0);
          if (ep > 1) on_mesh(path, "fp32", ep, pp, zero, recompute, 3 + pp, 0);
          if (recompute > 0) continue;
          on_mesh(path, "bf16-states", ep, pp, zero, recompute, 1, 0);
          on_mesh(path_8bit, "mxfp8", ep, pp, zero, recompute, 1, 0);
          on_mesh(path_8bit, "mxfp8-states", ep, pp, zero, recompute, 1, 0);
        }
      }
    }
  }
  for (int ep = 2; ep <= world.size; ep++) {
    if (world.size % ep != 0 || ALL_EXPERTS % ep != 0) continue;
    for (int dispatch = MT_DISPATCH_ACT; dispatch <= MT_DISPATCH_BOTH; dispatch++) {
      on_mesh(path_8bit, "mxfp8", ep, 1, 0, MT_RECOMPUTE_MLP, 1 + dispatch, dispatch);
      on_mesh(path_8bit, "fp8", ep, 1, 0, MT_RECOMPUTE_NONE, 1, dispatch);
    }
  }
  OK(mt_dir_remove(dir));
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(plans_are_what_ranks_take)};
DIST_MAIN(tests)
