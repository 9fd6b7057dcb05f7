#include "cli/commands.h"
#include "train/commands.h"

#define S        struct mt_bench_options
#define AT(name) offsetof(S, name)
#define SIZE(name, field, value, most, text)                                                       \
  {                                                                                                \
    .flag = name, .type = MT_OPT_INT, .offset = AT(field), .unit = "COUNT", .initial = value,      \
    .min = 1, .max = most, .help = text,                                                           \
  }

static const struct mt_option rows[] = {
    {.group = "What is measured",
     .flag = "cpu",
     .type = MT_OPT_FLAG,
     .offset = AT(cpu),
     .help = "The same as --device cpu."},
    {.flag = "warmup-steps",
     .type = MT_OPT_INT64,
     .offset = AT(warmup_steps),
     .unit = "STEPS",
     .initial = "2",
     .min = 0,
     .max = 1e9,
     .help = "Steps before the measured ones."},
    {.flag = "train-steps",
     .type = MT_OPT_INT64,
     .offset = AT(train_steps),
     .unit = "STEPS",
     .initial = "10",
     .min = 1,
     .max = 1e9,
     .help = "Steps measured; the median counts."},
    {.flag = "batch-size",
     .type = MT_OPT_INT,
     .offset = AT(batch_size),
     .unit = "SAMPLES",
     .initial = "4",
     .min = 1,
     .max = 65536,
     .help = "Samples of a step."},
    {.flag = "max-seq-length",
     .type = MT_OPT_INT,
     .offset = AT(max_seq_length),
     .unit = "TOKENS",
     .initial = "256",
     .min = 2,
     .max = 1048576,
     .help = "Length of every sample."},
    MT_ROWS_DEVICE(S),
    MT_ROW_OPTIM_STATE(S),
    MT_ROW_GRAPHS(S),
    MT_ROW_EXPERTS(S, .initial = "grouped"),
    MT_ROW_BLOCKS(S, .initial = "fused"),
    {.flag = "ops",
     .type = MT_OPT_FLAG,
     .offset = AT(ops),
     .help = "Add a table of the operations, each timed on its own in further steps: time, rate, "
             "share of the step, and time over the floor that the measured ceilings give."},
    MT_ROW_RECOMPUTE(S),
    MT_ROW_SEED(S, "Decides weights and tokens."),
    MT_ROW_JSON(S),
    {.group = "The model's sizes",
     .flag = "hidden",
     .type = MT_OPT_INT,
     .offset = AT(hidden),
     .unit = "COUNT",
     .initial = "512",
     .min = 2,
     .max = 65536,
     .help = "Hidden size."},
    SIZE("ffn", ffn, "1792", 262144, "Inner size of an expert."),
    SIZE("layers", layers, "4", MT_MAX_LAYERS, "Layers."),
    SIZE("heads", heads, "8", 1024, "Query heads."),
    SIZE("kv-heads", kv_heads, "2", 1024, "Key and value heads."),
    SIZE("expert-count", expert_count, "8", MT_MAX_EXPERTS, "Experts of a layer."),
    SIZE("top-k", top_k, "2", MT_MAX_TOP_K, "Experts that a token goes to."),
    SIZE("vocab", vocab, "4096", 16777216, "Vocabulary."),
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  S *o = options;
  if (o->cpu && mt_parsed_given(parsed, "device") && strcmp(o->device.device, "cpu") != 0) {
    return mt_fail(MT_EINVAL, "--cpu and --device %s", o->device.device);
  }
  if (o->cpu) o->device.device = "cpu";
  if (o->heads % o->kv_heads) {
    return mt_fail(MT_EINVAL, "--heads %d is no multiple of --kv-heads %d", o->heads, o->kv_heads);
  }
  if (o->hidden % o->heads || o->hidden / o->heads % 2) {
    return mt_fail(MT_EINVAL, "--hidden %d over --heads %d must be an even whole number", o->hidden,
                   o->heads);
  }
  if (o->top_k > o->expert_count) {
    return mt_fail(MT_EINVAL, "--top-k %d is over --expert-count %d", o->top_k, o->expert_count);
  }
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

static mt_err run(const void *options) {
  return mt_bench_run(options);
}

const struct mt_command mt_command_bench = {
    .name = "bench",
    .summary = "measures a training step beside the bare matrix product",
    .usage = "[--cpu] [options]",
    .description = "Trains a model of random weights on random tokens and prints tokens and "
                   "floating-point operations a second, and beside it the rate that a dense "
                   "product alone reaches: oneDNN's sgemm on the same threads, or 8192 cubed on "
                   "a GPU.",
    .examples = "  moetune bench --cpu\n"
                "  moetune bench --hidden 1024 --ffn 3584 --layers 2 --experts loop\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
};
