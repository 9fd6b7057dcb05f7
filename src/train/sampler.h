/* Choosing the next token from logits. */
#ifndef MT_TRAIN_SAMPLER_H
#define MT_TRAIN_SAMPLER_H

#include "base/error.h"
#include "base/rng.h"

struct mt_sampler {
  int vocab;
  float *logits;  /* [vocab] filled by the caller */
  double *weight; /* scratch */
  int32_t *order;
};

mt_err mt_sampler_create(struct mt_sampler *s, int vocab);
void mt_sampler_destroy(struct mt_sampler *s);

/* temperature 0: the largest logit (ties: the lower id). Otherwise from softmax(logits /
 * temperature), cut to the fewest most probable tokens whose sum reaches top_p (Holtzman et al.
 * 2020, nucleus sampling). -1 when no logit is a number. */
int32_t mt_sampler_pick(struct mt_sampler *s, double temperature, double top_p, struct mt_rng *rng);

#endif
