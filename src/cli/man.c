/* `moetune man`: the manual page in roff (man(7)), from the option table. */
#include <string.h>

#include "cli/commands.h"

struct man_options {
  char none;
};

static mt_err run(const void *options) {
  (void)options;
  mt_man_page(stdout);
  return MT_OK;
}

const struct mt_command mt_command_man = {
    .name = "man",
    .summary = "prints the manual page",
    .usage = "> moetune.1",
    .description = "Prints the manual page of all commands in roff. `make install` installs it.",
    .examples = "  moetune man | man -l -\n",
    .options_bytes = sizeof(struct man_options),
    .run = run,
};

/* Text that roff takes as it is: no escapes, no requests at a line's beginning, hyphens as they
 * are typed. */
static void text(FILE *out, const char *s, size_t length) {
  bool begin = true;
  for (size_t i = 0; i < length; i++) {
    if (begin && (s[i] == '.' || s[i] == '\'')) fputs("\\&", out);
    begin = s[i] == '\n';
    switch (s[i]) {
    case '\\':
      fputs("\\e", out);
      break;
    case '-':
      fputs("\\-", out);
      break;
    case '\'':
      fputs("\\(aq", out);
      break;
    case '`':
      fputs("\\(ga", out);
      break;
    case '^':
      fputs("\\(ha", out);
      break;
    case '~':
      fputs("\\(ti", out);
      break;
    default:
      fputc(s[i], out);
    }
  }
}

/* Paragraphs, separated by blank lines in s. */
static void paragraphs(FILE *out, const char *s) {
  for (;;) {
    const char *end = strstr(s, "\n\n");
    fputs(".PP\n", out);
    text(out, s, end ? (size_t)(end - s) : strlen(s));
    fputc('\n', out);
    if (!end) break;
    s = end + 2;
  }
}

static void option(FILE *out, const struct mt_option *row) {
  char help[1024];
  const char *value = mt_option_value(row);
  bool optional = row->type == MT_OPT_OPTIONAL;
  fprintf(out, ".TP\n\\fB\\-\\-%s", mt_option_negated(row) ? "no\\-" : "");
  text(out, row->flag, strlen(row->flag));
  fputs("\\fR", out);
  if (value) {
    fprintf(out, " %s\\fI", optional ? "[" : "");
    text(out, value, strlen(value));
    fprintf(out, "\\fR%s", optional ? "]" : "");
  }
  fputc('\n', out);
  mt_option_text(row, help, sizeof help);
  text(out, help, strlen(help));
  fputc('\n', out);
}

/* Lines as they are typed. */
static void verbatim(FILE *out, const char *lines) {
  fputs(".nf\n.ft CR\n", out);
  text(out, lines, strlen(lines));
  if (*lines && lines[strlen(lines) - 1] != '\n') fputc('\n', out);
  fputs(".ft R\n.fi\n", out);
}

static void command(FILE *out, const struct mt_command *c) {
  char usage[256];
  fprintf(out, ".SH \"MOETUNE %s\"\n", c->name);
  text(out, c->summary, strlen(c->summary));
  fputs(".\n", out);
  snprintf(usage, sizeof usage, "  moetune %s %s", c->name, c->usage);
  fputs(".PP\n", out);
  verbatim(out, usage);
  paragraphs(out, c->description);
  for (int i = 0; i < c->option_count; i++) {
    const struct mt_option *row = &c->options[i];
    if (row->group) {
      fputs(".SS \"", out);
      text(out, row->group, strlen(row->group));
      fputs("\"\n", out);
    }
    option(out, row);
  }
  fputs(".SS Examples\n", out);
  verbatim(out, c->examples);
}

void mt_man_page(FILE *out) {
  int count;
  const struct mt_option *common = mt_common_option_rows(&count);
  fputs(".\\\" Made by `moetune man` from the option table.\n"
        ".TH MOETUNE 1 \"\" \"moetune " MOETUNE_VERSION "\" \"User Commands\"\n"
        ".SH NAME\nmoetune \\- ",
        out);
  text(out, mt_program_summary, strlen(mt_program_summary));
  fputs("\n.SH SYNOPSIS\n.B moetune\n.I COMMAND\n[options]\n.br\n.B moetune help\n.I COMMAND\n"
        ".SH DESCRIPTION\nThe commands are\n",
        out);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    fprintf(out, ".TP\n.B %s\n", (*c)->name);
    text(out, (*c)->summary, strlen((*c)->summary));
    fputc('\n', out);
  }
  fputs(".SH \"COMMON OPTIONS\"\nEvery command takes them.\n", out);
  for (int i = 0; i < count; i++) option(out, &common[i]);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) command(out, *c);
  fputs(".SH \"EXIT STATUS\"\n0 success, 1 failure, 2 wrong usage.\n"
        ".SH ENVIRONMENT\n"
        ".TP\n.B XDG_CACHE_HOME\nTokenised data is kept in its subdirectory moetune; where it is "
        "not set, in \\(ti/.cache/moetune.\n"
        ".TP\n.B TMPDIR\nWhere tokens lie that are not kept; /tmp where it is not set.\n"
        ".TP\n.B NO_COLOR\nNo colours where it is set.\n"
        ".TP\n.B COLUMNS\nThe width of help pages where standard output is no terminal.\n",
        out);
}
