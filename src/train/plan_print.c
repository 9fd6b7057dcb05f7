/* `moetune plan` on standard output. */
#include <stdio.h>
#include <stdlib.h>

#include "base/json.h"
#include "train/plan.h"

static const char *const recompute_names[] = {"none", "mlp", "full"};

static double gb(size_t bytes) {
  return (double)bytes * 1e-9;
}

static void print_head(const struct mt_planner *p) {
  const struct mt_plan_options *o = p->options;
  const struct mt_config *c = &p->config;
  printf("model       %s: %d layers, hidden %d, ffn %d, %d experts, top-%d, vocabulary %d\n",
         c->model_type, c->layers, c->hidden, c->ffn, c->experts, c->top_k, c->vocab);
  printf("work        %d x %d tokens a rank and micro-batch, %d micro-batch%s, %s, states %s\n",
         o->batch_size, o->max_seq_length, o->micro_batches, o->micro_batches == 1 ? "" : "es",
         p->recipe->precision, p->recipe->states);
  printf("machine     %s: product %.4g TFLOP/s, copy %.4g GB/s, link %.4g GB/s, network %.4g GB/s, "
         "%d ranks a host\n",
         p->machine.name, mt_machine_flops(&p->machine, p->recipe->act) * 1e-12,
         p->machine.copy_bytes * 1e-9, p->machine.link_bytes * 1e-9,
         p->machine.network_bytes * 1e-9, p->machine.host_ranks);
  printf(
      "assumed     %.4g%% of what travels hidden behind computing; %.4g us a call and %.4g us each "
      "peer; a GPU's communicator takes %.2f GB\n",
      100 * o->overlap, p->machine.call_s * 1e6, p->machine.peer_s * 1e6,
      (double)o->comm_bytes * 1e-9);
  printf("workspace   of the %s backend%s\n", p->be.name,
         p->backend_differs ? " (this build has no CUDA; a GPU's differs a little)" : "");
}

static void print_bytes(const char *what, size_t bytes) {
  printf("  %-28s %16zu %9.2f GB\n", what, bytes, gb(bytes));
}

static void print_memory(const struct mt_planner *p, const struct mt_plan *plan) {
  const struct mt_plan_memory *m = &plan->memory;
  char comms[64];
  snprintf(comms, sizeof comms, "%d communicators, assumed", plan->comms);
  const struct mt_plan_options *o = p->options;
  puts("\nmemory of the fullest rank");
  print_bytes("parameters", m->parameters);
  print_bytes("gradients", m->gradients);
  print_bytes("optimizer", m->optimizer);
  print_bytes("activations", m->activations);
  print_bytes("rows of other ranks", m->exchange);
  print_bytes("sums of gradients", m->sums);
  if (plan->comms > 0) print_bytes(comms, m->comms);
  print_bytes("all", m->total);
  if (!o->memory_bytes) return;
  printf("  %-28s %16llu %9.2f GB: %s\n", "there are, less the reserve",
         (unsigned long long)(o->memory_bytes - o->reserve_bytes),
         (double)(o->memory_bytes - o->reserve_bytes) * 1e-9, plan->fits ? "fits" : "does not fit");
}

static void print_traffic(const struct mt_plan_traffic *t) {
  const struct {
    const char *what;
    double bytes;
  } rows[] = {{"tokens to experts and back", t->tokens},
              {"counts of rows", t->counts},
              {"probabilities", t->probabilities},
              {"auxiliary loss", t->auxiliary},
              {"dense gradients", t->dense},
              {"experts' gradients", t->experts},
              {"hidden states of stages", t->stages}};
  puts("\nbytes that leave a rank in a step");
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    printf("  %-28s %16.0f %9.2f GB\n", rows[i].what, rows[i].bytes, rows[i].bytes * 1e-9);
  printf("  %-28s %16d %9d\n", "calls of sums, dense, experts", t->dense_calls, t->expert_calls);
}

static void print_time(const struct mt_plan *plan) {
  const struct mt_plan_time *t = &plan->time;
  const struct {
    const char *what;
    double seconds;
  } rows[] = {{"forward and backward", t->compute},  {"exchange and messages", t->exchange},
              {"bubble of the pipeline", t->bubble}, {"sums of gradients", t->sums},
              {"norm and update", t->update},        {"step", t->step}};
  puts("\npredicted time");
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    printf("  %-28s %12.2f ms %5.1f%%\n", rows[i].what, rows[i].seconds * 1e3,
           100 * rows[i].seconds / t->step);
  printf("\n%.0f tokens a step, %.*f TFLOP; %.0f tokens/s, %.1f model TFLOP/s a rank\n",
         plan->tokens, plan->model_flops < 1e15 ? 3 : 0, plan->model_flops * 1e-12,
         plan->tokens / t->step, plan->model_flops / t->step / plan->gpus * 1e-12);
}

