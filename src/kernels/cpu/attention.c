/* RoPE and causal attention in tiles with an online softmax (FlashAttention-2, Dao 2023): nothing
 * of size S x S exists. One task owns a sequence and a key-value group (in forward: and a block of
 * queries), so no two threads add into one element. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"

enum { KEYS = 96, ROWS = 128, MAX_HEAD_DIM = 128, PANEL = 48 };

mt_err mt_cpu_rope_table(struct mt_backend *be, const struct mt_rope_table_args *a) {
  MT_TRY(mt_check_rope_table(a));
  MT_TRY(mt_cpu_format("rope_table", &a->cos));
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t t = 0; t < a->cos.dim[0]; t++) {
    float *c = (float *)a->cos.data + t * a->cos.ld, *s = (float *)a->sin.data + t * a->sin.ld;
    for (int64_t i = 0; i < a->cos.dim[1]; i++) {
      double angle = (double)a->positions[t] * a->inv_freq[i];
      c[i] = (float)cos(angle);
      s[i] = (float)sin(angle);
    }
  }
  return MT_OK;
}

static void rotate(float *x, const float *c, const float *s, float sign, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float p = x[i], q = x[half + i], sn = sign * s[i];
    x[i] = p * c[i] - q * sn;
    x[half + i] = q * c[i] + p * sn;
  }
}

mt_err mt_cpu_rope(struct mt_backend *be, const struct mt_rope_args *a) {
  MT_TRY(mt_check_rope(a));
  MT_TRY(mt_cpu_format("rope", &a->qkv));
  int64_t d = a->head_dim, turned = a->q_per_kv + 1, group = (a->q_per_kv + 2) * d;
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->qkv.dim[0]; t++) {
      const float *c = (const float *)a->cos.data + t * a->cos.ld;
      const float *s = (const float *)a->sin.data + t * a->sin.ld;
      for (int64_t head = 0; head < a->kv_heads * turned; head++) {
        struct mt_tensor x = mt_cols(&a->qkv, head / turned * group + head % turned * d, d);
        if (x.dtype == MT_BF16) cpu_read(&x, t, d, scratch);
        float *row = cpu_target(&x, t, scratch);
        rotate(row, c, s, a->inverse ? -1.0f : 1.0f, d / 2);
        cpu_write(&x, t, d, row);
      }
    }
  }
  return MT_OK;
}

static mt_err supported(const char *op, const struct mt_tensor *qkv, int q_per_kv, int head_dim) {
  MT_TRY(mt_cpu_format(op, qkv));
  if (head_dim > MAX_HEAD_DIM || q_per_kv > ROWS) {
    return mt_fail(MT_EUNSUPPORTED, "%s: head_dim %d (at most %d), %d queries a group (at most %d)",
                   op, head_dim, MAX_HEAD_DIM, q_per_kv, ROWS);
  }
  return MT_OK;
}

/* Queries of all heads of a group are stacked: row = head * block + (query - q0). */
struct stack {
  int64_t q0, block; /* queries [q0, q0+block) of each head */
  int heads;
};

static int64_t query_block(int q_per_kv) {
  return ROWS / q_per_kv;
}

/* out [heads*block, d] = scale * the heads' columns of rows begin+q0... */
static void gather_stack(const struct mt_tensor *x, int64_t row0, int64_t col0, struct stack st,
                         int64_t d, float scale, float *out) {
  for (int h = 0; h < st.heads; h++) {
    struct mt_tensor head = mt_cols(x, col0 + h * d, d);
    for (int64_t i = 0; i < st.block; i++) {
      float *dst = out + (h * st.block + i) * d;
      const float *src = cpu_read(&head, row0 + i, d, dst);
      for (int64_t n = 0; n < d; n++) dst[n] = src[n] * scale;
    }
  }
}

