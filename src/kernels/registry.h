/* Backends by name. */
#ifndef MT_KERNELS_REGISTRY_H
#define MT_KERNELS_REGISTRY_H

#include <stdbool.h>

#include "backend/device.h"

/* name: "cpu", "ref", "cuda" or "cuda-portable". thread_count as mt_backend_cpu_create.
 * Errors: MT_EUNSUPPORTED naming the backends there are. */
mt_err mt_backend_create(struct mt_backend *be, const char *name, int thread_count);

/* The float64 specification: plain loops, one thread, any of F32, BF16, F64 as act. */
mt_err mt_backend_ref_create(struct mt_backend *be);

/* float32 arithmetic on thread_count threads (0: all cores); act F32 or BF16. */
mt_err mt_backend_cpu_create(struct mt_backend *be, int thread_count);

/* A visible NVIDIA GPU, `device` of them; act F32 or BF16. It is the calling thread's from here on.
 * portable: only what every GPU from sm_80 on has. Errors: MT_EUNSUPPORTED (no such GPU, or a build
 * without CUDA), MT_EDEVICE. */
mt_err mt_backend_cuda_create(struct mt_backend *be, bool portable, int device);

/* The same backend without a GPU, for memory plans alone: it has a name and workspace_bytes, and
 * nothing to run. Errors: MT_EUNSUPPORTED in a build without CUDA. */
mt_err mt_backend_cuda_plan(struct mt_backend *be, bool portable);

/* NVIDIA GPUs that this process sees; 0 in a build without CUDA. */
int mt_cuda_device_count(void);
/* 10 * major + minor of the first of them; 90 (Hopper), which plans are for, where there is none.
 */
int mt_cuda_capability(void);

#endif
