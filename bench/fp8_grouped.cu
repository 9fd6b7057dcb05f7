/* Grouped products of one layer's experts in FP8 with blocks of scales, ways of making them in
 * turns on one GPU: TFLOP/s from the median of CUDA events. fp8_grouped [rows]      (Mixtral's
 * width: 8 experts, hidden 4096, ffn 14336; 32768 rows) Columns: moetune's FP8 kernel, cuBLASLt in
 * FP8 in a loop over experts (which knows the counts on the host, as no model does), moetune's bf16
 * kernel. off: the largest difference of cuBLASLt's result from the kernel's over the largest
 * value; scales are 1 here (tests/gpu/test_cuda_fp8.c has others). */
#include "bench/common.cuh"
#include "kernels/cuda/quantize.cuh"
#include "kernels/cuda/sm90/qgrouped.cuh"

enum { EXPERTS = 8, RUNS = 10, WARM = 2, WAYS = 3 };

struct test {
  struct mt_cuda_qgrouped q;
  struct mt_cuda_grouped b;
  int32_t offsets[EXPERTS + 1];
};

/* cuBLASLt's plan for each expert; count 0: it takes none. */
struct lt {
  cublasLtMatmulDesc_t op[EXPERTS];
  cublasLtMatrixLayout_t a[EXPERTS], b[EXPERTS], c[EXPERTS];
  cublasLtMatmulAlgo_t algo[EXPERTS];
  int count;
};

__global__ void fill_e4m3(uint8_t *p, size_t n, uint32_t seed) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t a = mix((uint32_t)i * 2 + seed), b = mix(a ^ 0x9e3779b9u);
    float u = ((float)(a >> 8) + 1) / 16777217.0f, v = (float)(b >> 8) / 16777216.0f;
    p[i] = to_e4m3(64 * sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}
__global__ void fill_ones(float *p, size_t n) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = 1;
}

static uint8_t *some_bytes(size_t n, uint32_t seed) {
  uint8_t *p = (uint8_t *)device_memory(n);
  fill_e4m3<<<1024, 256>>>(p, n, seed);
  return p;
}
static float *ones(size_t n) {
  float *p = (float *)device_memory(n * sizeof *p);
  fill_ones<<<1024, 256>>>(p, n);
  return p;
}

template <class V>
static bool set(cublasLtMatmulDesc_t op, cublasLtMatmulDescAttributes_t what, V value) {
  return cublasLtMatmulDescSetAttribute(op, what, &value, sizeof value) == CUBLAS_STATUS_SUCCESS;
}

/* Row-major c[m,n] = a b^T is, column-major, c[n,m] = (b as stored)^T (a as stored). */
static bool lt_plan(struct mt_backend *be, const struct test *t, struct lt *l) {
  const struct mt_cuda_qgrouped *p = &t->q;
  cublasLtMatmulPreference_t preference;
  size_t workspace = MT_CUDA_LT_WORKSPACE_BYTES;
  bool good = cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS;
  good = good && cublasLtMatmulPreferenceSetAttribute(
                     preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                     sizeof workspace) == CUBLAS_STATUS_SUCCESS;
  for (int g = 0; good && g < EXPERTS; g++, l->count = g) {
    int64_t begin = t->offsets[g], rows = t->offsets[g + 1] - begin;
    int64_t m = p->wgrad ? p->m : rows, k = p->wgrad ? rows : p->k;
    if (rows == 0) continue;
    good = cublasLtMatmulDescCreate(&l->op[g], CUBLAS_COMPUTE_32F, CUDA_R_32F) ==
           CUBLAS_STATUS_SUCCESS;
    cublasLtMatmulDesc_t op = l->op[g];
    const float *a_scale = p->a_scale + (p->wgrad ? begin / 128 * p->m : 0);
    const float *b_scale = p->b_scale + (p->wgrad ? begin / 128 * p->n : 0);
    int32_t vec = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    int32_t b_mode = p->wgrad ? vec : (int32_t)CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    good = good && set(op, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)CUBLAS_OP_T) &&
           set(op, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, b_mode) &&
           set(op, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, vec) &&
           set(op, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, b_scale) &&
           set(op, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, a_scale);
    cudaDataType_t out = p->c_dtype == MT_F32 ? CUDA_R_32F : CUDA_R_16BF;
    good =
        good &&
        !cublasLtMatrixLayoutCreate(&l->a[g], CUDA_R_8F_E4M3, (uint64_t)k, (uint64_t)p->n, p->k) &&
        !cublasLtMatrixLayoutCreate(&l->b[g], CUDA_R_8F_E4M3, (uint64_t)k, (uint64_t)m, p->k) &&
        !cublasLtMatrixLayoutCreate(&l->c[g], out, (uint64_t)p->n, (uint64_t)m, p->ldc);
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    good = good &&
           !cublasLtMatmulAlgoGetHeuristic(mt_cuda_of(be)->lt, op, l->a[g], l->b[g], l->c[g],
                                           l->c[g], preference, 1, &found, &count) &&
           count > 0;
    l->algo[g] = found.algo;
  }
  return good;
}

