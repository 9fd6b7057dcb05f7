#include "train/session.h"

#include <stdlib.h>
#include <stdio.h>
#include <time.h>

#include "base/hash.h"
#include "base/log.h"
#include "kernels/registry.h"
#include "par/nccl.h"

double mt_now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool mt_device_on_gpu(const struct mt_device_options *o) {
  return strcmp(o->device, "cuda") == 0 ||
         (strcmp(o->device, "auto") == 0 && mt_cuda_device_count() > 0);
}

const char *mt_device_eight_bits(const struct mt_device_options *o) {
  return mt_device_on_gpu(o) && mt_cuda_capability() < 100 ? "fp8" : "mxfp8";
}

mt_err mt_device_of_rank(const struct mt_world *world, struct mt_device_options *o) {
  if (!world || world->size == 1) return MT_OK;
  if (o->threads == 0 && !getenv("OMP_NUM_THREADS")) o->threads = world->cores;
  if (o->plan_only || !mt_device_on_gpu(o)) return MT_OK;
  return mt_world_gpu(world, mt_cuda_device_count(), &o->device_index);
}

mt_err mt_device_open(const struct mt_device_options *o, const struct mt_recipe **recipe,
                      struct mt_backend *be) {
  bool cuda = mt_device_on_gpu(o);
  const char *precision = o->precision ? o->precision : cuda ? "bf16" : "fp32";
  const char *states = o->optim_state ? o->optim_state : "fp32";
  *recipe = mt_recipe_choose(precision, states);
  if (!*recipe && mt_recipe_find(precision)) {
    return mt_fail(MT_EINVAL,
                   "--optim-state %s goes with --precision bf16, fp8 or mxfp8, not with %s", states,
                   precision);
  }
  if (!*recipe) return mt_fail(MT_EUNSUPPORTED, "no precision '%s'", precision);
  bool portable = strcmp(o->kernels, "portable") == 0;
  if (cuda && o->plan_only) return mt_backend_cuda_plan(be, portable);
  if (cuda) return mt_backend_cuda_create(be, portable, o->device_index);
  if ((*recipe)->act == MT_F64) return mt_backend_ref_create(be);
  return mt_backend_cpu_create(be, o->threads);
}

mt_err mt_device_skips(const struct mt_device_options *o, unsigned *skip_8bit) {
  const char *at = o->fp8_skip ? o->fp8_skip : "";
  *skip_8bit = 0;
  while (*at) {
    size_t n = strcspn(at, ",");
    if (n == 4 && strncmp(at, "attn", n) == 0)
      *skip_8bit |= MT_8BIT_ATTENTION;
    else if (n == 7 && strncmp(at, "experts", n) == 0)
      *skip_8bit |= MT_8BIT_EXPERTS;
    else
      return mt_fail(MT_EINVAL, "--fp8-skip: no part '%.*s'; there are attn and experts", (int)n,
                     at);
    at += n + (at[n] == ',');
  }
  return MT_OK;
}

bool mt_device_graphs(const struct mt_device_options *o) {
  return !o->graphs || strcmp(o->graphs, "off") != 0;
}

mt_err mt_session_open(struct mt_session *s, const char *model_dir,
                       const struct mt_device_options *device, const char *chat_template,
                       const struct mt_world *world) {
  struct mt_device_options here = *device;
  char path[MT_PATH_MAX];
  mt_err err;
  *s = (struct mt_session){0};
  MT_GO(mt_hf_open(model_dir, &s->checkpoint));
  MT_GO(mt_path_join(path, model_dir, "tokenizer.json"));
  MT_GO(mt_tokenizer_load(path, &s->tokenizer));
  if (mt_tokenizer_vocab(s->tokenizer) > s->checkpoint.config.vocab) {
    err = mt_fail(MT_ESHAPE, "%s has ids up to %d, the model's vocab_size is %d", path,
                  mt_tokenizer_vocab(s->tokenizer) - 1, s->checkpoint.config.vocab);
    goto done;
  }
  if (chat_template)
    MT_GO(mt_template_find(chat_template, &s->chat));
  else
    MT_GO(mt_template_detect(model_dir, &s->chat));
  MT_GO(mt_device_skips(device, &s->skip_8bit));
  MT_GO(mt_device_of_rank(world, &here));
  MT_GO(mt_device_open(&here, &s->recipe, &s->be));
done:
  if (err) mt_session_close(s);
  return err;
}

