/* The shape of a model, free of any file format (hf/ fills it in). */
#ifndef MT_MODEL_CONFIG_H
#define MT_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/ops.h"

enum { MT_MAX_LAYERS = 256, MT_MAX_EXPERTS = MT_OPS_MAX_EXPERTS, MT_MAX_TOP_K = MT_OPS_MAX_TOP_K };

enum mt_mlp_kind { MT_MLP_MOE }; /* dense and shared-expert layers are further kinds */

/* What one layer is made of. Families differ here, row by row, not in the code's forks. */
struct mt_layer_spec {
  enum mt_mlp_kind mlp;
  bool renormalize; /* router: divide the K probabilities by their sum */
  int window;       /* sliding window, own position included; 0: none */
};

/* What of a model is here: a rank's share, or all of it. The first layer's shard has the embedding,
 * the last layer's the final norm and the head. */
struct mt_shard {
  int expert_begin, expert_end; /* of every layer here; end 0: all */
  int layer_begin, layer_end;   /* end 0: all */
};

struct mt_config {
  char model_type[32];
  int hidden;   /* H */
  int ffn;      /* F of one expert */
  int layers;   /* L */
  int heads;    /* query heads, G*r */
  int kv_heads; /* G */
  int head_dim; /* D, may differ from hidden/heads */
  int experts;  /* E */
  int top_k;    /* K */
  int vocab;    /* V */
  int max_positions;
  double rms_eps;
  double rope_theta;
  bool tied_head;
  double aux_coef;            /* router_aux_loss_coef */
  bool aux_in_loss;           /* output_router_logits: transformers then adds the auxiliary loss */
  int bos_id, eos_id, pad_id; /* -1: none */
  struct mt_layer_spec layer[MT_MAX_LAYERS];
};

struct mt_shard mt_shard_whole(const struct mt_config *c);
/* The shard with what it leaves open filled in; NULL: everything. */
struct mt_shard mt_shard_of(const struct mt_config *c, const struct mt_shard *shard);
/* Whether it is a stage of a pipeline: some layers are elsewhere. */
bool mt_shard_staged(const struct mt_config *c, const struct mt_shard *shard);

/* Everything the rest of the code relies on (positive sizes, heads a multiple of kv_heads, top_k
 * <= experts, even head_dim, 31-bit products where the code uses int). Errors: MT_ESHAPE or
 * MT_EUNSUPPORTED naming the key as config.json spells it and the value. */
mt_err mt_config_check(const struct mt_config *c);

#endif
