/* Any bytes as tokenizer_config.json and as chat_template.jinja: refused, or a template that the
 * program has. Nothing of it is ever run. */
#include "data/template.h"
#include "fuzz/files.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void detect(void) {
  const struct mt_template *found = NULL, *known;
  if (mt_template_detect(fuzz_dir, &found)) return;
  if (!found || mt_template_find(mt_template_name(found), &known) || known != found)
    __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz_file("tokenizer_config.json", data, size);
  detect();
  fuzz_file("chat_template.jinja", data, size);
  detect();
  unlink(fuzz_path("chat_template.jinja"));
  return 0;
}
