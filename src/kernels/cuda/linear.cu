/* Linear layers: dense products go through cuBLASLt (products.cu), grouped ones through the kernels
 * of grouped_*.cu. */
#include "kernels/cuda/device.cuh"

extern "C" mt_err mt_cuda_grouped_product(struct mt_backend *be, const struct mt_cuda_grouped *p) {
  if (mt_cuda_grouped_sm90_takes(be, p)) return mt_cuda_grouped_sm90(be, p);
  return mt_cuda_grouped_portable(be, p);
}

/* Through the library: as one group on the Hopper kernel nothing is gained (bench/dense_gemm.cu).
 */
static mt_err dense(struct mt_backend *be, const struct mt_cuda_grouped *p, bool a_columns,
                    bool b_columns) {
  bool wgrad = p->kind == GROUPED_WGRAD;
  struct mt_cuda_product d = {.m = wgrad ? p->m : p->rows_most,
                              .n = p->n,
                              .k = wgrad ? p->rows_most : p->k,
                              .a = p->a,
                              .b = p->b,
                              .c = p->c,
                              .lda = p->lda,
                              .ldb = p->ldb,
                              .ldc = p->ldc,
                              .a_columns = a_columns,
                              .b_columns = b_columns,
                              .ab = p->ab,
                              .c_dtype = p->c_dtype,
                              .beta = p->accumulate ? 1.0f : 0.0f};
  return mt_cuda_gemm(be, &d);
}

extern "C" mt_err mt_cuda_linear_fwd(struct mt_backend *be, const struct mt_linear_fwd_args *a) {
  MT_TRY(mt_check_linear_fwd(a));
  MT_TRY(mt_cuda_format("linear_fwd", &a->x));
  struct mt_cuda_grouped p = {.kind = GROUPED_FWD,
                              .offsets = a->offsets,
                              .groups = (int)a->w.dim[0],
                              .rows_most = a->x.dim[0],
                              .m = 0,
                              .n = a->y.dim[1],
                              .k = a->x.dim[1],
                              .a = a->x.data,
                              .b = a->w.data,
                              .c = a->y.data,
                              .lda = a->x.ld,
                              .ldb = a->w.ld,
                              .ldc = a->y.ld,
                              .ab = a->x.dtype,
                              .c_dtype = a->y.dtype,
                              .accumulate = 0};
  return a->offsets ? mt_cuda_grouped_product(be, &p) : dense(be, &p, false, true);
}

extern "C" mt_err mt_cuda_linear_dgrad(struct mt_backend *be,
                                       const struct mt_linear_dgrad_args *a) {
  MT_TRY(mt_check_linear_dgrad(a));
  MT_TRY(mt_cuda_format("linear_dgrad", &a->dy));
  struct mt_cuda_grouped p = {.kind = GROUPED_DGRAD,
                              .offsets = a->offsets,
                              .groups = (int)a->w.dim[0],
                              .rows_most = a->dy.dim[0],
                              .m = 0,
                              .n = a->dx.dim[1],
                              .k = a->dy.dim[1],
                              .a = a->dy.data,
                              .b = a->w.data,
                              .c = a->dx.data,
                              .lda = a->dy.ld,
                              .ldb = a->w.ld,
                              .ldc = a->dx.ld,
                              .ab = a->dy.dtype,
                              .c_dtype = a->dx.dtype,
                              .accumulate = a->accumulate};
  return a->offsets ? mt_cuda_grouped_product(be, &p) : dense(be, &p, false, false);
}

extern "C" mt_err mt_cuda_linear_wgrad(struct mt_backend *be,
                                       const struct mt_linear_wgrad_args *a) {
  MT_TRY(mt_check_linear_wgrad(a));
  MT_TRY(mt_cuda_format("linear_wgrad", &a->x));
  struct mt_cuda_grouped p = {.kind = GROUPED_WGRAD,
                              .offsets = a->offsets,
                              .groups = (int)a->dw.dim[0],
                              .rows_most = a->x.dim[0],
                              .m = a->dy.dim[1],
                              .n = a->x.dim[1],
                              .k = 0,
                              .a = a->dy.data,
                              .b = a->x.data,
                              .c = a->dw.data,
                              .lda = a->dy.ld,
                              .ldb = a->x.ld,
                              .ldc = a->dw.ld,
                              .ab = a->x.dtype,
                              .c_dtype = a->dw.dtype,
                              .accumulate = a->accumulate};
  bool on_the_way = a->sumsq && a->offsets && mt_cuda_grouped_sm90_sums(be, &p);
  if (on_the_way) p.sumsq = a->sumsq;
  MT_TRY(a->offsets ? mt_cuda_grouped_product(be, &p) : dense(be, &p, true, false));
  if (on_the_way || !a->sumsq) return MT_OK;
  struct mt_tensor all = mt_vec(a->dw.data, a->dw.dtype, mt_count(&a->dw));
  struct mt_sumsq_args sum = {.tensors = &all, .tensor_count = 1};
  sum.out = a->sumsq;
  return mt_cuda_sumsq(be, &sum);
}
