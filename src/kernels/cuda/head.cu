/* Head with cross entropy. Formulas: docs/math.md, "Head and cross entropy". Chunks of rows: logits
 * by a product, one kernel that makes loss and gradient of them, two products that take the
 * gradient back. Labels are on the device, so that ignored rows are computed along, with gradients
 * of zero: the host waits for nothing. */
#include "kernels/cuda/rows.cuh"

/* Large blocks: the rows that are being worked on should stay in the L2 until they are read again.
 */
enum { HEAD_THREADS = 1024 };
/* Rows of a chunk, in steps of the least: as many as 512 MiB of logits hold. */
static const int64_t CHUNK_MOST = 8192, CHUNK_LEAST = 128, LOGITS_MOST_BYTES = 512 << 20;

/* Elements between rows of logits: rows start at 16 bytes in either format. */
static int64_t logits_ld(int64_t vocab) {
  return (vocab + 7) / 8 * 8;
}

static int64_t chunk_rows(int64_t vocab) {
  int64_t row_bytes = logits_ld(vocab) * (int64_t)sizeof(float);
  int64_t rows =
      row_bytes > 0 ? LOGITS_MOST_BYTES / row_bytes / CHUNK_LEAST * CHUNK_LEAST : CHUNK_MOST;
  return rows < CHUNK_LEAST ? CHUNK_LEAST : rows > CHUNK_MOST ? CHUNK_MOST : rows;
}

/* Logits are float32 in either format: bfloat16 ones would halve the traffic of the kernel below,
 * but their error (2^-9 of a logit) is that of the loss. The gradient lies over them in float32,
 * and beside them in bfloat16, which is what the two products back run on. */
static size_t head_bytes(int64_t rows, int64_t vocab, enum mt_dtype act) {
  size_t count = (size_t)rows * (size_t)logits_ld(vocab);
  return count * sizeof(float) + (act == MT_BF16 ? count * sizeof(bf16) : 0);
}

extern "C" size_t mt_cuda_head_bytes(const struct mt_limits *l) {
  int64_t rows = chunk_rows(l->vocab);
  return head_bytes(l->tokens < rows ? l->tokens : rows, l->vocab, l->act);
}

struct head_rows {
  int64_t vocab, ld;
  const int32_t *labels;
  const float *loss_scale; /* [1] */
  float *loss;
  int32_t *correct;    /* or NULL */
  const float *logits; /* [rows, ld] */
};

/* Running largest value, where it was first, and the sum of e^(z - top). */
struct running {
  float top, sum;
  int at;
};

__device__ __forceinline__ struct running merge(struct running a, struct running b) {
  bool second = b.top > a.top || (b.top == a.top && b.at < a.at);
  float top = second ? b.top : a.top;
  /* A side that has seen nothing adds nothing: -inf - -inf is no number. */
  float sum = (a.sum == 0 ? 0.0f : a.sum * expf(a.top - top)) +
              (b.sum == 0 ? 0.0f : b.sum * expf(b.top - top));
  return {top, sum, second ? b.at : a.at};
}

__device__ __forceinline__ struct running merge_warp(struct running r) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    struct running o = {__shfl_xor_sync(0xffffffffu, r.top, i),
                        __shfl_xor_sync(0xffffffffu, r.sum, i),
                        __shfl_xor_sync(0xffffffffu, r.at, i)};
    r = merge(r, o);
  }
  return r;
}

/* The row's whole, in every thread. Sums are merged in a fixed order. */
__device__ struct running read_row(const float *z, int64_t vocab) {
  __shared__ struct running part[HEAD_THREADS / 32 + 1];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  struct running r = {-INFINITY, 0, INT32_MAX};
  int64_t whole = vocab / 4 * 4;
#pragma unroll 4
  for (int64_t i = threadIdx.x * 4; i < whole; i += HEAD_THREADS * 4) {
    float x[4];
    load_floats<float, 4>(z + i, x);
    float top = r.top;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (x[j] > top) top = x[j], r.at = (int)(i + j);
    }
    r.sum = r.sum == 0 ? 0.0f : r.sum * expf(r.top - top);
    r.top = top;
#pragma unroll
    for (int j = 0; j < 4; j++) r.sum += expf(x[j] - top);
  }
  for (int64_t i = whole + threadIdx.x; i < vocab; i += HEAD_THREADS) {
    r = merge(r, {z[i], 1.0f, (int)i});
  }
  r = merge_warp(r);
  if (lane == 0) part[warp] = r;
  __syncthreads();
  if (warp == 0) {
    const struct running nothing = {-INFINITY, 0, INT32_MAX};
    r = merge_warp(lane < HEAD_THREADS / 32 ? part[lane] : nothing);
    if (lane == 0) part[HEAD_THREADS / 32] = r;
  }
  __syncthreads();
  return part[HEAD_THREADS / 32];
}

/* One block a row. dz, where it is not NULL: the row's gradient (softmax - onehot) * loss_scale,
 * zeros where the label is ignored; it may be the logits themselves. The second reading of the row
 * comes from the L2. */
