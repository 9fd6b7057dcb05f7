/* NCCL itself, found when it is first needed, or its substitute; and which GPU is a rank's. */
#include "par/nccl.h"

#ifdef MOETUNE_WITH_CUDA

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "par/nccl_api.h"

#if __has_include(<nccl.h>) && !defined(MT_FAKE_CUDA)
#include <nccl.h>
_Static_assert(sizeof(ncclUniqueId) == sizeof(struct mt_nccl_id) &&
                   ncclUint8 == (ncclDataType_t)MT_NCCL_BYTES &&
                   ncclSuccess == (ncclResult_t)MT_NCCL_SUCCESS,
               "NCCL's binary interface is another one");
#endif

mt_err mt_nccl_load(struct mt_nccl_api *api) {
  const char *path = getenv("MOETUNE_NCCL");
  int version = 0;
  *api = (struct mt_nccl_api){.name = "NCCL"};
  void *library = dlopen(path ? path : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!library) {
    return mt_fail(MT_EUNSUPPORTED,
                   "several GPUs need NCCL (MOETUNE_NCCL=FILE says where it is): %s", dlerror());
  }
#define LOAD(fn)                                                                                   \
  *(void **)(&api->fn) = dlsym(library, "nccl" #fn);                                               \
  if (!api->fn) return mt_fail(MT_EUNSUPPORTED, "NCCL has no nccl" #fn ": older than 2.13?");
#define X(fn, args) LOAD(fn)
  MT_NCCL_LIST(X)
#undef X
  LOAD(GetErrorString)
  LOAD(GetLastError)
  if (api->GetVersion(&version) == MT_NCCL_SUCCESS && version >= MT_NCCL_LEAST) return MT_OK;
  return mt_fail(MT_EUNSUPPORTED, "NCCL %d: at least %d is needed", version, MT_NCCL_LEAST);
}

bool mt_nccl_shared(void) {
  const char *wanted = getenv("MOETUNE_SHARED_GPU");
  return wanted && *wanted && strcmp(wanted, "0") != 0;
}

mt_err mt_world_gpu(const struct mt_world *w, int gpu_count, int *device) {
  *device = gpu_count > 0 ? w->local_rank % gpu_count : 0;
  if (gpu_count == 0) return mt_fail(MT_EUNSUPPORTED, "no NVIDIA GPU is visible");
  if (w->local_size <= gpu_count || mt_nccl_shared()) return MT_OK;
  /* A launcher that shows each rank a GPU of its own; NCCL itself refuses the same one twice. */
  if (gpu_count == 1 && getenv("CUDA_VISIBLE_DEVICES")) return MT_OK;
  return mt_fail(MT_EINVAL,
                 "%d ranks on a host of %d GPUs: NCCL wants a GPU for each (MOETUNE_SHARED_GPU=1 "
                 "lets them share, for tests)",
                 w->local_size, gpu_count);
}

#else

bool mt_nccl_shared(void) {
  return false;
}

mt_err mt_world_gpu(const struct mt_world *w, int gpu_count, int *device) {
  (void)w;
  *device = 0;
  return gpu_count > 0 ? MT_OK : mt_fail(MT_EUNSUPPORTED, "this build has no CUDA");
}

#endif
