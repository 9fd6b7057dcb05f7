#include "train/facts.h"

#include <math.h>
#include <stdlib.h>

#include "base/json.h"

static json_t *files(void) {
  return json_pack("{s:s, s:s, s:s, s:s, s:s, s:s}", "model/", "the fine-tuned checkpoint",
                   "metrics.jsonl", "one line a step, and one an evaluation", "samples.jsonl",
                   "answers at each evaluation", "report.html", "all of it to look at", "best/",
                   "the model of the lowest held-out loss (--keep-best)", "checkpoint-N/",
                   "the model after N steps with what --resume needs");
}

static json_t *options(const struct mt_run_facts *f) {
  static const char *const schedules[] = {"linear", "cosine", "constant"};
  static const char *const experts[] = {"loop", "grouped", "fused"};
  static const char *const recompute[] = {"none", "mlp", "full"};
  static const char *const orders[] = {"1f1b", "sequential"}, *const ways[] = {"act", "8bit",
                                                                               "both"};
  const struct mt_train_options *o = f->options;
  json_t *root = json_pack(
      "{s:s, s:s, s:s?, s:s, s:s?, s:s, s:s, s:s, s:s, s:i, s:s, s:i, s:s, s:i, s:i, s:i, s:I, "
      "s:I}",
      "model", o->model, "data", o->data, "eval-data", o->eval_data, "precision",
      f->session->recipe->precision, "fp8-skip", o->device.fp8_skip, "optim-state",
      f->session->recipe->states, "experts", experts[o->experts], "blocks",
      o->blocks == MT_BLOCKS_UNFUSED ? "unfused" : "fused", "recompute", recompute[o->recompute],
      "zero", o->zero, "pp-schedule", orders[o->pp_schedule], "ep-chunks", o->ep_chunks,
      "dispatch-precision", ways[o->dispatch_precision], "batch-size", o->batch_size, "grad-accum",
      o->grad_accum, "max-seq-length", o->max_seq_length, "warmup-steps",
      (json_int_t)o->warmup_steps, "total-steps", (json_int_t)f->total_steps);
  json_t *numbers = json_pack(
      "{s:f, s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:i, s:f, s:b, s:i}", "lr",
      o->lr, "lr-schedule", schedules[o->lr_schedule], "weight-decay", o->weight_decay,
      "adam-beta1", o->adam_beta1, "adam-beta2", o->adam_beta2, "adam-eps", o->adam_eps,
      "grad-clip", o->grad_clip, "router-aux-coef", f->session->model.options.aux_coef,
      "router-z-loss", f->session->model.options.z_coef, "seed", (json_int_t)o->seed, "eval-every",
      (json_int_t)o->eval_every, "save-every", (json_int_t)o->save_every, "patience", o->patience,
      "min-delta", o->min_delta, "train-on-prompt", o->train_on_prompt, "keep-last", o->keep_last);
  json_t *freeze = json_array();
  bool whole = root && numbers && freeze;
  for (int i = 0; i < o->freeze.count; i++)
    whole &= json_array_append_new(freeze, json_string(o->freeze.item[i])) == 0;
  whole = whole && json_object_update(root, numbers) == 0;
  whole &= json_object_set_new(root, "freeze", freeze) == 0;
  json_decref(numbers);
  if (whole) return root;
  json_decref(root);
  return NULL;
}

static json_t *model(const struct mt_session *s) {
  const struct mt_config *c = &s->checkpoint.config;
  struct mt_parameter_counts n = mt_session_parameters(s);
  return json_pack("{s:s, s:I, s:I, s:I, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s}", "type",
                   c->model_type, "parameters", (json_int_t)n.total, "parameters_a_token",
                   (json_int_t)n.active, "parameters_learning", (json_int_t)n.learning, "layers",
                   c->layers, "hidden", c->hidden, "ffn", c->ffn, "experts", c->experts, "top_k",
                   c->top_k, "heads", c->heads, "vocab", c->vocab, "chat_template",
                   mt_template_name(s->chat));
}

