/* The parts of a mixture-of-experts layer, each with forward and backward, for programs that put
 * their own layers together. examples/moe_layer.c is a whole layer.
 *
 * A space is a device with its memory and arrays on it. Blocks hold parameters and what their
 * backward needs. Backward belongs to the block's last forward and may be called once or more after
 * it; the arrays that forward read (x, row_scale, offsets) must by then be what they were.
 *
 * Letters: T tokens, H hidden, F ffn, E experts, K experts a token, R = T*K routed rows, S
 * sequences, G key-value heads, r query heads to each, D head dimension.
 *
 * Formats. The recipe in force (mt_recipe_begin) says how activations are stored: "fp32" or "bf16"
 * on "cpu" and "cuda"; "fp64" alone on "ref", the slow float64 reference. Parameters, their
 * gradients, probabilities and row scales are float32 ("ref": float64) under any recipe; a forward
 * under bf16 reads a rounded copy of the parameters, made when it first needs it after the
 * parameter was written. Backward runs under the recipe of its forward, whatever is in force.
 *
 * (=) marks what a call overwrites, (acc) what it overwrites when accumulate is 0 and adds to
 * otherwise. Outputs must not be inputs unless said.
 *
 * Errors: MT_ESHAPE naming shapes that do not fit; MT_EINVAL for an array of another recipe or
 * space, an option out of range or a backward without a forward; MT_ENOMEM; MT_EDEVICE. What int32
 * arrays hold is not checked: offsets rise from 0 to at most the rows, index is in [-1, E).
 *
 * Threads. One thread at a time in a space and what belongs to it; different spaces are
 * independent. Work on a GPU is launched and waited for by the mt_array_read functions alone.
 * Everything made in a space is freed before it is closed; freeing NULL does nothing.
 */
#ifndef MOETUNE_BLOCKS_H
#define MOETUNE_BLOCKS_H

#include <stddef.h>
#include <stdint.h>

#include "moetune/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mt_space mt_space;
typedef struct mt_array mt_array;
typedef struct mt_block mt_block;
typedef struct mt_router mt_router;
typedef struct mt_dispatcher mt_dispatcher;

/* device: "auto", "cpu", "cuda", "cuda-portable", "ref". threads: of the CPU; 0: one a core. */
MT_API mt_err mt_space_open(const char *device, int threads, mt_space **out);
MT_API void mt_space_close(mt_space *s);

/* The recipe from here to mt_recipe_end, which brings back the one before. Scopes nest, 16 deep at
 * most; outside of all of them it is fp32 ("ref": fp64). Errors: MT_EUNSUPPORTED naming it. */
MT_API mt_err mt_recipe_begin(mt_space *s, const char *name);
MT_API mt_err mt_recipe_end(mt_space *s);

enum mt_array_kind {
  MT_ARRAY_ACT, /* activations, in the format of the recipe in force when it is made */
  MT_ARRAY_FULL,
  MT_ARRAY_INT /* int32 */
};
/* Zeros. rank 1 to 3, row-major; dims at least 1. */
MT_API mt_err mt_array_create(mt_space *s, enum mt_array_kind kind, int rank, const int64_t *dim,
                              mt_array **out);
MT_API void mt_array_free(mt_array *a);
MT_API int64_t mt_array_count(const mt_array *a); /* elements */
MT_API int mt_array_rank(const mt_array *a);
MT_API int64_t mt_array_dim(const mt_array *a, int i); /* 0 past the rank */
/* All elements from and to the host, converted (rounded to nearest even) on the way; read waits for
 * what was launched. The int forms are for MT_ARRAY_INT alone, the others for the rest. */
