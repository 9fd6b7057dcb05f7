/* The chat templates that are known, and how the Jinja text of a checkpoint is recognised. */
#include <stdlib.h>
#include <string.h>

#include "base/files.h"
#include "data/template_impl.h"

enum { CONFIG_LIMIT = 16 << 20 };

#define CHATML                                                                                     \
  .system_begin = "<|im_start|>system\n", .system_end = "<|im_end|>\n",                            \
  .user_begin = "<|im_start|>user\n", .user_end = "<|im_end|>\n",                                  \
  .answer_begin = "<|im_start|>assistant\n", .answer_lead = "", .answer_tail = "",                 \
  .answer_end = "<|im_end|>", .after = "\n", .after_last = true
#define INST(begin, end, lead, tail, behind)                                                       \
  .bos = true, .user_begin = begin, .user_end = end, .answer_begin = "", .answer_lead = lead,      \
  .answer_tail = tail, .after = behind, .after_last = true

/* Markers are written as they stand in squeezed text. The spaces around [INST] differ between
 * releases of one model, and so do the ids. */
static const struct mt_template templates[] = {
    /* Mixtral-8x7B-Instruct-v0.1, its present file */
    {.name = "mixtral",
     .marker = {"' [INST] '", "' [/INST]'", "' '+message['content']+eos_token"},
     INST(" [INST] ", " [/INST]", " ", "", "")},
    /* Mixtral-8x22B-Instruct-v0.1 */
    {.name = "mixtral-8x22b",
     .marker = {"' [INST] '", "' [/INST]'", "' '+message['content']+' '+eos_token"},
     INST(" [INST] ", " [/INST]", " ", " ", "")},
    /* What Mistral's own encoder makes of a conversation, tokenizers of version 1; the default */
    {.name = "mistral",
     .marker = {"'[INST] '", "' [/INST]'", "' '+message['content']+eos_token"},
     INST("[INST] ", " [/INST]", " ", "", "")},
    /* Mistral-7B-Instruct-v0.1 */
    {.name = "mistral-v0.1",
     .marker = {"'[INST] '", "' [/INST]'", "{{message['content']+eos_token+' '}}"},
     INST("[INST] ", " [/INST]", "", "", " ")},
    /* Mistral-7B-Instruct-v0.2; Mixtral-8x7B-Instruct-v0.1 as first released */
    {.name = "mistral-v0.2",
     .marker = {"'[INST] '", "' [/INST]'", "{{message['content']+eos_token}}"},
     INST("[INST] ", " [/INST]", "", "", "")},
    /* Mistral-7B-Instruct-v0.3 */
    {.name = "mistral-v0.3",
     .marker = {"'[INST] '", "'[/INST]'", "' '+message['content']+eos_token"},
     INST("[INST] ", "[/INST]", " ", "", "")},
    /* Qwen3: an answer without thoughts holds an empty thought when it is the last */
    {.name = "qwen3",
     .marker =
         {"'\n<think>\n'+reasoning_content.strip('\n')+'\n</think>\n\n'+content.lstrip('\n')"},
     .never = {"assistant\n<think>"}, /* always thinks */
     .last_lead = "<think>\n\n</think>\n\n",
     CHATML},
    {.name = "qwen2.5",
     .marker = {"<|im_start|>", "You are Qwen, created by Alibaba Cloud. You are a helpful "
                                "assistant."},
     .default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
     CHATML},
    /* Qwen1.5-MoE-Chat, Qwen2 */
    {.name = "qwen2",
     .marker = {"'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"},
     .default_system = "You are a helpful assistant.",
     CHATML},
    {.name = "chatml-bos",
     .marker = {"<|im_start|>", "bos_token"},
     .never = {"<|im_start|>system\nYou", "</think>"},
     .bos = true,
     CHATML},
    {.name = "chatml",
     .marker = {"<|im_start|>"},
     .never = {"<|im_start|>system\nYou", "</think>"},
     CHATML},
    {.name = "zephyr",
     .marker = {"'<|user|>\n'+message['content']+eos_token"},
     .system_begin = "<|system|>\n",
     .system_end = "</s>\n",
     .user_begin = "<|user|>\n",
     .user_end = "</s>\n",
     .answer_begin = "<|assistant|>\n",
     .answer_lead = "",
     .answer_tail = "",
     .after = "\n",
     .after_last = true},
    /* OLMoE-Instruct, Tulu 3 */
    {.name = "tulu",
     .marker = {"'<|user|>\n'+message['content']+'\n'", "bos_token"},
     .bos = true,
     .system_begin = "<|system|>\n",
     .system_end = "\n",
     .user_begin = "<|user|>\n",
     .user_end = "\n",
     .answer_begin = "<|assistant|>\n",
     .answer_lead = "",
     .answer_tail = "",
     .after = "\n"},
    /* DeepSeek-MoE-Chat, DeepSeek-V2-Chat */
    {.name = "deepseek",
     .marker = {"'User: '+message['content']+'\n\n'", "'Assistant: '+message['content']+eos_token"},
     .bos = true,
     .system_begin = "",
     .system_end = "\n\n",
     .user_begin = "User: ",
     .user_end = "\n\n",
     .answer_begin = "Assistant:",
     .answer_lead = " ",
     .answer_tail = "",
     .after = "",
     .after_last = true},
};
enum { TEMPLATES = sizeof templates / sizeof *templates };
static const char default_name[] = "mistral";

