#include <omp.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
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

/* Shared part: the largest packed operand of any product, or the head's chunk with its own, or
 * attention's float32 gradient. */
static size_t workspace_bytes(const struct mt_backend *be, const struct mt_limits *l) {
  int64_t q = l->heads * l->head_dim, qkv = q + 2 * l->kv_heads * l->head_dim;
  int64_t wide = l->hidden > 2 * l->ffn ? l->hidden : 2 * l->ffn;
  int64_t dense = qkv > l->hidden ? qkv : l->hidden;
  /* Packing rounds a group's rows up to a panel: 48 more at most. */
  size_t grouped = (size_t)(l->rows + 48 * l->experts) * (size_t)(wide + 48);
  size_t whole = (size_t)(l->tokens + 48) * (size_t)(dense + 48);
  size_t chunk = (size_t)mt_cpu_head_floats(l);
  size_t attention = (size_t)l->tokens * (size_t)qkv;
  size_t shared = larger(larger(grouped, whole), larger(chunk, attention));
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
