/* One training step. */
#ifndef MT_TRAIN_STEP_H
#define MT_TRAIN_STEP_H

#include "backend/batch.h"
#include "train/optimizer.h"

struct mt_step_result {
  double loss;          /* cross-entropy plus coef * aux, over the global batch */
  double cross_entropy; /* mean over the targets of the global batch */
  double aux;           /* auxiliary loss, without its coefficient */
  double grad_norm;     /* before clipping */
  double lr;
  int64_t token_count, target_count, correct_count;
};

/* Forward and backward over every micro-batch, one norm, one update. The loss is the mean over all
 * targets of all micro-batches: their counts are added first and divided by once.
 * Errors: MT_ENUMERIC when loss or gradient is not finite, before anything is updated;
 * MT_EFORMAT when no position of the step is a target. */
mt_err mt_step_run(struct mt_model *m, struct mt_optimizer *o, struct mt_batch *const *micro,
                   int micro_count, struct mt_step_result *out);

/* The step's gradients alone, as mt_step_run computes them. */
mt_err mt_step_gradients(struct mt_model *m, struct mt_batch *const *micro, int micro_count,
                         struct mt_step_result *out);

#endif
