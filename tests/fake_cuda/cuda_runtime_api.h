/* As much of CUDA's run-time as src/par/nccl*.c calls, on the host: a stream does what it is given
 * at once, device memory is the host's, and there is no IPC. So the communicators of GPUs and
 * NCCL's substitute run where no GPU is (tests/dist/test_shared.c). */
#ifndef TESTS_FAKE_CUDA_CUDA_RUNTIME_API_H
#define TESTS_FAKE_CUDA_CUDA_RUNTIME_API_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MT_FAKE_CUDA

typedef enum {
  cudaSuccess,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNotSupported = 801,
  cudaErrorNotReady = 600
} cudaError_t;
typedef struct fake_stream *cudaStream_t;
typedef struct fake_event *cudaEvent_t;
typedef struct {
  char reserved[64];
} cudaIpcMemHandle_t;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum {
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault,
  cudaEventDisableTiming = 2,
  cudaStreamNonBlocking = 1,
  cudaIpcMemLazyEnablePeerAccess = 1,
  cudaEnableDefault = 0,
  cudaHostRegisterMapped = 2,
  cudaHostRegisterPortable = 1
};

/* The next so many questions find events that are not done, which a thread's last error is then. */
extern _Atomic int64_t fake_not_ready;
extern _Thread_local cudaError_t fake_last_error;

#define FAKE(type, name, args, ...)                                                                \
  __attribute__((unused)) static inline type name args {                                           \
    __VA_ARGS__;                                                                                   \
  }
FAKE(const char *, cudaGetErrorString, (cudaError_t e), return e ? "fake error" : "no error")
FAKE(cudaError_t, cudaGetLastError, (void), cudaError_t e = fake_last_error;
     fake_last_error = cudaSuccess; return e)
FAKE(cudaError_t, cudaSetDevice, (int d), (void)d; return cudaSuccess)
FAKE(cudaError_t, cudaDeviceGetStreamPriorityRange, (int *l, int *h), *l = *h = 0;
     return cudaSuccess)
FAKE(cudaError_t, cudaStreamCreateWithPriority, (cudaStream_t * s, unsigned f, int p), (void)f;
     (void)p; *s = NULL; return cudaSuccess)
FAKE(cudaError_t, cudaStreamDestroy, (cudaStream_t s), (void)s; return cudaSuccess)
FAKE(cudaError_t, cudaStreamSynchronize, (cudaStream_t s), (void)s; return cudaSuccess)
FAKE(cudaError_t, cudaStreamWaitEvent, (cudaStream_t s, cudaEvent_t e, unsigned f), (void)s;
     (void)e; (void)f; return cudaSuccess)
FAKE(cudaError_t, cudaEventCreateWithFlags, (cudaEvent_t * e, unsigned f), (void)f; *e = NULL;
     return cudaSuccess)
FAKE(cudaError_t, cudaEventRecord, (cudaEvent_t e, cudaStream_t s), (void)e; (void)s;
     return cudaSuccess)
FAKE(cudaError_t, cudaEventQuery, (cudaEvent_t e), (void)e;
     return fake_not_ready-- > 0 ? fake_last_error = cudaErrorNotReady : cudaSuccess)
FAKE(cudaError_t, cudaEventDestroy, (cudaEvent_t e), (void)e; return cudaSuccess)
FAKE(cudaError_t, cudaMalloc, (void **p, size_t n), *p = malloc(n);
     return *p ? cudaSuccess : cudaErrorMemoryAllocation)
FAKE(cudaError_t, cudaFree, (void *p), free(p); return cudaSuccess)
FAKE(cudaError_t, cudaMemcpyAsync, (void *d, const void *s, size_t n, int k, cudaStream_t st),
     (void)k;
     (void)st; if (n) memmove(d, s, n); return cudaSuccess)
FAKE(cudaError_t, cudaIpcGetMemHandle, (cudaIpcMemHandle_t * h, void *p), (void)h; (void)p;
     return cudaErrorNotSupported)
FAKE(cudaError_t, cudaIpcOpenMemHandle, (void **p, cudaIpcMemHandle_t h, unsigned f), (void)p;
     (void)h; (void)f; return cudaErrorNotSupported)
FAKE(cudaError_t, cudaIpcCloseMemHandle, (void *p), (void)p; return cudaSuccess)
FAKE(cudaError_t, cudaHostRegister, (void *p, size_t n, unsigned f), (void)p; (void)n; (void)f;
     return cudaSuccess)
FAKE(cudaError_t, cudaHostUnregister, (void *p), (void)p; return cudaSuccess)
FAKE(cudaError_t, cudaHostGetDevicePointer, (void **d, void *p, unsigned f), (void)f; *d = p;
     return cudaSuccess)

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **fn, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found);

#endif
