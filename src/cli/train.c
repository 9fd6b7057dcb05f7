#include "base/log.h"
#include "cli/commands.h"
#include "cli/ranks.h"
#include "train/session.h"
#include "report/report.h"
#include "train/commands.h"

struct train_flags {
  struct mt_train_options run; /* first: run() gets its address */
  bool report;
};

#define S        struct mt_train_options
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "Input and output",
     MT_ROW_MODEL(S, "Checkpoint directory to start from: "
                     "config.json, *.safetensors, tokenizer."),
     .required = true},
    {.flag = "data",
     .type = MT_OPT_TEXT,
     .offset = AT(data),
     .unit = "FILE",
     .required = true,
     .help = "Training samples as JSON lines: {\"text\"}, {\"prompt\", \"completion\"}, "
             "{\"instruction\", \"input\", \"output\"} or {\"messages\": [{\"role\", "
             "\"content\"}]}."},
    {.flag = "eval-data",
     .type = MT_OPT_TEXT,
     .offset = AT(eval_data),
     .unit = "FILE",
     .initial_note = "none",
     .help = "Held-out samples, in the same forms."},
    {.flag = "out",
     .type = MT_OPT_TEXT,
     .offset = AT(out),
     .unit = "DIR",
     .required = true,
     .help = "Run directory to make: model/ (the fine-tuned checkpoint), metrics.jsonl and the "
             "checkpoints of --save-every."},
    {.flag = "resume",
     .type = MT_OPT_OPTIONAL,
     .offset = AT(resume),
     .unit = "DIR",
     .initial_note = "a fresh run",
     .help = "Go on from a checkpoint of an earlier run, bit for bit as if it had not stopped; "
             "without DIR from the newest under --out."},
    MT_ROW_MAX_SHARD_SIZE(S, max_shard_bytes),
    MT_ROW_CHAT_TEMPLATE(S),
    MT_ROW_TRAIN_ON_PROMPT(S),
    MT_ROW_SKIP_BAD_LINES(S),
    MT_ROWS_CACHE(S),

    {.group = "Length of the run",
     .flag = "warmup-steps",
     .type = MT_OPT_INT64,
     .offset = AT(warmup_steps),
     .unit = "STEPS",
     .initial = "5",
     .min = 0,
     .max = 1e12,
     .help = "First steps, over which the learning rate rises. They come before --train-steps and "
             "stay out of the median step time."},
    {.flag = "train-steps",
     .type = MT_OPT_INT64,
     .offset = AT(train_steps),
     .unit = "STEPS",
     .initial = "0",
     .initial_note = "0 (as many as --epochs gives)",
     .min = 0,
     .max = 1e12,
     .help = "Steps after the warm-up."},
    {.flag = "epochs",
     .type = MT_OPT_REAL,
     .offset = AT(epochs),
     .unit = "PASSES",
     .initial = "1",
     .min = 0,
     .max = 1e6,
     .above_min = true,
     .help = "Passes over the data, warm-up included, where --train-steps is 0. A fraction will "
             "do."},
    MT_ROW_BATCH_SIZE(S, "8"),
    {.flag = "grad-accum",
     .type = MT_OPT_INT,
     .offset = AT(grad_accum),
     .unit = "MICRO-BATCHES",
     .initial = "1",
     .min = 1,
     .max = 65536,
     .help = "Micro-batches whose gradients make one step, weighted by their target tokens."},
    {.flag = "micro-batches",
     .type = MT_OPT_INT,
     .offset = AT(grad_accum),
     .unit = "MICRO-BATCHES",
     .initial = "1",
     .min = 1,
     .max = 65536,
     .help = "Another name of --grad-accum: what is under way in the stages of --pp-size."},
    MT_ROW_MAX_SEQ_LENGTH(S, "512"),
    MT_ROW_SEED(S, "Decides the order of samples. The same seed gives the same run."),

    {.group = "Optimizer (AdamW)",
     .flag = "lr",
     .type = MT_OPT_REAL,
     .offset = AT(lr),
     .unit = "RATE",
     .initial = "2e-5",
     .min = 0,
     .max = 1e3,
     .above_min = true,
     .help = "Peak learning rate."},
    {.flag = "lr-schedule",
     .type = MT_OPT_CHOICE,
     .offset = AT(lr_schedule),
     .unit = "SHAPE",
     .choices = "linear|cosine|constant",
     .initial = "cosine",
     .help = "Course of the learning rate after the warm-up; the first two end at 0."},
    {.flag = "weight-decay",
     .type = MT_OPT_REAL,
     .offset = AT(weight_decay),
     .unit = "FACTOR",
     .initial = "0",
     .min = 0,
     .max = 1e3,
     .help = "Decoupled decay of matrices, times the learning rate; norms never decay."},
    {.flag = "adam-beta1",
     .type = MT_OPT_REAL,
     .offset = AT(adam_beta1),
     .unit = "FACTOR",
     .initial = "0.9",
     .min = 0,
     .max = 0.9999999,
     .help = "Decay of the first moment."},
    {.flag = "adam-beta2",
     .type = MT_OPT_REAL,
     .offset = AT(adam_beta2),
     .unit = "FACTOR",
     .initial = "0.999",
     .min = 0,
     .max = 0.9999999,
     .help = "Decay of the second moment."},
    {.flag = "adam-eps",
     .type = MT_OPT_REAL,
     .offset = AT(adam_eps),
     .unit = "NUMBER",
     .initial = "1e-8",
     .min = 0,
     .max = 1,
     .above_min = true,
     .help = "Added to the root of the second moment."},
    {.flag = "grad-clip",
     .type = MT_OPT_REAL,
     .offset = AT(grad_clip),
     .unit = "NORM",
     .initial = "1",
     .min = 0,
     .max = 1e30,
     .help = "Gradients are scaled down to this global L2 norm; 0 leaves them as they are."},
    MT_ROW_ROUTER_AUX_COEF(S),
    MT_ROW_ROUTER_Z_LOSS(S),
    MT_ROW_FREEZE(S),

    {.group = "How it is computed",
     .flag = "improvement",
     .type = MT_OPT_INT,
     .offset = AT(improvement),
     .unit = "RUNG",
     .initial = "2",
     .min = 0,
     .max = 3,
     .help = "Preset of --experts, --blocks, --pp-schedule and --precision. 0: loop, unfused, "
             "stages in sequence; 1: loop, fused; 2: grouped, fused; 3: fused, fused, in mxfp8 on "
             "Blackwell and the CPU, in fp8 on other GPUs. A flag given beside it wins."},
    MT_ROW_EXPERTS(S, .initial_note = "by --improvement"),
    MT_ROW_BLOCKS(S, .initial_note = "by --improvement"),
    MT_ROW_RECOMPUTE(S),
    MT_ROWS_DEVICE(S),
    MT_ROW_OPTIM_STATE(S),
    MT_ROW_GRAPHS(S),
    MT_ROWS_RANKS(S, ),
    MT_ROW_EP_CHUNKS(S),
    MT_ROW_DISPATCH_PRECISION(S),
    {.flag = "pp-schedule",
     .type = MT_OPT_CHOICE,
     .offset = AT(pp_schedule),
     .unit = "ORDER",
     .choices = "1f1b|sequential",
     .initial = "1f1b",
     .initial_note = "1f1b; sequential with --improvement 0",
     .help = "Order of the stages' work: one forward and one backward by turns, with up to "
             "--pp-size micro-batches under way; or one micro-batch at a time."},
    MT_ROW_ZERO(S),
    {.flag = "dry-run",
     .type = MT_OPT_FLAG,
     .offset = AT(dry_run),
     .help = "Show which rank would hold what and the memory of each, to the byte, and end: "
             "nothing is read of the weights and nothing is written."},

    {.group = "Reports and checkpoints",
     .flag = "log-every",
     .type = MT_OPT_INT64,
     .offset = AT(log_every),
     .unit = "STEPS",
     .initial = "10",
     .min = 1,
     .max = 1e12,
     .help = "Steps between lines where standard error is no terminal (a terminal shows a "
             "progress bar), and between the points where the run waits for a GPU."},
    {.flag = "eval-every",
     .type = MT_OPT_INT64,
     .offset = AT(eval_every),
     .unit = "STEPS",
     .initial = "0",
     .initial_note = "0 (before the first step and after the last)",
     .min = 0,
     .max = 1e12,
     .help = "Steps between evaluations of --eval-data and samples."},
    {.flag = "patience",
     .type = MT_OPT_INT,
     .offset = AT(patience),
     .unit = "EVALUATIONS",
     .initial = "0",
     .initial_note = "0 (never)",
     .min = 0,
     .max = 1e9,
     .help = "Stop early once so many evaluations in a row have not improved the held-out loss."},
    {.flag = "min-delta",
     .type = MT_OPT_REAL,
     .offset = AT(min_delta),
     .unit = "NATS",
     .initial = "0",
     .min = 0,
     .max = 1e6,
     .help = "What the held-out loss must fall by to count as improved."},
    {.flag = "keep-best",
     .type = MT_OPT_FLAG,
     .offset = AT(keep_best),
     .help = "Keep the model of the lowest held-out loss in best/ of --out, as a checkpoint like "
             "model/."},
    {.flag = "samples",
     .type = MT_OPT_INT,
     .offset = AT(samples),
     .unit = "QUESTIONS",
     .initial = "2",
     .min = 0,
     .max = 64,
     .help = "Questions of --eval-data that the model answers at each evaluation, into "
             "samples.jsonl."},
    {.flag = "sample-prompt",
     .type = MT_OPT_LIST,
     .offset = AT(sample_prompts),
     .unit = "TEXT",
     .help = "A user's message to answer at each evaluation, in place of those of --samples."},
    {.flag = "sample-tokens",
     .type = MT_OPT_INT,
     .offset = AT(sample_tokens),
     .unit = "TOKENS",
     .initial = "48",
     .min = 1,
     .max = 4096,
     .help = "Longest of these answers."},
    {.flag = "dead-expert-steps",
     .type = MT_OPT_INT64,
     .offset = AT(dead_expert_steps),
     .unit = "STEPS",
     .initial = "100",
     .min = 0,
     .max = 1e12,
     .help = "Warn of an expert that no token has reached in so many steps; 0 never does."},
    {.flag = "tensorboard",
     .type = MT_OPT_FLAG,
     .offset = AT(tensorboard),
     .help = "Write TensorBoard's event files into --out too."},
    {.flag = "report",
     .type = MT_OPT_FLAG,
     .offset = offsetof(struct train_flags, report),
     .initial = "true",
     .initial_note = "report",
     .help = "Do not write report.html, the run as a page to look at, at its end. `moetune report "
             "--watch` shows a run as it goes."},
    {.flag = "save-every",
     .type = MT_OPT_INT64,
     .offset = AT(save_every),
     .unit = "STEPS",
     .initial = "0",
     .initial_note = "0 (none)",
     .min = 0,
     .max = 1e12,
     .help =
         "Steps between checkpoints that --resume can go on from; the last step makes one too."},
    {.flag = "keep-last",
     .type = MT_OPT_INT,
     .offset = AT(keep_last),
     .unit = "CHECKPOINTS",
     .initial = "0",
     .initial_note = "0 (all)",
     .min = 0,
     .max = 1e9,
     .help = "Keep only so many of these, the newest."},
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  S *o = options;
  if (!mt_parsed_given(parsed, "experts")) {
    static const enum mt_experts_strategy rung[] = {MT_EXPERTS_LOOP, MT_EXPERTS_LOOP,
                                                    MT_EXPERTS_GROUPED, MT_EXPERTS_FUSED};
    o->experts = rung[o->improvement];
  }
  if (o->improvement >= 3 && !o->device.precision)
    o->device.precision = mt_device_eight_bits(&o->device);
  if (!mt_parsed_given(parsed, "blocks")) {
    o->blocks = o->improvement >= 1 ? MT_BLOCKS_FUSED : MT_BLOCKS_UNFUSED;
  }
  if (!mt_parsed_given(parsed, "pp-schedule") && o->improvement == 0) {
    o->pp_schedule = MT_PP_SEQUENTIAL;
  }
  if (mt_parsed_given(parsed, "grad-accum") && mt_parsed_given(parsed, "micro-batches")) {
    return mt_fail(MT_EINVAL, "--grad-accum and --micro-batches are one option: give either");
  }
  if (o->patience > 0 && (!o->eval_data || o->eval_every == 0)) {
    return mt_fail(MT_EINVAL, "--patience needs --eval-data and --eval-every");
  }
  if (o->keep_best && !o->eval_data) return mt_fail(MT_EINVAL, "--keep-best needs --eval-data");
  if (o->train_steps > 0 && mt_parsed_given(parsed, "epochs")) {
    return mt_fail(MT_EINVAL, "--epochs and --train-steps exclude each other");
  }
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

