/* Grouped products of one layer's experts: the Hopper kernel, the portable one, and a loop of
 * cuBLASLt products over the experts with row counts that the host knows (no model has that; it is
 * the library's best case). TFLOP/s from the median of CUDA events; random normal data.
 *   grouped_gemm [repetitions, default 20] [only cases whose name contains this] [which, default
 * chpl] which: h Hopper, p portable, l library; c checks Hopper's result against the portable
 * one's. "norm": with the sum of squares of what is made; beside cuBLASLt's products, the pass
 * that reads it all again. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/device.cuh"

extern "C" {
#include "kernels/registry.h"
}

#define CHECK(call)                                                                                \
  do {                                                                                             \
    cudaError_t e_ = (call);                                                                       \
    if (e_ != cudaSuccess) die(#call, cudaGetErrorString(e_));                                     \
  } while (0)
#define OK(call)                                                                                   \
  do {                                                                                             \
    if (call) die(#call, mt_error_message());                                                      \
  } while (0)

static void die(const char *what, const char *why) {
  printf("%s: %s\n", what, why);
  exit(1);
}

__device__ static uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
template <class T> __global__ void fill_normal(T *p, size_t n, uint32_t seed) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t a = mix((uint32_t)i * 2 + seed), b = mix(a ^ 0x9e3779b9u ^ (uint32_t)(i >> 31));
    float u = ((float)(a >> 8) + 1) / 16777217.0f, v = (float)(b >> 8) / 16777216.0f;
    p[i] = from_float<T>(sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}

/* top[0]: the largest difference, top[1]: the largest value, as bits of non-negative floats. */
template <class T> __global__ void compare(const T *a, const T *b, size_t n, unsigned *top) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  float off = 0, most = 0;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) {
    float x = to_float(a[i]), y = to_float(b[i]), d = fabsf(x - y);
    off = fmaxf(off, isnan(d) ? INFINITY : d);
    most = fmaxf(most, fabsf(y));
  }
  atomicMax(&top[0], __float_as_uint(off));
  atomicMax(&top[1], __float_as_uint(most));
}

enum { GROUPS_MOST = 128, REPS_MOST = 100 };

struct bench {
  struct mt_backend native;
  int reps;
  const char *only, *which;
};

static void *device_memory(size_t bytes) {
  void *p;
  CHECK(cudaMalloc(&p, bytes ? bytes : 4));
  return p;
}

static void fill(void *p, enum mt_dtype dtype, size_t n, uint32_t seed) {
  MT_CUDA_BY_FORMAT(dtype, (fill_normal<T><<<1024, 256>>>((T *)p, n, seed)););
}

