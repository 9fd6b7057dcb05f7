/* What the attention kernels share: one description of a call, the plan of its tiles, and which
 * keys a query sees. */
#ifndef MT_KERNELS_CUDA_ATTENTION_CUH
#define MT_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/device.cuh"

/* Largest head dimension of the kernels here. */
enum { ATTENTION_HEAD_DIM_MOST = 128 };

/* A tile of a sequence: rows begin + [tile * TILE, min(count, (tile + 1) * TILE)). */
struct attention_item {
  int begin, count, tile, unused;
};

/* One call, packed or against a cache. Columns of a row, in elements: query head q of group g at
 * g * q_group + q * d of q; its key and value at g * kv_group of k and v; its output, and the
 * gradient of that, at (g * r + q) * d. Gradients lie as what they belong to. */
struct attention_call {
  const void *q, *k, *v, *dout;
  void *out, *dq, *dk, *dv;
  float *lse;   /* [T, heads], or NULL: not wanted */
  float *delta; /* [T, heads]: dout . out */
  int64_t q_ld, kv_ld, out_ld, lse_ld, dout_ld, dqkv_ld;
  int q_group, kv_group;
  int kv_heads, r, d;
  int window; /* 0: none */
  float scale;
  int rows;                     /* T */
  int offset;                   /* position of the first query among the keys */
  bool aligned;                 /* d % 8 == 0, and every head of every row begins at 16 bytes */
  struct attention_item *items; /* NULL: one sequence of all rows */
  int *item_count;
  int *units_taken; /* 0 at the start: by blocks that stay; NULL: they take turns */
  int item_grid;    /* the host's bound on *item_count */
};

/* Tile number `index` of the call, or false where there are fewer. Causal queries have the more
 * keys the later they come, and what takes long should begin first: `backwards`. */
template <int TILE>
__device__ __forceinline__ bool attention_item_of(const struct attention_call &c, int index,
                                                  bool backwards, struct attention_item *item) {
  int count = c.items ? *c.item_count : (c.rows + TILE - 1) / TILE;
  if (index >= count) return false;
  if (backwards) index = count - 1 - index;
  *item = {0, c.rows, index, 0};
  if (c.items) {
    int4 v = *reinterpret_cast<const int4 *>(c.items + index);
    *item = {v.x, v.y, v.z, 0};
  }
  return true;
}

/* Keys [lo, hi) that the queries at positions [first, last] see between them. */
__device__ __forceinline__ void attention_keys(int first, int last, int window, int *lo, int *hi) {
  *lo = window > 0 && first >= window ? first - window + 1 : 0;
  *hi = last + 1;
}

/* Past the last query of `count` that sees one of the keys up to position `last`. */
__device__ __forceinline__ int attention_queries_end(int last, int count, int window) {
  return window > 0 && window < count - last ? last + window : count;
}

__device__ __forceinline__ bool attention_sees(int query, int key, int window) {
  return key <= query && (window == 0 || query - key < window);
}

/* Each takes a call whose items have tiles of its size. Backward: dK and dV per tile of keys, dQ
 * per tile of queries, so that no sum has two owners; delta must be there, but on Hopper, whose dQ
 * writes it. */

enum { ATTENTION_SIMPLE_FWD_TILE = 64, ATTENTION_SIMPLE_BWD_TILE = 32, ATTENTION_MMA_TILE = 128 };

/* F32 and BF16, any head dimension, any alignment; float32 throughout. */
mt_err mt_cuda_attention_simple_fwd(struct mt_cuda *cuda, const struct attention_call *c,
                                    enum mt_dtype dtype);
mt_err mt_cuda_attention_simple_bwd(struct mt_cuda *cuda, const struct attention_call *c,
                                    enum mt_dtype dtype);

/* BF16, aligned, scale > 0; tensor cores of any chip from sm_80 on. */
mt_err mt_cuda_attention_mma_fwd(struct mt_cuda *cuda, const struct attention_call *c);
mt_err mt_cuda_attention_mma_bwd(struct mt_cuda *cuda, const struct attention_call *c);

/* The same on Hopper, with wgmma; it takes head dimensions from 65 to 128. */
bool mt_cuda_attention_sm90_takes(const struct mt_cuda *cuda, const struct attention_call *c);
mt_err mt_cuda_attention_sm90_fwd(struct mt_cuda *cuda, const struct attention_call *c);
mt_err mt_cuda_attention_sm90_bwd(struct mt_cuda *cuda, const struct attention_call *c);

/* Few queries against a long cache, split over the cache. */
enum { ATTENTION_DECODE_ROWS_MOST = 15 };
size_t mt_cuda_attention_decode_bytes(int64_t heads, int64_t kv_heads, int64_t d);
mt_err mt_cuda_attention_decode(struct mt_cuda *cuda, const struct attention_call *c,
                                enum mt_dtype dtype, float *parts);

#endif