static void lt_run(struct mt_backend *be, const struct test *t, const struct lt *l) {
  const struct mt_cuda_qgrouped *p = &t->q;
  size_t item = mt_dtype_bytes(p->c_dtype);
  for (int g = 0; g < EXPERTS; g++) {
    int64_t begin = t->offsets[g];
    if (t->offsets[g + 1] == begin) continue;
    float one = 1, beta = p->accumulate ? 1 : 0;
    const uint8_t *a = p->a + (p->wgrad ? begin : begin * p->k);
    const uint8_t *b = p->b + (p->wgrad ? begin : (int64_t)g * p->n * p->k);
    char *c = (char *)p->c + (size_t)((p->wgrad ? (int64_t)g * p->m : begin) * p->ldc) * item;
    if (cublasLtMatmul(mt_cuda_of(be)->lt, l->op[g], &one, b, l->a[g], a, l->b[g], &beta, c,
                       l->c[g], c, l->c[g], &l->algo[g], be->workspace, MT_CUDA_LT_WORKSPACE_BYTES,
                       mt_cuda_of(be)->stream) != CUBLAS_STATUS_SUCCESS)
      die("cublasLtMatmul", "refused");
  }
}

static void one_way(struct mt_backend *be, const struct test *t, const struct lt *l, int way) {
  if (way == 0)
    OK(mt_cuda_qgrouped_sm90(be, &t->q));
  else if (way == 1)
    lt_run(be, t, l);
  else
    OK(mt_cuda_grouped_sm90(be, &t->b));
}

static void measure(struct mt_backend *be, const struct test *t, const char *name, double tera,
                    size_t c_count) {
  static struct lt l;
  double ms[WAYS][RUNS], off = 0;
  cudaStream_t stream = mt_cuda_of(be)->stream;
  cudaEvent_t from, to;
  memset(&l, 0, sizeof l);
  bool lt = lt_plan(be, t, &l);
  CHECK(cudaDeviceSynchronize());
  if (!mt_cuda_qgrouped_sm90_takes(be, &t->q)) die(name, "not taken");
  if (lt && !t->q.accumulate) {
    size_t bytes = c_count * mt_dtype_bytes(t->q.c_dtype);
    void *want = device_memory(bytes);
    one_way(be, t, &l, 1);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(want, t->q.c, bytes, cudaMemcpyDeviceToDevice));
    one_way(be, t, &l, 0);
    CHECK(cudaDeviceSynchronize());
    off = difference(t->q.c, want, t->q.c_dtype, c_count);
    CHECK(cudaFree(want));
  }
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  for (int run = -WARM; run < RUNS; run++) {
    for (int way = 0; way < WAYS; way++) {
      if (way == 1 && !lt) continue;
      CHECK(cudaEventRecord(from, stream));
      one_way(be, t, &l, way);
      CHECK(cudaEventRecord(to, stream));
      CHECK(cudaStreamSynchronize(stream));
      float f;
      CHECK(cudaEventElapsedTime(&f, from, to));
      if (run >= 0) ms[way][run] = (double)f;
    }
  }
  printf("%-26s off %7.1e", name, off);
  for (int way = 0; way < WAYS; way++) {
    if (way == 1 && !lt) {
      printf(" | cublasLt       -");
      continue;
    }
    double m = median(ms[way], RUNS);
    printf(" | %s %7.3f ms %5.0f", way == 0 ? "fp8" : way == 1 ? "cublasLt" : "bf16", m, tera / m);
  }
  printf("\n");
  fflush(stdout);
}

enum kind { ROWS, WGRAD };

