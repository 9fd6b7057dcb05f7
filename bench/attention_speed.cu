/* Causal attention on the GPU: TFLOP/s forward and backward of packed sequences, BF16, 32 query and
 * 8 key heads of 128. Median of 20 runs, timed with events. Counted: 4 D operations a pair of
 * query and seen key forward, 10 D backward, however many the kernels do.
 * Then a token against a cache: GB/s of the cache read.
 *   attention_speed [backend...] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#include <algorithm>

#include "kernels/cuda/cuda.h"

extern "C" {
#include "base/rng.h"
#include "kernels/registry.h"
}

enum { RUNS = 20, WARM = 3, G = 8, R = 4, D = 128 };

static void ok(mt_err err) {
  if (!err) return;
  fprintf(stderr, "attention_speed: %s\n", mt_error_message());
  exit(1);
}

static void *device_memory(struct mt_backend *be, size_t bytes) {
  void *p;
  ok(be->mem_alloc(be, bytes, &p));
  return p;
}

/* Normal numbers as BF16, [rows, columns]; the process ends before they are freed. */
static struct mt_tensor random_rows(struct mt_backend *be, int64_t rows, int64_t columns) {
  struct mt_tensor t = mt_mat(NULL, MT_BF16, rows, columns);
  size_t n = (size_t)(rows * columns), period = 1 << 20;
  std::vector<uint16_t> host(n);
  struct mt_rng rng = mt_rng_make(3, (uint64_t)columns);
  for (size_t i = 0; i < n; i++) {
    if (i >= period + 8191) { /* as good for timing, and quicker to make */
      host[i] = host[i - period - 8191];
      continue;
    }
    float x = (float)mt_rng_normal(&rng);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    host[i] = (uint16_t)(bits >> 16);
  }
  t.data = device_memory(be, mt_bytes(&t));
  ok(be->upload(be, t.data, host.data(), mt_bytes(&t)));
  ok(be->sync(be));
  return t;
}

template <class F> static float median_ms(struct mt_backend *be, F run) {
  cudaStream_t stream = mt_cuda_of(be)->stream;
  cudaEvent_t a, b;
  std::vector<float> ms(RUNS);
  ok(mt_cuda_check(cudaEventCreate(&a), "event"));
  ok(mt_cuda_check(cudaEventCreate(&b), "event"));
  for (int i = 0; i < WARM; i++) run();
  for (float &m : ms) {
    ok(mt_cuda_check(cudaEventRecord(a, stream), "event"));
    run();
    ok(mt_cuda_check(cudaEventRecord(b, stream), "event"));
    ok(mt_cuda_check(cudaEventSynchronize(b), "event"));
    ok(mt_cuda_check(cudaEventElapsedTime(&m, a, b), "event"));
  }
  cudaEventDestroy(a);
  cudaEventDestroy(b);
  std::nth_element(ms.begin(), ms.begin() + RUNS / 2, ms.end());
  return ms[RUNS / 2];
}

static void packed(struct mt_backend *be, int sequences, int length, int window) {
  int64_t t = (int64_t)sequences * length;
  std::vector<int32_t> cu((size_t)sequences + 1);
  for (int i = 0; i <= sequences; i++) cu[(size_t)i] = i * length;
  int32_t *device_cu = (int32_t *)device_memory(be, cu.size() * 4);
  ok(be->upload(be, device_cu, cu.data(), cu.size() * 4));
  ok(be->sync(be));
  struct mt_attention_bwd_args b = {};
  struct mt_attention_fwd_args &f = b.fwd;
  f.qkv = random_rows(be, t, G * (R + 2) * D);
  f.cu_seqlens = device_cu;
  f.sequence_count = sequences;
  f.kv_heads = G;
  f.q_per_kv = R;
  f.head_dim = D;
  f.window = window;
  f.scale = 0.088388348f;
  f.out = random_rows(be, t, G * R * D);
  f.lse = mt_mat(device_memory(be, (size_t)t * G * R * 4), MT_F32, t, G * R);
  b.dout = random_rows(be, t, G * R * D);
  b.dqkv = random_rows(be, t, G * (R + 2) * D);
  double pairs = 0;
  for (int i = 0; i < length; i++) pairs += window > 0 && window < i + 1 ? window : i + 1;
  double flops = 4.0 * D * G * R * sequences * pairs;
  float fwd = median_ms(be, [&] { ok(be->ops.attention_fwd(be, &f)); });
  float bwd = median_ms(be, [&] { ok(be->ops.attention_bwd(be, &b)); });
  printf("%-13s %2d x %5d window %5d  forward %7.3f ms %4.0f TFLOP/s  backward %7.3f ms %4.0f\n",
         be->name, sequences, length, window, (double)fwd, flops / (double)fwd * 1e-9, (double)bwd,
         2.5 * flops / (double)bwd * 1e-9);
  fflush(stdout);
  void *const all[] = {f.qkv.data, f.out.data, f.lse.data, b.dout.data, b.dqkv.data, device_cu};
  for (void *p : all) be->mem_free(be, p, 0);
}

static void decode(struct mt_backend *be, int length) {
  struct mt_attention_cache_args a = {};
  a.qkv = random_rows(be, 1, G * (R + 2) * D);
  a.k = random_rows(be, length, G * D);
  a.v = random_rows(be, length, G * D);
  a.out = random_rows(be, 1, G * R * D);
  a.start = length - 1;
  a.kv_heads = G;
  a.q_per_kv = R;
  a.head_dim = D;
  a.scale = 0.088388348f;
  float ms = median_ms(be, [&] { ok(be->ops.attention_cache(be, &a)); });
  printf("%-13s a token against %6d  %7.3f ms %5.0f GB/s\n", be->name, length, (double)ms,
         2.0 * length * G * D * 2 / (double)ms * 1e-6);
  void *const all[] = {a.qkv.data, a.k.data, a.v.data, a.out.data};
  for (void *p : all) be->mem_free(be, p, 0);
}

int main(int argc, char **argv) {
  const char *const both[] = {"cuda", "cuda-portable"};
  for (int i = 0; i < (argc > 1 ? argc - 1 : 2); i++) {
    struct mt_backend be;
    struct mt_limits l = {};
    ok(mt_backend_create(&be, argc > 1 ? argv[i + 1] : both[i], 1));
    l.tokens = 16384;
    l.rows = l.hidden = l.ffn = l.experts = l.top_k = l.vocab = 1;
    l.heads = G * R;
    l.kv_heads = G;
    l.head_dim = D;
    l.act = MT_BF16;
    be.workspace_size_bytes = be.workspace_bytes(&be, &l);
    ok(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
    packed(&be, 2, 8192, 0);
    packed(&be, 8, 2048, 0);
    packed(&be, 32, 512, 0);
    packed(&be, 4, 512, 0);
    packed(&be, 2, 8192, 4096);
    decode(&be, 1024);
    decode(&be, 32768);
    be.mem_free(&be, be.workspace, be.workspace_size_bytes);
    mt_backend_destroy(&be);
  }
  return 0;
}
