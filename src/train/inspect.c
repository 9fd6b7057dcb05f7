/* `moetune inspect MODEL`: what a checkpoint holds, whether it can be trained, and what that takes.
 * Whatever is missing or does not fit, the rest is shown. */
#include "train/inspect.h"

#include <stdarg.h>
#include <stdio.h>

#include "io/checksums.h"
#include "train/commands.h"
#include "train/session.h"
#include "train/terminal.h"
#include "train/trainer.h"

enum { MAX_REASONS = 8, AUTO_NORMS_WEIGHTS = 1000 * 1000 * 1000 };
static const uint64_t auto_verify_bytes = 4000000000u;

struct survey {
  const struct mt_inspect_options *o;
  struct mt_hf_checkpoint h;
  struct mt_params params;
  struct mt_mesh mesh;
  bool config, shards, fits; /* could be opened; the tensors are those of the config */
  bool no_weights, no_tokenizer;
  struct mt_tokenizer *tokenizer;
  const struct mt_template *chat;
  char reason[MAX_REASONS][1024];
  int reasons;
  char checksums[1024]; /* what comparing them said */
};

/* One reason more against training: the thread's message. */
static void against(struct survey *s) {
  if (s->reasons == MAX_REASONS) return;
  snprintf(s->reason[s->reasons++], sizeof s->reason[0], "%s", mt_error_message());
}

static void look_at_weights(struct survey *s) {
  s->no_weights = !mt_hf_has_weights(s->o->model);
  if (s->no_weights) return;
  s->shards = mt_hf_open_shards(&s->h) == MT_OK;
  s->fits = s->shards && s->config && mt_hf_check(&s->h) == MT_OK;
  if (!s->shards || (s->config && !s->fits)) against(s);
}

static void look_at_tokenizer(struct survey *s) {
  char path[MT_PATH_MAX];
  if (mt_path_join(path, s->o->model, "tokenizer.json") != MT_OK) return;
  mt_err err = mt_tokenizer_load(path, &s->tokenizer);
  s->no_tokenizer = err == MT_ENOENT;
  if (err && !s->no_tokenizer) against(s);
  if (!err && s->config && mt_tokenizer_vocab(s->tokenizer) > s->h.config.vocab) {
    mt_fail(MT_ESHAPE, "%s has ids up to %d, the model's vocab_size is %d", path,
            mt_tokenizer_vocab(s->tokenizer) - 1, s->h.config.vocab);
    against(s);
  }
  err = s->o->chat_template ? mt_template_find(s->o->chat_template, &s->chat)
                            : mt_template_detect(s->o->model, &s->chat);
  if (err) {
    s->chat = NULL;
    against(s);
  }
}

/* All files are read: of large ones only when that is asked for. */
static void look_at_checksums(struct survey *s) {
  uint64_t bytes = 0;
  bool listed = false;
  for (int i = 0; s->shards && i < s->h.shard_count; i++) bytes += s->h.shard[i].map.size_bytes;
  if (!s->o->verify && (s->no_weights || bytes > auto_verify_bytes)) return;
  mt_err err = mt_checksums_verify(s->o->model, &listed);
  if (!err && !listed && s->o->verify) err = mt_checksums_demand(s->o->model);
  snprintf(s->checksums, sizeof s->checksums, "%s",
           err      ? mt_error_message()
           : listed ? "every file is as it was written"
                    : "none");
  if (err && s->o->verify) against(s);
}

