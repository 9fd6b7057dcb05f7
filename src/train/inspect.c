/* `moetune inspect`: what a checkpoint holds, and what training it would take. */
#include <stdio.h>

#include "train/commands.h"
#include "train/session.h"
#include "train/trainer.h"

static void print_config(const struct mt_hf_checkpoint *h) {
  const struct mt_config *c = &h->config;
  printf("checkpoint      %s (%s, %d shard%s, %s experts)\n", h->dir, c->model_type, h->shard_count,
         h->shard_count == 1 ? "" : "s", h->layout == MT_HF_PACKED ? "packed" : "separate");
  printf("layers          %d, hidden %d, ffn %d, vocabulary %d, %s head\n", c->layers, c->hidden,
         c->ffn, c->vocab, c->tied_head ? "tied" : "untied");
  printf("attention       %d query heads, %d key-value heads of %d, rope theta %g", c->heads,
         c->kv_heads, c->head_dim, c->rope_theta);
  if (c->layer[0].window) printf(", window %d", c->layer[0].window);
  printf("\nexperts         %d, top-%d, auxiliary loss %g%s\n", c->experts, c->top_k, c->aux_coef,
         c->aux_in_loss ? "" : " (not in the loss)");
}

static void print_parameters(const struct mt_config *c, const struct mt_params *params) {
  int64_t total = 0, routed = 0;
  printf("\n%-12s %14s\n", "parameters", "elements");
  for (int kind = 0; kind < MT_PARAM_KIND_COUNT; kind++) {
    int64_t n = 0;
    for (int i = 0; i < params->count; i++) {
      const struct mt_param *p = &params->row[i];
      if ((int)p->kind != kind) continue;
      n += mt_param_count(p);
      if (p->sync == MT_SYNC_EXPERT) routed += mt_param_count(p);
    }
    if (n) printf("%-12s %14lld\n", mt_param_kind_name((enum mt_param_kind)kind), (long long)n);
    total += n;
  }
  printf("%-12s %14lld\n%-12s %14lld (used by one token)\n", "total", (long long)total, "active",
         (long long)(total - routed + routed * c->top_k / c->experts));
}

static void print_tensors(const struct mt_hf_checkpoint *h) {
  printf("\n%-64s %-5s %-22s %s\n", "tensor", "dtype", "shape", "file");
  for (int s = 0; s < h->shard_count; s++) {
    for (size_t i = 0; i < h->shard[s].count; i++) {
      const struct mt_st_tensor *t = &h->shard[s].tensor[i];
      char shape[128] = "";
      size_t used = 0;
      for (int d = 0; d < t->rank && used < sizeof shape - 24; d++) {
        used += (size_t)snprintf(shape + used, sizeof shape - used, d ? " x %lld" : "%lld",
                                 (long long)t->dim[d]);
      }
      printf("%-64s %-5s %-22s %s\n", t->name, t->dtype_name, shape, h->shard_name[s]);
    }
  }
}

static void print_plan(const struct mt_memory *m) {
  const struct {
    const char *name;
    size_t bytes;
  } rows[] = {{"parameters", m->parameters},
              {"gradients", m->gradients},
              {"optimizer", m->optimizer},
              {"activations", m->activations},
              {"arenas", m->parameters + m->gradients + m->optimizer + m->activations}};
  printf("\n%-12s %16s %10s\n", "memory", "bytes", "MiB");
  for (int i = 0; i < 5; i++) {
    printf("%-12s %16zu %10.1f\n", rows[i].name, rows[i].bytes, (double)rows[i].bytes / 1048576);
  }
}

static mt_err plan(struct mt_session *s, const struct mt_inspect_options *o) {
  struct mt_params params;
  struct mt_memory memory;
  mt_err err;
  struct mt_loader_options l = {.batch_size = o->batch_size,
                                .max_seq_length = o->max_seq_length,
                                .pad_multiple = s->recipe->pad_multiple};
  struct mt_model_options m = {.experts = (enum mt_experts_strategy)o->experts,
                               .blocks = (enum mt_blocks_strategy)o->blocks,
                               .recompute = (enum mt_recompute)o->recompute,
                               .aux_coef =
                                   mt_train_aux_coef(o->router_aux_coef, &s->checkpoint.config),
                               .training = true,
                               .token_capacity = mt_loader_token_capacity(&l),
                               .sequence_capacity = o->batch_size};
  if (m.token_capacity < 0) return mt_fail(MT_EINVAL, "batch-size x max-seq-length is too large");
  MT_TRY(mt_params_build(&s->checkpoint.config, &params));
  MT_GO(mt_hf_freeze(&s->checkpoint.config, &params, o->freeze.item, o->freeze.count));
  MT_GO(mt_model_plan(&s->checkpoint.config, &params, s->recipe, &s->be, &m, &memory));
  print_plan(&memory);
done:
  mt_params_free(&params);
  return err;
}

mt_err mt_inspect_run(const struct mt_inspect_options *o) {
  struct mt_session s;
  struct mt_params params;
  struct mt_device_options device = o->device;
  device.plan_only = true;
  MT_TRY(mt_session_open(&s, o->model, &device, NULL));
  mt_err err = mt_params_build(&s.checkpoint.config, &params);
  if (!err) {
    print_config(&s.checkpoint);
    printf("tokenizer       %d ids, chat template %s\n", mt_tokenizer_vocab(s.tokenizer),
           mt_template_name(s.chat));
    print_parameters(&s.checkpoint.config, &params);
    if (o->tensors) print_tensors(&s.checkpoint);
    if (o->train) err = plan(&s, o);
  }
  mt_params_free(&params);
  mt_session_close(&s);
  return err;
}
