/* Which sizes of the operations' tests reach the products that a chip has for 8-bit operands, and
 * which fall back: without this the tests on a GPU could go by those kernels and nobody would see.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>

#ifdef MOETUNE_WITH_CUDA
#include "kernels/cuda/mxproducts.cuh"
#include "kernels/cuda/sm90/qgrouped.cuh"
#include "kernels/sizes.h"
#include "quant/linear.h"

enum { FWD, DGRAD, WGRAD, PRODUCTS };

/* As the cases of backend_cases.h have them, rows in groups; memory that is never read. */
static char nothing[256] __attribute__((aligned(256)));

struct operands {
  struct mt_qtensor x, dy, w;
  const int32_t *offsets;
};
static struct operands operands(const struct size *z, enum mt_qformat format) {
  struct operands a;
  int64_t dim[3] = {z->e, z->f, z->h}, rows = z->t * z->k;
  struct mt_operand o = {.format = format, .memory = nothing};
  struct mt_row_groups g = {.count = z->e};
  mt_operand_shape(&o, rows, z->h, MT_SIDE_BOTH, &g);
  a.x = o.q;
  mt_operand_shape(&o, rows, z->f, MT_SIDE_BOTH, &g);
  a.dy = o.q;
  mt_qweight_shape(&a.w, format, 3, dim, MT_SIDE_BOTH, nothing);
  a.offsets = (const int32_t *)(const void *)nothing;
  return a;
}

static bool hopper(const struct size *z, int product) {
  struct mt_cuda chip = {.capability = 90};
  struct mt_backend be = {.impl = &chip};
  struct operands a = operands(z, MT_Q_FP8);
  struct mt_cuda_qgrouped p = {.wgrad = product == WGRAD,
                               .groups = z->e,
                               .m = product == WGRAD ? z->f : z->t * z->k,
                               .n = product == FWD ? z->f : z->h,
                               .k = product == FWD     ? z->h
                                    : product == DGRAD ? z->f
                                                       : a.x.col_rows,
                               .a = product == FWD     ? a.x.row
                                    : product == DGRAD ? a.dy.row
                                                       : a.dy.col,
                               .b = product == FWD     ? a.w.row
                                    : product == DGRAD ? a.w.col
                                                       : a.x.col,
                               .b_scale = product == WGRAD ? a.x.col_scale : a.w.row_scale,
                               .c = nothing,
                               .c_dtype = product == WGRAD ? MT_F32 : MT_BF16};
  p.ldc = p.n;
  return mt_cuda_qgrouped_sm90_takes(&be, &p);
}

static bool blackwell(const struct size *z, int product) {
  struct operands a = operands(z, MT_Q_MXFP8);
  struct mt_cuda_mx_job j;
  int64_t rows = z->t * z->k;
  if (product == FWD)
    return mt_cuda_mx_fwd_job(
        &(struct mt_qlinear_fwd_args){
            .x = a.x, .w = a.w, .y = mt_mat(nothing, MT_BF16, rows, z->f), .offsets = a.offsets},
        &j);
  if (product == DGRAD)
    return mt_cuda_mx_dgrad_job(
        &(struct mt_qlinear_dgrad_args){
            .dy = a.dy, .w = a.w, .dx = mt_mat(nothing, MT_BF16, rows, z->h), .offsets = a.offsets},
        &j);
  return mt_cuda_mx_wgrad_job(
      &(struct mt_qlinear_wgrad_args){.dy = a.dy,
                                      .x = a.x,
                                      .dw = mt_cube(nothing, MT_F32, z->e, z->f, z->h),
                                      .offsets = a.offsets,
                                      .padded = a.offsets},
      &j);
}

static void every_product_is_reached_and_falls_back(void **state) {
  (void)state;
  for (int chip = 0; chip < 2; chip++) {
    int all_three = 0;
    for (int product = 0; product < PRODUCTS; product++) {
      int native = 0;
      for (int i = 0; i < SIZES; i++)
        native += chip ? blackwell(&sizes[i], product) : hopper(&sizes[i], product);
      if (native == 0 || native == SIZES)
        fail_msg("%s, product %d: native at %d of %d sizes", chip ? "Blackwell" : "Hopper", product,
                 native, SIZES);
    }
    for (int i = SIZES - (chip ? 1 : 2); i < SIZES; i++)
      for (int product = 0; product < PRODUCTS; product++)
        all_three += chip ? blackwell(&sizes[i], product) : hopper(&sizes[i], product);
    assert_int_equal(all_three, (chip ? 1 : 2) * PRODUCTS);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(every_product_is_reached_and_falls_back)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}

#else

int main(void) {
  printf("skipped: this build has no CUDA\n");
  return 77;
}

#endif
