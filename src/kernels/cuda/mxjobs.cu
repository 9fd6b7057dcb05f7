/* MXFP8 products for cuBLASLt: which copies they read, where each group's operands and scales lie,
 * and the library's descriptions. Nothing here touches a device. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mxproducts.cuh"

extern "C" {
#include "base/mxscale.h"
}

enum { MX = 32, WIDTH = 32 };

static struct mt_mx_scales row_scales(const struct mt_qtensor *q, const int32_t *offsets,
                                      int groups) {
  int64_t rows = q->dim[q->rank - 2], blocks = mt_q_blocks(MT_Q_MXFP8, q->dim[q->rank - 1]);
  struct mt_mx_scales s = {};
  s.scales = (const uint8_t *)q->row_scale;
  s.by_outer = blocks, s.by_block = 1, s.by_matrix = rows * blocks;
  s.matrices = q->rank == 3 ? q->dim[0] : 1;
  s.outer = rows, s.blocks = blocks;
  s.offsets = offsets, s.groups = groups;
  return s;
}

/* rows: those that are contracted, of a weight its own. */
static struct mt_mx_scales column_scales(const struct mt_qtensor *q, int64_t rows,
                                         const int32_t *offsets, int groups) {
  int64_t cols = q->dim[q->rank - 1], blocks = mt_q_blocks(MT_Q_MXFP8, rows);
  struct mt_mx_scales s = {};
  s.scales = (const uint8_t *)q->col_scale;
  s.by_outer = 1, s.by_block = cols, s.by_matrix = blocks * cols;
  s.matrices = q->rank == 3 ? q->dim[0] : 1;
  s.outer = cols, s.blocks = blocks;
  s.offsets = offsets, s.groups = groups;
  s.along_blocks = true;
  return s;
}

/* Beside the products themselves, what cuBLASLt's FP8 wants of sizes and addresses. */
static bool takes(const struct mt_cuda_mx_job *j, const struct mt_qtensor *a,
                  const struct mt_qtensor *b) {
  const int64_t most = 1 << 30;
  bool wgrad = j->kind == MX_WGRAD;
  if (a->format != MT_Q_MXFP8 || b->format != MT_Q_MXFP8) return false;
  if (j->c_dtype != MT_BF16 && !(wgrad && j->c_dtype == MT_F32)) return false;
  if (j->c_dtype == MT_BF16 && j->accumulate) return false;
  if (j->n % WIDTH != 0 || (wgrad ? j->m : j->k) % WIDTH != 0 || j->ldc % 8 != 0) return false;
  if (j->n < 1 || j->n > most || j->m > most || j->k > most || j->ldc > most) return false;
  return aligned_to(j->a, 16) && aligned_to(j->b, 16) && aligned_to(j->c, 16);
}

extern "C" bool mt_cuda_mx_fwd_job(const struct mt_qlinear_fwd_args *a, struct mt_cuda_mx_job *j) {
  int groups = a->offsets ? (int)a->w.dim[0] : 0;
  *j = (struct mt_cuda_mx_job){};
  j->kind = MX_FWD;
  j->groups = groups, j->offsets = a->offsets;
  j->m = a->x.dim[0], j->n = a->y.dim[1], j->k = a->x.dim[1];
  j->a = a->x.row, j->b = a->w.row;
  j->a_scales = row_scales(&a->x, a->offsets, groups);
  j->b_scales = row_scales(&a->w, NULL, 0);
  j->c = a->y.data, j->ldc = a->y.ld, j->c_dtype = a->y.dtype;
  return takes(j, &a->x, &a->w);
}

extern "C" bool mt_cuda_mx_dgrad_job(const struct mt_qlinear_dgrad_args *a,
                                     struct mt_cuda_mx_job *j) {
  int groups = a->offsets ? (int)a->w.dim[0] : 0;
  *j = (struct mt_cuda_mx_job){};
  j->kind = MX_DGRAD;
  j->groups = groups, j->offsets = a->offsets;
  j->m = a->dy.dim[0], j->n = a->dx.dim[1], j->k = a->dy.dim[1];
  j->a = a->dy.row, j->b = a->w.col;
  j->a_scales = row_scales(&a->dy, a->offsets, groups);
  j->b_scales = column_scales(&a->w, a->dy.dim[1], NULL, 0);
  j->c = a->dx.data, j->ldc = a->dx.ld, j->c_dtype = a->dx.dtype;
  j->accumulate = a->accumulate;
  return takes(j, &a->dy, &a->w);
}

extern "C" bool mt_cuda_mx_wgrad_job(const struct mt_qlinear_wgrad_args *a,
                                     struct mt_cuda_mx_job *j) {
  int groups = a->offsets ? (int)a->dw.dim[0] : 0;
  int64_t rows = a->offsets ? a->x.col_rows : mt_q_padded(a->x.dim[0]);
  *j = (struct mt_cuda_mx_job){};
  j->kind = MX_WGRAD;
  j->groups = groups, j->offsets = a->offsets;
  j->m = a->dy.dim[1], j->n = a->x.dim[1], j->k = rows;
  j->a = a->dy.col, j->b = a->x.col;
  j->a_scales = column_scales(&a->dy, rows, a->offsets, groups);
  j->b_scales = column_scales(&a->x, rows, a->offsets, groups);
  j->c = a->dw.data, j->ldc = a->dw.ld, j->c_dtype = a->dw.dtype;
  j->accumulate = a->accumulate;
  return takes(j, &a->dy, &a->x);
}

