/* One mesh: its fullest stage's memory, its slowest stage's time, and what travels. */
#include "train/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "data/dataset.h"
#include "hf/checkpoint.h"
#include "kernels/registry.h"
#include "par/ranks.h"
#include "train/session.h"

struct stage {
  size_t dense_grad, expert_grad; /* bytes of a class's gradients, whole */
  struct mt_count count;
};

/* What was counted of meshes of one shape. */
struct mt_planner_entry {
  int ep, dp, pp, recompute, zero, sets; /* sets: micro-batches under way in the first stage */
  struct stage first, last;
};

static bool wants_cuda(const struct mt_plan_options *o) {
  bool table = strcmp(o->machine, "this") != 0 && strcmp(o->device.device, "auto") == 0;
  return table || mt_device_on_gpu(&o->device);
}

/* The backend whose workspaces are planned. A machine of the table has GPUs, whatever is here. */
static mt_err open_backend(struct mt_planner *p) {
  struct mt_device_options d = p->options->device;
  d.plan_only = true;
  d.device = wants_cuda(p->options) ? "cuda" : "cpu";
  mt_err err = mt_device_open(&d, &p->recipe, &p->be);
  if (err != MT_EUNSUPPORTED || strcmp(p->options->device.device, "cuda") == 0 || !p->recipe)
    return err;
  const struct mt_recipe *recipe = p->recipe;
  d.device = "cpu";
  d.precision = recipe->precision;
  p->backend_differs = true;
  return mt_device_open(&d, &p->recipe, &p->be);
}

static struct mt_model_options model_options(const struct mt_planner *p) {
  const struct mt_plan_options *o = p->options;
  return (struct mt_model_options){.experts = (enum mt_experts_strategy)o->experts,
                                   .blocks = (enum mt_blocks_strategy)o->blocks,
                                   .recompute = (enum mt_recompute)o->recompute,
                                   .training = true,
                                   .skip_8bit = p->skip_8bit,
                                   .chunks = o->ep_chunks,
                                   .dispatch = (enum mt_dispatch_precision)o->dispatch_precision,
                                   .token_capacity = p->token_capacity,
                                   .sequence_capacity = o->batch_size};
}

static mt_err open_machine(struct mt_planner *p) {
  const struct mt_plan_options *o = p->options;
  enum { CPU_TOKENS = 1024, GPU_TOKENS = 16384 };
  struct mt_machine *m = &p->machine;
  if (strcmp(o->machine, "this") != 0) {
    MT_TRY(mt_machine_find(o->machine, m));
  } else {
    struct mt_model_options mo = model_options(p);
    int64_t tokens = (int64_t)o->batch_size * o->max_seq_length;
    int64_t most = wants_cuda(o) ? GPU_TOKENS : CPU_TOKENS;
    MT_TRY(mt_machine_measure(&p->config, &o->device, &mo, tokens < most ? tokens : most,
                              o->max_seq_length, m));
  }
  if (o->flops > 0) {
    double faster = o->flops / mt_machine_flops(m, p->recipe->act);
    m->fp8_flops *= faster, m->mxfp8_flops *= faster;
    m->bf16_flops = m->fp32_flops = o->flops;
  }
  if (o->copy_bytes > 0) m->copy_bytes = o->copy_bytes;
  if (o->link_bytes > 0) m->link_bytes = o->link_bytes;
  if (o->network_bytes > 0) m->network_bytes = o->network_bytes;
  if (o->host_gpus > 0) m->host_ranks = o->host_gpus;
  return MT_OK;
}

mt_err mt_planner_open(struct mt_planner *p, const struct mt_plan_options *o) {
  *p = (struct mt_planner){.options = o};
  MT_TRY(mt_path_is_dir(o->path) ? mt_hf_config_load(o->path, &p->config, NULL)
                                 : mt_hf_config_load_file(o->path, &p->config, NULL));
  MT_TRY(open_backend(p));
  MT_TRY(mt_device_skips(&o->device, &p->skip_8bit));
  struct mt_loader_options l = {.batch_size = o->batch_size,
                                .max_seq_length = o->max_seq_length,
                                .pad_multiple = p->recipe->pad_multiple};
  p->token_capacity = mt_loader_token_capacity(&l);
  if (p->token_capacity < 0) return mt_fail(MT_EINVAL, "batch-size x max-seq-length is too large");
  return open_machine(p);
}

void mt_planner_close(struct mt_planner *p) {
  mt_backend_destroy(&p->be);
  free(p->seen);
  *p = (struct mt_planner){0};
}

