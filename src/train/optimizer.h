/* AdamW over the parameter table, with the gradient norm and the learning-rate schedule. */
#ifndef MT_TRAIN_OPTIMIZER_H
#define MT_TRAIN_OPTIMIZER_H

#include "model/model.h"

enum mt_schedule { MT_SCHEDULE_LINEAR, MT_SCHEDULE_COSINE, MT_SCHEDULE_CONSTANT };

struct mt_optimizer_options {
  double lr, beta1, beta2, eps, weight_decay;
  double clip; /* global gradient norm; <= 0: none */
  enum mt_schedule schedule;
  int64_t warmup_steps, total_steps; /* total includes the warm-up */
  uint64_t seed;                     /* of the rounding of bf16 states */
};

struct mt_optimizer {
  struct mt_optimizer_options options;
  struct mt_model *model;
  struct mt_adamw_segment *segments;
  struct mt_tensor *grads; /* room for the gradients that a norm reads */
  int segment_count;
  double *grad_sumsq; /* device [1], then one for each parameter with grad_sumsq, in their order */
  int part_count;
  int64_t step; /* updates done */
};

/* lr at update `step` (from 1): rises linearly over the warm-up (step/(warmup+1)... reaching lr at
 * step warmup+1), then stays, falls linearly to 0, or along half a cosine to 0, at total+1. */
double mt_schedule_lr(const struct mt_optimizer_options *o, int64_t step);

/* Errors: MT_ENOMEM, MT_EINVAL when no parameter of a whole model learns. */
mt_err mt_optimizer_create(struct mt_optimizer *o, struct mt_model *m,
                           const struct mt_optimizer_options *options);
void mt_optimizer_destroy(struct mt_optimizer *o);

/* Sum of squares of all gradients: (=) *grad_sumsq, on the device. Takes the sums that the pass
 * just launched has left where it left all (mt_pass.sum_squares), once: a second call, or one after
 * any other pass, reads the gradients as they are. */
mt_err mt_optimizer_norm(struct mt_optimizer *o);

/* What the next update takes from the device besides (acts.host_values.adamw (=), which goes there
 * with the next pass); returns its learning rate. */
double mt_optimizer_prepare(struct mt_optimizer *o);

/* One update with the gradients as they are, clipped by the norm last computed; none where that is
 * not finite. Launches the same every time; the caller counts it in `step`. */
mt_err mt_optimizer_update(struct mt_optimizer *o);

#endif
