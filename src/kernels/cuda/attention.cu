/* Attention: which kernels run, the plan of tiles, and what is not the kernels' (padding, the dot
 * products of outputs and their gradients). Formulas: docs/math.md, "Attention". */
#include "kernels/cuda/attention.cuh"

namespace {

enum { PLAN_THREADS = 1024, ROW_THREADS = 256 };

/* Rows past the last sequence, which get zeros: 16-byte words where they are aligned. */
struct padding {
  void *data;
  int64_t ld_bytes, row_bytes;
};

__device__ void zero_rows(const struct padding &p, int64_t first, int64_t rows, int64_t thread,
                          int64_t threads) {
  bool whole = p.ld_bytes % 16 == 0 && p.row_bytes % 16 == 0 && (uintptr_t)p.data % 16 == 0;
  int64_t unit = whole ? 16 : 2, per_row = p.row_bytes / unit;
  for (int64_t i = thread; i < (rows - first) * per_row; i += threads) {
    char *at = (char *)p.data + (first + i / per_row) * p.ld_bytes + i % per_row * unit;
    if (whole) {
      *(int4 *)at = make_int4(0, 0, 0, 0);
    } else {
      *(short *)at = 0;
    }
  }
}

/* Inclusive sum over the block's threads. shared: 32 ints. */
__device__ int block_scan(int x, int *shared) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int n = 1; n < 32; n *= 2) {
    int y = __shfl_up_sync(0xffffffffu, x, n);
    if (lane >= n) x += y;
  }
  __syncthreads();
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; w++) x += shared[w];
  return x;
}

/* Block 0 lists the tiles of all sequences in order; the others zero the padding. The host does not
 * know the lengths: it sizes grids by a bound, and a block without a tile ends at once. */
__global__ void __launch_bounds__(PLAN_THREADS)
    plan_kernel(const int32_t *cu_seqlens, int sequence_count, int tile,
                struct attention_item *items, int *item_count, int *units_taken, int64_t rows,
                struct padding a, struct padding b) {
  __shared__ int shared[33];
  if (blockIdx.x > 0) {
    int64_t first = cu_seqlens[sequence_count], threads = (int64_t)(gridDim.x - 1) * blockDim.x;
    int64_t thread = (int64_t)(blockIdx.x - 1) * blockDim.x + threadIdx.x;
    zero_rows(a, first, rows, thread, threads);
    zero_rows(b, first, rows, thread, threads);
    return;
  }
  int before = 0;
  for (int s0 = 0; s0 < sequence_count; s0 += PLAN_THREADS) {
    int s = s0 + threadIdx.x, begin = 0, count = 0;
    if (s < sequence_count) {
      begin = cu_seqlens[s];
      count = cu_seqlens[s + 1] - begin;
    }
    int tiles = (count + tile - 1) / tile, end = before + block_scan(tiles, shared);
    /* A warp writes the tiles of its 32 sequences together: one may have thousands. */
    for (int i = 0; i < 32; i++) {
      int n = __shfl_sync(0xffffffffu, tiles, i), at = __shfl_sync(0xffffffffu, end, i) - n;
      int4 item =
          make_int4(__shfl_sync(0xffffffffu, begin, i), __shfl_sync(0xffffffffu, count, i), 0, 0);
      for (item.z = threadIdx.x % 32; item.z < n; item.z += 32)
        *reinterpret_cast<int4 *>(items + at + item.z) = item;
    }
    if (threadIdx.x == PLAN_THREADS - 1) shared[32] = end;
    __syncthreads();
    before = shared[32];
  }
  if (threadIdx.x == 0) {
    *item_count = before;
    *units_taken = 0;
  }
}

