/* --help of every command shows every row of its table, with unit and default; the program's own
 * page, its version, guesses and exit statuses. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "cli/options.h"
#include "cli/run.h"

static struct cli_result r;

static void assert_has(const char *text, const char *part) {
  if (!strstr(text, part)) fail_msg("'%s' is missing in:\n%s", part, text);
}

/* Wrapping may break a line anywhere between words. */
static void flatten(char *text) {
  char *to = text;
  for (const char *from = text; *from; from++) {
    char c = *from;
    if (c == '\n') c = ' ';
    if (c == ' ' && to > text && to[-1] == ' ') continue;
    *to++ = c;
  }
  *to = 0;
}

static void every_row_is_shown(void **state) {
  (void)state;
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    CLI(&r, (*c)->name, "--help");
    assert_int_equal(r.status, 0);
    assert_string_equal(r.err, "");
    flatten(r.out);
    const struct mt_option *row;
    for (int i = 0; (row = mt_option_row(*c, i)); i++) {
      char text[1024];
      bool on = row->type == MT_OPT_FLAG && row->initial && strcmp(row->initial, "true") == 0;
      const char *unit = row->choices ? row->choices : row->unit;
      bool optional = row->type == MT_OPT_OPTIONAL;
      snprintf(text, sizeof text, " --%s%s%s%s%s%s ", on ? "no-" : "", row->flag, unit ? " " : "",
               optional ? "[" : "", unit ? unit : "", optional ? "]" : "");
      assert_has(r.out, text);
      const char *initial = row->initial_note ? row->initial_note : row->initial;
      if (initial) {
        snprintf(text, sizeof text, "Default: %s.", initial);
        assert_has(r.out, text);
      }
      assert_has(r.out, row->help);
    }
    assert_has(r.out, "Examples");
  }
}

/* Options that others rely on by name. */
static void names_of_train(void **state) {
  (void)state;
  static const char *const names[] = {"improvement",
                                      "ep-size",
                                      "batch-size",
                                      "max-seq-length",
                                      "warmup-steps",
                                      "train-steps",
                                      "model",
                                      "data",
                                      "eval-data",
                                      "out",
                                      "lr",
                                      "lr-schedule",
                                      "weight-decay",
                                      "adam-beta1",
                                      "adam-beta2",
                                      "adam-eps",
                                      "grad-clip",
                                      "grad-accum",
                                      "epochs",
                                      "seed",
                                      "precision",
                                      "experts",
                                      "blocks",
                                      "recompute",
                                      "optim-state",
                                      "graphs",
                                      "freeze",
                                      "router-aux-coef",
                                      "router-z-loss",
                                      "eval-every",
                                      "save-every",
                                      "resume",
                                      "threads",
                                      "log-every",
                                      "config",
                                      "help",
                                      "train-on-prompt",
                                      "skip-bad-lines",
                                      "max-shard-size",
                                      "patience",
                                      "min-delta",
                                      "keep-best",
                                      "keep-last",
                                      "samples",
                                      "sample-prompt",
                                      "sample-tokens",
                                      "dead-expert-steps",
                                      "tensorboard",
                                      "report"};
  const struct mt_command *train = mt_command_find("train");
  assert_non_null(train);
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    if (mt_option_index(train, names[i], strlen(names[i])) < 0) fail_msg("--%s", names[i]);
  }
}

/* A row's default must pass its own check, and a unit belongs to everything but a flag. */
static void rows_are_sound(void **state) {
  (void)state;
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    const struct mt_option *row;
    for (int i = 0; (row = mt_option_row(*c, i)); i++) {
      union {
        int64_t whole;
        double real;
        const char *text;
      } field;
      assert_int_equal(mt_option_index(*c, row->flag, strlen(row->flag)), i); /* no name twice */
      if (row->initial && mt_option_parse_value(row, row->initial, &field)) {
        fail_msg("%s --%s: %s", (*c)->name, row->flag, mt_error_message());
      }
      if (row->type != MT_OPT_FLAG && !row->unit) fail_msg("--%s has no unit", row->flag);
      assert_true(row->max >= row->min);
    }
  }
}

static void width_is_kept(void **state) {
  (void)state;
  static const int widths[] = {40, 60, 80, 100};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    for (const struct mt_command *const *c = mt_commands(); *c; c++) {
      char *text = NULL;
      size_t size = 0;
      FILE *f = open_memstream(&text, &size);
      mt_help_command(f, *c, widths[w]);
      fclose(f);
      char *end = strstr(text, "\nExamples"); /* commands to copy are not broken */
      assert_non_null(end);
      *end = 0;
      char *usage = strstr(text, "\nUsage\n"); /* nor are the summary and the usage line */
      assert_non_null(usage);
      char *line = strchr(usage + 7, '\n') + 1;
      while (*line) {
        size_t length = strcspn(line, "\n");
        const char *word = line + strspn(line, " ");
        bool single = word + strcspn(word, " \n") == line + length; /* too long a word to break */
        if (length > (size_t)widths[w] && !single)
          fail_msg("%d: %.*s", widths[w], (int)length, line);
        line += length + (line[length] == '\n');
      }
      free(text);
    }
  }
}

static void program_page(void **state) {
  (void)state;
  static struct cli_result other;
  CLI(&r, "--help");
  assert_int_equal(r.status, 0);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    assert_has(r.out, (*c)->summary);
  }
  CLI(&other, "help");
  assert_string_equal(r.out, other.out);
  CLI(&r, "train", "--help");
  CLI(&other, "help", "train");
  assert_int_equal(other.status, 0);
  assert_string_equal(r.out, other.out);
  CLI(&r, "--version");
  assert_int_equal(r.status, 0);
  assert_string_equal(r.out, "moetune " MOETUNE_VERSION "\n");
}

static void wrong_commands(void **state) {
  (void)state;
  const char *const none[] = {NULL};
  cli_run(&r, none);
  assert_int_equal(r.status, 2);
  assert_has(r.err, "Commands");
  CLI(&r, "trian");
  assert_int_equal(r.status, 2);
  assert_has(r.err, "moetune: error: unknown command 'trian'; did you mean 'train'?");
  assert_string_equal(r.out, "");
  CLI(&r, "frobnicate");
  assert_int_equal(r.status, 2);
  assert_null(strstr(r.err, "did you mean"));
  CLI(&r, "help", "evil");
  assert_int_equal(r.status, 2);
  assert_has(r.err, "did you mean 'eval'?");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_row_is_shown), cmocka_unit_test(names_of_train),
      cmocka_unit_test(rows_are_sound),     cmocka_unit_test(width_is_kept),
      cmocka_unit_test(program_page),       cmocka_unit_test(wrong_commands),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
