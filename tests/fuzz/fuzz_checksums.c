/* Any bytes as a checkpoint's list of checksums, as it is and with the list's own checksum made
 * right: refused, or every name it lists is a file of the directory. */
#include <jansson.h>

#include "base/hash.h"
#include "base/json.h"
#include "fuzz/files.h"
#include "io/checksums.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void verify(const void *text, size_t size) {
  bool listed;
  fuzz_file("a", "abc", 3);
  fuzz_file("moetune-checksums.json", text, size);
  if (mt_checksums_verify(fuzz_dir, &listed) || !listed) return;
  json_t *root = json_loadb(text, size, 0, NULL), *entry;
  const char *name;
  json_object_foreach(json_object_get(root, "files"), name, entry) {
    if (strchr(name, '/') || !mt_path_exists(fuzz_path(name))) __builtin_trap();
  }
  json_decref(root);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  char own[MT_HASH_TEXT];
  verify(data, size);
  json_t *root = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL);
  const json_t *files = json_object_get(root, "files");
  char *text = json_is_object(files) ? mt_json_text(files, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
  if (text) {
    mt_hash_text(mt_hash_bytes(text, strlen(text)), own);
    free(text);
    json_object_set_new(root, "list", json_string(own));
    text = mt_json_text(root, 0);
    if (text) verify(text, strlen(text));
    free(text);
  }
  json_decref(root);
  return 0;
}
