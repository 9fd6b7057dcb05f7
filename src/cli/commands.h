/* The commands' rows; one file each. */
#ifndef MT_CLI_COMMANDS_H
#define MT_CLI_COMMANDS_H

#include <float.h>

#include "cli/options.h"

extern const struct mt_command mt_command_train, mt_command_eval, mt_command_generate,
    mt_command_convert, mt_command_inspect, mt_command_bench, mt_command_report, mt_command_plan,
    mt_command_ladder, mt_command_completion, mt_command_man;

/* Rows that several commands share; S is the command's struct. */
#define MT_ROW_MODEL(S, text)                                                                      \
  .flag = "model", .type = MT_OPT_TEXT, .offset = offsetof(S, model), .unit = "DIR", .help = text
#define MT_ROWS_DEVICE(S)                                                                          \
  {.flag = "device",                                                                               \
   .type = MT_OPT_NAME,                                                                            \
   .offset = offsetof(S, device.device),                                                           \
   .unit = "DEVICE",                                                                               \
   .choices = "auto|cpu|cuda",                                                                     \
   .initial = "auto",                                                                              \
   .help = "Where it is computed. auto: on an NVIDIA GPU where there is one, else on the CPU."},   \
      {.flag = "kernels",                                                                          \
       .type = MT_OPT_NAME,                                                                        \
       .offset = offsetof(S, device.kernels),                                                      \
       .unit = "KIND",                                                                             \
       .choices = "native|portable",                                                               \
       .initial = "native",                                                                        \
       .help = "Kernels of a GPU: those made for its generation, or those that run on every one "  \
               "from compute capability 8.0 on."},                                                 \
      {.flag = "precision",                                                                        \
       .type = MT_OPT_NAME,                                                                        \
       .offset = offsetof(S, device.precision),                                                    \
       .unit = "RECIPE",                                                                           \
       .choices = "fp32|bf16|fp8|mxfp8",                                                           \
       .initial_note = "bf16 on a GPU, fp32 on the CPU",                                           \
       .help =                                                                                     \
           "Format of weights and activations. In all, sums are float32, and so are master "       \
           "weights and the optimizer's state unless --optim-state says otherwise. fp8 (blocks "   \
           "of 128, for Hopper) and mxfp8 (blocks of 32) have the operands of the attention's "    \
           "projections and of the experts' products in 8 bits, the rest as bf16."},               \
      {.flag = "fp8-skip",                                                                         \
       .type = MT_OPT_TEXT,                                                                        \
       .offset = offsetof(S, device.fp8_skip),                                                     \
       .unit = "PARTS",                                                                            \
       .initial_note = "none",                                                                     \
       .help = "Parts that --precision fp8 or mxfp8 leaves in bf16: attn (the projections of the " \
               "attention), experts, or both with a comma between."},                              \
  {                                                                                                \
    .flag = "threads", .type = MT_OPT_INT, .offset = offsetof(S, device.threads),                  \
    .unit = "THREADS", .initial = "0",                                                             \
    .initial_note = "0 (one a core; ranks of a host share its cores)", .min = 0, .max = 1024,      \
    .help = "Threads of the CPU backend.",                                                         \
  }
#define MT_ROW_OPTIM_STATE(S)                                                                      \
  {                                                                                                \
    .flag = "optim-state", .type = MT_OPT_NAME, .offset = offsetof(S, device.optim_state),         \
    .unit = "FORMAT", .choices = "fp32|bf16", .initial = "fp32",                                   \
    .help = "Format of the optimizer's moments and master weights. bf16, with --precision bf16, "  \
            "fp8 or mxfp8: moments and gradients in bf16 and no master weights, 8 bytes a "        \
            "parameter instead of 18 (with a weight's 8-bit copies 10, instead of 17 in fp8 and "  \
            "18 in mxfp8); "                                                                       \
            "what is kept is rounded at random, so that small updates count.",                     \
  }
#define MT_ROW_GRAPHS(S)                                                                           \
  {                                                                                                \
    .flag = "graphs", .type = MT_OPT_NAME, .offset = offsetof(S, device.graphs), .unit = "WHEN",   \
    .choices = "auto|off", .initial = "auto",                                                      \
    .help = "CUDA graphs. auto: with grouped experts on a GPU, the launches of a step are kept "   \
            "and repeated as a whole, which gives the same bits; off: they are made anew each "    \
            "time, for a profiler's view of single operations.",                                   \
  }
#define MT_ROW_BATCH_SIZE(S, value)                                                                \
  {                                                                                                \
    .flag = "batch-size", .type = MT_OPT_INT, .offset = offsetof(S, batch_size),                   \
    .unit = "SAMPLES", .initial = value, .min = 1, .max = 65536,                                   \
    .help = "Samples packed into one micro-batch of a rank.",                                      \
  }
#define MT_ROW_MAX_SEQ_LENGTH(S, value)                                                            \
  {                                                                                                \
    .flag = "max-seq-length", .type = MT_OPT_INT, .offset = offsetof(S, max_seq_length),           \
    .unit = "TOKENS", .initial = value, .min = 2, .max = 1048576,                                  \
    .help = "A longer sample is truncated to this.",                                               \
  }
#define MT_ROW_EXPERTS(S, ...)                                                                     \
  {                                                                                                \
    .flag = "experts", .type = MT_OPT_CHOICE, .offset = offsetof(S, experts), .unit = "STRATEGY",  \
    .choices = "loop|grouped|fused", __VA_ARGS__,                                                  \
    .help = "How the experts are computed: one after another, all of a layer in one grouped "      \
            "matrix product, or that with SwiGLU (and what makes its result 8-bit) joined to it.", \
  }
