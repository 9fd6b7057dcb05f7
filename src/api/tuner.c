#include "moetune/moetune.h"

#include <math.h>
#include <stdlib.h>

#include "api/api.h"
#include "base/log.h"
#include "train/generation.h"
#include "train/trainer.h"

const char *mt_version(void) {
  return MOETUNE_VERSION;
}

void mt_set_log_level(int level) {
  int most = MT_LOG_DEBUG;
  mt_log_set_level((enum mt_log_level)(level < 0 ? 0 : level > most ? most : level));
}

struct mt_tuner_options mt_tuner_defaults(const char *model) {
  return (struct mt_tuner_options){.model = model,
                                   .device = "auto",
                                   .kernels = "native",
                                   .optim_state = "fp32",
                                   .training = 1,
                                   .batch_size = 8,
                                   .max_seq_length = 512,
                                   .grad_accum = 1,
                                   .recompute = "none",
                                   .lr = 2e-5,
                                   .lr_schedule = "constant",
                                   .adam_beta1 = 0.9,
                                   .adam_beta2 = 0.999,
                                   .adam_eps = 1e-8,
                                   .grad_clip = 1,
                                   .router_aux_coef = -1,
                                   .seed = 1};
}

/* Which of the names, ended by NULL, in the order of an enum, `value` is. */
static mt_err choose(const char *option, const char *value, const char *const *names, int *out) {
  for (int i = 0; names[i]; i++) {
    if (!value || strcmp(value, names[i]) != 0) continue;
    *out = i;
    return MT_OK;
  }
  return mt_fail(MT_EINVAL, "%s '%s' is none of those there are", option, value ? value : "(null)");
}

static mt_err in_range(const char *option, double value, double least, double most) {
  if (value >= least && value <= most) return MT_OK; /* not so for NaN */
  return mt_fail(MT_EINVAL, "%s %g lies outside of %g to %g", option, value, least, most);
}

struct choices {
  int device, kernels, recompute, schedule;
};

static mt_err check_options(const struct mt_tuner_options *o, struct choices *c) {
  static const char *const devices[] = {"auto", "cpu", "cuda", NULL};
  static const char *const kernels[] = {"native", "portable", NULL};
  static const char *const recompute[] = {"none", "mlp", "full", NULL};
  static const char *const schedules[] = {"linear", "cosine", "constant", NULL};
  const double below_1 = nextafter(1, 0);
  if (!o->model) return mt_fail(MT_EINVAL, "model is NULL");
  MT_TRY(choose("device", o->device, devices, &c->device));
  MT_TRY(choose("kernels", o->kernels, kernels, &c->kernels));
  MT_TRY(choose("recompute", o->recompute, recompute, &c->recompute));
  MT_TRY(choose("lr_schedule", o->lr_schedule, schedules, &c->schedule));
  MT_TRY(in_range("threads", o->threads, 0, 1024));
  MT_TRY(in_range("batch_size", o->batch_size, 1, 65536));
  MT_TRY(in_range("max_seq_length", o->max_seq_length, 2, 1048576));
  MT_TRY(in_range("grad_accum", o->grad_accum, 1, 65536));
  MT_TRY(in_range("lr", o->lr, 0, 1e3));
  MT_TRY(in_range("warmup_steps", (double)o->warmup_steps, 0, 1e12));
  MT_TRY(in_range("total_steps", (double)o->total_steps, 0, 1e12));
  MT_TRY(in_range("weight_decay", o->weight_decay, 0, 1e3));
  MT_TRY(in_range("adam_beta1", o->adam_beta1, 0, below_1));
  MT_TRY(in_range("adam_beta2", o->adam_beta2, 0, below_1));
  MT_TRY(in_range("adam_eps", o->adam_eps, 1e-300, 1));
  MT_TRY(in_range("grad_clip", o->grad_clip, 0, 1e30));
  MT_TRY(in_range("router_aux_coef", o->router_aux_coef, -1, 1e6));
  MT_TRY(in_range("router_z_loss", o->router_z_loss, 0, 1e6));
  MT_TRY(in_range("freeze_count", o->freeze_count, 0, o->freeze ? 65536 : 0));
  if (c->schedule != MT_SCHEDULE_CONSTANT && o->total_steps <= o->warmup_steps) {
    return mt_fail(MT_EINVAL, "lr_schedule %s needs total_steps above warmup_steps",
                   o->lr_schedule);
  }
  return MT_OK;
}

