/* The list of operations: the contract between the model and every backend.
 *
 * Conventions, for all of them:
 * - Every pointer and tensor is memory of the backend. Row counts that depend on the data
 *   (offsets, valid_count, cu_seqlens) are device data: an implementation must not make the host
 *   wait for them, but for products in device.h's counted_format. So are the numbers that change
 *   from step to step (mt_step_values): what an operation launches depends on its arguments'
 *   shapes, pointers and constants alone, and may be launched again by itself (device.h, graphs).
 * - "act" marks tensors in the activation format (F32 or BF16; F64 on ref), "stat" tensors in F32
 *   (F64 on ref when act is F64), "grad" parameter gradients in F32 (F64 likewise) or, where act is
 *   BF16, in BF16: then each call's sum is made in float32 and rounded once (head_loss: once a
 *   chunk of rows). Arithmetic is float32 or better whatever the storage.
 * - (=) overwritten, never read; (+=) added to; (acc) `accumulate` chooses: 0 is =, 1 is +=.
 * - No output aliases an input unless said. Tensors with NULL data where "or NULL" is said are
 *   left out.
 * - Asynchronous on the backend's stream; results are deterministic.
 * - Errors: MT_ESHAPE naming the operation and the shapes, MT_EUNSUPPORTED naming the dtype.
 * - Sources of the formulas: docs/math.md, section of the same name.
 *
 * Letters: T tokens of the packed row (padding included), R routed rows (T*K at most), H hidden,
 * F ffn, E experts held, K experts a token, V vocabulary, G key-value groups, r queries a group,
 * D head dimension. */
#ifndef MT_BACKEND_OPS_H
#define MT_BACKEND_OPS_H

#include <math.h>

#include "backend/ops_quant.h"
#include "backend/tensor.h"
#include "base/error.h"

struct mt_backend;

/* What router operations hold per token on their stack. */
enum { MT_OPS_MAX_EXPERTS = 512, MT_OPS_MAX_TOP_K = 16 };

/* X(name): struct mt_<name>_args, mt_err name(be, args). One list makes the struct of functions,
 * the names and what the tests enumerate. */
#define MT_OP_LIST(X)                                                                              \
  X(embed_fwd)                                                                                     \
  X(embed_bwd)                                                                                     \
  X(add)                                                                                           \
  X(rmsnorm_fwd)                                                                                   \
  X(rmsnorm_bwd)                                                                                   \
  X(linear_fwd)                                                                                    \
  X(linear_dgrad)                                                                                  \
  X(linear_wgrad)                                                                                  \
  X(rope_table)                                                                                    \
  X(rope)                                                                                          \
  X(attention_fwd)                                                                                 \
  X(attention_bwd)                                                                                 \
  X(kv_append)                                                                                     \
  X(attention_cache)                                                                               \
  X(router_fwd)                                                                                    \
  X(aux_loss)                                                                                      \
  X(router_bwd)                                                                                    \
  X(permute_plan)                                                                                  \
  X(dispatch_fwd)                                                                                  \
  X(dispatch_bwd)                                                                                  \
  X(combine_fwd)                                                                                   \
  X(combine_bwd)                                                                                   \
  X(arrival_plan)                                                                                  \
  X(aux_join)                                                                                      \
  X(parts_sum)                                                                                     \
  X(scatter_add)                                                                                   \
  X(swiglu_fwd)                                                                                    \
  X(swiglu_bwd)                                                                                    \
  X(experts_up_fwd)                                                                                \
  X(experts_down_dgrad)                                                                            \
  X(pad_offsets)                                                                                   \
  X(quantize)                                                                                      \
  X(pack_rows)                                                                                     \
  X(unpack_rows)                                                                                   \
  X(quantize_weight)                                                                               \
  X(qlinear_fwd)                                                                                   \
  X(qlinear_dgrad)                                                                                 \
  X(qlinear_wgrad)                                                                                 \
  X(swiglu_quantize_fwd)                                                                           \
  X(swiglu_quantize_bwd)                                                                           \
  X(head_loss)                                                                                     \
  X(tally)                                                                                         \
  X(sumsq)                                                                                         \
  X(adamw)

/* out[t] = table[ids[t]]. */
struct mt_embed_fwd_args {
  const int32_t *ids;     /* [T], each in [0, V) (the collator's duty) */
  struct mt_tensor table; /* act [V,H] */
  struct mt_tensor out;   /* act [T,H] (=) */
};

