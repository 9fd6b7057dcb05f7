/* Any bytes as a file of tokens: refused, or every sample lies within it and has ids that the
 * vocabulary has. The checksums are made right first, or nothing behind them would be reached. */
#include "data/tokens.h"
#include "fuzz/files.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { VOCAB = 300 };

/* As in data/tokens.c. */
struct header {
  char magic[8];
  uint32_t version, order;
  struct mt_hash key;
  struct mt_dataset_stats stats;
  uint64_t block_count, directory_at;
  struct mt_hash directory, own;
};

static void mend(uint8_t *file, size_t size) {
  struct header h;
  if (size < sizeof h) return;
  memcpy(&h, file, sizeof h);
  memcpy(h.magic, "MTTOKENS", 8);
  h.version = MT_TOKENS_VERSION;
  h.order = 0x01020304;
  h.key = (struct mt_hash){0};
  if (h.directory_at <= size && h.block_count <= (size - h.directory_at) / 48) {
    uint8_t *directory = file + h.directory_at;
    for (uint64_t i = 0; i < h.block_count; i++) {
      struct mt_tokens_block b;
      memcpy(&b, directory + i * sizeof b, sizeof b);
      size_t head = b.samples * sizeof(struct mt_tokens_record);
      if (b.at > size || b.size_bytes > size - b.at || b.samples > size || head > b.size_bytes)
        continue;
      struct mt_hash parts[2] = {mt_hash_bytes(file + b.at, head),
                                 mt_hash_bytes(file + b.at + head, b.size_bytes - head)};
      b.hash = mt_hash_bytes(parts, sizeof parts);
      memcpy(directory + i * sizeof b, &b, sizeof b);
    }
    h.directory = mt_hash_bytes(directory, h.block_count * sizeof(struct mt_tokens_block));
  }
  h.own = mt_hash_bytes(&h, offsetof(struct header, own));
  memcpy(file, &h, sizeof h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct mt_tokens t;
  uint8_t *copy = malloc(size + 1);
  if (!copy) abort();
  memcpy(copy, data, size);
  mend(copy, size);
  const char *path = fuzz_file("data.tokens", copy, size);
  free(copy);
  if (mt_tokens_open(&t, path, (struct mt_hash){0}, VOCAB, 1)) return 0;
  volatile uint8_t sum = 0;
  for (int64_t i = 0; i < t.stats.samples; i++) {
    const uint8_t *block;
    const struct mt_tokens_record *r = mt_tokens_find(&t, i, &block);
    const int32_t *id = (const int32_t *)(block + r->at);
    for (int32_t k = 0; k < r->count; k++) {
      if (id[k] < 0 || id[k] >= VOCAB) __builtin_trap();
      sum = (uint8_t)(sum + ((const uint8_t *)(id + r->count))[k]);
    }
  }
  mt_tokens_close(&t);
  return 0;
}
