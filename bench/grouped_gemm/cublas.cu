/* NVIDIA's libraries: one cuBLASLt product after another, the same over several streams, and
 * cublasGemmGroupedBatchedEx. All need the row counts on the host. */
#include "bench/common.cuh"
#include "bench/grouped_gemm/contender.h"

#ifdef BENCH_WITH_CUBLAS
#include <cublas_v2.h>
#endif

struct mt_cuda_product bench_product_of(const struct test *t, int g) {
  const struct mt_cuda_grouped *p = &t->p;
  bool wgrad = p->kind == GROUPED_WGRAD;
  int64_t begin = t->offsets[g], rows = t->offsets[g + 1] - begin;
  int64_t matrix = (p->kind == GROUPED_FWD ? p->n : p->k) * p->ldb;
  struct mt_cuda_product d = {};
  d.m = wgrad ? p->m : rows, d.n = p->n, d.k = wgrad ? rows : p->k;
  d.a = (const bf16 *)p->a + begin * p->lda;
  d.b = (const bf16 *)p->b + (wgrad ? begin * p->ldb : g * matrix);
  d.c = (char *)p->c + (size_t)((wgrad ? g * p->m : begin) * p->ldc) * mt_dtype_bytes(p->c_dtype);
  d.lda = p->lda, d.ldb = p->ldb, d.ldc = p->ldc;
  d.a_columns = wgrad, d.b_columns = p->kind == GROUPED_FWD;
  d.ab = p->ab, d.c_dtype = p->c_dtype, d.beta = p->accumulate ? 1.0f : 0.0f;
  return d;
}

mt_err bench_zero_empty(struct mt_backend *be, const struct test *t) {
  if (t->p.kind != GROUPED_WGRAD || t->p.accumulate) return MT_OK;
  for (int g = 0; g < t->p.groups; g++) {
    struct mt_cuda_product d = bench_product_of(t, g);
    if (d.k == 0) MT_TRY(mt_cuda_gemm(be, &d));
  }
  return MT_OK;
}

static mt_err loop_prepare(struct mt_backend *be, const struct test *t, void **state) {
  *state = (void *)t;
  return be ? MT_OK : MT_EINVAL;
}
static mt_err loop_run(struct mt_backend *be, const struct test *t, void *) {
  for (int g = 0; g < t->p.groups; g++) {
    struct mt_cuda_product d = bench_product_of(t, g);
    MT_TRY(mt_cuda_gemm(be, &d));
  }
  return MT_OK;
}
static void nothing(void *) {}

/* Groups dealt out to streams that begin after what the backend's stream has done and that it
 * waits for. Each has a workspace of its own. */
enum { STREAMS = 8 };
struct streams {
  cudaStream_t stream[STREAMS];
  cudaEvent_t begin, end[STREAMS];
  char *workspace;
};
static mt_err streams_prepare(struct mt_backend *, const struct test *, void **state) {
  struct streams *s = (struct streams *)calloc(1, sizeof *s);
  if (!s) return mt_fail(MT_ENOMEM, "streams");
  for (int i = 0; i < STREAMS; i++) {
    CHECK(cudaStreamCreateWithFlags(&s->stream[i], cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&s->end[i], cudaEventDisableTiming));
  }
  CHECK(cudaEventCreateWithFlags(&s->begin, cudaEventDisableTiming));
  s->workspace = (char *)device_memory((size_t)STREAMS * MT_CUDA_LT_WORKSPACE_BYTES);
  *state = s;
  return MT_OK;
}
static mt_err streams_run(struct mt_backend *be, const struct test *t, void *state) {
  struct streams *s = (struct streams *)state;
  struct mt_cuda *c = mt_cuda_of(be);
  cudaStream_t stream = c->stream;
  void *workspace = be->workspace;
  mt_err err = MT_OK;
  CHECK(cudaEventRecord(s->begin, stream));
  for (int i = 0; i < STREAMS; i++) CHECK(cudaStreamWaitEvent(s->stream[i], s->begin, 0));
  for (int g = 0; g < t->p.groups && !err; g++) {
    struct mt_cuda_product d = bench_product_of(t, g);
    c->stream = s->stream[g % STREAMS];
    be->workspace = s->workspace + (size_t)(g % STREAMS) * MT_CUDA_LT_WORKSPACE_BYTES;
    err = mt_cuda_gemm(be, &d);
  }
  c->stream = stream;
  be->workspace = workspace;
  for (int i = 0; i < STREAMS; i++) {
    CHECK(cudaEventRecord(s->end[i], s->stream[i]));
    CHECK(cudaStreamWaitEvent(stream, s->end[i], 0));
  }
  return err;
}
static void streams_release(void *state) {
  struct streams *s = (struct streams *)state;
  for (int i = 0; i < STREAMS; i++) {
    CHECK(cudaStreamDestroy(s->stream[i]));
    CHECK(cudaEventDestroy(s->end[i]));
  }
  CHECK(cudaEventDestroy(s->begin));
  CHECK(cudaFree(s->workspace));
  free(s);
}

