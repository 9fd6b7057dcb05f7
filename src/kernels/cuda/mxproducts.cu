/* MXFP8 products on Blackwell, one call of cuBLASLt a group (13.1 has no layout for groups whose
 * sizes are device data). The sizes come to the host once for each pad_offsets, that is once a
 * layer and pass, and no graph holds what is launched by them (backend.counted_format). */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/mxproducts.cuh"
#include "kernels/cuda/products.cuh"

extern "C" {
#include "base/log.h"
}

/* Groups whose sizes are remembered: of so many layers at a time; and algorithms, by about how many
 * rows there are. */
enum { NOTES = 256, NOTE_INTS = MT_OPS_MAX_EXPERTS + 1, ALGORITHMS = 256 };

struct note {
  const int32_t *offsets, *padded; /* offsets NULL: free */
  int groups;
  cudaEvent_t there;
};
struct choice {
  struct plan_key key; /* m and k of the rows: their bit length */
  bool filled;
  cublasLtMatmulAlgo_t algo;
};
struct mt_cuda_counts {
  int32_t *host; /* pinned [NOTES][NOTE_INTS] */
  struct note note[NOTES];
  int next;
  bool warned; /* that the library has declined a product */
  struct choice choice[ALGORITHMS];
};

/* GeForce's Blackwell (12.x) takes such operands with k contiguous alone: they are emulated there.
 */
extern "C" bool mt_cuda_mx_chip(const struct mt_backend *be) {
  return be->capability >= 100 && be->capability < 120;
}

extern "C" void mt_cuda_counts_free(struct mt_cuda_counts *counts) {
  if (!counts) return;
  for (int i = 0; i < NOTES; i++) {
    if (counts->note[i].there) (void)cudaEventDestroy(counts->note[i].there);
  }
  if (counts->host) (void)cudaFreeHost(counts->host);
  free(counts);
}

static mt_err open_counts(struct mt_cuda *c) {
  if (c->counts && c->counts->host) return MT_OK;
  if (!c->counts) c->counts = (struct mt_cuda_counts *)calloc(1, sizeof *c->counts);
  if (!c->counts) return mt_fail(MT_ENOMEM, "sizes of groups");
  return mt_cuda_check(
      cudaMallocHost((void **)&c->counts->host, (size_t)NOTES * NOTE_INTS * sizeof(int32_t)),
      "pinned memory");
}

static struct note *find(struct mt_cuda_counts *counts, const int32_t *offsets) {
  for (int i = 0; counts && i < NOTES; i++) {
    if (counts->note[i].offsets == offsets) return &counts->note[i];
  }
  return NULL;
}

static bool meets(const int32_t *ints, int groups, const void *from, size_t size_bytes) {
  uintptr_t at = (uintptr_t)ints, end = at + (size_t)(groups + 1) * sizeof(int32_t);
  return at < (uintptr_t)from + size_bytes && (uintptr_t)from < end;
}

extern "C" void mt_cuda_counts_forget(struct mt_backend *be, const void *from, size_t size_bytes) {
  struct mt_cuda_counts *counts = be->impl ? mt_cuda_of(be)->counts : NULL;
  for (int i = 0; counts && i < NOTES; i++) {
    struct note *n = &counts->note[i];
    if (meets(n->offsets, n->groups, from, size_bytes) ||
        meets(n->padded, n->groups, from, size_bytes))
      n->offsets = NULL;
  }
}

