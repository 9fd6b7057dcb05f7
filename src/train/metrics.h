/* metrics.jsonl: one JSON object a step. */
#ifndef MT_TRAIN_METRICS_H
#define MT_TRAIN_METRICS_H

#include <stdio.h>

#include "train/session.h"
#include "train/step.h"

struct mt_metrics {
  FILE *file;
  double *step_ms; /* of the timed steps, for the median */
  int64_t count, capacity;
};

/* Opens DIR/metrics.jsonl. A resumed run keeps the lines up to `keep_steps` and goes on behind
 * them. timed_steps: how many step times will be kept. */
mt_err mt_metrics_open(struct mt_metrics *m, const char *dir, int64_t keep_steps, bool resume,
                       int64_t timed_steps);
/* Writes a step; timed: its time counts for the median. Errors: MT_EIO (disk full). */
mt_err mt_metrics_step(struct mt_metrics *m, const struct mt_step_result *r,
                       const struct mt_model *model, bool timed);
mt_err mt_metrics_evaluation(struct mt_metrics *m, int64_t step, const struct mt_evaluation *e);
/* Median of the timed steps; 0 when there is none. Sorts them. */
double mt_metrics_median_ms(struct mt_metrics *m);
void mt_metrics_close(struct mt_metrics *m);

#endif