static void keep_class(struct mt_params *p, enum mt_sync sync) {
  int n = 0;
  for (int i = 0; i < p->count; i++) {
    if (p->row[i].sync == sync) p->row[n++] = p->row[i];
  }
  p->count = n;
}

/* By the model's own layout of rows of this class alone. */
static mt_err class_of(struct mt_planner *p, const struct mt_config *c,
                       const struct mt_params *rows, const struct mt_model_options *o,
                       enum mt_sync sync, size_t *gradients) {
  struct mt_params some = {.count = rows->count};
  struct mt_memory all;
  mt_err err;
  some.row = calloc((size_t)rows->count + 1, sizeof *some.row);
  if (!some.row) return mt_fail(MT_ENOMEM, "%d parameters", rows->count);
  memcpy(some.row, rows->row, (size_t)rows->count * sizeof *some.row);
  keep_class(&some, sync);
  MT_GO(mt_model_plan(c, &some, p->recipe, &p->be, o, &all));
  *gradients = all.gradients;
done:
  mt_params_free(&some);
  return err;
}

static mt_err make_rows(const struct mt_planner *p, const struct mt_shard *shard,
                        struct mt_params *out) {
  const struct mt_string_list *freeze = &p->options->freeze;
  return mt_hf_params(&p->config, shard, freeze->item, freeze->count, NULL, out);
}

static mt_err count_stage(struct mt_planner *p, const struct mt_mesh *m,
                          const struct mt_planner_entry *e, struct stage *out) {
  const struct mt_plan_options *o = p->options;
  const struct mt_config *c = &p->config;
  struct mt_params rows;
  struct mt_count_options co = {.config = c,
                                .params = &rows,
                                .recipe = p->recipe,
                                .backend = &p->be,
                                .model = model_options(p),
                                .machine = &p->machine,
                                .sequence_length = o->max_seq_length,
                                .mesh = m};
  mt_err err;
  co.model.recompute = (enum mt_recompute)e->recompute;
  co.model.shard = mt_ranks_shard(m);
  co.model.sharers = mt_ranks_sharers(m);
  co.model.in_flight = m->pp > 1 ? mt_stage_in_flight(false, m->pp_rank, m->pp, e->sets) : 0;
  co.rows = (int64_t)ceil((double)(p->token_capacity * c->top_k) * o->imbalance);
  MT_GO(make_rows(p, &co.model.shard, &rows));
  MT_GO(class_of(p, c, &rows, &co.model, MT_SYNC_DENSE, &out->dense_grad));
  MT_GO(class_of(p, c, &rows, &co.model, MT_SYNC_EXPERT, &out->expert_grad));
  co.model.zero = e->zero;
  MT_GO(mt_count_step(&co, &out->count, NULL));
done:
  mt_params_free(&rows);
  return err;
}

static mt_err count_stages(struct mt_planner *p, struct mt_planner_entry *e) {
  struct mt_mesh m;
  MT_TRY(mt_mesh_make(&p->config, e->ep * e->dp * e->pp, 0, e->ep, e->pp, &m));
  MT_TRY(count_stage(p, &m, e, &e->first));
  m = mt_mesh_of(&m, &p->config, e->ep * e->dp * (e->pp - 1));
  e->last = e->first;
  return e->pp > 1 ? count_stage(p, &m, e, &e->last) : MT_OK;
}

static mt_err entry_of(struct mt_planner *p, const struct mt_plan *plan,
                       struct mt_planner_entry *out) {
  struct mt_planner_entry e = {.ep = plan->ep,
                               .dp = plan->dp,
                               .pp = plan->pp,
                               .recompute = plan->recompute,
                               .zero = plan->zero,
                               .sets = plan->micro < plan->pp ? plan->micro : plan->pp};
  for (int i = 0; i < p->seen_count; i++) {
    const struct mt_planner_entry *s = &p->seen[i];
    if (s->ep == e.ep && s->dp == e.dp && s->pp == e.pp && s->recompute == e.recompute &&
        s->zero == e.zero && s->sets == e.sets) {
      *out = *s;
      return MT_OK;
    }
  }
  MT_TRY(count_stages(p, &e));
  void *grown = realloc(p->seen, (size_t)(p->seen_count + 1) * sizeof *p->seen);
  if (!grown) return mt_fail(MT_ENOMEM, "%d meshes", p->seen_count + 1);
  p->seen = grown;
  p->seen[p->seen_count++] = *out = e;
  return MT_OK;
}

