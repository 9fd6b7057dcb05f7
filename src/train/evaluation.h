/* What a held-out file says of the model: loss, accuracy, and where its tokens were routed. */
#ifndef MT_TRAIN_EVALUATION_H
#define MT_TRAIN_EVALUATION_H

#include "train/session.h"

/* Mean over the targets of a data set, in file order. */
struct mt_evaluation {
  double cross_entropy, perplexity, accuracy;
  int64_t samples, targets;
};

/* How an evaluation's tokens were routed. */
struct mt_routing {
  int layers, experts;
  int64_t *load;   /* [layers,E] routed choices */
  double *entropy; /* [layers] mean over tokens of -sum p ln p of the router's softmax, in nats; NaN
                      where the layers' logits are not kept apart (a model built for inference) */
  int64_t tokens;
  int32_t *host_load; /* scratch [layers,E] */
  void *host_logits;  /* scratch, stat [T,E] */
};

/* For evaluations of m. Errors: MT_ENOMEM. */
mt_err mt_routing_create(struct mt_routing *r, const struct mt_model *m);
void mt_routing_destroy(struct mt_routing *r);

/* *out (=), and *routing (=) unless NULL, of all ranks' samples; ranks: NULL, or those that
 * evaluate together, each with a loader of its own number. Collective then. Allocates nothing on
 * one rank. */
mt_err mt_evaluate(struct mt_model *m, struct mt_ranks *ranks, struct mt_loader *l,
                   struct mt_routing *routing, struct mt_evaluation *out);

/* Smallest and largest share of a layer's choices that one expert got, over all layers.
 * load: [layers,E]. Layers without a choice are passed over; both 0 where all are. */
void mt_routing_shares(const int64_t *load, int layers, int experts, double *least, double *most);

/* -sum p ln p of p = exp(x) / sum exp(x), in nats. */
double mt_softmax_entropy(const double *x, int n);

/* The best evaluation so far. Zero to begin. */
struct mt_best {
  bool any;
  float loss;              /* as metrics.jsonl keeps it: a resumed run decides alike */
  int64_t step, last_step; /* of the best, of the last one seen */
  int since;               /* evaluations after the best */
};

/* Takes an evaluation into account: true when it is the first or below the best by more than
 * min_delta. The same step again changes nothing. */
bool mt_best_update(struct mt_best *b, int64_t step, double loss, double min_delta);

#endif
