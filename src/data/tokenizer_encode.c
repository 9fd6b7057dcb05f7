/* Text -> ids: added tokens are cut out, the rest is normalized, cut into words, and merged. */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/files.h"
#include "data/tokenizer_impl.h"

enum { FILE_LIMIT = 256 << 20 };

mt_err mt_text_append(struct mt_text *t, const char *bytes, size_t size) {
  if (size > t->capacity - t->size) {
    size_t capacity = (t->size + size) * 2 + 64;
    char *grown = realloc(t->text, capacity);
    if (!grown) return mt_fail(MT_ENOMEM, "text of %zu bytes", capacity);
    t->text = grown;
    t->capacity = capacity;
  }
  if (size) memcpy(t->text + t->size, bytes, size);
  t->size += size;
  return MT_OK;
}

mt_err mt_ids_append(struct mt_ids *ids, int32_t id) {
  if (ids->count == ids->capacity) {
    size_t capacity = ids->capacity * 2 + 64;
    int32_t *grown = realloc(ids->id, capacity * sizeof *grown);
    if (!grown) return mt_fail(MT_ENOMEM, "%zu token ids", capacity);
    ids->id = grown;
    ids->capacity = capacity;
  }
  ids->id[ids->count++] = id;
  return MT_OK;
}

mt_err mt_tokenizer_load(const char *path, struct mt_tokenizer **out) {
  char *json;
  size_t size;
  *out = NULL;
  MT_TRY(mt_file_read(path, FILE_LIMIT, &json, &size));
  mt_err err = mt_tokenizer_parse(json, size, path, out);
  free(json);
  return err;
}

int mt_tokenizer_vocab(const struct mt_tokenizer *t) {
  return t->vocab;
}

int32_t mt_tokenizer_id(const struct mt_tokenizer *t, const char *token) {
  return mt_tok_find(t, token, strlen(token));
}

const char *mt_tokenizer_token(const struct mt_tokenizer *t, int32_t id) {
  return id >= 0 && id < t->vocab ? t->token[id].text : NULL;
}

bool mt_tokenizer_is_special(const struct mt_tokenizer *t, int32_t id) {
  return id >= 0 && id < t->vocab && t->token[id].special;
}

bool mt_has_special(const struct mt_encoder *e, const char *text) {
  for (int i = 0; i < e->t->added_count; i++) {
    if (e->t->added[i].special && strstr(text, e->t->added[i].text)) return true;
  }
  return false;
}

bool mt_encoder_is_added(const struct mt_encoder *e, int32_t id) {
  return id >= 0 && id < e->t->vocab && e->t->token[id].added;
}

/* GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the others for 256, 257, ... */
static bool stands_for_itself(int b) {
  return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
}

void mt_tok_byte_char(uint8_t byte, char out[3], size_t *size) {
  int32_t c = byte;
  if (!stands_for_itself(byte)) {
    c = 256;
    for (int b = 0; b < byte; b++) c += !stands_for_itself(b);
  }
  *size = (size_t)utf8proc_encode_char(c, (utf8proc_uint8_t *)out);
}

int mt_tok_char_byte(int32_t c) {
  if (c < 256) return c >= 0 && stands_for_itself(c) ? c : -1;
  int32_t rank = c - 256;
  for (int b = 0; b < 256; b++) {
    if (!stands_for_itself(b) && rank-- == 0) return b;
  }
  return -1;
}

/* Next match at or behind `from`; false when there is none. */
static bool next_match(const struct stage *s, pcre2_match_data *m, const char *text, size_t size,
                       size_t from, size_t *begin, size_t *end) {
  while (from <= size) {
    int n = pcre2_match(s->regex, (PCRE2_SPTR)text, size, from, PCRE2_NO_UTF_CHECK, m, NULL);
    if (n < 0) return false;
    const PCRE2_SIZE *o = pcre2_get_ovector_pointer(m);
    *begin = o[0];
    *end = o[1];
    if (*end > *begin) return true;
    from = *end + 1; /* an empty match cuts nothing; step to the next character */
    while (from < size && ((uint8_t)text[from] & 0xc0) == 0x80) from++;
  }
  return false;
}

