/* The CUDA backend: its memory, its stream, its table of operations. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/mxproducts.cuh"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define HAS_NVTX 1
#else
#define HAS_NVTX 0
#endif

extern "C" {
#include "kernels/registry.h"
}

extern "C" mt_err mt_cuda_check(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return MT_OK;
  mt_err err = error == cudaErrorMemoryAllocation ? MT_ENOMEM : MT_EDEVICE;
  return mt_fail(err, "%s: %s", what, cudaGetErrorString(error));
}

extern "C" mt_err mt_cuda_launched(const char *op) {
  return mt_cuda_check(cudaGetLastError(), op);
}

extern "C" mt_err mt_cuda_format(const char *op, const struct mt_tensor *t) {
  if (t->dtype == MT_F32 || t->dtype == MT_BF16) return MT_OK;
  return mt_fail(MT_EUNSUPPORTED, "%s: the cuda backend has no %s", op, mt_dtype_name(t->dtype));
}

extern "C" mt_err mt_cuda_scratch(const struct mt_backend *be, const char *op, size_t need_bytes,
                                  void **out) {
  size_t head = MT_CUDA_LT_WORKSPACE_BYTES, all = be->workspace_size_bytes;
  *out = NULL;
  if (!be->workspace || all < head || all - head < need_bytes) {
    return mt_fail(MT_ESHAPE, "%s: needs %zu bytes of workspace, there are %zu", op, need_bytes,
                   all < head ? 0 : all - head);
  }
  *out = (char *)be->workspace + head;
  return MT_OK;
}

static size_t workspace_bytes(const struct mt_backend *be, const struct mt_limits *l) {
  const size_t parts[] = {mt_cuda_embed_bytes(l),    mt_cuda_norm_bytes(l),
                          mt_cuda_router_bytes(l),   mt_cuda_permute_bytes(l),
                          mt_cuda_experts_bytes(l),  mt_cuda_attention_bytes(l),
                          mt_cuda_head_bytes(l),     mt_cuda_optimizer_bytes(l),
                          mt_cuda_quantize_bytes(l), mt_cuda_qlinear_bytes(be, l)};
  size_t most = 0;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    if (parts[i] > most) most = parts[i];
  }
  return MT_CUDA_LT_WORKSPACE_BYTES + (most + 255) / 256 * 256;
}

static mt_err mem_alloc(struct mt_backend *be, size_t size_bytes, void **out) {
  (void)be;
  *out = NULL;
  if (size_bytes == 0) return MT_OK;
  cudaError_t error = cudaMalloc(out, size_bytes);
  if (error == cudaSuccess) return MT_OK;
  (void)cudaGetLastError(); /* the next call must not see it again */
  size_t left = 0, all = 0;
  (void)cudaMemGetInfo(&left, &all);
  return mt_fail(MT_ENOMEM, "cannot reserve %zu bytes of GPU memory (%zu of %zu are free)",
                 size_bytes, left, all);
}

static void mem_free(struct mt_backend *be, void *p, size_t size_bytes) {
  if (p) mt_cuda_counts_forget(be, p, size_bytes);
  (void)cudaFree(p);
}

/* Waits where there is something to wait for: a profile shows no more of it than there is. */
static mt_err wait_for(cudaEvent_t event, const char *what) {
  cudaError_t error = cudaEventQuery(event);
  if (error == cudaErrorNotReady) {
    (void)cudaGetLastError();
    error = cudaEventSynchronize(event);
  }
  return mt_cuda_check(error, what);
}

static mt_err upload_piece(struct mt_cuda *c, void *dst, const void *src, size_t size_bytes) {
  int slot = c->ring_next;
  char *pinned = c->ring + (size_t)slot * MT_CUDA_RING_BYTES;
  c->ring_next = (slot + 1) % MT_CUDA_RING;
  MT_TRY(wait_for(c->ring_free[slot], "upload"));
  memcpy(pinned, src, size_bytes);
  MT_TRY(mt_cuda_check(cudaMemcpyAsync(dst, pinned, size_bytes, cudaMemcpyHostToDevice, c->stream),
                       "upload"));
  return mt_cuda_check(cudaEventRecord(c->ring_free[slot], c->stream), "upload");
}

/* A source that a quarter of the ring holds is free again on return and the host has not waited
 * for the stream; a larger one is copied when everything before it is done. */