static json_t *data(const struct mt_dataset *d) {
  struct mt_dataset_stats n = mt_dataset_stats(d);
  return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "samples", (json_int_t)n.samples,
                   "tokens", (json_int_t)n.tokens, "targets", (json_int_t)n.targets, "longest",
                   (json_int_t)n.longest, "truncated", (json_int_t)n.truncated, "dropped",
                   (json_int_t)n.dropped, "bad_lines", (json_int_t)n.bad_lines);
}

/* JSON has no NaN: such a number is left out. */
static bool set_real(json_t *object, const char *key, double x) {
  return !isfinite(x) || json_object_set_new(object, key, json_real(x)) == 0;
}

static json_t *result(const struct mt_run_result *r) {
  json_t *root =
      json_pack("{s:s, s:I, s:f, s:f, s:s*}", "status", r->status, "step", (json_int_t)r->step,
                "seconds", r->seconds, "median_step_ms", r->median_step_ms, "error", r->error);
  bool whole = root != NULL;
  if (whole && r->evaluated) {
    whole = set_real(root, "loss_before", r->loss_before) &&
            set_real(root, "loss_after", r->loss_after);
  }
  if (whole && r->best.any) {
    whole = json_object_set_new(root, "best_step", json_integer(r->best.step)) == 0 &&
            set_real(root, "best_loss", (double)r->best.loss);
  }
  if (whole) return root;
  json_decref(root);
  return NULL;
}

mt_err mt_facts_write(const struct mt_run_facts *f, const struct mt_run_result *r) {
  const struct mt_backend *be = &f->session->be;
  struct mt_memory m = mt_model_memory(&f->session->model);
  char path[MT_PATH_MAX];
  json_t *root = json_object();
  json_t *device = json_pack("{s:s, s:s, s:i}", "backend", be->name, "description", be->description,
                             "threads", be->thread_count);
  struct mt_mesh mesh = {.world = 1, .dp = 1, .ep = 1, .pp = 1};
  if (f->session->ranks) mesh = f->session->ranks->mesh;
  json_t *ranks = json_pack("{s:i, s:i, s:i, s:i}", "world", mesh.world, "data", mesh.dp, "expert",
                            mesh.ep, "pipeline", mesh.pp);
  json_t *memory = json_pack("{s:I, s:I, s:I, s:I}", "parameters", (json_int_t)m.parameters,
                             "gradients", (json_int_t)m.gradients, "optimizer",
                             (json_int_t)m.optimizer, "activations", (json_int_t)m.activations);
  /* A value that could not be made is refused. */
  int bad = json_object_set_new(root, "moetune", json_string(MOETUNE_VERSION));
  bad |= json_object_set_new(root, "started", json_integer(f->started));
  bad |= json_object_set_new(root, "first_step", json_integer(f->first_step));
  bad |= json_object_set_new(root, "result", result(r));
  bad |= json_object_set_new(root, "files", files());
  bad |= json_object_set_new(root, "options", options(f));
  bad |= json_object_set_new(root, "model", model(f->session));
  bad |= json_object_set_new(root, "data", data(f->data));
  if (f->eval_data) bad |= json_object_set_new(root, "eval_data", data(f->eval_data));
  bad |= json_object_set_new(root, "device", device);
  bad |= json_object_set_new(root, "ranks", ranks);
  bad |= json_object_set_new(root, "memory_bytes", memory); /* of rank 0 */
  char *text = bad ? NULL : mt_json_text(root, JSON_INDENT(2));
  json_decref(root);
  if (!text) return mt_fail(MT_ENOMEM, "run.json");
  mt_err err = mt_path_join(path, f->options->out, "run.json");
  if (!err) err = mt_file_write_atomic(path, text, strlen(text));
  free(text);
  return err;
}
