/* tokenizer.json -> struct mt_tokenizer. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

#include "base/json.h"
#include "data/tokenizer_impl.h"

enum { MAX_VOCAB = 1 << 24, MAX_STAGES = 64 };

static const char space_mark[] = "\xe2\x96\x81";
/* GPT-2's pre-tokenizer (openai/gpt-2, encoder.py). */
static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct loader {
  struct mt_tokenizer *t;
  const char *name;
};

static mt_err unsupported(const struct loader *l, const char *key, const char *what) {
  return mt_fail(MT_EUNSUPPORTED, "%s: %s '%.80s' is not supported", l->name, key,
                 what ? what : "(no type)");
}

static mt_err malformed(const struct loader *l, const char *key) {
  return mt_fail(MT_EFORMAT, "%s: '%s' is missing or of the wrong type", l->name, key);
}

static const char *text_of(const json_t *o, const char *key) {
  return json_string_value(json_object_get(o, key));
}

static bool flag_of(const json_t *o, const char *key, bool fallback) {
  const json_t *v = json_object_get(o, key);
  return json_is_boolean(v) ? json_is_true(v) : fallback;
}

int32_t mt_tok_find(const struct mt_tokenizer *t, const char *text, size_t size) {
  if (!t->slot) return -1;
  for (size_t i = XXH3_64bits(text, size);; i++) {
    int32_t id = t->slot[i & t->slot_mask];
    if (id < 0) return -1;
    if (t->token[id].size == size && memcmp(t->token[id].text, text, size) == 0) return id;
  }
}

static mt_err place_token(const struct loader *l, const char *text, size_t size, json_int_t id) {
  struct mt_tokenizer *t = l->t;
  if (id < 0 || id >= MAX_VOCAB) {
    return mt_fail(MT_EFORMAT, "%s: token id %lld is out of range", l->name, (long long)id);
  }
  if (id >= t->vocab) {
    size_t n = (size_t)id + 1;
    struct token_entry *grown = realloc(t->token, n * sizeof *grown);
    if (!grown) return mt_fail(MT_ENOMEM, "%s: %zu tokens", l->name, n);
    memset(grown + t->vocab, 0, (n - (size_t)t->vocab) * sizeof *grown);
    t->token = grown;
    t->vocab = (int)n;
  }
  struct token_entry *e = &t->token[id];
  if (e->text) {
    if (e->size == size && memcmp(e->text, text, size) == 0) return MT_OK;
    return mt_fail(MT_EFORMAT, "%s: id %lld belongs to '%.40s' and '%.40s'", l->name, (long long)id,
                   e->text, text);
  }
  e->text = malloc(size + 1);
  if (!e->text) return mt_fail(MT_ENOMEM, "%s", l->name);
  memcpy(e->text, text, size);
  e->text[size] = '\0';
  e->size = size;
  return MT_OK;
}

static mt_err load_vocab(const struct loader *l, const json_t *model, const json_t *added) {
  const json_t *vocab = json_object_get(model, "vocab");
  const char *key;
  json_t *id, *entry;
  size_t i;
  json_int_t top = -1;
  if (!json_is_object(vocab)) return malformed(l, "model.vocab");
  /* Ids must be dense enough that the table is no larger than the file earns. */
  json_object_foreach((json_t *)(uintptr_t)vocab, key, id) {
    if (!json_is_integer(id)) return malformed(l, "model.vocab");
    if (json_integer_value(id) > top) top = json_integer_value(id);
  }
  json_array_foreach((json_t *)(uintptr_t)added, i, entry) {
    json_int_t n = json_integer_value(json_object_get(entry, "id"));
    if (n > top) top = n;
  }
  size_t known = json_object_size(vocab) + json_array_size(added);
  if (top >= MAX_VOCAB || (uint64_t)(top + 1) > 16 * (uint64_t)known + 65536) {
    return mt_fail(MT_EFORMAT, "%s: token id %lld among %zu tokens", l->name, (long long)top,
                   known);
  }
  if (top >= 0) {
    l->t->token = calloc((size_t)top + 1, sizeof *l->t->token);
    if (!l->t->token) return mt_fail(MT_ENOMEM, "%s", l->name);
    l->t->vocab = (int)top + 1;
  }
  json_object_foreach((json_t *)(uintptr_t)vocab, key, id) {
    MT_TRY(place_token(l, key, strlen(key), json_integer_value(id)));
  }
  return MT_OK;
}

