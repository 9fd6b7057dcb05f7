/* What src/par/nccl_shared.c takes from CUDA's driver, on the host. */
#ifndef TESTS_FAKE_CUDA_CUDA_H
#define TESTS_FAKE_CUDA_CUDA_H

#include <cuda_runtime_api.h>

typedef int CUresult;
typedef cudaStream_t CUstream;
typedef uintptr_t CUdeviceptr;
typedef uint32_t cuuint32_t;
enum { CUDA_SUCCESS, CU_STREAM_WAIT_VALUE_GEQ = 0 };

#endif