/* delta[t, head] = dout . out; a warp has one. */
template <class T>
__global__ void __launch_bounds__(ROW_THREADS)
    delta_kernel(const struct attention_call c, const int32_t *valid) {
  int heads = c.kv_heads * c.r, lane = threadIdx.x % 32;
  int64_t i = (int64_t)blockIdx.x * (ROW_THREADS / 32) + threadIdx.x / 32;
  int64_t t = i / heads, head = i % heads;
  if (t >= *valid) return;
  const T *a = (const T *)c.out + t * c.out_ld + head * c.d;
  const T *b = (const T *)c.dout + t * c.dout_ld + head * c.d;
  float sum = 0;
  if (c.aligned) {
    for (int n = lane * 4; n < c.d; n += 128) {
      float x[4], y[4];
      load_floats<T, 4>(a + n, x);
      load_floats<T, 4>(b + n, y);
      for (int j = 0; j < 4; j++) sum += x[j] * y[j];
    }
  } else {
    for (int n = lane; n < c.d; n += 32) sum += to_float(a[n]) * to_float(b[n]);
  }
  sum = warp_sum(sum);
  if (lane == 0) c.delta[i] = sum;
}

/* What a call keeps in scratch. */
struct scratch {
  size_t items, delta, bytes; /* offsets */
};

size_t round_up(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/* A sequence without rows has no tile; every other adds one at most to what the rows fill. */
int64_t items_most(int64_t rows, int64_t sequences, int64_t tile) {
  return rows / tile + (sequences < rows ? sequences : rows);
}

struct scratch scratch_of(int64_t rows, int64_t heads, int64_t items, bool backward) {
  struct scratch s = {256, 0, 0}; /* counters come first */
  s.delta = s.items + round_up((size_t)items * sizeof(struct attention_item));
  s.bytes = s.delta + (backward ? round_up((size_t)(rows * heads) * sizeof(float)) : 0);
  return s;
}

bool rows_aligned(const struct mt_tensor *t) {
  size_t bytes = mt_dtype_bytes(t->dtype);
  return aligned_to(t->data, 16) && (size_t)t->ld * bytes % 16 == 0;
}

struct attention_call packed_call(const struct mt_attention_fwd_args *a) {
  size_t bytes = mt_dtype_bytes(a->qkv.dtype);
  const char *qkv = (const char *)a->qkv.data;
  struct attention_call c = {};
  c.q = qkv;
  c.k = qkv + (size_t)(a->q_per_kv * a->head_dim) * bytes;
  c.v = qkv + (size_t)((a->q_per_kv + 1) * a->head_dim) * bytes;
  c.out = a->out.data;
  c.lse = (float *)a->lse.data;
  c.q_ld = c.kv_ld = a->qkv.ld;
  c.out_ld = a->out.ld;
  c.lse_ld = a->lse.ld;
  c.q_group = c.kv_group = (a->q_per_kv + 2) * a->head_dim;
  c.kv_heads = a->kv_heads;
  c.r = a->q_per_kv;
  c.d = a->head_dim;
  c.window = a->window;
  c.scale = a->scale;
  c.rows = (int)a->qkv.dim[0];
  c.aligned = a->head_dim % 8 == 0 && rows_aligned(&a->qkv) && rows_aligned(&a->out);
  return c;
}

/* The online softmax takes the largest score before it is scaled, which needs scale > 0. */
bool on_tensor_cores(const struct attention_call *c, enum mt_dtype dtype) {
  return dtype == MT_BF16 && c->aligned && c->scale > 0;
}

mt_err head_dim_ok(const char *op, int d) {
  if (d > 0 && d <= ATTENTION_HEAD_DIM_MOST) return MT_OK;
  return mt_fail(MT_EUNSUPPORTED, "%s: a head dimension of %d; the cuda backend takes up to %d", op,
                 d, ATTENTION_HEAD_DIM_MOST);
}

/* Puts the tiles in `memory` and zeros in the padding of one or two tensors. */
mt_err plan(struct mt_cuda *cuda, struct attention_call *c, const struct mt_attention_fwd_args *a,
            int tile, const struct scratch *s, char *memory, const struct mt_tensor *pad,
            const struct mt_tensor *pad2) {
  const struct mt_tensor *pads[2] = {pad, pad2};
  struct padding p[2] = {};
  for (int i = 0; i < 2 && pads[i]; i++) {
    int64_t bytes = (int64_t)mt_dtype_bytes(pads[i]->dtype);
    p[i] = {pads[i]->data, pads[i]->ld * bytes, pads[i]->dim[1] * bytes};
  }
  c->item_count = (int *)memory;
  c->units_taken = c->item_count + 1;
  c->items = (struct attention_item *)(memory + s->items);
  c->item_grid = (int)items_most(c->rows, a->sequence_count, tile);
  plan_kernel<<<33, PLAN_THREADS, 0, cuda->stream>>>(a->cu_seqlens, a->sequence_count, tile,
                                                     c->items, c->item_count, c->units_taken,
                                                     c->rows, p[0], p[1]);
  return mt_cuda_launched("attention: plan");
}

} // namespace

