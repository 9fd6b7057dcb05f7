/* What one micro-batch keeps in memory between forward and backward, and the scratch both share.
 * Laid out once, at the largest token count, in one arena: buffers never move, so nothing allocates
 * after the first step and the plan is exact. */
#ifndef MT_MODEL_ACTS_H
#define MT_MODEL_ACTS_H

#include "backend/batch.h"
#include "base/arena.h"
#include "model/config.h"
#include "model/exchange.h"
#include "quant/linear.h"
#include "quant/recipe.h"

enum { MT_LOGIT_ROWS = 8 };

/* Parts of a pass that never run at one time: what one of them needs for itself, workspace
 * included, lies over what the others do. ENDS is everything outside the layers, and what runs
 * between passes. */
enum mt_room { MT_ROOM_ATTENTION, MT_ROOM_MOE, MT_ROOM_ENDS, MT_ROOM_COUNT };

/* Memory beside the arenas that grows: rows that come from other ranks, whose worst case is too
 * large to reserve. */
struct mt_growing {
  struct mt_arena arena; /* over memory of its own */
  int64_t row_capacity;
};

/* What a layer keeps from forward to backward. The normalised inputs of both blocks and the
 * dispatched tokens are not among it: backward makes them again, which is cheap. */
struct mt_layer_acts {
  struct mt_tensor s1;     /* act [T,H] residual stream at the attention's norm */
  struct mt_tensor rstd1;  /* stat [T] */
  struct mt_tensor rstd2;  /* stat [T] */
  struct mt_tensor logits; /* stat [T,E] */
  struct mt_tensor prob;   /* stat [T,K] */
  struct mt_route route;
  struct mt_tensor row_prob; /* stat [R] routing probability of each row, without weigh_outputs */
  int32_t *load;             /* [E], a row of mt_acts.loads */
  struct mt_tensor qkv;      /* act [T,G*(r+2)*D] after rope */
  struct mt_tensor att;      /* act [T,G*r*D] */
  struct mt_tensor lse;      /* stat [T,G*r] */
  struct mt_tensor s2;       /* act [T,H] residual stream at the MoE's norm */
  struct mt_tensor gate_up;  /* act [R,2F]; backward leaves its gradient here */
  /* act [R,H]: expert outputs; in backward dys, then dxs. Where backward needs no outputs of
   * forward, one for all layers in the MoE's room. */
  struct mt_tensor ys;
  /* act [R,H]: dispatched tokens. On one rank the memory of ys, gathered again when backward needs
   * them; over ranks kept, since they have come from afar. */
  struct mt_tensor xs;
  struct mt_growing rows; /* over ranks: row_prob, xs and, where it is kept, gate_up lie here */
};

struct mt_acts_options {
  int64_t token_capacity, sequence_capacity;
  int in_flight;       /* micro-batches that are kept at a time: sets of what layers keep */
  bool training;       /* layers keep something; else all layers share one set of buffers */
  bool keep_attention; /* each layer keeps qkv, att, lse, s2; else all layers share them */
  bool keep_mlp;       /* each layer keeps gate_up, and ys if outputs are weighed; else shared */
  bool weigh_outputs;  /* backward needs the experts' outputs, which prob weighs; else the
                          probability enters before the down projection */
  unsigned skip_8bit;  /* as mt_model_options has it */
  bool over_ranks;     /* R is not bounded by the tokens here: what has rows grows */
  int chunks;          /* over ranks: that tokens travel in; else 1 */
};

/* What the host reads of a step, followed on the device by load_sums. */
struct mt_step_report {
  double sums[4];        /* tally's */
  double grad_sumsq;     /* of the host's copy alone: the optimizer's */
  struct mt_clock clock; /* by enum mt_phase */
};

/* What a micro-batch has to itself from its forward to its backward. Stages of a pipeline have
 * several under way, a set for each; these fields of mt_acts are those of the one that runs.
 * layer: host array by number of layer, filled for those of the shard. The rest is all that changes
 * from pass to pass, one block of the device that one upload fills from its copy on the host:
 * values, valid_count, cu_seqlens (as many as there may be sequences), and T each of ids, positions
 * and labels, whose places depend on T; and what follows from it: stat [T,D/2] cos and sin, and
 * [layers,E] loads, 0 of layers elsewhere. */
#define MT_ACTS_SET_FIELDS                                                                         \
  struct mt_layer_acts *layer;                                                                     \
  void *host_block;                                                                                \
  struct mt_step_values *values, *host_values;                                                     \
  int32_t *ids, *positions, *labels, *cu_seqlens, *valid_count;                                    \
  struct mt_tensor cos, sin;                                                                       \
  int32_t *loads;
struct mt_acts_set {
  MT_ACTS_SET_FIELDS
};

/* A stage's ends: where hidden states and gradients lie that come from a neighbour or go to one. */
struct mt_stage_entry {
  struct mt_tensor stream; /* act [T,H] hidden states that came; none on the first stage */
  /* stat [E+1], [E]: what the auxiliary losses are made of, one stretch of memory; came, and goes
   * on with what this stage's layers add. */
  struct mt_tensor aux_sums;
  int32_t *aux_count;
};
struct mt_stage_turn {
  struct mt_tensor out;           /* act [T,H] hidden states that go; none on the last stage */
  struct mt_tensor ds, aux_grads; /* act [T,H], stat [E+1]: gradients that came, and go on */
};

