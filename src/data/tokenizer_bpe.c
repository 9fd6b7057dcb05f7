/* Byte-pair encoding of one word: symbols in a linked list, candidate merges in a heap ordered by
 * (rank, position), so that a word of n characters takes O(n log n). Short words come from a cache
 * the second time. */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "data/tokenizer_impl.h"

enum { CACHE_SLOTS = 1 << 16, CACHE_WORD = 64, CACHE_POOL = 8 << 20 };

static const struct merge_slot *find_merge(const struct mt_tokenizer *t, int32_t a, int32_t b) {
  if (a < 0 || b < 0) return NULL;
  uint64_t key = (uint64_t)(uint32_t)a << 32 | (uint32_t)b;
  for (size_t i = XXH3_64bits(&key, sizeof key);; i++) {
    const struct merge_slot *m = &t->merge[i & t->merge_mask];
    if (m->key == key) return m;
    if (m->key == EMPTY_KEY) return NULL;
  }
}

static bool before(const struct candidate *a, const struct candidate *b) {
  return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static void push(struct mt_encoder *e, struct candidate c) {
  size_t i = e->heap_count++;
  for (; i > 0 && before(&c, &e->heap[(i - 1) / 2]); i = (i - 1) / 2) {
    e->heap[i] = e->heap[(i - 1) / 2];
  }
  e->heap[i] = c;
}

static struct candidate pop(struct mt_encoder *e) {
  struct candidate top = e->heap[0], last = e->heap[--e->heap_count];
  size_t i = 0;
  for (;;) {
    size_t child = 2 * i + 1;
    if (child >= e->heap_count) break;
    if (child + 1 < e->heap_count && before(&e->heap[child + 1], &e->heap[child])) child++;
    if (!before(&e->heap[child], &last)) break;
    e->heap[i] = e->heap[child];
    i = child;
  }
  if (e->heap_count > 0) e->heap[i] = last;
  return top;
}

static void consider(struct mt_encoder *e, int32_t left) {
  const struct symbol *a = &e->symbol[left];
  if (a->next < 0) return;
  const struct merge_slot *m = find_merge(e->t, a->id, e->symbol[a->next].id);
  if (m) push(e, (struct candidate){m->rank, left, m->id, a->id, e->symbol[a->next].id});
}

static size_t char_bytes(uint8_t lead) {
  return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

/* First symbols: characters, their bytes where a character is unknown, or unk. Returns how many;
 * there is room for one a byte. */
static int32_t first_symbols(struct mt_encoder *e, const char *word, size_t size) {
  const struct mt_tokenizer *t = e->t;
  int32_t n = 0;
  bool last_unk = false;
  for (size_t at = 0; at < size;) {
    size_t bytes = char_bytes((uint8_t)word[at]);
    if (bytes > size - at) bytes = size - at;
    int32_t id = mt_tok_find(t, word + at, bytes);
    bool fallback = id < 0 && t->byte_fallback;
    for (size_t i = 0; fallback && i < bytes; i++)
      fallback = t->byte_id[(uint8_t)word[at + i]] >= 0;
    if (fallback) {
      for (size_t i = 0; i < bytes; i++) {
        e->symbol[n++] = (struct symbol){.id = t->byte_id[(uint8_t)word[at + i]], .size = 1};
      }
    } else if (id >= 0) {
      e->symbol[n++] = (struct symbol){.id = id, .size = (uint32_t)bytes};
    } else if (t->unk >= 0 && !(t->fuse_unk && last_unk)) {
      e->symbol[n++] = (struct symbol){.id = t->unk, .size = (uint32_t)bytes};
    }
    last_unk = id < 0 && !fallback;
    at += bytes;
  }
  for (int32_t i = 0; i < n; i++) {
    e->symbol[i].prev = i - 1;
    e->symbol[i].next = i + 1 < n ? i + 1 : -1;
  }
  return n;
}

static mt_err reserve(struct mt_encoder *e, size_t size) {
  if (size > INT32_MAX / 4) return mt_fail(MT_EUNSUPPORTED, "a word of %zu bytes", size);
  if (size > e->symbol_capacity) {
    void *grown = realloc(e->symbol, size * 2 * sizeof *e->symbol);
    if (!grown) return mt_fail(MT_ENOMEM, "encoding a word of %zu bytes", size);
    e->symbol = grown;
    e->symbol_capacity = size * 2;
  }
  /* A merge takes one symbol away and adds at most two candidates. */
  if (3 * size > e->heap_capacity) {
    void *grown = realloc(e->heap, 6 * size * sizeof *e->heap);
    if (!grown) return mt_fail(MT_ENOMEM, "encoding a word of %zu bytes", size);
    e->heap = grown;
    e->heap_capacity = 6 * size;
  }
  return MT_OK;
}

static mt_err merge_word(struct mt_encoder *e, const char *word, size_t size, struct mt_ids *out) {
  const struct mt_tokenizer *t = e->t;
  if (t->ignore_merges) {
    int32_t id = mt_tok_find(t, word, size);
    if (id >= 0) return mt_ids_append(out, id);
  }
  MT_TRY(reserve(e, size));
  int32_t n = first_symbols(e, word, size);
  e->heap_count = 0;
  for (int32_t i = 0; i < n; i++) consider(e, i);
  while (e->heap_count > 0) {
    struct candidate c = pop(e);
    struct symbol *a = &e->symbol[c.left];
    /* Stale when either side has merged meanwhile. */
    if (a->size == 0 || a->id != c.left_id || a->next < 0) continue;
    struct symbol *b = &e->symbol[a->next];
    if (b->id != c.right_id) continue;
    a->id = c.id;
    a->size += b->size;
    b->size = 0;
    a->next = b->next;
    if (a->next >= 0) e->symbol[a->next].prev = c.left;
    if (a->prev >= 0) consider(e, a->prev);
    consider(e, c.left);
  }
  for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = e->symbol[i].next) {
    MT_TRY(mt_ids_append(out, e->symbol[i].id));
  }
  return MT_OK;
}

mt_err mt_tok_bpe(struct mt_encoder *e, const char *word, size_t size, struct mt_ids *out) {
  if (size == 0) return MT_OK;
  if (size > CACHE_WORD) return merge_word(e, word, size, out);
  uint64_t hash = XXH3_64bits(word, size);
  struct cache_slot *c = &e->cache[hash & (CACHE_SLOTS - 1)];
  if (c->hash == hash && c->size == size && memcmp(e->cache_text.text + c->text, word, size) == 0) {
    for (uint32_t i = 0; i < c->count; i++) MT_TRY(mt_ids_append(out, e->cache_ids.id[c->ids + i]));
    return MT_OK;
  }
  size_t begin = out->count;
  MT_TRY(merge_word(e, word, size, out));
  if (e->cache_text.size > CACHE_POOL) { /* full: begin anew */
    memset(e->cache, 0, CACHE_SLOTS * sizeof *e->cache);
    e->cache_text.size = e->cache_ids.count = 0;
  }
  *c = (struct cache_slot){.hash = hash,
                           .text = (uint32_t)e->cache_text.size,
                           .size = (uint32_t)size,
                           .ids = (uint32_t)e->cache_ids.count,
                           .count = (uint32_t)(out->count - begin)};
  MT_TRY(mt_text_append(&e->cache_text, word, size));
  for (size_t i = begin; i < out->count; i++) MT_TRY(mt_ids_append(&e->cache_ids, out->id[i]));
  return MT_OK;
}

mt_err mt_encoder_create(const struct mt_tokenizer *t, struct mt_encoder **out) {
  struct mt_encoder *e = calloc(1, sizeof *e);
  *out = NULL;
  if (e) {
    e->t = t;
    e->cache = calloc(CACHE_SLOTS, sizeof *e->cache);
    e->match = pcre2_match_data_create(1, NULL);
  }
  if (!e || !e->cache || !e->match) {
    mt_encoder_free(e);
    return mt_fail(MT_ENOMEM, "tokenizer scratch");
  }
  *out = e;
  return MT_OK;
}

void mt_encoder_free(struct mt_encoder *e) {
  if (!e) return;
  free(e->symbol);
  free(e->heap);
  free(e->normal.text);
  free(e->spare.text);
  free(e->bytes.text);
  for (int i = 0; i < 2; i++) {
    free(e->pieces[i].text);
    free(e->cut[i]);
  }
  free(e->cache);
  free(e->cache_text.text);
  free(e->cache_ids.id);
  pcre2_match_data_free(e->match);
  free(e);
}
