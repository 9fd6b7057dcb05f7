/* Products of MXFP8 operands on Blackwell (sm_100 and later of its data centre chips) through
 * cuBLASLt: mxjobs.cu says what is multiplied, without a device; mxproducts.cu does it.
 *
 * NOT YET RUN on that hardware: what is tested is each description beside the reference
 * (tests/unit/test_cublas_mx.c), the order of scales (tests/gpu/test_cuda_mxscale.c), that it
 * compiles. */
#ifndef MT_KERNELS_CUDA_MXPRODUCTS_CUH
#define MT_KERNELS_CUDA_MXPRODUCTS_CUH

#include "kernels/cuda/mxscale.cuh"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- mxjobs.cu: host, pure ---- */

enum mt_cuda_mx_kind { MX_FWD, MX_DGRAD, MX_WGRAD };

/* A whole operation. c[m,n] of each group = a times b, contracted over k:
 *   MX_FWD    a = x's row copy [m,k],   b = w's row copy [n,k]      m: rows
 *   MX_DGRAD  a = dy's row copy [m,k],  b = w's column copy [k,n]   m: rows
 *   MX_WGRAD  a = dy's column copy [k,m], b = x's column copy [k,n]   k: rows, padded
 * as they are stored, so that no operand is turned: Blackwell takes all three (Hopper's FP8 and
 * GeForce's MX would want k contiguous). Blocks lie along k in every one of these copies. */
struct mt_cuda_mx_job {
  enum mt_cuda_mx_kind kind;
  int groups;             /* 0: dense */
  const int32_t *offsets; /* device [groups+1] */
  int64_t m, n, k;        /* rows: of all groups, at most; MX_WGRAD: of the column copies */
  const uint8_t *a, *b;
  struct mt_mx_scales a_scales, b_scales; /* to be ordered; padded is the caller's to fill in */
  void *c;
  int64_t ldc;
  enum mt_dtype c_dtype;
  int accumulate;
};
/* False where the shape or a format is not taken: all widths multiples of 32, all 8-bit data
 * aligned to 16, c bf16, or float32 of weight gradients, and no += on bf16 (which cuBLASLt rounds
 * twice). */
bool mt_cuda_mx_fwd_job(const struct mt_qlinear_fwd_args *a, struct mt_cuda_mx_job *j);
bool mt_cuda_mx_dgrad_job(const struct mt_qlinear_dgrad_args *a, struct mt_cuda_mx_job *j);
bool mt_cuda_mx_wgrad_job(const struct mt_qlinear_wgrad_args *a, struct mt_cuda_mx_job *j);

/* The product of one group, of a dense job the only one. */
struct mt_cuda_mx_product {
  enum mt_cuda_mx_kind kind;
  int64_t m, n, k, lda, ldb, ldc;           /* ld: elements between stored rows */
  const uint8_t *a, *b, *a_scale, *b_scale; /* scales in Blackwell's order */
  void *c;
  enum mt_dtype c_dtype;
  int accumulate;
};
/* offsets: host [groups+1], or NULL; a_scale, b_scale: all of the job's scales, ordered. */
struct mt_cuda_mx_product mt_cuda_mx_product_of(const struct mt_cuda_mx_job *j, int g,
                                                const int32_t *offsets, const uint8_t *a_scale,
                                                const uint8_t *b_scale);

/* lt (=): cuBLASLt is asked for c^T = b^T a^T, as for other products (products.cuh): a and b are
 * our operands, its second and its first. */
struct mt_cuda_mx_lt {
  cublasLtMatmulDescOpaque_t op;
  cublasLtMatrixLayoutOpaque_t a, b, c;
};
cublasStatus_t mt_cuda_mx_describe(const struct mt_cuda_mx_product *p, struct mt_cuda_mx_lt *lt);

/* Scratch for the scales of the largest job within the limits. */
size_t mt_cuda_mx_bytes(const struct mt_limits *l);

/* ---- mxproducts.cu ---- */

/* Whether this chip (be->capability) multiplies MXFP8 itself. */
bool mt_cuda_mx_chip(const struct mt_backend *be);
/* Runs a job on the backend's stream. *done (=) false: the library has no such product, and nothing
 * is written. Where there are groups the host must know their sizes: it reads them back once for
 * each pad_offsets, and waits for the stream at the first product that needs them. Deterministic.
 * Errors: MT_EDEVICE, MT_ENOMEM; MT_ESHAPE where the scratch is too small; MT_EUNSUPPORTED while a
 * graph is captured. */
mt_err mt_cuda_mx_run(struct mt_backend *be, const char *op, struct mt_cuda_mx_job *j, bool *done);

#ifdef __cplusplus
}
#endif

#endif