/* c [m,n] (ld n_ld) (acc) = a * b; packed and scratch as gemm.h says. */
static void small_product(struct cpu_broadcast a, struct cpu_vector b, float *c, int64_t c_ld,
                          int accumulate, int64_t m, int64_t n, int64_t k, bool pack, float *packed,
                          float *scratch) {
  struct cpu_product p = {
      .a = a, .b = b, .c = {c, MT_F32, c_ld, accumulate}, .i_count = m, .j_count = n, .k_count = k};
  if (pack) mt_cpu_pack_here(&p, packed);
  mt_cpu_product_here(&p, packed, scratch);
}

/* Keys [k0, k0+keys) that query i (all absolute rows) may see: columns [*lo, *hi). */
static void visible(int64_t i, int64_t k0, int64_t keys, int window, int64_t *lo, int64_t *hi) {
  *hi = i + 1 - k0 < keys ? i + 1 - k0 : keys;
  *lo = window > 0 && i - window + 1 > k0 ? i - window + 1 - k0 : 0;
  if (*hi < 0) *hi = 0;
  if (*lo > *hi) *lo = *hi;
}

/* Where keys and values of one group lie: in qkv itself or in a cache. */
struct keys {
  struct mt_tensor k, v; /* [rows, d] views */
};

static struct cpu_vector vector_of(const struct mt_tensor *t, int64_t row, bool transposed) {
  const char *p = (const char *)t->data + (size_t)(row * t->ld) * mt_dtype_bytes(t->dtype);
  return transposed ? (struct cpu_vector){p, t->dtype, 1, t->ld}
                    : (struct cpu_vector){p, t->dtype, t->ld, 1};
}

struct forward_scratch {
  float q[ROWS * MAX_HEAD_DIM], o[ROWS * MAX_HEAD_DIM], s[ROWS * KEYS];
  float packed_k[KEYS * (MAX_HEAD_DIM + PANEL)], packed_v[KEYS * (MAX_HEAD_DIM + PANEL)];
  float top[ROWS], sum[ROWS];
  float product[CPU_PRODUCT_FLOATS];
};
_Static_assert(sizeof(struct forward_scratch) <= CPU_THREAD_FLOATS * sizeof(float), "fits");

/* Scores of one tile turned into weights, in place: masked, exponentiated against the running
 * maximum; rescales o and sum where the maximum grew. */
static void online_softmax(struct forward_scratch *w, struct stack st, int64_t first_query,
                           int64_t k0, int64_t keys, int window, int64_t d) {
  for (int64_t row = 0; row < st.heads * st.block; row++) {
    float *s = w->s + row * KEYS, top = w->top[row];
    int64_t lo, hi;
    visible(first_query + row % st.block, k0, keys, window, &lo, &hi);
    if (lo >= hi) {
      memset(s, 0, (size_t)keys * sizeof *s);
      continue;
    }
    for (int64_t j = lo; j < hi; j++) top = s[j] > top ? s[j] : top;
    float rescale = expf(w->top[row] - top), sum = 0;
    for (int64_t j = lo; j < hi; j++) s[j] -= top;
    mt_cpu_exp(s + lo, s + lo, hi - lo);
    memset(s, 0, (size_t)lo * sizeof *s);
    memset(s + hi, 0, (size_t)(keys - hi) * sizeof *s);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = lo; j < hi; j++) sum += s[j];
    w->sum[row] = w->sum[row] * rescale + sum;
    w->top[row] = top;
    if (rescale != 1.0f) {
      for (int64_t n = 0; n < d; n++) w->o[row * d + n] *= rescale;
    }
  }
}