mt_err mt_template_find(const char *name, const struct mt_template **out) {
  char names[512] = "";
  for (int i = 0; i < TEMPLATES; i++) {
    *out = &templates[i];
    if (strcmp(templates[i].name, name) == 0) return MT_OK;
    strncat(names, i ? ", " : "", sizeof names - strlen(names) - 1);
    strncat(names, templates[i].name, sizeof names - strlen(names) - 1);
  }
  return mt_fail(MT_EUNSUPPORTED, "no chat template '%.64s' (there are: %s)", name, names);
}

const char *mt_template_name(const struct mt_template *t) {
  return t->name;
}

struct mt_hash mt_template_hash(const struct mt_template *t) {
  const char *const texts[] = {t->default_system, t->system_begin, t->system_end,  t->user_begin,
                               t->user_end,       t->answer_begin, t->answer_lead, t->last_lead,
                               t->answer_tail,    t->answer_end,   t->after};
  struct mt_hash parts[sizeof texts / sizeof *texts + 1] = {{t->bos, t->after_last}};
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
    if (texts[i]) parts[i + 1] = mt_hash_bytes(texts[i], strlen(texts[i]));
  }
  return mt_hash_bytes(parts, sizeof parts);
}

/* Jinja text in one spelling, so that markers need not know them all: inside {{ }} and {% %} spaces
 * go, "..." becomes '...', message.content becomes message['content'], the two characters \n in a
 * string become a new line, and the - of {{- and -}} goes. NULL: out of memory. */
static char *squeeze(const char *jinja) {
  size_t size = strlen(jinja);
  char *out = malloc(2 * size + 1), *to = out; /* ".content" to "['content']" grows the most */
  char quote = 0;
  bool code = false;
  if (!out) return NULL;
  for (const char *c = jinja; *c; c++) {
    bool opens = *c == '{' && (c[1] == '{' || c[1] == '%');
    bool closes = (*c == '}' || *c == '%') && c[1] == '}';
    if (quote) {
      if (*c == quote) {
        *to++ = '\'';
        quote = 0;
      } else if (*c == '\\' && c[1]) {
        c++;
        *to++ = *c == 'n' ? '\n' : *c;
      } else {
        *to++ = *c;
      }
    } else if (!code && !opens) {
      *to++ = *c;
    } else if (opens || closes) {
      code = opens;
      *to++ = *c++;
      *to++ = *c;
      if (opens && c[1] == '-') c++;
    } else if (*c == '\'' || *c == '"') {
      quote = *c;
      *to++ = '\'';
    } else if (strncmp(c, ".content", 8) == 0 && c > jinja && c[-1] == 'e') {
      memcpy(to, "['content']", 11);
      to += 11;
      c += 7;
    } else if (!strchr(" \t\r\n", *c) && !(*c == '-' && (c[1] == '}' || c[1] == '%'))) {
      *to++ = *c;
    }
  }
  *to = '\0';
  return out;
}

static bool fits(const struct mt_template *t, const char *squeezed) {
  for (int i = 0; i < TEMPLATE_MARKERS && t->marker[i]; i++) {
    if (!strstr(squeezed, t->marker[i])) return false;
  }
  for (int i = 0; i < 2 && t->never[i]; i++) {
    if (strstr(squeezed, t->never[i])) return false;
  }
  return true;
}

static mt_err recognise(const char *path, const char *jinja, const struct mt_template **out) {
  char *squeezed = squeeze(jinja);
  if (!squeezed) return mt_fail(MT_ENOMEM, "%s", path);
  int i = 0;
  while (i < TEMPLATES && !fits(&templates[i], squeezed)) i++;
  free(squeezed);
  if (i < TEMPLATES) {
    *out = &templates[i];
    return MT_OK;
  }
  return mt_fail(MT_EUNSUPPORTED,
                 "%s: its chat_template is not one of the known ones (choose one: --chat-template)",
                 path);
}

/* A string, or a list of {"name", "template"} of which "default" counts. */
static const char *template_text(const json_t *value) {
  const json_t *entry;
  size_t i;
  if (!json_is_array(value)) return json_string_value(value);
  json_array_foreach(value, i, entry) {
    const char *name = json_string_value(json_object_get(entry, "name"));
    if (name && strcmp(name, "default") == 0) {
      return json_string_value(json_object_get(entry, "template"));
    }
  }
  return NULL;
}

mt_err mt_template_detect(const char *dir, const struct mt_template **out) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  json_error_t why;
  MT_TRY(mt_template_find(default_name, out));
  MT_TRY(mt_path_join(path, dir, "chat_template.jinja"));
  if (mt_path_exists(path)) {
    MT_TRY(mt_file_read(path, CONFIG_LIMIT, &text, &size));
    mt_err err = recognise(path, text, out);
    free(text);
    return err;
  }
  MT_TRY(mt_path_join(path, dir, "tokenizer_config.json"));
  if (!mt_path_exists(path)) return MT_OK;
  MT_TRY(mt_file_read(path, CONFIG_LIMIT, &text, &size));
  /* model_max_length is often 10^30, which no 64-bit integer holds. */
  json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &why);
  free(text);
  if (!root) return mt_fail(MT_EFORMAT, "%s: line %d: %s", path, why.line, why.text);
  const json_t *value = json_object_get(root, "chat_template");
  const char *jinja = template_text(value);
  mt_err err = MT_OK;
  if (jinja) {
    err = recognise(path, jinja, out);
  } else if (value && !json_is_null(value)) {
    err = mt_fail(MT_EFORMAT, "%s: chat_template is no string and names no default", path);
  }
  json_decref(root);
  return err;
}
