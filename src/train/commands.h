/* One function a command of the program. Each checks what only a run can check (files, shapes),
 * prints its results on stdout and its progress on stderr, and returns when the work is done.
 * Errors: those of the rooms below, with a message that names the culprit; files that were there
 * before stay whole. */
#ifndef MT_TRAIN_COMMANDS_H
#define MT_TRAIN_COMMANDS_H

#include "train/options.h"

mt_err mt_train_run(const struct mt_train_options *options);
mt_err mt_eval_run(const struct mt_eval_options *options);
mt_err mt_generate_run(const struct mt_generate_options *options);
mt_err mt_inspect_run(const struct mt_inspect_options *options);
mt_err mt_bench_run(const struct mt_bench_options *options);

#endif