/* Queries (absolute positions first_query...) against keys [key_begin, last visible). */
static void attend_block(struct forward_scratch *w, const struct keys *kv, struct stack st,
                         int64_t first_query, int64_t key_begin, int window, int64_t d) {
  int64_t rows = st.heads * st.block, key_end = first_query + st.block;
  if (window > 0 && first_query - window + 1 > key_begin) key_begin = first_query - window + 1;
  memset(w->o, 0, (size_t)(rows * d) * sizeof *w->o);
  for (int64_t r = 0; r < rows; r++) w->top[r] = -INFINITY, w->sum[r] = 0;
  for (int64_t k0 = key_begin; k0 < key_end; k0 += KEYS) {
    int64_t keys = key_end - k0 < KEYS ? key_end - k0 : KEYS;
    small_product((struct cpu_broadcast){w->q, MT_F32, d, 1}, vector_of(&kv->k, k0, true), w->s,
                  KEYS, 0, rows, keys, d, true, w->packed_k, w->product);
    online_softmax(w, st, first_query, k0, keys, window, d);
    small_product((struct cpu_broadcast){w->s, MT_F32, KEYS, 1}, vector_of(&kv->v, k0, false), w->o,
                  d, 1, rows, d, keys, true, w->packed_v, w->product);
  }
}

static void store_block(const struct forward_scratch *w, const struct mt_tensor *out, int64_t row0,
                        int64_t col0, struct stack st, int64_t d) {
  for (int h = 0; h < st.heads; h++) {
    struct mt_tensor head = mt_cols(out, col0 + h * d, d);
    for (int64_t i = 0; i < st.block; i++) {
      int64_t row = h * st.block + i;
      float buffer[MAX_HEAD_DIM], *dst = cpu_target(&head, row0 + i, buffer);
      float inverse = 1.0f / w->sum[row];
      for (int64_t n = 0; n < d; n++) dst[n] = w->o[row * d + n] * inverse;
      cpu_write(&head, row0 + i, d, dst);
    }
  }
}

static void zero_padding(const struct mt_tensor *t, int64_t from) {
  for (int64_t row = from; row < t->dim[0]; row++) {
    size_t item = mt_dtype_bytes(t->dtype);
    memset((char *)t->data + (size_t)(row * t->ld) * item, 0, (size_t)t->dim[1] * item);
  }
}

static struct keys group_keys(const struct mt_attention_fwd_args *a, int64_t g) {
  int64_t d = a->head_dim, base = g * (a->q_per_kv + 2) * d;
  return (struct keys){mt_cols(&a->qkv, base + a->q_per_kv * d, d),
                       mt_cols(&a->qkv, base + (a->q_per_kv + 1) * d, d)};
}

mt_err mt_cpu_attention_fwd(struct mt_backend *be, const struct mt_attention_fwd_args *a) {
  MT_TRY(mt_check_attention_fwd(a));
  MT_TRY(supported("attention_fwd", &a->qkv, a->q_per_kv, a->head_dim));
  int64_t d = a->head_dim, bq = query_block(a->q_per_kv), tasks = 0;
  for (int s = 0; s < a->sequence_count; s++) {
    tasks += a->kv_heads * ((a->cu_seqlens[s + 1] - a->cu_seqlens[s] + bq - 1) / bq);
  }
  zero_padding(&a->out, a->cu_seqlens[a->sequence_count]);
  zero_padding(&a->lse, a->cu_seqlens[a->sequence_count]);
#pragma omp parallel num_threads(be->thread_count)
  {
    struct forward_scratch *w = (void *)mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      int64_t n = task, blocks;
      int s = 0;
      for (;; s++) {
        blocks = (a->cu_seqlens[s + 1] - a->cu_seqlens[s] + bq - 1) / bq;
        if (n < blocks * a->kv_heads) break;
        n -= blocks * a->kv_heads;
      }
      int64_t g = n / blocks, begin = a->cu_seqlens[s], end = a->cu_seqlens[s + 1];
      int64_t q0 = begin + (blocks - 1 - n % blocks) * bq; /* the longest first */
      struct stack st = {q0, end - q0 < bq ? end - q0 : bq, a->q_per_kv};
      struct keys kv = group_keys(a, g);
      gather_stack(&a->qkv, q0, g * (a->q_per_kv + 2) * d, st, d, a->scale, w->q);
      attend_block(w, &kv, st, q0, begin, a->window, d);
      store_block(w, &a->out, q0, g * a->q_per_kv * d, st, d);
      for (int64_t row = 0; row < st.heads * st.block; row++) {
        float *lse = (float *)a->lse.data + (q0 + row % st.block) * a->lse.ld;
        lse[g * a->q_per_kv + row / st.block] = w->top[row] + logf(w->sum[row]);
      }
    }
  }
  return MT_OK;
}

