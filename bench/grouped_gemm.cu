/* Grouped products of one layer's experts, ways of making them in turns on the same operands:
 * TFLOP/s from the median of CUDA events; random normal data. The libraries are given the row
 * counts on the host, which no model has, and what can be prepared is prepared outside of the
 * clock: their best case.
 *   grouped_gemm [--loads] [--runs N] [--only PART_OF_A_NAME] [--ways htplsgx] [--no-check]
 *                [--beside SMS]
 * Cases: mixtral, 8 experts of hidden 4096 and ffn 14336; qwen3, 128 of hidden 2048 and ffn 768; so
 * many routed rows, shared evenly or by Dirichlet's distribution.
 * ways (hlsgx unless told): h moetune on Hopper, t the same with units by turns, p moetune's
 * portable kernel, l cuBLASLt in a loop over experts, s the same over 8 streams, g
 * cublasGemmGroupedBatchedEx, x CUTLASS (where it was built with -DMOETUNE_CUTLASS_DIR=, see
 * bench/get_cutlass.sh). Each way's result is first compared with h's: the largest difference over
 * the largest value stands under "off".
 * --beside: another kernel holds so many multiprocessors all the while, as transfers do.
 * --loads prints the rows of each expert in each case instead, for other programs. */
#include "bench/common.cuh"
#include "bench/grouped_gemm/contender.h"

extern "C" {
#include "base/rng.h"
}

enum { WAYS_MOST = 8, RUNS_MOST = 100, WARM = 3 };

static mt_err own_prepare(struct mt_backend *be, const struct test *t, void **state) {
  *state = mt_cuda_grouped_sm90_takes(be, &t->p) ? be : NULL;
  return MT_OK;
}
static mt_err own_run(struct mt_backend *be, const struct test *t, void *) {
  return mt_cuda_grouped_sm90(be, &t->p);
}
static mt_err turns_run(struct mt_backend *be, const struct test *t, void *) {
  struct mt_cuda *c = mt_cuda_of(be);
  int *counters = c->unit_counters;
  c->unit_counters = NULL;
  mt_err err = mt_cuda_grouped_sm90(be, &t->p);
  c->unit_counters = counters;
  return err;
}
static mt_err portable_prepare(struct mt_backend *be, const struct test *, void **state) {
  *state = be;
  return MT_OK;
}
static mt_err portable_run(struct mt_backend *be, const struct test *t, void *) {
  return mt_cuda_grouped_portable(be, &t->p);
}
static void nothing(void *) {}
static const struct contender own = {'h', "moetune", own_prepare, own_run, nothing, NULL};
static const struct contender turns = {'t', "by turns", own_prepare, turns_run, nothing, NULL};
static const struct contender portable = {
    'p', "moetune portable", portable_prepare, portable_run, nothing, NULL};
#ifndef BENCH_WITH_CUTLASS
extern const struct contender bench_cutlass = {};
#endif
static const struct contender *const known[] = {
    &own,          &turns, &portable, &bench_lt_loop, &bench_lt_streams, &bench_cublas_grouped,
    &bench_cutlass};

struct bench {
  struct mt_backend native;
  int runs, beside;
  const char *only, *ways;
  bool check, loads;
  const struct contender *way[WAYS_MOST];
  int way_count;
};

/* The ways' largest difference from the Hopper kernel, each from the same start, so that what is
 * not to be written counts too; 0 where that kernel does not take the product. */
static double off_by(struct bench *b, const struct test *t, void *const *state, size_t count) {
  size_t bytes = count * mt_dtype_bytes(t->p.c_dtype);
  double most = 0;
  if (!mt_cuda_grouped_sm90_takes(&b->native, &t->p)) return 0;
  void *want = device_memory(bytes);
  for (int i = -1; i < b->way_count; i++) {
    if (i >= 0 && !state[i]) continue;
    fill(t->p.c, t->p.c_dtype, count, 5);
    CHECK(cudaDeviceSynchronize()); /* the backend's stream does not wait for the default one */
    OK(i < 0 ? own_run(&b->native, t, NULL) : b->way[i]->run(&b->native, t, state[i]));
    CHECK(cudaDeviceSynchronize());
    if (i < 0) CHECK(cudaMemcpy(want, t->p.c, bytes, cudaMemcpyDeviceToDevice));
    double d = difference(t->p.c, want, t->p.c_dtype, count);
    if (!(d <= most)) most = d;
  }
  CHECK(cudaFree(want));
  return most;
}