template <class T>
__global__ void __launch_bounds__(HEAD_THREADS) head_row(struct head_rows h, T *dz) {
  int64_t t = blockIdx.x;
  int32_t label = h.labels[t];
  const float *z = h.logits + t * h.ld;
  struct running r = {0, 1, 0};
  float target = 0, scale = 0, whole = dz ? *h.loss_scale : 0.0f;
  if (label >= 0) {
    r = read_row(z, h.vocab);
    target = z[label];
    scale = (float)((double)whole / (double)r.sum);
  }
  if (threadIdx.x == 0) {
    h.loss[t] = label >= 0 ? (float)(log((double)r.sum) - (double)(target - r.top)) : 0.0f;
    if (h.correct) h.correct[t] = label >= 0 && r.at == label;
  }
  if (!dz) return;
  T *to = dz + t * h.ld;
  /* Every thread has its target before the first gradient lies over a logit. */
  __syncthreads();
  /* The row's last few elements up to ld are nobody's, and may be written. */
  for (int64_t i = threadIdx.x * 4; i < h.ld; i += HEAD_THREADS * 4) {
    float x[4] = {0};
    if (label >= 0) {
      load_floats<float, 4>(z + i, x);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        x[j] = expf(x[j] - r.top) * scale - (i + j == label ? whole : 0.0f);
      }
    }
    store_row<T, 4>(to + i, x);
  }
}

struct head_chunk {
  int64_t begin, rows, ld;
  float *logits;
  void *dz;
  float dw_beta;
};

static mt_err chunk_back(struct mt_backend *be, const struct mt_head_loss_args *a,
                         const struct head_chunk *c) {
  int64_t h = a->x.dim[1], v = a->w.dim[0];
  if (a->dx.data) {
    struct mt_tensor dx = mt_rows(&a->dx, c->begin, c->rows);
    struct mt_cuda_product p = {};
    p.m = c->rows, p.n = h, p.k = v;
    p.a = c->dz, p.lda = c->ld;
    p.b = a->w.data, p.ldb = a->w.ld;
    p.c = dx.data, p.ldc = dx.ld;
    p.ab = a->x.dtype, p.c_dtype = dx.dtype;
    MT_TRY(mt_cuda_gemm(be, &p));
  }
  if (a->dw.data) {
    struct mt_tensor x = mt_rows(&a->x, c->begin, c->rows);
    struct mt_cuda_product p = {};
    p.m = v, p.n = h, p.k = c->rows;
    p.a = c->dz, p.lda = c->ld, p.a_columns = true;
    p.b = x.data, p.ldb = x.ld;
    p.c = a->dw.data, p.ldc = a->dw.ld;
    p.ab = x.dtype, p.c_dtype = a->dw.dtype, p.beta = c->dw_beta;
    MT_TRY(mt_cuda_gemm(be, &p));
  }
  return MT_OK;
}

static mt_err chunk_run(struct mt_backend *be, const struct mt_head_loss_args *a,
                        const struct head_chunk *c) {
  struct mt_tensor x = mt_rows(&a->x, c->begin, c->rows);
  struct mt_cuda_product p = {};
  p.m = c->rows, p.n = a->w.dim[0], p.k = x.dim[1];
  p.a = x.data, p.lda = x.ld;
  p.b = a->w.data, p.ldb = a->w.ld, p.b_columns = true;
  p.c = c->logits, p.ldc = c->ld;
  p.ab = x.dtype, p.c_dtype = MT_F32;
  MT_TRY(mt_cuda_gemm(be, &p));
  bool back = a->dx.data || a->dw.data;
  struct head_rows h = {p.n,
                        c->ld,
                        a->labels + c->begin,
                        a->loss_scale,
                        (float *)a->loss.data + c->begin,
                        a->correct ? a->correct + c->begin : NULL,
                        c->logits};
  MT_CUDA_BY_FORMAT(x.dtype, {
    head_row<T><<<(unsigned)c->rows, HEAD_THREADS, 0, mt_cuda_of(be)->stream>>>(h, back ? (T *)c->dz
                                                                                        : NULL);
  });
  MT_TRY(mt_cuda_launched("head_loss"));
  return back ? chunk_back(be, a, c) : MT_OK;
}

extern "C" mt_err mt_cuda_head_loss(struct mt_backend *be, const struct mt_head_loss_args *a) {
  MT_TRY(mt_check_head_loss(a));
  MT_TRY(mt_cuda_format("head_loss", &a->x));
  int64_t t = a->x.dim[0], v = a->w.dim[0], most = chunk_rows(v);
  enum mt_dtype act = a->x.dtype;
  if (most > t) most = t;
  void *scratch;
  MT_TRY(mt_cuda_scratch(be, "head_loss", head_bytes(most, v, act), &scratch));
  if (t == 0 && a->dw.data && !a->accumulate && mt_count(&a->dw) > 0) {
    size_t item = mt_dtype_bytes(a->dw.dtype);
    return mt_cuda_check(cudaMemset2DAsync(a->dw.data, (size_t)a->dw.ld * item, 0,
                                           (size_t)a->dw.dim[1] * item, (size_t)v,
                                           mt_cuda_of(be)->stream),
                         "head_loss: zeroing the weight's gradient");
  }
  struct head_chunk c = {};
  c.ld = logits_ld(v);
  c.logits = (float *)scratch;
  c.dz = act == MT_BF16 ? (void *)(c.logits + most * c.ld) : scratch;
  for (; c.begin < t; c.begin += most) {
    c.rows = t - c.begin < most ? t - c.begin : most;
    c.dw_beta = a->accumulate || c.begin > 0 ? 1.0f : 0.0f;
    MT_TRY(chunk_run(be, a, &c));
  }
  return MT_OK;
}