struct backward_scratch {
  float q[ROWS * MAX_HEAD_DIM], dout[ROWS * MAX_HEAD_DIM];
  float p[ROWS * KEYS], ds[ROWS * KEYS];
  float packed_q[ROWS * (MAX_HEAD_DIM + PANEL)], packed_dout[ROWS * (MAX_HEAD_DIM + PANEL)];
  float packed_kt[KEYS * MAX_HEAD_DIM], packed_vt[KEYS * MAX_HEAD_DIM];
  float packed_k[KEYS * (MAX_HEAD_DIM + PANEL)];
  float dk[KEYS * MAX_HEAD_DIM], dv[KEYS * MAX_HEAD_DIM], dq[ROWS * MAX_HEAD_DIM];
  float lse[ROWS], delta[ROWS];
  float product[CPU_PRODUCT_FLOATS];
};
_Static_assert(sizeof(struct backward_scratch) <= CPU_THREAD_FLOATS * sizeof(float), "fits");

/* Q (scaled), dO, lse and delta = <dO, O> of a stack of queries, with Q and dO packed. */
static void load_queries(const struct mt_attention_bwd_args *a, struct backward_scratch *w,
                         struct stack st, int64_t g) {
  const struct mt_attention_fwd_args *f = &a->fwd;
  int64_t d = f->head_dim, rows = st.heads * st.block, head0 = g * f->q_per_kv;
  gather_stack(&f->qkv, st.q0, g * (f->q_per_kv + 2) * d, st, d, f->scale, w->q);
  gather_stack(&a->dout, st.q0, head0 * d, st, d, 1.0f, w->dout);
  for (int64_t row = 0; row < rows; row++) {
    int64_t head = head0 + row / st.block, t = st.q0 + row % st.block;
    struct mt_tensor out = mt_cols(&f->out, head * d, d);
    float buffer[MAX_HEAD_DIM], delta = 0;
    const float *o = cpu_read(&out, t, d, buffer);
    for (int64_t n = 0; n < d; n++) delta += o[n] * w->dout[row * d + n];
    w->delta[row] = delta;
    w->lse[row] = ((const float *)f->lse.data)[t * f->lse.ld + head];
  }
  struct cpu_product q = {.b = {w->q, MT_F32, d, 1}, .j_count = d, .k_count = rows};
  struct cpu_product o = {.b = {w->dout, MT_F32, d, 1}, .j_count = d, .k_count = rows};
  mt_cpu_pack_here(&q, w->packed_q);
  mt_cpu_pack_here(&o, w->packed_dout);
}

/* p holds scores, ds holds dP: p becomes the weights, ds their gradient. */
static void softmax_backward(struct backward_scratch *w, struct stack st, int64_t k0, int64_t keys,
                             int window) {
  for (int64_t row = 0; row < st.heads * st.block; row++) {
    float *p = w->p + row * KEYS, *ds = w->ds + row * KEYS;
    float lse = w->lse[row], delta = w->delta[row];
    int64_t lo, hi;
    visible(st.q0 + row % st.block, k0, keys, window, &lo, &hi);
    for (int64_t j = lo; j < hi; j++) p[j] -= lse;
    mt_cpu_exp(p + lo, p + lo, hi - lo);
    for (int64_t j = lo; j < hi; j++) ds[j] = p[j] * (ds[j] - delta);
    for (int64_t j = 0; j < lo; j++) p[j] = ds[j] = 0;
    for (int64_t j = hi; j < keys; j++) p[j] = ds[j] = 0;
  }
}

