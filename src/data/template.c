#include "data/template.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/files.h"

enum { CONFIG_LIMIT = 16 << 20 };

struct mt_template {
  const char *name;
  const char *marker; /* what its Jinja text contains and none before it in the table does */
  const char *system_begin,
      *system_end; /* NULL: put before the first question, a blank line between */
  const char *user_begin, *user_end;
  const char *answer_begin; /* not learned */
  const char *answer_lead;  /* learned, before the answer */
  const char *answer_end;   /* learned, behind it; NULL: the EOS token */
  const char *after;        /* not learned */
};

/* Renderings after the models' own chat_template: Mixtral-8x7B-Instruct, Qwen, OLMoE-Instruct,
 * Zephyr, DeepSeek-V2-Chat. */
static const struct mt_template templates[] = {
    {"chatml", "<|im_start|>", "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n",
     "<|im_end|>\n", "<|im_start|>assistant\n", "", "<|im_end|>", "\n"},
    {"mistral", "[INST]", NULL, NULL, "[INST] ", " [/INST]", "", " ", NULL, ""},
    {"zephyr", "<|user|>\n' + message['content'] + eos_token", "<|system|>\n", "</s>\n",
     "<|user|>\n", "</s>\n", "<|assistant|>\n", "", NULL, "\n"},
    {"tulu", "<|user|>", "<|system|>\n", "\n", "<|user|>\n", "\n", "<|assistant|>\n", "", NULL,
     "\n"},
    {"deepseek", "User: ", "", "\n\n", "User: ", "\n\n", "Assistant:", " ", NULL, ""},
};
enum { TEMPLATES = sizeof templates / sizeof *templates };

mt_err mt_template_find(const char *name, const struct mt_template **out) {
  for (int i = 0; i < TEMPLATES; i++) {
    *out = &templates[i];
    if (strcmp(templates[i].name, name) == 0) return MT_OK;
  }
  return mt_fail(MT_EUNSUPPORTED,
                 "no chat template '%.64s' (there are: chatml, mistral, zephyr, tulu, deepseek)",
                 name);
}

const char *mt_template_name(const struct mt_template *t) {
  return t->name;
}

mt_err mt_template_detect(const char *dir, const struct mt_template **out) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  json_error_t why;
  MT_TRY(mt_template_find("mistral", out));
  MT_TRY(mt_path_join(path, dir, "tokenizer_config.json"));
  if (!mt_path_exists(path)) return MT_OK;
  MT_TRY(mt_file_read(path, CONFIG_LIMIT, &text, &size));
  /* model_max_length is often 10^30, which no 64-bit integer holds. */
  json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &why);
  free(text);
  if (!root) return mt_fail(MT_EFORMAT, "%s: line %d: %s", path, why.line, why.text);
  const char *jinja = json_string_value(json_object_get(root, "chat_template"));
  mt_err err = MT_OK;
  if (jinja) {
    int i = 0;
    while (i < TEMPLATES && !strstr(jinja, templates[i].marker)) i++;
    if (i < TEMPLATES)
      *out = &templates[i];
    else
      err = mt_fail(MT_EUNSUPPORTED, "%s: its chat_template is not one of the known ones", path);
  }
  json_decref(root);
  return err;
}