/* Holds a multiprocessor (it asks for most of the shared memory) until *stop is set. */
enum { HOLD_BYTES = 200 << 10 };
__global__ void hold(int *begun, const volatile int *stop) {
  if (threadIdx.x == 0) atomicAdd(begun, 1);
  while (!*stop) __nanosleep(1000);
}

struct holder {
  cudaStream_t stream;
  int *flags; /* device: begun, stop */
};
static void hold_begin(const struct bench *b, struct holder *h) {
  int begun = 0;
  if (b->beside == 0) return;
  if (!h->flags) {
    CHECK(cudaStreamCreateWithFlags(&h->stream, cudaStreamNonBlocking));
    h->flags = (int *)device_memory(2 * sizeof(int));
    CHECK(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, HOLD_BYTES));
  }
  CHECK(cudaMemsetAsync(h->flags, 0, 2 * sizeof(int), h->stream));
  CHECK(cudaStreamSynchronize(h->stream));
  hold<<<(unsigned)b->beside, 32, HOLD_BYTES, h->stream>>>(h->flags, h->flags + 1);
  cudaStream_t looks = mt_cuda_of(&b->native)->stream;
  while (begun < b->beside) {
    CHECK(cudaMemcpyAsync(&begun, h->flags, sizeof begun, cudaMemcpyDeviceToHost, looks));
    CHECK(cudaStreamSynchronize(looks));
  }
}
/* Once what the stream has so far is done. */
static void hold_end(const struct bench *b, const struct holder *h, cudaStream_t stream) {
  if (b->beside > 0) CHECK(cudaMemsetAsync(h->flags + 1, 1, sizeof(int), stream));
}

/* Medians in ms [WAYS_MOST] (=). The ways take turns in an order that moves on each time, behind a
 * run that is not counted: what comes first after a pause is slower, whichever it is. The host
 * waits once a turn: launches of one hide behind the products of another. */
static void time_ways(struct bench *b, const struct test *t, void *const *state, double *ms) {
  static double all[WAYS_MOST][RUNS_MOST];
  cudaStream_t stream = mt_cuda_of(&b->native)->stream;
  cudaEvent_t at[2 * WAYS_MOST];
  static struct holder holder;
  int lead = 0, ways = b->way_count;
  while (lead < ways - 1 && !state[lead]) lead++;
  for (int i = 0; i < 2 * ways; i++) CHECK(cudaEventCreate(&at[i]));
  for (int run = -WARM; run < b->runs; run++) {
    if (run >= 0)
      hold_begin(b, &holder); /* not before all kernels are loaded, which waits for it */
    if (state[lead]) OK(b->way[lead]->run(&b->native, t, state[lead]));
    for (int turn = 0; turn < ways; turn++) {
      int i = (run + WARM + turn) % ways;
      if (!state[i]) continue;
      CHECK(cudaEventRecord(at[2 * i], stream));
      OK(b->way[i]->run(&b->native, t, state[i]));
      CHECK(cudaEventRecord(at[2 * i + 1], stream));
    }
    if (run >= 0) hold_end(b, &holder, stream);
    CHECK(cudaStreamSynchronize(stream));
    if (b->beside > 0 && run >= 0) CHECK(cudaStreamSynchronize(holder.stream));
    for (int i = 0; i < ways && run >= 0; i++) {
      float one;
      if (!state[i]) continue;
      CHECK(cudaEventElapsedTime(&one, at[2 * i], at[2 * i + 1]));
      all[i][run] = (double)one;
    }
  }
  for (int i = 0; i < 2 * ways; i++) CHECK(cudaEventDestroy(at[i]));
  for (int i = 0; i < ways; i++) ms[i] = state[i] ? median(all[i], b->runs) : 0;
}

