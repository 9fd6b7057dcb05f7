/* A model that is trained by many ranks: its mesh, the communicators of its groups, and what they
 * do together once a step: count targets, add up gradients, take their norm.
 *
 * Dense parameters are the same on all ranks of a stage and their gradients are summed over DP x
 * EP; experts are held by DP ranks each and summed over those. A sum is an exchange of parts, an
 * addition in the order of ranks (float32; float64 of F64) and a gathering of the results: 2
 * (n-1)/n of a gradient's bytes leave each of n ranks, and every rank has the same bits. */
#ifndef MT_PAR_RANKS_H
#define MT_PAR_RANKS_H

#include "model/decode.h"
#include "par/pipeline.h"
#include "par/sum.h"
#include "par/world.h"

struct mt_ranks {
  struct mt_world *world;
  struct mt_mesh mesh;
  struct mt_comm comm[MT_GROUP_COUNT];    /* over the host's memory */
  struct mt_comm gpu[MT_GROUP_COUNT];     /* over a GPU's, where the model is on one */
  struct mt_comm gpu_back;                /* of the pipeline, for what goes back */
  struct mt_comm *tensor[MT_GROUP_COUNT]; /* over the backend's: those of one or the other */
  struct mt_model *model;
  struct mt_pipeline pipeline;    /* of several stages; mesh.pp says whether */
  const struct mt_params *whole;  /* the table of all ranks' model; set by who collects, once */
  struct mt_stage_tables *stages; /* collect.c's, of each stage; made when needed */
  struct mt_tensor *views;        /* room for the gradients that a norm reads */
  struct mt_sum sum;
  double *squares;           /* backend [1 + DP EP or PP]: of this rank's parts, and of all ranks */
  struct mt_buckets buckets; /* that gradients are summed by */
  struct mt_comm late[MT_SYNC_COUNT]; /* over the host's memory, for gatherings behind sums */
  struct mt_overlap *overlap;         /* of sums with backward (overlap.c) */
  bool begun;                         /* it is under way */
  bool behind; /* set by the owner, to compare: whole gradients are summed behind backward */
  bool well;   /* set by who ends without an error: then the others come to the end as well */
};

/* Communicators of every group of the mesh. Collective. Errors: MT_ECOMM, MT_ENOMEM. */
mt_err mt_ranks_open(struct mt_ranks *r, struct mt_world *world, const struct mt_mesh *mesh);
/* Joins a model that was created with the mesh's shard: exchange and gradients; on a GPU, where
 * communicators for its memory are made. *r stays where it is from then on. Collective. Errors:
 * MT_ENOMEM, MT_ECOMM, MT_EUNSUPPORTED. */
mt_err mt_ranks_join(struct mt_ranks *r, struct mt_model *m);
/* The joined model's end, with nothing under way: another one on the same backend may join, over
 * the communicators there are. */
void mt_ranks_leave(struct mt_ranks *r);
/* Whether transfers between GPUs have failed that a step has waited for: to be asked once it is
 * done and before its numbers are believed. Errors: MT_ECOMM. */
mt_err mt_ranks_failed(struct mt_ranks *r);
/* Whether the ranks that share a parameter have read the same numbers (their sums of squares, to
 * the bit; what is in 8 bits alone is not looked at). dir: where from, for the message. Once a
 * model that trains has joined and been loaded; collective; the host waits. Errors: MT_EINVAL
 * naming a parameter, on every rank; those of the backend and of communicators. */
mt_err mt_ranks_same_weights(struct mt_ranks *r, const char *dir);
/* For who ends, after an error with transfers under way: from here on nothing is written to or read
 * from buffers of theirs, which may be freed then. Where MPI cannot be kept from it, all ranks are
 * brought down with the error's message. Who has not set r->well waits five seconds for the others,
 * of transfers and in NCCL's own end, else the time-out. Nothing may be exchanged afterwards. */
void mt_ranks_settle(struct mt_ranks *r);
void mt_ranks_close(struct mt_ranks *r); /* settles first; before the model's end */

/* What of the model this rank holds. */
struct mt_shard mt_ranks_shard(const struct mt_mesh *mesh);

/* Communicators that a rank of the mesh opens for its GPU's memory. */
int mt_ranks_gpu_comms(const struct mt_mesh *mesh);