static mt_err load_added(const struct loader *l, const json_t *added) {
  struct mt_tokenizer *t = l->t;
  size_t n = json_array_size(added);
  t->added = calloc(n + 1, sizeof *t->added);
  if (!t->added) return mt_fail(MT_ENOMEM, "%s", l->name);
  for (size_t i = 0; i < n; i++) {
    const json_t *o = json_array_get(added, i);
    const char *text = text_of(o, "content");
    const json_t *id = json_object_get(o, "id");
    if (!text || !*text || !json_is_integer(id)) return malformed(l, "added_tokens");
    MT_TRY(place_token(l, text, strlen(text), json_integer_value(id)));
    struct added_token *a = &t->added[t->added_count++];
    *a = (struct added_token){.text = strdup(text),
                              .size = strlen(text),
                              .id = (int32_t)json_integer_value(id),
                              .single_word = flag_of(o, "single_word", false),
                              .lstrip = flag_of(o, "lstrip", false),
                              .rstrip = flag_of(o, "rstrip", false),
                              .normalized = flag_of(o, "normalized", true),
                              .special = flag_of(o, "special", false)};
    if (!a->text) return mt_fail(MT_ENOMEM, "%s", l->name);
    t->token[a->id].special |= a->special;
    t->token[a->id].added = true;
  }
  return MT_OK;
}

static size_t power_above(size_t n) {
  size_t p = 16;
  while (p < n) p *= 2;
  return p;
}

static mt_err index_tokens(const struct loader *l) {
  struct mt_tokenizer *t = l->t;
  size_t n = power_above(2 * (size_t)t->vocab + 2);
  t->slot = malloc(n * sizeof *t->slot);
  if (!t->slot) return mt_fail(MT_ENOMEM, "%s: table of %d tokens", l->name, t->vocab);
  memset(t->slot, 0xff, n * sizeof *t->slot);
  t->slot_mask = n - 1;
  for (int id = 0; id < t->vocab; id++) {
    if (!t->token[id].text || mt_tok_find(t, t->token[id].text, t->token[id].size) >= 0) continue;
    size_t i = XXH3_64bits(t->token[id].text, t->token[id].size);
    while (t->slot[i & t->slot_mask] >= 0) i++;
    t->slot[i & t->slot_mask] = id;
  }
  for (int b = 0; b < 256; b++) {
    char name[8];
    snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
    t->byte_id[b] = mt_tok_find(t, name, 6);
  }
  return MT_OK;
}

/* The two halves of a merge: "a b" or ["a", "b"]. */
static mt_err merge_halves(const struct loader *l, const json_t *m, const char *half[2],
                           size_t size[2]) {
  if (json_is_array(m) && json_array_size(m) == 2) {
    for (size_t i = 0; i < 2; i++) {
      half[i] = json_string_value(json_array_get(m, i));
      if (!half[i]) return malformed(l, "model.merges");
      size[i] = strlen(half[i]);
    }
    return MT_OK;
  }
  const char *text = json_string_value(m), *space = text ? strchr(text, ' ') : NULL;
  if (!space) return malformed(l, "model.merges");
  half[0] = text;
  size[0] = (size_t)(space - text);
  half[1] = space + 1;
  size[1] = strlen(space + 1);
  return MT_OK;
}

/* Does a token hold a space mark behind something that is none? */
static bool crosses_mark(const struct token_entry *e) {
  const char *p = e->text;
  for (const char *at = strstr(p, space_mark); at; at = strstr(at + 3, space_mark)) {
    if (at > p && (at - p < 3 || memcmp(at - 3, space_mark, 3) != 0)) return true;
  }
  return false;
}

