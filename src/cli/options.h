/* The option table: one row an option. Value parsing, --help, the configuration file and the check
 * of ranges, the shells' completions and the man page all read the same rows. */
#ifndef MT_CLI_OPTIONS_H
#define MT_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"

/* The type of the field that a row fills. */
enum mt_option_type {
  MT_OPT_FLAG,     /* bool; --name and --no-name */
  MT_OPT_INT,      /* int */
  MT_OPT_INT64,    /* int64_t */
  MT_OPT_UINT64,   /* uint64_t */
  MT_OPT_REAL,     /* double, finite */
  MT_OPT_BYTES,    /* uint64_t; 500MB, 5GB (powers of 1000), 4GiB (of 1024), or bytes */
  MT_OPT_TEXT,     /* const char * */
  MT_OPT_OPTIONAL, /* const char *, "" when the flag comes without a value */
  MT_OPT_NAME,     /* const char *, one of `choices` */
  MT_OPT_CHOICE,   /* int, the index within `choices` */
  MT_OPT_LIST      /* struct mt_string_list, one more item each time */
};

struct mt_option {
  const char *group; /* heading that begins above this row, or NULL */
  const char *flag;  /* without dashes; the key in a configuration file too */
  enum mt_option_type type;
  size_t offset;            /* of the field in the command's options */
  const char *unit;         /* what the value is or counts, in capitals: FILE, TOKENS, STEPS */
  const char *initial;      /* the default as it would be typed; NULL: none (0, NULL, empty) */
  const char *initial_note; /* shown in place of `initial` */
  const char *help;
  const char *choices; /* "a|b|c" */
  double min, max;     /* of numbers, both included; both 0: any */
  bool above_min;      /* min itself is not allowed */
  bool required;
};

struct mt_parsed;

struct mt_command {
  const char *name, *summary;
  const char *usage;       /* what follows "moetune NAME" */
  const char *description; /* paragraphs, separated by blank lines */
  const char *examples;    /* lines, printed as they are */
  const struct mt_option *options;
  int option_count;
  const char *positional; /* flag whose value may stand alone, or NULL */
  size_t options_bytes;
  /* Checks that concern several options; may fill in what presets decide. NULL: none. */
  mt_err (*finish)(void *options, const struct mt_parsed *parsed);
  mt_err (*run)(const void *options);
  bool on_ranks; /* several may run it together (cli/ranks.h) */
};

/* The program's commands, ended by NULL. */
const struct mt_command *const *mt_commands(void);
/* NULL when there is none. */
const struct mt_command *mt_command_find(const char *name);

/* Options of every command. */
struct mt_common_options {
  const char *config;
  int log_level; /* enum mt_log_level */
  bool help;
};
const struct mt_option *mt_common_option_rows(int *count);

enum mt_option_source { MT_FROM_DEFAULT, MT_FROM_FILE, MT_FROM_COMMAND_LINE };

/* A command's options with what they own. */
struct mt_parsed {
  const struct mt_command *command;
  void *options; /* the command's struct */
  struct mt_common_options common;
  unsigned char *source; /* enum mt_option_source of each row, the common ones last */
  void **owned;          /* memory that the options point to */
  int owned_count;
};

/* Defaults, then --config FILE, then the command line (argv[0] is the command's name), then
 * `finish`. With --help nothing else is checked. *out (=) is released with mt_parsed_free, also
 * after an error. Errors: MT_EINVAL naming flag or file:line and key, and the value. */
mt_err mt_options_parse(const struct mt_command *command, int argc, char **argv,
                        struct mt_parsed *out);
void mt_parsed_free(struct mt_parsed *p);

/* Whether the user gave this flag, on the command line or in the file. */
bool mt_parsed_given(const struct mt_parsed *p, const char *flag);

/* Reads a YAML file of `flag: value` pairs: rows not given by the command line are set.
 * Errors: MT_EINVAL or MT_ENOENT naming file:line and key: unknown, twice, of the wrong type. */
mt_err mt_options_read_file(struct mt_parsed *p, const char *path);

/* Text -> *field (=) by a row's type, choices and range; the whole text must be used up. Not for
 * lists. Strings are borrowed. Errors: MT_EINVAL with the value and what is allowed. */
mt_err mt_option_parse_value(const struct mt_option *row, const char *text, void *field);

/* Row i of a command, its own first, then the common ones; NULL past the end. Where p keeps its
 * value. The row of a flag, -1 when there is none. */
const struct mt_option *mt_option_row(const struct mt_command *command, int i);
void *mt_option_field(struct mt_parsed *p, int i);
int mt_option_index(const struct mt_command *command, const char *flag, size_t flag_length);

/* A copy of text, or room for count pointers, that lives as long as p. */
mt_err mt_parsed_keep_text(struct mt_parsed *p, const char *text, size_t length, const char **out);
mt_err mt_parsed_keep_list(struct mt_parsed *p, int count, const char ***out);

/* The nearest of names (ended by NULL) if it is near enough to be meant, or NULL. */
const char *mt_nearest(const char *text, const char *const *names);
const char *mt_nearest_flag(const struct mt_command *command, const char *flag);

/* How pages, completions and the man page show a row: as --no-NAME (a flag that is on by default),
 * the name of its value or the choices (NULL: a flag, which takes none), and its help with range
 * and default. */
bool mt_option_negated(const struct mt_option *row);
const char *mt_option_value(const struct mt_option *row);
void mt_option_text(const struct mt_option *row, char *text, size_t size_bytes);
extern const char mt_program_summary[];

/* What a shell completes command lines with, and the man page in roff. */
void mt_completion_bash(FILE *out);
void mt_completion_zsh(FILE *out);
void mt_man_page(FILE *out);

/* The page of a command, and of the program, wrapped to width columns. */
void mt_help_command(FILE *out, const struct mt_command *command, int width);
void mt_help_program(FILE *out, int width);
/* The terminal's columns (of file descriptor fd, else COLUMNS, else 80), within 40..100. */
int mt_help_width(int fd);

#endif