mt_err mt_tok_replace(const struct stage *s, const char *text, size_t size, struct mt_text *out) {
  pcre2_match_data *m = pcre2_match_data_create(1, NULL);
  if (!m) return mt_fail(MT_ENOMEM, "pattern matching");
  size_t at = 0, begin, end;
  mt_err err = MT_OK;
  while (!err && next_match(s, m, text, size, at, &begin, &end)) {
    err = mt_text_append(out, text + at, begin - at);
    if (!err) err = mt_text_append(out, s->b, strlen(s->b));
    at = end;
  }
  if (!err) err = mt_text_append(out, text + at, size - at);
  pcre2_match_data_free(m);
  return err;
}

static bool is_space(int32_t c) {
  utf8proc_category_t k = utf8proc_category(c);
  return k == UTF8PROC_CATEGORY_ZS || k == UTF8PROC_CATEGORY_ZL || k == UTF8PROC_CATEGORY_ZP ||
         (c >= 9 && c <= 13) || c == 0x85;
}

static bool is_word(int32_t c) {
  utf8proc_category_t k = utf8proc_category(c);
  return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO) ||
         (k >= UTF8PROC_CATEGORY_MN && k <= UTF8PROC_CATEGORY_NO) || k == UTF8PROC_CATEGORY_PC;
}

/* The character that begins at, or ends before, an offset; -1 at the text's ends. */
static int32_t char_at(const char *text, size_t size, size_t at, size_t *bytes) {
  int32_t c = -1;
  *bytes = 0;
  if (at < size) {
    *bytes = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at,
                                      (utf8proc_ssize_t)(size - at), &c);
  }
  return c;
}

static int32_t char_before(const char *text, size_t at, size_t *bytes) {
  size_t begin = at;
  *bytes = 0;
  if (at == 0) return -1;
  do begin--;
  while (begin > 0 && ((uint8_t)text[begin] & 0xc0) == 0x80);
  *bytes = at - begin;
  size_t n;
  return char_at(text, at, begin, &n);
}

/* Trims white space: [*begin, *end) of text. */
static void trim(const char *text, bool left, bool right, size_t *begin, size_t *end) {
  size_t n;
  while (left && *begin < *end && is_space(char_at(text, *end, *begin, &n))) *begin += n;
  while (right && *end > *begin && is_space(char_before(text, *end, &n))) *end -= n;
}

static mt_err apply_unicode(const struct stage *s, const char *text, size_t size,
                            struct mt_text *out) {
  bool ascii = true;
  for (size_t i = 0; i < size; i++) ascii &= (uint8_t)text[i] < 0x80;
  if (ascii) return mt_text_append(out, text, size); /* every form leaves ASCII alone */
  utf8proc_uint8_t *mapped = NULL;
  utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)size, &mapped,
                                    (utf8proc_option_t)s->options);
  if (n < 0) return mt_fail(MT_EFORMAT, "Unicode normalization: %s", utf8proc_errmsg(n));
  mt_err err = mt_text_append(out, (const char *)mapped, (size_t)n);
  free(mapped);
  return err;
}

/* e->normal (=) = the normalizer's stages on text. */
static mt_err normalize(struct mt_encoder *e, const char *text, size_t size, bool first) {
  e->normal.size = 0;
  MT_TRY(mt_text_append(&e->normal, text, size));
  for (int i = 0; i < e->t->normalizer.count; i++) {
    const struct stage *s = &e->t->normalizer.at[i];
    size_t begin = 0, end = e->normal.size;
    e->spare.size = 0;
    switch (s->kind) {
    case STAGE_PREPEND:
      if (end > 0 && first) MT_TRY(mt_text_append(&e->spare, s->a, strlen(s->a)));
      MT_TRY(mt_text_append(&e->spare, e->normal.text, end));
      break;
    case STAGE_REPLACE:
      MT_TRY(mt_tok_replace(s, e->normal.text, end, &e->spare));
      break;
    case STAGE_UNICODE:
      MT_TRY(apply_unicode(s, e->normal.text, end, &e->spare));
      break;
    default:
      trim(e->normal.text, s->left, s->right, &begin, &end);
      MT_TRY(mt_text_append(&e->spare, e->normal.text + begin, end - begin));
    }
    struct mt_text swap = e->normal;
    e->normal = e->spare;
    e->spare = swap;
  }
  return MT_OK;
}