/* dtable[ids[t]] += dout[t] for t < *valid_count; accumulate 0 zeroes the whole table first. */
struct mt_embed_bwd_args {
  const int32_t *ids;
  const int32_t *valid_count; /* [1] */
  struct mt_tensor dout;      /* act [T,H] */
  struct mt_tensor dtable;    /* grad [V,H] (acc) */
  int accumulate;
};

/* y = a + b. y may be a or b. */
struct mt_add_args {
  struct mt_tensor a, b, y; /* act [T,H] */
};

/* s = x + residual (or x when residual is NULL); y = s * rstd * weight,
 * rstd = 1 / sqrt(mean(s^2) + eps), all in float32, s rounded to act first. */
struct mt_rmsnorm_fwd_args {
  struct mt_tensor x;        /* act [T,H] */
  struct mt_tensor residual; /* act [T,H] or NULL */
  struct mt_tensor weight;   /* act [H] */
  float eps;
  struct mt_tensor sum;  /* act [T,H] (=) s, or NULL; may be x or residual */
  struct mt_tensor y;    /* act [T,H] (=) */
  struct mt_tensor rstd; /* stat [T] (=) */
};

/* dx = dnorm(dy) + dresidual. */
struct mt_rmsnorm_bwd_args {
  struct mt_tensor dy;        /* act [T,H] */
  struct mt_tensor x;         /* act [T,H]: the forward's s */
  struct mt_tensor weight;    /* act [H] */
  struct mt_tensor rstd;      /* stat [T] */
  struct mt_tensor dresidual; /* act [T,H] or NULL: gradient that arrives beside the norm */
  struct mt_tensor dx;        /* act [T,H] (=); may be dresidual */
  struct mt_tensor dweight;   /* grad [H] (acc), or NULL */
  int accumulate;
};

/* Dense (w rank 2, offsets NULL): y = x w^T.
 * Grouped (w rank 3): rows [offsets[g], offsets[g+1]) of x meet w[g]; rows past offsets[G] of y
 * are left as they are. */
struct mt_linear_fwd_args {
  struct mt_tensor x;     /* act [M,N_in]; any ld */
  struct mt_tensor w;     /* act [N_out,N_in] or [G,N_out,N_in] */
  struct mt_tensor y;     /* act [M,N_out] (=); any ld */
  const int32_t *offsets; /* [G+1] device, or NULL */
};

/* dx = dy w, dense or grouped. */
struct mt_linear_dgrad_args {
  struct mt_tensor dy; /* act [M,N_out]; any ld */
  struct mt_tensor w;
  struct mt_tensor dx; /* act [M,N_in] (acc) */
  const int32_t *offsets;
  int accumulate;
};

/* dw = dy^T x, dense or grouped: a group without rows gets zeros (=) or nothing (+=). */
struct mt_linear_wgrad_args {
  struct mt_tensor dy, x; /* act [M,N_out], [M,N_in] */
  struct mt_tensor dw;    /* grad, shape of w (acc); contiguous where sumsq is given */
  const int32_t *offsets;
  int accumulate;
  double *sumsq; /* [1] (=) device: sum of squares of all of dw as it is stored, as sumsq makes it,
                    but that up to 128 may be added in float32 first; or NULL */
};

/* cos, sin of positions[t] * inv_freq[i], the angle in float32 or better. */
struct mt_rope_table_args {
  const int32_t *positions;  /* [T] */
  const double *inv_freq;    /* host [D/2] */
  struct mt_tensor cos, sin; /* stat [T,D/2] (=) */
};

/* Rotates every query and key head of the fused projection in place, non-interleaved halves:
 * (a, b) = (x[i], x[i+D/2]) -> (a cos - b sin, b cos + a sin). inverse = 1 rotates back, which is
 * the backward. Row layout of qkv: for each group g: r query heads, then K, then V, D wide. */
struct mt_rope_args {
  struct mt_tensor qkv; /* act [T, G*(r+2)*D] (in place) */
  struct mt_tensor cos, sin;
  int kv_heads, q_per_kv, head_dim;
  int inverse;
};

/* Causal attention within each packed sequence: query i sees keys j <= i of its own sequence with
 * i - j < window (window 0: no limit). Rows past cu_seqlens[sequence_count] get zeros.
 * Sequences may be empty. */
