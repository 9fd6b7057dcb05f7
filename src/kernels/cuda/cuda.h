/* Internal to the CUDA backend. Every .cu file is C in style and shows the rest of the program C
 * functions only: mt_cuda_<operation> of backend/ops.h, and the few below that files share. */
#ifndef MT_KERNELS_CUDA_CUDA_H
#define MT_KERNELS_CUDA_CUDA_H

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "backend/check.h"
#include "backend/device.h"

/* Small uploads go through pinned memory, so that the host does not wait for the stream: a ring of
 * slots, each free again once the copy out of it has run. */
enum { MT_CUDA_RING = 128, MT_CUDA_RING_BYTES = 128 << 10 };

/* State of one backend: backend.impl. */
struct mt_cuda {
  int device;
  int sm_count;
  int capability;            /* 10 * major + minor: 80, 90, 100 */
  size_t shared_optin_bytes; /* of a block, at most */
  bool portable;       /* nothing that only one generation of chips has (backend "cuda-portable") */
  cudaStream_t stream; /* all operations run on it */
  char *ring;          /* pinned [MT_CUDA_RING][MT_CUDA_RING_BYTES] */
  cudaEvent_t ring_free[MT_CUDA_RING];
  int ring_next;
  cudaEvent_t stamps[MT_STAMPS]; /* made when first asked for */
  cublasLtHandle_t lt;
  int *unit_counters; /* device [2]: of grouped products on Hopper (sm90/grouped_units.cuh) */
  struct mt_cuda_plans *plans;   /* algorithms chosen for products so far (products.cu) */
  struct mt_cuda_counts *counts; /* sizes of groups that the host knows (mxproducts.cu), or NULL */
};

static inline struct mt_cuda *mt_cuda_of(const struct mt_backend *be) {
  return (struct mt_cuda *)be->impl;
}

#define X(op) mt_err mt_cuda_##op(struct mt_backend *be, const struct mt_##op##_args *a);
MT_OP_LIST(X)
#undef X

/* MT_OK, or MT_EDEVICE naming what was done and what CUDA says. */
mt_err mt_cuda_check(cudaError_t error, const char *what);
/* The last launch's error, by the operation's name. Call it after every launch. */
mt_err mt_cuda_launched(const char *op);
/* F32 and BF16 only; names the operation. */
mt_err mt_cuda_format(const char *op, const struct mt_tensor *t);

/* The backend's workspace has two parts: the products' own at its head (mt_cuda_gemm uses it), and
 * scratch that belongs to the operation that runs. Both are aligned to 256. */
enum { MT_CUDA_LT_WORKSPACE_BYTES = 32 << 20 };
/* MT_ESHAPE naming the operation when it needs more than there is. */
mt_err mt_cuda_scratch(const struct mt_backend *be, const char *op, size_t need_bytes, void **out);

/* Bytes of scratch that a family of operations needs within the limits: pure functions, the
 * workspace is the largest of them. */
size_t mt_cuda_embed_bytes(const struct mt_limits *l);
size_t mt_cuda_norm_bytes(const struct mt_limits *l);
size_t mt_cuda_router_bytes(const struct mt_limits *l);
size_t mt_cuda_permute_bytes(const struct mt_limits *l);
size_t mt_cuda_experts_bytes(const struct mt_limits *l);
size_t mt_cuda_attention_bytes(const struct mt_limits *l);
size_t mt_cuda_head_bytes(const struct mt_limits *l);
size_t mt_cuda_optimizer_bytes(const struct mt_limits *l);
size_t mt_cuda_quantize_bytes(const struct mt_limits *l);
/* This one by the chip, be->capability: what its products of such operands need. */
size_t mt_cuda_qlinear_bytes(const struct mt_backend *be, const struct mt_limits *l);

/* One dense product, row-major: c[m,n] = a b + beta c.
 * a: [m,k], or where a_columns is set stored as [k,m]; b: [k,n], or where b_columns is set stored
 * as [n,k] (a weight). lda, ldb, ldc: elements between stored rows. beta: 0 or 1; c is not read
 * with 0. a and b have the format ab; sums are float32, F32 operands are not rounded (no TF32).
 * Deterministic. Errors: MT_EUNSUPPORTED, MT_EDEVICE. */
