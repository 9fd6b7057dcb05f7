/* Answers that a model gives as it learns: the same questions at every evaluation, answered by the
 * likeliest tokens, one JSON object a line in samples.jsonl. */
#ifndef MT_TRAIN_SAMPLES_H
#define MT_TRAIN_SAMPLES_H

#include <stdio.h>

#include "model/decode.h"
#include "train/sampler.h"
#include "train/session.h"

enum { MT_SAMPLE_PROMPT_TOKENS = 512, MT_SAMPLES_MAX = 64 };

struct mt_sample_prompt {
  struct mt_ids ids;
  struct mt_text text;     /* of the prompt, without special tokens */
  struct mt_text expected; /* the data's own answer; empty when there is none */
};

struct mt_samples {
  struct mt_session *s;
  FILE *file; /* NULL on ranks that do not write */
  struct mt_sample_prompt *prompt;
  int count; /* 0: nothing is asked */
  int new_tokens;
  struct mt_kv_cache cache;
  struct mt_sampler sampler;
  struct mt_ids said; /* scratch */
  struct mt_text answer;
};

/* Takes options->sample_prompts (as a user's messages), or else options->samples questions evenly
 * spread over held_out (which may be NULL: then none). Longer ones than MT_SAMPLE_PROMPT_TOKENS are
 * passed over; where a sample has no question, its first tokens are it. A cache of keys and values
 * is taken from the backend; where there is no memory for it a warning says so and nothing will be
 * asked. A resumed run keeps the file's lines up to first_step.
 * Errors: MT_EIO, MT_ENOMEM of the host, MT_EINVAL for a prompt that is too long. */
mt_err mt_samples_open(struct mt_samples *x, struct mt_session *s,
                       const struct mt_train_options *options, const struct mt_dataset *held_out,
                       int64_t first_step, bool resume);
/* Answers every question with the model as it is; many ranks do so together, and rank 0 writes.
 * Changes nothing that training reads. Errors: MT_ENUMERIC, MT_EIO. */
mt_err mt_samples_take(struct mt_samples *x, int64_t step);
void mt_samples_close(struct mt_samples *x);

#endif