static void print_config(const struct survey *s) {
  const struct mt_hf_checkpoint *h = &s->h;
  const struct mt_config *c = &h->config;
  printf("checkpoint      ");
  mt_inspect_text(h->dir);
  printf(" (");
  if (s->config) mt_inspect_text(c->model_type);
  if (s->shards) {
    printf("%s%d shard%s, %s experts", s->config ? ", " : "", h->shard_count,
           h->shard_count == 1 ? "" : "s", h->layout == MT_HF_PACKED ? "packed" : "separate");
  }
  puts(!s->shards && s->no_weights ? ", no weights)" : ")");
  if (!s->config) return;
  printf("layers          %d, hidden %d, ffn %d, vocabulary %d, %s head\n", c->layers, c->hidden,
         c->ffn, c->vocab, c->tied_head ? "tied" : "untied");
  printf("attention       %d query heads, %d key-value heads of %d, rope theta %g", c->heads,
         c->kv_heads, c->head_dim, c->rope_theta);
  if (c->layer[0].window) printf(", window %d", c->layer[0].window);
  printf("\nexperts         %d, top-%d, auxiliary loss %g%s\n", c->experts, c->top_k, c->aux_coef,
         c->aux_in_loss ? "" : " (not in the loss)");
}

static void print_token(const struct survey *s, const char *what, int32_t id) {
  const char *text = id >= 0 ? mt_tokenizer_token(s->tokenizer, id) : NULL;
  if (id < 0) {
    printf("%s none", what);
    return;
  }
  printf("%s %d", what, (int)id);
  if (!text) return;
  printf(" '");
  mt_inspect_text(text);
  putchar('\'');
}

static void print_tokenizer(const struct survey *s) {
  printf("tokenizer       ");
  if (!s->tokenizer) {
    puts(s->no_tokenizer ? "none" : "cannot be used");
  } else {
    struct mt_tokenizer_facts f = mt_tokenizer_facts(s->tokenizer);
    printf("%d ids up to %d, %d merges, %s; %d added tokens, %d of them special\n", f.tokens,
           mt_tokenizer_vocab(s->tokenizer) - 1, f.merges,
           f.byte_fallback ? "byte fallback"
           : f.byte_level  ? "byte-level"
                           : "no bytes",
           f.added, f.special);
    printf("                before a text:");
    for (int i = 0; i < f.prefix_count; i++) print_token(s, "", f.prefix[i]);
    if (f.prefix_count == 0) printf(" nothing");
    if (f.suffix_count) printf("; behind it:");
    for (int i = 0; i < f.suffix_count; i++) print_token(s, "", f.suffix[i]);
    print_token(s, "; unknown", f.unknown);
    putchar('\n');
    if (s->config) {
      print_token(s, "                BOS", s->h.config.bos_id);
      print_token(s, "; EOS", s->h.config.eos_id);
      print_token(s, "; padding", s->h.config.pad_id);
      putchar('\n');
    }
  }
  printf("chat template   %s\n", s->chat ? mt_template_name(s->chat) : "not known");
}

static void print_checksums(const struct survey *s) {
  if (!s->checksums[0]) return;
  printf("checksums       ");
  mt_inspect_text(s->checksums);
  putchar('\n');
}

