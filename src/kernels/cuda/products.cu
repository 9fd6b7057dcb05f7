/* Dense products through cuBLASLt: an algorithm for each shape, chosen once. */
#include <stdlib.h>

#include "kernels/cuda/products.cuh"

extern "C" void mt_cuda_plans_free(struct mt_cuda_plans *plans) {
  if (plans) (void)cudaFree(plans->digest);
  free(plans);
}

static int32_t alignment(const void *p) {
  int32_t bytes = 16;
  while (!aligned_to(p, (size_t)bytes)) bytes /= 2;
  return bytes;
}

static int32_t lt_workspace_bytes(const struct mt_backend *be) {
  bool there = be->workspace && be->workspace_size_bytes >= MT_CUDA_LT_WORKSPACE_BYTES;
  return there ? MT_CUDA_LT_WORKSPACE_BYTES : 0;
}

static struct plan_key key_of(const struct mt_backend *be, const struct mt_cuda_product *p) {
  struct plan_key key;
  memset(&key, 0, sizeof key); /* padding too */
  key.m = p->m, key.n = p->n, key.k = p->k;
  key.lda = p->lda, key.ldb = p->ldb, key.ldc = p->ldc;
  key.a_align = alignment(p->a), key.b_align = alignment(p->b), key.c_align = alignment(p->c);
  key.a_columns = p->a_columns, key.b_columns = p->b_columns;
  key.ab = p->ab, key.c_dtype = p->c_dtype;
  key.workspace_bytes = lt_workspace_bytes(be);
  return key;
}