struct mt_acts {
  struct mt_acts_options options;
  struct mt_shard shard;
  int layer_count; /* of the whole model */
  union {
    struct {
      MT_ACTS_SET_FIELDS
    };
    struct mt_acts_set set;
  };
  struct mt_acts_set *sets; /* [in_flight]; that of the one that runs is `set` */
  int running;              /* number of the set that is selected */
  int forwarded;            /* of the set whose forward was the last to run, -1 once any backward
                               has: what layers share holds its last layer's */
  /* Stages: a micro-batch's entry is its number modulo in_flight + 1, so that the next can come in
   * while all are under way; the turn is its number modulo 2, so that one can leave while the next
   * is made. */
  struct mt_stage_entry *entry;
  struct mt_stage_turn turn[2];
  struct mt_tensor out;       /* stages: of the turn, as ds and aux_grads are */
  struct mt_tensor aux_sums;  /* stat [E+1]: aux_prob, then z_sum; stages: of the entry */
  struct mt_tensor aux_grads; /* stat [E+1]: aux_grad, then z_grad */
  struct mt_tensor aux_prob, aux_loss, aux_grad; /* stat [E], [1], [E] */
  struct mt_tensor z_sum, z_loss, z_grad;        /* stat [1] each */
  int32_t *aux_count;                            /* [E], behind aux_sums */
  size_t aux_bytes;                              /* of both */
  struct mt_tensor loss;                         /* stat [T] */
  int32_t *correct;                              /* [T] */
  struct mt_step_report *report;
  int32_t *load_sums; /* [layers,E] */
  /* Scratch of all rooms. */
  struct mt_tensor branch; /* act [T,H]: output of a block on its way to the residual stream */
  struct mt_tensor ds;     /* act [T,H]: gradient of the residual stream (training) */
  struct mt_tensor xn;     /* act [T,H]: normalised input of the block that runs */
  /* Attention's. */
  struct mt_tensor datt, dqkv;
  /* The MoE's. */
  struct mt_growing room_rows; /* over ranks: h, ys, drow_prob, a gate_up that layers share, and
                                  the room's workspace lie here */
  struct mt_tensor h;          /* act [R,F]: SwiGLU's output; dh and h again in backward */
  struct mt_tensor dprob, dlogits;
  struct mt_tensor drow_prob; /* stat [R] */
  /* Memory of 8-bit operands (quant/linear.h), in rooms; NULL in recipes without. Of the attention:
   * [0] the projections' inputs in forward, then gradients; [1] what meets gradients in wgrad. Of
   * the MoE: [0] dispatched tokens, then the gradient of the outputs, then tokens again; [1] the
   * gradient of gate and up; [2] SwiGLU's output. */
  void *attention_operand[2], *moe_operand[3];
  enum mt_qformat attention_format, moe_format;
  /* The ends': from the last layer's forward to its backward. */
  struct mt_tensor sf, xf, rstdf; /* final norm */
  struct mt_tensor logit_rows;    /* act [few,V]: logits asked for by the host */
  struct {
    void *data;
    size_t size_bytes;
  } workspace[MT_ROOM_COUNT];
};

/* What be's operations must be ready for in a room. */
struct mt_limits mt_acts_limits(const struct mt_config *c, const struct mt_recipe *recipe,
                                int64_t token_capacity, enum mt_room room);

/* Takes everything from the arena (which may be a planning one: then all pointers stay NULL).
 * Errors: MT_ENOMEM. mt_acts_free releases host memory only. */
mt_err mt_acts_layout(struct mt_acts *a, const struct mt_config *c, const struct mt_shard *shard,
                      const struct mt_recipe *recipe, const struct mt_backend *be,
                      const struct mt_acts_options *options, struct mt_arena *arena);
void mt_acts_free(struct mt_acts *a);
/* Zero what is read and never written on a stage. */
mt_err mt_acts_clear(struct mt_acts *a, const struct mt_config *c, struct mt_backend *be);

/* Micro-batch number `micro` of a step runs from here on: its set, entry and turn. The host's
 * values of the one before go along. */
void mt_acts_select(struct mt_acts *a, int micro);

static inline bool mt_acts_first_stage(const struct mt_acts *a) {
  return a->shard.layer_begin == 0;
}
static inline bool mt_acts_last_stage(const struct mt_acts *a) {
  return a->shard.layer_end == a->layer_count;
}
static inline bool mt_acts_staged(const struct mt_acts *a) {
  return !mt_acts_first_stage(a) || !mt_acts_last_stage(a);
}

/* Over ranks: room for so many rows in a layer and in the MoE's room. Nothing of either may be in
 * use. *grown (=) whether memory was taken anew. Errors: MT_ENOMEM. */
mt_err mt_acts_reserve_rows(struct mt_acts *a, const struct mt_config *c,
                            const struct mt_recipe *recipe, struct mt_backend *be, int layer,
                            int64_t rows, bool *grown);
/* Gives back what grew. */
void mt_acts_release_rows(struct mt_acts *a, struct mt_backend *be);

/* Gives be the room's workspace. What other rooms hold is lost. */
void mt_acts_enter(const struct mt_acts *a, struct mt_backend *be, enum mt_room room);

/* Copies a batch and *host_values to the device; slots for further sequences are empty ones.
 * Errors: MT_ESHAPE when it exceeds the capacities. */
mt_err mt_acts_load(struct mt_acts *a, struct mt_backend *be, const struct mt_batch *batch);

#endif