static struct mt_plan_memory memory_of(const struct mt_planner *p, const struct mt_plan *plan,
                                       const struct stage *s) {
  const struct mt_count *c = &s->count;
  struct mt_plan_memory m = {.parameters = c->arenas.parameters,
                             .gradients = c->arenas.gradients,
                             .optimizer = c->arenas.optimizer,
                             .activations = c->arenas.activations,
                             .exchange = c->rows_bytes,
                             .sums = c->sums_bytes,
                             .comms = (size_t)plan->comms * (size_t)p->options->comm_bytes};
  m.total =
      m.parameters + m.gradients + m.optimizer + m.activations + m.exchange + m.sums + m.comms;
  return m;
}

/* The share of a sum's bytes that leave a rank for others: all that is not its own. */
static double leaving(int ranks) {
  return (double)(ranks - 1) / ranks;
}

static size_t gradients_of(const struct stage *s, enum mt_sync sync) {
  return sync == MT_SYNC_DENSE ? s->dense_grad : s->expert_grad;
}

/* Of the stage that has more: a middle one has neither embedding nor head and as many layers as the
 * first at most. */
static double sum_traffic(const struct mt_planner_entry *e, enum mt_sync sync,
                          const struct mt_plan *plan, int ranks) {
  bool first = gradients_of(&e->first, sync) >= gradients_of(&e->last, sync);
  const struct stage *s = first ? &e->first : &e->last;
  double g = (double)gradients_of(s, sync), weights = s->count.weights_bytes[sync];
  double once = leaving(ranks);
  if (plan->zero == 0) return 2 * once * g;
  /* Parts go to their owners (of sharded gradients each micro-batch's), new weights come back. */
  return once * (g * (plan->zero == 2 ? plan->micro : 1) + weights);
}

/* Parts leave (of sharded gradients in each micro-batch) and sums, or what operations read, come
 * back, in calls as a run makes them. */
static int stage_calls(const struct stage *s, const struct mt_plan *plan, enum mt_sync sync) {
  return s->count.buckets[sync] * (plan->zero == 2 ? plan->micro : 1) + s->count.gathers[sync];
}
static int sum_calls(const struct mt_planner_entry *e, const struct mt_plan *plan,
                     enum mt_sync sync, int ranks) {
  int first = stage_calls(&e->first, plan, sync), last = stage_calls(&e->last, plan, sync);
  return ranks < 2 ? 0 : first > last ? first : last;
}

/* Bytes of a token that leaves and comes back in both passes. */
static double token_bytes(const struct mt_planner *p) {
  double wide = (double)p->config.hidden * (double)mt_dtype_bytes(p->recipe->act);
  int dispatch = p->options->dispatch_precision;
  if (dispatch == MT_DISPATCH_ACT) return 4 * wide;
  double record = (double)mt_q_record_bytes(p->recipe->qformat, p->config.hidden);
  return dispatch == MT_DISPATCH_8BIT ? 3 * wide + record : 2 * (wide + record);
}

static struct mt_plan_traffic traffic_of(const struct mt_planner *p, const struct mt_plan *plan,
                                         const struct mt_planner_entry *e, int layers) {
  const struct mt_config *c = &p->config;
  double passes = plan->micro, tokens = (double)p->token_capacity;
  double stat = (double)mt_dtype_bytes(p->recipe->stat);
  double rows = tokens * c->top_k * leaving(plan->ep) * layers * passes;
  double record = ceil((c->experts * (stat + 4) + stat + 4) / 8) * 8;
  double chunks = p->options->ep_chunks;
  double once = e->first.count.stage_bytes, last = e->last.count.stage_bytes;
  struct mt_plan_traffic t = {
      .counts =
          4.0 * ((double)c->experts / plan->ep + 1) * (plan->ep - 1) * chunks * layers * passes,
      .tokens = rows * token_bytes(p),
      .probabilities = 2 * rows * stat,
      .auxiliary = (plan->dp * plan->ep - 1) * record * passes,
      .dense = sum_traffic(e, MT_SYNC_DENSE, plan, plan->dp * plan->ep),
      .experts = sum_traffic(e, MT_SYNC_EXPERT, plan, plan->dp),
      .dense_calls = sum_calls(e, plan, MT_SYNC_DENSE, plan->dp * plan->ep),
      .expert_calls = sum_calls(e, plan, MT_SYNC_EXPERT, plan->dp),
      .stages = (plan->pp > 2 ? once + last : fmax(once, last)) * passes,
  };
  return t;
}