static mt_err upload(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  struct mt_cuda *c = mt_cuda_of(be);
  mt_cuda_counts_forget(be, dst, size_bytes);
  if (size_bytes > (size_t)MT_CUDA_RING / 4 * MT_CUDA_RING_BYTES) {
    return mt_cuda_check(cudaMemcpyAsync(dst, src, size_bytes, cudaMemcpyHostToDevice, c->stream),
                         "upload");
  }
  for (size_t at = 0; at < size_bytes; at += MT_CUDA_RING_BYTES) {
    size_t n = size_bytes - at;
    if (n > MT_CUDA_RING_BYTES) n = MT_CUDA_RING_BYTES;
    MT_TRY(upload_piece(c, (char *)dst + at, (const char *)src + at, n));
  }
  return MT_OK;
}

static mt_err download(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  if (size_bytes == 0) return MT_OK;
  MT_TRY(mt_cuda_check(
      cudaMemcpyAsync(dst, src, size_bytes, cudaMemcpyDeviceToHost, mt_cuda_of(be)->stream),
      "download"));
  return mt_cuda_check(cudaStreamSynchronize(mt_cuda_of(be)->stream), "download");
}

static mt_err download_later(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  return mt_cuda_check(
      cudaMemcpyAsync(dst, src, size_bytes, cudaMemcpyDeviceToHost, mt_cuda_of(be)->stream),
      "download");
}

static mt_err host_alloc(struct mt_backend *be, size_t size_bytes, void **out) {
  (void)be;
  MT_TRY(mt_cuda_check(cudaMallocHost(out, size_bytes ? size_bytes : 1), "pinned memory"));
  memset(*out, 0, size_bytes);
  return MT_OK;
}

static void host_free(struct mt_backend *be, void *p) {
  (void)be;
  if (p) (void)cudaFreeHost(p);
}

static mt_err zero(struct mt_backend *be, void *p, size_t size_bytes) {
  if (size_bytes == 0) return MT_OK;
  mt_cuda_counts_forget(be, p, size_bytes);
  return mt_cuda_check(cudaMemsetAsync(p, 0, size_bytes, mt_cuda_of(be)->stream), "zero");
}

static mt_err copy(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  if (size_bytes == 0) return MT_OK;
  mt_cuda_counts_forget(be, dst, size_bytes);
  return mt_cuda_check(
      cudaMemcpyAsync(dst, src, size_bytes, cudaMemcpyDeviceToDevice, mt_cuda_of(be)->stream),
      "copy");
}

static mt_err sync_stream(struct mt_backend *be) {
  return mt_cuda_check(cudaStreamSynchronize(mt_cuda_of(be)->stream), "waiting for the GPU");
}

static mt_err stamp(struct mt_backend *be, int slot) {
  struct mt_cuda *c = mt_cuda_of(be);
  if (!c->stamps[slot]) MT_TRY(mt_cuda_check(cudaEventCreate(&c->stamps[slot]), "stamp"));
  return mt_cuda_check(cudaEventRecord(c->stamps[slot], c->stream), "stamp");
}

static mt_err stamp_wait(struct mt_backend *be, int slot) {
  return wait_for(mt_cuda_of(be)->stamps[slot], "waiting for the GPU");
}

static mt_err stamp_passed(struct mt_backend *be, int slot, bool *passed) {
  cudaError_t error = cudaEventQuery(mt_cuda_of(be)->stamps[slot]);
  *passed = error == cudaSuccess;
  if (error != cudaErrorNotReady) return mt_cuda_check(error, "stamp");
  (void)cudaGetLastError(); /* the next call must not see it */
  return MT_OK;
}

static mt_err stamp_read(struct mt_backend *be, int from, int to, double *seconds) {
  struct mt_cuda *c = mt_cuda_of(be);
  float ms = 0;
  MT_TRY(wait_for(c->stamps[to], "stamp_read"));
  MT_TRY(mt_cuda_check(cudaEventElapsedTime(&ms, c->stamps[from], c->stamps[to]), "stamp_read"));
  *seconds = 1e-3 * (double)ms;
  return MT_OK;
}

/* The device's own clock: events cannot be told apart once a graph records them again. */
static __global__ void clock_mark(struct mt_clock *clock, int phase, bool restart) {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  if (restart) {
    for (int i = 0; i < MT_CLOCK_PHASES; i++) clock->phase_ns[i] = 0;
  } else if (clock->phase >= 0) {
    clock->phase_ns[clock->phase] += now - clock->last_ns;
  }
  clock->last_ns = now;
  clock->phase = phase;
}