struct mt_attention_fwd_args {
  struct mt_tensor qkv;      /* act [T, G*(r+2)*D], rope applied */
  const int32_t *cu_seqlens; /* [sequence_count+1], cu_seqlens[0] = 0 */
  int sequence_count;        /* slots; spare ones repeat the last offset */
  int kv_heads, q_per_kv, head_dim;
  int window;
  float scale;          /* of the logits, usually 1/sqrt(D) */
  struct mt_tensor out; /* act [T, G*r*D] (=), heads in order g*r + q */
  struct mt_tensor
      lse; /* stat [T, G*r] (=): natural log of the softmax's denominator; 0 in padding */
};

struct mt_attention_bwd_args {
  struct mt_attention_fwd_args fwd; /* qkv, lengths and shapes; out and lse as forward left them */
  struct mt_tensor dout;            /* act [T, G*r*D] */
  struct mt_tensor dqkv;            /* act [T, G*(r+2)*D] (=), zeros in padding */
};

/* Copies K and V of T new tokens into a cache at rows [start, start+T). */
struct mt_kv_append_args {
  struct mt_tensor qkv;  /* act [T, G*(r+2)*D], rope applied */
  struct mt_tensor k, v; /* act [capacity, G*D] (rows written =) */
  int start;
  int kv_heads, q_per_kv, head_dim;
};

/* Attention of T new queries at positions start.. against a cache that already holds their own
 * keys: query t sees cache rows j <= start + t (window as above). */
struct mt_attention_cache_args {
  struct mt_tensor qkv;
  struct mt_tensor k, v; /* act [capacity, G*D] */
  int start;
  int kv_heads, q_per_kv, head_dim;
  int window;
  float scale;
  struct mt_tensor out; /* act [T, G*r*D] (=) */
};

/* logits = x w^T in float32; p = softmax over all E; the K largest (ties: lower index first),
 * divided by their sum when renormalize. Padding rows (t >= *valid_count): index -1, prob 0,
 * logits 0, counted nowhere. */
struct mt_router_fwd_args {
  struct mt_tensor x; /* act [T,H] */
  struct mt_tensor w; /* act [E,H] */
  const int32_t *valid_count;
  int renormalize;
  struct mt_tensor logits;   /* stat [T,E] (=), saved for backward */
  struct mt_tensor prob;     /* stat [T,K] (=) */
  int32_t *index;            /* [T,K] (=) */
  struct mt_tensor aux_prob; /* stat [E] (+=): sum over tokens of the raw softmax p */
  int32_t *aux_count;        /* [E] (+=): routed choices */
  struct mt_tensor z_sum;    /* stat [1] (+=): sum over tokens of logsumexp(logits)^2, or NULL */
  int32_t *load;             /* [E] (=): routed choices of this call alone, for metrics */
};

/* Load-balancing loss of all layers together, as transformers computes it
 * (load_balancing_loss_func): E * sum_e (aux_count[e]/rows) * (aux_prob[e]/rows),
 * rows = layer_count * *valid_count.
 * grad[e] = coef * E * aux_count[e] / rows^2, what router_bwd takes.
 * And the z-loss, where z_sum is not NULL: z_sum / rows, z_grad = 2 * z_coef / rows. */
struct mt_aux_loss_args {
  struct mt_tensor aux_prob;
  const int32_t *aux_count;
  const int32_t *valid_count;
  int layer_count;
  const float *coef;       /* [1] */
  struct mt_tensor loss;   /* stat [1] (=), without coef */
  struct mt_tensor grad;   /* stat [E] (=) */
  struct mt_tensor z_sum;  /* stat [1] or NULL: then none of these is looked at */
  const float *z_coef;     /* [1] */
  struct mt_tensor z_loss; /* stat [1] (=), without z_coef */
  struct mt_tensor z_grad; /* stat [1] (=) */
};

/* Gradient of prob through renormalisation, top-k and softmax, plus aux_grad[e] flowing into the
 * raw p[t,e] of every valid token, plus z_grad times logsumexp(logits) into that logsumexp. */