extern "C" size_t mt_cuda_attention_bytes(const struct mt_limits *l) {
  /* The smallest tile, and as many sequences as there are rows: the limits do not say. */
  int64_t items = items_most(l->tokens, l->tokens, ATTENTION_SIMPLE_BWD_TILE);
  size_t packed = scratch_of(l->tokens, l->heads, items, true).bytes;
  size_t decode = mt_cuda_attention_decode_bytes(l->heads, l->kv_heads, l->head_dim);
  return packed > decode ? packed : decode;
}

extern "C" mt_err mt_cuda_attention_fwd(struct mt_backend *be,
                                        const struct mt_attention_fwd_args *a) {
  struct mt_cuda *cuda = mt_cuda_of(be);
  void *memory;
  MT_TRY(mt_check_attention_fwd(a));
  MT_TRY(mt_cuda_format("attention_fwd", &a->qkv));
  MT_TRY(head_dim_ok("attention_fwd", a->head_dim));
  if (a->qkv.dim[0] == 0) return MT_OK;
  struct attention_call c = packed_call(a);
  bool mma = on_tensor_cores(&c, a->qkv.dtype);
  int tile = mma ? ATTENTION_MMA_TILE : ATTENTION_SIMPLE_FWD_TILE;
  struct scratch s = scratch_of(c.rows, 0, items_most(c.rows, a->sequence_count, tile), false);
  MT_TRY(mt_cuda_scratch(be, "attention_fwd", s.bytes, &memory));
  MT_TRY(plan(cuda, &c, a, tile, &s, (char *)memory, &a->out, &a->lse));
  if (c.item_grid == 0) return MT_OK;
  if (mma && mt_cuda_attention_sm90_takes(cuda, &c)) return mt_cuda_attention_sm90_fwd(cuda, &c);
  if (mma) return mt_cuda_attention_mma_fwd(cuda, &c);
  return mt_cuda_attention_simple_fwd(cuda, &c, a->qkv.dtype);
}