static mt_err clock_enter(struct mt_backend *be, struct mt_clock *clock, int phase, bool restart) {
  clock_mark<<<1, 1, 0, mt_cuda_of(be)->stream>>>(clock, phase, restart);
  return mt_cuda_launched("clock");
}

/* Relaxed: a kernel that is used for the first time is loaded while others are captured. */
static mt_err graph_begin(struct mt_backend *be) {
  return mt_cuda_check(cudaStreamBeginCapture(mt_cuda_of(be)->stream, cudaStreamCaptureModeRelaxed),
                       "capturing a graph");
}

static mt_err graph_end(struct mt_backend *be, void **out) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  cudaError_t error = cudaStreamEndCapture(mt_cuda_of(be)->stream, &graph);
  if (error == cudaSuccess && out) error = cudaGraphInstantiate(&exec, graph, 0);
  if (graph) (void)cudaGraphDestroy(graph);
  if (error != cudaSuccess || !out) (void)cudaGetLastError(); /* the next call must not see it */
  if (!out) return MT_OK;
  *out = error == cudaSuccess ? exec : NULL;
  return mt_cuda_check(error, "capturing a graph");
}

static mt_err graph_replay(struct mt_backend *be, void *graph) {
  return mt_cuda_check(cudaGraphLaunch((cudaGraphExec_t)graph, mt_cuda_of(be)->stream),
                       "launching a graph");
}

static void graph_free(struct mt_backend *be, void *graph) {
  if (!graph) return;
  (void)cudaStreamSynchronize(mt_cuda_of(be)->stream);
  (void)cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

static void on_stream(struct mt_backend *be, void *stream) {
  mt_cuda_of(be)->stream = (cudaStream_t)(stream ? stream : be->stream);
}

static size_t memory_used(const struct mt_backend *be) {
  size_t left = 0, all = 0;
  (void)be;
  if (cudaMemGetInfo(&left, &all) != cudaSuccess) return 0;
  return all - left;
}

/* A few instructions where no profiler listens. */
#if HAS_NVTX
static void range(const char *name) {
  if (name)
    (void)nvtxRangePushA(name);
  else
    (void)nvtxRangePop();
}
#define RANGE_BEGIN(name) (void)nvtxRangePushA(name)
#define RANGE_END()       (void)nvtxRangePop()
#else
#define RANGE_BEGIN(name)
#define RANGE_END()
#endif

/* Every operation under its name. */
#define X(op)                                                                                      \
  static mt_err named_##op(struct mt_backend *be, const struct mt_##op##_args *a) {                \
    RANGE_BEGIN(#op);                                                                              \
    mt_err err = mt_cuda_##op(be, a);                                                              \
    RANGE_END();                                                                                   \
    return err;                                                                                    \
  }
MT_OP_LIST(X)
#undef X

static void destroy(struct mt_backend *be) {
  struct mt_cuda *c = mt_cuda_of(be);
  if (!c) return;
  mt_cuda_plans_free(c->plans);
  mt_cuda_counts_free(c->counts);
  if (c->lt) (void)cublasLtDestroy(c->lt);
  for (int i = 0; i < MT_STAMPS; i++) {
    if (c->stamps[i]) (void)cudaEventDestroy(c->stamps[i]);
  }
  for (int i = 0; i < MT_CUDA_RING; i++) {
    if (c->ring_free[i]) (void)cudaEventDestroy(c->ring_free[i]);
  }
  if (c->ring) (void)cudaFreeHost(c->ring);
  if (c->unit_counters) (void)cudaFree(c->unit_counters);
  if (c->stream) (void)cudaStreamDestroy(c->stream);
  free(c);
  be->impl = NULL;
}

extern "C" int mt_cuda_device_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

static mt_err open_ring(struct mt_cuda *c) {
  MT_TRY(mt_cuda_check(cudaMallocHost((void **)&c->ring, (size_t)MT_CUDA_RING * MT_CUDA_RING_BYTES),
                       "pinned memory"));
  for (int i = 0; i < MT_CUDA_RING; i++) {
    MT_TRY(mt_cuda_check(cudaEventCreateWithFlags(&c->ring_free[i], cudaEventDisableTiming),
                         "making an event"));
  }
  return MT_OK;
}

static mt_err open_device(struct mt_backend *be, struct mt_cuda *c, int device) {
  cudaDeviceProp p;
  MT_TRY(mt_cuda_check(cudaSetDevice(device), "choosing a GPU"));
  MT_TRY(mt_cuda_check(cudaGetDeviceProperties(&p, device), "asking for the GPU's properties"));
  c->device = device;
  c->sm_count = p.multiProcessorCount;
  c->capability = 10 * p.major + p.minor;
  c->shared_optin_bytes = p.sharedMemPerBlockOptin;
  snprintf(be->description, sizeof be->description, "%.64s, %.0f GiB", p.name,
           (double)p.totalGlobalMem / (1 << 30));
  if (c->capability < 80) {
    return mt_fail(MT_EUNSUPPORTED, "%s has compute capability %d.%d; 8.0 is the least", p.name,
                   p.major, p.minor);
  }
  MT_TRY(mt_cuda_check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking),
                       "making a stream"));
  be->stream = c->stream;
  be->device = device;
  be->capability = c->portable ? 0 : c->capability;
  if (mt_cuda_mx_chip(be)) be->counted_format = MT_Q_MXFP8;
  MT_TRY(open_ring(c));
  if (c->capability == 90 && !c->portable) {
    size_t bytes = 2 * sizeof *c->unit_counters;
    MT_TRY(mt_cuda_check(cudaMalloc((void **)&c->unit_counters, bytes), "counters"));
    MT_TRY(mt_cuda_check(cudaMemsetAsync(c->unit_counters, 0, bytes, c->stream), "counters"));
  }
  if (cublasLtCreate(&c->lt) != CUBLAS_STATUS_SUCCESS) {
    return mt_fail(MT_EDEVICE, "cuBLASLt cannot be started");
  }
  return MT_OK;
}