struct mt_router_bwd_args {
  struct mt_tensor x, w;
  const int32_t *valid_count;
  int renormalize;
  struct mt_tensor logits, prob; /* as saved */
  const int32_t *index;
  struct mt_tensor dprob;    /* stat [T,K] */
  struct mt_tensor aux_grad; /* stat [E] or NULL */
  struct mt_tensor z_grad;   /* stat [1] or NULL */
  struct mt_tensor dlogits;  /* stat [T,E] (=): scratch, zeros in padding */
  struct mt_tensor dx;       /* act [T,H] (acc by accumulate_dx) */
  int accumulate_dx;
  struct mt_tensor dw; /* grad [E,H] (acc), or NULL */
  int accumulate;
};

/* Groups the choices by expert, in token order within an expert.
 * offsets[e] = first row of expert e, offsets[E] = rows in all.
 * row_source[row] = t*K + k; token_row[t*K+k] = row, or -1 where index is -1.
 * row_source past offsets[E] is -1. */
struct mt_permute_plan_args {
  const int32_t *index; /* [T,K] */
  int token_count, top_k, expert_count;
  int32_t *offsets;    /* [E+1] (=) */
  int32_t *row_source; /* [T*K] (=) */
  int32_t *token_row;  /* [T*K] (=) */
};

/* xs[row] = x[row_source[row] / K] for every row of xs with row_source[row] >= 0; rows with -1
 * are left as they are. (row_source may be a slice: the loop over experts gathers so.) */
struct mt_dispatch_fwd_args {
  struct mt_tensor x; /* act [T,H] */
  const int32_t *row_source;
  int top_k;
  struct mt_tensor xs; /* act [R,H] (=) */
};

/* dx[t] = sum over k of dxs[token_row[t,k]], in order of k; a token without rows gets 0. */
struct mt_dispatch_bwd_args {
  struct mt_tensor dxs; /* act [R,H] */
  const int32_t *token_row;
  int top_k;
  struct mt_tensor dx; /* act [T,H] (acc) */
  int accumulate;
};

/* y[t] = sum over k of prob[t,k] * ys[token_row[t,k]], in order of k; prob NULL: weights 1. */
struct mt_combine_fwd_args {
  struct mt_tensor ys; /* act [R,H] */
  const int32_t *token_row;
  struct mt_tensor prob; /* stat [T,K] or NULL */
  int top_k;
  struct mt_tensor y; /* act [T,H] (=) */
};

/* For every row of dys with row_source[row] = t*K + k >= 0: dys[row] = prob[t,k] * dy[t],
 * dprob[t,k] = <dy[t], ys[row]>. Rows with -1 are left as they are, and so are entries of dprob
 * without a row (zero them first). dys may be ys. */
struct mt_combine_bwd_args {
  struct mt_tensor dy; /* act [T,H] */
  struct mt_tensor ys; /* act [R,H], or NULL: no dprob */
  const int32_t *row_source;
  struct mt_tensor prob; /* stat [T,K] or NULL: weights 1 */
  int top_k;
  struct mt_tensor dys;   /* act [R,H] (=) */
  struct mt_tensor dprob; /* stat [T,K] (= where a row exists), or NULL */
};

/* Rows that other ranks have sent lie sorted by sender, then expert, and are wanted by expert, then
 * sender. sent[i] holds sender i's own [E+1] offsets of this rank's experts, counted from wherever:
 * it sent sent[i][e+1] - sent[i][e] rows for expert e, R in all.
 * offsets[e] = first row of expert e, offsets[E] = R; order[row] = where the row has arrived, and
 * back is its inverse. */
struct mt_arrival_plan_args {
  const int32_t *sent; /* [ranks,E+1] */
  int rank_count, expert_count;
  int64_t row_count;     /* R: what order and back have room for */
  int32_t *offsets;      /* [E+1] (=) */
  int32_t *order, *back; /* [R] (=) */
};

/* A rank's record of what the auxiliary losses are made of: [N] stat, N = E + 1, the raw softmax's
 * sums and the z-loss's; then [N] int32, counts of choices and the number of tokens; then what is
 * missing to 8 bytes. */
static inline size_t mt_aux_record_bytes(int64_t n, enum mt_dtype stat) {
  return ((size_t)n * (mt_dtype_bytes(stat) + sizeof(int32_t)) + 7) / 8 * 8;
}

/* The records of all ranks added up, in the order of ranks. */
struct mt_aux_join_args {
  const void *records; /* [ranks] */
  int rank_count;
  struct mt_tensor aux_sums; /* stat [E+1] (=) */
  int32_t *aux_count;        /* [E] (=) */
  int32_t *valid_count;      /* [1] (=) */
};

