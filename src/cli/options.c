#include "cli/options.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "train/options.h"

#define COMMON(name) offsetof(struct mt_common_options, name)
static const struct mt_option common_rows[] = {
    {.group = "Common",
     .flag = "config",
     .type = MT_OPT_TEXT,
     .offset = COMMON(config),
     .unit = "FILE",
     .help = "YAML file of options, `name: value` with the names of the flags. A flag on the "
             "command line wins."},
    {.flag = "log-level",
     .type = MT_OPT_CHOICE,
     .offset = COMMON(log_level),
     .unit = "LEVEL",
     .choices = "error|warning|info|debug",
     .initial = "info",
     .help = "How much is said on standard error."},
    {.flag = "help", .type = MT_OPT_FLAG, .offset = COMMON(help), .help = "Shows this page."},
};
enum { COMMON_COUNT = sizeof common_rows / sizeof *common_rows, NEGATED = 0x1000 };

const struct mt_option *mt_common_option_rows(int *count) {
  *count = COMMON_COUNT;
  return common_rows;
}

const struct mt_option *mt_option_row(const struct mt_command *command, int i) {
  if (i < command->option_count) return &command->options[i];
  i -= command->option_count;
  return i < COMMON_COUNT ? &common_rows[i] : NULL;
}

void *mt_option_field(struct mt_parsed *p, int i) {
  const struct mt_option *row = mt_option_row(p->command, i);
  char *base = i < p->command->option_count ? p->options : (char *)&p->common;
  return base + row->offset;
}

int mt_option_index(const struct mt_command *command, const char *flag, size_t flag_length) {
  const struct mt_option *row;
  for (int i = 0; (row = mt_option_row(command, i)); i++) {
    if (strlen(row->flag) == flag_length && memcmp(row->flag, flag, flag_length) == 0) return i;
  }
  return -1;
}

static int row_count(const struct mt_command *command) {
  return command->option_count + COMMON_COUNT;
}

/* Takes p over. */
static mt_err keep(struct mt_parsed *parsed, void *p) {
  void **grown =
      p ? realloc(parsed->owned, sizeof(void *) * (size_t)(parsed->owned_count + 1)) : NULL;
  if (!grown) {
    free(p);
    return mt_fail(MT_ENOMEM, "out of memory for options");
  }
  parsed->owned = grown;
  parsed->owned[parsed->owned_count++] = p;
  return MT_OK;
}

mt_err mt_parsed_keep_text(struct mt_parsed *p, const char *text, size_t length, const char **out) {
  char *copy = strndup(text, length);
  MT_TRY(keep(p, copy));
  *out = copy;
  return MT_OK;
}

mt_err mt_parsed_keep_list(struct mt_parsed *p, int count, const char ***out) {
  const char **list = calloc((size_t)count + 1, sizeof *list);
  MT_TRY(keep(p, list));
  *out = list;
  return MT_OK;
}

bool mt_parsed_given(const struct mt_parsed *p, const char *flag) {
  int i = mt_option_index(p->command, flag, strlen(flag));
  return i >= 0 && p->source[i] != MT_FROM_DEFAULT;
}

void mt_parsed_free(struct mt_parsed *p) {
  for (int i = 0; i < p->owned_count; i++) free(p->owned[i]);
  free(p->owned);
  free(p->source);
  free(p->options);
  *p = (struct mt_parsed){0};
}

static mt_err set_defaults(struct mt_parsed *p) {
  const struct mt_option *row;
  for (int i = 0; (row = mt_option_row(p->command, i)); i++) {
    if (!row->initial) continue;
    MT_TRY(mt_context(mt_option_parse_value(row, row->initial, mt_option_field(p, i)),
                      "default of --%s", row->flag));
  }
  return MT_OK;
}

/* One option of the command line, as getopt found it. */
static mt_err set_given(struct mt_parsed *p, int i, bool negated, const char *value, int argc) {
  const struct mt_option *row = mt_option_row(p->command, i);
  void *field = mt_option_field(p, i);
  bool first = p->source[i] != MT_FROM_COMMAND_LINE;
  p->source[i] = MT_FROM_COMMAND_LINE;
  if (row->type == MT_OPT_FLAG) {
    *(bool *)field = !negated;
    return MT_OK;
  }
  if (row->type == MT_OPT_LIST) {
    struct mt_string_list *list = field;
    if (first) {
      const char **room;
      MT_TRY(mt_parsed_keep_list(p, argc, &room)); /* no flag comes more than argc times */
      *list = (struct mt_string_list){.item = room};
    }
    const char **room = (const char **)list->item; /* ours, from above */
    room[list->count++] = value;
    return MT_OK;
  }
  return mt_context(mt_option_parse_value(row, value ? value : "", field), "--%s", row->flag);
}

/* getopt said '?'. optopt: 0 for an unknown long option, the code of one that takes no value, or a
 * letter. */
