#include "cli/commands.h"
#include "cli/ranks.h"
#include "train/commands.h"

struct generate_flags {
  struct mt_generate_options run; /* first: run() gets its address */
  bool greedy;
};

#define S        struct mt_generate_options
#define AT(name) offsetof(struct generate_flags, name)

static const struct mt_option rows[] = {
    {.group = "Options", MT_ROW_MODEL(S, "Checkpoint directory."), .required = true},
    {.flag = "prompt",
     .type = MT_OPT_TEXT,
     .offset = AT(run.prompt),
     .unit = "TEXT",
     .initial_note = "standard input",
     .help = "Text to go on from; with --chat the user's message. A chat without it is a "
             "conversation, one message a line."},
    {.flag = "chat",
     .type = MT_OPT_FLAG,
     .offset = AT(run.chat),
     .help = "Wrap messages in the model's chat template."},
    {.flag = "system",
     .type = MT_OPT_TEXT,
     .offset = AT(run.system),
     .unit = "TEXT",
     .initial_note = "none",
     .help = "System message of a chat."},
    MT_ROW_CHAT_TEMPLATE(S),
    {.flag = "max-new-tokens",
     .type = MT_OPT_INT,
     .offset = AT(run.max_new_tokens),
     .unit = "TOKENS",
     .initial = "256",
     .min = 1,
     .max = 1048576,
     .help = "Longest answer."},
    {.flag = "temperature",
     .type = MT_OPT_REAL,
     .offset = AT(run.temperature),
     .unit = "NUMBER",
     .initial = "0.7",
     .min = 0,
     .max = 100,
     .help = "Divides the logits before a token is drawn; 0 takes the likeliest."},
    {.flag = "top-p",
     .type = MT_OPT_REAL,
     .offset = AT(run.top_p),
     .unit = "PROBABILITY",
     .initial = "0.95",
     .min = 0,
     .max = 1,
     .above_min = true,
     .help = "Draw among the likeliest tokens that together reach this probability."},
    {.flag = "greedy",
     .type = MT_OPT_FLAG,
     .offset = AT(greedy),
     .help = "Take the likeliest token: --temperature 0."},
    MT_ROW_SEED(S, "Decides the tokens drawn."),
    {.flag = "stop",
     .type = MT_OPT_LIST,
     .offset = AT(run.stop),
     .unit = "TEXT",
     .help = "Ends the answer where it appears; not printed."},
    {.flag = "stream",
     .type = MT_OPT_FLAG,
     .offset = AT(run.stream),
     .initial = "true",
     .initial_note = "stream",
     .help = "Print the answer at once when it is complete, not token by token."},
    MT_ROWS_DEVICE(S),
    MT_ROWS_RANKS(struct generate_flags, run.),
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  struct generate_flags *f = options;
  if (f->greedy && mt_parsed_given(parsed, "temperature") && f->run.temperature > 0) {
    return mt_fail(MT_EINVAL, "--greedy and --temperature %g exclude each other",
                   f->run.temperature);
  }
  if (f->greedy) f->run.temperature = 0;
  if (!f->run.chat && f->run.system) return mt_fail(MT_EINVAL, "--system needs --chat");
  return MT_OK;
}

static mt_err run_rank(const void *options, struct mt_world *world) {
  S o = ((const struct generate_flags *)options)->run;
  o.world = world;
  return mt_generate_run(&o);
}

static mt_err run(const void *options) {
  const struct generate_flags *f = options;
  return mt_run_on_ranks(&mt_command_generate, options, f->run.comm_timeout_s, run_rank);
}

const struct mt_command mt_command_generate = {
    .name = "generate",
    .summary = "writes text with a checkpoint",
    .usage = "--model DIR [--prompt TEXT | --chat] [options]",
    .description = "Goes on from a prompt, or answers as in a chat, until the model ends its "
                   "answer, a --stop text appears or --max-new-tokens are written.",
    .examples = "  moetune generate --model mixtral --prompt 'Once upon a time'\n"
                "  moetune generate --model mixtral --chat\n"
                "  moetune generate --model mixtral --chat --prompt 'What is a kluge?' --greedy\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .options_bytes = sizeof(struct generate_flags),
    .finish = finish,
    .run = run,
    .on_ranks = true,
};