/* out[i] = sum over p of parts[p][i], in the order of p: in float32, rounded once (F64: float64).
 * accumulate: what out held is added last, before the rounding. */
struct mt_parts_sum_args {
  struct mt_tensor parts; /* grad [P,N] */
  struct mt_tensor out;   /* grad [N] (acc) */
  int accumulate;
};

/* y[t] += prob[t,k] * ys[row], t*K + k = row_source[row]; the rows belong to one expert, so that
 * no token appears twice. prob NULL: weights 1. */
struct mt_scatter_add_args {
  struct mt_tensor ys;
  const int32_t *row_source;
  struct mt_tensor prob;
  int top_k;
  struct mt_tensor y; /* act [T,H] (+=) */
};

/* gate = gate_up[:, :F], up = gate_up[:, F:]; h = silu(gate) * up, times row_prob[row] if given.
 * Rows at or past *row_count are left as they are. */
struct mt_swiglu_fwd_args {
  struct mt_tensor gate_up;  /* act [R,2F] */
  struct mt_tensor row_prob; /* stat [R] or NULL */
  const int32_t *row_count;  /* [1] device, or NULL: all rows */
  struct mt_tensor h;        /* act [R,F] (=) */
};

struct mt_swiglu_bwd_args {
  struct mt_tensor dh;       /* act [R,F] */
  struct mt_tensor gate_up;  /* act [R,2F] */
  struct mt_tensor row_prob; /* stat [R] or NULL */
  const int32_t *row_count;
  struct mt_tensor dgate_up;  /* act [R,2F] (=); may be gate_up */
  struct mt_tensor h;         /* act [R,F] (=) recomputed for the down projection's wgrad, or NULL;
                                 may be dh */
  struct mt_tensor drow_prob; /* stat [R] (=), or NULL */
};

/* The first half of all experts in one: gate_up = x w^T as linear_fwd grouped, and h as swiglu_fwd
 * makes it of gate_up as stored. Rows past offsets[G] of gate_up and h are left as they are. */
struct mt_experts_up_fwd_args {
  struct mt_tensor x;        /* act [R,H] */
  struct mt_tensor w;        /* act [G,2F,H]: of each expert gate's F rows, then up's */
  const int32_t *offsets;    /* [G+1] device */
  struct mt_tensor row_prob; /* stat [R] or NULL */
  struct mt_tensor gate_up;  /* act [R,2F] (=) */
  struct mt_tensor h;        /* act [R,F] (=) */
};

/* Its counterpart: dh = dy w as linear_dgrad grouped, then swiglu_bwd on dh, which is not kept; a
 * backend may round it to act in between or not. Rows past offsets[G] of the outputs are left as
 * they are. */
struct mt_experts_down_dgrad_args {
  struct mt_tensor dy;        /* act [R,H] */
  struct mt_tensor w;         /* act [G,H,F]: down */
  const int32_t *offsets;     /* [G+1] device */
  struct mt_tensor gate_up;   /* act [R,2F] */
  struct mt_tensor row_prob;  /* stat [R] or NULL */
  struct mt_tensor dgate_up;  /* act [R,2F] (=); may be gate_up */
  struct mt_tensor h;         /* act [R,F] (=) recomputed for the down projection's wgrad */
  struct mt_tensor drow_prob; /* stat [R] (=), or NULL */
};

/* Head and cross entropy, in chunks of rows: the logits never exist as a whole. Rows whose label is
 * < 0 take no part: their loss is 0, their dx 0. */
struct mt_head_loss_args {
  struct mt_tensor x;      /* act [T,H] */
  struct mt_tensor w;      /* act [V,H] */
  const int32_t *labels;   /* [T]: target of position t, -100 = ignored */
  const float *loss_scale; /* [1] dloss of each row: 1 / targets of the global
                              batch; NULL: no backward */
  struct mt_tensor loss;   /* stat [T] (=): -log p[label], unscaled */
  int32_t *correct;        /* [T] (=): 1 where the label has the largest logit, or NULL */
  struct mt_tensor dx;     /* act [T,H] (=), or NULL: no backward */
  struct mt_tensor dw;     /* grad [V,H] (acc), or NULL */
  int accumulate;
};

