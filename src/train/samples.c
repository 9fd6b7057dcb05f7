#include "train/samples.h"

#include <errno.h>
#include <stdlib.h>

#include "base/json.h"
#include "base/log.h"
#include "train/metrics.h"

enum { OPENING_TOKENS = 16, PREFILL = 256 };

static mt_err set_prompt(struct mt_samples *x, const int32_t *ids, size_t count,
                         const int32_t *expected, size_t expected_count) {
  struct mt_sample_prompt *p = &x->prompt[x->count++];
  const struct mt_tokenizer *t = x->s->tokenizer;
  for (size_t i = 0; i < count; i++) MT_TRY(mt_ids_append(&p->ids, ids[i]));
  MT_TRY(mt_decode(t, ids, count, true, &p->text));
  return mt_decode(t, expected, expected_count, true, &p->expected);
}

/* Tokens of a sample before its answer; a text without a question is asked for by its beginning. */
static int question_length(const struct mt_sample *s) {
  int n = 0;
  while (n < s->count && !s->learn[n]) n++;
  if (n > 1) return n;
  return s->count / 2 < OPENING_TOKENS ? s->count / 2 : OPENING_TOKENS;
}

static bool short_enough(const struct mt_samples *x, size_t count) {
  int64_t positions = x->s->checkpoint.config.max_positions;
  if (count < 1 || count > MT_SAMPLE_PROMPT_TOKENS) return false;
  return positions <= 0 || (int64_t)count + x->new_tokens <= positions;
}

static mt_err take_questions(struct mt_samples *x, const struct mt_dataset *d, int wanted) {
  int64_t n = mt_dataset_stats(d).samples, next = 0;
  for (int k = 0; k < wanted; k++) {
    int64_t i = n * k / wanted;
    for (i = i < next ? next : i; i < n; i++) {
      struct mt_sample s = mt_dataset_sample(d, i);
      int length = question_length(&s), end = length;
      if (!short_enough(x, (size_t)length)) continue;
      while (end < s.count && s.learn[end]) end++;
      MT_TRY(set_prompt(x, s.ids, (size_t)length, s.ids + length, (size_t)(end - length)));
      break;
    }
    next = i + 1;
  }
  return MT_OK;
}

static mt_err take_prompts(struct mt_samples *x, const struct mt_string_list *prompts) {
  struct mt_encoder *encoder;
  struct mt_rendered rendered = {0};
  mt_err err = MT_OK;
  MT_TRY(mt_encoder_create(x->s->tokenizer, &encoder));
  for (int i = 0; i < prompts->count; i++) {
    json_t *messages = json_pack("[{s:s,s:s}]", "role", "user", "content", prompts->item[i]);
    err = messages ? mt_render_question(x->s->chat, encoder, messages, true,
                                        x->s->checkpoint.config.eos_id, &rendered)
                   : mt_fail(MT_EINVAL, "--sample-prompt %d is no UTF-8", i + 1);
    json_decref(messages);
    if (err) goto done;
    if (!short_enough(x, rendered.ids.count)) {
      err = mt_fail(MT_EINVAL, "--sample-prompt '%.40s' has %zu tokens, too many", prompts->item[i],
                    rendered.ids.count);
      goto done;
    }
    MT_GO(set_prompt(x, rendered.ids.id, rendered.ids.count, NULL, 0));
    x->prompt[i].text.size = 0;
    MT_GO(mt_text_append(&x->prompt[i].text, prompts->item[i], strlen(prompts->item[i])));
  }
done:
  mt_rendered_free(&rendered);
  mt_encoder_free(encoder);
  return err;
}

static void forget_prompts(struct mt_samples *x) {
  for (int i = 0; i < x->count; i++) {
    free(x->prompt[i].ids.id);
    free(x->prompt[i].text.text);
    free(x->prompt[i].expected.text);
  }
  free(x->prompt);
  x->prompt = NULL;
  x->count = 0;
}

/* The cache holds the longest question and its answer. */
static mt_err open_cache(struct mt_samples *x) {
  size_t longest = 0;
  for (int i = 0; i < x->count; i++) {
    if (x->prompt[i].ids.count > longest) longest = x->prompt[i].ids.count;
  }
  mt_err err = mt_kv_cache_create(&x->cache, &x->s->model, (int64_t)longest + x->new_tokens);
  int failed = err != MT_OK;
  if (err) mt_warn("no samples: %s", mt_error_message());
  MT_TRY(mt_world_meet(x->s->world, MT_OK, &failed)); /* all ask or none does */
  if (failed) forget_prompts(x);
  return MT_OK;
}

