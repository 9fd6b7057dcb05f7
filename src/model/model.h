/* A Mixtral-class model on one backend: parameters, activations, forward and backward. */
#ifndef MT_MODEL_MODEL_H
#define MT_MODEL_MODEL_H

#include "model/acts.h"
#include "model/buckets.h"

/* How the rungs of the ladder differ. */
enum mt_experts_strategy { MT_EXPERTS_LOOP, MT_EXPERTS_GROUPED, MT_EXPERTS_FUSED };
enum mt_blocks_strategy { MT_BLOCKS_UNFUSED, MT_BLOCKS_FUSED };

/* What backward computes again instead of finding it kept. MLP: the experts' hidden products (and
 * outputs, where those are weighed). FULL: both blocks but for the routing; a layer keeps its
 * input. The gradients are the same to the bit. */
enum mt_recompute { MT_RECOMPUTE_NONE, MT_RECOMPUTE_MLP, MT_RECOMPUTE_FULL };

/* Where a step's time goes; X(phase, name in metrics). */
#define MT_PHASE_LIST(X)                                                                           \
  X(EMBED, "embed")                                                                                \
  X(ATTENTION_FWD, "attention_forward")                                                            \
  X(MOE_FWD, "moe_forward")                                                                        \
  X(HEAD, "head")                                                                                  \
  X(MOE_BWD, "moe_backward")                                                                       \
  X(ATTENTION_BWD, "attention_backward")                                                           \
  X(OPTIMIZER, "optimizer")                                                                        \
  X(DATA, "data")                                                                                  \
  X(PIPELINE, "pipeline_wait")
enum mt_phase {
#define X(phase, name) MT_PHASE_##phase,
  MT_PHASE_LIST(X)
#undef X
      MT_PHASE_COUNT
};
_Static_assert((int)MT_PHASE_COUNT <= (int)MT_CLOCK_PHASES, "the clock has room for all");
const char *mt_phase_name(enum mt_phase phase);

/* What tokens travel as to experts on other ranks, where those multiply in 8 bits: as activations;
 * forward in 8 bits, as the experts' first product takes them; and backward the gradients of the
 * outputs likewise. What comes back is activations. */
enum mt_dispatch_precision { MT_DISPATCH_ACT, MT_DISPATCH_8BIT, MT_DISPATCH_BOTH };

struct mt_model_options {
  enum mt_experts_strategy experts;
  enum mt_blocks_strategy blocks;
  enum mt_recompute recompute;
  double aux_coef;           /* of the auxiliary loss; 0: none */
  double z_coef;             /* of the routers' z-loss; 0: none, and it is not worked out */
  bool training;             /* gradients and saved activations exist */
  int64_t token_capacity;    /* T at most */
  int64_t sequence_capacity; /* packed samples at most */
  int in_flight;             /* of a stage: micro-batches whose activations are kept at a time;
                                0: one */
  struct mt_shard shard;     /* what of the model is here; all zero: all of it */
  unsigned skip_8bit;        /* parts that an 8-bit recipe leaves in its activations' format */
  /* 1: the optimizer's state is cut over the ranks that share a parameter (buckets.h), 2: gradients
   * too; 0: everyone has all of it. */
  int zero;
  struct mt_sharers sharers;
  int64_t bucket_elements; /* 0: MT_BUCKET_ELEMENTS, or ..._GPU where streams are */
  /* Where experts are spread over ranks: chunks that a micro-batch's tokens travel in, so that the
   * experts work on one while others are on their way (exchange.h); 0: one. */
  int chunks;
  enum mt_dispatch_precision dispatch;
};
/* Of gradients that are summed at a time; a GPU's links want 64 MB and more (docs/benchmarks.md).
 */
enum { MT_BUCKET_ELEMENTS = 8 << 20, MT_BUCKET_ELEMENTS_GPU = 64 << 20 };

/* Bytes by lifetime. `planned` from mt_model_plan, the same from a built model's arenas. */
struct mt_memory {
  size_t parameters, gradients, optimizer, activations;
};

