#include "kernels/ref/ref.h"
#include "kernels/registry.h"

static size_t no_workspace(const struct mt_backend *be, const struct mt_limits *limits) {
  (void)be;
  (void)limits;
  return 0;
}

mt_err mt_backend_ref_create(struct mt_backend *be) {
  *be = (struct mt_backend){.name = "ref", .thread_count = 1, .workspace_bytes = no_workspace};
#define X(op) be->ops.op = mt_ref_##op;
  MT_OP_LIST(X)
#undef X
  mt_backend_use_host_memory(be);
  return MT_OK;
}
