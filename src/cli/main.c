/* moetune COMMAND [options] */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "cli/json_memory.h"
#include "cli/options.h"
#include "cli/ranks.h"

enum { EXIT_OK, EXIT_FAILED, EXIT_USAGE };

static int fail(int status, const char *try_help) {
  fflush(stdout);
  if (!*mt_error_message()) return status; /* told already, for all ranks */
  fprintf(stderr, "moetune: error: %s\n", mt_error_message());
  if (try_help) fprintf(stderr, "Try 'moetune %s'.\n", try_help);
  return status;
}

/* What could not be written (a full disk, a closed pipe) must not look like success. */
static int finish_output(int status) {
  if (fflush(stdout) == 0 && !ferror(stdout)) return status;
  mt_fail(MT_EIO, "cannot write to standard output");
  return status ? status : fail(EXIT_FAILED, NULL);
}

static int unknown_command(const char *name) {
  const char *names[32];
  int count = 0;
  for (const struct mt_command *const *c = mt_commands(); *c && count < 31; c++) {
    names[count++] = (*c)->name;
  }
  names[count] = NULL;
  const char *near = mt_nearest(name, names);
  mt_fail(MT_EINVAL, "unknown command '%.64s'%s%s%s", name, near ? "; did you mean '" : "",
          near ? near : "", near ? "'?" : "");
  return fail(EXIT_USAGE, "--help");
}

static int run_command(const struct mt_command *command, int argc, char **argv) {
  struct mt_parsed parsed;
  char try_help[64];
  int status = EXIT_OK;
  snprintf(try_help, sizeof try_help, "%s --help", command->name);
  mt_err err = mt_options_parse(command, argc, argv, &parsed);
  if (err) {
    if (command->on_ranks) mt_refuse_on_ranks(command, err);
    status = fail(EXIT_USAGE, try_help);
  } else if (parsed.common.help) {
    mt_help_command(stdout, command, mt_help_width(STDOUT_FILENO));
  } else {
    mt_log_set_level((enum mt_log_level)parsed.common.log_level);
    err = command->run(parsed.options);
    if (err) status = fail(EXIT_FAILED, NULL);
  }
  mt_parsed_free(&parsed);
  return status;
}

static int run(int argc, char **argv) {
  if (argc < 2) {
    mt_help_program(stderr, mt_help_width(STDERR_FILENO));
    return EXIT_USAGE;
  }
  const char *word = argv[1];
  if (strcmp(word, "--version") == 0 || strcmp(word, "-V") == 0) {
    puts("moetune " MOETUNE_VERSION);
    return EXIT_OK;
  }
  bool help = strcmp(word, "help") == 0;
  if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || (help && argc == 2)) {
    mt_help_program(stdout, mt_help_width(STDOUT_FILENO));
    return EXIT_OK;
  }
  const char *name = help ? argv[2] : word;
  const struct mt_command *command = mt_command_find(name);
  if (!command) return unknown_command(name);
  if (!help) return run_command(command, argc - 1, argv + 1);
  mt_help_command(stdout, command, mt_help_width(STDOUT_FILENO));
  return EXIT_OK;
}

int main(int argc, char **argv) {
  mt_json_memory_reserve();
  return finish_output(run(argc, argv));
}
