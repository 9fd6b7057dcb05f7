/* ids -> text: each token's text goes through the decoder's stages, as a list of pieces. */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "data/tokenizer_impl.h"

/* Pieces of text, one a token to begin with. */
struct list {
  struct mt_text text;
  size_t *end;
  size_t count, capacity;
};

static mt_err add(struct list *l, const char *text, size_t size) {
  if (l->count == l->capacity) {
    size_t capacity = l->capacity * 2 + 64;
    size_t *grown = realloc(l->end, capacity * sizeof *grown);
    if (!grown) return mt_fail(MT_ENOMEM, "decoding %zu tokens", capacity);
    l->end = grown;
    l->capacity = capacity;
  }
  MT_TRY(mt_text_append(&l->text, text, size));
  l->end[l->count++] = l->text.size;
  return MT_OK;
}

static const char *piece(const struct list *l, size_t i, size_t *size) {
  size_t begin = i ? l->end[i - 1] : 0;
  *size = l->end[i] - begin;
  return l->text.text + begin;
}

/* Appends bytes with U+FFFD for each maximal part that is no UTF-8 (Unicode 15, section 3.9), as
 * Rust's from_utf8_lossy does. */
static mt_err append_lossy(struct mt_text *out, const char *bytes, size_t size) {
  const uint8_t *p = (const uint8_t *)bytes;
  for (size_t i = 0; i < size;) {
    int32_t c;
    utf8proc_ssize_t n = utf8proc_iterate(p + i, (utf8proc_ssize_t)(size - i), &c);
    if (n > 0) {
      MT_TRY(mt_text_append(out, bytes + i, (size_t)n));
      i += (size_t)n;
      continue;
    }
    uint8_t b = p[i++], lo = 0x80, hi = 0xbf;
    int more = b >= 0xc2 && b <= 0xdf   ? 1
               : b >= 0xe0 && b <= 0xef ? 2
               : b >= 0xf0 && b <= 0xf4 ? 3
                                        : 0;
    if (b == 0xe0) lo = 0xa0;
    if (b == 0xed) hi = 0x9f;
    if (b == 0xf0) lo = 0x90;
    if (b == 0xf4) hi = 0x8f;
    for (; more > 0 && i < size && p[i] >= lo && p[i] <= hi; more--, i++) lo = 0x80, hi = 0xbf;
    MT_TRY(mt_text_append(out, "\xef\xbf\xbd", 3));
  }
  return MT_OK;
}

static int byte_token(const char *text, size_t size) {
  if (size != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
  int value = 0;
  for (int i = 3; i < 5; i++) {
    const char *digits = "0123456789ABCDEF0123456789abcdef", *d = strchr(digits, text[i]);
    if (!d || !*d) return -1;
    value = value * 16 + (int)(d - digits) % 16;
  }
  return value;
}

/* A run of byte tokens becomes its text, or one U+FFFD a byte when it is no UTF-8. */
static mt_err flush_bytes(struct list *out, struct mt_text *run) {
  if (run->size == 0) return MT_OK;
  bool valid = true;
  for (size_t i = 0; valid && i < run->size;) {
    int32_t c;
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)run->text + i,
                                          (utf8proc_ssize_t)(run->size - i), &c);
    valid = n > 0;
    i += valid ? (size_t)n : 0;
  }
  mt_err err = MT_OK;
  if (valid) err = add(out, run->text, run->size);
  for (size_t i = 0; !valid && !err && i < run->size; i++) err = add(out, "\xef\xbf\xbd", 3);
  run->size = 0;
  return err;
}

static mt_err byte_fallback(const struct list *in, struct list *out) {
  struct mt_text run = {0};
  mt_err err = MT_OK;
  for (size_t i = 0; !err && i < in->count; i++) {
    size_t size;
    const char *text = piece(in, i, &size);
    int byte = byte_token(text, size);
    if (byte >= 0) {
      char c = (char)byte;
      err = mt_text_append(&run, &c, 1);
      continue;
    }
    err = flush_bytes(out, &run);
    if (!err) err = add(out, text, size);
  }
  if (!err) err = flush_bytes(out, &run);
  free(run.text);
  return err;
}

/* Characters of the byte alphabet become bytes; a token that holds another is kept as it is. */
static mt_err byte_level(const struct list *in, struct list *out) {
  struct mt_text bytes = {0}, text = {0};
  mt_err err = MT_OK;
  for (size_t i = 0; !err && i < in->count; i++) {
    size_t size, mark = bytes.size;
    const char *p = piece(in, i, &size);
    for (size_t at = 0; !err && at < size;) {
      int32_t c;
      utf8proc_ssize_t n =
          utf8proc_iterate((const utf8proc_uint8_t *)p + at, (utf8proc_ssize_t)(size - at), &c);
      int byte = n > 0 ? mt_tok_char_byte(c) : -1;
      if (byte < 0) {
        bytes.size = mark;
        err = mt_text_append(&bytes, p, size);
        break;
      }
      char b = (char)byte;
      err = mt_text_append(&bytes, &b, 1);
      at += (size_t)n;
    }
  }
  if (!err) err = append_lossy(&text, bytes.text, bytes.size);
  if (!err) err = add(out, text.text, text.size);
  free(bytes.text);
  free(text.text);
  return err;
}

