/* What a program asks of CUDA's run-time, counted: which calls, how many of them make the host
 * wait, and what was launched between two that do; and its NVTX ranges. For machines without nsys.
 *   cc -O2 -shared -fPIC -I/usr/local/cuda/include tools/cuda_calls.c -o cuda_calls.so \
 *     -L/usr/local/cuda/lib64 -lcupti
 *   CUDA_INJECTION64_PATH=$PWD/cuda_calls.so NVTX_INJECTION64_PATH=$PWD/cuda_calls.so moetune train
 * ... The report goes to standard error at the end. One thread is assumed. */
#include <cupti.h>
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAMES = 256, GAPS = 4096 };

struct count {
  char name[64];
  long calls;
};
static struct count calls[NAMES], ranges[NAMES];

struct gap {
  const char *call; /* that ended it */
  long kernels, graphs;
};
static struct gap gaps[GAPS], open_gap;
static int gap_count;

static struct count *count_of(struct count *list, const char *name, size_t length) {
  if (length > sizeof list->name - 1) length = sizeof list->name - 1;
  for (int i = 0; i < NAMES; i++) {
    if (list[i].calls == 0) memcpy(list[i].name, name, length);
    if (strlen(list[i].name) == length && memcmp(list[i].name, name, length) == 0) return &list[i];
  }
  return &list[NAMES - 1];
}

static int waits(const char *name) {
  static const char *const those[] = {"cudaEventSynchronize", "cudaStreamSynchronize",
                                      "cudaDeviceSynchronize", "cudaMemcpy", "cudaMemset"};
  for (size_t i = 0; i < sizeof those / sizeof *those; i++) {
    if (strcmp(name, those[i]) == 0) return 1;
  }
  return 0;
}

static void CUPTIAPI on_call(void *context, CUpti_CallbackDomain domain, CUpti_CallbackId id,
                             const void *data) {
  const CUpti_CallbackData *d = data;
  (void)context, (void)domain, (void)id;
  if (d->callbackSite != CUPTI_API_ENTER) return;
  const char *end = strstr(d->functionName, "_v"); /* cudaLaunchKernel_v7000 */
  size_t length = end ? (size_t)(end - d->functionName) : strlen(d->functionName);
  struct count *c = count_of(calls, d->functionName, length);
  c->calls++;
  if (strncmp(c->name, "cudaLaunchKernel", 16) == 0) open_gap.kernels++;
  if (strcmp(c->name, "cudaGraphLaunch") == 0) open_gap.graphs++;
  if (!waits(c->name)) return;
  open_gap.call = c->name;
  if (gap_count < GAPS) gaps[gap_count++] = open_gap;
  open_gap = (struct gap){0};
}

static int by_calls(const void *a, const void *b) {
  long x = ((const struct count *)a)->calls, y = ((const struct count *)b)->calls;
  return (x < y) - (x > y);
}

static void report(void) {
  fprintf(stderr, "what was launched before each call that waits:\n");
  for (int i = 0, run; i < gap_count; i += run) {
    for (run = 1; i + run < gap_count && gaps[i + run].call == gaps[i].call &&
                  gaps[i + run].kernels == gaps[i].kernels &&
                  gaps[i + run].graphs == gaps[i].graphs;)
      run++;
    fprintf(stderr, "  %4d x %4ld kernels, %3ld graphs, then %s\n", run, gaps[i].kernels,
            gaps[i].graphs, gaps[i].call);
  }
  qsort(calls, NAMES, sizeof *calls, by_calls);
  qsort(ranges, NAMES, sizeof *ranges, by_calls);
  fprintf(stderr, "calls:\n");
  for (int i = 0; i < NAMES && calls[i].calls; i++)
    fprintf(stderr, "  %8ld %s%s\n", calls[i].calls, calls[i].name,
            waits(calls[i].name) ? " (waits)" : "");
  fprintf(stderr, "ranges:\n");
  for (int i = 0; i < NAMES && ranges[i].calls; i++)
    fprintf(stderr, "  %8ld %s\n", ranges[i].calls, ranges[i].name);
}

/* Called by the driver. */
int InitializeInjection(void);
int InitializeInjection(void) {
  CUpti_SubscriberHandle s;
  if (cuptiSubscribe(&s, on_call, NULL) != CUPTI_SUCCESS) return 0;
  if (cuptiEnableDomain(1, s, CUPTI_CB_DOMAIN_RUNTIME_API) != CUPTI_SUCCESS) return 0;
  atexit(report);
  return 1;
}

static int on_push(const char *name) {
  count_of(ranges, name, strlen(name))->calls++;
  return 0;
}

/* Called by NVTX's header at a program's first range. */
int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t table_of);
int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t table_of) {
  const NvtxExportTableCallbacks *t = table_of(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable functions;
  unsigned size;
  if (!t || !t->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &functions, &size)) return 0;
  if (size <= NVTX_CBID_CORE_RangePushA) return 0;
  *functions[NVTX_CBID_CORE_RangePushA] = (NvtxFunctionPointer)on_push;
  return 1;
}
