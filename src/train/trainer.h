/* What other commands share with the trainer. */
#ifndef MT_TRAIN_TRAINER_H
#define MT_TRAIN_TRAINER_H

#include "model/config.h"

/* The auxiliary loss's coefficient: as asked, or (asked < 0) config.json's where its
 * output_router_logits puts the loss in, else 0: as transformers decides. */
double mt_train_aux_coef(double asked, const struct mt_config *c);

#endif