static bool capturing(const struct mt_cuda *c) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(c->stream, &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

extern "C" mt_err mt_cuda_counts_note(struct mt_backend *be, const struct mt_pad_offsets_args *a) {
  struct mt_cuda *c = mt_cuda_of(be);
  size_t bytes = (size_t)(a->group_count + 1) * sizeof(int32_t);
  if (!mt_cuda_mx_chip(be)) return MT_OK;
  mt_cuda_counts_forget(be, a->offsets, bytes);
  mt_cuda_counts_forget(be, a->padded, bytes);
  if (capturing(c)) return MT_OK; /* who asks for them will be told */
  MT_TRY(open_counts(c));
  int slot = c->counts->next;
  struct note *n = &c->counts->note[slot];
  c->counts->next = (slot + 1) % NOTES;
  n->offsets = NULL;
  if (!n->there)
    MT_TRY(mt_cuda_check(cudaEventCreateWithFlags(&n->there, cudaEventDisableTiming), "an event"));
  MT_TRY(mt_cuda_check(cudaMemcpyAsync(c->counts->host + slot * NOTE_INTS, a->offsets, bytes,
                                       cudaMemcpyDeviceToHost, c->stream),
                       "sizes of groups"));
  MT_TRY(mt_cuda_check(cudaEventRecord(n->there, c->stream), "sizes of groups"));
  n->offsets = a->offsets, n->padded = a->padded, n->groups = a->group_count;
  return MT_OK;
}

/* The sizes of a job's groups, and padded on the device; made in `spare` (device [groups+1]) where
 * nobody has: then the note is good for this job alone. */
static mt_err counts_of(struct mt_backend *be, const char *op, const struct mt_cuda_mx_job *j,
                        int32_t *spare, const int32_t **host, const int32_t **padded) {
  struct mt_cuda *c = mt_cuda_of(be);
  struct note *n = find(c->counts, j->offsets);
  if (capturing(c))
    return mt_fail(MT_EUNSUPPORTED, "%s: the sizes of groups cannot be read into a graph", op);
  if (!n || n->groups != j->groups) {
    struct mt_pad_offsets_args a = {
        .offsets = j->offsets, .group_count = j->groups, .padded = spare};
    MT_TRY(mt_cuda_pad_offsets(be, &a));
    n = find(c->counts, j->offsets);
  }
  if (!n) return mt_fail(MT_EDEVICE, "%s: the sizes of groups are not known", op);
  MT_TRY(mt_cuda_check(cudaEventSynchronize(n->there), "sizes of groups"));
  *host = c->counts->host + (n - c->counts->note) * NOTE_INTS;
  *padded = n->padded;
  if (n->padded == spare) n->offsets = NULL;
  return MT_OK;
}

/* s (=) the product's description, without an algorithm; false: the library has none. */
static bool describe(const struct mt_cuda_mx_product *p, struct plan *s) {
  struct mt_cuda_mx_lt lt;
  if (mt_cuda_mx_describe(p, &lt) != CUBLAS_STATUS_SUCCESS) return false;
  memset(s, 0, sizeof *s);
  s->op = lt.op, s->a = lt.a, s->b = lt.b, s->c = lt.c;
  s->key.m = p->m, s->key.n = p->n, s->key.k = p->k;
  s->key.lda = p->lda, s->key.ldb = p->ldb, s->key.ldc = p->ldc;
  s->key.a_align = s->key.b_align = s->key.c_align = 16;
  s->key.ab = p->kind, s->key.c_dtype = p->c_dtype;
  s->key.workspace_bytes = MT_CUDA_LT_WORKSPACE_BYTES;
  return true;
}

/* What stands for all products of about as many rows: the next power of two. */
static struct mt_cuda_mx_product typical_of(const struct mt_cuda_mx_product *p) {
  struct mt_cuda_mx_product t = *p;
  int64_t *rows = p->kind == MX_WGRAD ? &t.k : &t.m, up = 1;
  while (up < *rows) up *= 2;
  *rows = up;
  return t;
}

/* s->algo (=): the library's first choice for about as many rows, or where that does not do for its
 * own; false: it has none. What was asked before has no part in it, so that the same product has
 * the same bits. */
static bool choose(struct mt_cuda *c, const struct mt_cuda_mx_product *p, struct plan *s) {
  struct mt_cuda_mx_product t = typical_of(p);
  struct plan typical;
  cublasLtMatmulHeuristicResult_t found;
  if (!describe(&t, &typical)) return false;
  uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
  for (size_t i = 0; i < sizeof typical.key; i++)
    hash = (hash ^ ((const unsigned char *)&typical.key)[i]) * 0x100000001b3u;
  struct choice *known = &c->counts->choice[hash % ALGORITHMS];
  if (!known->filled || memcmp(&known->key, &typical.key, sizeof known->key) != 0) {
    known->filled = lt_candidates(c, &typical, &found, 1) > 0;
    known->key = typical.key;
    if (known->filled) known->algo = found.algo;
  }
  s->algo = known->algo;
  if (known->filled &&
      cublasLtMatmulAlgoCheck(c->lt, &s->op, &s->b, &s->a, &s->c, &s->c, &s->algo, &found) ==
          CUBLAS_STATUS_SUCCESS &&
      found.workspaceSize <= (size_t)s->key.workspace_bytes)
    return true;
  if (lt_candidates(c, s, &found, 1) < 1) return false;
  s->algo = found.algo;
  return true;
}

/* s (=) the product's description and algorithm; false: there is none. */
static bool prepare(struct mt_cuda *c, const struct mt_cuda_mx_product *p, struct plan *s) {
  if (p->m == 0 || p->n == 0 || p->k == 0) return true; /* not the library's */
  return describe(p, s) && choose(c, p, s);
}

static mt_err run_one(struct mt_backend *be, const char *op, const struct mt_cuda_mx_product *p) {
  struct mt_cuda *c = mt_cuda_of(be);
  size_t item = mt_dtype_bytes(p->c_dtype);
  float alpha = 1, beta = p->accumulate ? 1.0f : 0.0f;
  struct plan s;
  if (p->m == 0 || p->n == 0) return MT_OK;
  if (p->k == 0) { /* a sum over nothing */
    if (p->accumulate) return MT_OK;
    return mt_cuda_check(cudaMemset2DAsync(p->c, (size_t)p->ldc * item, 0, (size_t)p->n * item,
                                           (size_t)p->m, c->stream),
                         op);
  }
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  if (prepare(c, p, &s)) {
    status = cublasLtMatmul(c->lt, &s.op, &alpha, p->b, &s.b, p->a, &s.a, &beta, p->c, &s.c, p->c,
                            &s.c, &s.algo, be->workspace, (size_t)s.key.workspace_bytes, c->stream);
  }
  if (status == CUBLAS_STATUS_SUCCESS) return MT_OK;
  return mt_fail(MT_EDEVICE, "%s: MXFP8 product of %lld x %lld x %lld: %s", op, (long long)p->m,
                 (long long)p->n, (long long)p->k, cublasLtGetStatusString(status));
}

extern "C" mt_err mt_cuda_mx_run(struct mt_backend *be, const char *op, struct mt_cuda_mx_job *j,
                                 bool *done) {
  int64_t a_bytes = mt_mx_scales_bytes(&j->a_scales), b_bytes = mt_mx_scales_bytes(&j->b_scales);
  int64_t b_at = (a_bytes + 255) / 256 * 256, spare_at = b_at + (b_bytes + 255) / 256 * 256;
  size_t need = (size_t)spare_at + (size_t)(j->groups + 1) * sizeof(int32_t);
  int count = j->groups ? j->groups : 1;
  const int32_t *host = NULL, *padded = NULL;
  struct plan tried;
  void *scratch;
  *done = false;
  MT_TRY(mt_cuda_scratch(be, op, need, &scratch));
  MT_TRY(open_counts(mt_cuda_of(be)));
  uint8_t *a_scale = (uint8_t *)scratch, *b_scale = a_scale + b_at;
  if (j->groups) {
    MT_TRY(counts_of(be, op, j, (int32_t *)(a_scale + spare_at), &host, &padded));
    j->a_scales.padded = padded;
    j->b_scales.padded = padded;
  }
  for (int g = 0; g < count; g++) {
    struct mt_cuda_mx_product p = mt_cuda_mx_product_of(j, g, host, a_scale, b_scale);
    if (prepare(mt_cuda_of(be), &p, &tried)) continue;
    if (!mt_cuda_of(be)->counts->warned)
      mt_warn("%s: cuBLASLt has no MXFP8 product of %lld x %lld x %lld; it is done in bf16", op,
              (long long)p.m, (long long)p.n, (long long)p.k);
    mt_cuda_of(be)->counts->warned = true;
    return MT_OK;
  }
  MT_TRY(mt_cuda_mx_scales(be, &j->a_scales, a_scale));
  MT_TRY(mt_cuda_mx_scales(be, &j->b_scales, b_scale));
  *done = true;
  for (int g = 0; g < count; g++) {
    struct mt_cuda_mx_product p = mt_cuda_mx_product_of(j, g, host, a_scale, b_scale);
    MT_TRY(run_one(be, op, &p));
  }
  return MT_OK;
}
