/* How evenly the experts are used, and which no token reaches any more. */
#ifndef MT_TRAIN_HEALTH_H
#define MT_TRAIN_HEALTH_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* One layer's load in a few numbers; all 0 where nothing was routed. */
struct mt_load_facts {
  double least, most; /* shares of the layer's choices */
  double entropy;     /* of the shares, in nats: ln(experts) when all are alike */
  int idle;           /* experts without a token */
};
struct mt_load_facts mt_load_facts(const int32_t *load, int experts);

struct mt_expert_watch {
  int layers, experts;
  int64_t patience;   /* steps without a token that make an expert dead; 0: nobody watches */
  int64_t *last_step; /* [layers,E] when it last had a token */
};

/* Every expert counts as seen at first_step. Errors: MT_ENOMEM. */
mt_err mt_expert_watch_create(struct mt_expert_watch *w, int layers, int experts, int64_t patience,
                              int64_t first_step);
void mt_expert_watch_destroy(struct mt_expert_watch *w);

/* Takes a step's load [layers,E] into account. Returns how many experts have now been without a
 * token for exactly `patience` steps, so that each silence is told once; text (=) then names them,
 * as many as fit ("layer 2: 0 3; layer 5: 1"). */
int mt_expert_watch_step(struct mt_expert_watch *w, int64_t step, const int32_t *load, char *text,
                         size_t size);

#endif
