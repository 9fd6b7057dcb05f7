/* The CPU backend's operations one by one, beside what bounds them: products beside dnnl_sgemm on
 * the same shapes, the rest beside the memory's rate for a copy. Best of several runs each.
 *   cpu_ops [threads] */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <oneapi/dnnl/dnnl.h>

#include "base/rng.h"
#include "kernels/registry.h"

enum { RUNS = 15, T = 1024, H = 512, F = 1792, E = 8, K = 2, V = 4096, G = 2, R = 4, D = 64 };

static struct mt_backend be;

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void ok(mt_err err) {
  if (!err) return;
  fprintf(stderr, "cpu_ops: %s\n", mt_error_message());
  exit(1);
}

/* Random float32 memory of the backend; the process ends before it is freed. */
static void *random_floats(int64_t n) {
  void *p;
  ok(be.mem_alloc(&be, (size_t)n * sizeof(float), &p));
  struct mt_rng rng = mt_rng_make(1, (uint64_t)n);
  for (int64_t i = 0; i < n; i++) ((float *)p)[i] = (float)mt_rng_normal(&rng) * 0.1f;
  return p;
}

static struct mt_tensor mat(int64_t rows, int64_t cols) {
  return mt_mat(random_floats(rows * cols), MT_F32, rows, cols);
}

/* What a timed piece of work needs. */
struct work {
  struct mt_tensor x, w, y;
  const int32_t *offsets;
  int64_t groups, rows, in, out;
  int kind; /* 0 forward, 1 dgrad, 2 wgrad */
};

static void run_own(const struct work *k) {
  if (k->kind == 0)
    ok(be.ops.linear_fwd(
        &be, &(struct mt_linear_fwd_args){.x = k->x, .w = k->w, .y = k->y, .offsets = k->offsets}));
  else if (k->kind == 1)
    ok(be.ops.linear_dgrad(&be, &(struct mt_linear_dgrad_args){
                                    .dy = k->y, .w = k->w, .dx = k->x, .offsets = k->offsets}));
  else
    ok(be.ops.linear_wgrad(&be, &(struct mt_linear_wgrad_args){
                                    .dy = k->y, .x = k->x, .dw = k->w, .offsets = k->offsets}));
}

/* Group after group, each on all threads. */
static void run_dnnl(const struct work *k) {
  for (int64_t g = 0; g < k->groups; g++) {
    float *x = (float *)k->x.data + g * k->rows * k->in;
    float *w = (float *)k->w.data + g * k->out * k->in;
    float *y = (float *)k->y.data + g * k->rows * k->out;
    if (k->kind == 0)
      dnnl_sgemm('N', 'T', k->rows, k->out, k->in, 1, x, k->in, w, k->in, 0, y, k->out);
    else if (k->kind == 1)
      dnnl_sgemm('N', 'N', k->rows, k->in, k->out, 1, y, k->out, w, k->in, 0, x, k->in);
    else
      dnnl_sgemm('T', 'N', k->out, k->in, k->rows, 1, y, k->out, x, k->in, 0, w, k->in);
  }
}

static void product(const char *name, int64_t groups, int64_t rows, int64_t out, int64_t in) {
  static const char *const kinds[] = {"forward", "dgrad", "wgrad"};
  static int32_t offsets[E + 1];
  for (int g = 0; g <= groups; g++) offsets[g] = (int32_t)(g * rows);
  struct work k = {mat(groups * rows, in),
                   mat(groups * out, in),
                   mat(groups * rows, out),
                   NULL,
                   groups,
                   rows,
                   in,
                   out,
                   0};
  if (groups > 1) {
    k.offsets = offsets;
    k.w = mt_cube(k.w.data, MT_F32, groups, out, in);
  }
  double flops = 2.0 * (double)(groups * rows) * (double)(out * in);
  for (k.kind = 0; k.kind < 3; k.kind++) {
    double own = INFINITY, other = INFINITY;
    for (int run = 0; run < RUNS; run++) {
      double a = now_s();
      run_own(&k);
      double b = now_s();
      run_dnnl(&k);
      double c = now_s();
      own = fmin(own, b - a);
      other = fmin(other, c - b);
    }
    printf(
        "%-8s %-7s %2lldx(%4lld,%4lld,%4lld) %7.2f ms %6.0f GFLOP/s   dnnl %7.2f ms %6.0f   %.2f\n",
        name, kinds[k.kind], (long long)groups, (long long)rows, (long long)out, (long long)in,
        own * 1e3, flops / own * 1e-9, other * 1e3, flops / other * 1e-9, other / own);
  }
}

/* GB/s of reading one float and writing another, far beyond the caches. */
static double copy_rate(void) {
  int64_t n = 64 << 20;
  float *a = random_floats(16), *b, *c;
  void *p, *q;
  ok(be.mem_alloc(&be, (size_t)n * 4, &p));
  ok(be.mem_alloc(&be, (size_t)n * 4, &q));
  b = p, c = q;
  double best = INFINITY;
  for (int run = 0; run < 7; run++) {
    double t = now_s();
#pragma omp parallel for num_threads(be.thread_count) schedule(static)
    for (int64_t i = 0; i < n; i++) c[i] = b[i] + a[0];
    best = fmin(best, now_s() - t);
  }
  be.mem_free(&be, p, (size_t)n * 4);
  be.mem_free(&be, q, (size_t)n * 4);
  return 8e-9 * (double)n / best;
}