static mt_err unknown_flag(const struct mt_command *command, const char *word) {
  if (optopt >= 256) {
    const struct mt_option *row = mt_option_row(command, (optopt & ~NEGATED) - 256);
    return mt_fail(MT_EINVAL, "--%s takes no value", row->flag);
  }
  if (optopt) return mt_fail(MT_EINVAL, "unknown option '-%c'", optopt);
  char name[64];
  const char *begin = word + strspn(word, "-");
  snprintf(name, sizeof name, "%.*s", (int)strcspn(begin, "="), begin);
  const char *near = mt_nearest_flag(command, name);
  if (near) return mt_fail(MT_EINVAL, "unknown option '%s'; did you mean --%s?", word, near);
  return mt_fail(MT_EINVAL, "unknown option '%s'", word);
}

/* getopt's own view of the rows, --no-NAME for flags included. */
static struct option *long_options(const struct mt_command *command, char (*names)[64]) {
  int count = row_count(command);
  struct option *o = calloc((size_t)count * 2 + 1, sizeof *o);
  if (!o) return NULL;
  int n = 0;
  for (int i = 0; i < count; i++) {
    const struct mt_option *row = mt_option_row(command, i);
    int argument = row->type == MT_OPT_FLAG       ? no_argument
                   : row->type == MT_OPT_OPTIONAL ? optional_argument
                                                  : required_argument;
    o[n++] = (struct option){row->flag, argument, NULL, 256 + i};
    if (row->type != MT_OPT_FLAG || i >= command->option_count) continue;
    snprintf(names[i], sizeof names[i], "no-%s", row->flag);
    o[n++] = (struct option){names[i], no_argument, NULL, (256 + i) | NEGATED};
  }
  return o;
}

/* The place-th word that is no option; only a list takes more than one. */
static mt_err set_positional(struct mt_parsed *p, const char *word, int place, int argc) {
  const char *flag = p->command->positional;
  int i = flag ? mt_option_index(p->command, flag, strlen(flag)) : -1;
  if (i < 0 || (place > 0 && mt_option_row(p->command, i)->type != MT_OPT_LIST))
    return mt_fail(MT_EINVAL, "unexpected argument '%s'", word);
  return set_given(p, i, false, word, argc);
}

/* Walks the command line. Twice: once for the common options alone (config_only), since the
 * file must be read before the flags that win over it, then for all. */
static mt_err walk(struct mt_parsed *p, int argc, char **argv, const struct option *options,
                   bool config_only) {
  optind = 0; /* GNU: begin anew */
  opterr = 0;
  int found;
  int positional = 0;
  /* '-': other words come as option 1, in order; ':': a missing value is told from a bad flag. */
  while ((found = getopt_long(argc, argv, "-:h", options, NULL)) != -1) {
    if (found == ':') return mt_fail(MT_EINVAL, "%s needs a value", argv[optind - 1]);
    if (found == '?') return unknown_flag(p->command, argv[optind - 1]);
    if (found == 'h') found = 256 + mt_option_index(p->command, "help", 4);
    if (found == 1) {
      if (!config_only) MT_TRY(set_positional(p, optarg, positional++, argc));
      continue;
    }
    int i = (found & ~NEGATED) - 256;
    const struct mt_option *row = mt_option_row(p->command, i);
    const char *value = optarg;
    /* "--resume DIR" as well as "--resume=DIR". */
    if (row->type == MT_OPT_OPTIONAL && !value && optind < argc && argv[optind][0] != '-') {
      value = argv[optind++];
    }
    if (config_only && i < p->command->option_count) continue;
    MT_TRY(set_given(p, i, found & NEGATED, value, argc));
  }
  for (; !config_only && optind < argc; optind++) { /* behind "--" */
    MT_TRY(set_positional(p, argv[optind], positional++, argc));
  }
  return MT_OK;
}

static mt_err check_required(const struct mt_parsed *p) {
  for (int i = 0; i < p->command->option_count; i++) {
    const struct mt_option *row = &p->command->options[i];
    if (row->required && p->source[i] == MT_FROM_DEFAULT) {
      return mt_fail(MT_EINVAL, "--%s %s is required", row->flag, row->unit);
    }
  }
  return MT_OK;
}

mt_err mt_options_parse(const struct mt_command *command, int argc, char **argv,
                        struct mt_parsed *out) {
  mt_err err = MT_OK;
  int count = row_count(command);
  struct option *options = NULL;
  char(*names)[64] = calloc((size_t)count, sizeof *names);
  *out = (struct mt_parsed){.command = command};
  out->options = calloc(1, command->options_bytes);
  out->source = calloc((size_t)count, 1);
  if (names) options = long_options(command, names);
  if (!options || !out->options || !out->source) {
    MT_GO(mt_fail(MT_ENOMEM, "out of memory for options"));
  }
  MT_GO(set_defaults(out));
  MT_GO(walk(out, argc, argv, options, true));
  if (out->common.help) goto done;
  if (out->common.config) MT_GO(mt_options_read_file(out, out->common.config));
  MT_GO(walk(out, argc, argv, options, false));
  MT_GO(check_required(out));
  if (command->finish) MT_GO(command->finish(out->options, out));
done:
  free(options);
  free(names);
  return err;
}
