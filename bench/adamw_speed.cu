/* AdamW and the gradients' norm beside a copy of as many bytes: median ms of CUDA events and GB/s,
 * states in bf16 and in float32, the chip's own kernel and the portable one. A mark beside both
 * says whether they leave the same bits.
 *   adamw_speed [millions of elements, default 1536] [repetitions, default 10] */
#include "bench/common.cuh"

/* Normal numbers times scale, or their squares; a thousandth of the runs of 64 is 0, as where a
 * token never came. */
template <class T>
__global__ void fill_state(T *p, size_t n, uint32_t seed, float scale, bool squares) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t a = mix((uint32_t)i * 2 + seed), b = mix(a ^ 0x9e3779b9u ^ (uint32_t)(i >> 31));
    float u = ((float)(a >> 8) + 1) / 16777217.0f, v = (float)(b >> 8) / 16777216.0f;
    float x = scale * sqrtf(-2 * logf(u)) * cospif(2 * v);
    bool none = mix((uint32_t)(i / 64)) % 1024 == 0;
    p[i] = from_float<T>(none ? 0 : squares ? x * x : x);
  }
}
__global__ void hash(const uint32_t *p, size_t n, unsigned long long *sum) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned long long h = 0;
  for (; i < n; i += (size_t)gridDim.x * blockDim.x) h += mix(p[i] ^ mix((uint32_t)i));
  atomicAdd(sum, h);
}

/* The update's traffic without its arithmetic: of each element four reads, three writes, and where
 * `h` is given a fourth of half the size. */
__global__ void __launch_bounds__(256)
    traffic(uint4 *w, uint4 *m, uint4 *v, const uint4 *g, uint2 *h, size_t n) {
  size_t tile = 4 * 256, i = blockIdx.x * tile + threadIdx.x;
#pragma unroll
  for (int k = 0; k < 4; k++, i += 256) {
    if (i >= n) return;
    uint4 a = w[i], b = m[i], c = v[i], d = g[i];
    a.x ^= d.x, b.y ^= d.y, c.z ^= d.z, a.w ^= d.w;
    w[i] = a, m[i] = b, v[i] = c;
    if (h) h[i] = make_uint2(a.x, b.y);
  }
}

enum { REPS_MOST = 100 };

struct bench {
  struct mt_backend native, portable;
  struct mt_adamw_segment s;
  struct mt_adamw_args a;
  struct mt_adamw_values *values;
  double *sumsq;
  int64_t n;
  int reps;
};

enum way { NATIVE, PORTABLE, TRAFFIC, COPY, NORM, WAYS };
static const char *const way_name[] = {"adamw", "adamw portable", "its traffic alone",
                                       "copy of as many bytes", "sumsq of the gradient"};

static double bytes_of(const struct bench *b, enum way way) {
  double item = (double)mt_dtype_bytes(b->s.master.dtype);
  double each = way == NORM ? item : 7 * item + (b->s.compute.data ? 2 : 0);
  return each * (double)b->n;
}

static void run(struct bench *b, enum way way) {
  cudaStream_t stream = mt_cuda_of(&b->native)->stream;
  size_t width = mt_dtype_bytes(b->s.master.dtype), words = (size_t)b->n * width / 16;
  if (way == NATIVE) OK(b->native.ops.adamw(&b->native, &b->a));
  if (way == PORTABLE) OK(b->portable.ops.adamw(&b->portable, &b->a));
  if (way == TRAFFIC) {
    traffic<<<(unsigned)((words + 1023) / 1024), 256, 0, stream>>>(
        (uint4 *)b->s.master.data, (uint4 *)b->s.m.data, (uint4 *)b->s.v.data,
        (const uint4 *)b->s.grad.data, (uint2 *)b->s.compute.data, words);
    CHECK(cudaGetLastError());
  }
  if (way == COPY) { /* in two parts: half is read, half is written */
    size_t half = (size_t)(bytes_of(b, COPY) / 4) / 16 * 16;
    size_t all = (size_t)b->n * width, part = half < all ? half : all;
    for (size_t left = 2 * half; left > 0; left -= part) {
      if (part > left) part = left;
      CHECK(cudaMemcpyAsync(b->s.m.data, b->s.grad.data, part, cudaMemcpyDeviceToDevice, stream));
    }
  }
  if (way == NORM) {
    struct mt_sumsq_args a = {};
    a.tensors = &b->s.grad, a.tensor_count = 1, a.out = b->sumsq;
    OK(b->native.ops.sumsq(&b->native, &a));
  }
}