static double difference(const void *a, const void *b, enum mt_dtype dtype, size_t n) {
  unsigned *top = (unsigned *)device_memory(2 * sizeof *top), host[2];
  CHECK(cudaMemset(top, 0, 2 * sizeof *top));
  MT_CUDA_BY_FORMAT(dtype, (compare<T><<<1024, 256>>>((const T *)a, (const T *)b, n, top)););
  CHECK(cudaMemcpy(host, top, sizeof host, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(top));
  float off, most;
  memcpy(&off, &host[0], 4);
  memcpy(&most, &host[1], 4);
  return most > 0 ? (double)off / (double)most : (double)off;
}

enum way { HOPPER, PORTABLE, LIBRARY, WAYS };

struct test {
  struct mt_cuda_grouped p;
  int32_t offsets[GROUPS_MOST + 1];
};

/* What the experts' rows make of the arguments of one dense product. */
static void library_loop(struct mt_backend *be, const struct test *t) {
  const struct mt_cuda_grouped *p = &t->p;
  bool wgrad = p->kind == GROUPED_WGRAD;
  size_t width = mt_dtype_bytes(p->c_dtype);
  for (int g = 0; g < p->groups; g++) {
    int64_t begin = t->offsets[g], rows = t->offsets[g + 1] - begin;
    int64_t matrix = (p->kind == GROUPED_FWD ? p->n : p->k) * p->ldb;
    struct mt_cuda_product d = {};
    d.m = wgrad ? p->m : rows, d.n = p->n, d.k = wgrad ? rows : p->k;
    d.a = (const bf16 *)p->a + begin * p->lda;
    d.b = (const bf16 *)p->b + (wgrad ? begin * p->ldb : g * matrix);
    d.c = (char *)p->c + (size_t)((wgrad ? g * p->m : begin) * p->ldc) * width;
    d.lda = p->lda, d.ldb = p->ldb, d.ldc = p->ldc;
    d.a_columns = wgrad, d.b_columns = p->kind == GROUPED_FWD;
    d.ab = p->ab, d.c_dtype = p->c_dtype, d.beta = p->accumulate ? 1.0f : 0.0f;
    OK(mt_cuda_gemm(be, &d));
  }
  if (!p->sumsq) return;
  struct mt_tensor c = mt_vec(p->c, p->c_dtype, p->groups * p->m * p->n);
  struct mt_sumsq_args a = {};
  a.tensors = &c, a.tensor_count = 1, a.out = p->sumsq;
  OK(be->ops.sumsq(be, &a));
}

static void run(struct bench *b, const struct test *t, enum way way) {
  if (way == HOPPER) OK(mt_cuda_grouped_sm90(&b->native, &t->p));
  if (way == PORTABLE) OK(mt_cuda_grouped_portable(&b->native, &t->p));
  if (way == LIBRARY) library_loop(&b->native, t);
}

static int by_size(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static double median_ms(struct bench *b, const struct test *t, enum way way) {
  cudaStream_t stream = mt_cuda_of(&b->native)->stream;
  cudaEvent_t begin, end;
  float ms[REPS_MOST];
  int reps = way == PORTABLE ? (b->reps + 4) / 5 : b->reps;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (int i = 0; i < (reps + 3) / 2; i++) run(b, t, way); /* to the clock that lasts, too */
  for (int i = 0; i < reps; i++) {
    CHECK(cudaEventRecord(begin, stream));
    run(b, t, way);
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms[i], begin, end));
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  qsort(ms, (size_t)reps, sizeof *ms, by_size);
  return (double)ms[reps / 2];
}

/* Both kernels from the same start; rows past the last group stay as they are. */
static double check(struct bench *b, struct test *t, size_t c_count) {
  size_t bytes = c_count * mt_dtype_bytes(t->p.c_dtype);
  void *other = device_memory(bytes), *c = t->p.c;
  fill(c, t->p.c_dtype, c_count, 5);
  CHECK(cudaMemcpy(other, c, bytes, cudaMemcpyDeviceToDevice));
  CHECK(cudaDeviceSynchronize()); /* the backend's stream does not wait for the default one */
  run(b, t, HOPPER);
  t->p.c = other;
  run(b, t, PORTABLE);
  t->p.c = c;
  CHECK(cudaDeviceSynchronize());
  double d = difference(c, other, t->p.c_dtype, c_count);
  CHECK(cudaFree(other));
  return d;
}

struct size {
  const char *name;
  int64_t rows, h, f;
  int experts;
  double skew; /* expert i's share falls as (i + 1)^-skew */
};

static void share_rows(const struct size *z, int32_t *offsets) {
  double total = 0, sum = 0;
  for (int g = 0; g < z->experts; g++) total += pow(g + 1, -z->skew);
  for (int g = 0; g < z->experts; g++) {
    offsets[g] = (int32_t)llround((double)z->rows * sum / total);
    sum += pow(g + 1, -z->skew);
  }
  offsets[z->experts] = (int32_t)z->rows;
}

static void one(struct bench *b, const struct size *z, const char *what,
                enum mt_cuda_grouped_kind kind, int64_t out, int64_t in, enum mt_dtype c_dtype,
                int accumulate, bool norm = false) {
  char name[80];
  snprintf(name, sizeof name, "%-18s %s", z->name, what);
  if (b->only && !strstr(name, b->only)) return;
  struct test t = {};
  share_rows(z, t.offsets);
  bool wgrad = kind == GROUPED_WGRAD;
  size_t rows = (size_t)z->rows, w = (size_t)(z->experts * out * in);
  size_t a = rows * (size_t)(kind == GROUPED_FWD ? in : out), bb = wgrad ? rows * (size_t)in : w;
  size_t c = wgrad ? w : rows * (size_t)(kind == GROUPED_FWD ? out : in);
  int32_t *offsets = (int32_t *)device_memory(sizeof t.offsets);
  t.p.kind = kind, t.p.offsets = offsets, t.p.groups = z->experts, t.p.rows_most = z->rows;
  t.p.m = wgrad ? out : 0, t.p.n = kind == GROUPED_FWD ? out : in;
  t.p.k = wgrad ? 0 : kind == GROUPED_FWD ? in : out;
  t.p.lda = kind == GROUPED_FWD ? in : out, t.p.ldb = in, t.p.ldc = t.p.n;
  t.p.ab = MT_BF16, t.p.c_dtype = c_dtype, t.p.accumulate = accumulate;
  void *pa = device_memory(2 * a), *pb = device_memory(2 * bb);
  t.p.a = pa, t.p.b = pb, t.p.c = device_memory(c * mt_dtype_bytes(c_dtype));
  fill(pa, MT_BF16, a, 1);
  fill(pb, MT_BF16, bb, 2);
  CHECK(cudaMemcpy(offsets, t.offsets, sizeof t.offsets, cudaMemcpyHostToDevice));
  CHECK(cudaDeviceSynchronize());
  bool hopper = mt_cuda_grouped_sm90_takes(&b->native, &t.p);
  if (norm) t.p.sumsq = (double *)device_memory(sizeof *t.p.sumsq);
  double tera = 2e-9 * (double)rows * (double)out * (double)in;
  printf("%-40s", name);
  if (hopper && strchr(b->which, 'c')) printf(" %8.1e", check(b, &t, c));
  for (int way = 0; way < WAYS; way++) {
    if ((way == HOPPER && !hopper) || (way == PORTABLE && norm) || !strchr(b->which, "hpl"[way]))
      continue;
    double ms = median_ms(b, &t, (enum way)way);
    printf(" | %7.3f ms %4.0f", ms, tera / ms);
  }
  printf("\n");
  fflush(stdout);
  CHECK(cudaFree(pa));
  CHECK(cudaFree(pb));
  CHECK(cudaFree(t.p.c));
  CHECK(cudaFree(t.p.sumsq));
  CHECK(cudaFree(offsets));
}

static void all_of(struct bench *b, const struct size *z) {
  one(b, z, "fwd gate_up", GROUPED_FWD, 2 * z->f, z->h, MT_BF16, 0);
  one(b, z, "fwd down", GROUPED_FWD, z->h, z->f, MT_BF16, 0);
  one(b, z, "dgrad gate_up", GROUPED_DGRAD, 2 * z->f, z->h, MT_BF16, 0);
  one(b, z, "dgrad down", GROUPED_DGRAD, z->h, z->f, MT_BF16, 0);
  one(b, z, "wgrad gate_up", GROUPED_WGRAD, 2 * z->f, z->h, MT_F32, 0);
  one(b, z, "wgrad down", GROUPED_WGRAD, z->h, z->f, MT_F32, 0);
  one(b, z, "wgrad gate_up +=", GROUPED_WGRAD, 2 * z->f, z->h, MT_F32, 1);
  one(b, z, "wgrad down +=", GROUPED_WGRAD, z->h, z->f, MT_F32, 1);
  one(b, z, "wgrad down bf16", GROUPED_WGRAD, z->h, z->f, MT_BF16, 0);
  one(b, z, "wgrad down bf16 norm", GROUPED_WGRAD, z->h, z->f, MT_BF16, 0, true);
  one(b, z, "wgrad gate_up bf16", GROUPED_WGRAD, 2 * z->f, z->h, MT_BF16, 0);
  one(b, z, "wgrad gate_up bf16 norm", GROUPED_WGRAD, 2 * z->f, z->h, MT_BF16, 0, true);
  one(b, z, "wgrad gate_up norm", GROUPED_WGRAD, 2 * z->f, z->h, MT_F32, 0, true);
}

int main(int argc, char **argv) {
  static const struct size sizes[] = {
      {"8x 64 rows", 64, 4096, 14336, 8, 0},
      {"8x 4096 rows", 4096, 4096, 14336, 8, 0},
      {"8x 4096 skew", 4096, 4096, 14336, 8, 0.7},
      {"8x 16384 rows", 16384, 4096, 14336, 8, 0},
      {"8x 16384 skew", 16384, 4096, 14336, 8, 0.7},
      {"8x 65536 rows", 65536, 4096, 14336, 8, 0},
      {"8x 65536 skew", 65536, 4096, 14336, 8, 0.7},
      {"128x 65536 rows", 65536, 2048, 768, 128, 0},
      {"128x 65536 skew", 65536, 2048, 768, 128, 0.5},
  };
  struct bench b = {};
  b.reps = argc > 1 ? atoi(argv[1]) : 20;
  b.only = argc > 2 ? argv[2] : NULL;
  b.which = argc > 3 ? argv[3] : "chpl";
  if (b.reps < 1 || b.reps > REPS_MOST) die("repetitions", "1 to 100");
  OK(mt_backend_create(&b.native, "cuda", 1));
  b.native.workspace_size_bytes = MT_CUDA_LT_WORKSPACE_BYTES + MT_CUDA_PARTIALS * sizeof(double);
  b.native.workspace = device_memory(b.native.workspace_size_bytes);
  printf("%-40s %8s | %-15s | %-15s | %-15s\n", "", "off by", "Hopper  TFLOP/s", "portable",
         "cuBLASLt loop");
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) all_of(&b, &sizes[i]);
  CHECK(cudaFree(b.native.workspace));
  b.native.workspace = NULL;
  mt_backend_destroy(&b.native);
  return 0;
}
