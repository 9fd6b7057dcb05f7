/* moetune as a library: a Mixtral-class mixture-of-experts checkpoint is loaded, fine-tuned step by
 * step, evaluated, asked, and saved. `pkg-config --cflags --libs moetune`; examples/finetune.c is a
 * whole program.
 *
 * Errors. Functions that can fail return mt_err (moetune/error.h); mt_error_message() says what was
 * wrong. An *out is written by success alone, unless said otherwise. After MT_EDEVICE, or
 * MT_ENOMEM of a step, only closing is left.
 *
 * Threads. A tuner and its corpora are one unit: one thread at a time may be inside a call on any
 * of them, which thread may change between calls. Different tuners may be used by different threads
 * at the same time. Calls compute on threads of their own (mt_tuner_options.threads; OpenMP). Log
 * level: see mt_set_log_level. The library handles no signals.
 *
 * Lifetimes. Handles are opaque and belong to the caller, who closes corpora before their tuner;
 * closing NULL does nothing. Texts and structs passed in are not needed after the call. */
#ifndef MOETUNE_MOETUNE_H
#define MOETUNE_MOETUNE_H

#include <stddef.h>
#include <stdint.h>

#include "moetune/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mt_tuner mt_tuner;   /* a loaded model and, for training, its optimizer */
typedef struct mt_corpus mt_corpus; /* a data file as a tuner's tokens, and the place in it */

/* "0.1.0" */
MT_API const char *mt_version(void);

/* What may be written to standard error, by the whole process: 0 errors, 1 warnings too, 2 notes
 * too (the default), 3 everything. Set it before other threads call the library. */
MT_API void mt_set_log_level(int level);

/* Begin with mt_tuner_defaults, which the values in brackets come from. */
struct mt_tuner_options {
  const char *model;     /* checkpoint directory: config.json, *.safetensors, tokenizer.json */
  const char *device;    /* ["auto"]: a GPU where there is one; "cpu", "cuda" */
  const char *kernels;   /* ["native"], or of a GPU "portable" (what every one from sm_80 on has) */
  const char *precision; /* [NULL]: "bf16" on a GPU, "fp32" on the CPU; or by name */
  const char *optim_state;   /* ["fp32"] of master weights and moments; or "bf16", not with fp32 */
  int threads;               /* [0] of the CPU: one a core */
  const char *chat_template; /* [NULL]: the checkpoint's; or the name of a known one */
  int training;              /* [1]; 0: no gradients and no optimizer, which saves their memory */
  int batch_size;            /* [8] samples of a micro-batch, at most 65536 */
  int max_seq_length;        /* [512] tokens, 2 at least; longer samples are cut */
  int grad_accum;            /* [1] micro-batches of a step, weighted by their target tokens */
  const char *recompute;     /* ["none"], "mlp", "full": what backward makes again to save memory */
  /* AdamW. The learning rate rises over warmup_steps; then it falls to 0 at total_steps along half
   * a cosine or a line (and stays there), or does not change. */
  double lr;               /* [2e-5] */
  const char *lr_schedule; /* ["constant"], "cosine", "linear" */
  int64_t warmup_steps;    /* [0] */
  int64_t total_steps;     /* [0] warm-up included; needed by cosine and linear alone */
  double weight_decay;     /* [0] of matrices */
  double adam_beta1, adam_beta2, adam_eps; /* [0.9, 0.999, 1e-8] */
  double grad_clip;                        /* [1] global L2 norm; 0: none */
  double router_aux_coef;    /* [-1]: as the checkpoint's config says; 0: no auxiliary loss */
  double router_z_loss;      /* [0] coefficient of the routers' z-loss; 0: none */
  const char *const *freeze; /* [NULL] shell patterns over parameter names: "model.layers.0.*" */
  int freeze_count;          /* [0] */
  uint64_t seed; /* [1] of the samples' order and of bf16 states' rounding: the same seed on the
                    same device gives the same bits */
};
MT_API struct mt_tuner_options mt_tuner_defaults(const char *model);

/* Opens the device, builds the model and loads the weights. Takes all the memory that steps need.
 * Errors: MT_EINVAL naming the option; MT_ENOENT, MT_EFORMAT, MT_ESHAPE, MT_EUNSUPPORTED naming
 * file, tensor or key; MT_EUNSUPPORTED for a device that is not there; MT_ENOMEM. */
MT_API mt_err mt_tuner_open(const struct mt_tuner_options *options, mt_tuner **out);
MT_API void mt_tuner_close(mt_tuner *t);

struct mt_tuner_facts {
  const char *device;    /* "cpu", "cuda", "cuda-portable"; valid as long as the tuner */
  const char *precision; /* likewise */
  int64_t parameters;    /* in all */
  int64_t active;        /* that a token uses */
  int64_t learning;      /* that a step changes; 0 without training */
  int layers, hidden, experts, top_k, vocab;
  int max_positions;   /* 0: the checkpoint does not say */
  size_t memory_bytes; /* of the device: parameters, gradients, optimizer, activations */
  int64_t step;        /* updates done */
};
MT_API struct mt_tuner_facts mt_tuner_describe(const mt_tuner *t);