extern "C" struct mt_cuda_mx_product mt_cuda_mx_product_of(const struct mt_cuda_mx_job *j, int g,
                                                           const int32_t *offsets,
                                                           const uint8_t *a_scale,
                                                           const uint8_t *b_scale) {
  bool wgrad = j->kind == MX_WGRAD;
  int64_t begin = 0, padded = 0, rows = wgrad ? j->k : j->m;
  if (offsets) {
    begin = offsets[g], rows = offsets[g + 1] - begin;
    for (int i = 0; i < g; i++) padded += mt_q_padded(offsets[i + 1] - offsets[i]);
    if (wgrad) rows = mt_q_padded(rows);
  }
  struct mt_cuda_mx_product p = {};
  p.kind = j->kind;
  p.m = wgrad ? j->m : rows, p.n = j->n, p.k = wgrad ? rows : j->k;
  p.lda = wgrad ? p.m : p.k, p.ldb = j->kind == MX_FWD ? p.k : p.n, p.ldc = j->ldc;
  int64_t tile_row = padded / MT_MX_TILE_OUTER * MT_MX_TILE_BYTES; /* or column: 128 rows each */
  if (wgrad) {
    p.a = j->a + padded * p.m, p.b = j->b + padded * p.n;
    p.a_scale = a_scale + tile_row * mt_mx_outer_tiles(p.m);
    p.b_scale = b_scale + tile_row * mt_mx_outer_tiles(p.n);
  } else {
    p.a = j->a + begin * p.k, p.b = j->b + g * p.n * p.k;
    p.a_scale = a_scale + tile_row * mt_mx_block_tiles(p.k / MX);
    p.b_scale = b_scale + g * mt_mx_scale_bytes(p.n, p.k / MX);
  }
  int64_t first = wgrad ? g * p.m : begin; /* row of c */
  p.c = (char *)j->c + (size_t)(first * j->ldc) * mt_dtype_bytes(j->c_dtype);
  p.c_dtype = j->c_dtype;
  p.accumulate = j->accumulate;
  return p;
}

extern "C" cublasStatus_t mt_cuda_mx_describe(const struct mt_cuda_mx_product *p,
                                              struct mt_cuda_mx_lt *s) {
  cublasOperation_t first = p->kind == MX_FWD ? CUBLAS_OP_T : CUBLAS_OP_N;    /* our b */
  cublasOperation_t second = p->kind == MX_WGRAD ? CUBLAS_OP_T : CUBLAS_OP_N; /* our a */
  int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
  cudaDataType_t out = p->c_dtype == MT_F32 ? CUDA_R_32F : CUDA_R_16BF;
  bool b_turned = p->kind == MX_FWD, a_turned = p->kind == MX_WGRAD;
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
#define STEP(call)                                                                                 \
  if (status == CUBLAS_STATUS_SUCCESS) status = (call)
#define SET(name, value)                                                                           \
  STEP(cublasLtMatmulDescSetAttribute(&s->op, CUBLASLT_MATMUL_DESC_##name, &(value), sizeof(value)))
  STEP(cublasLtMatmulDescInit(&s->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  SET(TRANSA, first);
  SET(TRANSB, second);
  SET(A_SCALE_MODE, mode);
  SET(B_SCALE_MODE, mode);
  SET(A_SCALE_POINTER, p->b_scale);
  SET(B_SCALE_POINTER, p->a_scale);
  /* Rows of ours are columns there. */
  STEP(cublasLtMatrixLayoutInit(&s->b, CUDA_R_8F_E4M3, (uint64_t)(b_turned ? p->k : p->n),
                                (uint64_t)(b_turned ? p->n : p->k), p->ldb));
  STEP(cublasLtMatrixLayoutInit(&s->a, CUDA_R_8F_E4M3, (uint64_t)(a_turned ? p->m : p->k),
                                (uint64_t)(a_turned ? p->k : p->m), p->lda));
  STEP(cublasLtMatrixLayoutInit(&s->c, out, (uint64_t)p->n, (uint64_t)p->m, p->ldc));
#undef SET
#undef STEP
  return status;
}

static size_t up(int64_t bytes) {
  return ((size_t)bytes + 255) / 256 * 256;
}

/* Scales of a product of `rows` in groups with [groups, n, k], in the three directions. */
static size_t job_bytes(int64_t rows, int64_t groups, int64_t n, int64_t k) {
  int64_t p = mt_q_col_rows(rows, groups), nb = mt_q_blocks(MT_Q_MXFP8, n),
          kb = mt_q_blocks(MT_Q_MXFP8, k);
  const size_t ways[] = {
      up(mt_mx_scale_bytes(p, kb)) + up(groups * mt_mx_scale_bytes(n, kb)),
      up(mt_mx_scale_bytes(p, nb)) + up(groups * mt_mx_scale_bytes(k, nb)),
      up(mt_mx_scale_bytes(n, p / MX)) + up(mt_mx_scale_bytes(k, p / MX)),
  };
  size_t most = 0;
  for (size_t w : ways) most = w > most ? w : most;
  return most + up((groups + 1) * (int64_t)sizeof(int32_t));
}

extern "C" size_t mt_cuda_mx_bytes(const struct mt_limits *l) {
  int64_t q = l->heads * l->head_dim, qkv = q + 2 * l->kv_heads * l->head_dim;
  const size_t jobs[] = {
      job_bytes(l->rows, l->experts, 2 * l->ffn, l->hidden),
      job_bytes(l->rows, l->experts, l->hidden, l->ffn),
      job_bytes(l->tokens, 1, qkv, l->hidden),
      job_bytes(l->tokens, 1, l->hidden, q),
  };
  size_t most = 0;
  if (l->qformat != MT_Q_MXFP8) return 0;
  for (size_t j : jobs) most = j > most ? j : most;
  return most;
}