static json_t *plan_json(const struct mt_plan *p) {
  const struct mt_plan_memory *m = &p->memory;
  const struct mt_plan_traffic *t = &p->sent;
  const struct mt_plan_time *s = &p->time;
  return json_pack(
      "{s:i,s:i,s:i,s:i,s:i,s:s,s:i,s:b,s:i,s:{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I},"
      "s:{s:f,s:f,s:f,s:f,s:f,s:f,s:f},s:i,s:i,s:{s:f,s:f,s:f,s:f,s:f,s:f},s:f,s:f,s:f}",
      "gpus", p->gpus, "ep", p->ep, "pp", p->pp, "dp", p->dp, "zero", p->zero, "recompute",
      recompute_names[p->recompute], "micro_batches", p->micro, "fits", p->fits, "communicators",
      p->comms, "memory_bytes", "parameters", (json_int_t)m->parameters, "gradients",
      (json_int_t)m->gradients, "optimizer", (json_int_t)m->optimizer, "activations",
      (json_int_t)m->activations, "exchange", (json_int_t)m->exchange, "sums", (json_int_t)m->sums,
      "communicators", (json_int_t)m->comms, "total", (json_int_t)m->total, "sent_bytes", "tokens",
      t->tokens, "counts", t->counts, "probabilities", t->probabilities, "auxiliary", t->auxiliary,
      "dense", t->dense, "experts", t->experts, "stages", t->stages, "dense_sum_calls",
      t->dense_calls, "expert_sum_calls", t->expert_calls, "ms", "compute", s->compute * 1e3,
      "exchange", s->exchange * 1e3, "bubble", s->bubble * 1e3, "sums", s->sums * 1e3, "update",
      s->update * 1e3, "step", s->step * 1e3, "tokens", p->tokens, "model_flops", p->model_flops,
      "tokens_per_s", p->tokens / s->step);
}

static mt_err print_json(const struct mt_planner *p, const char *name, json_t *value) {
  const struct mt_machine *m = &p->machine;
  json_t *all =
      json_pack("{s:s,s:s,s:s,s:b,s:{s:f,s:I},s:{s:s,s:f,s:f,s:f,s:f,s:i},s:o}", "precision",
                p->recipe->precision, "optim_state", p->recipe->states, "workspace_of", p->be.name,
                "workspace_differs", p->backend_differs, "assumed", "overlap", p->options->overlap,
                "comm_memory_bytes", (json_int_t)p->options->comm_bytes, "machine", "name", m->name,
                "flops_per_s", mt_machine_flops(m, p->recipe->act), "copy_bytes_per_s",
                m->copy_bytes, "link_bytes_per_s", m->link_bytes, "network_bytes_per_s",
                m->network_bytes, "host_ranks", m->host_ranks, name, value);
  char *text = mt_json_text(all, JSON_COMPACT | JSON_REAL_PRECISION(12));
  mt_err err = text ? MT_OK : mt_fail(MT_ENOMEM, "the plan as JSON");
  if (!err) puts(text);
  free(text);
  json_decref(all);
  return err;
}

mt_err mt_plan_print(const struct mt_planner *p, const struct mt_plan *plan) {
  if (p->options->json) return print_json(p, "plan", plan_json(plan));
  print_head(p);
  printf("mesh        %d rank%s: ep %d, dp %d, pp %d; ZeRO %d; recompute %s\n", plan->gpus,
         plan->gpus == 1 ? "" : "s", plan->ep, plan->dp, plan->pp, plan->zero,
         recompute_names[plan->recompute]);
  print_memory(p, plan);
  if (plan->gpus > 1) print_traffic(&plan->sent);
  print_time(plan);
  return MT_OK;
}

static void print_row(const struct mt_plan *p) {
  const struct mt_plan_memory *m = &p->memory;
  printf("%5d %4d %4d %4d %4d %9s %8.2f %8.2f %8.2f %8.2f %8.2f %8.2f %10.1f %10.0f %7.1f%s\n",
         p->gpus, p->ep, p->dp, p->pp, p->zero, recompute_names[p->recompute], gb(m->parameters),
         gb(m->gradients), gb(m->optimizer), gb(m->activations),
         gb(m->exchange + m->sums + m->comms), gb(m->total), p->time.step * 1e3,
         p->tokens / p->time.step, p->model_flops / p->time.step / p->gpus * 1e-12,
         p->fits ? "" : "  too large");
}

static void print_columns(void) {
  printf("\n%5s %4s %4s %4s %4s %9s %8s %8s %8s %8s %8s %8s %10s %10s %7s\n", "ranks", "ep", "dp",
         "pp", "zero", "recompute", "param", "grad", "optim", "act", "buffers", "GB", "ms",
         "tokens/s", "TFLOP/s");
}

mt_err mt_plan_print_list(const struct mt_planner *p, const struct mt_plan *plans, int count) {
  const struct mt_plan_options *o = p->options;
  int fit = 0, shown = count < o->rows ? count : o->rows;
  for (int i = 0; i < count; i++) fit += plans[i].fits;
  if (o->json) {
    json_t *list = json_array();
    for (int i = 0; i < shown; i++) json_array_append_new(list, plan_json(&plans[i]));
    return print_json(p, "meshes", list);
  }
  print_head(p);
  printf("meshes      %d of %d fit %.2f GB less %.2f GB in reserve%s\n", fit, count,
         (double)o->memory_bytes * 1e-9, (double)o->reserve_bytes * 1e-9,
         fit ? "; tokens/s decide the order" : "; the smallest first");
  print_columns();
  for (int i = 0; i < shown; i++) print_row(&plans[i]);
  if (shown < count) printf("... and %d more (--rows)\n", count - shown);
  return MT_OK;
}

mt_err mt_plan_print_sweep(const struct mt_planner *p, const struct mt_sweep *sweep) {
  if (p->options->json) {
    json_t *list = json_array();
    for (int i = 0; i < sweep->count; i++) json_array_append_new(list, plan_json(&sweep->best[i]));
    return print_json(p, "sweep", list);
  }
  print_head(p);
  print_columns();
  for (int i = 0; i < sweep->count; i++) print_row(&sweep->best[i]);
  return MT_OK;
}
