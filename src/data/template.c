#include "data/template.h"

#include <stdlib.h>
#include <string.h>

#include "data/template_impl.h"

void mt_rendered_free(struct mt_rendered *r) {
  free(r->ids.id);
  free(r->learn);
  *r = (struct mt_rendered){0};
}

/* Text not yet encoded: parts of the template and parts of messages. */
struct part {
  size_t end;
  bool ours;
};

struct render {
  const struct mt_template *t;
  struct mt_encoder *e;
  int32_t eos_id;
  struct mt_rendered *out;
  int seam; /* MT_ENCODE_CONTINUE or MT_ENCODE_INSIDE: what stands before the next text */
  struct mt_text held;
  struct part *part;
  size_t part_count, part_capacity;
  bool apart; /* a message spells a special token: parts are encoded one by one */
};

static void render_free(struct render *g) {
  free(g->held.text);
  free(g->part);
}

static mt_err mark(struct mt_rendered *r, size_t from, bool learn) {
  if (r->ids.count > r->learn_capacity) {
    uint8_t *grown = realloc(r->learn, r->ids.capacity);
    if (!grown) return mt_fail(MT_ENOMEM, "a sample of %zu tokens", r->ids.count);
    r->learn = grown;
    r->learn_capacity = r->ids.capacity;
  }
  if (r->ids.count > from) memset(r->learn + from, learn, r->ids.count - from);
  return MT_OK;
}

static mt_err encode(struct render *g, const char *text, size_t size, bool parse_special,
                     bool learn) {
  struct mt_ids *ids = &g->out->ids;
  size_t from = ids->count;
  int flags = g->seam | (parse_special ? MT_ENCODE_PARSE_SPECIAL : 0);
  MT_TRY(mt_encode(g->e, text, size, flags, ids));
  if (ids->count > from) {
    bool special = parse_special && mt_encoder_is_added(g->e, ids->id[ids->count - 1]);
    g->seam = special ? MT_ENCODE_INSIDE : MT_ENCODE_CONTINUE;
  }
  return mark(g->out, from, learn);
}

/* Adds to the text that is held back. */
static mt_err hold(struct render *g, const char *text, bool ours) {
  size_t size = strlen(text);
  if (size == 0) return MT_OK;
  if (g->part_count == g->part_capacity) {
    size_t capacity = g->part_capacity * 2 + 16;
    struct part *grown = realloc(g->part, capacity * sizeof *grown);
    if (!grown) return mt_fail(MT_ENOMEM, "%zu pieces of a sample", capacity);
    g->part = grown;
    g->part_capacity = capacity;
  }
  MT_TRY(mt_text_append(&g->held, text, size));
  g->part[g->part_count++] = (struct part){g->held.size, ours};
  g->apart |= !ours && mt_has_special(g->e, text);
  return MT_OK;
}

/* Encodes what is held back, unlearned: as one, since a word may span a seam. */
static mt_err flush(struct render *g) {
  size_t from = 0;
  for (size_t i = 0; g->apart && i < g->part_count; i++) {
    const struct part *p = &g->part[i];
    MT_TRY(encode(g, g->held.text + from, p->end - from, p->ours, false));
    from = p->end;
  }
  if (g->held.size > from) MT_TRY(encode(g, g->held.text, g->held.size, true, false));
  g->held.size = g->part_count = 0;
  g->apart = false;
  return MT_OK;
}

/* The tokens that the tokenizer puts before a text. */
static mt_err begin(struct render *g) {
  struct mt_ids *ids = &g->out->ids;
  MT_TRY(mt_encode(g->e, "", 0, MT_ENCODE_ADD_SPECIAL, ids));
  return mark(g->out, 0, false);
}

static mt_err end(struct render *g, bool learn) {
  if (g->eos_id < 0) return MT_OK;
  size_t from = g->out->ids.count;
  MT_TRY(mt_ids_append(&g->out->ids, g->eos_id));
  g->seam = MT_ENCODE_INSIDE;
  return mark(g->out, from, learn);
}

static mt_err system_message(struct render *g, const char *text) {
  MT_TRY(hold(g, g->t->system_begin, true));
  MT_TRY(hold(g, text, false));
  return hold(g, g->t->system_end, true);
}

/* system: goes before the question; NULL when there is none or the template has a place for it. */
static mt_err question(struct render *g, const char *system, const char *text, const char *more) {
  MT_TRY(hold(g, g->t->user_begin, true));
  if (system) {
    MT_TRY(hold(g, system, false));
    MT_TRY(hold(g, "\n\n", true));
  }
  MT_TRY(hold(g, text, false));
  if (more && *more) {
    MT_TRY(hold(g, "\n\n", true));
    MT_TRY(hold(g, more, false));
  }
  return hold(g, g->t->user_end, true);
}

static mt_err end_answer(struct render *g, bool learn, bool last) {
  const struct mt_template *t = g->t;
  if (t->answer_end)
    MT_TRY(encode(g, t->answer_end, strlen(t->answer_end), true, learn));
  else
    MT_TRY(end(g, learn));
  return last && !t->after_last ? MT_OK : hold(g, t->after, true);
}

