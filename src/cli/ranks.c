/* Commands that many ranks run together. */
#include "cli/ranks.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

/* What each rank may have of its own. */
static bool own(const char *flag) {
  static const char *const flags[] = {"threads", "cache-dir"};
  for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
    if (strcmp(flags[i], flag) == 0) return true;
  }
  return false;
}

/* As people write it, where that is the same number. */
static void print_real(FILE *out, double value) {
  char text[32];
  snprintf(text, sizeof text, "%.15g", value);
  if (strtod(text, NULL) != value) snprintf(text, sizeof text, "%.17g", value);
  fputs(text, out);
}

static void print_value(FILE *out, const struct mt_option *row, const void *field) {
  const struct mt_string_list *list = field;
  const char *text;
  switch (row->type) {
  case MT_OPT_FLAG:
    fputs(*(const bool *)field ? "yes" : "no", out);
    return;
  case MT_OPT_INT:
  case MT_OPT_CHOICE:
    fprintf(out, "%d", *(const int *)field);
    return;
  case MT_OPT_INT64:
    fprintf(out, "%" PRId64, *(const int64_t *)field);
    return;
  case MT_OPT_UINT64:
  case MT_OPT_BYTES:
    fprintf(out, "%" PRIu64, *(const uint64_t *)field);
    return;
  case MT_OPT_REAL:
    print_real(out, *(const double *)field);
    return;
  case MT_OPT_LIST:
    for (int i = 0; i < list->count; i++) fprintf(out, "%s%s", i ? ", " : "", list->item[i]);
    return;
  default:
    memcpy(&text, field, sizeof text);
    fputs(text ? text : "none", out);
  }
}

/* The version and every option, a line each. */
static mt_err compare_options(const struct mt_command *command, const void *options,
                              struct mt_world *w) {
  char *text = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&text, &size);
  if (out) {
    fprintf(out, "moetune %s\n", MOETUNE_VERSION);
    for (int i = 0; i < command->option_count; i++) {
      const struct mt_option *row = &command->options[i];
      if (own(row->flag)) continue;
      fprintf(out, "--%s ", row->flag);
      print_value(out, row, (const char *)options + row->offset);
      fputc('\n', out);
    }
  }
  bool whole = out && fclose(out) == 0;
  mt_err err = whole ? MT_OK : mt_fail(MT_ENOMEM, "options as text");
  err = mt_world_meet(w, err, NULL);
  if (!err) err = mt_world_same(w, "command", text);
  free(text);
  return err;
}

mt_err mt_run_on_ranks(const struct mt_command *command, const void *options, double timeout_s,
                       mt_err (*run)(const void *options, struct mt_world *world)) {
  struct mt_world world;
  MT_TRY(mt_world_open(&world, timeout_s));
  /* One voice: what concerns all is told by rank 0, what befalls one brings its error. */
  if (world.rank != 0 && mt_log_get_level() < MT_LOG_DEBUG) mt_log_set_level(MT_LOG_ERROR);
  mt_err err = world.size > 1 ? compare_options(command, options, &world) : MT_OK;
  if (!err) err = run(options, &world);
  err = mt_world_end(&world, err);
  mt_world_close(&world);
  return err;
}

void mt_refuse_on_ranks(const struct mt_command *command, mt_err err) {
  enum { PATIENCE_S = 60 };
  struct mt_world world;
  char why[1024];
  snprintf(why, sizeof why, "%s", mt_error_message());
  if (mt_world_open(&world, PATIENCE_S) || world.size == 1) {
    mt_world_close(&world);
    (void)mt_fail(err, "%s", why);
    return;
  }
  /* Who could read its own is at the meeting before options are compared. */
  (void)mt_world_end(&world, mt_fail(err, "%s; see 'moetune %s --help'", why, command->name));
  mt_world_close(&world);
}