static double median_ms(struct bench *b, enum way way) {
  /* The portable backend has a stream of its own. */
  cudaStream_t stream = mt_cuda_of(way == PORTABLE ? &b->portable : &b->native)->stream;
  cudaEvent_t begin, end;
  double ms[REPS_MOST];
  float elapsed;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (int i = -3; i < b->reps; i++) {
    CHECK(cudaEventRecord(begin, stream));
    run(b, way);
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    if (i >= 0) ms[i] = (double)elapsed;
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return median(ms, b->reps);
}

static void fill_one(struct mt_tensor *t, uint32_t seed, float scale, bool squares) {
  size_t n = (size_t)mt_count(t);
  MT_CUDA_BY_FORMAT(t->dtype,
                    (fill_state<T><<<2048, 256>>>((T *)t->data, n, seed, scale, squares)););
}

/* What two updates leave, from the same start. */
static unsigned long long bits_after(struct bench *b, enum way way) {
  struct mt_tensor *t[] = {&b->s.master, &b->s.m, &b->s.v, &b->s.grad};
  unsigned long long *sum, host;
  for (int i = 0; i < 4; i++) fill_one(t[i], (uint32_t)i, i ? 1e-3f : 0.02f, i == 2);
  CHECK(cudaMalloc((void **)&sum, sizeof *sum));
  CHECK(cudaMemset(sum, 0, sizeof *sum));
  CHECK(cudaDeviceSynchronize());
  run(b, way), run(b, way);
  CHECK(cudaDeviceSynchronize());
  for (int i = 0; i < 3; i++) hash<<<2048, 256>>>((uint32_t *)t[i]->data, mt_bytes(t[i]) / 4, sum);
  if (b->s.compute.data)
    hash<<<2048, 256>>>((uint32_t *)b->s.compute.data, mt_bytes(&b->s.compute) / 4, sum);
  CHECK(cudaMemcpy(&host, sum, sizeof host, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(sum));
  return host;
}

static void states_in(struct bench *b, enum mt_dtype dtype) {
  struct mt_tensor *t[] = {&b->s.master, &b->s.m, &b->s.v, &b->s.grad, &b->s.compute};
  b->s.decay = 1, b->s.tensor = 5;
  for (int i = 0; i < (dtype == MT_F32 ? 5 : 4); i++) {
    *t[i] = mt_vec(NULL, i == 4 ? MT_BF16 : dtype, b->n);
    CHECK(cudaMalloc(&t[i]->data, mt_bytes(t[i])));
  }
  double one = 4;
  CHECK(cudaMemcpy(b->sumsq, &one, sizeof one, cudaMemcpyHostToDevice));
  bool same = bits_after(b, NATIVE) == bits_after(b, PORTABLE);
  printf("states in %s, %lld elements: %s\n", mt_dtype_name(dtype), (long long)b->n,
         same ? "both leave the same bits" : "THE BITS DIFFER");
  for (int way = 0; way < WAYS; way++) {
    double ms = median_ms(b, (enum way)way);
    printf("  %-24s %8.3f ms %6.0f GB/s\n", way_name[way], ms,
           1e-6 * bytes_of(b, (enum way)way) / ms);
    fflush(stdout);
  }
  for (int i = 0; i < 5; i++) {
    CHECK(cudaFree(t[i]->data));
    t[i]->data = NULL;
  }
}

int main(int argc, char **argv) {
  struct bench b = {};
  b.n = (argc > 1 ? atoi(argv[1]) : 1536) * 1000000LL;
  b.reps = argc > 2 ? atoi(argv[2]) : 10;
  if (b.n < 1 || b.reps < 1 || b.reps > REPS_MOST) die("arguments", "millions, repetitions to 100");
  OK(mt_backend_create(&b.native, "cuda", 1));
  OK(mt_backend_create(&b.portable, "cuda-portable", 1));
  b.native.workspace_size_bytes = MT_CUDA_LT_WORKSPACE_BYTES + MT_CUDA_PARTIALS * sizeof(double);
  OK(b.native.mem_alloc(&b.native, b.native.workspace_size_bytes, &b.native.workspace));
  CHECK(cudaMalloc((void **)&b.sumsq, sizeof *b.sumsq));
  b.a.segments = &b.s, b.a.segment_count = 1;
  const struct mt_adamw_values third = mt_adamw_at(1e-5, 0.9, 0.95, 0.1, 3, 7);
  CHECK(cudaMalloc((void **)&b.values, sizeof third));
  CHECK(cudaMemcpy(b.values, &third, sizeof third, cudaMemcpyHostToDevice));
  b.a.beta1 = 0.9, b.a.beta2 = 0.95, b.a.eps = 1e-8;
  b.a.values = b.values, b.a.clip = 1, b.a.grad_sumsq = b.sumsq;
  states_in(&b, MT_BF16);
  states_in(&b, MT_F32);
  CHECK(cudaFree(b.sumsq));
  CHECK(cudaFree(b.values));
  CHECK(cudaFree(b.native.workspace));
  b.native.workspace = NULL;
  mt_backend_destroy(&b.portable);
  mt_backend_destroy(&b.native);
  return 0;
}