/* A micro-batch's numbers, added up for its step's report so that the host need not read them one
 * by one: sums[0] = sum of loss in float64, sums[1] = how many are correct, sums[2] = aux_weight
 * times aux, sums[3] = aux_weight times z_loss (0 without one); load_sums[i] = load[i]. In an order
 * that does not depend on the number of threads. */
struct mt_tally_args {
  struct mt_tensor loss;    /* stat [T] */
  const int32_t *correct;   /* [T] */
  struct mt_tensor aux;     /* stat [1] */
  struct mt_tensor z_loss;  /* stat [1] or NULL */
  const double *aux_weight; /* [1] */
  double *sums;             /* [4] (acc) */
  const int32_t *load;      /* [load_count] */
  int32_t *load_sums;       /* [load_count] (acc) */
  int64_t load_count;
  int accumulate;
};

/* out[0] = sum of squares over all tensors, plus all parts, in float64, in an order that does not
 * depend on the number of threads. NaN and infinity come through. */
struct mt_sumsq_args {
  const struct mt_tensor *tensors; /* host array of grad tensors */
  int tensor_count;
  const double *parts; /* [part_count] device: sums of squares that are known, or NULL */
  int part_count;
  double *out; /* [1] (=) device, none of parts */
};

struct mt_adamw_segment {
  struct mt_tensor master;  /* F32 or BF16 (F64 on ref) [n] (in place) */
  struct mt_tensor grad;    /* as master [n] */
  struct mt_tensor m, v;    /* as master [n] (in place) */
  struct mt_tensor compute; /* act [n] (=) rounded copy, or NULL when master itself is used */
  int decay;                /* weight decay applies */
  uint32_t tensor;          /* its number among the model's parameters, for BF16 */
  int64_t first;            /* of that, the element that this begins with; a multiple of 128 */
};

/* What changes of AdamW from step to step, worked out on the host in float64 (mt_adamw_at). */
struct mt_adamw_values {
  double step_size; /* lr / (1 - b1^step) */
  double root_c2;   /* 1 / sqrt(1 - b2^step) */
  double keep;      /* 1 - lr * weight decay: of segments that decay */
  int64_t step;     /* from 1 */
  uint64_t seed;    /* of the rounding of BF16 */
};

/* AdamW (Loshchilov & Hutter 2019), decoupled decay, as torch.optim.AdamW orders it:
 * w *= keep; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
 * w -= step_size * m / (sqrt(v) * root_c2 + eps).
 * g is first scaled by clip/(norm + 1e-6) where norm = sqrt(*grad_sumsq) is larger (torch's
 * clip_grad_norm_); clip <= 0 or grad_sumsq NULL: no scaling. Nothing is changed where *grad_sumsq
 * is not finite: the host, which learns of it later, finds the weights as they were.
 * BF16: the update is worked out in float32, and w, m, v are rounded at random (docs/math.md,
 * "Stochastic rounding") by numbers that depend on seed, tensor, element and step alone. The cpu
 * and cuda backends give the same bits from the same bits. */
struct mt_adamw_args {
  const struct mt_adamw_segment *segments; /* host array */
  int segment_count;
  double beta1, beta2, eps;
  const struct mt_adamw_values *values; /* [1] device */
  double clip;
  const double *grad_sumsq; /* [1] device */
};

/* Every number that changes from one pass over the model to the next and is no shape: one struct on
 * the device, so that what was launched once can be launched again as it is. */
struct mt_step_values {
  double aux_weight; /* tally's */
  float loss_scale;  /* head_loss's */
  float aux_coef;    /* aux_loss's: the coefficient times the weight */
  float z_coef;      /* likewise */
  struct mt_adamw_values adamw;
};

static inline struct mt_adamw_values mt_adamw_at(double lr, double beta1, double beta2,
                                                 double weight_decay, int64_t step, uint64_t seed) {
  return (struct mt_adamw_values){.step_size = lr / (1 - pow(beta1, (double)step)),
                                  .root_c2 = 1 / sqrt(1 - pow(beta2, (double)step)),
                                  .keep = 1 - lr * weight_decay,
                                  .step = step,
                                  .seed = seed};
}

struct mt_ops {
#define X(op) mt_err (*op)(struct mt_backend * be, const struct mt_##op##_args *a);
  MT_OP_LIST(X)
#undef X
};

#endif
