/* Any bytes as tokenizer.json: refused, or texts can be encoded and decoded with it. */
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const char text[] = " The caf\xc3\xa9 isn't  <s> 123\n\xf0\x9f\x98\x80 aaaaaaaaaaaa";
  struct mt_tokenizer *t;
  struct mt_encoder *e;
  if (mt_tokenizer_parse((const char *)data, size, "fuzz", &t)) return 0;
  if (mt_encoder_create(t, &e) == MT_OK) {
    struct mt_ids ids = {0};
    struct mt_text out = {0};
    for (int flags = 0; flags < 8; flags++) {
      ids.count = out.size = 0;
      if (mt_encode(e, text, strlen(text), flags, &ids)) break;
      for (size_t i = 0; i < ids.count; i++) {
        if (ids.id[i] < 0 || ids.id[i] >= mt_tokenizer_vocab(t)) __builtin_trap();
      }
      if (mt_decode(t, ids.id, ids.count, flags & 1, &out)) break;
    }
    free(ids.id);
    free(out.text);
  }
  mt_encoder_free(e);
  mt_tokenizer_free(t);
  return 0;
}