struct size {
  const char *name;
  int64_t rows, h, f;
  int experts;
  double alpha; /* shares of the rows drawn from Dirichlet(alpha), 0: even */
};

/* Marsaglia and Tsang, "A simple method for generating gamma variables" (2000), for shape + 1. */
static double gamma_of(struct mt_rng *r, double shape) {
  double d = shape + 1 - 1.0 / 3, c = 1 / sqrt(9 * d);
  for (;;) {
    double x = mt_rng_normal(r), v = pow(1 + c * x, 3), u = 1 - mt_rng_uniform(r);
    if (v <= 0 || log(u) >= 0.5 * x * x + d - d * v + d * log(v)) continue;
    return d * v * pow(1 - mt_rng_uniform(r), 1 / shape);
  }
}

static void share_rows(const struct size *z, int32_t *offsets) {
  struct mt_rng rng = mt_rng_make(7, (uint64_t)(z->rows + z->experts + 1000 * z->alpha));
  double share[GROUPS_MOST], total = 0, sum = 0;
  for (int g = 0; g < z->experts; g++) {
    share[g] = z->alpha > 0 ? gamma_of(&rng, z->alpha) : 1;
    total += share[g];
  }
  for (int g = 0; g < z->experts; g++) {
    offsets[g] = (int32_t)llround((double)z->rows * sum / total);
    sum += share[g];
  }
  offsets[z->experts] = (int32_t)z->rows;
}

static void print_loads(const struct size *z) {
  int32_t offsets[GROUPS_MOST + 1];
  share_rows(z, offsets);
  printf("%s;%lld;%lld;", z->name, (long long)z->h, (long long)z->f);
  for (int g = 0; g < z->experts; g++) printf("%s%d", g ? "," : "", offsets[g + 1] - offsets[g]);
  printf("\n");
}

static void time_test(struct bench *b, const struct test *t, const char *name, double tera,
                      size_t c_count) {
  void *state[WAYS_MOST];
  double ms[WAYS_MOST];
  printf("%-42s", name);
  fflush(stdout);
  for (int i = 0; i < b->way_count; i++) OK(b->way[i]->prepare(&b->native, t, &state[i]));
  CHECK(cudaDeviceSynchronize());
  printf(" %7.1e", b->check ? off_by(b, t, state, c_count) : 0.0);
  time_ways(b, t, state, ms);
  for (int i = 0; i < b->way_count; i++) {
    const struct contender *w = b->way[i];
    if (!state[i]) {
      printf(" | %7s    %4s", "-", "-");
      continue;
    }
    printf(" | %7.3f ms %4.0f", ms[i], tera / ms[i]);
    if (w->describe) printf(" %s", w->describe(state[i]));
    w->release(state[i]);
  }
  printf("\n");
  fflush(stdout);
}

static void one(struct bench *b, const struct size *z, const char *what,
                enum mt_cuda_grouped_kind kind, int64_t out, int64_t in, enum mt_dtype c_dtype,
                int accumulate) {
  char name[80];
  snprintf(name, sizeof name, "%-23s %s", z->name, what);
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
  time_test(b, &t, name, 2e-9 * (double)rows * (double)out * (double)in, c);
  CHECK(cudaFree(pa));
  CHECK(cudaFree(pb));
  CHECK(cudaFree(t.p.c));
  CHECK(cudaFree(offsets));
}

static void all_of(struct bench *b, const struct size *z) {
  one(b, z, "fwd gate_up", GROUPED_FWD, 2 * z->f, z->h, MT_BF16, 0);
  one(b, z, "fwd down", GROUPED_FWD, z->h, z->f, MT_BF16, 0);
  one(b, z, "dgrad gate_up", GROUPED_DGRAD, 2 * z->f, z->h, MT_BF16, 0);
  one(b, z, "dgrad down", GROUPED_DGRAD, z->h, z->f, MT_BF16, 0);
  one(b, z, "wgrad gate_up bf16", GROUPED_WGRAD, 2 * z->f, z->h, MT_BF16, 0);
  one(b, z, "wgrad down bf16", GROUPED_WGRAD, z->h, z->f, MT_BF16, 0);
  one(b, z, "wgrad gate_up f32", GROUPED_WGRAD, 2 * z->f, z->h, MT_F32, 0);
  one(b, z, "wgrad down f32", GROUPED_WGRAD, z->h, z->f, MT_F32, 0);
  one(b, z, "wgrad down f32 +=", GROUPED_WGRAD, z->h, z->f, MT_F32, 1);
}

