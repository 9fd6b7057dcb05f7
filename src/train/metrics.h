/* metrics.jsonl: one JSON object a step, an evaluation or a warning; each begins with its step. And
 * the same numbers as TensorBoard's events, where they are asked for. */
#ifndef MT_TRAIN_METRICS_H
#define MT_TRAIN_METRICS_H

#include <stdio.h>

#include "train/evaluation.h"
#include "train/step.h"
#include "train/tensorboard.h"

struct mt_metrics {
  FILE *file;
  double *step_ms; /* of the timed steps, for the median */
  int64_t count, capacity;
  struct mt_tensorboard board;
};

/* Opens DIR/metrics.jsonl. A resumed run keeps the lines up to `keep_steps` and goes on behind
 * them. timed_steps: how many step times will be kept. */
mt_err mt_metrics_open(struct mt_metrics *m, const char *dir, int64_t keep_steps, bool resume,
                       int64_t timed_steps);
/* From now on TensorBoard's events are written too, beside metrics.jsonl. */
mt_err mt_metrics_board(struct mt_metrics *m, const char *dir, int64_t first_step);
/* Writes a step; timed: its time counts for the median. Errors: MT_EIO (disk full). */
mt_err mt_metrics_step(struct mt_metrics *m, const struct mt_step_result *r,
                       const struct mt_model *model, bool timed);
/* routing: NULL, or where the evaluation's tokens went. */
mt_err mt_metrics_evaluation(struct mt_metrics *m, int64_t step, const struct mt_evaluation *e,
                             const struct mt_routing *routing);
/* text: for people. */
mt_err mt_metrics_warning(struct mt_metrics *m, int64_t step, const char *text);
/* Median of the timed steps; 0 when there is none. Sorts them. */
double mt_metrics_median_ms(struct mt_metrics *m);
void mt_metrics_close(struct mt_metrics *m);

/* *best (=) as the evaluations in DIR/metrics.jsonl up to last_step left it. A file that is not
 * there has none. */
mt_err mt_metrics_best(const char *dir, int64_t last_step, double min_delta, struct mt_best *best);

/* What has been written survives a loss of power. f may be NULL: there is no such file. */
mt_err mt_lines_sync(FILE *f, const char *name);

/* Rewrites a file of JSON lines that begin with {"step":N to those with N <= last_step; a last line
 * cut short is dropped. Absent is no error. Errors: MT_EIO naming the path. */
mt_err mt_lines_keep(const char *path, int64_t last_step);

#endif