mt_err mt_samples_open(struct mt_samples *x, struct mt_session *s,
                       const struct mt_train_options *options, const struct mt_dataset *held_out,
                       int64_t first_step, bool resume) {
  int wanted = options->sample_prompts.count ? options->sample_prompts.count : options->samples;
  char path[MT_PATH_MAX];
  mt_err err = MT_OK;
  *x = (struct mt_samples){.s = s, .new_tokens = options->sample_tokens};
  if (wanted > MT_SAMPLES_MAX) wanted = MT_SAMPLES_MAX;
  bool writes = mt_session_speaks(s);
  MT_TRY(mt_path_join(path, options->out, "samples.jsonl"));
  if (writes && resume) MT_TRY(mt_lines_keep(path, first_step));
  if (writes && !resume && mt_path_exists(path)) MT_TRY(mt_file_write_atomic(path, "", 0));
  if (wanted <= 0 || (!held_out && options->sample_prompts.count == 0)) return MT_OK;
  x->prompt = calloc((size_t)wanted, sizeof *x->prompt);
  if (!x->prompt) return mt_fail(MT_ENOMEM, "%d samples", wanted);
  if (options->sample_prompts.count)
    MT_GO(take_prompts(x, &(struct mt_string_list){options->sample_prompts.item, wanted}));
  else
    MT_GO(take_questions(x, held_out, wanted));
  if (x->count > 0) MT_GO(open_cache(x));
  if (x->count == 0) return MT_OK;
  MT_GO(mt_sampler_create(&x->sampler, s->checkpoint.config.vocab));
  if (writes) x->file = fopen(path, resume ? "ae" : "we");
  if (writes && !x->file) err = mt_fail(MT_EIO, "cannot write '%s': %s", path, strerror(errno));
done:
  if (err) mt_samples_close(x);
  return err;
}

static mt_err feed(struct mt_samples *x, const struct mt_ids *ids) {
  struct mt_model *m = &x->s->model;
  int64_t room = m->acts.options.token_capacity;
  size_t step = room < PREFILL ? (size_t)room : PREFILL;
  x->cache.length = 0;
  for (size_t at = 0; at < ids->count; at += step) {
    size_t n = ids->count - at < step ? ids->count - at : step;
    bool last = at + n == ids->count;
    MT_TRY(mt_ranks_decode(x->s->ranks, m, &x->cache, ids->id + at, (int)n,
                           last ? x->sampler.logits : NULL));
  }
  return MT_OK;
}

static mt_err answer(struct mt_samples *x, const struct mt_sample_prompt *p) {
  x->said.count = x->answer.size = 0;
  MT_TRY(feed(x, &p->ids));
  for (int n = 0; n < x->new_tokens; n++) {
    int32_t id = mt_sampler_pick(&x->sampler, 0, 1, NULL);
    MT_TRY(mt_ranks_token(x->s->ranks, &id));
    if (id < 0) return mt_fail(MT_ENUMERIC, "the model's logits are NaN");
    if (id == x->s->checkpoint.config.eos_id) break;
    MT_TRY(mt_ids_append(&x->said, id));
    if (n + 1 < x->new_tokens)
      MT_TRY(mt_ranks_decode(x->s->ranks, &x->s->model, &x->cache, &id, 1, x->sampler.logits));
  }
  return mt_decode(x->s->tokenizer, x->said.id, x->said.count, true, &x->answer);
}

static json_t *text_value(const struct mt_text *t) {
  return json_stringn(t->size ? t->text : "", t->size);
}

static mt_err write_line(struct mt_samples *x, int64_t step, int index) {
  const struct mt_sample_prompt *p = &x->prompt[index];
  json_t *o = json_pack("{s:I, s:i, s:o, s:o, s:i}", "step", (json_int_t)step, "index", index,
                        "prompt", text_value(&p->text), "answer", text_value(&x->answer), "tokens",
                        (int)x->said.count);
  bool whole =
      o && (!p->expected.size || json_object_set_new(o, "expected", text_value(&p->expected)) == 0);
  char *line = whole ? mt_json_text(o, JSON_COMPACT) : NULL;
  json_decref(o);
  if (!line) return mt_fail(MT_ENOMEM, "a sample's line");
  fprintf(x->file, "%s\n", line);
  free(line);
  if (fflush(x->file) == 0 && !ferror(x->file)) return MT_OK;
  return mt_fail(MT_EIO, "cannot write samples.jsonl: %s", strerror(errno));
}

mt_err mt_samples_take(struct mt_samples *x, int64_t step) {
  for (int i = 0; i < x->count; i++) {
    MT_TRY(answer(x, &x->prompt[i]));
    if (x->file) MT_TRY(write_line(x, step, i));
  }
  return MT_OK;
}

void mt_samples_close(struct mt_samples *x) {
  if (x->file) fclose(x->file);
  forget_prompts(x);
  if (x->cache.be) mt_kv_cache_destroy(&x->cache);
  mt_sampler_destroy(&x->sampler);
  free(x->said.id);
  free(x->answer.text);
  *x = (struct mt_samples){0};
}