/* One tile of keys against one stack of queries; acc is dqkv in float32. */
static void backward_tile(const struct mt_attention_bwd_args *a, struct backward_scratch *w,
                          struct stack st, int64_t g, int64_t k0, int64_t keys, float *acc) {
  const struct mt_attention_fwd_args *f = &a->fwd;
  int64_t d = f->head_dim, rows = st.heads * st.block, width = f->qkv.dim[1];
  struct cpu_vector none = {0};
  load_queries(a, w, st, g);
  small_product((struct cpu_broadcast){w->q, MT_F32, d, 1}, none, w->p, KEYS, 0, rows, keys, d,
                false, w->packed_kt, w->product);
  small_product((struct cpu_broadcast){w->dout, MT_F32, d, 1}, none, w->ds, KEYS, 0, rows, keys, d,
                false, w->packed_vt, w->product);
  softmax_backward(w, st, k0, keys, f->window);
  small_product((struct cpu_broadcast){w->p, MT_F32, 1, KEYS}, none, w->dv, d, 1, keys, d, rows,
                false, w->packed_dout, w->product);
  small_product((struct cpu_broadcast){w->ds, MT_F32, 1, KEYS}, none, w->dk, d, 1, keys, d, rows,
                false, w->packed_q, w->product);
  small_product((struct cpu_broadcast){w->ds, MT_F32, KEYS, 1}, none, w->dq, d, 0, rows, d, keys,
                false, w->packed_k, w->product);
  for (int64_t row = 0; row < rows; row++) {
    float *dst =
        acc + (st.q0 + row % st.block) * width + (g * (f->q_per_kv + 2) + row / st.block) * d;
    for (int64_t n = 0; n < d; n++) dst[n] += w->dq[row * d + n] * f->scale;
  }
}

static void backward_group(const struct mt_attention_bwd_args *a, struct backward_scratch *w,
                           int64_t begin, int64_t end, int64_t g, float *acc) {
  const struct mt_attention_fwd_args *f = &a->fwd;
  int64_t d = f->head_dim, width = f->qkv.dim[1], bq = query_block(f->q_per_kv);
  int64_t base = g * (f->q_per_kv + 2) * d;
  struct keys kv = group_keys(f, g);
  for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
    int64_t keys = end - k0 < KEYS ? end - k0 : KEYS;
    struct cpu_product kt = {.b = vector_of(&kv.k, k0, true), .j_count = keys, .k_count = d};
    struct cpu_product vt = {.b = vector_of(&kv.v, k0, true), .j_count = keys, .k_count = d};
    struct cpu_product kn = {.b = vector_of(&kv.k, k0, false), .j_count = d, .k_count = keys};
    mt_cpu_pack_here(&kt, w->packed_kt);
    mt_cpu_pack_here(&vt, w->packed_vt);
    mt_cpu_pack_here(&kn, w->packed_k);
    memset(w->dk, 0, (size_t)(keys * d) * sizeof *w->dk);
    memset(w->dv, 0, (size_t)(keys * d) * sizeof *w->dv);
    for (int64_t q0 = begin + (k0 - begin) / bq * bq; q0 < end; q0 += bq) {
      if (f->window > 0 && q0 - f->window + 1 >= k0 + keys) break;
      struct stack st = {q0, end - q0 < bq ? end - q0 : bq, f->q_per_kv};
      backward_tile(a, w, st, g, k0, keys, acc);
    }
    for (int64_t j = 0; j < keys; j++) {
      float *row = acc + (k0 + j) * width + base;
      memcpy(row + f->q_per_kv * d, w->dk + j * d, (size_t)d * sizeof *row);
      memcpy(row + (f->q_per_kv + 1) * d, w->dv + j * d, (size_t)d * sizeof *row);
    }
  }
}