static void report(const char *name, double s, double bytes, double flops, double copy) {
  printf("%-16s %7.2f ms", name, s * 1e3);
  if (bytes > 0)
    printf(" %6.1f GB/s (%3.0f%% of a copy)", bytes / s * 1e-9, bytes / s * 1e-7 / copy);
  if (flops > 0) printf(" %6.0f GFLOP/s", flops / s * 1e-9);
  printf("\n");
}

#define BEST(result, call)                                                                         \
  do {                                                                                             \
    (result) = INFINITY;                                                                           \
    for (int run_ = 0; run_ < RUNS; run_++) {                                                      \
      double begin_ = now_s();                                                                     \
      ok(call);                                                                                    \
      (result) = fmin(result, now_s() - begin_);                                                   \
    }                                                                                              \
  } while (0)

static void memory_bound(double copy) {
  double s;
  int64_t n = 24 << 20;
  struct mt_adamw_segment seg = {.decay = 1};
  struct mt_tensor *parts[] = {&seg.master, &seg.grad, &seg.m, &seg.v};
  for (int i = 0; i < 4; i++) *parts[i] = mt_vec(random_floats(n), MT_F32, n);
  for (int64_t i = 0; i < n; i++) ((float *)seg.v.data)[i] = fabsf(((float *)seg.v.data)[i]);
  double sum;
  BEST(s, be.ops.sumsq(
              &be, &(struct mt_sumsq_args){.tensors = &seg.grad, .tensor_count = 1, .out = &sum}));
  report("sumsq", s, 4.0 * (double)n, 0, copy);
  const struct mt_adamw_values third = mt_adamw_at(1e-4, 0.9, 0.999, 0.01, 3, 0);
  struct mt_adamw_args adamw = {.segments = &seg,
                                .segment_count = 1,
                                .beta1 = 0.9,
                                .beta2 = 0.999,
                                .eps = 1e-8,
                                .values = &third};
  BEST(s, be.ops.adamw(&be, &adamw));
  report("adamw", s, 28.0 * (double)n, 0, copy);
  struct mt_tensor gate_up = mat(T * K, 2 * F), h = mat(T * K, F);
  double wide = 4.0 * T * K * F;
  BEST(s, be.ops.swiglu_fwd(&be, &(struct mt_swiglu_fwd_args){.gate_up = gate_up, .h = h}));
  report("swiglu_fwd", s, 3 * wide, 0, copy);
  struct mt_swiglu_bwd_args bwd = {
      .dh = mat(T * K, F), .gate_up = gate_up, .dgate_up = mat(T * K, 2 * F), .h = h};
  BEST(s, be.ops.swiglu_bwd(&be, &bwd));
  report("swiglu_bwd", s, 6 * wide, 0, copy);
}

static void compute_bound(double copy) {
  double s;
  static int32_t cu[] = {0, T / 4, T / 2, 3 * T / 4, T}, labels[T];
  struct mt_attention_fwd_args f = {.qkv = mat(T, G * (R + 2) * D),
                                    .cu_seqlens = cu,
                                    .sequence_count = 4,
                                    .kv_heads = G,
                                    .q_per_kv = R,
                                    .head_dim = D,
                                    .scale = 0.125f,
                                    .out = mat(T, G * R * D),
                                    .lse = mat(T, G * R)};
  /* Of the S x S products the causal half counts. */
  double half = 2.0 * G * R * D * (T / 4.0) * (T / 4.0) / 2 * 4;
  BEST(s, be.ops.attention_fwd(&be, &f));
  report("attention_fwd", s, 0, 2 * half, copy);
  struct mt_attention_bwd_args b = {
      .fwd = f, .dout = mat(T, G * R * D), .dqkv = mat(T, G * (R + 2) * D)};
  BEST(s, be.ops.attention_bwd(&be, &b));
  report("attention_bwd", s, 0, 5 * half, copy);
  for (int t = 0; t < T; t++) labels[t] = t * 3 % V;
  const float scale = 1e-3f;
  struct mt_head_loss_args head = {.x = mat(T, H),
                                   .w = mat(V, H),
                                   .labels = labels,
                                   .loss_scale = &scale,
                                   .loss = mt_vec(random_floats(T), MT_F32, T),
                                   .dx = mat(T, H),
                                   .dw = mat(V, H)};
  BEST(s, be.ops.head_loss(&be, &head));
  report("head_loss", s, 0, 6.0 * T * H * V, copy);
}

int main(int argc, char **argv) {
  ok(mt_backend_cpu_create(&be, argc > 1 ? atoi(argv[1]) : 0));
  omp_set_num_threads(be.thread_count);
  struct mt_limits limits = {.tokens = T,
                             .rows = T * K,
                             .hidden = H,
                             .ffn = F,
                             .experts = E,
                             .top_k = K,
                             .vocab = V,
                             .heads = G * R,
                             .kv_heads = G,
                             .head_dim = D,
                             .act = MT_F32};
  be.workspace_size_bytes = be.workspace_bytes(&be, &limits);
  ok(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
  double copy = copy_rate();
  printf("%d threads, copy %.1f GB/s (read and written)\n", be.thread_count, copy);
  printf("products: groups x (rows, out, in)\n");
  product("gate_up", E, T * K / E, 2 * F, H);
  product("down", E, T * K / E, H, F);
  product("qkv", 1, T, G * (R + 2) * D, H);
  product("attn_out", 1, T, H, G * R * D);
  product("head", 1, T / 2, V, H);
  product("square", 1, 2048, 2048, 2048);
  memory_bound(copy);
  compute_bound(copy);
  return 0;
}