static void strip_piece(const struct stage *s, const char **text, size_t *size) {
  size_t n = strlen(s->a);
  if (n == 0) return;
  for (int i = 0; i < s->left && *size >= n && memcmp(*text, s->a, n) == 0; i++) {
    *text += n;
    *size -= n;
  }
  for (int i = 0; i < s->right && *size >= n && memcmp(*text + *size - n, s->a, n) == 0; i++) {
    *size -= n;
  }
}

/* Space marks become spaces; the one that was put in front goes. */
static mt_err metaspace_piece(const struct stage *s, size_t index, const char *text, size_t size,
                              struct mt_text *out) {
  size_t mark = strlen(s->a), at = 0;
  while (at < size) {
    if (mark > 0 && size - at >= mark && memcmp(text + at, s->a, mark) == 0) {
      bool prepended = index == 0 && at == 0 && s->scheme != PREPEND_NEVER;
      if (!prepended) MT_TRY(mt_text_append(out, " ", 1));
      at += mark;
    } else {
      MT_TRY(mt_text_append(out, text + at++, 1));
    }
  }
  return MT_OK;
}

static mt_err each_piece(const struct stage *s, const struct list *in, struct list *out) {
  struct mt_text now = {0};
  mt_err err = MT_OK;
  for (size_t i = 0; !err && i < in->count; i++) {
    size_t size;
    const char *text = piece(in, i, &size);
    now.size = 0;
    switch (s->kind) {
    case STAGE_REPLACE:
      err = mt_tok_replace(s, text, size, &now);
      break;
    case STAGE_METASPACE:
      err = metaspace_piece(s, i, text, size, &now);
      break;
    default:
      strip_piece(s, &text, &size);
      err = mt_text_append(&now, text, size);
    }
    if (!err) err = add(out, now.text, now.size);
  }
  free(now.text);
  return err;
}

mt_err mt_decode(const struct mt_tokenizer *t, const int32_t *ids, size_t count, bool skip_special,
                 struct mt_text *out) {
  struct list in = {0}, next = {0};
  mt_err err = MT_OK;
  for (size_t i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= t->vocab || !t->token[ids[i]].text) continue;
    if (skip_special && t->token[ids[i]].special) continue;
    MT_GO(add(&in, t->token[ids[i]].text, t->token[ids[i]].size));
  }
  for (int i = 0; i < t->decoder.count; i++) {
    const struct stage *s = &t->decoder.at[i];
    next.text.size = next.count = 0;
    if (s->kind == STAGE_BYTE_FALLBACK)
      MT_GO(byte_fallback(&in, &next));
    else if (s->kind == STAGE_BYTE_LEVEL)
      MT_GO(byte_level(&in, &next));
    else if (s->kind == STAGE_FUSE)
      MT_GO(add(&next, in.text.text, in.text.size));
    else
      MT_GO(each_piece(s, &in, &next));
    struct list swap = in;
    in = next;
    next = swap;
  }
  if (t->decoder.count == 0) { /* the official library then puts spaces between tokens */
    for (size_t i = 0; i < in.count; i++) {
      size_t size;
      const char *text = piece(&in, i, &size);
      if (i > 0) MT_GO(mt_text_append(out, " ", 1));
      MT_GO(mt_text_append(out, text, size));
    }
  } else {
    MT_GO(mt_text_append(out, in.text.text, in.text.size));
  }
done:
  free(in.text.text);
  free(in.end);
  free(next.text.text);
  free(next.end);
  return err;
}

static bool incomplete(const struct mt_text *t) {
  return t->size >= 3 && memcmp(t->text + t->size - 3, "\xef\xbf\xbd", 3) == 0;
}

mt_err mt_decode_next(const struct mt_tokenizer *t, struct mt_decode_stream *s, int32_t id,
                      struct mt_text *out) {
  s->before.size = s->now.size = 0;
  MT_TRY(mt_decode(t, s->ids.id, s->settled, true, &s->before));
  MT_TRY(mt_ids_append(&s->ids, id));
  MT_TRY(mt_decode(t, s->ids.id, s->ids.count, true, &s->now));
  if (s->now.size <= s->before.size || incomplete(&s->now)) return MT_OK;
  MT_TRY(mt_text_append(out, s->now.text + s->before.size, s->now.size - s->before.size));
  /* The settled ids stay as context (a leading space depends on it), older ones go. */
  size_t drop = s->settled;
  memmove(s->ids.id, s->ids.id + drop, (s->ids.count - drop) * sizeof *s->ids.id);
  s->ids.count -= drop;
  s->settled = s->ids.count;
  return MT_OK;
}

void mt_decode_stream_free(struct mt_decode_stream *s) {
  free(s->ids.id);
  free(s->before.text);
  free(s->now.text);
  *s = (struct mt_decode_stream){0};
}