/* How many ranks share each class of parameters. */
struct mt_sharers mt_ranks_sharers(const struct mt_mesh *mesh);

/* n numbers summed over the ranks that read data, in place; the same on each. */
mt_err mt_ranks_sum_counts(struct mt_ranks *r, int64_t *numbers, int n);
mt_err mt_ranks_sum(struct mt_ranks *r, double *numbers, int n);
/* And over the stages of this rank's pipeline. */
mt_err mt_ranks_sum_stage_counts(struct mt_ranks *r, int64_t *numbers, int n);
mt_err mt_ranks_sum_stages(struct mt_ranks *r, double *numbers, int n);

/* Whether the model is cut into stages. r may be NULL. */
bool mt_ranks_staged(const struct mt_ranks *r);
/* mt_model_eval_pass, mt_model_decode and mt_model_logits of m, which may be a stage: of all stages
 * then, with the same arguments. r may be NULL: m is whole. Batches that are evaluated are numbered
 * from 0 on, and each row of them has an end: mt_pipeline_eval. */
mt_err mt_ranks_eval(struct mt_ranks *r, struct mt_model *m, int i, const struct mt_batch *batch,
                     struct mt_loss *loss);
mt_err mt_ranks_eval_end(struct mt_ranks *r, struct mt_loss *total);
mt_err mt_ranks_decode(struct mt_ranks *r, struct mt_model *m, struct mt_kv_cache *cache,
                       const int32_t *ids, int count, float *logits);
mt_err mt_ranks_logits(struct mt_ranks *r, struct mt_model *m, int64_t begin, int64_t count,
                       float *out);

/* Rank 0's token for everyone: who generates together must go on alike. *id (=); r may be NULL. */
mt_err mt_ranks_token(struct mt_ranks *r, int32_t *id);

/* On a host, buckets that are on their way beside backward at most; room is taken for so many of
 * the largest, or for all where there are fewer. Between GPUs there is room for two of each class.
 */
enum { MT_OVERLAP_BUCKETS = 8 };

/* Memory that sums take beside the arenas. */
size_t mt_ranks_sum_bytes(const struct mt_ranks *r);

/* Before the backward of each of a step's micro-batches: where that is the step's last one or
 * gradients are sharded, each bucket's sum begins when its last gradient is finished, through the
 * model's grad_ready, which is the caller's again after mt_ranks_gradients. A pipeline calls it by
 * itself. Errors: MT_ENOMEM; MT_ECOMM, of the micro-batch before. */
mt_err mt_ranks_begin(struct mt_ranks *r, int micro, int micro_count);

/* After the backward of a step's last pass: every gradient (=) its sum over the ranks that hold the
 * parameter (with sharded state, of this rank's parts alone; of sharded gradients over the step's
 * micro-batches, in the model's shares), and *sumsq (=, backend's memory) the
 * sum of squares of all gradients of the whole model. The host does not wait for the backend. */
mt_err mt_ranks_gradients(struct mt_ranks *r, double *sumsq);

/* After an update with sharded state: what operations read of every parameter (=), each rank's
 * parts from it. Nothing to do without. The gradients of weights in 8 bits are overwritten. */
mt_err mt_ranks_parameters(struct mt_ranks *r);
/* And of those in 8 bits alone, after masters have been loaded: they are made of whole masters,
 * which come together where the gradient lies. Nothing to do without sharded state. */
mt_err mt_ranks_quantize(struct mt_ranks *r);

/* The first half of mt_ranks_gradients, for who counts sums without the norm: what has been begun
 * comes to its end. */
mt_err mt_ranks_finish(struct mt_ranks *r);

/* Internal to par/: overlap.c's own end; collect.c's; the communicator, for the backend's memory,
 * of those who share a class; where a bucket lies among gradients or in what operations read. */
void mt_ranks_end_overlap(struct mt_ranks *r);
void mt_ranks_end_collecting(struct mt_ranks *r);
struct mt_comm *mt_ranks_sharing(struct mt_ranks *r, enum mt_sync sync);
char *mt_ranks_bucket(const struct mt_ranks *r, const struct mt_bucket *k, bool compute);

#endif