/* What of the model must be the same on all ranks, a line each. Weights are not read for it; where
 * their checksums are listed, as in every checkpoint of a run, the list stands for them. */
static mt_err describe_model(const struct mt_hf_checkpoint *h, char lines[], size_t size) {
  static const char *const names[] = {"config.json", "tokenizer.json", "moetune-checksums.json"};
  size_t used = 0;
  uint64_t bytes = 0;
  for (int i = 0; i < 3; i++) {
    char path[MT_PATH_MAX], text[MT_HASH_TEXT];
    struct mt_hash hash;
    MT_TRY(mt_path_join(path, h->dir, names[i]));
    if (i == 2 && !mt_path_exists(path)) continue;
    MT_TRY(mt_hash_file(path, &hash, NULL));
    mt_hash_text(hash, text);
    used += (size_t)snprintf(lines + used, size - used, "%s: hash %s\n", names[i], text);
  }
  for (int i = 0; i < h->shard_count; i++) bytes += h->shard[i].map.size_bytes;
  snprintf(lines + used, size - used, "weights: %llu bytes\n", (unsigned long long)bytes);
  return MT_OK;
}

mt_err mt_session_join(struct mt_session *s, struct mt_world *world, int ep_size, int pp_size) {
  struct mt_mesh mesh;
  int size = world ? world->size : 1;
  s->world = size > 1 ? world : NULL;
  int64_t least = (int64_t)ep_size * pp_size;
  if (size == 1 && least > 1) {
    return mt_fail(MT_EINVAL,
                   "--ep-size %d, --pp-size %d on one rank: start it on a multiple of %lld, as in "
                   "mpirun -n %lld moetune ...",
                   ep_size, pp_size, (long long)least, (long long)least);
  }
  if (size == 1) return MT_OK;
  char lines[512] = "";
  MT_TRY(mt_world_meet(world, describe_model(&s->checkpoint, lines, sizeof lines), NULL));
  MT_TRY(mt_world_same(world, "model", lines));
  MT_TRY(mt_mesh_make(&s->checkpoint.config, size, world->rank, ep_size, pp_size, &mesh));
  MT_TRY(mt_ranks_open(&s->members, world, &mesh));
  s->ranks = &s->members;
  return MT_OK;
}

bool mt_session_speaks(const struct mt_session *s) {
  return !s->world || s->world->rank == 0;
}

int mt_session_readers(const struct mt_session *s) {
  return s->ranks ? mt_mesh_readers(&s->ranks->mesh) : 1;
}

int mt_session_reader(const struct mt_session *s) {
  return s->ranks ? mt_mesh_reader(&s->ranks->mesh) : 0;
}

/* The tables of the whole model and of what is here, and options with the shard. */
static mt_err make_tables(struct mt_session *s, const struct mt_string_list *freeze,
                          struct mt_model_options *o, struct mt_params *params) {
  const struct mt_config *c = &s->checkpoint.config;
  if (s->ranks) {
    o->shard = mt_ranks_shard(&s->ranks->mesh);
    o->sharers = mt_ranks_sharers(&s->ranks->mesh);
  } else {
    o->zero = 0;
  }
  mt_params_free(&s->whole);
  return mt_hf_params(c, s->ranks ? &o->shard : NULL, freeze ? freeze->item : NULL,
                      freeze ? freeze->count : 0, &s->whole, params);
}

/* Masters of which each rank keeps its parts. */
static mt_err load_masters(struct mt_session *s) {
  struct mt_model *m = &s->model;
  struct mt_piece *piece;
  int count;
  if (!m->options.training || m->options.zero == 0 || s->recipe->act == s->recipe->state)
    return MT_OK;
  MT_TRY(mt_model_pieces(m, &piece, &count));
  mt_err err = MT_OK;
  for (int i = 0; !err && i < count; i++) {
    const struct mt_param *p = &m->params.row[piece[i].row];
    err = mt_hf_load_run(&s->checkpoint, p, piece[i].first, &piece[i].master, &s->be);
  }
  free(piece);
  return err;
}