struct mt_model {
  struct mt_config config;
  const struct mt_recipe *recipe;
  struct mt_backend *be;
  struct mt_model_options options;
  struct mt_params params;
  struct mt_acts acts;
  struct mt_exchange exchange;
  struct mt_arena parameters, gradients, optimizer, activations;
  struct mt_buckets buckets; /* training: as options say */
  /* With options.zero: this rank's share of each class, in the buckets' order. */
  struct {
    struct mt_tensor master; /* where the state's format is another one than compute's */
    struct mt_tensor m, v;
    struct mt_tensor grad; /* mt_model_grad_shared: sums of this rank's parts */
    struct mt_tensor ring; /* likewise: where params' grad lie, see buckets.h */
  } share[MT_SYNC_COUNT];
  double *inv_freq;    /* host [D/2] */
  int32_t *host_route; /* host [chunks,E+1]: counts read back by the loop over experts */
  void *host_rows;     /* host [T] of 8 bytes: read-backs per token */
  int lowest_learning; /* layers below it hold no learning parameter; -1: the embedding learns */
  bool timed;          /* the time of phases is noted, in acts.report */
  bool in_range;       /* of a profiler, opened by mt_range */
  /* Called in backward once a parameter's gradient of this micro-batch is complete. */
  void (*grad_ready)(void *context, struct mt_param *param);
  void *grad_ready_context;
};

/* Memory of a model with this table of parameters (its `learns` flags count), without taking any.
 * The same code as mt_model_create runs, on arenas that only count. */
mt_err mt_model_plan(const struct mt_config *config, const struct mt_params *params,
                     const struct mt_recipe *recipe, struct mt_backend *be,
                     const struct mt_model_options *options, struct mt_memory *out);

/* Builds the model and takes its memory from the backend; weights are undefined until loaded,
 * optimizer state is zero. Takes over *params (rows with `learns` set), which is emptied.
 * On error nothing is kept. Errors: MT_ENOMEM, MT_EUNSUPPORTED (an operation the backend lacks). */
mt_err mt_model_create(struct mt_model *m, const struct mt_config *config, struct mt_params *params,
                       const struct mt_recipe *recipe, struct mt_backend *be,
                       const struct mt_model_options *options);
void mt_model_destroy(struct mt_model *m);
struct mt_memory mt_model_memory(const struct mt_model *m);

/* Makes the 8-bit forms of all parameters that have them from their masters, or where there are
 * none from compute: after every change of the weights, once a step and not once a pass. Nothing to
 * do in other recipes. Of masters that are cut over ranks mt_ranks_quantize makes them. */
mt_err mt_model_quantize_weights(struct mt_model *m);

/* Whether updated weights come back row by row (options.zero): in an 8-bit recipe copies in 8 bits
 * lie between the others, or are all there is, so that these are no stretch of memory. */
bool mt_model_gathers_rows(const struct mt_model *m);

/* Whether gradients of a class are cut over several ranks: backward then overwrites those of each
 * micro-batch, whatever a pass says, in a ring (buckets.h), and who listens to grad_ready adds them
 * up elsewhere in time. */
static inline bool mt_model_grad_shared(const struct mt_model *m, enum mt_sync sync) {
  return m->options.zero > 1 && m->options.sharers.count[sync] > 1;
}

/* A stretch of a learning parameter that this rank updates: all of it, or with options.zero what
 * lies in its parts of buckets. */
struct mt_piece {
  int row;                                      /* of params */
  int64_t first;                                /* element of the row that it begins with */
  struct mt_tensor compute, master, grad, m, v; /* [n]; of this stretch */
};
/* All of them, in the order of rows and elements; *out is freed by the caller. Errors: MT_ENOMEM.
 */
mt_err mt_model_pieces(const struct mt_model *m, struct mt_piece **out, int *count);