MT_API mt_err mt_array_write(mt_array *a, const double *from);
MT_API mt_err mt_array_read(const mt_array *a, double *to);
MT_API mt_err mt_array_write_ints(mt_array *a, const int32_t *from);
MT_API mt_err mt_array_read_ints(const mt_array *a, int32_t *to);
/* y (=) = a + b: activations of one shape and format; y may be a or b. */
MT_API mt_err mt_array_add(const mt_array *a, const mt_array *b, mt_array *y);
/* offsets [groups+1] (=) from how many rows each group has. */
MT_API mt_err mt_offsets_from_sizes(const int32_t *sizes, int groups, mt_array *offsets);

/* ---- blocks ---- */

/* What a block's rows are, beside x. Each block says what it needs; the rest may be 0. */
struct mt_rows_info {
  const mt_array *offsets;         /* [groups+1]: group g is rows [offsets[g], offsets[g+1]) */
  const mt_array *row_scale;       /* [rows] FULL */
  const int32_t *sequence_lengths; /* host [sequence_count]; they add up to the rows */
  int sequence_count;
};

/* y = x / sqrt(mean(x^2) + eps) * weight, [rows, width]. Parameter 0: weight [width], ones. */
MT_API mt_err mt_norm_create(mt_space *s, int width, double eps, mt_block **out);

/* Norm, projection to queries, keys and values, rotary positions from 0 in each sequence, causal
 * attention within it, output projection; with `residual`, x is added to that. [T,H] to [T,H].
 * Parameters: 0 norm [H], ones; 1 qkv [G*(r+2)*D, H], for each g its r query heads, then K, then V;
 * 2 out [H, G*r*D]. Needs: sequence_lengths. */
struct mt_attention_shape {
  int hidden, heads, kv_heads, head_dim; /* heads = G*r; head_dim even */
  int window;                            /* keys that a query sees, its own included; 0: all */
  double rope_theta, norm_eps;           /* 10000 and 1e-5, say */
  int residual;
};
MT_API mt_err mt_attention_create(mt_space *s, const struct mt_attention_shape *shape,
                                  mt_block **out);

/* y = x w[g]^T for the rows of each group g; rows past the last offset of y are left as they are
 * (and take no part in gradients). [R,in] to [R,out]. Parameter 0: w [groups, out, in]. Needs:
 * offsets. */
MT_API mt_err mt_grouped_linear_create(mt_space *s, int groups, int in, int out_width,
                                       mt_block **out);

/* silu(x[:, :F]) * x[:, F:] * row_scale, [R,2F] to [R,F]. No parameters. Takes row_scale (none: 1)
 * and offsets (none: all rows, else up to the last offset). groups: as the offsets have. */
MT_API mt_err mt_scaled_swiglu_create(mt_space *s, int groups, int ffn, mt_block **out);

/* Blocks one after another, which it takes over: widths must follow on each other. Where `fuse` is
 * not 0, each run of grouped linear, scaled SwiGLU, grouped linear (of as many groups) is replaced
 * by the fused chain, in which SwiGLU is part of the products beside it; the results agree to
 * rounding. Parameters: the blocks', in their order. At least one and at most 64 blocks. On error
 * nothing is taken over. */
MT_API mt_err mt_sequence_create(mt_space *s, mt_block *const *blocks, int count, int fuse,
                                 mt_block **out);
/* How many fused chains a sequence runs; 0 for other blocks. */
MT_API int mt_sequence_fused_count(const mt_block *b);

MT_API void mt_block_free(mt_block *b);

/* Parameter i and its gradient, which belong to the block; NULL past the last. Zeros (norms: ones)
 * until written. Writing one (mt_array_write, or mt_array_add as y) is seen by the next forward. */
MT_API mt_array *mt_block_parameter(mt_block *b, int i);
MT_API mt_array *mt_block_gradient(mt_block *b, int i);

/* y (=) of x. info may be NULL where nothing is needed. */
MT_API mt_err mt_block_forward(mt_block *b, const mt_array *x, const struct mt_rows_info *info,
                               mt_array *y);
/* dx (=) from dy; parameters' gradients (acc); drow_scale (=) [rows] FULL: what row_scale gets, of
 * blocks that take it (a sequence: of its one SwiGLU), else NULL; may be NULL. dx may not be dy. */
