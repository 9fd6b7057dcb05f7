/* `moetune eval`. */
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "io/checksums.h"
#include "train/commands.h"
#include "train/data.h"
#include "train/evaluation.h"

static mt_err print_evaluation(const struct mt_eval_options *o, const struct mt_evaluation *e,
                               const struct mt_routing *r) {
  double least, most;
  mt_routing_shares(r->load, r->layers, r->experts, &least, &most);
  if (o->json) {
    printf("{\"loss\": %.9g, \"perplexity\": %.9g, \"accuracy\": %.9g, \"samples\": %lld, "
           "\"targets\": %lld, \"expert_load\": [",
           e->cross_entropy, e->perplexity, e->accuracy, (long long)e->samples,
           (long long)e->targets);
    for (int i = 0; i < r->layers * r->experts; i++) {
      const char *between = i == 0 ? "[" : i % r->experts ? ", " : "], [";
      printf("%s%lld", between, (long long)r->load[i]);
    }
    puts("]]}");
    return MT_OK;
  }
  printf(
      "loss            %.4f\nperplexity      %.3f\ntoken accuracy  %.2f%%\nsamples         %lld\n"
      "targets         %lld tokens\nexpert share    %.2f%% to %.2f%% of a layer's choices, even "
      "%.2f%%\n",
      e->cross_entropy, e->perplexity, 100 * e->accuracy, (long long)e->samples,
      (long long)e->targets, 100 * least, 100 * most, 100.0 / r->experts);
  return MT_OK;
}

static mt_err evaluate_file(struct mt_session *s, const struct mt_eval_options *o) {
  struct mt_dataset_options d = {.path = o->data,
                                 .chat = s->chat,
                                 .max_seq_length = o->max_seq_length,
                                 .eos_id = s->checkpoint.config.eos_id,
                                 .train_on_prompt = o->train_on_prompt,
                                 .skip_bad_lines = o->skip_bad_lines,
                                 .threads = o->device.threads};
  struct mt_loader_options l = {.batch_size = o->batch_size,
                                .micro_batches = 1,
                                .max_seq_length = o->max_seq_length,
                                .pad_multiple = s->recipe->pad_multiple,
                                .rank = mt_session_reader(s),
                                .world = mt_session_readers(s)};
  struct mt_model_options m = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .token_capacity = mt_loader_token_capacity(&l),
                               .sequence_capacity = o->batch_size};
  struct mt_dataset *data = NULL;
  struct mt_loader loader = {0};
  struct mt_evaluation e;
  struct mt_routing routing = {0};
  mt_err err;
  if (m.token_capacity < 0) return mt_fail(MT_EINVAL, "batch-size x max-seq-length is too large");
  MT_GO(mt_world_meet(s->world, mt_data_begin(s, &d, &o->cache, &data), NULL));
  MT_GO(mt_session_load(s, &m, NULL));
  MT_GO(mt_data_finish(s, &d, &o->cache, &data));
  err = mt_loader_create(&loader, data, &l);
  if (!err) err = mt_routing_create(&routing, &s->model);
  MT_GO(mt_world_meet(s->world, err, NULL));
  mt_world_doing(s->world, "evaluating");
  MT_GO(mt_evaluate(&s->model, s->ranks, &loader, &routing, &e));
  if (mt_session_speaks(s)) err = print_evaluation(o, &e, &routing);
done:
  mt_routing_destroy(&routing);
  mt_loader_destroy(&loader);
  mt_dataset_close(data);
  return err;
}

/* "1,2,3" */
static mt_err parse_ids(const char *text, struct mt_ids *out) {
  while (*text) {
    char *end;
    long id = strtol(text, &end, 10);
    if (end == text || (*end && *end != ',') || id < 0 || id > INT32_MAX) {
      return mt_fail(MT_EINVAL, "--ids: '%.20s' is no list of token ids", text);
    }
    MT_TRY(mt_ids_append(out, (int32_t)id));
    text = *end ? end + 1 : end;
  }
  return out->count ? MT_OK : mt_fail(MT_EINVAL, "--ids is empty");
}

static mt_err write_logits(const char *path, const float *logits, int64_t rows, int64_t vocab) {
  struct mt_st_writer w;
  size_t bytes = (size_t)(rows * vocab) * sizeof *logits;
  struct mt_st_entry e = {"logits", "F32", 2, {rows, vocab}, bytes};
  MT_TRY(mt_st_create(&w, path, &e, 1));
  mt_err err = mt_st_write(&w, logits, bytes);
  if (!err) err = mt_st_finish(&w);
  mt_st_abort(&w);
  return err;
}

static mt_err logits_of_ids(struct mt_session *s, const struct mt_eval_options *o) {
  struct mt_ids ids = {0};
  struct mt_batch b = {0};
  struct mt_loss loss;
  float *logits = NULL;
  mt_err err;
  MT_GO(parse_ids(o->ids, &ids));
  for (size_t i = 0; i < ids.count; i++) {
    if (ids.id[i] >= s->checkpoint.config.vocab) {
      err = mt_fail(MT_EINVAL, "--ids: %d lies outside the vocabulary", (int)ids.id[i]);
      goto done;
    }
  }
  int n = (int)ids.count;
  uint8_t *learn = calloc(ids.count, 1);
  logits = malloc(ids.count * (size_t)s->checkpoint.config.vocab * sizeof *logits);
  if (!learn || !logits) {
    free(learn);
    err = mt_fail(MT_ENOMEM, "logits of %d tokens", n);
    goto done;
  }
  struct mt_sample sample = {ids.id, learn, n, 0};
  int capacity =
      (n + s->recipe->pad_multiple - 1) / s->recipe->pad_multiple * s->recipe->pad_multiple;
  err = mt_batch_create(&b, capacity, 1);
  if (!err) {
    mt_batch_begin(&b);
    err = mt_batch_add(&b, &sample);
    mt_batch_finish(&b, s->recipe->pad_multiple);
  }
  free(learn);
  if (err) goto done;
  struct mt_model_options m = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .token_capacity = capacity,
                               .sequence_capacity = 1};
  MT_GO(mt_session_load(s, &m, NULL));
  MT_GO(mt_ranks_eval(s->ranks, &s->model, 0, &b, &loss));
  MT_GO(mt_ranks_eval_end(s->ranks, &loss));
  MT_GO(mt_ranks_logits(s->ranks, &s->model, 0, n, logits));
  if (mt_session_speaks(s))
    err = write_logits(o->dump_logits, logits, n, s->checkpoint.config.vocab);
done:
  free(logits);
  mt_batch_destroy(&b);
  free(ids.id);
  return err;
}

mt_err mt_eval_run(const struct mt_eval_options *o) {
  struct mt_session s = {0};
  if (!o->data == !o->ids || !o->ids != !o->dump_logits) {
    return mt_fail(MT_EINVAL, "eval takes either --data, or --ids with --dump-logits");
  }
  mt_err err = o->verify ? mt_checksums_demand(o->model) : MT_OK;
  if (!err) err = mt_session_open(&s, o->model, &o->device, o->chat_template, o->world);
  if (o->verify) mt_world_patience(o->world, 1e6); /* a checkpoint of any size is read */
  err = mt_world_meet(o->world, err, NULL);
  mt_world_patience(o->world, 0);
  if (!err) err = mt_session_join(&s, o->world, o->ep_size, o->pp_size);
  if (!err) err = o->data ? evaluate_file(&s, o) : logits_of_ids(&s, o);
  s.members.well = !err;
  mt_session_close(&s);
  return err;
}