static mt_err load(struct mt_session *s, const struct mt_model_options *options,
                   const struct mt_string_list *freeze) {
  struct mt_model_options o = *options;
  struct mt_params params = {0};
  mt_err err;
  o.skip_8bit = s->skip_8bit;
  MT_GO(make_tables(s, freeze, &o, &params));
  MT_GO(mt_model_create(&s->model, &s->checkpoint.config, &params, s->recipe, &s->be, &o));
  MT_GO(mt_hf_load(&s->checkpoint, &s->model.params, &s->be));
  MT_GO(load_masters(s));
  err = mt_model_quantize_weights(&s->model);
done:
  mt_params_free(&params);
  return err;
}

mt_err mt_session_plan(struct mt_session *s, const struct mt_model_options *options,
                       const struct mt_string_list *freeze, struct mt_memory *out) {
  struct mt_model_options o = *options;
  struct mt_params params = {0};
  mt_err err = make_tables(s, freeze, &o, &params);
  if (!err) err = mt_model_plan(&s->checkpoint.config, &params, s->recipe, &s->be, &o, out);
  mt_params_free(&params);
  return err;
}

/* Bytes a second that reading and writing may be expected to reach at least. */
enum { SLOWEST_BYTES_S = 20 << 20 };

double mt_session_patience_s(const struct mt_session *s) {
  double elements = 0;
  for (int i = 0; i < s->whole.count; i++) elements += (double)mt_param_count(&s->whole.row[i]);
  return elements * 16 / SLOWEST_BYTES_S;
}

mt_err mt_session_load(struct mt_session *s, const struct mt_model_options *options,
                       const struct mt_string_list *freeze) {
  mt_world_doing(s->world, "loading the model");
  mt_err err = load(s, options, freeze);
  mt_world_patience(s->world, mt_session_patience_s(s));
  err = mt_world_meet(s->world, err, NULL);
  mt_world_patience(s->world, 0);
  if (err || !s->ranks) return err;
  s->ranks->whole = &s->whole;
  MT_TRY(mt_ranks_join(s->ranks, &s->model));
  if (options->training) MT_TRY(mt_ranks_same_weights(s->ranks, s->checkpoint.dir));
  return mt_ranks_quantize(s->ranks);
}

void mt_session_close(struct mt_session *s) {
  if (s->ranks) mt_ranks_close(s->ranks);
  if (s->model.be) mt_model_destroy(&s->model);
  mt_params_free(&s->whole);
  mt_backend_destroy(&s->be);
  mt_tokenizer_free(s->tokenizer);
  mt_hf_close(&s->checkpoint);
  *s = (struct mt_session){0};
}

struct mt_parameter_counts mt_session_parameters(const struct mt_session *s) {
  const struct mt_config *c = &s->checkpoint.config;
  struct mt_parameter_counts n = {0};
  int64_t routed = 0;
  for (int i = 0; i < s->whole.count; i++) {
    const struct mt_param *p = &s->whole.row[i];
    n.total += mt_param_count(p);
    if (p->learns) n.learning += mt_param_count(p);
    if (p->sync == MT_SYNC_EXPERT) routed += mt_param_count(p);
  }
  n.active = n.total - routed + routed * c->top_k / c->experts;
  return n;
}

void mt_session_describe(const struct mt_session *s) {
  const struct mt_config *c = &s->checkpoint.config;
  struct mt_parameter_counts n = mt_session_parameters(s);
  mt_info("model    %s: %.1f M parameters (%.1f M a token, %.1f M learning), %d layers, hidden %d, "
          "%d experts, top-%d",
          s->checkpoint.dir, (double)n.total / 1e6, (double)n.active / 1e6,
          (double)n.learning / 1e6, c->layers, c->hidden, c->experts, c->top_k);
  if (s->be.description[0])
    mt_info("device   %s: %s, %s", s->be.name, s->be.description, s->recipe->name);
  else
    mt_info("device   %s, %d threads, %s", s->be.name, s->be.thread_count, s->recipe->name);
  if (!s->ranks) return;
  const struct mt_mesh *m = &s->ranks->mesh;
  mt_info("ranks    %d: %d x data, %d x expert, %d x pipeline; %lld of %d experts a layer each",
          m->world, m->dp, m->ep, m->pp, (long long)(m->expert_end - m->expert_begin), c->experts);
}
