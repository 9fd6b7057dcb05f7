/* Pipeline parallelism: a model's layers in stages, one rank each, and micro-batches that go
 * forward through all of them and back.
 *
 * Two orders. Sequential, what a model cut over devices does that knows no pipeline (HF's
 * device_map="auto"): one micro-batch at a time, forward and back. 1F1B (Narayanan et al. 2019,
 * PipeDream; non-interleaved as in Megatron-LM): stage s of p runs p - 1 - s forwards first, then
 * one forward and one backward by turns, then the backwards that are left; so at most p - s
 * micro-batches are kept, and a step's time is that of m + p - 1 forwards and backwards, of which a
 * stage waits for p - 1.
 *
 * Between neighbours go, for each micro-batch, two messages forward (hidden states [T,H]; what the
 * auxiliary losses are made of, sums of [E] probabilities and counts and of one z, which every
 * stage adds to: the balancing loss is a product of sums over all layers) and two back (the
 * gradient of the hidden states; the auxiliary losses' gradients [E+1], which the last stage
 * makes). Nothing is sent that is not received in the same order, and every stage's list is cut
 * from one order in which each action follows those it needs. On the host sends do not wait for
 * their receivers, and what comes is expected one action early. Between GPUs messages run in the
 * order of their start, and a send may wait for its receiver: what goes forward and what goes back
 * have communicators of their own, so that messages that cross do not wait for each other, and what
 * an action needs is received when its turn comes. So there is no deadlock (unit/test_stages plays
 * both through). */
#ifndef MT_PAR_PIPELINE_H
#define MT_PAR_PIPELINE_H

#include "model/model.h"
#include "par/comm.h"
#include "par/mesh.h"

/* One entry of a stage's list. */
struct mt_stage_action {
  bool backward;
  int micro;
};

/* Action k, from 0 to 2 micro_count - 1, of a stage. Pure arithmetic. */
struct mt_stage_action mt_stage_action(bool sequential, int stage, int stages, int micro_count,
                                       int k);
/* Micro-batches whose activations a stage keeps at a time: mt_model_options.in_flight. */
int mt_stage_in_flight(bool sequential, int stage, int stages, int micro_count);

/* Messages of one micro-batch between two stages: hidden states or their gradient, and the
 * auxiliary loss's part. */
struct mt_stage_message {
  struct mt_transfer stream, aux;
};

struct mt_pipeline {
  struct mt_model *model;
  /* Of the stages, in their order, over the backend's memory: what goes forward and what goes back;
   * and what is on the host. One and the same on a host. */
  struct mt_comm *comm, *back, *host;
  bool early;      /* what comes is expected while a stage computes */
  bool sequential; /* set by the owner, once it is open */
  int slots;       /* in_flight + 1 */
  /* Before each micro-batch's backward, or NULL; set by the owner. */
  mt_err (*begin)(void *context, int micro, int micro_count);
  void *begin_context;
  /* Under way: what comes and goes forward, by micro-batch modulo slots; and back, modulo 2. */
  struct mt_stage_message *come, *go;
  struct mt_stage_message back_come[2], back_go[2];
};

/* The model has been created with its stage as its shard. It and the communicators outlive the
 * pipeline. Errors: MT_ENOMEM; MT_EINVAL where stages and layers do not fit each other. */
mt_err mt_pipeline_open(struct mt_pipeline *p, struct mt_model *m, struct mt_comm *comm,
                        struct mt_comm *back, struct mt_comm *host);
void mt_pipeline_close(struct mt_pipeline *p); /* safe on a zeroed one */

/* A step's micro-batches forward and back, gradients and numbers as mt_model_pass_launch leaves
 * them; the loss is tallied on the last stage, each layer's load on its own. Every stage has the
 * same passes (batches of its own with equal content). Errors: MT_ECOMM, and a pass's. */
mt_err mt_pipeline_run(struct mt_pipeline *p, const struct mt_pass *passes, int micro_count);

/* Batch number i, from 0 on, of a row of batches that go forward alone, one behind the other: a
 * stage hands on what it has made and returns, to be at the next one while later stages are at this
 * one; of m batches a stage waits for (p-1)/(m+p-1) of the time. loss (=) on the last stage what
 * mt_model_eval_pass says, 0 elsewhere. Errors: MT_ECOMM, and a pass's. */
mt_err mt_pipeline_eval(struct mt_pipeline *p, int i, const struct mt_batch *batch,
                        struct mt_loss *loss);
/* The row's end, after which another may begin: what has left has arrived, and *total (=) on each
 * is what the last stage has there. */
mt_err mt_pipeline_eval_end(struct mt_pipeline *p, struct mt_loss *total);

/* mt_model_decode over the stages: each has a cache of its own layers and gives the same ids; the
 * logits reach every stage that asks for them, and either all do or none. */
struct mt_kv_cache;
mt_err mt_pipeline_decode(struct mt_pipeline *p, struct mt_kv_cache *cache, const int32_t *ids,
                          int count, float *logits);
/* mt_model_logits of the last stage, on all of them. */
mt_err mt_pipeline_logits(struct mt_pipeline *p, int64_t begin, int64_t count, float *out);

#endif