static mt_err answer(struct render *g, const char *text, bool last) {
  const struct mt_template *t = g->t;
  MT_TRY(hold(g, t->answer_begin, true));
  MT_TRY(flush(g));
  /* The lead and the answer's first word are one word to the tokenizer. */
  bool other = last && t->last_lead && !strstr(text, "</think>");
  const char *lead = other ? t->last_lead : t->answer_lead;
  struct mt_text whole = {0};
  mt_err err;
  MT_GO(mt_text_append(&whole, lead, strlen(lead)));
  MT_GO(mt_text_append(&whole, text, strlen(text)));
  MT_GO(mt_text_append(&whole, t->answer_tail, strlen(t->answer_tail)));
  MT_GO(encode(g, whole.text, whole.size, false, true));
  MT_GO(end_answer(g, true, last));
done:
  free(whole.text);
  return err;
}

static const char *string_key(const json_t *o, const char *key) {
  return json_string_value(json_object_get(o, key));
}

/* What a conversation begins with, whatever is said in it. */
static mt_err open_conversation(struct render *g, bool has_system) {
  g->seam = MT_ENCODE_INSIDE; /* behind the BOS token */
  if (g->t->bos) MT_TRY(begin(g));
  if (g->out->ids.count == 0) g->seam = 0;
  if (!has_system && g->t->default_system) return system_message(g, g->t->default_system);
  return MT_OK;
}

static mt_err conversation(struct render *g, const json_t *messages, bool opened) {
  const char *system = NULL; /* waits for the question that it goes before */
  size_t n = json_array_size(messages);
  if (n == 0) return mt_fail(MT_EFORMAT, "'messages' is empty or no array");
  for (size_t i = 0; i < n; i++) {
    const json_t *m = json_array_get(messages, i);
    const char *role = string_key(m, "role"), *text = string_key(m, "content");
    if (!role || !text) {
      return mt_fail(MT_EFORMAT, "message %zu needs the strings 'role' and 'content'", i + 1);
    }
    bool is_system = strcmp(role, "system") == 0, is_user = strcmp(role, "user") == 0;
    if (!is_system && !is_user && strcmp(role, "assistant") != 0) {
      return mt_fail(MT_EFORMAT, "message %zu: role '%.32s' is none of system, user, assistant",
                     i + 1, role);
    }
    if (system && !is_user) {
      return mt_fail(MT_EFORMAT, "message %zu: with template %s a user's must follow a system's",
                     i + 1, g->t->name);
    }
    if (i == 0 && !opened) MT_TRY(open_conversation(g, is_system));
    if (is_system && g->t->system_begin) {
      MT_TRY(system_message(g, text));
    } else if (is_system) {
      system = text;
    } else if (is_user) {
      MT_TRY(question(g, system, text, NULL));
      system = NULL;
    } else {
      MT_TRY(answer(g, text, i + 1 == n));
    }
  }
  if (system) return mt_fail(MT_EFORMAT, "nothing follows the system message");
  return MT_OK;
}

static mt_err instruction(struct render *g, const json_t *record) {
  const char *ask = string_key(record, "instruction"), *say = string_key(record, "output");
  const json_t *input = json_object_get(record, "input");
  if (!ask || !say || (input && !json_is_string(input) && !json_is_null(input))) {
    return mt_fail(MT_EFORMAT, "'instruction' and 'output' must be strings, 'input' too if given");
  }
  MT_TRY(open_conversation(g, false));
  MT_TRY(question(g, NULL, ask, json_string_value(input)));
  return answer(g, say, true);
}

static mt_err completion(struct render *g, const json_t *record) {
  const char *prompt = string_key(record, "prompt"), *rest = string_key(record, "completion");
  if (!prompt || !rest) return mt_fail(MT_EFORMAT, "'prompt' and 'completion' must be strings");
  MT_TRY(begin(g));
  MT_TRY(encode(g, prompt, strlen(prompt), false, false));
  MT_TRY(encode(g, rest, strlen(rest), false, true));
  return end(g, true);
}

static mt_err plain(struct render *g, const json_t *record) {
  const char *text = string_key(record, "text");
  if (!text) {
    return mt_fail(MT_EFORMAT, "the record has none of 'text', 'prompt', 'instruction', 'messages' "
                               "(or it is no string)");
  }
  MT_TRY(begin(g));
  MT_TRY(encode(g, text, strlen(text), false, true));
  return end(g, true);
}

mt_err mt_render(const struct mt_template *t, struct mt_encoder *e, const json_t *record,
                 int32_t eos_id, struct mt_rendered *r) {
  struct render g = {.t = t, .e = e, .eos_id = eos_id, .out = r};
  mt_err err;
  r->ids.count = 0;
  if (json_object_get(record, "messages"))
    err = conversation(&g, json_object_get(record, "messages"), false);
  else if (json_object_get(record, "instruction"))
    err = instruction(&g, record);
  else if (json_object_get(record, "prompt"))
    err = completion(&g, record);
  else
    err = plain(&g, record);
  if (!err) err = flush(&g);
  render_free(&g);
  return err;
}

mt_err mt_render_question(const struct mt_template *t, struct mt_encoder *e, const json_t *messages,
                          bool begins, int32_t eos_id, struct mt_rendered *r) {
  struct render g = {.t = t, .e = e, .eos_id = eos_id, .out = r, .seam = MT_ENCODE_CONTINUE};
  mt_err err = MT_OK;
  r->ids.count = 0;
  if (!begins) MT_GO(end_answer(&g, false, false));
  MT_GO(conversation(&g, messages, !begins));
  MT_GO(hold(&g, t->answer_begin, true));
  MT_GO(flush(&g));
done:
  render_free(&g);
  return err;
}
