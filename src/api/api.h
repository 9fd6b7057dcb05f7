/* What the public handles hold. */
#ifndef MT_API_API_H
#define MT_API_API_H

#include "moetune/moetune.h"
#include "train/evaluation.h"
#include "train/step.h"

struct mt_tuner {
  struct mt_session s;
  struct mt_optimizer optimizer; /* with training, as the queue */
  struct mt_step_queue queue;
  int batch_size, max_seq_length, grad_accum, threads;
  uint64_t seed;
  bool training;
};

/* Samples of a micro-batch, as the tuner's model takes them. */
struct mt_loader_options mt_tuner_loader_options(const struct mt_tuner *t, bool shuffled);

/* The corpus's rows for training and for evaluation, made when they are first asked for.
 * Errors: MT_EINVAL for another tuner's corpus; MT_ENOMEM. */
mt_err mt_corpus_loader(struct mt_corpus *c, const struct mt_tuner *t, bool shuffled,
                        struct mt_loader **out);

#endif
