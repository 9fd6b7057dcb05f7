/* Head with cross entropy: rows that have a target are gathered into chunks; logits exist for one
 * chunk at a time. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"

enum { CHUNK = 256 };

/* Shared scratch: gathered x [CHUNK,H], logits [CHUNK,V], dx [CHUNK,H], row numbers, and the
 * packed operand of whichever product runs. */
static size_t packed_floats(int64_t hidden, int64_t vocab) {
  return (size_t)(CHUNK + 48) * (size_t)((hidden > vocab ? hidden : vocab) + 48);
}

size_t mt_cpu_head_floats(const struct mt_limits *l) {
  return (size_t)CHUNK * (size_t)(2 * l->hidden + l->vocab) + CHUNK +
         packed_floats(l->hidden, l->vocab);
}

struct chunk {
  int64_t count;
  int32_t *row; /* [CHUNK] token of each gathered row */
  float *x, *logits, *dx, *packed;
};

static struct chunk chunk_open(const struct mt_backend *be, const struct mt_head_loss_args *a) {
  int64_t h = a->x.dim[1], v = a->w.dim[0];
  float *p = mt_cpu_shared_scratch(be, NULL);
  struct chunk c = {.row = (int32_t *)p};
  c.x = p + CHUNK;
  c.logits = c.x + CHUNK * h;
  c.dx = c.logits + CHUNK * v;
  c.packed = c.dx + CHUNK * h;
  return c;
}

/* Softmax and cross entropy of one gathered row; its logits become dlogits. */
static void row_loss(const struct mt_head_loss_args *a, const struct chunk *c, int64_t r) {
  int64_t v = a->w.dim[0], t = c->row[r], best = 0;
  int32_t label = a->labels[t];
  float *z = c->logits + r * v;
  for (int64_t i = 1; i < v; i++) best = z[i] > z[best] ? i : best;
  float top = z[best], target = z[label] - top;
  double sum = 0;
  for (int64_t i = 0; i < v; i++) z[i] -= top;
  mt_cpu_exp(z, z, v);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < v; i++) sum += (double)z[i];
  ((float *)a->loss.data)[t] = (float)(log(sum) - (double)target);
  if (a->correct) a->correct[t] = best == label;
  float scale = (float)((double)a->loss_scale / sum);
  for (int64_t i = 0; i < v; i++) z[i] *= scale;
  z[label] -= a->loss_scale;
}

static void chunk_run(const struct mt_backend *be, const struct mt_head_loss_args *a,
                      const struct chunk *c, int accumulate) {
  int64_t h = a->x.dim[1], v = a->w.dim[0], n = c->count;
  struct cpu_product logits = {.a = {c->x, MT_F32, h, 1},
                               .b = {a->w.data, a->w.dtype, 1, a->w.ld},
                               .c = {c->logits, MT_F32, v, 0},
                               .i_count = n,
                               .j_count = v,
                               .k_count = h};
  mt_cpu_products(be, &logits, 1);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < n; r++) row_loss(a, c, r);
  if (a->dx.data) {
    struct cpu_product dx = {.a = {c->logits, MT_F32, v, 1},
                             .b = {a->w.data, a->w.dtype, a->w.ld, 1},
                             .c = {c->dx, MT_F32, h, 0},
                             .i_count = n,
                             .j_count = h,
                             .k_count = v};
    mt_cpu_products(be, &dx, 1);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
    for (int64_t r = 0; r < n; r++) {
      float *dst = cpu_target(&a->dx, c->row[r], c->dx + r * h);
      if (dst != c->dx + r * h) memcpy(dst, c->dx + r * h, (size_t)h * sizeof *dst);
      cpu_write(&a->dx, c->row[r], h, dst);
    }
  }
  if (a->dw.data) {
    struct cpu_product dw = {.a = {c->logits, MT_F32, 1, v},
                             .b = {c->x, MT_F32, h, 1},
                             .c = {a->dw.data, MT_F32, a->dw.ld, accumulate},
                             .i_count = v,
                             .j_count = h,
                             .k_count = n};
    mt_cpu_products(be, &dw, 1);
  }
}

mt_err mt_cpu_head_loss(struct mt_backend *be, const struct mt_head_loss_args *a) {
  MT_TRY(mt_check_head_loss(a));
  MT_TRY(mt_cpu_format("head_loss", &a->x));
  int64_t rows = a->x.dim[0], h = a->x.dim[1], v = a->w.dim[0];
  size_t room;
  (void)mt_cpu_shared_scratch(be, &room);
  struct mt_limits limits = {.hidden = h, .vocab = v};
  if (mt_cpu_head_floats(&limits) > room) {
    return mt_fail(MT_ESHAPE, "head_loss: workspace too small for %lld x %lld", (long long)v,
                   (long long)h);
  }
  struct chunk c = chunk_open(be, a);
  int accumulate = a->accumulate;
  bool wrote = false;
  for (int64_t t = 0; t < rows || c.count > 0;) {
    for (; t < rows && c.count < CHUNK; t++) {
      if (a->labels[t] >= 0) {
        const float *x = cpu_read(&a->x, t, h, c.x + c.count * h);
        if (x != c.x + c.count * h) memcpy(c.x + c.count * h, x, (size_t)h * sizeof *x);
        c.row[c.count++] = (int32_t)t;
        continue;
      }
      ((float *)a->loss.data)[t] = 0;
      if (a->correct) a->correct[t] = 0;
      if (a->dx.data) {
        size_t item = mt_dtype_bytes(a->dx.dtype);
        memset((char *)a->dx.data + (size_t)(t * a->dx.ld) * item, 0, (size_t)h * item);
      }
    }
    if (c.count == 0) break;
    chunk_run(be, a, &c, accumulate);
    c.count = 0;
    accumulate = 1;
    wrote = true;
  }
  if (!wrote && a->dw.data && !a->accumulate) {
    for (int64_t i = 0; i < v; i++) {
      memset((float *)a->dw.data + i * a->dw.ld, 0, (size_t)h * sizeof(float));
    }
  }
  return MT_OK;
}
