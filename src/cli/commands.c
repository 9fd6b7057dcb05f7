#include "cli/commands.h"

#include <string.h>

const struct mt_command *const *mt_commands(void) {
  static const struct mt_command *const commands[] = {
      &mt_command_train,   &mt_command_eval,       &mt_command_generate, &mt_command_report,
      &mt_command_convert, &mt_command_inspect,    &mt_command_plan,     &mt_command_bench,
      &mt_command_ladder,  &mt_command_completion, &mt_command_man,      NULL,
  };
  return commands;
}

const struct mt_command *mt_command_find(const char *name) {
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    if (strcmp((*c)->name, name) == 0) return *c;
  }
  return NULL;
}

mt_err mt_check_micro_batch(int batch_size, int max_seq_length) {
  enum { MAX_TOKENS = 1 << 28 };
  if (batch_size <= MAX_TOKENS / max_seq_length) return MT_OK;
  return mt_fail(MT_EINVAL, "--batch-size %d times --max-seq-length %d is over %d tokens",
                 batch_size, max_seq_length, MAX_TOKENS);
}
