/* What the commands take; cli/ fills these from flags and the config file, one row of its option
 * table a field. Strings belong to the caller. 0, NULL or -1 mean "not given" where said. */
#ifndef MT_TRAIN_OPTIONS_H
#define MT_TRAIN_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "model/model.h"
#include "train/optimizer.h"

enum { MT_MAX_FREEZE = 32, MT_MAX_STOP = 16 };

struct mt_train_options {
  const char *model;         /* checkpoint directory */
  const char *data;          /* JSON lines */
  const char *eval_data;     /* NULL: no evaluation */
  const char *out;           /* run directory */
  const char *precision;     /* recipe: "fp32", "bf16" */
  const char *backend;       /* "cpu", "ref" */
  const char *chat_template; /* NULL: the checkpoint's */
  enum mt_experts_strategy experts;
  enum mt_blocks_strategy blocks;
  const char *freeze[MT_MAX_FREEZE];
  int freeze_count;
  int batch_size;                    /* samples per data-parallel rank and micro-batch */
  int grad_accum;                    /* micro-batches a step */
  int max_seq_length;                /* tokens */
  int64_t warmup_steps, train_steps; /* train_steps 0: from epochs */
  int64_t epochs;
  double lr, weight_decay, adam_beta1, adam_beta2, adam_eps, grad_clip;
  enum mt_schedule lr_schedule;
  double router_aux_coef; /* -1: config.json's where output_router_logits is true, else 0 */
  uint64_t seed;
  int threads;        /* 0: all cores */
  int64_t eval_every; /* steps; 0: at the end only */
  int64_t save_every; /* steps; 0: at the end only */
  int64_t log_every;  /* steps */
  bool resume;        /* continue from resume_from, or the newest checkpoint in out */
  const char *resume_from;
  bool train_on_prompt, skip_bad_lines;
  uint64_t max_shard_bytes; /* 0: 5 GB */
};

struct mt_eval_options {
  const char *model, *data, *precision, *backend, *chat_template;
  int batch_size, max_seq_length, threads;
  bool train_on_prompt, skip_bad_lines, json;
  const char *ids;         /* "1,2,3": logits of these instead of a data file */
  const char *dump_logits; /* file for them (safetensors, "logits" F32 [T,V]) */
};

struct mt_generate_options {
  const char *model, *prompt, *precision, *backend, *chat_template;
  bool chat; /* the prompt is a user's message; without a prompt: a conversation */
  int max_new_tokens;
  double temperature; /* 0: greedy */
  double top_p;       /* 1: all */
  uint64_t seed;
  const char *stop[MT_MAX_STOP];
  int stop_count;
  int threads;
};

struct mt_bench_options {
  const char *backend, *precision;
  enum mt_experts_strategy experts;
  enum mt_blocks_strategy blocks;
  int threads, steps, batch_size, seq_length;
  int hidden, ffn, layers, heads, kv_heads, n_experts, top_k, vocab;
  bool json;
};

#endif