static void print_compatible(const struct survey *s) {
  printf("compatible      ");
  if (s->reasons == 0 && !s->no_weights && !s->no_tokenizer) {
    puts("yes");
    return;
  }
  if (s->reasons == 0) {
    printf("yes, as far as it goes; to train, it still needs %s%s%s\n",
           s->no_weights ? "model.safetensors or model.safetensors.index.json with its shards" : "",
           s->no_weights && s->no_tokenizer ? " and " : "",
           s->no_tokenizer ? "tokenizer.json" : "");
    return;
  }
  puts("no");
  for (int i = 0; i < s->reasons; i++) {
    printf("                - ");
    mt_inspect_text(s->reason[i]);
    putchar('\n');
  }
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

static mt_err plan_on(struct mt_backend *be, const struct mt_recipe *recipe, struct survey *s) {
  const struct mt_inspect_options *o = s->o;
  struct mt_memory memory;
  struct mt_loader_options l = {.batch_size = o->batch_size,
                                .max_seq_length = o->max_seq_length,
                                .pad_multiple = recipe->pad_multiple};
  struct mt_model_options m = {.experts = (enum mt_experts_strategy)o->experts,
                               .blocks = (enum mt_blocks_strategy)o->blocks,
                               .recompute = (enum mt_recompute)o->recompute,
                               .aux_coef = mt_train_aux_coef(o->router_aux_coef, &s->h.config),
                               .training = true,
                               .token_capacity = mt_loader_token_capacity(&l),
                               .sequence_capacity = o->batch_size};
  if (m.token_capacity < 0) return mt_fail(MT_EINVAL, "batch-size x max-seq-length is too large");
  struct mt_params params;
  MT_TRY(mt_device_skips(&o->device, &m.skip_8bit));
  m.shard = mt_shard_whole(&s->h.config);
  if (o->mesh) {
    m.shard = mt_ranks_shard(&s->mesh);
    m.sharers = mt_ranks_sharers(&s->mesh);
    m.zero = o->zero;
    m.chunks = o->ep_chunks;
    m.dispatch = (enum mt_dispatch_precision)o->dispatch_precision;
    /* As training lays out 1F1B with as many micro-batches as there are stages, or more. */
    if (s->mesh.pp > 1)
      m.in_flight = mt_stage_in_flight(false, s->mesh.pp_rank, s->mesh.pp, s->mesh.pp);
  }
  MT_TRY(mt_hf_params(&s->h.config, &m.shard, o->freeze.item, o->freeze.count, NULL, &params));
  mt_err err = mt_model_plan(&s->h.config, &params, recipe, be, &m, &memory);
  mt_params_free(&params);
  if (!err) mt_inspect_plan(&memory, o->mesh ? "  of rank 0" : "");
  return err;
}

static mt_err plan(struct survey *s) {
  const struct mt_recipe *recipe;
  struct mt_backend be = {0};
  struct mt_device_options device = s->o->device;
  device.plan_only = true;
  mt_err err = mt_device_open(&device, &recipe, &be);
  if (!err) err = plan_on(&be, recipe, s);
  mt_backend_destroy(&be);
  return err;
}

/* Norms where they are asked for, or where reading the experts takes no more than a moment. */
static mt_err norms(struct survey *s) {
  int64_t elements = 0;
  for (int i = 0; i < s->params.count; i++) {
    if (s->params.row[i].sync == MT_SYNC_EXPERT) elements += mt_param_count(&s->params.row[i]);
  }
  if (s->o->norms || elements <= AUTO_NORMS_WEIGHTS) {
    return mt_inspect_norms(&s->h, &s->params, s->o->norms);
  }
  printf("\nexpert norms: %.1f billion weights would have to be read; --norms does\n",
         (double)elements / 1e9);
  return MT_OK;
}

static mt_err report(struct survey *s) {
  print_config(s);
  print_tokenizer(s);
  print_checksums(s);
  print_compatible(s);
  if (s->config) {
    MT_TRY(mt_params_build(&s->h.config, NULL, &s->params));
    print_parameters(&s->h.config, &s->params);
  }
  if (s->shards) {
    mt_inspect_shards(&s->h);
    MT_TRY(mt_inspect_tensors(&s->h, s->o->tensors));
  }
  if (s->fits) MT_TRY(norms(s));
  if (s->o->mesh && s->config) {
    MT_TRY(mt_mesh_make(&s->h.config, s->o->mesh, 0, s->o->ep_size, s->o->pp_size, &s->mesh));
    mt_inspect_mesh(&s->mesh, &s->h.config, NULL);
  }
  if (s->o->train && s->config) MT_TRY(plan(s));
  if (s->reasons) return mt_fail(MT_EUNSUPPORTED, "not compatible: %s", s->reason[0]);
  return MT_OK;
}

mt_err mt_inspect_run(const struct mt_inspect_options *o) {
  struct survey s = {.o = o};
  if (o->data) return mt_inspect_data(o);
  mt_err err = mt_hf_open_config(o->model, &s.h);
  s.config = !err;
  if (err && !mt_path_is_dir(o->model)) return err;
  if (err) against(&s);
  look_at_weights(&s);
  look_at_tokenizer(&s);
  look_at_checksums(&s);
  err = report(&s);
  mt_params_free(&s.params);
  mt_tokenizer_free(s.tokenizer);
  mt_hf_close(&s.h);
  return err;
}
