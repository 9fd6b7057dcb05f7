#include "cli/commands.h"
#include "cli/ranks.h"
#include "train/commands.h"

#define S        struct mt_eval_options
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "Options", MT_ROW_MODEL(S, "Checkpoint directory."), .required = true},
    {.flag = "data",
     .type = MT_OPT_TEXT,
     .offset = AT(data),
     .unit = "FILE",
     .help = "Samples as JSON lines, in the forms of `moetune train`."},
    {MT_ROW_VERIFY(S, "Compare the checkpoint's files with its moetune-checksums.json first.")},
    MT_ROW_BATCH_SIZE(S, "8"),
    MT_ROW_MAX_SEQ_LENGTH(S, "512"),
    MT_ROW_TRAIN_ON_PROMPT(S),
    MT_ROW_SKIP_BAD_LINES(S),
    MT_ROWS_CACHE(S),
    MT_ROW_CHAT_TEMPLATE(S),
    MT_ROWS_DEVICE(S),
    MT_ROWS_RANKS(S, ),
    MT_ROW_JSON(S),
    {.group = "For comparison with other programs",
     .flag = "ids",
     .type = MT_OPT_TEXT,
     .offset = AT(ids),
     .unit = "IDS",
     .help = "Token ids such as 1,72,305, run as one sample in place of --data."},
    {.flag = "dump-logits",
     .type = MT_OPT_TEXT,
     .offset = AT(dump_logits),
     .unit = "FILE",
     .help = "With --ids: write their logits, float32 [tokens, vocabulary], to a safetensors "
             "file."},
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  const S *o = options;
  (void)parsed;
  if (!o->data == !o->ids) return mt_fail(MT_EINVAL, "one of --data and --ids is required");
  if (o->dump_logits && !o->ids) return mt_fail(MT_EINVAL, "--dump-logits needs --ids");
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

static mt_err run_rank(const void *options, struct mt_world *world) {
  S o = *(const S *)options;
  o.world = world;
  return mt_eval_run(&o);
}

static mt_err run(const void *options) {
  const S *o = options;
  return mt_run_on_ranks(&mt_command_eval, options, o->comm_timeout_s, run_rank);
}

const struct mt_command mt_command_eval = {
    .name = "eval",
    .summary = "measures a checkpoint's loss on JSON lines",
    .usage = "--model DIR --data FILE [options]",
    .description = "Prints the mean cross-entropy in nats a token, the perplexity and the share of "
                   "tokens guessed right, over the tokens that training would learn.",
    .examples = "  moetune eval --model mixtral --data heldout.jsonl\n"
                "  moetune eval --model runs/first/model --data heldout.jsonl --json\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
    .on_ranks = true,
};