enum mt_corpus_flags {
  MT_CORPUS_TRAIN_ON_PROMPT = 1, /* every token is a target, not the answers' alone */
  MT_CORPUS_SKIP_BAD_LINES = 2,  /* malformed lines are counted instead of an error */
  MT_CORPUS_CACHE = 4            /* tokens are kept in, and taken from, the user's cache directory
                                    ($XDG_CACHE_HOME/moetune or ~/.cache/moetune) */
};

/* Reads and tokenises a file of JSON lines: {"text"}, {"prompt", "completion"}, {"instruction",
 * "input", "output"} or {"messages": [{"role", "content"}]}. flags: of enum mt_corpus_flags.
 * Tokens go to a file in $TMPDIR (or the cache), not into memory.
 * Errors: MT_ENOENT, MT_EIO, MT_EFORMAT naming FILE:LINE, also when no sample is usable; MT_EINVAL
 * for unknown flags. */
MT_API mt_err mt_corpus_open(mt_tuner *t, const char *path, int flags, mt_corpus **out);
MT_API void mt_corpus_close(mt_corpus *c);

struct mt_corpus_facts {
  int64_t samples, tokens, targets;
  int64_t truncated; /* samples cut at max_seq_length */
  int64_t dropped;   /* samples left out: no target */
  int64_t bad_lines;
  int64_t steps_per_epoch; /* rounded up */
};
MT_API struct mt_corpus_facts mt_corpus_describe(const mt_corpus *c);

struct mt_tuner_step_result {
  int64_t step;         /* number of the update, from 1 */
  double loss;          /* cross_entropy plus the auxiliary losses by their coefficients */
  double cross_entropy; /* mean over the step's targets, in nats */
  double aux;           /* auxiliary loss, without its coefficient */
  double z_loss;        /* routers' z-loss likewise; 0 without a coefficient */
  double grad_norm;     /* before clipping */
  double lr;
  int64_t tokens, targets;
  int64_t correct; /* targets that had the largest logit */
  double ms;
};

/* One update from the corpus's next batch_size * grad_accum samples, whose order is shuffled anew
 * each epoch; waits for it. A corpus goes on where its own last step ended. *out may be NULL.
 * Errors: MT_ENUMERIC when the loss or the gradient is not finite: *out is written, no weight has
 * changed, and a next step may be tried; MT_EINVAL for a tuner without training or a corpus of
 * another tuner. */
MT_API mt_err mt_tuner_step(mt_tuner *t, mt_corpus *c, struct mt_tuner_step_result *out);

struct mt_tuner_eval_result {
  double loss; /* mean cross-entropy over all targets, in nats */
  double perplexity, accuracy;
  int64_t samples, targets;
};

/* Runs the whole corpus, in its order, through the model as it is; changes neither model nor place.
 * Errors: MT_EINVAL for a corpus of another tuner. */
MT_API mt_err mt_tuner_evaluate(mt_tuner *t, mt_corpus *c, struct mt_tuner_eval_result *out);

/* A question. Begin with mt_prompt_defaults. */
struct mt_prompt {
  const char *text;        /* UTF-8 */
  int chat;                /* [0]: text is gone on from; 1: it is a user's message */
  const char *system;      /* [NULL] system message of a chat */
  int max_new_tokens;      /* [256] */
  double temperature;      /* [0]: the likeliest token; above: drawn, logits divided by it */
  double top_p;            /* [1] drawn among the likeliest tokens that together reach this */
  uint64_t seed;           /* [1] of drawing */
  const char *const *stop; /* [NULL] texts that end the answer, left out of it */
  int stop_count;          /* [0] */
  /* [NULL] Gets the answer's bytes as they become certain (whole characters); a return other than
   * 0 ends the answer there. Must not call the tuner. */
  int (*on_text)(void *context, const char *bytes, size_t byte_count);
  void *context;
};
MT_API struct mt_prompt mt_prompt_defaults(const char *text);

/* Answers with the model as it is, also between steps. *answer (=): terminated, freed by the caller
 * with mt_text_free; what on_text has got in all; may be NULL with on_text.
 * Errors: MT_EINVAL for an empty prompt, one that does not fit into the model's positions, or an
 * option out of range; MT_EFORMAT when it is no UTF-8; MT_ENUMERIC when all logits are NaN. */
MT_API mt_err mt_tuner_generate(mt_tuner *t, const struct mt_prompt *prompt, char **answer);
MT_API void mt_text_free(char *text);

/* Writes the model as a Hugging Face checkpoint: tensors in the names, layout and number formats of
 * the one it came from, with its config and tokenizer. The directory appears whole, in place of an
 * older one of this name. Errors: MT_EIO naming the path and the reason; what was there stays. */
MT_API mt_err mt_tuner_save(mt_tuner *t, const char *dir);

#ifdef __cplusplus
}
#endif

#endif