struct mt_loader_options mt_tuner_loader_options(const struct mt_tuner *t, bool shuffled) {
  bool few = shuffled && mt_graphs_possible(&t->s.be, MT_EXPERTS_GROUPED);
  return (struct mt_loader_options){.lengths = few ? mt_graph_lengths(t->grad_accum) : 0,
                                    .batch_size = t->batch_size,
                                    .micro_batches = shuffled ? t->grad_accum : 1,
                                    .max_seq_length = t->max_seq_length,
                                    .pad_multiple = t->s.recipe->pad_multiple,
                                    .seed = t->seed,
                                    .world = 1,
                                    .shuffle = shuffled};
}

static mt_err open_model(struct mt_tuner *t, const struct mt_tuner_options *o,
                         const struct choices *c) {
  struct mt_loader_options l = mt_tuner_loader_options(t, true);
  const struct mt_string_list freeze = {o->freeze, o->freeze_count};
  struct mt_model_options m = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .recompute = (enum mt_recompute)c->recompute,
                               .aux_coef =
                                   mt_train_aux_coef(o->router_aux_coef, &t->s.checkpoint.config),
                               .z_coef = o->router_z_loss,
                               .training = t->training,
                               .token_capacity = mt_loader_token_capacity(&l),
                               .sequence_capacity = o->batch_size};
  if (m.token_capacity < 0) {
    return mt_fail(MT_EINVAL, "batch_size %d x max_seq_length %d is too large", o->batch_size,
                   o->max_seq_length);
  }
  return mt_session_load(&t->s, &m, t->training && o->freeze_count ? &freeze : NULL);
}

static mt_err open_optimizer(struct mt_tuner *t, const struct mt_tuner_options *o,
                             const struct choices *c) {
  struct mt_optimizer_options a = {.lr = o->lr,
                                   .beta1 = o->adam_beta1,
                                   .beta2 = o->adam_beta2,
                                   .eps = o->adam_eps,
                                   .weight_decay = o->weight_decay,
                                   .clip = o->grad_clip,
                                   .schedule = (enum mt_schedule)c->schedule,
                                   .warmup_steps = o->warmup_steps,
                                   .total_steps = o->total_steps,
                                   .seed = o->seed};
  MT_TRY(mt_optimizer_create(&t->optimizer, &t->s.model, &a));
  return mt_step_queue_create(&t->queue, &t->optimizer, true);
}

mt_err mt_tuner_open(const struct mt_tuner_options *o, mt_tuner **out) {
  struct choices c = {0};
  mt_err err;
  MT_TRY(check_options(o, &c));
  struct mt_device_options device = {.device = o->device,
                                     .kernels = o->kernels,
                                     .precision = o->precision,
                                     .threads = o->threads,
                                     .optim_state = o->optim_state};
  struct mt_tuner *t = calloc(1, sizeof *t);
  if (!t) return mt_fail(MT_ENOMEM, "a tuner");
  t->batch_size = o->batch_size;
  t->max_seq_length = o->max_seq_length;
  t->grad_accum = o->grad_accum;
  t->threads = o->threads;
  t->seed = o->seed;
  t->training = o->training != 0;
  MT_GO(mt_session_open(&t->s, o->model, &device, o->chat_template, NULL));
  MT_GO(open_model(t, o, &c));
  if (t->training) MT_GO(open_optimizer(t, o, &c));
done:
  if (err)
    mt_tuner_close(t);
  else
    *out = t;
  return err;
}

void mt_tuner_close(mt_tuner *t) {
  if (!t) return;
  mt_step_queue_destroy(&t->queue);
  if (t->optimizer.model) mt_optimizer_destroy(&t->optimizer);
  mt_session_close(&t->s);
  free(t);
}

struct mt_tuner_facts mt_tuner_describe(const mt_tuner *t) {
  const struct mt_config *c = &t->s.checkpoint.config;
  struct mt_parameter_counts n = mt_session_parameters(&t->s);
  struct mt_memory m = mt_model_memory(&t->s.model);
  return (struct mt_tuner_facts){.device = t->s.be.name,
                                 .precision = t->s.recipe->precision,
                                 .parameters = n.total,
                                 .active = n.active,
                                 .learning = t->training ? n.learning : 0,
                                 .layers = c->layers,
                                 .hidden = c->hidden,
                                 .experts = c->experts,
                                 .top_k = c->top_k,
                                 .vocab = c->vocab,
                                 .max_positions = c->max_positions > 0 ? c->max_positions : 0,
                                 .memory_bytes =
                                     m.parameters + m.gradients + m.optimizer + m.activations,
                                 .step = t->optimizer.step};
}

