/* What training would take and how long, worked out without doing it: memory and work of every rank
 * of a mesh from the code that trains, run on a backend that only counts; bytes between ranks from
 * the formulas of docs/parallelism.md; times from a machine's rates. */
#ifndef MT_TRAIN_PLAN_H
#define MT_TRAIN_PLAN_H

#include "par/mesh.h"
#include "train/machine.h"
#include "train/options.h"

/* One rank's pass over a micro-batch and its update, counted. */
struct mt_count {
  struct mt_memory arenas;
  size_t rows_bytes; /* over ranks: what is taken beside the arenas for the rows that come */
  size_t sums_bytes; /* and for sums of gradients (`sums` is one micro-batch's, and the norm) */
  struct mt_work first, more, sums, update; /* a step's first pass, each further one; the sums */
  double first_s, more_s, sums_s, norm_s, update_s; /* without what travels; sums_s: as above, but
                                                       for the norm */
  double ends_s;                                    /* embedding and head, within a pass */
  double stage_bytes;                               /* that a stage sends, a micro-batch */
  /* Buckets that gradients of each class are summed in, and calls that bring sums or weights back.
   */
  int buckets[MT_SYNC_COUNT], gathers[MT_SYNC_COUNT];
  /* What sharded state makes come together of a class's weights after an update: in the format that
   * operations read, of those in 8 bits the master. */
  double weights_bytes[MT_SYNC_COUNT];
};

struct mt_count_options {
  const struct mt_config *config;
  const struct mt_params *params; /* of the shard, `learns` and all */
  const struct mt_recipe *recipe;
  const struct mt_backend *backend; /* for its workspace alone */
  struct mt_model_options model;
  const struct mt_machine *machine;
  double sequence_length;
  const struct mt_mesh *mesh; /* as the rank sees it; model.shard is its */
  int64_t rows;               /* that come to this rank in each layer */
};

/* Builds the model, runs passes (of a stage as many as are under way at a time) and an update with
 * operations that only count, on memory that nobody may touch. profile, if not NULL (=): the rows
 * of first pass and update together. Errors: MT_ENOMEM, where the model is larger than the address
 * space too. */
mt_err mt_count_step(const struct mt_count_options *o, struct mt_count *out,
                     struct mt_profile *profile);

/* What lies where on the rank that has most, in bytes. */
struct mt_plan_memory {
  size_t parameters, gradients, optimizer, activations;
  size_t exchange; /* rows of other ranks, and their staging */
  size_t sums;     /* parts of a bucket of gradients */
  size_t comms;    /* of the GPU's communicators themselves: options.comm_bytes each, assumed */
  size_t total;
};

/* Bytes that leave a rank in a step. */
struct mt_plan_traffic {
  double counts, tokens, probabilities, auxiliary; /* of the exchange, all layers and passes */
  double dense, experts;                           /* sums of gradients, and what follows them */
  double stages;                                   /* hidden states and their gradients */
  int dense_calls, expert_calls;                   /* that sums are made of */
};

struct mt_plan_time {
  double compute, exchange, sums, update, bubble, step; /* seconds */
};

struct mt_plan {
  int gpus, ep, pp, dp, zero, recompute, micro;
  int comms; /* that a rank opens for its GPU's memory; 0 on a CPU, where MPI's serve */
  struct mt_plan_memory memory;
  struct mt_plan_traffic sent;
  struct mt_plan_time time;
  double tokens, model_flops; /* of a step, all ranks */
  bool fits;
};

struct mt_planner {
  const struct mt_plan_options *options;
  struct mt_config config;
  const struct mt_recipe *recipe;
  struct mt_backend be;
  struct mt_machine machine;
  int64_t token_capacity;
  unsigned skip_8bit;
  bool backend_differs;          /* the build has no CUDA: workspaces are the CPU's */
  struct mt_planner_entry *seen; /* counts made before */
  int seen_count;
};

/* Reads the model's config.json, and the machine or measures it. Errors: those of
 * mt_hf_config_load; MT_EINVAL for what does not go together. Closed also after an error. */
mt_err mt_planner_open(struct mt_planner *p, const struct mt_plan_options *o);
void mt_planner_close(struct mt_planner *p);

/* One mesh: plan->gpus, ep, pp, zero, recompute and micro are given, the rest (=). Errors: those of
 * mt_mesh_make. */
mt_err mt_plan_mesh(struct mt_planner *p, struct mt_plan *plan);

/* All meshes of `gpus` ranks that the options leave open, those that fit first, of them the one of
 * most tokens a second first (equals: the one of least memory). *plans (=) is freed by the caller.
 */
mt_err mt_plan_meshes(struct mt_planner *p, int gpus, struct mt_plan **plans, int *count);

/* The best mesh that fits for 1, 2, 4 ... up to `most` ranks; of those without one, nothing. */
enum { MT_SWEEP_POINTS = 16 };
struct mt_sweep {
  struct mt_plan best[MT_SWEEP_POINTS], plain[MT_SWEEP_POINTS];
  int count;
};
mt_err mt_plan_sweep(struct mt_planner *p, int most, struct mt_sweep *out);

/* On standard output, as text or JSON by the options. */
mt_err mt_plan_print(const struct mt_planner *p, const struct mt_plan *plan);
mt_err mt_plan_print_list(const struct mt_planner *p, const struct mt_plan *plans, int count);
mt_err mt_plan_print_sweep(const struct mt_planner *p, const struct mt_sweep *sweep);

#endif
