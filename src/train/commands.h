/* The commands' bodies. Each prints its results on standard output and what people watch on
 * standard error; errors come back as values with a message. */
#ifndef MT_TRAIN_COMMANDS_H
#define MT_TRAIN_COMMANDS_H

#include "train/options.h"

/* Fine-tunes and writes a run directory: run.json (what was asked and found), metrics.jsonl,
 * samples.jsonl, checkpoint-N/ (a checkpoint and the state to go on from it), model/ (the result).
 */
mt_err mt_train_run(const struct mt_train_options *o);

/* Cross-entropy, perplexity and token accuracy over the answers of a data file. */
mt_err mt_eval_run(const struct mt_eval_options *o);

/* Continues a prompt, token by token, on standard output. */
mt_err mt_generate_run(const struct mt_generate_options *o);

/* Tensors, parameters by kind, shape facts of a checkpoint. */
mt_err mt_inspect_run(const char *model);

/* Memory that `train` with these options takes, by arena, to the byte. */
mt_err mt_inspect_train_run(const struct mt_train_options *o);

/* The training step of a random model on random tokens beside the machine's plain matrix product.
 */
mt_err mt_bench_run(const struct mt_bench_options *o);

#endif