extern "C" mt_err mt_cuda_attention_bwd(struct mt_backend *be,
                                        const struct mt_attention_bwd_args *a) {
  const struct mt_attention_fwd_args *f = &a->fwd;
  struct mt_cuda *cuda = mt_cuda_of(be);
  void *memory;
  MT_TRY(mt_check_attention_bwd(a));
  MT_TRY(mt_cuda_format("attention_bwd", &f->qkv));
  MT_TRY(head_dim_ok("attention_bwd", f->head_dim));
  if (f->qkv.dim[0] == 0) return MT_OK;
  struct attention_call c = packed_call(f);
  size_t bytes = mt_dtype_bytes(f->qkv.dtype);
  int heads = c.kv_heads * c.r;
  c.aligned = c.aligned && rows_aligned(&a->dout) && rows_aligned(&a->dqkv);
  bool mma = on_tensor_cores(&c, f->qkv.dtype);
  int tile = mma ? ATTENTION_MMA_TILE : ATTENTION_SIMPLE_BWD_TILE;
  struct scratch s = scratch_of(c.rows, heads, items_most(c.rows, f->sequence_count, tile), true);
  MT_TRY(mt_cuda_scratch(be, "attention_bwd", s.bytes, &memory));
  c.delta = (float *)((char *)memory + s.delta);
  c.dout = a->dout.data;
  c.dout_ld = a->dout.ld;
  c.dqkv_ld = a->dqkv.ld;
  c.dq = a->dqkv.data;
  c.dk = (char *)a->dqkv.data + (size_t)(c.r * c.d) * bytes;
  c.dv = (char *)a->dqkv.data + (size_t)((c.r + 1) * c.d) * bytes;
  MT_TRY(plan(cuda, &c, f, tile, &s, (char *)memory, &a->dqkv, NULL));
  if (c.item_grid == 0) return MT_OK;
  if (mma && mt_cuda_attention_sm90_takes(cuda, &c)) return mt_cuda_attention_sm90_bwd(cuda, &c);
  int64_t per_block = ROW_THREADS / 32,
          blocks = ((int64_t)c.rows * heads + per_block - 1) / per_block;
  MT_CUDA_BY_FORMAT(f->qkv.dtype, {
    delta_kernel<T>
        <<<(unsigned)blocks, ROW_THREADS, 0, cuda->stream>>>(c, f->cu_seqlens + f->sequence_count);
  });
  MT_TRY(mt_cuda_launched("attention_bwd: delta"));
  if (mma) return mt_cuda_attention_mma_bwd(cuda, &c);
  return mt_cuda_attention_simple_bwd(cuda, &c, f->qkv.dtype);
}

extern "C" mt_err mt_cuda_attention_cache(struct mt_backend *be,
                                          const struct mt_attention_cache_args *a) {
  struct mt_cuda *cuda = mt_cuda_of(be);
  void *memory;
  MT_TRY(mt_check_attention_cache(a));
  MT_TRY(mt_cuda_format("attention_cache", &a->qkv));
  MT_TRY(head_dim_ok("attention_cache", a->head_dim));
  if (a->qkv.dim[0] == 0) return MT_OK;
  struct attention_call c = {};
  c.q = a->qkv.data;
  c.k = a->k.data;
  c.v = a->v.data;
  c.out = a->out.data;
  c.q_ld = a->qkv.ld;
  c.kv_ld = a->k.ld;
  c.out_ld = a->out.ld;
  c.q_group = (a->q_per_kv + 2) * a->head_dim;
  c.kv_group = c.d = a->head_dim;
  c.kv_heads = a->kv_heads;
  c.r = a->q_per_kv;
  c.window = a->window;
  c.scale = a->scale;
  c.rows = (int)a->qkv.dim[0];
  c.offset = a->start;
  c.aligned = a->head_dim % 8 == 0 && rows_aligned(&a->qkv) && rows_aligned(&a->k) &&
              rows_aligned(&a->v) && rows_aligned(&a->out);
  if (a->k.ld != a->v.ld) {
    return mt_fail(MT_ESHAPE, "attention_cache: rows of k are %lld elements apart, of v %lld",
                   (long long)a->k.ld, (long long)a->v.ld);
  }
  if (c.rows <= ATTENTION_DECODE_ROWS_MOST) {
    size_t bytes = mt_cuda_attention_decode_bytes(c.kv_heads * c.r, c.kv_heads, c.d);
    MT_TRY(mt_cuda_scratch(be, "attention_cache", bytes, &memory));
    return mt_cuda_attention_decode(cuda, &c, a->qkv.dtype, (float *)memory);
  }
  bool mma = on_tensor_cores(&c, a->qkv.dtype);
  int tile = mma ? ATTENTION_MMA_TILE : ATTENTION_SIMPLE_FWD_TILE;
  c.item_grid = (c.rows + tile - 1) / tile;
  if (mma && mt_cuda_attention_sm90_takes(cuda, &c)) return mt_cuda_attention_sm90_fwd(cuda, &c);
  if (mma) return mt_cuda_attention_mma_fwd(cuda, &c);
  return mt_cuda_attention_simple_fwd(cuda, &c, a->qkv.dtype);
}
