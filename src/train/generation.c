#include "train/generation.h"

#include <stdlib.h>

/* Feeds the prompt; logits (=) of its last token. */
static mt_err prefill(struct mt_generation *g, const int32_t *ids, size_t count) {
  int64_t room = g->s->model.acts.options.token_capacity;
  size_t most = room < MT_PREFILL_TOKENS ? (size_t)room : (size_t)MT_PREFILL_TOKENS;
  for (size_t at = 0; at < count;) {
    size_t n = count - at < most ? count - at : most;
    bool last = at + n == count;
    MT_TRY(mt_ranks_decode(g->s->ranks, &g->s->model, &g->cache, ids + at, (int)n,
                           last ? g->sampler.logits : NULL));
    at += n;
  }
  return MT_OK;
}

/* Bytes of `said` that can be shown: up to a stop text, or to where one may be beginning. */
static size_t showable(const struct mt_generation *g, bool *stopped) {
  size_t show = g->said.size;
  *stopped = false;
  for (int i = 0; i < g->o->stop.count; i++) {
    const char *stop = g->o->stop.item[i];
    size_t n = strlen(stop);
    for (size_t at = 0; n > 0 && at < g->said.size && at < show; at++) {
      size_t have = g->said.size - at < n ? g->said.size - at : n;
      if (memcmp(g->said.text + at, stop, have) != 0) continue;
      *stopped |= have == n;
      show = at;
    }
  }
  return show;
}

/* false where the answer is to end. */
static bool show(struct mt_generation *g, size_t till) {
  if (till <= g->shown || !mt_session_speaks(g->s)) return true;
  size_t from = g->shown;
  g->shown = till;
  return g->show(g->context, g->said.text + from, till - from);
}

static mt_err answer(struct mt_generation *g) {
  struct mt_decode_stream stream = {0};
  mt_err err = MT_OK;
  bool stopped = false;
  g->said.size = g->shown = 0;
  for (int n = 0; n < g->o->max_new_tokens && !stopped; n++) {
    int32_t id = mt_sampler_pick(&g->sampler, g->o->temperature, g->o->top_p, &g->rng);
    MT_GO(mt_ranks_token(g->s->ranks, &id));
    if (id < 0) {
      err = mt_fail(MT_ENUMERIC, "the model's logits are NaN");
      break;
    }
    if (id == g->s->checkpoint.config.eos_id) break;
    MT_GO(mt_decode_next(g->s->tokenizer, &stream, id, &g->said));
    size_t till = showable(g, &stopped);
    if (g->o->stream && !show(g, till)) goto done;
    if (g->cache.length == g->cache.capacity) break;
    if (stopped) break;
    MT_GO(mt_ranks_decode(g->s->ranks, &g->s->model, &g->cache, &id, 1, g->sampler.logits));
  }
  size_t till = showable(g, &stopped);
  (void)show(g, stopped ? till : g->said.size);
done:
  mt_decode_stream_free(&stream);
  return err;
}

static mt_err add_message(json_t *messages, const char *role, const char *text) {
  json_t *message = json_pack("{s:s,s:s}", "role", role, "content", text);
  if (!message) return mt_fail(MT_EFORMAT, "the %s message is no UTF-8", role);
  return json_array_append_new(messages, message) ? mt_fail(MT_ENOMEM, "a message") : MT_OK;
}

static mt_err render(struct mt_generation *g, const char *text, bool first) {
  json_t *messages = json_array();
  mt_err err = MT_OK;
  if (first && g->o->system) MT_GO(add_message(messages, "system", g->o->system));
  MT_GO(add_message(messages, "user", text));
  err = mt_render_question(g->s->chat, g->encoder, messages, first, g->s->checkpoint.config.eos_id,
                           &g->prompt);
done:
  json_decref(messages);
  return err;
}

mt_err mt_generation_ask(struct mt_generation *g, const char *text, bool first) {
  if (g->o->chat) {
    MT_TRY(render(g, text, first));
  } else {
    g->prompt.ids.count = 0;
    MT_TRY(mt_encode(g->encoder, text, strlen(text),
                     MT_ENCODE_ADD_SPECIAL | MT_ENCODE_PARSE_SPECIAL, &g->prompt.ids));
  }
  if (g->prompt.ids.count == 0) return mt_fail(MT_EINVAL, "the prompt is empty");
  if ((int64_t)g->prompt.ids.count > g->cache.capacity - g->cache.length) {
    return mt_fail(MT_EINVAL, "the prompt has %zu tokens, %lld positions are left",
                   g->prompt.ids.count, (long long)(g->cache.capacity - g->cache.length));
  }
  MT_TRY(prefill(g, g->prompt.ids.id, g->prompt.ids.count));
  return answer(g);
}

mt_err mt_generation_open(struct mt_generation *g, struct mt_session *s,
                          const struct mt_generate_options *o) {
  const struct mt_config *c = &s->checkpoint.config;
  *g = (struct mt_generation){.o = o, .s = s, .rng = mt_rng_make(o->seed, 0x67656eu)};
  MT_TRY(mt_encoder_create(s->tokenizer, &g->encoder));
  MT_TRY(mt_sampler_create(&g->sampler, c->vocab));
  /* A conversation may fill the model's positions; one answer needs its prompt and its length. */
  int64_t need = (o->prompt ? (int64_t)strlen(o->prompt) + 64 : 4096) + o->max_new_tokens;
  if (o->system) need += (int64_t)strlen(o->system);
  if (c->max_positions > 0 && c->max_positions < need) need = c->max_positions;
  return mt_kv_cache_create(&g->cache, &s->model, need);
}

void mt_generation_close(struct mt_generation *g) {
  if (g->cache.be) mt_kv_cache_destroy(&g->cache);
  mt_sampler_destroy(&g->sampler);
  mt_encoder_free(g->encoder);
  mt_rendered_free(&g->prompt);
  free(g->said.text);
  *g = (struct mt_generation){0};
}