#define MT_ROW_BLOCKS(S, ...)                                                                      \
  {                                                                                                \
    .flag = "blocks", .type = MT_OPT_CHOICE, .offset = offsetof(S, blocks), .unit = "STRATEGY",    \
    .choices = "unfused|fused", __VA_ARGS__,                                                       \
    .help = "Whether a block's small operations run fused with their neighbours.",                 \
  }
#define MT_ROW_RECOMPUTE(S)                                                                        \
  {                                                                                                \
    .flag = "recompute", .type = MT_OPT_CHOICE, .offset = offsetof(S, recompute), .unit = "WHAT",  \
    .choices = "none|mlp|full", .initial = "none",                                                 \
    .help = "What backward computes again to save memory: the experts' hidden products, or both "  \
            "blocks of a layer. The results are the same.",                                        \
  }
#define MT_ROW_FREEZE(S)                                                                           \
  {                                                                                                \
    .flag = "freeze", .type = MT_OPT_LIST, .offset = offsetof(S, freeze), .unit = "PATTERN",       \
    .help = "Parameters that do not learn, as a shell pattern over their names in the checkpoint " \
            "or in `moetune inspect`, such as 'model.layers.0.*' or '*gate.weight'. They get no "  \
            "gradient and no optimizer state, and are exported byte for byte.",                    \
  }
#define MT_ROW_VERIFY(S, ...)                                                                      \
  .flag = "verify", .type = MT_OPT_FLAG, .offset = offsetof(S, verify), .help = __VA_ARGS__
#define MT_ROW_ROUTER_AUX_COEF(S)                                                                  \
  {                                                                                                \
    .flag = "router-aux-coef", .type = MT_OPT_REAL, .offset = offsetof(S, router_aux_coef),        \
    .unit = "FACTOR", .initial = "-1", .initial_note = "-1 (as the model's config says)",          \
    .min = -1, .max = 1e6,                                                                         \
    .help = "Weight of the load-balancing loss in the training loss; 0 leaves it out.",            \
  }
#define MT_ROW_ROUTER_Z_LOSS(S)                                                                    \
  {                                                                                                \
    .flag = "router-z-loss", .type = MT_OPT_REAL, .offset = offsetof(S, router_z_loss),            \
    .unit = "FACTOR", .initial = "0", .initial_note = "0 (none)", .max = 1e6,                      \
    .help = "Weight in the training loss of the mean square of the logarithm of the sum of the "   \
            "exponentials of a router's logits, which keeps them small (ST-MoE uses 1e-3).",       \
  }
#define MT_ROW_TRAIN_ON_PROMPT(S)                                                                  \
  {                                                                                                \
    .flag = "train-on-prompt", .type = MT_OPT_FLAG, .offset = offsetof(S, train_on_prompt),        \
    .help = "Count every token in the loss, not the answers' alone.",                              \
  }
#define MT_ROW_SKIP_BAD_LINES(S)                                                                   \
  {                                                                                                \
    .flag = "skip-bad-lines", .type = MT_OPT_FLAG, .offset = offsetof(S, skip_bad_lines),          \
    .help = "Count malformed lines of the data instead of stopping at the first.",                 \
  }
#define MT_ROW_CHAT_TEMPLATE(S)                                                                    \
  {                                                                                                \
    .flag = "chat-template", .type = MT_OPT_TEXT, .offset = offsetof(S, chat_template),            \
    .unit = "NAME", .initial_note = "the model's own",                                             \
    .help = "Template that turns messages into text, such as mistral or chatml.",                  \
  }
#define MT_ROWS_CACHE(S)                                                                           \
  {.flag = "cache",                                                                                \
   .type = MT_OPT_FLAG,                                                                            \
   .offset = offsetof(S, cache.use),                                                               \
   .initial = "true",                                                                              \
   .initial_note = "tokens are kept",                                                              \
   .help = "Tokenise anew and keep nothing. Otherwise a data file's tokens are kept, and the "     \
           "next run with the same data, tokenizer and options finds them."},                      \
  {                                                                                                \
    .flag = "cache-dir", .type = MT_OPT_TEXT, .offset = offsetof(S, cache.dir), .unit = "DIR",     \
    .initial_note = "$XDG_CACHE_HOME/moetune, else ~/.cache/moetune",                              \
    .help = "Where tokens are kept. Files there may be removed at any time.",                      \
  }
#define MT_ROW_SEED(S, text)                                                                       \
  {                                                                                                \
    .flag = "seed", .type = MT_OPT_UINT64, .offset = offsetof(S, seed), .unit = "NUMBER",          \
    .initial = "1", .help = text,                                                                  \
  }
#define MT_ROW_JSON(S)                                                                             \
  {                                                                                                \
    .flag = "json", .type = MT_OPT_FLAG, .offset = offsetof(S, json),                              \
    .help = "Print one JSON object instead of lines.",                                             \
  }
#define MT_ROW_MAX_SHARD_SIZE(S, field)                                                            \
  {                                                                                                \
    .flag = "max-shard-size", .type = MT_OPT_BYTES, .offset = offsetof(S, field), .unit = "SIZE",  \
    .initial = "5GB", .min = 1, .max = DBL_MAX,                                                    \
    .help = "Largest file of exported weights: 500MB, 5GB (powers of 1000), 4GiB (of 1024). A "    \
            "larger tensor gets a file of its own.",                                               \
  }

#define MT_ROW_COUNT(rows) (int)(sizeof(rows) / sizeof *(rows))

/* A micro-batch's tokens are counted in an int. */
mt_err mt_check_micro_batch(int batch_size, int max_seq_length);

#endif
