/* The dense products of a training step (projections of attention, head), in turns on the same
 * operands: mt_cuda_gemm as the backend calls it, the Hopper kernel for grouped products with one
 * group, and cuBLASLt's first eight choices of an
 * algorithm under the wishes that linear.cu has. "best": the fastest of the eight, its place among
 * them, and by how much it beats what is used; timed again beside that, so that the choice's luck
 * does not count. TFLOP/s from medians of CUDA events.
 *   dense_gemm [runs, default 20] */
#include "bench/common.cuh"

enum { CHOICES = 8, OWN = CHOICES, USED = CHOICES + 1, WAYS = CHOICES + 2, RUNS_MOST = 100 };

struct library {
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulHeuristicResult_t choice[CHOICES];
  int count;
};

#define LT(call)                                                                                   \
  do {                                                                                             \
    cublasStatus_t s_ = (call);                                                                    \
    if (s_ != CUBLAS_STATUS_SUCCESS) die(#call, cublasLtGetStatusString(s_));                      \
  } while (0)

static cudaDataType_t type_of(enum mt_dtype dtype) {
  return dtype == MT_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

/* Column-major: c^T = b^T a^T. */
static void library_of(cublasLtHandle_t lt, const struct mt_cuda_product *p, struct library *l) {
  cublasOperation_t first = p->b_columns ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasOperation_t second = p->a_columns ? CUBLAS_OP_T : CUBLAS_OP_N;
  uint64_t m = (uint64_t)p->m, n = (uint64_t)p->n, k = (uint64_t)p->k;
  uint64_t workspace = MT_CUDA_LT_WORKSPACE_BYTES;
  uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  cublasLtMatmulPreference_t wish;
  LT(cublasLtMatmulDescCreate(&l->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  LT(cublasLtMatmulDescSetAttribute(l->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
  LT(cublasLtMatmulDescSetAttribute(l->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
  LT(cublasLtMatrixLayoutCreate(&l->b, CUDA_R_16BF, p->b_columns ? k : n, p->b_columns ? n : k,
                                p->ldb));
  LT(cublasLtMatrixLayoutCreate(&l->a, CUDA_R_16BF, p->a_columns ? m : k, p->a_columns ? k : m,
                                p->lda));
  LT(cublasLtMatrixLayoutCreate(&l->c, type_of(p->c_dtype), n, m, p->ldc));
  LT(cublasLtMatmulPreferenceCreate(&wish));
  LT(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                          &workspace, sizeof workspace));
  LT(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                          &schemes, sizeof schemes));
  LT(cublasLtMatmulAlgoGetHeuristic(lt, l->op, l->b, l->a, l->c, l->c, wish, CHOICES, l->choice,
                                    &l->count));
  LT(cublasLtMatmulPreferenceDestroy(wish));
}

static void library_free(struct library *l) {
  LT(cublasLtMatmulDescDestroy(l->op));
  LT(cublasLtMatrixLayoutDestroy(l->a));
  LT(cublasLtMatrixLayoutDestroy(l->b));
  LT(cublasLtMatrixLayoutDestroy(l->c));
}

static struct mt_cuda_grouped one_group(const struct mt_cuda_product *p) {
  struct mt_cuda_grouped g = {};
  g.kind = p->a_columns ? GROUPED_WGRAD : p->b_columns ? GROUPED_FWD : GROUPED_DGRAD;
  g.groups = 1, g.rows_most = p->a_columns ? p->k : p->m;
  g.m = p->m, g.n = p->n, g.k = p->k;
  g.a = p->a, g.b = p->b, g.c = p->c, g.lda = p->lda, g.ldb = p->ldb, g.ldc = p->ldc;
  g.ab = p->ab, g.c_dtype = p->c_dtype, g.accumulate = p->beta != 0;
  return g;
}

static void run(struct mt_backend *be, const struct mt_cuda_product *p, const struct library *l,
                int way) {
  struct mt_cuda *c = mt_cuda_of(be);
  struct mt_cuda_grouped g = one_group(p);
  float alpha = 1, beta = p->beta;
  if (way == OWN)
    OK(mt_cuda_grouped_sm90(be, &g));
  else if (way == USED)
    OK(mt_cuda_gemm(be, p));
  else
    LT(cublasLtMatmul(c->lt, l->op, &alpha, p->b, l->b, p->a, l->a, &beta, p->c, l->c, p->c, l->c,
                      &l->choice[way].algo, be->workspace, be->workspace_size_bytes, c->stream));
}

/* ms (=) [WAYS], of the ways whose bits are set in `which`. They take turns in an order that moves
 * on each time, behind a run that is not counted: what comes first after a pause is slower. */
static void time_ways(struct mt_backend *be, const struct mt_cuda_product *p,
                      const struct library *l, int runs, unsigned which, double *ms) {
  static double all[WAYS][RUNS_MOST];
  cudaStream_t stream = mt_cuda_of(be)->stream;
  cudaEvent_t at[2 * WAYS];
  for (int i = 0; i < 2 * WAYS; i++) CHECK(cudaEventCreate(&at[i]));
  for (int r = -3; r < runs; r++) {
    run(be, p, l, USED);
    for (int turn = 0; turn < WAYS; turn++) {
      int i = (r + 3 + turn) % WAYS;
      if (!(which >> i & 1)) continue;
      CHECK(cudaEventRecord(at[2 * i], stream));
      run(be, p, l, i);
      CHECK(cudaEventRecord(at[2 * i + 1], stream));
    }
    CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < WAYS && r >= 0; i++) {
      float one;
      if (!(which >> i & 1)) continue;
      CHECK(cudaEventElapsedTime(&one, at[2 * i], at[2 * i + 1]));
      all[i][r] = (double)one;
    }
  }
  for (int i = 0; i < 2 * WAYS; i++) CHECK(cudaEventDestroy(at[i]));
  for (int i = 0; i < WAYS; i++) ms[i] = which >> i & 1 ? median(all[i], runs) : 0;
}

/* The Hopper kernel's result beside the backend's, from the same start; -1: it takes this not. */
static double off_by(struct mt_backend *be, const struct mt_cuda_product *p) {
  size_t count = (size_t)(p->m * p->ldc), bytes = count * mt_dtype_bytes(p->c_dtype);
  void *c = p->c, *other = device_memory(bytes);
  struct mt_cuda_grouped g = one_group(p);
  double d = -1;
  if (mt_cuda_grouped_sm90_takes(be, &g)) {
    fill(c, p->c_dtype, count, 5);
    fill(other, p->c_dtype, count, 5);
    CHECK(cudaDeviceSynchronize());
    OK(mt_cuda_grouped_sm90(be, &g));
    struct mt_cuda_product q = *p;
    q.c = other;
    OK(mt_cuda_gemm(be, &q));
    CHECK(cudaDeviceSynchronize());
    d = difference(c, other, p->c_dtype, count);
  }
  CHECK(cudaFree(other));
  return d;
}

static void one(struct mt_backend *be, const char *name, struct mt_cuda_product p, int runs) {
  struct library l = {};
  double ms[WAYS], giga = 2e-9 * (double)p.m * (double)p.n * (double)p.k;
  size_t a = (size_t)((p.a_columns ? p.k : p.m) * p.lda);
  size_t b = (size_t)((p.b_columns ? p.n : p.k) * p.ldb), c = (size_t)(p.m * p.ldc);
  void *pa = device_memory(2 * a), *pb = device_memory(2 * b);
  p.a = pa, p.b = pb, p.c = device_memory(c * mt_dtype_bytes(p.c_dtype));
  fill(pa, MT_BF16, a, 1);
  fill(pb, MT_BF16, b, 2);
  fill(p.c, p.c_dtype, c, 3);
  CHECK(cudaDeviceSynchronize()); /* the backend's stream does not wait for the default one */
  double off = off_by(be, &p);
  library_of(mt_cuda_of(be)->lt, &p, &l);
  struct mt_cuda_grouped g = one_group(&p);
  unsigned own = mt_cuda_grouped_sm90_takes(be, &g) ? 1u << OWN : 0;
  time_ways(be, &p, &l, runs, (1u << l.count) - 1, ms);
  int best = 0;
  for (int i = 1; i < l.count; i++) {
    if (ms[i] < ms[best]) best = i;
  }
  time_ways(be, &p, &l, runs, own | 1u << USED | 1u << best | 1u, ms);
  printf("%-34s %6lld x %5lld x %5lld | %8.1e |", name, (long long)p.m, (long long)p.n,
         (long long)p.k, off);
  if (own)
    printf(" %7.3f ms %4.0f |", ms[OWN], giga / ms[OWN]);
  else
    printf(" %15s |", "-");
  printf(" %7.3f ms %4.0f | %7.3f ms %4.0f | %7.3f ms %4.0f, no. %d of %d, %+.1f%%\n", ms[USED],
         giga / ms[USED], ms[0], giga / ms[0], ms[best], giga / ms[best], best + 1, l.count,
         100 * (ms[USED] / ms[best] - 1));
  fflush(stdout);
  library_free(&l);
  CHECK(cudaFree(pa));
  CHECK(cudaFree(pb));
  CHECK(cudaFree(p.c));
}

/* A layer of `in` to `out` on rows of tokens, its three products; logits: it is the head, whose
 * forward leaves float32. */
static void layer(struct mt_backend *be, const char *what, int64_t rows, int64_t in, int64_t out,
                  bool logits, int runs) {
  char name[64];
  struct mt_cuda_product p = {};
  p.ab = MT_BF16, p.lda = in, p.ldb = in, p.ldc = out;
  p.m = rows, p.n = out, p.k = in, p.b_columns = true, p.c_dtype = logits ? MT_F32 : MT_BF16;
  snprintf(name, sizeof name, "%s fwd%s", what, logits ? " f32" : "");
  one(be, name, p, runs);
  p.m = rows, p.n = in, p.k = out, p.lda = out, p.ldb = in, p.ldc = in;
  p.b_columns = false, p.c_dtype = MT_BF16;
  snprintf(name, sizeof name, "%s dgrad", what);
  one(be, name, p, runs);
  p.m = out, p.n = in, p.k = rows, p.a_columns = true;
  for (int i = 0; i < 4; i++) {
    p.c_dtype = i % 2 ? MT_F32 : MT_BF16, p.beta = i / 2 ? 1.0f : 0.0f;
    snprintf(name, sizeof name, "%s wgrad %s %s", what, i % 2 ? "f32" : "bf16", i / 2 ? "+=" : "=");
    one(be, name, p, runs);
  }
}

int main(int argc, char **argv) {
  int runs = argc > 1 ? atoi(argv[1]) : 20;
  struct mt_backend be = {};
  if (runs < 1 || runs > RUNS_MOST) die("runs", "1 to 100");
  OK(mt_backend_create(&be, "cuda", 1));
  be.workspace_size_bytes = MT_CUDA_LT_WORKSPACE_BYTES;
  be.workspace = device_memory(MT_CUDA_LT_WORKSPACE_BYTES);
  printf("%-34s %6s   %5s   %5s | %8s | %-15s | %-15s | %-15s | best of cuBLASLt's\n", "", "m", "n",
         "k", "off", "Hopper, 1 group", "as used", "cuBLASLt first");
  layer(&be, "qkv 16384", 16384, 4096, 6144, false, runs);
  layer(&be, "out 16384", 16384, 4096, 4096, false, runs);
  layer(&be, "head, a chunk of 4096", 4096, 4096, 32000, true, runs);
  layer(&be, "qkv 2048", 2048, 4096, 6144, false, runs);
  layer(&be, "out 2048", 2048, 4096, 4096, false, runs);
  layer(&be, "head 2048", 2048, 4096, 32000, true, runs);
  CHECK(cudaFree(be.workspace));
  be.workspace = NULL;
  mt_backend_destroy(&be);
  return 0;
}
