/* Any bytes as a safetensors file: refused, or every tensor readable to its last byte. */
#include "io/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct mt_st_file f = {0};
  if (mt_st_parse(data, size, "fuzz", &f)) return 0;
  volatile uint8_t sum = 0;
  for (size_t i = 0; i < f.count; i++) {
    const struct mt_st_tensor *t = &f.tensor[i];
    for (size_t k = 0; k < t->size_bytes; k++) sum = (uint8_t)(sum + t->data[k]);
    if (mt_st_find(&f, t->name) != t) __builtin_trap();
  }
  mt_st_close(&f);
  return 0;
}