/* ROWS: [rows, in] by [out, in]. WGRAD: [out, in] of `rows`. */
static void one(struct mt_backend *be, const struct test *loads, const char *name, enum kind kind,
                int64_t rows, int64_t out, int64_t in, enum mt_dtype c_dtype, int accumulate) {
  struct test t = *loads;
  bool wgrad = kind == WGRAD;
  size_t a = (size_t)(rows * (wgrad ? out : in));
  size_t b = (size_t)((wgrad ? rows : EXPERTS * out) * in);
  size_t c = (size_t)(wgrad ? EXPERTS * out * in : rows * out);
  int32_t *offsets = (int32_t *)device_memory(sizeof t.offsets);
  CHECK(cudaMemcpy(offsets, t.offsets, sizeof t.offsets, cudaMemcpyHostToDevice));
  t.q = {.wgrad = wgrad, .offsets = offsets, .groups = EXPERTS};
  t.q.m = wgrad ? out : rows, t.q.n = wgrad ? in : out, t.q.k = wgrad ? rows : in;
  t.q.a_scale_ld = t.q.m, t.q.ldc = t.q.n, t.q.c_dtype = c_dtype, t.q.accumulate = accumulate;
  t.q.a = some_bytes(a, 1), t.q.b = some_bytes(b, 2), t.q.a_scale = ones(a / 128),
  t.q.b_scale = ones(b / 128);
  t.q.c = device_memory(c * mt_dtype_bytes(c_dtype));
  void *pa = device_memory(2 * a), *pb = device_memory(2 * b);
  fill(pa, MT_BF16, a, 1);
  fill(pb, MT_BF16, b, 2);
  t.b = {.kind = wgrad ? GROUPED_WGRAD : GROUPED_FWD, .offsets = offsets, .groups = EXPERTS};
  t.b.rows_most = rows, t.b.m = wgrad ? out : 0, t.b.n = t.q.n, t.b.k = wgrad ? 0 : in;
  t.b.a = pa, t.b.b = pb, t.b.c = t.q.c, t.b.lda = wgrad ? out : in, t.b.ldb = in;
  t.b.ldc = t.q.n, t.b.ab = MT_BF16, t.b.c_dtype = c_dtype, t.b.accumulate = accumulate;
  CHECK(cudaMemset(t.q.c, 0, c * mt_dtype_bytes(c_dtype)));
  measure(be, &t, name, 2e-9 * (double)rows * (double)out * (double)in, c);
  void *const all[] = {
      offsets, (void *)t.q.a, (void *)t.q.b, (void *)t.q.a_scale, (void *)t.q.b_scale, t.q.c, pa,
      pb};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) CHECK(cudaFree(all[i]));
}

int main(int argc, char **argv) {
  int64_t rows = argc > 1 ? atoll(argv[1]) : 32768, h = 4096, f = 14336;
  static const int shares[2][EXPERTS] = {{8, 8, 8, 8, 8, 8, 8, 8}, {23, 1, 9, 0, 14, 3, 12, 2}};
  struct mt_backend be;
  if (rows < 64 * 128 || rows % (64 * 128) != 0) die("rows", "a multiple of 8192");
  OK(mt_backend_create(&be, "cuda", 1));
  be.workspace_size_bytes = MT_CUDA_LT_WORKSPACE_BYTES;
  be.workspace = device_memory(MT_CUDA_LT_WORKSPACE_BYTES);
  for (int i = 0; i < 2; i++) {
    struct test t = {};
    for (int g = 0; g < EXPERTS; g++)
      t.offsets[g + 1] = t.offsets[g] + (int32_t)(rows / 64 * shares[i][g]);
    printf("%lld rows, %s\n", (long long)rows, i ? "uneven" : "even");
    one(&be, &t, "fwd gate_up", ROWS, rows, 2 * f, h, MT_BF16, 0);
    one(&be, &t, "fwd down", ROWS, rows, h, f, MT_BF16, 0);
    one(&be, &t, "dgrad gate_up", ROWS, rows, h, 2 * f, MT_BF16, 0);
    one(&be, &t, "dgrad down", ROWS, rows, f, h, MT_BF16, 0);
    one(&be, &t, "wgrad gate_up bf16", WGRAD, rows, 2 * f, h, MT_BF16, 0);
    one(&be, &t, "wgrad down bf16", WGRAD, rows, h, f, MT_BF16, 0);
    one(&be, &t, "wgrad gate_up f32", WGRAD, rows, 2 * f, h, MT_F32, 0);
    one(&be, &t, "wgrad down f32", WGRAD, rows, h, f, MT_F32, 0);
    one(&be, &t, "wgrad down f32 +=", WGRAD, rows, h, f, MT_F32, 1);
  }
  CHECK(cudaFree(be.workspace));
  be.workspace = NULL;
  mt_backend_destroy(&be);
  return 0;
}
