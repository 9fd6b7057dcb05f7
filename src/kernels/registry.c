#include "kernels/registry.h"

#include <string.h>

mt_err mt_backend_create(struct mt_backend *be, const char *name, int thread_count) {
  if (strcmp(name, "cpu") == 0) return mt_backend_cpu_create(be, thread_count);
  if (strcmp(name, "ref") == 0) return mt_backend_ref_create(be);
  if (strcmp(name, "cuda") == 0) return mt_backend_cuda_create(be, false, 0);
  if (strcmp(name, "cuda-portable") == 0) return mt_backend_cuda_create(be, true, 0);
  *be = (struct mt_backend){0};
  return mt_fail(MT_EUNSUPPORTED, "no backend '%s' (there are: cpu, cuda, cuda-portable, ref)",
                 name);
}
