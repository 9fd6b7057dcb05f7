/* The library's first choice of an algorithm is not always its fastest: on an H100 another of its
 * first eight was up to 10% faster for the products of a training step (bench/dense_gemm.cu). Which
 * one is taken is decided by the clock, so from one run to the next it may be another; only such
 * are candidates that leave the same bits as the first choice, so results do not depend on it.
 * (They do: without a split of the sum, every kernel adds along k in order.) */
#include <string.h>

#include "kernels/cuda/products.cuh"

enum { CANDIDATES = 8, TIMED = 3, TRIES = 3 };
/* Multiply-adds from which a product is worth it, and what an algorithm must gain. */
static const double WORTH = 1e10, GAIN = 0.98;

/* out[0] += a sum over the matrix that any changed bit changes; out[1] += elements that are neither
 * zero nor infinite nor NaN. Sums of integers: in any order the same. */
template <class T>
__global__ void digest_of(const T *c, int64_t rows, int64_t cols, int64_t ld,
                          unsigned long long *out) {
  unsigned long long sum = 0, ordinary = 0;
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * cols; i += step) {
    T x = c[i / cols * ld + i % cols];
    float f = to_float(x);
    unsigned long long h = (unsigned long long)__float_as_uint(f) + ((unsigned long long)i << 32);
    h = (h ^ h >> 31) * 0x9e3779b97f4a7c15ull;
    sum += h ^ h >> 29;
    ordinary += f != 0 && isfinite(f);
  }
  for (int n = 16; n > 0; n /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, n);
    ordinary += __shfl_xor_sync(0xffffffffu, ordinary, n);
  }
  if (threadIdx.x % 32 != 0) return;
  atomicAdd(&out[0], sum);
  atomicAdd(&out[1], ordinary);
}

/* The digest of p->c, and whether it says anything: most elements are ordinary numbers. */
static mt_err digest(struct mt_cuda *c, const struct mt_cuda_product *p, unsigned long long *sum,
                     bool *telling) {
  unsigned long long host[2], **d = &c->plans->digest;
  if (!*d) MT_TRY(mt_cuda_check(cudaMalloc((void **)d, sizeof host), "choosing a product's way"));
  MT_TRY(mt_cuda_check(cudaMemsetAsync(*d, 0, sizeof host, c->stream), "digest"));
  MT_CUDA_BY_FORMAT(p->c_dtype, {
    digest_of<T><<<512, 256, 0, c->stream>>>((const T *)p->c, p->m, p->n, p->ldc, *d);
  });
  MT_TRY(mt_cuda_launched("digest"));
  MT_TRY(mt_cuda_check(cudaMemcpyAsync(host, *d, sizeof host, cudaMemcpyDeviceToHost, c->stream),
                       "digest"));
  MT_TRY(mt_cuda_check(cudaStreamSynchronize(c->stream), "digest"));
  *sum = host[0];
  *telling = (double)host[1] > 0.5 * (double)(p->m * p->n);
  return MT_OK;
}

/* *ms: the fastest of a few runs behind one that is not counted; negative: the library refused. */
static mt_err time_one(struct mt_backend *be, struct plan *s, const struct mt_cuda_product *p,
                       const cublasLtMatmulAlgo_t *algo, cudaEvent_t at[2], float *ms) {
  cudaStream_t stream = mt_cuda_of(be)->stream;
  *ms = -1;
  for (int run = -1; run < TIMED; run++) {
    float one;
    MT_TRY(mt_cuda_check(cudaEventRecord(at[0], stream), "timing a product"));
    if (lt_run(be, s, p, algo) != CUBLAS_STATUS_SUCCESS) return MT_OK;
    MT_TRY(mt_cuda_check(cudaEventRecord(at[1], stream), "timing a product"));
    MT_TRY(mt_cuda_check(cudaEventSynchronize(at[1]), "timing a product"));
    MT_TRY(mt_cuda_check(cudaEventElapsedTime(&one, at[0], at[1]), "timing a product"));
    if (run >= 0 && (*ms < 0 || one < *ms)) *ms = one;
  }
  return MT_OK;
}