extern "C" int mt_cuda_capability(void) {
  int major = 0, minor = 0;
  if (mt_cuda_device_count() == 0) return 90;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) != cudaSuccess) {
    (void)cudaGetLastError();
    return 90;
  }
  return 10 * major + minor;
}

extern "C" mt_err mt_backend_cuda_plan(struct mt_backend *be, bool portable) {
  *be = (struct mt_backend){};
  be->name = portable ? "cuda-portable" : "cuda";
  be->thread_count = 1;
  be->workspace_bytes = workspace_bytes;
  be->on_stream = on_stream;
  be->capability = portable ? 0 : mt_cuda_capability();
  return MT_OK;
}

extern "C" mt_err mt_backend_cuda_create(struct mt_backend *be, bool portable, int device) {
  MT_TRY(mt_backend_cuda_plan(be, portable));
  mt_err err = MT_OK;
  int count = mt_cuda_device_count();
  if (count == 0) return mt_fail(MT_EUNSUPPORTED, "no NVIDIA GPU is visible");
  if (device < 0 || device >= count) {
    return mt_fail(MT_EUNSUPPORTED, "there is no GPU %d: %d are visible", device, count);
  }
  struct mt_cuda *c = (struct mt_cuda *)calloc(1, sizeof *c);
  if (!c) return mt_fail(MT_ENOMEM, "cuda backend");
  be->impl = c;
  be->destroy = destroy;
  c->portable = portable;
  MT_GO(open_device(be, c, device));
#define X(op) be->ops.op = named_##op;
  MT_OP_LIST(X)
#undef X
  be->mem_alloc = mem_alloc;
  be->mem_free = mem_free;
  be->upload = upload;
  be->download = download;
  be->zero = zero;
  be->copy = copy;
  be->sync = sync_stream;
  be->stamp = stamp;
  be->stamp_read = stamp_read;
  be->stamp_wait = stamp_wait;
  be->stamp_passed = stamp_passed;
  be->download_later = download_later;
  be->host_alloc = host_alloc;
  be->host_free = host_free;
  be->clock_enter = clock_enter;
  be->graph_begin = graph_begin;
  be->graph_end = graph_end;
  be->graph_replay = graph_replay;
  be->graph_free = graph_free;
#if HAS_NVTX
  be->range = range;
#endif
  be->memory_used = memory_used;
  be->steps_ahead = 32;
done:
  if (err) mt_backend_destroy(be);
  return err;
}
