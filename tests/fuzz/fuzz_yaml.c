/* Any bytes as --config FILE: refused, or every field holds what its row allows. */
#include "cli/options.h"
#include "fuzz/files.h"
#include "train/options.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct fields {
  const char *text, *name;
  struct mt_string_list list;
  int64_t big;
  double real;
  uint64_t bytes;
  int number, choice;
  bool flag;
};

#define AT(type_, flag_) .flag = #flag_, .type = type_, .offset = offsetof(struct fields, flag_)

static const struct mt_option rows[] = {
    {AT(MT_OPT_TEXT, text), .help = "A text."},
    {AT(MT_OPT_NAME, name), .choices = "a|b", .initial = "a", .help = "A name."},
    {AT(MT_OPT_LIST, list), .help = "Texts."},
    {AT(MT_OPT_INT64, big), .initial = "0", .max = 1e12, .help = "A number."},
    {AT(MT_OPT_REAL, real), .initial = "1", .max = 10, .help = "A number."},
    {AT(MT_OPT_BYTES, bytes), .initial = "1GB", .help = "A size."},
    {AT(MT_OPT_INT, number), .initial = "1", .min = 1, .max = 64, .help = "A number."},
    {AT(MT_OPT_CHOICE, choice), .choices = "x|y|z", .initial = "x", .help = "A choice."},
    {AT(MT_OPT_FLAG, flag), .help = "A flag."},
};

static const struct mt_command command = {.name = "fuzz",
                                          .options = rows,
                                          .option_count = sizeof rows / sizeof *rows,
                                          .options_bytes = sizeof(struct fields)};

/* In place of the program's, which would bring all of it along. */
const struct mt_command *const *mt_commands(void) {
  static const struct mt_command *const commands[] = {&command, NULL};
  return commands;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct mt_parsed parsed;
  char flag[] = "--config", name[] = "fuzz", path[MT_PATH_MAX];
  snprintf(path, sizeof path, "%s", fuzz_file("run.yaml", data, size));
  char *argv[] = {name, flag, path, NULL};
  if (mt_options_parse(&command, 3, argv, &parsed) == MT_OK) {
    const struct fields *f = parsed.options;
    if (f->number < 1 || f->number > 64 || f->choice < 0 || f->choice > 2 || !f->name ||
        !(f->real >= 0 && f->real <= 10) || f->big < 0 || f->big > 1000000000000)
      __builtin_trap();
    for (int i = 0; i < f->list.count; i++) {
      if (strlen(f->list.item[i]) > size) __builtin_trap();
    }
  }
  mt_parsed_free(&parsed);
  return 0;
}