/* Adds a piece to list `to`. */
static mt_err add_piece(struct mt_encoder *e, int to, const char *text, size_t size) {
  if (size == 0) return MT_OK;
  if (e->cut_count[to] == e->cut_capacity[to]) {
    size_t capacity = e->cut_capacity[to] * 2 + 64;
    size_t *grown = realloc(e->cut[to], capacity * sizeof *grown);
    if (!grown) return mt_fail(MT_ENOMEM, "%zu words", capacity);
    e->cut[to] = grown;
    e->cut_capacity[to] = capacity;
  }
  MT_TRY(mt_text_append(&e->pieces[to], text, size));
  e->cut[to][e->cut_count[to]++] = e->pieces[to].size;
  return MT_OK;
}

/* Cuts text at the matches of a pattern (matches and gaps change roles when inverted). */
static mt_err split(struct mt_encoder *e, int to, const struct stage *s, const char *text,
                    size_t size) {
  size_t at = 0, held = 0; /* [held, at) waits for what follows it */
  bool waiting_match = false;
  while (at < size) {
    size_t begin, end;
    if (!next_match(s, e->match, text, size, at, &begin, &end)) begin = end = size;
    for (int part = 0; part < 2; part++) { /* the gap before the match, then the match */
      size_t from = part ? begin : at, till = part ? end : begin;
      bool match = (part == 1) != s->invert;
      if (from == till) continue;
      switch (s->behaviour) {
      case ISOLATED:
        MT_TRY(add_piece(e, to, text + from, till - from));
        held = till;
        break;
      case REMOVED:
        if (!match) MT_TRY(add_piece(e, to, text + from, till - from));
        held = till;
        break;
      case MERGED_WITH_PREVIOUS: /* a match ends the piece that it follows */
        if (match) {
          MT_TRY(add_piece(e, to, text + held, till - held));
          held = till;
        } else {
          MT_TRY(add_piece(e, to, text + held, from - held));
          held = from;
        }
        break;
      case MERGED_WITH_NEXT: /* a match begins a piece */
        if (match) {
          MT_TRY(add_piece(e, to, text + held, from - held));
          held = from;
        }
        break;
      case CONTIGUOUS: /* neighbours of one kind stay together */
        if (match != waiting_match) {
          MT_TRY(add_piece(e, to, text + held, from - held));
          held = from;
        }
        waiting_match = match;
        break;
      }
    }
    at = end;
  }
  return add_piece(e, to, text + held, size - held);
}

static mt_err byte_level(struct mt_encoder *e, int to, const struct stage *s, const char *text,
                         size_t size, bool first) {
  struct mt_text *b = &e->bytes;
  b->size = 0;
  if (s->left && first && size > 0 && text[0] != ' ') MT_TRY(mt_text_append(b, " ", 1));
  MT_TRY(mt_text_append(b, text, size));
  size_t at = 0;
  while (at < b->size) {
    size_t begin = at, end = b->size, stop;
    if (s->regex && next_match(s, e->match, b->text, b->size, at, &begin, &end) && begin > at) {
      end = begin; /* a gap is a piece too */
    }
    stop = s->regex ? end : b->size;
    e->spare.size = 0;
    for (size_t i = at; i < stop; i++) {
      char c[4];
      size_t n;
      mt_tok_byte_char((uint8_t)b->text[i], c, &n);
      MT_TRY(mt_text_append(&e->spare, c, n));
    }
    MT_TRY(add_piece(e, to, e->spare.text, e->spare.size));
    at = stop;
  }
  return MT_OK;
}

