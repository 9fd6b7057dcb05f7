#include "train/ladder.h"

#include <stdio.h>

#include "cli/commands.h"
#include "cli/ranks.h"
#include "report/chart.h"

#define S        struct mt_ladder_options
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "What is trained",
     .flag = "model",
     .type = MT_OPT_TEXT,
     .offset = AT(model),
     .unit = "DIR",
     .help = "The checkpoint directory; the flag's name may be left out."},
    {.flag = "random",
     .type = MT_OPT_TEXT,
     .offset = AT(random),
     .unit = "CONFIG",
     .help = "In its place a config.json, under any name, or a directory that holds one: the "
             "weights are random."},
    {.flag = "layers",
     .type = MT_OPT_INT,
     .offset = AT(layers),
     .unit = "COUNT",
     .initial = "0",
     .initial_note = "as many as the config says",
     .min = 0,
     .max = MT_MAX_LAYERS,
     .help = "With --random: layers, fewer than the config's."},
    MT_ROW_BATCH_SIZE(S, "1"),
    {.flag = "max-seq-length",
     .type = MT_OPT_INT,
     .offset = AT(max_seq_length),
     .unit = "TOKENS",
     .initial = "512",
     .min = 2,
     .max = 1048576,
     .help = "Length of every sample; its tokens are random."},
    {.flag = "warmup-steps",
     .type = MT_OPT_INT64,
     .offset = AT(warmup_steps),
     .unit = "STEPS",
     .initial = "3",
     .min = 0,
     .max = 1e9,
     .help = "Steps of each rung before the measured ones."},
    {.flag = "train-steps",
     .type = MT_OPT_INT64,
     .offset = AT(train_steps),
     .unit = "STEPS",
     .initial = "10",
     .min = 1,
     .max = 1e9,
     .help = "Steps of each rung that are measured; the median counts."},
    MT_ROWS_RANKS(S, ),
    MT_ROWS_DEVICE(S),
    MT_ROW_OPTIM_STATE(S),
    MT_ROW_GRAPHS(S),
    MT_ROW_RECOMPUTE(S),
    MT_ROW_SEED(S, "Decides tokens and random weights."),
    {.group = "What is shown",
     .flag = "ops",
     .type = MT_OPT_FLAG,
     .offset = AT(ops),
     .help = "Add a table of the operations of each rung, rank 0's, timed one by one in further "
             "steps, as `moetune bench --ops` does."},
    {.flag = "svg",
     .type = MT_OPT_TEXT,
     .offset = AT(svg),
     .unit = "FILE",
     .help = "A chart of the rungs' steps, as bars."},
    MT_ROW_JSON(S),
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  const S *o = options;
  (void)parsed;
  if (!o->model && !o->random)
    return mt_fail(MT_EINVAL, "a checkpoint (--model) or a config (--random) is required");
  if (o->model && o->random) {
    return mt_fail(MT_EINVAL, "--model %s and --random %s: one of them", o->model, o->random);
  }
  if (o->ops && o->json) return mt_fail(MT_EINVAL, "--ops is a table: it does not go with --json");
  if (o->layers && !o->random) return mt_fail(MT_EINVAL, "--layers goes with --random");
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

static mt_err draw(const S *o, const struct mt_ladder *l) {
  struct mt_bar bars[MT_LADDER_RUNGS];
  char title[256], label[MT_LADDER_RUNGS][96], text[MT_LADDER_RUNGS][96];
  int n = 0;
  for (int i = 0; i < l->count; i++) {
    const struct mt_rung *r = &l->rung[i];
    if (!r->ran) continue;
    snprintf(label[n], sizeof label[n], "%d: %s", r->number, r->what);
    int end = snprintf(text[n], sizeof text[n], "%.4g ms, %s", r->ms, r->precision);
    if (n > 0)
      snprintf(text[n] + end, sizeof text[n] - (size_t)end, ", %.2fx", mt_ladder_speedup(l, r));
    bars[n] = (struct mt_bar){.label = label[n], .text = text[n], .value = r->ms};
    n++;
  }
  snprintf(title, sizeof title,
           "A step of %d x %d x %d tokens: hidden %d, ffn %d, %d experts, %d layers, %s", l->ranks,
           o->batch_size, o->max_seq_length, l->config.hidden, l->config.ffn, l->config.experts,
           l->config.layers, l->device);
  return mt_bars_write(o->svg, title, bars, n);
}

static mt_err run_rank(const void *options, struct mt_world *world) {
  S o = *(const S *)options;
  struct mt_ladder l;
  o.world = world;
  MT_TRY(mt_ladder_run(&o, &l));
  if (world->rank != 0) return MT_OK;
  MT_TRY(mt_ladder_print(&o, &l));
  return o.svg ? draw(&o, &l) : MT_OK;
}

static mt_err run(const void *options) {
  const S *o = options;
  return mt_run_on_ranks(&mt_command_ladder, options, o->comm_timeout_s, run_rank);
}

const struct mt_command mt_command_ladder = {
    .name = "ladder",
    .summary = "runs every way of training on the same work and compares them",
    .usage = "MODEL | --random CONFIG [options]",
    .description =
        "Trains the same model on the same random tokens on each rung of --improvement that this "
        "machine has, one after another, and prints the time of a step, the speed-up over the "
        "lowest rung, tokens and model FLOPs a second, and rank 0's time by phases. Nothing is "
        "written but the chart.\n\n"
        "Started by mpirun or srun, the ranks climb together: rung 0 has the layers in sequence "
        "over them, the others share experts as --ep-size says. --batch-size is of a rank, so "
        "that every rung trains on as many tokens.",
    .examples = "  moetune ladder models/tiny\n"
                "  moetune ladder --random mixtral/config.json --layers 2 --batch-size 2 "
                "--max-seq-length 8192 --optim-state bf16 --svg ladder.svg\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .positional = "model",
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
    .on_ranks = true,
};
