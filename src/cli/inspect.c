#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "cli/commands.h"
#include "cli/ranks.h"
#include "train/commands.h"

#define S        struct mt_inspect_options
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "Options",
     .flag = "path",
     .type = MT_OPT_TEXT,
     .offset = AT(path),
     .unit = "PATH",
     .help = "A checkpoint directory (or the config.json in it), or a data file; the flag's name "
             "may be left out."},
    {MT_ROW_MODEL(S, "With a data file: the checkpoint directory whose config.json, tokenizer and "
                     "chat template read it. Without one the same as PATH.")},
    {.group = "Of a checkpoint",
     .flag = "tensors",
     .type = MT_OPT_FLAG,
     .offset = AT(tensors),
     .help = "List every tensor with its file, not one line for those that differ in their numbers "
             "alone."},
    {MT_ROW_VERIFY(S, "Compare the files with moetune-checksums.json, however long they take to "
                      "read, and exit with status 1 where one differs or there is no list. "
                      "Otherwise files of at most 4 GB in all are compared, to tell.")},
    {.flag = "norms",
     .type = MT_OPT_FLAG,
     .offset = AT(norms),
     .help = "Show the norm of every expert's weights, however long they take to read. Otherwise "
             "norms are shown where there are at most a billion weights in the experts, and for "
             "each expert where a layer has at most 16."},
    {.flag = "train",
     .type = MT_OPT_FLAG,
     .offset = AT(train),
     .help = "Show the memory that training takes, to the byte, by what it holds. The options "
             "below decide it, as they do in `moetune train`. A config.json alone will do."},
    {.flag = "mesh",
     .type = MT_OPT_INT,
     .offset = AT(mesh),
     .unit = "RANKS",
     .initial_note = "none",
     .min = 0,
     .max = 65536,
     .help = "Show which of so many ranks would hold which layers and experts, with --ep-size; and "
             "with --train the memory of one."},
    {.flag = "ep-size",
     .type = MT_OPT_INT,
     .offset = AT(ep_size),
     .unit = "RANKS",
     .initial = "1",
     .min = 1,
     .max = 65536,
     .help = "With --mesh: ranks over which the experts of a layer are spread."},
    MT_ROW_EP_CHUNKS(S),
    MT_ROW_DISPATCH_PRECISION(S),
    {.flag = "pp-size",
     .type = MT_OPT_INT,
     .offset = AT(pp_size),
     .unit = "STAGES",
     .initial = "1",
     .min = 1,
     .max = 65536,
     .help = "With --mesh: stages that the layers are cut into."},
    MT_ROW_ZERO(S),
    {.group = "Of a data file",
     .flag = "samples",
     .type = MT_OPT_INT,
     .offset = AT(samples),
     .unit = "SAMPLES",
     .initial = "3",
     .min = 0,
     .max = 1000000,
     .help = "First samples to show as the model reads them, with what is learned marked."},
    {.flag = "color",
     .type = MT_OPT_CHOICE,
     .offset = AT(color),
     .unit = "WHEN",
     .choices = "auto|always|never",
     .initial = "auto",
     .help = "Whether what is learned is marked by colour or by brackets. auto: by colour on a "
             "terminal, unless NO_COLOR is set."},
    MT_ROW_TRAIN_ON_PROMPT(S),
    MT_ROW_SKIP_BAD_LINES(S),
    MT_ROWS_CACHE(S),
    {.group = "With --train, and of a data file",
     .flag = "batch-size",
     .type = MT_OPT_INT,
     .offset = AT(batch_size),
     .unit = "SAMPLES",
     .initial = "8",
     .min = 1,
     .max = 65536,
     .help = "Samples packed into one micro-batch of a rank."},
    MT_ROW_MAX_SEQ_LENGTH(S, "512"),
    MT_ROW_CHAT_TEMPLATE(S),
    MT_ROWS_DEVICE(S),
    MT_ROW_OPTIM_STATE(S),
    MT_ROW_EXPERTS(S, .initial = "grouped"),
    MT_ROW_BLOCKS(S, .initial = "fused"),
    MT_ROW_RECOMPUTE(S),
    MT_ROW_FREEZE(S),
    MT_ROW_ROUTER_AUX_COEF(S),
};

/* DIR of DIR/config.json; NULL for any other path. */
static mt_err config_dir(const char *path, struct mt_parsed *p, const char **dir) {
  static const char name[] = "config.json";
  size_t length = strlen(path), n = sizeof name - 1;
  *dir = NULL;
  if (length < n || strcmp(path + length - n, name) != 0) return MT_OK;
  size_t begin = length - n;
  if (begin == 0) return mt_parsed_keep_text(p, ".", 1, dir);
  if (path[begin - 1] != '/') return MT_OK;
  return mt_parsed_keep_text(p, path, begin > 1 ? begin - 1 : 1, dir);
}

/* What the path is: a directory is a checkpoint, a file is data. One that is not there is taken for
 * what is still wanted, and its absence reported by who opens it. */
static mt_err sort_path(S *o, struct mt_parsed *p) {
  struct stat st;
  const char *dir;
  MT_TRY(config_dir(o->path, p, &dir));
  bool there = stat(o->path, &st) == 0;
  bool checkpoint = dir || (there ? S_ISDIR(st.st_mode) : !o->model);
  if (!checkpoint && !o->model) {
    return mt_fail(MT_EINVAL, "'%s' is a data file: --model DIR says whose tokenizer reads it",
                   o->path);
  }
  if (checkpoint && o->model) {
    return mt_fail(MT_EINVAL, "two checkpoints, '%s' and --model %s", o->path, o->model);
  }
  if (checkpoint)
    o->model = dir ? dir : o->path;
  else
    o->data = o->path;
  return MT_OK;
}

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  S *o = options;
  if (!o->path && !o->model) return mt_fail(MT_EINVAL, "a checkpoint or a data file is required");
  if (o->path) MT_TRY(sort_path(o, (struct mt_parsed *)(uintptr_t)parsed));
  if (o->data && o->train) {
    return mt_fail(MT_EINVAL, "--train goes with a checkpoint, not with a data file");
  }
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

static mt_err run(const void *options) {
  return mt_inspect_run(options);
}

const struct mt_command mt_command_inspect = {
    .name = "inspect",
    .summary = "shows what a checkpoint or a data file holds",
    .usage = "MODEL | DATA --model MODEL [options]",
    .description =
        "Of a checkpoint: its sizes, its tokenizer, whether it can be trained or why not, its "
        "parameters by kind, its shards, tensors and number formats, and the norms of its experts' "
        "weights. The exit status is 1 where it cannot be trained. A directory that holds "
        "config.json alone is shown as far as it goes.\n\n"
        "Of a data file: how long its samples are, how many are cut, how well they pack into "
        "batches, and the first of them as the model reads them, with what is learned marked.",
    .examples =
        "  moetune inspect mixtral\n"
        "  moetune inspect mixtral --tensors\n"
        "  moetune inspect mixtral --train --batch-size 4 --max-seq-length 2048\n"
        "  moetune inspect train.jsonl --model mixtral --samples 10 --color always | less -R\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .positional = "path",
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
};
