/* The rungs of the ladder on the same work, one after another. */
#ifndef MT_TRAIN_LADDER_H
#define MT_TRAIN_LADDER_H

#include "train/options.h"
#include "train/profile.h"

enum { MT_LADDER_RUNGS = 4 };

struct mt_rung {
  int number;            /* of --improvement */
  const char *what;      /* how it computes */
  const char *precision; /* of the recipe */
  bool ran;
  char why[256];               /* it did not */
  double ms;                   /* median of the measured steps */
  double tokens_per_s, tflops; /* of all ranks; of one */
  double loss;                 /* of the first measured step: the rungs' differ by rounding alone */
  size_t memory_bytes;
  double phase_ms[MT_PHASE_COUNT]; /* of rank 0, the mean of the measured steps */
  struct mt_profile ops;           /* of rank 0, if they are asked for */
  struct mt_ceilings ceilings;
};

struct mt_ladder {
  struct mt_rung rung[MT_LADDER_RUNGS];
  int count;
  struct mt_config config;
  int ranks;
  char device[128];
};

/* Trains the model anew on each rung that the device and the build allow, with the same weights and
 * tokens. A rung that there is not is left out; one that cannot run (MT_EUNSUPPORTED, MT_ENOMEM)
 * says why. Errors: those of opening the model, and of steps. */
mt_err mt_ladder_run(const struct mt_ladder_options *o, struct mt_ladder *out);

/* Over the lowest rung that ran. */
double mt_ladder_speedup(const struct mt_ladder *l, const struct mt_rung *r);

/* The table, or JSON. */
mt_err mt_ladder_print(const struct mt_ladder_options *o, const struct mt_ladder *l);

#endif
