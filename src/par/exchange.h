/* The exchange of model/exchange.h over the ranks of an expert group: every rank sends its routed
 * tokens to those that hold their experts and gets their outputs back.
 *
 * A rank's choices in the order of their experts are one part for each rank already; what arrives
 * is sorted by sender, then expert, and is put into the experts' order. The reverse goes the same
 * ways back, and both backwards use the plan of forward. Per layer and pass: one exchange of
 * counts, then tokens and probabilities out, outputs back, gradients of outputs out, of tokens and
 * of probabilities back.
 *
 * Everything lies in the backend's memory, which the communicators carry. The host waits once a
 * layer, in `plan`: it must say how many bytes go where and make room for those that come. What
 * leaves is gathered in the meantime. */
#ifndef MT_PAR_EXCHANGE_H
#define MT_PAR_EXCHANGE_H

#include "model/model.h"
#include "par/comm.h"

/* Gives the model (created with its shard of experts) an exchange over `expert` (of one member: the
 * local one), and over `readers` the sums of the auxiliary loss. Both communicators carry the
 * memory of the model's backend and outlive the exchange.
 * Errors: MT_ENOMEM; MT_EINVAL where the shard is not what the group's member holds. */
mt_err mt_exchange_over(struct mt_model *m, struct mt_comm *expert, struct mt_comm *readers);
/* The model has a local one again. */
void mt_exchange_close(struct mt_model *m);

#endif