MT_API mt_err mt_block_backward(mt_block *b, const mt_array *dy, mt_array *dx, mt_array *drow_scale,
                                int accumulate);

/* ---- router ---- */

struct mt_router_shape {
  int hidden, experts, top_k;
  int renormalize; /* the K probabilities are divided by their sum */
  double aux_coef; /* of the load-balancing loss, whose gradient backward adds; 0: none */
  double z_coef;   /* of the z-loss, likewise */
};
/* p = softmax(x w^T) over all experts and the K largest of it. Parameter w [E,H]. */
MT_API mt_err mt_router_create(mt_space *s, const struct mt_router_shape *shape, mt_router **out);
MT_API void mt_router_free(mt_router *r);
MT_API mt_array *mt_router_parameter(mt_router *r);
MT_API mt_array *mt_router_gradient(mt_router *r);
/* x [T,H]; prob (=) [T,K] FULL; index (=) [T,K] INT. */
MT_API mt_err mt_router_forward(mt_router *r, const mt_array *x, mt_array *prob, mt_array *index);
/* The last forward's E * sum_e f_e P_e, without its coefficient (f_e: choices of e a token, P_e:
 * its mean probability). Waits for it. */
MT_API mt_err mt_router_aux_loss(mt_router *r, double *loss);
/* The last forward's mean over tokens of logsumexp(x w^T)^2, without its coefficient; 0 where that
 * is 0. Waits for it. */
MT_API mt_err mt_router_z_loss(mt_router *r, double *loss);
/* dprob [T,K] FULL; dx [T,H] (+=): dispatch's gradient lies there already; w's gradient (acc). prob
 * and index are those of the forward. */
MT_API mt_err mt_router_backward(mt_router *r, const mt_array *dprob, mt_array *dx, int accumulate);

/* ---- dispatcher ---- */

MT_API mt_err mt_dispatcher_create(mt_space *s, int experts, int top_k, mt_dispatcher **out);
MT_API void mt_dispatcher_free(mt_dispatcher *d);
/* Groups the choices index [T,K] by expert, in token order within one; -1 is no choice. What
 * follows uses the last plan. */
MT_API mt_err mt_dispatcher_plan(mt_dispatcher *d, const mt_array *index);
/* [E+1] of the last plan; the dispatcher's. NULL before the first. */
MT_API const mt_array *mt_dispatcher_offsets(const mt_dispatcher *d);
/* xs (=) [R,H]: x[t] in the row of each of t's choices. Rows without a choice are left as they are.
 * Backward: dx (=) [T,H], the sum of t's rows. */
MT_API mt_err mt_dispatch_forward(mt_dispatcher *d, const mt_array *x, mt_array *xs);
MT_API mt_err mt_dispatch_backward(mt_dispatcher *d, const mt_array *dxs, mt_array *dx);
/* row_scale (=) [R] FULL: each row's probability of prob [T,K] FULL; and back, dprob (=) [T,K]. */
MT_API mt_err mt_dispatch_prob_forward(mt_dispatcher *d, const mt_array *prob, mt_array *row_scale);
MT_API mt_err mt_dispatch_prob_backward(mt_dispatcher *d, const mt_array *drow_scale,
                                        mt_array *dprob);
/* y (=) [T,H]: the sum of t's rows of ys [R,H], weighted by prob [T,K] unless that is NULL.
 * Backward: dys (=) [R,H], and with prob dprob (=) [T,K] from ys; without it both are NULL. */
MT_API mt_err mt_combine_forward(mt_dispatcher *d, const mt_array *ys, const mt_array *prob,
                                 mt_array *y);
MT_API mt_err mt_combine_backward(mt_dispatcher *d, const mt_array *dy, const mt_array *prob,
                                  const mt_array *ys, mt_array *dys, mt_array *dprob);

#ifdef __cplusplus
}
#endif

#endif
