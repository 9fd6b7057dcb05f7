/* `moetune generate`: a prompt continued token by token. */
#include <stdio.h>
#include <stdlib.h>

#include "base/rng.h"
#include "model/decode.h"
#include "train/commands.h"
#include "train/sampler.h"
#include "train/session.h"

struct generation {
  const struct mt_generate_options *o;
  struct mt_session s;
  struct mt_kv_cache cache;
  struct mt_encoder *encoder;
  struct mt_sampler sampler;
  struct mt_rng rng;
  struct mt_rendered prompt;
  struct mt_text said; /* the answer so far */
  size_t printed;
};

enum { PREFILL = 256 };

/* Feeds the prompt; logits (=) of its last token. */
static mt_err prefill(struct generation *g, const int32_t *ids, size_t count) {
  for (size_t at = 0; at < count;) {
    size_t n = count - at < PREFILL ? count - at : PREFILL;
    bool last = at + n == count;
    MT_TRY(
        mt_model_decode(&g->s.model, &g->cache, ids + at, (int)n, last ? g->sampler.logits : NULL));
    at += n;
  }
  return MT_OK;
}

/* Bytes of `said` that can be shown: up to a stop text, or to where one may be beginning. */
static size_t showable(const struct generation *g, bool *stopped) {
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

static void show(struct generation *g, size_t till) {
  if (till > g->printed) fwrite(g->said.text + g->printed, 1, till - g->printed, stdout);
  if (till > g->printed) g->printed = till;
  if (g->o->stream) fflush(stdout);
}

static mt_err answer(struct generation *g) {
  struct mt_decode_stream stream = {0};
  mt_err err = MT_OK;
  bool stopped = false;
  g->said.size = g->printed = 0;
  for (int n = 0; n < g->o->max_new_tokens && !stopped; n++) {
    int32_t id = mt_sampler_pick(&g->sampler, g->o->temperature, g->o->top_p, &g->rng);
    if (id < 0) {
      err = mt_fail(MT_ENUMERIC, "the model's logits are NaN");
      break;
    }
    if (id == g->s.checkpoint.config.eos_id) break;
    MT_GO(mt_decode_next(g->s.tokenizer, &stream, id, &g->said));
    size_t till = showable(g, &stopped);
    if (g->o->stream) show(g, till);
    if (g->cache.length == g->cache.capacity) break;
    if (!stopped) MT_GO(mt_model_decode(&g->s.model, &g->cache, &id, 1, g->sampler.logits));
  }
  size_t till = showable(g, &stopped);
  show(g, stopped ? till : g->said.size);
  putchar('\n');
done:
  mt_decode_stream_free(&stream);
  return err;
}

/* Asks one thing; in a conversation the cache holds what was said before. */
static mt_err ask(struct generation *g, const char *text, bool first) {
  if (g->o->chat) {
    json_t *messages = json_array();
    int bad = 0;
    if (first && g->o->system) {
      bad |= json_array_append_new(
          messages, json_pack("{s:s,s:s}", "role", "system", "content", g->o->system));
    }
    bad |= json_array_append_new(messages, json_pack("{s:s,s:s}", "role", "user", "content", text));
    mt_err err = bad ? mt_fail(MT_EINVAL, "a message is no UTF-8")
                     : mt_render_question(g->s.chat, g->encoder, messages, first,
                                          g->s.checkpoint.config.eos_id, &g->prompt);
    json_decref(messages);
    if (err) return err;
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

static mt_err converse(struct generation *g) {
  char *line = NULL;
  size_t capacity = 0;
  mt_err err = MT_OK;
  bool first = true;
  for (ssize_t n; !err; first = false) {
    if (g->o->chat) fputs("> ", stderr);
    n = getline(&line, &capacity, stdin);
    if (n < 0) {
      if (!feof(stdin)) err = mt_fail(MT_EIO, "cannot read standard input");
      break;
    }
    if (n > 0 && line[n - 1] == '\n') line[n - 1] = '\0';
    if (*line) err = ask(g, line, first);
    if (!g->o->chat) g->cache.length = 0; /* each line is a prompt of its own */
  }
  free(line);
  return err;
}

static mt_err open_generation(struct generation *g) {
  const struct mt_generate_options *o = g->o;
  struct mt_model_options m = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .token_capacity = PREFILL,
                               .sequence_capacity = 1};
  MT_TRY(mt_session_open(&g->s, o->model, &o->device, o->chat_template));
  MT_TRY(mt_session_load(&g->s, &m, NULL));
  MT_TRY(mt_encoder_create(g->s.tokenizer, &g->encoder));
  MT_TRY(mt_sampler_create(&g->sampler, g->s.checkpoint.config.vocab));
  g->rng = mt_rng_make(o->seed, 0x67656eu);
  /* A conversation may fill the model's positions; one answer needs its prompt and its length. */
  int64_t positions = g->s.checkpoint.config.max_positions;
  int64_t need = (o->prompt ? (int64_t)strlen(o->prompt) + 64 : 4096) + o->max_new_tokens;
  if (o->system) need += (int64_t)strlen(o->system);
  return mt_kv_cache_create(&g->cache, &g->s.model,
                            positions > 0 && positions < need ? positions : need);
}

mt_err mt_generate_run(const struct mt_generate_options *options) {
  struct generation g = {.o = options};
  mt_err err = open_generation(&g);
  if (!err) err = options->prompt ? ask(&g, options->prompt, true) : converse(&g);
  mt_kv_cache_destroy(&g.cache);
  mt_sampler_destroy(&g.sampler);
  mt_encoder_free(g.encoder);
  mt_rendered_free(&g.prompt);
  free(g.said.text);
  mt_session_close(&g.s);
  return err;
}