static mt_err load_merges(const struct loader *l, const json_t *merges) {
  struct mt_tokenizer *t = l->t;
  size_t n = json_array_size(merges), slots = power_above(2 * n + 2);
  if (!json_is_array(merges)) return malformed(l, "model.merges");
  t->merge = malloc(slots * sizeof *t->merge);
  if (!t->merge) return mt_fail(MT_ENOMEM, "%s: %zu merges", l->name, n);
  for (size_t i = 0; i < slots; i++) t->merge[i].key = EMPTY_KEY;
  t->merge_mask = slots - 1;
  t->split_at_space_mark = true;
  struct mt_text joined = {0};
  mt_err err = MT_OK;
  for (size_t rank = 0; !err && rank < n; rank++) {
    const char *half[2];
    size_t size[2];
    MT_GO(merge_halves(l, json_array_get(merges, rank), half, size));
    joined.size = 0;
    MT_GO(mt_text_append(&joined, half[0], size[0]));
    MT_GO(mt_text_append(&joined, half[1], size[1]));
    int32_t a = mt_tok_find(t, half[0], size[0]), b = mt_tok_find(t, half[1], size[1]);
    int32_t id = mt_tok_find(t, joined.text, joined.size);
    if (a < 0 || b < 0 || id < 0) {
      err = mt_fail(MT_EFORMAT, "%s: merge %zu ('%.*s' + '%.*s') uses a token that is not there",
                    l->name, rank, (int)size[0], half[0], (int)size[1], half[1]);
      break;
    }
    if (crosses_mark(&t->token[id])) t->split_at_space_mark = false;
    uint64_t key = (uint64_t)(uint32_t)a << 32 | (uint32_t)b;
    size_t i = XXH3_64bits(&key, sizeof key);
    while (t->merge[i & t->merge_mask].key != EMPTY_KEY && t->merge[i & t->merge_mask].key != key) {
      i++;
    }
    t->merge[i & t->merge_mask] = (struct merge_slot){key, (int32_t)rank, id};
  }
done:
  free(joined.text);
  return err;
}

static mt_err load_model(const struct loader *l, const json_t *model) {
  struct mt_tokenizer *t = l->t;
  const char *type = text_of(model, "type");
  if (!json_is_object(model)) return malformed(l, "model");
  if (type ? strcmp(type, "BPE") != 0 : !json_object_get(model, "merges")) {
    return unsupported(l, "model.type", type);
  }
  const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
  for (int i = 0; i < 2; i++) {
    const char *affix = text_of(model, affixes[i]);
    if (affix && *affix) return unsupported(l, affixes[i], affix);
  }
  if (json_number_value(json_object_get(model, "dropout")) > 0) {
    return unsupported(l, "model.dropout", "above 0");
  }
  t->byte_fallback = flag_of(model, "byte_fallback", false);
  t->fuse_unk = flag_of(model, "fuse_unk", false);
  t->ignore_merges = flag_of(model, "ignore_merges", false);
  const char *unk = text_of(model, "unk_token");
  t->unk = unk ? mt_tok_find(t, unk, strlen(unk)) : -1;
  return load_merges(l, json_object_get(model, "merges"));
}

static mt_err compile(const struct loader *l, const char *pattern, bool literal, pcre2_code **out) {
  int code;
  PCRE2_SIZE offset;
  uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK;
  if (literal) options = PCRE2_UTF | PCRE2_LITERAL;
  *out = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, options, &code, &offset, NULL);
  if (!*out) {
    PCRE2_UCHAR why[128];
    pcre2_get_error_message(code, why, sizeof why);
    return mt_fail(MT_EUNSUPPORTED, "%s: pattern '%.120s': %s", l->name, pattern, (char *)why);
  }
  (void)pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE); /* without it matching is only slower */
  return MT_OK;
}

/* "pattern": {"String": s} or {"Regex": s} */
static mt_err load_pattern(const struct loader *l, const json_t *o, struct stage *s) {
  const json_t *p = json_object_get(o, "pattern");
  const char *literal = text_of(p, "String"), *regex = text_of(p, "Regex");
  if (literal ? !*literal : !regex) return malformed(l, "pattern");
  return compile(l, literal ? literal : regex, literal != NULL, &s->regex);
}