/* Seconds for bytes that leave a rank for `ranks - 1` others, a stride apart, in so many calls: to
 * those of its host and to others at a time. */
static double travel(const struct mt_machine *m, double bytes, int ranks, int stride,
                     double calls) {
  if (ranks < 2) return 0;
  int local = m->host_ranks / stride;
  if (local < 1) local = 1;
  if (local > ranks) local = ranks;
  double near = bytes * (local - 1) / (ranks - 1), far = bytes - near;
  double slower = fmax(near / m->link_bytes, far / m->network_bytes);
  return slower + calls * (m->call_s + (ranks - 1) * m->peer_s);
}

/* What runs once a step beside the passes: sums, their additions and the norm, which waits for the
 * slowest stage; the update. */
static void step_end(const struct mt_planner *p, const struct mt_planner_entry *e,
                     struct mt_plan *plan) {
  const struct mt_machine *m = &p->machine;
  const struct mt_count *f = &e->first.count, *l = &e->last.count;
  int readers = plan->dp * plan->ep;
  double again = plan->zero == 2 ? plan->micro : 1;
  double sums = travel(m, plan->sent.dense, readers, 1, plan->sent.dense_calls) +
                travel(m, plan->sent.experts, plan->dp, plan->ep, plan->sent.expert_calls) +
                again * fmax(f->sums_s, l->sums_s) + fmax(f->norm_s, l->norm_s);
  double norm = travel(m, 0, readers, 1, 1) + travel(m, 0, plan->pp, readers, 1);
  plan->time.sums = (sums + norm) * (1 - p->options->overlap);
  plan->time.update = fmax(f->update_s, l->update_s);
}

static void times_of(const struct mt_planner *p, const struct mt_planner_entry *e,
                     struct mt_plan *plan, int layers) {
  const struct mt_machine *m = &p->machine;
  const struct mt_count *f = &e->first.count, *l = &e->last.count;
  const struct mt_plan_traffic *sent = &plan->sent;
  int chunks = p->options->ep_chunks;
  double passes = plan->micro, calls = 7.0 * chunks * layers * passes;
  double first = (f->first_s + (passes - 1) * f->more_s) / passes;
  double last = (l->first_s + (passes - 1) * l->more_s) / passes;
  double exchange =
      travel(m, sent->counts + sent->tokens + sent->probabilities, plan->ep, 1, calls) +
      travel(m, sent->auxiliary, plan->dp * plan->ep, 1, passes);
  double messages = travel(m, sent->stages, plan->pp > 1 ? 2 : 1, plan->dp * plan->ep, 2 * passes);
  plan->time.compute = fmax(first, last) * passes;
  plan->time.exchange = (exchange + messages) * (1 - p->options->overlap);
  step_end(p, e, plan);
  /* One micro-batch has to come through the others, which are as the faster of the two. */
  plan->time.bubble = (fmin(first, last) + plan->time.exchange / passes) * (plan->pp - 1);
  plan->time.step = plan->time.compute + plan->time.exchange + plan->time.bubble + plan->time.sums +
                    plan->time.update;
}

mt_err mt_plan_mesh(struct mt_planner *p, struct mt_plan *plan) {
  struct mt_planner_entry e;
  struct mt_mesh mesh;
  const struct mt_plan_options *o = p->options;
  MT_TRY(mt_mesh_make(&p->config, plan->gpus, 0, plan->ep, plan->pp, &mesh));
  plan->dp = mesh.dp;
  plan->comms = wants_cuda(o) ? mt_ranks_gpu_comms(&mesh) : 0;
  MT_TRY(entry_of(p, plan, &e));
  int layers = (int)(mesh.layer_end - mesh.layer_begin);
  plan->memory = memory_of(p, plan, &e.first);
  struct mt_plan_memory last = memory_of(p, plan, &e.last);
  if (last.total > plan->memory.total) plan->memory = last;
  plan->fits = !o->memory_bytes || (plan->memory.total <= o->memory_bytes &&
                                    o->reserve_bytes <= o->memory_bytes - plan->memory.total);
  plan->sent = traffic_of(p, plan, &e, layers);
  times_of(p, &e, plan, layers);
  plan->tokens = (double)o->batch_size * o->max_seq_length * plan->micro * mt_mesh_readers(&mesh);
  plan->model_flops =
      plan->tokens * mt_model_flops_per_token(&p->config, (double)o->max_seq_length);
  return MT_OK;
}