mt_err mt_cpu_attention_bwd(struct mt_backend *be, const struct mt_attention_bwd_args *a) {
  const struct mt_attention_fwd_args *f = &a->fwd;
  MT_TRY(mt_check_attention_bwd(a));
  MT_TRY(supported("attention_bwd", &f->qkv, f->q_per_kv, f->head_dim));
  int64_t rows = f->qkv.dim[0], width = f->qkv.dim[1];
  bool in_place = a->dqkv.dtype == MT_F32 && a->dqkv.ld == width;
  size_t room;
  float *shared = mt_cpu_shared_scratch(be, &room);
  float *acc = in_place ? a->dqkv.data : shared;
  if (!in_place && (size_t)(rows * width) > room) {
    return mt_fail(MT_ESHAPE, "attention_bwd: workspace too small for %lld rows", (long long)rows);
  }
#pragma omp parallel num_threads(be->thread_count)
  {
    struct backward_scratch *w = (void *)mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      memset(acc + t * width, 0, (size_t)width * sizeof *acc);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < (int64_t)f->sequence_count * f->kv_heads; task++) {
      int64_t s = task / f->kv_heads;
      backward_group(a, w, f->cu_seqlens[s], f->cu_seqlens[s + 1], task % f->kv_heads, acc);
    }
    if (!in_place) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < rows; t++) {
        float *dst = cpu_target(&a->dqkv, t, acc + t * width);
        if (dst != acc + t * width) memcpy(dst, acc + t * width, (size_t)width * sizeof *dst);
        cpu_write(&a->dqkv, t, width, dst);
      }
    }
  }
  return MT_OK;
}

mt_err mt_cpu_kv_append(struct mt_backend *be, const struct mt_kv_append_args *a) {
  (void)be;
  MT_TRY(mt_check_kv_append(a));
  MT_TRY(mt_cpu_format("kv_append", &a->qkv));
  size_t item = mt_dtype_bytes(a->qkv.dtype), bytes = (size_t)a->head_dim * item;
  for (int64_t t = 0; t < a->qkv.dim[0]; t++) {
    for (int64_t g = 0; g < a->kv_heads; g++) {
      int64_t d = a->head_dim, base = (g * (a->q_per_kv + 2) + a->q_per_kv) * d;
      const char *src = (const char *)a->qkv.data + (size_t)(t * a->qkv.ld + base) * item;
      size_t dst = (size_t)((a->start + t) * a->k.ld + g * d) * item;
      memcpy((char *)a->k.data + dst, src, bytes);
      memcpy((char *)a->v.data + dst, src + bytes, bytes);
    }
  }
  return MT_OK;
}

mt_err mt_cpu_attention_cache(struct mt_backend *be, const struct mt_attention_cache_args *a) {
  MT_TRY(mt_check_attention_cache(a));
  MT_TRY(supported("attention_cache", &a->qkv, a->q_per_kv, a->head_dim));
  int64_t d = a->head_dim, bq = query_block(a->q_per_kv), rows = a->qkv.dim[0];
  int64_t blocks = (rows + bq - 1) / bq;
#pragma omp parallel num_threads(be->thread_count)
  {
    struct forward_scratch *w = (void *)mt_cpu_thread_scratch(be, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * a->kv_heads; task++) {
      int64_t g = task / blocks, q0 = task % blocks * bq;
      struct stack st = {q0, rows - q0 < bq ? rows - q0 : bq, a->q_per_kv};
      struct keys kv = {mt_cols(&a->k, g * d, d), mt_cols(&a->v, g * d, d)};
      gather_stack(&a->qkv, q0, g * (a->q_per_kv + 2) * d, st, d, a->scale, w->q);
      attend_block(w, &kv, st, a->start + q0, 0, a->window, d);
      store_block(w, &a->out, q0, g * a->q_per_kv * d, st, d);
    }
  }
  return MT_OK;
}
