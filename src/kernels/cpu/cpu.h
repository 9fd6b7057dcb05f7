/* Internal to the CPU backend. */
#ifndef MT_KERNELS_CPU_CPU_H
#define MT_KERNELS_CPU_CPU_H

#include <math.h>
#include <string.h>

#include "backend/check.h"
#include "backend/device.h"

#define X(op) mt_err mt_cpu_##op(struct mt_backend *be, const struct mt_##op##_args *a);
MT_OP_LIST(X)
#undef X

/* Rows of any storage format as float32: a pointer into the tensor itself where it is F32, else
 * `buffer` filled with the converted row. */
static inline const float *cpu_read(const struct mt_tensor *t, int64_t row, int64_t n,
                                    float *buffer) {
  if (t->dtype == MT_F32) return (const float *)t->data + row * t->ld;
  const uint16_t *h = (const uint16_t *)t->data + row * t->ld;
  for (int64_t i = 0; i < n; i++) buffer[i] = mt_bf16_to_f32(h[i]);
  return buffer;
}

/* Where to compute a row that cpu_write then rounds into place. */
static inline float *cpu_target(const struct mt_tensor *t, int64_t row, float *buffer) {
  return t->dtype == MT_F32 ? (float *)t->data + row * t->ld : buffer;
}

static inline void cpu_write(const struct mt_tensor *t, int64_t row, int64_t n, const float *x) {
  if (t->dtype == MT_F32) return; /* computed in place */
  uint16_t *h = (uint16_t *)t->data + row * t->ld;
  for (int64_t i = 0; i < n; i++) h[i] = mt_f32_to_bf16(x[i]);
}

/* Columns [begin, begin + n) of every row of a gradient become zero. */
static inline void cpu_zero_columns(const struct mt_tensor *t, int64_t begin, int64_t n) {
  size_t item = mt_dtype_bytes(t->dtype);
  for (int64_t i = 0; i < t->dim[0]; i++) {
    memset((char *)t->data + (size_t)(i * t->ld + begin) * item, 0, (size_t)n * item);
  }
}

/* Elements [begin, begin + n) of a row of a gradient: sum, or sum added to what is there. */
static inline void cpu_write_grad(const struct mt_tensor *t, int64_t row, int64_t begin, int64_t n,
                                  const float *sum, int accumulate) {
  if (t->dtype == MT_F32) {
    float *dst = (float *)t->data + row * t->ld + begin;
    for (int64_t i = 0; i < n; i++) dst[i] = accumulate ? dst[i] + sum[i] : sum[i];
    return;
  }
  uint16_t *dst = (uint16_t *)t->data + row * t->ld + begin;
  for (int64_t i = 0; i < n; i++) {
    dst[i] = mt_f32_to_bf16(accumulate ? mt_bf16_to_f32(dst[i]) + sum[i] : sum[i]);
  }
}

/* F32 and BF16 only; names the operation. */
mt_err mt_cpu_format(const char *op, const struct mt_tensor *t);

/* Scratch of one thread, from the head of the workspace. */
enum { CPU_PRODUCT_FLOATS = 52 * 1024, CPU_THREAD_FLOATS = 256 * 1024 };
float *mt_cpu_thread_scratch(const struct mt_backend *be, int thread);
/* The rest of the workspace, shared by all threads. */
float *mt_cpu_shared_scratch(const struct mt_backend *be, size_t *float_count);

/* Widest row that goes through a per-thread row buffer. */
enum { CPU_ROW_FLOATS = CPU_THREAD_FLOATS / 4 };

/* Floats of shared scratch that head_loss needs. */
size_t mt_cpu_head_floats(const struct mt_limits *l);

/* e^x, vectorised; about 1 ulp; 0 below -87.3, infinity above 88.7, NaN stays. n any, out may be x.
 */
void mt_cpu_exp(const float *x, float *out, int64_t n);

/* SwiGLU on n elements of a row in float32: h (=). And back, dg, du and h (=); returns the
 * elements' share of the gradient of p. No output is an input. */
void mt_cpu_swiglu_row(const float *g, const float *u, float p, int64_t n, float *h);
float mt_cpu_swiglu_bwd_row(const float *d, const float *g, const float *u, float p, int64_t n,
                            float *dg, float *du, float *h);

/* Bytes of shared scratch that products of 8-bit operands need: they are made of both operands as
 * bf16. */
size_t mt_cpu_qlinear_bytes(const struct mt_limits *l);

#endif
