/* Hugging Face tokenizer.json, read and run by ourselves: byte-pair encoding with byte fallback
 * (Llama, Mixtral) and byte-level (GPT-2, Qwen, OLMoE, DeepSeek), their normalizers,
 * pre-tokenizers, added tokens, post-processors and decoders. What the file asks for and we do not
 * have is an error that names it: ids are the official library's or none. */
#ifndef MT_DATA_TOKENIZER_H
#define MT_DATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/hash.h"

struct mt_tokenizer; /* immutable once loaded: shared by threads */
struct mt_encoder;   /* scratch and word cache of one thread */

/* Growable results; zero to begin, reused by the caller, freed with free(.id / .text). */
struct mt_ids {
  int32_t *id;
  size_t count, capacity;
};
struct mt_text {
  char *text; /* not terminated */
  size_t size, capacity;
};

/* Errors: MT_ENOENT, MT_EFORMAT, MT_EUNSUPPORTED naming the file, the key and the type. */
mt_err mt_tokenizer_load(const char *path, struct mt_tokenizer **out);
/* The same on memory; name is for messages. */
mt_err mt_tokenizer_parse(const char *json, size_t size_bytes, const char *name,
                          struct mt_tokenizer **out);
void mt_tokenizer_free(struct mt_tokenizer *t);

/* Of the file's content. */
struct mt_hash mt_tokenizer_hash(const struct mt_tokenizer *t);
int mt_tokenizer_vocab(const struct mt_tokenizer *t); /* largest id + 1 */
/* -1 when there is none. */
int32_t mt_tokenizer_id(const struct mt_tokenizer *t, const char *token);
/* NULL when the id is unused; terminated. */
const char *mt_tokenizer_token(const struct mt_tokenizer *t, int32_t id);
bool mt_tokenizer_is_special(const struct mt_tokenizer *t, int32_t id);

struct mt_tokenizer_facts {
  int tokens, merges; /* ids in use; rules of the byte-pair encoding */
  int added, special; /* tokens beside the vocabulary; those of them that are special */
  bool byte_fallback, byte_level;
  const int32_t *prefix; /* what is put before a text, and behind it */
  const int32_t *suffix;
  int prefix_count, suffix_count;
  int32_t unknown; /* -1: none */
};
struct mt_tokenizer_facts mt_tokenizer_facts(const struct mt_tokenizer *t);

mt_err mt_encoder_create(const struct mt_tokenizer *t, struct mt_encoder **out);
void mt_encoder_free(struct mt_encoder *e);

enum {
  MT_ENCODE_ADD_SPECIAL = 1,   /* what the post-processor adds (BOS) */
  MT_ENCODE_PARSE_SPECIAL = 2, /* special tokens written in the text become themselves */
  MT_ENCODE_CONTINUE = 4,      /* the text follows another: nothing is put before its first word */
  MT_ENCODE_INSIDE = 8, /* the text follows an added token: not the first, but a new stretch */
};
/* Appends the ids of text (UTF-8) to out. Time is O(n log n) whatever the text.
 * Errors: MT_EFORMAT with the byte offset when the text is not UTF-8; MT_ENOMEM. */
mt_err mt_encode(struct mt_encoder *e, const char *text, size_t size_bytes, int flags,
                 struct mt_ids *out);

/* Is the id one of the file's added tokens (special or not)? They cut a text into stretches. */
bool mt_encoder_is_added(const struct mt_encoder *e, int32_t id);

/* Does the text spell a special token anywhere? */
bool mt_has_special(const struct mt_encoder *e, const char *text);

/* Appends the text of ids to out; bytes that are no UTF-8 become U+FFFD as the official library
 * does. skip_special leaves special tokens out. Unknown ids are left out. */
mt_err mt_decode(const struct mt_tokenizer *t, const int32_t *ids, size_t count, bool skip_special,
                 struct mt_text *out);

/* Text as it becomes certain while ids come one at a time. */
struct mt_decode_stream {
  struct mt_ids ids; /* since the last point where text was complete */
  struct mt_text before, now;
  size_t settled; /* ids whose text has been handed out */
};
/* Appends to out what the id makes certain (nothing while a character is incomplete). */
mt_err mt_decode_next(const struct mt_tokenizer *t, struct mt_decode_stream *s, int32_t id,
                      struct mt_text *out);
void mt_decode_stream_free(struct mt_decode_stream *s);

/* Appends bytes; MT_ENOMEM. */
mt_err mt_text_append(struct mt_text *t, const char *bytes, size_t size);
mt_err mt_ids_append(struct mt_ids *ids, int32_t id);

#endif