mt_err mt_tuner_step(mt_tuner *t, mt_corpus *c, struct mt_tuner_step_result *out) {
  struct mt_step_result r = {0};
  struct mt_loader *l;
  if (!t->training) return mt_fail(MT_EINVAL, "the tuner was opened without training");
  MT_TRY(mt_corpus_loader(c, t, true, &l));
  MT_TRY(mt_step_begin(&t->queue));
  MT_TRY(mt_loader_next(l));
  MT_TRY(mt_step_launch(&t->queue, l->list, t->grad_accum));
  mt_err err = mt_step_take(&t->queue, &r);
  if (out && (!err || err == MT_ENUMERIC)) {
    *out = (struct mt_tuner_step_result){.step = r.step,
                                         .loss = r.loss,
                                         .cross_entropy = r.cross_entropy,
                                         .aux = r.aux,
                                         .z_loss = r.z,
                                         .grad_norm = r.grad_norm,
                                         .lr = r.lr,
                                         .tokens = r.token_count,
                                         .targets = r.target_count,
                                         .correct = r.correct_count,
                                         .ms = r.ms};
  }
  return err ? mt_context(err, "step %lld", (long long)r.step) : MT_OK;
}

mt_err mt_tuner_evaluate(mt_tuner *t, mt_corpus *c, struct mt_tuner_eval_result *out) {
  struct mt_evaluation e;
  struct mt_loader *l;
  MT_TRY(mt_corpus_loader(c, t, false, &l));
  MT_TRY(mt_evaluate(&t->s.model, NULL, l, NULL, &e));
  *out = (struct mt_tuner_eval_result){.loss = e.cross_entropy,
                                       .perplexity = e.perplexity,
                                       .accuracy = e.accuracy,
                                       .samples = e.samples,
                                       .targets = e.targets};
  return MT_OK;
}

struct mt_prompt mt_prompt_defaults(const char *text) {
  return (struct mt_prompt){.text = text, .max_new_tokens = 256, .top_p = 1, .seed = 1};
}

struct listener {
  const struct mt_prompt *prompt;
  struct mt_text text;
  mt_err err;
};

static bool hear(void *context, const char *bytes, size_t size_bytes) {
  struct listener *l = context;
  const struct mt_prompt *p = l->prompt;
  l->err = mt_text_append(&l->text, bytes, size_bytes);
  return !l->err && !(p->on_text && p->on_text(p->context, bytes, size_bytes) != 0);
}

mt_err mt_tuner_generate(mt_tuner *t, const struct mt_prompt *p, char **answer) {
  struct listener l = {.prompt = p};
  struct mt_generation g = {0};
  mt_err err;
  if (!p->text) return mt_fail(MT_EINVAL, "the prompt's text is NULL");
  if (!answer && !p->on_text) return mt_fail(MT_EINVAL, "nobody listens: no answer, no on_text");
  MT_TRY(in_range("max_new_tokens", p->max_new_tokens, 1, 1048576));
  MT_TRY(in_range("temperature", p->temperature, 0, 100));
  MT_TRY(in_range("top_p", p->top_p, 1e-9, 1));
  MT_TRY(in_range("stop_count", p->stop_count, 0, p->stop ? 65536 : 0));
  struct mt_generate_options o = {.prompt = p->text,
                                  .chat = p->chat != 0,
                                  .system = p->chat ? p->system : NULL,
                                  .max_new_tokens = p->max_new_tokens,
                                  .temperature = p->temperature,
                                  .top_p = p->top_p,
                                  .seed = p->seed,
                                  .stop = {p->stop, p->stop_count},
                                  .stream = true};
  MT_GO(mt_generation_open(&g, &t->s, &o));
  g.show = hear;
  g.context = &l;
  MT_GO(mt_generation_ask(&g, p->text, true));
  MT_GO(l.err);
  MT_GO(mt_text_append(&l.text, "", 1));
  if (answer) {
    *answer = l.text.text;
    l.text.text = NULL;
  }
done:
  mt_generation_close(&g);
  free(l.text.text);
  return err;
}

void mt_text_free(char *text) {
  free(text);
}

mt_err mt_tuner_save(mt_tuner *t, const char *dir) {
  const struct mt_hf_export_options e = {.layout = MT_HF_KEEP, .dtype = MT_HF_KEEP};
  const struct mt_params *learned = t->training ? &t->s.model.params : NULL;
  return mt_hf_export(&t->s.checkpoint, learned, &t->s.be, dir, &e);
}