static mt_err metaspace(struct mt_encoder *e, int to, const struct stage *s, const char *text,
                        size_t size, bool first_in_text, bool first) {
  struct mt_text *b = &e->bytes;
  size_t mark = strlen(s->a);
  b->size = 0;
  bool prepend = s->scheme == PREPEND_ALWAYS || (s->scheme == PREPEND_FIRST && first_in_text);
  bool marked = size > 0 && (text[0] == ' ' || (size >= mark && memcmp(text, s->a, mark) == 0));
  if (prepend && first && !marked) MT_TRY(mt_text_append(b, s->a, mark));
  for (size_t i = 0; i < size; i++) {
    if (text[i] == ' ')
      MT_TRY(mt_text_append(b, s->a, mark));
    else
      MT_TRY(mt_text_append(b, text + i, 1));
  }
  size_t begin = 0;
  for (size_t i = 1; s->left && i + mark <= b->size; i++) {
    if (memcmp(b->text + i, s->a, mark) != 0) continue;
    MT_TRY(add_piece(e, to, b->text + begin, i - begin));
    begin = i;
  }
  return add_piece(e, to, b->text + begin, b->size - begin);
}

/* One normalized stretch without added tokens -> ids. `first`: nothing was encoded before it. */
static mt_err encode_stretch(struct mt_encoder *e, const char *text, size_t size,
                             bool first_in_text, bool first, struct mt_ids *out) {
  const struct mt_tokenizer *t = e->t;
  int from = 0;
  e->pieces[0].size = e->cut_count[0] = 0;
  MT_TRY(add_piece(e, 0, text, size));
  for (int i = 0; i < t->pre.count; i++) {
    const struct stage *s = &t->pre.at[i];
    int to = !from;
    e->pieces[to].size = e->cut_count[to] = 0;
    for (size_t p = 0, at = 0; p < e->cut_count[from]; at = e->cut[from][p++]) {
      const char *piece = e->pieces[from].text + at;
      size_t n = e->cut[from][p] - at;
      bool lead = first_in_text && at == 0;
      if (s->kind == STAGE_SPLIT)
        MT_TRY(split(e, to, s, piece, n));
      else if (s->kind == STAGE_BYTE_LEVEL)
        MT_TRY(byte_level(e, to, s, piece, n, first));
      else
        MT_TRY(metaspace(e, to, s, piece, n, lead, first));
    }
    from = to;
  }
  for (size_t p = 0, at = 0; p < e->cut_count[from]; at = e->cut[from][p++]) {
    const char *piece = e->pieces[from].text + at;
    size_t n = e->cut[from][p] - at, begin = 0;
    /* Words apart where no merge crosses from a character into a space mark: same ids, and the
     * cache serves. */
    for (size_t i = 1; t->split_at_space_mark && i + 3 <= n; i++) {
      if (memcmp(piece + i, "\xe2\x96\x81", 3) != 0) continue;
      if (i >= 3 && memcmp(piece + i - 3, "\xe2\x96\x81", 3) == 0) continue;
      MT_TRY(mt_tok_bpe(e, piece + begin, i - begin, out));
      begin = i;
    }
    MT_TRY(mt_tok_bpe(e, piece + begin, n - begin, out));
  }
  return MT_OK;
}

/* The longest added token that begins at `at`, widened over white space as its flags say. */
static const struct added_token *added_at(const struct mt_tokenizer *t, const char *text,
                                          size_t size, size_t at, bool normalized, int flags) {
  const struct added_token *best = NULL;
  for (int i = 0; i < t->added_count; i++) {
    const struct added_token *a = &t->added[i];
    if (a->normalized != normalized || a->size > size - at || (best && a->size <= best->size)) {
      continue;
    }
    if (a->special && !(flags & MT_ENCODE_PARSE_SPECIAL)) continue;
    if (memcmp(a->text, text + at, a->size) != 0) continue;
    best = a;
  }
  if (best && best->single_word) {
    size_t n;
    int32_t left = char_before(text, at, &n), right = char_at(text, size, at + best->size, &n);
    if ((left >= 0 && is_word(left)) || (right >= 0 && is_word(right))) return NULL;
  }
  return best;
}