void mt_rendered_free(struct mt_rendered *r) {
  free(r->ids.id);
  free(r->learn);
  *r = (struct mt_rendered){0};
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

/* One piece of text. `joined`: it follows text, so nothing is put before its first word. */
static mt_err piece(struct mt_encoder *e, struct mt_rendered *r, const char *text, size_t size,
                    bool joined, bool parse_special, bool learn) {
  size_t from = r->ids.count;
  int flags = (joined ? MT_ENCODE_CONTINUE : 0) | (parse_special ? MT_ENCODE_PARSE_SPECIAL : 0);
  MT_TRY(mt_encode(e, text, size, flags, &r->ids));
  return mark(r, from, learn);
}

static mt_err begin(struct mt_encoder *e, struct mt_rendered *r) {
  r->ids.count = 0;
  MT_TRY(mt_encode(e, "", 0, MT_ENCODE_ADD_SPECIAL, &r->ids)); /* BOS, where there is one */
  return mark(r, 0, false);
}

static mt_err end(struct mt_rendered *r, int32_t eos_id) {
  if (eos_id < 0) return MT_OK;
  size_t from = r->ids.count;
  MT_TRY(mt_ids_append(&r->ids, eos_id));
  return mark(r, from, true);
}

/* The template's text around the user's, encoded as one, since a word may span their seam. Special
 * tokens are read as such only when the user's text holds none: it must not speak for the template.
 * Otherwise the parts are encoded one by one. */
static mt_err wrapped(struct mt_encoder *e, struct mt_rendered *r, const char *before,
                      const char *system, const char *text, const char *after, bool joined) {
  const char *parts[] = {before, system ? system : "", system ? "\n\n" : "", text, after};
  bool ours[] = {true, false, true, false, true};
  bool apart = mt_has_special(e, parts[1]) || mt_has_special(e, parts[3]);
  struct mt_text whole = {0};
  mt_err err = MT_OK;
  for (int i = 0; i < 5 && !err; i++) {
    size_t size = strlen(parts[i]);
    if (!apart)
      err = mt_text_append(&whole, parts[i], size);
    else
      err = piece(e, r, parts[i], size, joined, ours[i], false);
    joined |= apart && size > 0;
  }
  if (!apart && !err) err = piece(e, r, whole.text, whole.size, joined, true, false);
  free(whole.text);
  return err;
}

static mt_err answer(const struct mt_template *t, struct mt_encoder *e, struct mt_rendered *r,
                     const char *text, int32_t eos_id) {
  MT_TRY(piece(e, r, t->answer_begin, strlen(t->answer_begin), true, true, false));
  /* The lead and the answer's first word are one word to the tokenizer. */
  size_t size = strlen(t->answer_lead) + strlen(text);
  char *joined = malloc(size + 1);
  if (!joined) return mt_fail(MT_ENOMEM, "an answer of %zu bytes", size);
  snprintf(joined, size + 1, "%s%s", t->answer_lead, text);
  mt_err err = piece(e, r, joined, size, true, false, true);
  free(joined);
  if (err) return err;
  if (t->answer_end) {
    MT_TRY(piece(e, r, t->answer_end, strlen(t->answer_end), true, true, true));
  } else {
    MT_TRY(end(r, eos_id));
  }
  return piece(e, r, t->after, strlen(t->after), true, true, false);
}

static const char *string_key(const json_t *o, const char *key) {
  return json_string_value(json_object_get(o, key));
}

static mt_err render_messages(const struct mt_template *t, struct mt_encoder *e,
                              const json_t *messages, int32_t eos_id, struct mt_rendered *r) {
  const char *system = NULL;
  bool joined = false;
  size_t n = json_array_size(messages);
  if (n == 0) return mt_fail(MT_EFORMAT, "'messages' is empty or no array");
  for (size_t i = 0; i < n; i++) {
    const json_t *m = json_array_get(messages, i);
    const char *role = string_key(m, "role"), *text = string_key(m, "content");
    if (!role || !text) {
      return mt_fail(MT_EFORMAT, "message %zu needs the strings 'role' and 'content'", i + 1);
    }
    if (strcmp(role, "system") == 0) {
      if (t->system_begin)
        MT_TRY(wrapped(e, r, t->system_begin, NULL, text, t->system_end, joined));
      else
        system = text;
      joined |= t->system_begin != NULL;
    } else if (strcmp(role, "user") == 0) {
      MT_TRY(wrapped(e, r, t->user_begin, system, text, t->user_end, joined));
      system = NULL;
      joined = true;
    } else if (strcmp(role, "assistant") == 0) {
      MT_TRY(answer(t, e, r, text, eos_id));
      joined = t->answer_end != NULL || *t->after; /* behind EOS a text begins anew */
    } else {
      return mt_fail(MT_EFORMAT, "message %zu: role '%.32s' is none of system, user, assistant",
                     i + 1, role);
    }
  }
  return MT_OK;
}

static mt_err render_instruction(const struct mt_template *t, struct mt_encoder *e,
                                 const json_t *record, int32_t eos_id, struct mt_rendered *r) {
  const char *instruction = string_key(record, "instruction"), *input = string_key(record, "input");
  const char *output = string_key(record, "output");
  if (!instruction || !output) {
    return mt_fail(MT_EFORMAT, "'instruction' and 'output' must be strings");
  }
  size_t size = strlen(instruction) + (input ? strlen(input) : 0) + 3;
  char *question = malloc(size);
  if (!question) return mt_fail(MT_ENOMEM, "an instruction of %zu bytes", size);
  bool more = input && *input;
  snprintf(question, size, "%s%s%s", instruction, more ? "\n\n" : "", more ? input : "");
  mt_err err = wrapped(e, r, t->user_begin, NULL, question, t->user_end, false);
  free(question);
  return err ? err : answer(t, e, r, output, eos_id);
}

mt_err mt_render(const struct mt_template *t, struct mt_encoder *e, const json_t *record,
                 int32_t eos_id, struct mt_rendered *r) {
  MT_TRY(begin(e, r));
  if (json_object_get(record, "messages")) {
    return render_messages(t, e, json_object_get(record, "messages"), eos_id, r);
  }
  if (json_object_get(record, "instruction")) return render_instruction(t, e, record, eos_id, r);
  if (json_object_get(record, "prompt")) {
    const char *prompt = string_key(record, "prompt"), *rest = string_key(record, "completion");
    if (!prompt || !rest) {
      return mt_fail(MT_EFORMAT, "'prompt' and 'completion' must be strings");
    }
    MT_TRY(piece(e, r, prompt, strlen(prompt), false, false, false));
    MT_TRY(piece(e, r, rest, strlen(rest), *prompt != '\0', false, true));
    return end(r, eos_id);
  }
  const char *text = string_key(record, "text");
  if (!text) {
    return mt_fail(MT_EFORMAT, "the record has none of 'text', 'prompt', 'instruction', 'messages' "
                               "(or it is no string)");
  }
  MT_TRY(piece(e, r, text, strlen(text), false, false, true));
  return end(r, eos_id);
}

mt_err mt_render_question(const struct mt_template *t, struct mt_encoder *e, const json_t *messages,
                          bool with_bos, struct mt_rendered *r) {
  r->ids.count = 0;
  if (with_bos) MT_TRY(begin(e, r));
  MT_TRY(render_messages(t, e, messages, -1, r));
  return piece(e, r, t->answer_begin, strlen(t->answer_begin), true, true, false);
}
