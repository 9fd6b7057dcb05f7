/* Training steps. A step is launched and its numbers are taken later: on a GPU the host prepares
 * what comes next while a step runs, and never waits within one. */
#ifndef MT_TRAIN_STEP_H
#define MT_TRAIN_STEP_H

#include "backend/batch.h"
#include "par/ranks.h"
#include "train/graphs.h"
#include "train/optimizer.h"

enum { MT_STEP_DEPTH = 32, MT_STEP_LINES = 32, MT_STEP_STAGES = MT_MAX_LAYERS };

struct mt_step_result {
  int64_t step;         /* number of the update, from 1 */
  double loss;          /* cross-entropy plus coef * aux (and z), over the global batch */
  double cross_entropy; /* mean over the targets of the global batch */
  double aux;           /* auxiliary loss, without its coefficient */
  double z;             /* routers' z-loss likewise; 0 where it has no coefficient */
  double grad_norm;     /* before clipping */
  double lr;
  int64_t token_count, target_count, correct_count;
  double ms;                      /* from mt_step_begin to the end of the update */
  double phase_s[MT_PHASE_COUNT]; /* seconds */
  const int32_t *load;            /* [layers,E] routed choices; valid until the next launch */
  /* Pipelines: seconds that each stage waited for others, and their share of what all stages spent
   * on forward, backward and waiting. */
  double stage_wait_s[MT_STEP_STAGES], bubble;
  int stage_count;              /* 0: none */
  int64_t lines[MT_STEP_LINES]; /* of the data file: the step's first samples */
  int line_count;
  bool replayed; /* all of it was launched by graphs */
};

/* One step under way. */
struct mt_step_slot {
  struct mt_step_result result;  /* what the host knows already */
  struct mt_step_report *report; /* host memory of the backend's; the loads follow */
};

struct mt_step_queue {
  struct mt_model *model;
  struct mt_optimizer *optimizer;
  int depth;        /* steps that may be under way: the backend's steps_ahead */
  int first, count; /* ring of those launched and not yet taken */
  struct mt_step_slot slot[MT_STEP_DEPTH];
  struct mt_graphs graphs;
  int64_t taken, replayed; /* steps, and those of them that were */
  struct mt_ranks *ranks;  /* that make the step together, or NULL; set by the owner */
  int64_t *targets;        /* of each micro-batch; and how many there is room for */
  struct mt_pass *passes;  /* likewise */
  int target_capacity;
};

/* Errors: MT_ENOMEM. The optimizer's model is the queue's; both outlive it. graphs: steps are
 * replayed where they can be, with the same results to the bit. */
mt_err mt_step_queue_create(struct mt_step_queue *q, struct mt_optimizer *o, bool graphs);
void mt_step_queue_destroy(struct mt_step_queue *q);

/* No further step can be launched before one is taken. */
bool mt_step_full(const struct mt_step_queue *q);

/* Whether the oldest step, if one is under way, can be taken without waiting. */
mt_err mt_step_done(const struct mt_step_queue *q, bool *done);

/* Waits once, until at most `stay` steps are not done. */
mt_err mt_step_wait(const struct mt_step_queue *q, int stay);

/* Where the next step's time begins: before its data is fetched. */
mt_err mt_step_begin(struct mt_step_queue *q);

/* Forward and backward over every micro-batch, one norm, one update. The loss is the mean over all
 * targets of all micro-batches (of all ranks: each calls this with as many, of its own): their
 * counts are added first and divided by once. The batches are free again on return. A gradient that
 * is not finite updates nothing. Errors: MT_EFORMAT when no position of the step is a target. */
mt_err mt_step_launch(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count);

/* Waits for the oldest step: *out (=). Errors: MT_ENUMERIC when its loss or gradient is not finite;
 * *out names the step and its lines then too. */
mt_err mt_step_take(struct mt_step_queue *q, struct mt_step_result *out);

/* Begin, launch and take. */
mt_err mt_step_run(struct mt_step_queue *q, struct mt_batch *const *micro, int micro_count,
                   struct mt_step_result *out);

/* A step's gradients and losses alone, for tests: waits after every micro-batch. */
mt_err mt_step_gradients(struct mt_model *m, struct mt_batch *const *micro, int micro_count,
                         struct mt_step_result *out);

#endif
