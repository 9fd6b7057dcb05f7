#include "cli/commands.h"
#include "train/commands.h"

#define S        struct mt_inspect_options
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "Options",
     MT_ROW_MODEL(S, "Checkpoint directory; the flag's name may be left out."),
     .required = true},
    {.flag = "tensors",
     .type = MT_OPT_FLAG,
     .offset = AT(tensors),
     .help = "List every tensor: name, shape, format, file."},
    {.flag = "train",
     .type = MT_OPT_FLAG,
     .offset = AT(train),
     .help = "Show the memory that training takes, to the byte, by what it holds. The options "
             "below decide it, as they do in `moetune train`."},
    {.group = "With --train",
     .flag = "batch-size",
     .type = MT_OPT_INT,
     .offset = AT(batch_size),
     .unit = "SAMPLES",
     .initial = "8",
     .min = 1,
     .max = 65536,
     .help = "Samples packed into one micro-batch of a rank."},
    MT_ROW_MAX_SEQ_LENGTH(S, "512"),
    MT_ROWS_DEVICE(S),
    MT_ROW_OPTIM_STATE(S),
    MT_ROW_EXPERTS(S, .initial = "grouped"),
    MT_ROW_BLOCKS(S, .initial = "fused"),
    MT_ROW_RECOMPUTE(S),
    MT_ROW_FREEZE(S),
    MT_ROW_ROUTER_AUX_COEF(S),
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  const S *o = options;
  (void)parsed;
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

static mt_err run(const void *options) {
  return mt_inspect_run(options);
}

const struct mt_command mt_command_inspect = {
    .name = "inspect",
    .summary = "shows what a checkpoint holds and what training it takes",
    .usage = "MODEL [options]",
    .description = "Prints a checkpoint's sizes, its parameters by kind, its layout, its number "
                   "formats and its tokenizer. Reads no weights.",
    .examples = "  moetune inspect mixtral\n"
                "  moetune inspect mixtral --tensors\n"
                "  moetune inspect mixtral --train --batch-size 4 --max-seq-length 2048\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .positional = "model",
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
};
