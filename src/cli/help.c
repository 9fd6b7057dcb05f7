/* Pages of help, made from the option table, and guesses at mistyped names. */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "cli/options.h"

enum { MIN_WIDTH = 40, MAX_WIDTH = 100, DEFAULT_WIDTH = 80, MAX_NAME = 64 };

const char mt_program_summary[] =
    "fine-tunes mixture-of-experts models from Hugging Face checkpoints";

int mt_help_width(int fd) {
  struct winsize size;
  long width = 0;
  const char *columns = getenv("COLUMNS");
  if (ioctl(fd, TIOCGWINSZ, &size) == 0) width = size.ws_col;
  if (width <= 0 && columns) width = strtol(columns, NULL, 10);
  if (width <= 0) width = DEFAULT_WIDTH;
  return width < MIN_WIDTH ? MIN_WIDTH : width > MAX_WIDTH ? MAX_WIDTH : (int)width;
}

/* Words of text, wrapped, each line behind indent spaces; a blank line stays one. */
static void wrap(FILE *out, const char *text, int indent, int width) {
  int column = 0;
  while (*text) {
    if (*text == '\n' && text[1] == '\n') {
      fputs("\n\n", out);
      column = 0;
    }
    size_t space = strspn(text, " \n");
    text += space;
    int length = (int)strcspn(text, " \n");
    if (!length) break;
    if (column && column + 1 + length > width) {
      fputc('\n', out);
      column = 0;
    }
    if (!column) {
      fprintf(out, "%*s%.*s", indent, "", length, text);
      column = indent + length;
    } else {
      fprintf(out, " %.*s", length, text);
      column += 1 + length;
    }
    text += length;
  }
  fputc('\n', out);
}

/* "Range: above 0." and so on; empty for rows without one. */
static void range_text(const struct mt_option *row, char *text, size_t size_bytes) {
  *text = 0;
  if (row->min == 0 && row->max == 0) return;
  const char *low = row->above_min ? "above" : "at least";
  if (row->max >= 1e9) { /* a bound against overflow, which nobody needs to know */
    snprintf(text, size_bytes, " Range: %s %g.", low, row->min);
  } else if (row->above_min) {
    snprintf(text, size_bytes, " Range: above %g, at most %.10g.", row->min, row->max);
  } else {
    snprintf(text, size_bytes, " Range: %.10g to %.10g.", row->min, row->max);
  }
}

bool mt_option_negated(const struct mt_option *row) {
  return row->type == MT_OPT_FLAG && row->initial && strcmp(row->initial, "true") == 0;
}

const char *mt_option_value(const struct mt_option *row) {
  if (row->type == MT_OPT_FLAG) return NULL;
  return row->choices && row->type != MT_OPT_OPTIONAL ? row->choices : row->unit;
}

void mt_option_text(const struct mt_option *row, char *text, size_t size_bytes) {
  char range[96];
  const char *initial = row->initial_note ? row->initial_note : row->initial;
  if (row->type == MT_OPT_FLAG && !initial) initial = "off";
  range_text(row, range, sizeof range);
  snprintf(text, size_bytes, "%s%s%s%s%s%s%s", row->help, range,
           row->type == MT_OPT_LIST ? " May be given several times." : "",
           row->required ? " Required." : "", initial ? " Default: " : "", initial ? initial : "",
           initial ? "." : "");
}

static void print_option(FILE *out, const struct mt_option *row, int width) {
  char text[1024];
  const char *value = mt_option_value(row);
  bool optional = row->type == MT_OPT_OPTIONAL;
  fprintf(out, "  --%s%s", mt_option_negated(row) ? "no-" : "", row->flag);
  if (value) fprintf(out, " %s%s%s", optional ? "[" : "", value, optional ? "]" : "");
  fputc('\n', out);
  mt_option_text(row, text, sizeof text);
  wrap(out, text, 6, width);
}

void mt_help_command(FILE *out, const struct mt_command *command, int width) {
  fprintf(out, "moetune %s: %s\n\nUsage\n", command->name, command->summary);
  fprintf(out, "  moetune %s %s\n\n", command->name, command->usage);
  wrap(out, command->description, 2, width);
  const struct mt_option *row;
  for (int i = 0; (row = mt_option_row(command, i)); i++) {
    if (row->group || i == 0) fprintf(out, "\n%s\n", row->group ? row->group : "Options");
    print_option(out, row, width);
  }
  fprintf(out, "\nExamples\n%s", command->examples);
}

void mt_help_program(FILE *out, int width) {
  fprintf(out, "moetune: %s\n\nUsage\n  moetune COMMAND [options]\n\nCommands\n",
          mt_program_summary);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    fprintf(out, "  %-12s%s\n", (*c)->name, (*c)->summary);
  }
  fputs("\n", out);
  wrap(out,
       "`moetune COMMAND --help` or `moetune help COMMAND` shows a command's options with their "
       "units and defaults; `moetune --version` the version. Exit status: 0 success, 1 failure, "
       "2 wrong usage.",
       2, width);
}

/* Edit distance (Levenshtein), names cut at MAX_NAME. */
static int distance(const char *a, const char *b) {
  int row[MAX_NAME + 1];
  int a_length = (int)strnlen(a, MAX_NAME), b_length = (int)strnlen(b, MAX_NAME);
  for (int j = 0; j <= b_length; j++) row[j] = j;
  for (int i = 1; i <= a_length; i++) {
    int diagonal = row[0];
    row[0] = i;
    for (int j = 1; j <= b_length; j++) {
      int best = diagonal + (a[i - 1] != b[j - 1]);
      if (row[j] + 1 < best) best = row[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      diagonal = row[j];
      row[j] = best;
    }
  }
  return row[b_length];
}

const char *mt_nearest(const char *text, const char *const *names) {
  const char *best = NULL;
  int best_distance = (int)strnlen(text, MAX_NAME) / 3 + 1; /* further off is no typing error */
  for (; *names; names++) {
    int d = distance(text, *names);
    if (d <= best_distance && (!best || d < best_distance)) {
      best = *names;
      best_distance = d;
    }
  }
  return best;
}

const char *mt_nearest_flag(const struct mt_command *command, const char *flag) {
  const char *names[128];
  const struct mt_option *row;
  int count = 0;
  for (int i = 0; count < 127 && (row = mt_option_row(command, i)); i++) names[count++] = row->flag;
  names[count] = NULL;
  return mt_nearest(flag, names);
}
