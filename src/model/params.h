/* The parameter table: one row per parameter tensor, in forward order. Everything that walks the
 * parameters (loading, export, gradient norm, optimizer, synchronisation, memory plan) walks this
 * table. */
#ifndef MT_MODEL_PARAMS_H
#define MT_MODEL_PARAMS_H

#include "backend/qtensor.h"
#include "backend/tensor.h"
#include "model/config.h"

/* How a parameter's gradient is reduced over ranks. */
enum mt_sync { MT_SYNC_DENSE, MT_SYNC_EXPERT };

/* X(kind, internal name, weight decay, sync). Decay falls on matrices only, as transformers'
 * default groups do. */
#define MT_PARAM_KIND_LIST(X)                                                                      \
  X(EMBED, "embed", 1, MT_SYNC_DENSE)           /* [V,H] */                                        \
  X(ATTN_NORM, "attn_norm", 0, MT_SYNC_DENSE)   /* [H] */                                          \
  X(QKV, "qkv", 1, MT_SYNC_DENSE)               /* [G*(r+2)*D, H]: per group r queries, K, V */    \
  X(ATTN_OUT, "attn_out", 1, MT_SYNC_DENSE)     /* [H, G*r*D] */                                   \
  X(MLP_NORM, "mlp_norm", 0, MT_SYNC_DENSE)     /* [H] */                                          \
  X(ROUTER, "router", 1, MT_SYNC_DENSE)         /* [E,H] */                                        \
  X(GATE_UP, "gate_up", 1, MT_SYNC_EXPERT)      /* [E,2F,H]: gate (w1) over up (w3) */             \
  X(DOWN, "down", 1, MT_SYNC_EXPERT)            /* [E,H,F] (w2) */                                 \
  X(FINAL_NORM, "final_norm", 0, MT_SYNC_DENSE) /* [H] */                                          \
  X(HEAD, "head", 1, MT_SYNC_DENSE)             /* [V,H]; no row when tied to EMBED */

enum mt_param_kind {
#define X(kind, name, decay, sync) MT_PARAM_##kind,
  MT_PARAM_KIND_LIST(X)
#undef X
      MT_PARAM_KIND_COUNT
};

struct mt_param {
  enum mt_param_kind kind;
  int layer;     /* -1 outside the layers */
  char name[48]; /* "layers.3.qkv", "embed": unique; names the optimizer state in checkpoints */
  int rank;
  int64_t dim[MT_MAX_RANK]; /* of what is here */
  int64_t first;            /* in the whole parameter, the index in dim[0] where it begins */
  bool decay;
  enum mt_sync sync;
  bool learns; /* false (frozen): no gradient, no state */
  /* The forms it has; data NULL where it has not. */
  struct mt_tensor compute; /* act format: what operations read */
  struct mt_qtensor q;      /* what products read instead, where the recipe has them in 8 bits;
                               compute is then absent where there is a master of its own */
  struct mt_tensor master;  /* the optimizer's copy, in the recipe's state format; the same memory
                               as compute where the formats are; absent when frozen or not
                               training */
  struct mt_tensor grad;    /* learns and training only */
  struct mt_tensor m, v;
  double *grad_sumsq; /* device [1], the optimizer's: where backward can leave grad's sum of
                         squares; or NULL */
  bool grad_summed;   /* it does, in the pass loaded last */
};

struct mt_params {
  struct mt_param *row;
  int count;
};

/* Builds the rows (all learning, no memory) of what is here of a checked config; shard NULL: of
 * everything. Errors: MT_ENOMEM; MT_EUNSUPPORTED where layers are elsewhere and the head is
 * tied to the embedding. mt_params_free releases the table, not the tensors' memory. */
mt_err mt_params_build(const struct mt_config *c, const struct mt_shard *shard,
                       struct mt_params *out);
void mt_params_free(struct mt_params *p);

/* The row of a kind in a layer (-1 outside the layers). HEAD gives EMBED's row when tied; NULL when
 * there is none. */
struct mt_param *mt_params_find(const struct mt_params *p, enum mt_param_kind kind, int layer);

const char *mt_param_kind_name(enum mt_param_kind kind);
int64_t mt_param_count(const struct mt_param *p); /* elements */

#endif
