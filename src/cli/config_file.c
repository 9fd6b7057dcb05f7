/* --config FILE: YAML, one mapping of flag names to values. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "cli/options.h"
#include "train/options.h"

enum { MAX_LIST = 4096 };

struct reader {
  yaml_parser_t parser;
  yaml_event_t event; /* the current one */
  bool has_event;
  const char *path;
  struct mt_parsed *parsed;
};

static unsigned long line_of(const struct reader *r) {
  return (unsigned long)r->event.start_mark.line + 1;
}

static mt_err next(struct reader *r) {
  if (r->has_event) yaml_event_delete(&r->event);
  r->has_event = false;
  if (!yaml_parser_parse(&r->parser, &r->event)) {
    const yaml_parser_t *p = &r->parser;
    unsigned long line =
        p->error == YAML_READER_ERROR ? 1 : (unsigned long)p->problem_mark.line + 1;
    return mt_fail(MT_EINVAL, "%s:%lu: %s", r->path, line, p->problem ? p->problem : "not YAML");
  }
  r->has_event = true;
  return MT_OK;
}

static const char *scalar(const struct reader *r) {
  return (const char *)r->event.data.scalar.value;
}

/* A scalar with a zero byte inside would be cut short as a C string. */
static mt_err check_scalar(const struct reader *r, const char *what) {
  if (r->event.type != YAML_SCALAR_EVENT) {
    return mt_fail(MT_EINVAL, "%s:%lu: %s must be a plain value", r->path, line_of(r), what);
  }
  if (strlen(scalar(r)) != r->event.data.scalar.length) {
    return mt_fail(MT_EINVAL, "%s:%lu: %s holds a zero byte", r->path, line_of(r), what);
  }
  return MT_OK;
}

/* `freeze: pattern`, or a sequence of them. The command line's list, if there is one, replaces
 * this one later. */
static mt_err read_list(struct reader *r, const char *key, struct mt_string_list *list) {
  const char **item;
  bool sequence = r->event.type == YAML_SEQUENCE_START_EVENT;
  MT_TRY(mt_parsed_keep_list(r->parsed, sequence ? MAX_LIST : 1, &item));
  int count = 0;
  do {
    if (sequence) {
      MT_TRY(next(r));
      if (r->event.type == YAML_SEQUENCE_END_EVENT) break;
    }
    MT_TRY(check_scalar(r, key));
    if (count == MAX_LIST) {
      return mt_fail(MT_EINVAL, "%s:%lu: %s: too many items", r->path, line_of(r), key);
    }
    MT_TRY(mt_parsed_keep_text(r->parsed, scalar(r), r->event.data.scalar.length, &item[count]));
    count++;
  } while (sequence);
  *list = (struct mt_string_list){.item = item, .count = count};
  return MT_OK;
}

static mt_err read_value(struct reader *r, int i) {
  const struct mt_option *row = mt_option_row(r->parsed->command, i);
  void *field = mt_option_field(r->parsed, i);
  if (r->event.type == YAML_ALIAS_EVENT) {
    return mt_fail(MT_EINVAL, "%s:%lu: %s: aliases are not supported", r->path, line_of(r),
                   row->flag);
  }
  if (row->type == MT_OPT_LIST) return read_list(r, row->flag, field);
  MT_TRY(check_scalar(r, row->flag));
  const char *text;
  MT_TRY(mt_parsed_keep_text(r->parsed, scalar(r), r->event.data.scalar.length, &text));
  return mt_context(mt_option_parse_value(row, text, field), "%s:%lu: %s", r->path, line_of(r),
                    row->flag);
}

static mt_err read_pair(struct reader *r) {
  const struct mt_command *command = r->parsed->command;
  MT_TRY(check_scalar(r, "a key"));
  const char *key = scalar(r);
  int i = mt_option_index(command, key, strlen(key));
  if (i < 0) {
    const char *near = mt_nearest_flag(command, key);
    return mt_fail(MT_EINVAL, "%s:%lu: unknown key '%.64s'%s%s%s", r->path, line_of(r), key,
                   near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
  }
  const struct mt_option *row = mt_option_row(command, i);
  if (strcmp(row->flag, "config") == 0 || strcmp(row->flag, "help") == 0) {
    return mt_fail(MT_EINVAL, "%s:%lu: '%s' is for the command line alone", r->path, line_of(r),
                   row->flag);
  }
  if (r->parsed->source[i] == MT_FROM_FILE) {
    return mt_fail(MT_EINVAL, "%s:%lu: key '%s' is there twice", r->path, line_of(r), row->flag);
  }
  MT_TRY(next(r));
  MT_TRY(read_value(r, i));
  r->parsed->source[i] = MT_FROM_FILE;
  return MT_OK;
}

static mt_err read_document(struct reader *r) {
  MT_TRY(next(r)); /* stream start */
  MT_TRY(next(r));
  if (r->event.type == YAML_STREAM_END_EVENT) return MT_OK; /* nothing in it */
  MT_TRY(next(r));
  if (r->event.type == YAML_SCALAR_EVENT && r->event.data.scalar.length == 0) return MT_OK;
  if (r->event.type != YAML_MAPPING_START_EVENT) {
    return mt_fail(MT_EINVAL, "%s:%lu: `name: value` lines expected", r->path, line_of(r));
  }
  for (;;) {
    MT_TRY(next(r));
    if (r->event.type == YAML_MAPPING_END_EVENT) break;
    MT_TRY(read_pair(r));
  }
  MT_TRY(next(r)); /* document end */
  MT_TRY(next(r));
  if (r->event.type != YAML_STREAM_END_EVENT) {
    return mt_fail(MT_EINVAL, "%s:%lu: a second document", r->path, line_of(r));
  }
  return MT_OK;
}

mt_err mt_options_read_file(struct mt_parsed *p, const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) return mt_fail(MT_ENOENT, "--config %s: %s", path, strerror(errno));
  mt_err err;
  struct reader r = {.path = path, .parsed = p};
  if (!yaml_parser_initialize(&r.parser)) {
    err = mt_fail(MT_ENOMEM, "out of memory for %s", path);
    goto done;
  }
  yaml_parser_set_input_file(&r.parser, f);
  err = read_document(&r);
  if (r.has_event) yaml_event_delete(&r.event);
  yaml_parser_delete(&r.parser);
done:
  fclose(f);
  return err;
}
