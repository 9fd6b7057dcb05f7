#include <omp.h>

#include "kernels/cpu/cpu.h"
#include "kernels/registry.h"

float *mt_cpu_thread_scratch(const struct mt_backend *be, int thread) {
  return (float *)be->workspace + (size_t)thread * CPU_THREAD_FLOATS;
}

float *mt_cpu_shared_scratch(const struct mt_backend *be, size_t *float_count) {
  size_t head = (size_t)be->thread_count * CPU_THREAD_FLOATS;
  if (float_count) *float_count = be->workspace_size_bytes / sizeof(float) - head;
  return (float *)be->workspace + head;
}

mt_err mt_cpu_format(const char *op, const struct mt_tensor *t) {
  if (t->dtype != MT_F32 && t->dtype != MT_BF16) {
    return mt_fail(MT_EUNSUPPORTED, "%s: the cpu backend has no %s", op, mt_dtype_name(t->dtype));
  }
  if (t->rank >= 2 && t->dim[1] > CPU_ROW_FLOATS) {
    return mt_fail(MT_EUNSUPPORTED, "%s: rows of %lld exceed %d", op, (long long)t->dim[1],
                   CPU_ROW_FLOATS);
  }
  return MT_OK;
}

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

/* Shared part: the head's chunk, attention's float32 gradient, the router's weight in float32,
 * lists of tokens by id, sumsq's partial sums, or operands that were 8-bit. Products live in the
 * threads' scratch alone. */
static size_t workspace_bytes(const struct mt_backend *be, const struct mt_limits *l) {
  size_t qkv = (size_t)(l->heads + 2 * l->kv_heads) * (size_t)l->head_dim, shared = 1 << 16;
  shared = larger(shared, mt_cpu_head_floats(l));
  shared = larger(shared, (size_t)l->tokens * qkv);
  shared = larger(shared, (size_t)(l->tokens + l->vocab));
  shared = larger(shared, (size_t)l->experts * (size_t)l->hidden);
  shared = larger(shared, (mt_cpu_qlinear_bytes(l) + sizeof(float) - 1) / sizeof(float));
  return (shared + (size_t)be->thread_count * CPU_THREAD_FLOATS) * sizeof(float);
}

mt_err mt_backend_cpu_create(struct mt_backend *be, int thread_count) {
  *be = (struct mt_backend){.name = "cpu", .workspace_bytes = workspace_bytes};
  be->thread_count = thread_count > 0 ? thread_count : omp_get_max_threads();
#define X(op) be->ops.op = mt_cpu_##op;
  MT_OP_LIST(X)
#undef X
  mt_backend_use_host_memory(be);
  return MT_OK;
}