/* The first choice stays where p's numbers tell nothing (*found false) or nothing is faster. */
static mt_err measure(struct mt_backend *be, struct plan *s, const struct mt_cuda_product *p,
                      bool *found) {
  struct mt_cuda *c = mt_cuda_of(be);
  cublasLtMatmulHeuristicResult_t candidate[CANDIDATES];
  cudaEvent_t at[2] = {};
  unsigned long long want = 0, sum;
  float best = -1, ms;
  mt_err err = MT_OK;
  int count = lt_candidates(c, s, candidate, CANDIDATES);
  *found = false;
  for (int i = 0; i < 2; i++) MT_GO(mt_cuda_check(cudaEventCreate(&at[i]), "timing a product"));
  for (int i = 0; i < count; i++) {
    MT_GO(time_one(be, s, p, &candidate[i].algo, at, &ms));
    if (ms < 0) continue;
    bool telling;
    MT_GO(digest(c, p, &sum, &telling));
    if (i == 0 && !telling) goto done;
    if (i == 0) want = sum, *found = true;
    if (!*found) goto done; /* the first was refused: there is nothing to be equal to */
    if (sum != want || (i > 0 && ms > GAIN * best)) continue;
    best = ms;
    s->algo = candidate[i].algo;
  }
done:
  for (int i = 0; i < 2; i++) {
    if (at[i]) (void)cudaEventDestroy(at[i]);
  }
  return err;
}

static int64_t bit_length(int64_t x) {
  int64_t n = 0;
  for (; x > 0; x /= 2) n++;
  return n;
}

/* A batch's tokens are the rows of a, or its columns where it is stored so. */
static struct plan_key family_key(const struct plan_key *key) {
  struct plan_key f = *key;
  int64_t *tokens = key->a_columns ? &f.k : &f.m;
  *tokens = bit_length(*tokens);
  return f;
}

static bool worth_it(const struct plan_key *key) {
  return (double)key->m * (double)key->n * (double)key->k >= WORTH;
}

bool lt_known(struct mt_cuda *c, struct plan *s) {
  const struct mt_cuda_plans *plans = c->plans;
  struct plan_key key = family_key(&s->key);
  if (!worth_it(&s->key)) return false;
  for (int i = 0; i < plans->family_count; i++) {
    const struct family *f = &plans->family[i];
    cublasLtMatmulHeuristicResult_t fits;
    if (memcmp(&f->key, &key, sizeof key) != 0) continue;
    s->settled = true; /* with the library's first choice where this one does not fit */
    if (lt_describe(s) != CUBLAS_STATUS_SUCCESS ||
        cublasLtMatmulAlgoCheck(c->lt, &s->op, &s->b, &s->a, &s->c, &s->c, &f->algo, &fits) !=
            CUBLAS_STATUS_SUCCESS ||
        fits.workspaceSize > (size_t)s->key.workspace_bytes)
      return false;
    s->algo = f->algo;
    return s->usable = true;
  }
  return false;
}

mt_err lt_settle(struct mt_backend *be, struct plan *s, const struct mt_cuda_product *p) {
  struct mt_cuda *c = mt_cuda_of(be);
  struct mt_cuda_plans *plans = c->plans;
  cudaStreamCaptureStatus capture;
  /* With beta a product cannot be made twice. */
  if (s->settled || s->tries == TRIES || p->beta != 0 || !worth_it(&s->key)) return MT_OK;
  MT_TRY(mt_cuda_check(cudaStreamIsCapturing(c->stream, &capture), "choosing a product's way"));
  if (capture != cudaStreamCaptureStatusNone) return MT_OK;
  s->tries++;
  MT_TRY(measure(be, s, p, &s->settled));
  if (!s->settled || plans->family_count == FAMILIES) return MT_OK;
  struct family *f = &plans->family[plans->family_count++];
  f->key = family_key(&s->key);
  f->algo = s->algo;
  return MT_OK;
}