static mt_err add_stage(const struct loader *l, struct stages *list, struct stage **out) {
  if (list->count == MAX_STAGES) return unsupported(l, "a pipeline", "of more than 64 stages");
  struct stage *grown = realloc(list->at, (size_t)(list->count + 1) * sizeof *grown);
  if (!grown) return mt_fail(MT_ENOMEM, "%s", l->name);
  list->at = grown;
  *out = &grown[list->count++];
  **out = (struct stage){0};
  return MT_OK;
}

static mt_err keep_text(const struct loader *l, const json_t *o, const char *key, char **out) {
  const char *text = text_of(o, key);
  if (!text) return malformed(l, key);
  *out = strdup(text);
  return *out ? MT_OK : mt_fail(MT_ENOMEM, "%s", l->name);
}

/* A "Sequence" spreads into its members; anything else is one stage by `one`. */
static mt_err load_stages(const struct loader *l, const char *key, const char *members,
                          const json_t *o, struct stages *list, int depth,
                          mt_err (*one)(const struct loader *, const json_t *, const char *,
                                        struct stages *)) {
  if (!o || json_is_null(o)) return MT_OK;
  const char *type = text_of(o, "type");
  if (!type) return malformed(l, key);
  if (strcmp(type, "Sequence") != 0) return one(l, o, type, list);
  const json_t *array = json_object_get(o, members);
  if (!json_is_array(array) || depth > 8) return malformed(l, members);
  for (size_t i = 0; i < json_array_size(array); i++) {
    MT_TRY(load_stages(l, key, members, json_array_get(array, i), list, depth + 1, one));
  }
  return MT_OK;
}

