/* run.json: what was asked of a run, what it found, and how it ended, for whoever opens its
 * directory later. */
#ifndef MT_TRAIN_FACTS_H
#define MT_TRAIN_FACTS_H

#include "train/evaluation.h"

struct mt_run_facts {
  const struct mt_train_options *options;
  const struct mt_session *session;
  const struct mt_dataset *data, *eval_data; /* eval_data may be NULL */
  int64_t total_steps, first_step, started;  /* started: seconds since 1970 */
};

/* How it ended. */
struct mt_run_result {
  const char *status; /* "running", "finished", "stopped early", "interrupted", "failed" */
  const char *error;  /* of a failed run, else NULL */
  int64_t step;
  double seconds, median_step_ms;
  bool evaluated;
  double loss_before, loss_after; /* held out */
  struct mt_best best;
};

/* Writes OUT/run.json anew. Errors: MT_EIO, MT_ENOMEM. */
mt_err mt_facts_write(const struct mt_run_facts *f, const struct mt_run_result *r);

#endif