/* What a pass over one micro-batch computes. */
struct mt_pass {
  const struct mt_batch *batch;
  double loss_scale; /* 1 / targets of the global batch */
  double aux_weight; /* this micro-batch's share of the auxiliary losses: its targets over all */
  int accumulate;    /* gradients: 0 overwrites, 1 adds (but see mt_model_grad_shared) */
  bool sum_squares;  /* leaves grad_sumsq of parameters that have one, and says so in grad_summed;
                        for a step's only pass, whose gradients nothing changes afterwards */
};

/* Sums over the targets of one micro-batch. */
struct mt_loss {
  double cross_entropy_sum; /* -sum log p[label] */
  int64_t target_count, correct_count;
  double aux; /* auxiliary loss of this micro-batch, without its coefficient */
  double z;   /* z-loss likewise; 0 where it has no coefficient */
};

/* Forward and backward (train: gradients land in params' grad, acc) or forward alone (eval).
 * loss (=) is read back to the host. Errors: MT_ESHAPE when the batch exceeds the capacities. */
mt_err mt_model_train_pass(struct mt_model *m, const struct mt_pass *pass, struct mt_loss *loss);
/* The train pass without waiting, in two parts: what it needs goes to the device; then it runs, and
 * its numbers are tallied (acc by pass->accumulate) in acts.report and acts.load_sums. With grouped
 * experts the second part launches the same for equal token_count, accumulate and sum_squares,
 * whatever else the batch holds. load does not touch host_values.adamw, which it sends along. */
mt_err mt_model_pass_load(struct mt_model *m, const struct mt_pass *pass);
mt_err mt_model_pass_launch(struct mt_model *m, const struct mt_pass *pass);
/* A stage's parts of a step's micro-batch number `micro`. Forward loads it (as above) and runs the
 * stage's layers from acts.layer[layer_begin].s1, which the caller has filled with acts.aux_sums
 * and aux_count where the stage is not the first (mt_acts.entry), to acts.out. Backward runs from
 * acts.ds and acts.aux_grads, the gradient of out and what the last stage has left of the auxiliary
 * loss, to acts.ds, the gradient of s1; the last stage begins with its head instead, and no other
 * forward may lie between its two. At most options.in_flight have come forward and not yet back,
 * and they come back in their order. */
mt_err mt_model_stage_forward(struct mt_model *m, int micro, const struct mt_pass *pass);
mt_err mt_model_stage_backward(struct mt_model *m, int micro, const struct mt_pass *pass);
/* Forward alone; loss (=), on the last stage alone what mt_model_eval_pass says, 0 elsewhere. */
mt_err mt_model_stage_eval(struct mt_model *m, const struct mt_batch *batch, struct mt_loss *loss);
/* Sets every parameter's grad_summed as a pass with this sum_squares does. */
void mt_model_say_summed(struct mt_model *m, bool summed);
mt_err mt_model_eval_pass(struct mt_model *m, const struct mt_batch *batch, struct mt_loss *loss);

/* Logits of rows [begin, begin+count) of the tokens of the last eval pass or decoding (a backward
 * overwrites them): out (=) host [count, V] F32.
 * For inspection and tests; copies through the activation scratch, a few rows at a time. */
mt_err mt_model_logits(struct mt_model *m, int64_t begin, int64_t count, float *out);

/* From here on the time of phases is counted, from nothing, in acts.report->clock; the first is
 * `phase`. And the end of it: what runs is counted no longer. */
mt_err mt_phase_begin(struct mt_model *m, enum mt_phase phase);
mt_err mt_phase_end(struct mt_model *m);
/* What is launched from here on belongs to this phase, if time is counted. */
mt_err mt_phase_enter(struct mt_model *m, enum mt_phase phase);
/* Names what the host launches from here on, for a profiler of the backend's; NULL: no name. */
void mt_range(struct mt_model *m, const char *name);

/* Model FLOPs of training one token at sequence length S (docs/math.md, "FLOP count"). */
double mt_model_flops_per_token(const struct mt_config *c, double sequence_length);

#endif
