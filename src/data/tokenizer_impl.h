/* The tokenizer's inside, shared by its files. */
#ifndef MT_DATA_TOKENIZER_IMPL_H
#define MT_DATA_TOKENIZER_IMPL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "data/tokenizer.h"

/* A stage of the normalizer, the pre-tokenizer or the decoder. */
enum stage_kind {
  STAGE_PREPEND,    /* a: text put in front of what is not empty */
  STAGE_REPLACE,    /* regex or a -> b */
  STAGE_UNICODE,    /* options: utf8proc's, for NFC, NFD, NFKC, NFKD, lower case */
  STAGE_STRIP,      /* normalizer: left, right; decoder: a, left and right counts */
  STAGE_SPLIT,      /* regex, behaviour, invert */
  STAGE_BYTE_LEVEL, /* left: add_prefix_space */
  STAGE_METASPACE,  /* a: replacement, scheme, split in left */
  STAGE_BYTE_FALLBACK,
  STAGE_FUSE,
};

enum behaviour { ISOLATED, REMOVED, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, CONTIGUOUS };
enum scheme { PREPEND_ALWAYS, PREPEND_FIRST, PREPEND_NEVER };

struct stage {
  enum stage_kind kind;
  char *a, *b;
  pcre2_code *regex;
  int options, left, right;
  enum behaviour behaviour;
  enum scheme scheme;
  bool invert;
};

struct stages {
  struct stage *at;
  int count;
};

struct added_token {
  char *text;
  size_t size;
  int32_t id;
  bool single_word, lstrip, rstrip, normalized, special;
};

struct merge_slot {
  uint64_t key; /* left << 32 | right; EMPTY_KEY when free */
  int32_t rank, id;
};
#define EMPTY_KEY UINT64_MAX

struct token_entry {
  char *text; /* NULL: unused id */
  size_t size;
  bool special, added;
};

struct mt_tokenizer {
  struct mt_hash hash;       /* of the file */
  struct token_entry *token; /* by id */
  int vocab;
  int32_t *slot; /* open addressing over token texts; -1 free */
  size_t slot_mask;
  struct merge_slot *merge;
  size_t merge_mask;
  struct stages normalizer, pre, decoder;
  struct added_token *added;
  int added_count;
  int32_t *prefix, *suffix; /* what the post-processor adds */
  int prefix_count, suffix_count;
  int32_t byte_id[256]; /* of "<0xXX>"; -1 */
  int32_t unk;
  bool byte_fallback, fuse_unk, ignore_merges;
  bool split_at_space_mark; /* no merge crosses "x" + U+2581: words can be encoded apart */
};

/* Id of a text in the vocabulary, -1 when absent. */
int32_t mt_tok_find(const struct mt_tokenizer *t, const char *text, size_t size);

/* The byte-level alphabet: the character that stands for a byte, and back (-1: none). */
void mt_tok_byte_char(uint8_t byte, char out[3], size_t *size);
int mt_tok_char_byte(int32_t codepoint);

/* One normalizer or decoder replacement over text: out is appended to. */
mt_err mt_tok_replace(const struct stage *s, const char *text, size_t size, struct mt_text *out);

/* Byte-pair encoding of one word, appended to out. Scratch belongs to the encoder. */
mt_err mt_tok_bpe(struct mt_encoder *e, const char *word, size_t size, struct mt_ids *out);

struct symbol {
  int32_t id, prev, next;
  uint32_t size; /* bytes; 0 when merged away */
};
struct candidate {
  int32_t rank, left;
  int32_t id, left_id, right_id;
};
struct cache_slot {
  uint64_t hash;
  uint32_t text, size, ids, count; /* into the pools */
};

struct mt_encoder {
  const struct mt_tokenizer *t;
  struct symbol *symbol;
  size_t symbol_capacity;
  struct candidate *heap;
  size_t heap_count, heap_capacity;
  struct mt_text normal, spare, bytes;
  struct mt_text pieces[2]; /* texts of the pre-tokenizer's pieces, one stage's and the next's */
  size_t *cut[2];           /* where each piece ends in them */
  size_t cut_count[2], cut_capacity[2];
  struct cache_slot *cache;
  size_t cache_count;
  struct mt_text cache_text;
  struct mt_ids cache_ids;
  pcre2_match_data *match;
};

#endif
