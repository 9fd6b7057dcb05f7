/* Every cases.jsonl under $MOETUNE_GOLDEN_DIR (default: this folder), beside its tokenizer.json:
 * lines {"text", "ids", "decoded"} from the official tokenizers library. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/files.h"
#include "data/tokenizer.h"
#include "ok.h"

/* 1 when the case holds. */
static int run_case(const struct mt_tokenizer *t, struct mt_encoder *e, const json_t *c, int line) {
  const json_t *text = json_object_get(c, "text"), *ids = json_object_get(c, "ids");
  const char *want = json_string_value(json_object_get(c, "decoded"));
  struct mt_ids got = {0};
  struct mt_text back = {0};
  int good = 1;
  OK(mt_encode(e, json_string_value(text), json_string_length(text),
               MT_ENCODE_ADD_SPECIAL | MT_ENCODE_PARSE_SPECIAL, &got));
  good &= got.count == json_array_size(ids);
  for (size_t i = 0; good && i < got.count; i++) {
    good &= got.id[i] == json_integer_value(json_array_get(ids, i));
  }
  if (!good) {
    print_error("line %d: ids of '%s' differ:", line, json_string_value(text));
    for (size_t i = 0; i < got.count && i < 20; i++) print_error(" %d", (int)got.id[i]);
    print_error("\n");
  }
  size_t wanted = json_string_length(json_object_get(c, "decoded"));
  OK(mt_decode(t, got.id, got.count, true, &back));
  if (good && (back.size != wanted || (wanted && memcmp(back.text, want, wanted) != 0))) {
    print_error("line %d: '%s' decodes to '%.*s'\n", line, want, (int)back.size, back.text);
    good = 0;
  }
  free(got.id);
  free(back.text);
  return good;
}

static void run_dir(const char *dir, const char *cases) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  struct mt_tokenizer *t;
  struct mt_encoder *e;
  int line = 0, good = 0;
  OK(mt_path_join(path, dir, "tokenizer.json"));
  OK(mt_tokenizer_load(path, &t));
  OK(mt_encoder_create(t, &e));
  OK(mt_file_read(cases, 64 << 20, &text, &size));
  for (char *at = text, *end; *at; at = end + 1) {
    end = strchr(at, '\n');
    if (!end) end = at + strlen(at) - 1;
    json_t *c = json_loadb(at, (size_t)(end - at) + (*end != '\n'), JSON_ALLOW_NUL, NULL);
    line++;
    if (!c) fail_msg("%s:%d is no JSON", cases, line);
    good += run_case(t, e, c, line);
    json_decref(c);
  }
  print_message("  %s: %d of %d cases\n", dir, good, line);
  assert_true(line > 0);
  assert_int_equal(good, line);
  free(text);
  mt_encoder_free(e);
  mt_tokenizer_free(t);
}

static void official_cases(void **state) {
  (void)state;
  const char *root = getenv("MOETUNE_GOLDEN_DIR");
  bool ours = !root;
  if (!root) root = MT_SOURCE_DIR "/tests/golden";
  DIR *d = opendir(root);
  if (!d) fail_msg("cannot read '%s'", root);
  int count = 0;
  for (struct dirent *entry; (entry = readdir(d));) {
    char dir[MT_PATH_MAX], cases[MT_PATH_MAX];
    OK(mt_path_join(dir, root, entry->d_name));
    OK(mt_path_join(cases, dir, "cases.jsonl"));
    if (!mt_path_exists(cases)) continue;
    run_dir(dir, cases);
    count++;
  }
  closedir(d);
  assert_true(!ours || count >= 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(official_cases)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