/* The slot that holds the key, or the one to fill with it. */
static struct plan *slot_of(struct mt_cuda_plans *plans, const struct plan_key *key) {
  const unsigned char *bytes = (const unsigned char *)key;
  uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
  for (size_t i = 0; i < sizeof *key; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  for (int i = 0; i < PLAN_PROBES; i++) {
    struct plan *s = &plans->slot[(hash + (uint64_t)i) % PLAN_SLOTS];
    if (!s->filled || memcmp(&s->key, key, sizeof *key) == 0) return s;
  }
  struct plan *s = &plans->slot[hash % PLAN_SLOTS];
  s->filled = false;
  return s;
}

static cudaDataType_t data_type(enum mt_dtype dtype) {
  return dtype == MT_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

/* cuBLASLt's matrices are column-major, so it is asked for c^T = b^T a^T: our rows are its
 * columns, its first operand is our b. */
cublasStatus_t lt_describe(struct plan *s) {
  const struct plan_key *key = &s->key;
  cublasOperation_t first = key->b_columns ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasOperation_t second = key->a_columns ? CUBLAS_OP_T : CUBLAS_OP_N;
  cudaDataType_t in = data_type((enum mt_dtype)key->ab);
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
#define STEP(call)                                                                                 \
  if (status == CUBLAS_STATUS_SUCCESS) status = (call)
  STEP(cublasLtMatmulDescInit(&s->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  STEP(cublasLtMatmulDescSetAttribute(&s->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
  STEP(cublasLtMatmulDescSetAttribute(&s->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
  STEP(cublasLtMatrixLayoutInit(&s->b, in, (uint64_t)(key->b_columns ? key->k : key->n),
                                (uint64_t)(key->b_columns ? key->n : key->k), key->ldb));
  STEP(cublasLtMatrixLayoutInit(&s->a, in, (uint64_t)(key->a_columns ? key->m : key->k),
                                (uint64_t)(key->a_columns ? key->k : key->m), key->lda));
  STEP(cublasLtMatrixLayoutInit(&s->c, data_type((enum mt_dtype)key->c_dtype), (uint64_t)key->n,
                                (uint64_t)key->m, key->ldc));
#undef STEP
  return status;
}

/* The library's choices, the likeliest first, among what is deterministic: no split of the sum, or
 * one whose parts are written out and added in a second step. How many there are (0: it has none).
 */
int lt_candidates(struct mt_cuda *c, struct plan *s, cublasLtMatmulHeuristicResult_t *found,
                  int most) {
  const struct plan_key *key = &s->key;
  cublasLtMatmulPreferenceOpaque_t wish;
  uint64_t workspace = (uint64_t)key->workspace_bytes;
  uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  uint32_t a = (uint32_t)key->a_align, b = (uint32_t)key->b_align, out = (uint32_t)key->c_align;
  const struct {
    cublasLtMatmulPreferenceAttributes_t name;
    const void *value;
    size_t size;
  } wishes[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
                {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b, sizeof b},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a, sizeof a},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out, sizeof out},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out, sizeof out}};
  int count = 0, good = 0;
  if (cublasLtMatmulPreferenceInit(&wish) != CUBLAS_STATUS_SUCCESS) return 0;
  for (size_t i = 0; i < sizeof wishes / sizeof *wishes; i++) {
    if (cublasLtMatmulPreferenceSetAttribute(&wish, wishes[i].name, wishes[i].value,
                                             wishes[i].size) != CUBLAS_STATUS_SUCCESS)
      return 0;
  }
  if (cublasLtMatmulAlgoGetHeuristic(c->lt, &s->op, &s->b, &s->a, &s->c, &s->c, &wish, most, found,
                                     &count) != CUBLAS_STATUS_SUCCESS)
    return 0;
  for (int i = 0; i < count; i++) {
    if (found[i].state == CUBLAS_STATUS_SUCCESS) found[good++] = found[i];
  }
  return good;
}

static void choose(struct mt_cuda *c, struct plan *s) {
  cublasLtMatmulHeuristicResult_t found;
  s->usable = lt_describe(s) == CUBLAS_STATUS_SUCCESS && lt_candidates(c, s, &found, 1) > 0;
  if (s->usable) s->algo = found.algo;
}

/* c[i,j] = sum_k a[i,k] b[k,j] (+ c), each one thread's: for the rare case that both operands are
 * stored by columns and cuBLASLt has nothing for them. */
template <class T, class C>
__global__ void plain_product(const T *a, const T *b, C *c, int64_t m, int64_t n, int64_t k,
                              int64_t a_i, int64_t a_k, int64_t b_k, int64_t b_j, int64_t ldc,
                              bool add) {
  int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= m * n) return;
  int64_t i = at / n, j = at % n;
  float sum = 0;
  for (int64_t l = 0; l < k; l++) {
    sum = fmaf(to_float(a[i * a_i + l * a_k]), to_float(b[l * b_k + j * b_j]), sum);
  }
  c[i * ldc + j] = from_float<C>(add ? sum + to_float(c[i * ldc + j]) : sum);
}

template <class T, class C> static void launch_plain(cudaStream_t s, const mt_cuda_product *p) {
  int64_t blocks = (p->m * p->n + 255) / 256;
  plain_product<T, C><<<(unsigned)blocks, 256, 0, s>>>(
      (const T *)p->a, (const T *)p->b, (C *)p->c, p->m, p->n, p->k, p->a_columns ? 1 : p->lda,
      p->a_columns ? p->lda : 1, p->b_columns ? 1 : p->ldb, p->b_columns ? p->ldb : 1, p->ldc,
      p->beta != 0);
}

static mt_err without_library(struct mt_backend *be, const struct mt_cuda_product *p) {
  struct mt_cuda_grouped one = {.offsets = NULL, .groups = 1};
  one.kind = p->a_columns ? GROUPED_WGRAD : p->b_columns ? GROUPED_FWD : GROUPED_DGRAD;
  one.rows_most = p->a_columns ? p->k : p->m;
  one.m = p->m, one.n = p->n, one.k = p->k;
  one.a = p->a, one.b = p->b, one.c = p->c;
  one.lda = p->lda, one.ldb = p->ldb, one.ldc = p->ldc;
  one.ab = p->ab, one.c_dtype = p->c_dtype;
  one.accumulate = p->beta != 0;
  if (!(p->a_columns && p->b_columns)) return mt_cuda_grouped_product(be, &one);
  cudaStream_t stream = mt_cuda_of(be)->stream;
  MT_CUDA_BY_FORMAT(p->ab, {
    if (p->c_dtype == MT_F32)
      launch_plain<T, float>(stream, p);
    else
      launch_plain<T, bf16>(stream, p);
  });
  return mt_cuda_launched("product");
}

static mt_err check_product(const struct mt_cuda_product *p) {
  bool formats =
      (p->ab == MT_F32 || p->ab == MT_BF16) && (p->c_dtype == MT_F32 || p->c_dtype == MT_BF16);
  if (!formats) {
    return mt_fail(MT_EUNSUPPORTED, "product: the cuda backend has no %s times %s",
                   mt_dtype_name(p->ab), mt_dtype_name(p->c_dtype));
  }
  return MT_OK;
}

/* The sum over nothing. */
static mt_err empty_sum(struct mt_backend *be, const struct mt_cuda_product *p) {
  if (p->beta != 0) return MT_OK;
  size_t width = mt_dtype_bytes(p->c_dtype);
  return mt_cuda_check(cudaMemset2DAsync(p->c, (size_t)p->ldc * width, 0, (size_t)p->n * width,
                                         (size_t)p->m, mt_cuda_of(be)->stream),
                       "product");
}

cublasStatus_t lt_run(struct mt_backend *be, struct plan *s, const struct mt_cuda_product *p,
                      const cublasLtMatmulAlgo_t *algo) {
  struct mt_cuda *c = mt_cuda_of(be);
  float alpha = 1, beta = p->beta;
  return cublasLtMatmul(c->lt, &s->op, &alpha, p->b, &s->b, p->a, &s->a, &beta, p->c, &s->c, p->c,
                        &s->c, algo, be->workspace, (size_t)s->key.workspace_bytes, c->stream);
}

extern "C" mt_err mt_cuda_gemm(struct mt_backend *be, const struct mt_cuda_product *p) {
  struct mt_cuda *c = mt_cuda_of(be);
  MT_TRY(check_product(p));
  if (p->m == 0 || p->n == 0) return MT_OK;
  if (p->k == 0) return empty_sum(be, p);
  /* cuBLASLt 13.0 rounds some products to bf16 before it adds c and rounds again (an H100 showed
   * errors of 5.9e-3 of the largest where one rounding cannot make 3.9e-3); ours add in float32. */
  if (p->beta != 0 && p->c_dtype == MT_BF16) return without_library(be, p);
  if (!c->plans) c->plans = (struct mt_cuda_plans *)calloc(1, sizeof *c->plans);
  if (!c->plans) return mt_fail(MT_ENOMEM, "product");
  struct plan_key key = key_of(be, p);
  struct plan *s = slot_of(c->plans, &key);
  if (!s->filled) {
    *s = (struct plan){.key = key, .filled = true};
    if (!lt_known(c, s)) choose(c, s);
  }
  if (!s->usable) return without_library(be, p);
  MT_TRY(lt_settle(be, s, p));
  cublasStatus_t status = lt_run(be, s, p, &s->algo);
  if (status == CUBLAS_STATUS_SUCCESS) return MT_OK;
  return mt_fail(MT_EDEVICE, "product of %lld x %lld x %lld: %s", (long long)p->m, (long long)p->n,
                 (long long)p->k, cublasLtGetStatusString(status));
}
