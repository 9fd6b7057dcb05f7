#include <string.h>

#include "base/dtype.h"
#include "cli/commands.h"
#include "hf/checkpoint.h"

struct convert_options {
  const char *model, *out, *init;
  int layout, dtype; /* indices of the choices below */
  uint64_t max_shard_bytes, seed;
};

#define S        struct convert_options
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "Options", MT_ROW_MODEL(S, "Checkpoint directory to convert.")},
    {.flag = "out",
     .type = MT_OPT_TEXT,
     .offset = AT(out),
     .unit = "DIR",
     .required = true,
     .help = "Checkpoint directory to make; it appears whole or not at all."},
    {.flag = "layout",
     .type = MT_OPT_CHOICE,
     .offset = AT(layout),
     .unit = "LAYOUT",
     .choices = "keep|per-expert|packed",
     .initial = "keep",
     .help = "Names of the experts' weights: block_sparse_moe.experts.N.w1.weight and so on, or "
             "mlp.experts.gate_up_proj and down_proj for all of a layer."},
    {.flag = "dtype",
     .type = MT_OPT_CHOICE,
     .offset = AT(dtype),
     .unit = "FORMAT",
     .choices = "keep|fp32|bf16|fp16",
     .initial = "keep",
     .help = "Number format of all weights. keep leaves each tensor in its own; a fresh model is "
             "then fp32."},
    MT_ROW_MAX_SHARD_SIZE(S, max_shard_bytes),
    {.group = "A fresh model",
     .flag = "init",
     .type = MT_OPT_TEXT,
     .offset = AT(init),
     .unit = "CONFIG",
     .initial_note = "none",
     .help = "In place of --model: a config.json, or the directory it lies in, from which a model "
             "of random weights is made. The tokenizer files beside it are copied along."},
    MT_ROW_SEED(S, "Decides the random weights."),
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  const S *o = options;
  if (!o->model == !o->init) return mt_fail(MT_EINVAL, "one of --model and --init is required");
  if (o->init && mt_parsed_given(parsed, "layout")) {
    return mt_fail(MT_EINVAL, "--layout goes with --model; a fresh model is per-expert");
  }
  if (o->init && mt_parsed_given(parsed, "max-shard-size")) {
    return mt_fail(MT_EINVAL, "--max-shard-size goes with --model");
  }
  if (o->model && mt_parsed_given(parsed, "seed")) {
    return mt_fail(MT_EINVAL, "--seed goes with --init");
  }
  return MT_OK;
}

/* The directory of --init: PATH itself, or the one that a config.json lies in. */
static mt_err init_dir(const char *path, char *dir, size_t size_bytes) {
  static const char file[] = "config.json";
  size_t length = strlen(path), file_length = sizeof file - 1;
  if (length >= size_bytes) return mt_fail(MT_EINVAL, "--init: the path is too long");
  memcpy(dir, path, length + 1);
  if (length < file_length || strcmp(path + length - file_length, file) != 0) return MT_OK;
  size_t begin = length - file_length;
  if (begin == 0) {
    memcpy(dir, ".", 2);
  } else if (path[begin - 1] == '/') {
    dir[begin > 1 ? begin - 1 : 1] = 0;
  }
  return MT_OK;
}

static mt_err run(const void *options) {
  static const int layout[] = {MT_HF_KEEP, MT_HF_PER_EXPERT, MT_HF_PACKED};
  static const int dtype[] = {MT_HF_KEEP, MT_F32, MT_BF16, MT_F16};
  const S *o = options;
  if (o->init) {
    char dir[MT_PATH_MAX];
    MT_TRY(init_dir(o->init, dir, sizeof dir));
    return mt_hf_init(dir, o->out, o->seed, dtype[o->dtype]);
  }
  struct mt_hf_checkpoint source;
  MT_TRY(mt_hf_open(o->model, &source));
  const struct mt_hf_export_options export = {
      .layout = layout[o->layout],
      .dtype = dtype[o->dtype],
      .max_shard_bytes = o->max_shard_bytes,
  };
  mt_err err = mt_hf_export(&source, NULL, NULL, o->out, &export);
  mt_hf_close(&source);
  return err;
}

const struct mt_command mt_command_convert = {
    .name = "convert",
    .summary = "changes a checkpoint's layout or number format, or makes a fresh one",
    .usage = "--model DIR | --init CONFIG --out DIR [options]",
    .description = "Writes a checkpoint anew: experts' weights apart or packed, another number "
                   "format, other shards. Tensors whose format does not change keep their bytes; "
                   "config and tokenizer files are copied along.",
    .examples = "  moetune convert --model mixtral --out mixtral-packed --layout packed\n"
                "  moetune convert --model mixtral --out small --dtype bf16 --max-shard-size 2GB\n"
                "  moetune convert --init config.json --out fresh --seed 7 --dtype bf16\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
};