struct mt_cuda_product {
  int64_t m, n, k;
  const void *a, *b;
  void *c;
  int64_t lda, ldb, ldc;
  bool a_columns, b_columns;
  enum mt_dtype ab, c_dtype;
  float beta;
};
mt_err mt_cuda_gemm(struct mt_backend *be, const struct mt_cuda_product *p);
void mt_cuda_plans_free(struct mt_cuda_plans *plans); /* NULL is fine */

/* Grouped products over experts, offsets[G+1] on the device (rows of group g are
 * [offsets[g], offsets[g+1])), rows_most the host's bound on offsets[G].
 *   GROUPED_FWD    y[r,:]  = x[r,:] w[g]^T           a = x [R,K], b = w [G,N,K], c = y [R,N]
 *   GROUPED_DGRAD  dx[r,:] = dy[r,:] w[g]  (+ c)     a = dy [R,K], b = w [G,K,N], c = dx [R,N]
 *   GROUPED_WGRAD  dw[g]   = dy_g^T x_g    (+ c)     a = dy [R,M], b = x [R,N], c = dw [G,M,N]
 * A group without rows: FWD and DGRAD write nothing, WGRAD writes zeros (or adds nothing). */
enum mt_cuda_grouped_kind { GROUPED_FWD, GROUPED_DGRAD, GROUPED_WGRAD };
struct mt_cuda_grouped {
  enum mt_cuda_grouped_kind kind;
  const int32_t *offsets; /* device [groups+1] */
  int groups;
  int64_t rows_most;
  int64_t m, n, k; /* m: WGRAD's rows of dw; k: FWD's and DGRAD's depth */
  const void *a, *b;
  void *c;
  int64_t lda, ldb, ldc; /* between rows; matrices of b (or of WGRAD's c) lie one after another */
  enum mt_dtype ab, c_dtype;
  int accumulate;
  double
      *sumsq; /* device [1] (=) sum of squares of c as it is then, or NULL; needs ..._sm90_sums */
};
/* The best that takes the product of those below. */
mt_err mt_cuda_grouped_product(struct mt_backend *be, const struct mt_cuda_grouped *p);
/* Any GPU from sm_80 on, any shape, F32 (no TF32) and BF16. */
mt_err mt_cuda_grouped_portable(struct mt_backend *be, const struct mt_cuda_grouped *p);
/* wgmma on Hopper: false where it does not take this shape, format or chip. */
bool mt_cuda_grouped_sm90_takes(const struct mt_backend *be, const struct mt_cuda_grouped *p);
mt_err mt_cuda_grouped_sm90(struct mt_backend *be, const struct mt_cuda_grouped *p);
/* Whether it also adds up the squares of c, at less cost than reading c again. */
bool mt_cuda_grouped_sm90_sums(const struct mt_backend *be, const struct mt_cuda_grouped *p);

/* *out (=) the sum of `count` numbers in an order of its own, at most MT_CUDA_PARTIALS. */
enum { MT_CUDA_PARTIALS = 1024 };
mt_err mt_cuda_sum_partials(struct mt_backend *be, const double *partial, int count, double *out);

/* experts_up_fwd and experts_down_dgrad as one kernel on Hopper, SwiGLU on sums still in registers
 * (dh is not rounded). The kernel for down leaves drow_prob as one part for every
 * MT_CUDA_EXPERTS_COLS columns of h, parts [columns / that][R], or NULL: none. */
enum { MT_CUDA_EXPERTS_COLS = 256 };
bool mt_cuda_experts_up_sm90_takes(const struct mt_backend *be,
                                   const struct mt_experts_up_fwd_args *a);
mt_err mt_cuda_experts_up_sm90(struct mt_backend *be, const struct mt_experts_up_fwd_args *a);
bool mt_cuda_experts_down_sm90_takes(const struct mt_backend *be,
                                     const struct mt_experts_down_dgrad_args *a);
mt_err mt_cuda_experts_down_sm90(struct mt_backend *be, const struct mt_experts_down_dgrad_args *a,
                                 float *parts);

/* Sizes of groups on their way to the host, where its products need them there (mxproducts.cu;
 * elsewhere nothing is done). note: offsets has been made (or changed) and padded of
 * it; forget: memory [from, from + size) is no longer what it was. */
mt_err mt_cuda_counts_note(struct mt_backend *be, const struct mt_pad_offsets_args *a);
void mt_cuda_counts_forget(struct mt_backend *be, const void *from, size_t size_bytes);
void mt_cuda_counts_free(struct mt_cuda_counts *counts); /* NULL is fine */

#ifdef __cplusplus
}
#endif

#endif