/* The page tells of a run that failed too, and its own failure is not the run's. */
static mt_err run_rank(const void *options, struct mt_world *world) {
  const struct train_flags *flags = options;
  struct mt_train_options o = flags->run;
  char why[1024], page[MT_PATH_MAX];
  bool recorded;
  o.world = world;
  o.recorded = &recorded;
  mt_err err = mt_train_run(&o);
  if (!flags->report || !recorded || world->rank != 0) return err;
  snprintf(why, sizeof why, "%s", mt_error_message());
  const char *dirs[] = {o.out};
  struct mt_report_options report = {.dirs = dirs, .dir_count = 1};
  if (mt_report_write(&report, page))
    mt_warn("no report: %s", mt_error_message());
  else
    mt_info("report   %s", page);
  return err ? mt_fail(err, "%s", why) : MT_OK;
}

static mt_err run(const void *options) {
  const struct train_flags *flags = options;
  return mt_run_on_ranks(&mt_command_train, options, flags->run.comm_timeout_s, run_rank);
}

const struct mt_command mt_command_train = {
    .name = "train",
    .summary = "fine-tunes a checkpoint on JSON lines",
    .usage = "--model DIR --data FILE --out DIR [options]",
    .description =
        "Fine-tunes a Mixtral checkpoint and writes one in the same format. Samples are packed "
        "into rows without seeing each other; the loss is the mean cross-entropy of the answers' "
        "tokens.\n\n"
        "Started by mpirun or srun, its ranks train one model together: --ep-size of them share "
        "a layer's experts, and each reads --batch-size samples of its own; --pp-size cuts the "
        "layers into stages.\n\n"
        "A run is --warmup-steps plus --train-steps optimizer steps. It ends with the number of "
        "steps and their median time. An interrupted run goes on with --resume.",
    .examples = "  moetune train --model mixtral --data train.jsonl --out runs/first\n"
                "  moetune train --config run.yaml --lr 1e-5 --resume\n"
                "  moetune train --model mixtral --data train.jsonl --out runs/head \\\n"
                "    --freeze 'model.layers.*' --train-steps 100\n"
                "  mpirun -n 8 moetune train --model mixtral --data train.jsonl --out runs/eight "
                "\\\n"
                "    --ep-size 2 --batch-size 12\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .options_bytes = sizeof(struct train_flags),
    .finish = finish,
    .run = run,
    .on_ranks = true,
};
