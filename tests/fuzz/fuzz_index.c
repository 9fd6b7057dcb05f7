/* Any bytes as model.safetensors.index.json beside two shards: refused, or every shard is a file of
 * this directory. One lies above it, which must never be opened. */
#include "fuzz/files.h"
#include "hf/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void write_shard(const char *name, const char *tensor) {
  char file[256];
  int n = snprintf(file + 8, sizeof file - 8,
                   "{\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", tensor);
  for (int i = 0; i < 8; i++) file[i] = (char)((uint64_t)n >> (8 * i));
  memcpy(file + 8 + n, "\0\0\0", 4);
  fuzz_file(name, file, (size_t)n + 12);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct mt_hf_checkpoint h = {0};
  static bool made;
  if (!made) {
    write_shard("c", "c");
    snprintf(h.dir, sizeof h.dir, "%s", fuzz_path("d"));
    if (mt_dir_create(h.dir)) abort();
    write_shard("d/a", "a");
    write_shard("d/b", "b");
    made = true;
  }
  snprintf(h.dir, sizeof h.dir, "%s/d", fuzz_dir);
  fuzz_file("d/model.safetensors.index.json", data, size);
  if (mt_hf_open_shards(&h) == MT_OK) {
    for (int i = 0; i < h.shard_count; i++) {
      if (strchr(h.shard_name[i], '/') || mt_st_find(&h.shard[i], "c")) __builtin_trap();
    }
  }
  mt_hf_close(&h);
  return 0;
}