static void parse(struct bench *b, int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    bool value = i + 1 < argc;
    if (!strcmp(argv[i], "--loads"))
      b->loads = true;
    else if (!strcmp(argv[i], "--no-check"))
      b->check = false;
    else if (!strcmp(argv[i], "--runs") && value)
      b->runs = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--beside") && value)
      b->beside = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--only") && value)
      b->only = argv[++i];
    else if (!strcmp(argv[i], "--ways") && value)
      b->ways = argv[++i];
    else
      die(argv[i], "grouped_gemm [--loads] [--runs N] [--only NAME] [--ways htplsgx] [--no-check] "
                   "[--beside N]");
  }
  if (b->runs < 1 || b->runs > RUNS_MOST) die("--runs", "1 to 100");
  if (b->beside < 0 || b->beside > 64) die("--beside", "0 to 64");
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (known[i]->name && strchr(b->ways, known[i]->letter)) b->way[b->way_count++] = known[i];
  }
}

int main(int argc, char **argv) {
  static const struct size sizes[] = {
      {"mixtral 64 even", 64, 4096, 14336, 8, 0},
      {"mixtral 4096 even", 4096, 4096, 14336, 8, 0},
      {"mixtral 4096 Dir(1)", 4096, 4096, 14336, 8, 1},
      {"mixtral 4096 Dir(0.3)", 4096, 4096, 14336, 8, 0.3},
      {"mixtral 16384 even", 16384, 4096, 14336, 8, 0},
      {"mixtral 16384 Dir(1)", 16384, 4096, 14336, 8, 1},
      {"mixtral 16384 Dir(0.3)", 16384, 4096, 14336, 8, 0.3},
      {"mixtral 65536 even", 65536, 4096, 14336, 8, 0},
      {"mixtral 65536 Dir(1)", 65536, 4096, 14336, 8, 1},
      {"mixtral 65536 Dir(0.3)", 65536, 4096, 14336, 8, 0.3},
      {"qwen3 4096 even", 4096, 2048, 768, 128, 0},
      {"qwen3 4096 Dir(1)", 4096, 2048, 768, 128, 1},
      {"qwen3 4096 Dir(0.3)", 4096, 2048, 768, 128, 0.3},
      {"qwen3 16384 even", 16384, 2048, 768, 128, 0},
      {"qwen3 16384 Dir(1)", 16384, 2048, 768, 128, 1},
      {"qwen3 16384 Dir(0.3)", 16384, 2048, 768, 128, 0.3},
      {"qwen3 65536 even", 65536, 2048, 768, 128, 0},
      {"qwen3 65536 Dir(1)", 65536, 2048, 768, 128, 1},
      {"qwen3 65536 Dir(0.3)", 65536, 2048, 768, 128, 0.3},
  };
  struct bench b = {};
  b.runs = 10;
  b.ways = "hlsgx";
  b.check = true;
  parse(&b, argc, argv);
  if (b.loads) {
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) print_loads(&sizes[i]);
    return 0;
  }
  OK(mt_backend_create(&b.native, "cuda", 1));
  b.native.workspace_size_bytes = MT_CUDA_LT_WORKSPACE_BYTES;
  b.native.workspace = device_memory(MT_CUDA_LT_WORKSPACE_BYTES);
  printf("%-42s %7s", "", "off");
  for (int i = 0; i < b.way_count; i++) printf(" | %-15s", b.way[i]->name);
  printf("\n");
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) all_of(&b, &sizes[i]);
  CHECK(cudaFree(b.native.workspace));
  b.native.workspace = NULL;
  mt_backend_destroy(&b.native);
  return 0;
}