extern const struct contender bench_lt_loop = {'l',      "cuBLASLt loop", loop_prepare,
                                               loop_run, nothing,         NULL};
extern const struct contender bench_lt_streams = {'s',         "cuBLASLt streams", streams_prepare,
                                                  streams_run, streams_release,    NULL};

#ifndef BENCH_WITH_CUBLAS
extern const struct contender bench_cublas_grouped = {};
#else
/* One group of one product an expert with rows. As in linear.cu, column-major: c^T = b^T a^T. */
struct grouped {
  cublasHandle_t handle;
  int count, m[GROUPS_MOST], n[GROUPS_MOST], k[GROUPS_MOST], size[GROUPS_MOST];
  int lda[GROUPS_MOST], ldb[GROUPS_MOST], ldc[GROUPS_MOST];
  float alpha[GROUPS_MOST], beta[GROUPS_MOST];
  cublasOperation_t op_first[GROUPS_MOST], op_second[GROUPS_MOST];
  const void **first, **second; /* on the device, as c */
  void **c, *workspace;
};
static cublasStatus_t grouped_call(const struct grouped *s, const struct test *t) {
  cudaDataType_t out = t->p.c_dtype == MT_F32 ? CUDA_R_32F : CUDA_R_16BF;
  return cublasGemmGroupedBatchedEx(s->handle, s->op_first, s->op_second, s->n, s->m, s->k,
                                    s->alpha, s->first, CUDA_R_16BF, s->ldb, s->second, CUDA_R_16BF,
                                    s->lda, s->beta, s->c, out, s->ldc, s->count, s->size,
                                    CUBLAS_COMPUTE_32F);
}
static void grouped_release(void *state) {
  struct grouped *s = (struct grouped *)state;
  cublasDestroy(s->handle);
  CHECK(cudaFree(s->first));
  CHECK(cudaFree(s->workspace));
  free(s);
}
static mt_err grouped_prepare(struct mt_backend *be, const struct test *t, void **state) {
  const void *host[3][GROUPS_MOST];
  struct grouped *s = (struct grouped *)calloc(1, sizeof *s);
  *state = NULL;
  if (!s) return mt_fail(MT_ENOMEM, "grouped products");
  for (int g = 0; g < t->p.groups; g++) {
    struct mt_cuda_product d = bench_product_of(t, g);
    int i = s->count;
    if (d.m == 0 || d.k == 0) continue;
    s->m[i] = (int)d.m, s->n[i] = (int)d.n, s->k[i] = (int)d.k, s->size[i] = 1;
    s->lda[i] = (int)d.lda, s->ldb[i] = (int)d.ldb, s->ldc[i] = (int)d.ldc;
    s->alpha[i] = 1, s->beta[i] = d.beta;
    s->op_first[i] = d.b_columns ? CUBLAS_OP_T : CUBLAS_OP_N;
    s->op_second[i] = d.a_columns ? CUBLAS_OP_T : CUBLAS_OP_N;
    host[0][i] = d.b, host[1][i] = d.a, host[2][i] = d.c;
    s->count++;
  }
  s->first = (const void **)device_memory(sizeof host);
  s->second = s->first + GROUPS_MOST;
  s->c = (void **)s->first + 2 * GROUPS_MOST;
  CHECK(cudaMemcpy(s->first, host, sizeof host, cudaMemcpyHostToDevice));
  s->workspace = device_memory(MT_CUDA_LT_WORKSPACE_BYTES);
  bool there = cublasCreate(&s->handle) == CUBLAS_STATUS_SUCCESS &&
               cublasSetStream(s->handle, mt_cuda_of(be)->stream) == CUBLAS_STATUS_SUCCESS &&
               cublasSetWorkspace(s->handle, s->workspace, MT_CUDA_LT_WORKSPACE_BYTES) ==
                   CUBLAS_STATUS_SUCCESS;
  if (!there) die("cublas", "no handle");
  /* The call itself says what it does not take; accumulating twice is the caller's to mend. */
  cublasStatus_t status = t->p.accumulate ? CUBLAS_STATUS_NOT_SUPPORTED : grouped_call(s, t);
  if (status == CUBLAS_STATUS_SUCCESS)
    *state = s;
  else
    grouped_release(s);
  return MT_OK;
}
static mt_err grouped_run(struct mt_backend *be, const struct test *t, void *state) {
  cublasStatus_t status = grouped_call((const struct grouped *)state, t);
  if (status != CUBLAS_STATUS_SUCCESS)
    return mt_fail(MT_EDEVICE, "cublasGemmGroupedBatchedEx: %s", cublasGetStatusString(status));
  return bench_zero_empty(be, t);
}
extern const struct contender bench_cublas_grouped = {
    'g', "cuBLAS grouped", grouped_prepare, grouped_run, grouped_release, NULL};
#endif