static bool may_begin(const struct mt_tokenizer *t, bool normalized, bool first_byte[256]) {
  bool any = false;
  memset(first_byte, 0, 256);
  for (int i = 0; i < t->added_count; i++) {
    if (t->added[i].normalized != normalized) continue;
    first_byte[(uint8_t)t->added[i].text[0]] = any = true;
  }
  return any;
}

/* Cuts added tokens of one kind out of text; stretches between them go on to `rest`. */
static mt_err cut_added(struct mt_encoder *e, const char *text, size_t size, size_t origin,
                        bool normalized, int flags, struct mt_ids *out,
                        mt_err (*rest)(struct mt_encoder *, const char *, size_t, size_t, int,
                                       struct mt_ids *)) {
  bool first_byte[256];
  size_t begin = 0;
  bool any = may_begin(e->t, normalized, first_byte);
  for (size_t at = 0; any && at < size;) {
    const struct added_token *a = NULL;
    if (first_byte[(uint8_t)text[at]]) a = added_at(e->t, text, size, at, normalized, flags);
    if (!a) {
      at++;
      continue;
    }
    size_t from = at, till = at + a->size, n;
    while (a->lstrip && from > begin && is_space(char_before(text, from, &n))) from -= n;
    while (a->rstrip && till < size && is_space(char_at(text, size, till, &n))) till += n;
    if (from > begin) MT_TRY(rest(e, text + begin, from - begin, origin + begin, flags, out));
    MT_TRY(mt_ids_append(out, a->id));
    flags &= ~MT_ENCODE_CONTINUE;
    at = begin = till;
  }
  return size > begin ? rest(e, text + begin, size - begin, origin + begin, flags, out) : MT_OK;
}

static mt_err plain(struct mt_encoder *e, const char *text, size_t size, size_t origin, int flags,
                    struct mt_ids *out) {
  bool first = !(flags & MT_ENCODE_CONTINUE);
  return encode_stretch(e, text, size, origin == 0 && first, first, out);
}

static mt_err raw(struct mt_encoder *e, const char *text, size_t size, size_t origin, int flags,
                  struct mt_ids *out) {
  MT_TRY(normalize(e, text, size, !(flags & MT_ENCODE_CONTINUE)));
  bool none[256];
  if (!may_begin(e->t, true, none)) {
    return plain(e, e->normal.text, e->normal.size, origin, flags, out);
  }
  /* The stretches reuse e->spare and e->bytes only, so e->normal stays. */
  return cut_added(e, e->normal.text, e->normal.size, origin, true, flags, out, plain);
}

static mt_err check_utf8(const char *text, size_t size) {
  for (size_t at = 0; at < size;) {
    int32_t c;
    utf8proc_ssize_t n = 1;
    if ((uint8_t)text[at] >= 0x80) {
      n = utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(size - at), &c);
    }
    if (n <= 0) return mt_fail(MT_EFORMAT, "byte %zu of the text is no UTF-8", at);
    at += (size_t)n;
  }
  return MT_OK;
}

mt_err mt_encode(struct mt_encoder *e, const char *text, size_t size_bytes, int flags,
                 struct mt_ids *out) {
  const struct mt_tokenizer *t = e->t;
  MT_TRY(check_utf8(text, size_bytes));
  for (int i = 0; (flags & MT_ENCODE_ADD_SPECIAL) && i < t->prefix_count; i++) {
    MT_TRY(mt_ids_append(out, t->prefix[i]));
  }
  size_t origin = flags & MT_ENCODE_INSIDE ? 1 : 0; /* only whether it is 0 counts */
  MT_TRY(cut_added(e, text, size_bytes, origin, false, flags, out, raw));
  for (int i = 0; (flags & MT_ENCODE_ADD_SPECIAL) && i < t->suffix_count; i++) {
    MT_TRY(mt_ids_append(out, t->suffix[i]));
  }
  return MT_OK;
}
