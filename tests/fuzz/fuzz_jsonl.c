/* Any bytes as a data file: refused with a line, or every sample can be packed. */
#include "data/dataset.h"
#include "fuzz/files.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A byte-level alphabet and nothing else: every text encodes. */
static struct mt_tokenizer *small_tokenizer(void) {
  static struct mt_tokenizer *t;
  char json[16384];
  size_t used = (size_t)snprintf(json, sizeof json,
                                 "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,"
                                 "\"merges\":[],\"vocab\":{\"<s>\":0");
  if (t) return t;
  for (int b = 0; b < 256; b++) {
    used +=
        (size_t)snprintf(json + used, sizeof json - used, ",\"<0x%02X>\":%d", (unsigned)b, b + 1);
  }
  used += (size_t)snprintf(json + used, sizeof json - used, "}}}");
  if (mt_tokenizer_parse(json, used, "fuzz", &t)) abort();
  return t;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const struct mt_template *chat;
  struct mt_dataset *d = NULL;
  struct mt_batch b;
  const char *path = fuzz_path("data.jsonl");
  fuzz_file("data.jsonl", data, size);
  static const char *const names[] = {"mistral", "mixtral-8x22b", "qwen3", "tulu", "deepseek"};
  if (mt_template_find(names[size % 5], &chat)) abort();
  struct mt_dataset_options o = {.path = path,
                                 .chat = chat,
                                 .max_seq_length = 32,
                                 .eos_id = 0,
                                 .skip_bad_lines = size % 3 == 0,
                                 .threads =
                                     1 + size % 7 / 6}; /* one a core costs more than it finds */
  if (mt_dataset_open(small_tokenizer(), &o, &d) == MT_OK && mt_dataset_wait(d) == MT_OK) {
    if (mt_batch_create(&b, 32, 1)) abort();
    for (int64_t i = 0; i < mt_dataset_stats(d).samples; i++) {
      struct mt_sample s = mt_dataset_sample(d, i);
      mt_batch_begin(&b);
      if (mt_batch_add(&b, &s) || b.target_count < 1) __builtin_trap();
      mt_batch_finish(&b, 8);
    }
    mt_batch_destroy(&b);
  }
  mt_dataset_close(d);
  return 0;
}