static mt_err one_normalizer(const struct loader *l, const json_t *o, const char *type,
                             struct stages *list) {
  static const struct {
    const char *name;
    int options;
  } unicode[] = {
      {"NFC", UTF8PROC_STABLE | UTF8PROC_COMPOSE},
      {"NFD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE},
      {"NFKC", UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
      {"NFKD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT},
  };
  struct stage *s = NULL;
  MT_TRY(add_stage(l, list, &s));
  for (size_t i = 0; i < sizeof unicode / sizeof *unicode; i++) {
    if (strcmp(type, unicode[i].name) != 0) continue;
    s->kind = STAGE_UNICODE;
    s->options = unicode[i].options;
    return MT_OK;
  }
  if (strcmp(type, "Prepend") == 0) {
    s->kind = STAGE_PREPEND;
    return keep_text(l, o, "prepend", &s->a);
  }
  if (strcmp(type, "Replace") == 0) {
    s->kind = STAGE_REPLACE;
    MT_TRY(load_pattern(l, o, s));
    return keep_text(l, o, "content", &s->b);
  }
  if (strcmp(type, "Strip") == 0) {
    s->kind = STAGE_STRIP;
    s->left = flag_of(o, "strip_left", true);
    s->right = flag_of(o, "strip_right", true);
    return MT_OK;
  }
  return unsupported(l, "normalizer", type);
}

static mt_err split_stage(const struct loader *l, struct stages *list, const char *pattern,
                          enum behaviour behaviour) {
  struct stage *s = NULL;
  MT_TRY(add_stage(l, list, &s));
  s->kind = STAGE_SPLIT;
  s->behaviour = behaviour;
  return compile(l, pattern, false, &s->regex);
}

static mt_err load_metaspace(const struct loader *l, const json_t *o, struct stage *s) {
  static const char *const schemes[] = {"always", "first", "never"};
  const char *scheme = text_of(o, "prepend_scheme");
  s->kind = STAGE_METASPACE;
  s->left = flag_of(o, "split", true);
  s->scheme = flag_of(o, "add_prefix_space", true) ? PREPEND_ALWAYS : PREPEND_NEVER;
  if (scheme) {
    int i = 0;
    while (i < 3 && strcmp(schemes[i], scheme) != 0) i++;
    if (i == 3) return unsupported(l, "prepend_scheme", scheme);
    s->scheme = (enum scheme)i;
  }
  return keep_text(l, o, "replacement", &s->a);
}

static mt_err one_pre_tokenizer(const struct loader *l, const json_t *o, const char *type,
                                struct stages *list) {
  static const char *const behaviours[] = {"Isolated", "Removed", "MergedWithPrevious",
                                           "MergedWithNext", "Contiguous"};
  struct stage *s = NULL;
  if (strcmp(type, "Digits") == 0) {
    bool each = flag_of(o, "individual_digits", false);
    return split_stage(l, list, "\\p{N}", each ? ISOLATED : CONTIGUOUS);
  }
  if (strcmp(type, "ByteLevel") == 0) {
    MT_TRY(add_stage(l, list, &s));
    s->kind = STAGE_BYTE_LEVEL;
    s->left = flag_of(o, "add_prefix_space", true);
    return flag_of(o, "use_regex", true) ? compile(l, gpt2_pattern, false, &s->regex) : MT_OK;
  }
  MT_TRY(add_stage(l, list, &s));
  if (strcmp(type, "Metaspace") == 0) return load_metaspace(l, o, s);
  if (strcmp(type, "Split") != 0) return unsupported(l, "pre_tokenizer", type);
  const char *behaviour = text_of(o, "behavior");
  int i = 0;
  while (behaviour && i < 5 && strcmp(behaviours[i], behaviour) != 0) i++;
  if (!behaviour || i == 5) return unsupported(l, "behavior", behaviour);
  s->kind = STAGE_SPLIT;
  s->behaviour = (enum behaviour)i;
  s->invert = flag_of(o, "invert", false);
  return load_pattern(l, o, s);
}

static mt_err one_decoder(const struct loader *l, const json_t *o, const char *type,
                          struct stages *list) {
  struct stage *s = NULL;
  MT_TRY(add_stage(l, list, &s));
  if (strcmp(type, "ByteLevel") == 0) {
    s->kind = STAGE_BYTE_LEVEL;
  } else if (strcmp(type, "ByteFallback") == 0) {
    s->kind = STAGE_BYTE_FALLBACK;
  } else if (strcmp(type, "Fuse") == 0) {
    s->kind = STAGE_FUSE;
  } else if (strcmp(type, "Metaspace") == 0) {
    return load_metaspace(l, o, s);
  } else if (strcmp(type, "Replace") == 0) {
    s->kind = STAGE_REPLACE;
    MT_TRY(load_pattern(l, o, s));
    return keep_text(l, o, "content", &s->b);
  } else if (strcmp(type, "Strip") == 0) {
    s->kind = STAGE_STRIP;
    s->left = (int)json_integer_value(json_object_get(o, "start"));
    s->right = (int)json_integer_value(json_object_get(o, "stop"));
    return keep_text(l, o, "content", &s->a);
  } else {
    return unsupported(l, "decoder", type);
  }
  return MT_OK;
}

static mt_err append_id(const struct loader *l, int32_t **list, int *count, json_int_t id) {
  if (id < 0 || id >= l->t->vocab) return malformed(l, "post_processor.special_tokens");
  int32_t *grown = realloc(*list, (size_t)(*count + 1) * sizeof *grown);
  if (!grown) return mt_fail(MT_ENOMEM, "%s", l->name);
  grown[(*count)++] = (int32_t)id;
  *list = grown;
  return MT_OK;
}

static mt_err load_template(const struct loader *l, const json_t *o) {
  const json_t *single = json_object_get(o, "single"),
               *known = json_object_get(o, "special_tokens");
  bool behind = false;
  if (!json_is_array(single)) return malformed(l, "post_processor.single");
  for (size_t i = 0; i < json_array_size(single); i++) {
    const json_t *part = json_array_get(single, i);
    const char *name = text_of(json_object_get(part, "SpecialToken"), "id");
    if (!name) {
      behind = true;
      continue;
    }
    const json_t *ids = json_object_get(json_object_get(known, name), "ids");
    if (!json_is_array(ids)) return malformed(l, "post_processor.special_tokens");
    for (size_t k = 0; k < json_array_size(ids); k++) {
      json_int_t id = json_integer_value(json_array_get(ids, k));
      if (behind)
        MT_TRY(append_id(l, &l->t->suffix, &l->t->suffix_count, id));
      else
        MT_TRY(append_id(l, &l->t->prefix, &l->t->prefix_count, id));
    }
  }
  return MT_OK;
}

static mt_err one_post_processor(const struct loader *l, const json_t *o, const char *type,
                                 struct stages *list) {
  (void)list;
  if (strcmp(type, "ByteLevel") == 0) return MT_OK; /* changes offsets only */
  if (strcmp(type, "TemplateProcessing") == 0) return load_template(l, o);
  return unsupported(l, "post_processor", type);
}

mt_err mt_tokenizer_parse(const char *json, size_t size_bytes, const char *name,
                          struct mt_tokenizer **out) {
  json_error_t why;
  mt_err err;
  *out = NULL;
  struct loader l = {calloc(1, sizeof *l.t), name};
  bool bearable = mt_json_bearable(json, size_bytes);
  json_t *root = bearable ? json_loadb(json, size_bytes, JSON_REJECT_DUPLICATES, &why) : NULL;
  if (!l.t) {
    err = mt_fail(MT_ENOMEM, "%s", name);
    goto done;
  }
  if (!bearable) {
    err = mt_fail(MT_EFORMAT, "%s: far more brackets or commas than a tokenizer needs", name);
    goto done;
  }
  l.t->unk = -1;
  l.t->hash = mt_hash_bytes(json, size_bytes);
  if (!json_is_object(root)) {
    err = mt_fail(MT_EFORMAT, "%s: line %d: %s", name, root ? 1 : why.line,
                  root ? "is no object" : why.text);
    goto done;
  }
  const json_t *added = json_object_get(root, "added_tokens"),
               *model = json_object_get(root, "model");
  struct stages none = {0};
  MT_GO(load_vocab(&l, model, added));
  MT_GO(load_added(&l, added));
  MT_GO(index_tokens(&l));
  MT_GO(load_model(&l, model));
  MT_GO(load_stages(&l, "normalizer", "normalizers", json_object_get(root, "normalizer"),
                    &l.t->normalizer, 0, one_normalizer));
  MT_GO(load_stages(&l, "pre_tokenizer", "pretokenizers", json_object_get(root, "pre_tokenizer"),
                    &l.t->pre, 0, one_pre_tokenizer));
  MT_GO(load_stages(&l, "decoder", "decoders", json_object_get(root, "decoder"), &l.t->decoder, 0,
                    one_decoder));
  MT_GO(load_stages(&l, "post_processor", "processors", json_object_get(root, "post_processor"),
                    &none, 0, one_post_processor));
done:
  json_decref(root);
  if (err)
    mt_tokenizer_free(l.t);
  else
    *out = l.t;
  return err;
}

struct mt_tokenizer_facts mt_tokenizer_facts(const struct mt_tokenizer *t) {
  struct mt_tokenizer_facts f = {.byte_fallback = t->byte_fallback,
                                 .added = t->added_count,
                                 .prefix = t->prefix,
                                 .suffix = t->suffix,
                                 .prefix_count = t->prefix_count,
                                 .suffix_count = t->suffix_count,
                                 .unknown = t->unk};
  for (int i = 0; i < t->vocab; i++) f.tokens += t->token[i].text != NULL;
  for (size_t i = 0; i <= t->merge_mask; i++) f.merges += t->merge[i].key != EMPTY_KEY;
  for (int i = 0; i < t->added_count; i++) f.special += t->added[i].special;
  for (int i = 0; i < t->pre.count; i++) f.byte_level |= t->pre.at[i].kind == STAGE_BYTE_LEVEL;
  return f;
}

static void free_stages(struct stages *s) {
  for (int i = 0; i < s->count; i++) {
    free(s->at[i].a);
    free(s->at[i].b);
    pcre2_code_free(s->at[i].regex);
  }
  free(s->at);
}

struct mt_hash mt_tokenizer_hash(const struct mt_tokenizer *t) {
  return t->hash;
}

void mt_tokenizer_free(struct mt_tokenizer *t) {
  if (!t) return;
  for (int i = 0; i < t->vocab; i++) free(t->token[i].text);
  for (int i = 0; i < t->added_count; i++) free(t->added[i].text);
  free(t->token);
  free(t->added);
  free(t->slot);
  free(t->merge);
  free(t->prefix);
  free(t->suffix);
  free_stages(&t->normalizer);
  free_stages(&t->pre);
  free_stages(&t->decoder);
  free(t);
}
