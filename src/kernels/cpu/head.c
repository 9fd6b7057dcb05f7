/* Head with cross entropy: rows that have a target are gathered into chunks; logits exist for one
 * chunk at a time. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vexp.h"

/* Rows of a chunk: the more, the better the products; at most 32 MiB of logits where the vocabulary
 * allows. */
static int64_t chunk_rows(int64_t vocab) {
  int64_t rows = (8 << 20) / (vocab > 0 ? vocab : 1) / 8 * 8;
  return rows < 128 ? 128 : rows > 512 ? 512 : rows;
}

/* Floats between rows of logits: not a multiple of a page, or rows would share cache sets. */
static int64_t logits_ld(int64_t vocab) {
  int64_t ld = (vocab + 15) / 16 * 16;
  return ld % 1024 == 0 ? ld + 16 : ld;
}

/* Shared scratch: row numbers, gathered x [rows,H], dx [rows,H], logits [rows,ld]. */
size_t mt_cpu_head_floats(const struct mt_limits *l) {
  return (size_t)chunk_rows(l->vocab) * (size_t)(1 + 2 * l->hidden + logits_ld(l->vocab));
}

struct chunk {
  int64_t capacity, count, ld;
  int32_t *row; /* token of each gathered row */
  float *x, *logits, *dx;
};

static struct chunk chunk_open(const struct mt_backend *be, const struct mt_head_loss_args *a) {
  int64_t h = a->x.dim[1], v = a->w.dim[0];
  float *p = mt_cpu_shared_scratch(be, NULL);
  struct chunk c = {.capacity = chunk_rows(v), .ld = logits_ld(v), .row = (int32_t *)p};
  c.x = p + c.capacity;
  c.dx = c.x + c.capacity * h;
  c.logits = c.dx + c.capacity * h;
  return c;
}

static float row_max(const float *z, int64_t n) {
  enum { LANES = 32 };
  float lane[LANES], top = z[0];
  for (int l = 0; l < LANES; l++) lane[l] = top;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
#pragma omp simd
    for (int l = 0; l < LANES; l++) lane[l] = z[i + l] > lane[l] ? z[i + l] : lane[l];
  }
  for (; i < n; i++) top = z[i] > top ? z[i] : top;
  for (int l = 0; l < LANES; l++) top = lane[l] > top ? lane[l] : top;
  return top;
}

/* z = e^(z - top); returns its sum: float32 over short pieces, those in double. */
static double row_exp(float *z, int64_t n, float top) {
  double total = 0;
  for (int64_t i = 0; i < n; i += 256) {
    int64_t end = i + 256 < n ? i + 256 : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = i; j < end; j++) {
      z[j] = cpu_exp_one(z[j] - top);
      sum += z[j];
    }
    total += (double)sum;
  }
  return total;
}

/* Whether the label is the first of the largest logits. */
static int is_first(const float *z, int64_t label, float top) {
  if (!(z[label] == top)) return 0;
  for (int64_t i = 0; i < label; i++) {
    if (z[i] == top) return 0;
  }
  return 1;
}

/* Softmax and cross entropy of one gathered row; its logits become dlogits. */
static void row_loss(const struct mt_head_loss_args *a, const struct chunk *c, int64_t r) {
  int64_t v = a->w.dim[0], t = c->row[r];
  int32_t label = a->labels[t];
  float *z = c->logits + r * c->ld, top = row_max(z, v), target = z[label] - top;
  if (a->correct) a->correct[t] = is_first(z, label, top);
  double sum = row_exp(z, v, top);
  ((float *)a->loss.data)[t] = (float)(log(sum) - (double)target);
  if (!a->dx.data && !a->dw.data) return;
  float scale = (float)((double)*a->loss_scale / sum);
  for (int64_t i = 0; i < v; i++) z[i] *= scale;
  z[label] -= *a->loss_scale;
}

static void chunk_run(const struct mt_backend *be, const struct mt_head_loss_args *a,
                      const struct chunk *c, int accumulate) {
  int64_t h = a->x.dim[1], v = a->w.dim[0], n = c->count;
  struct cpu_product logits = {.a = {c->x, MT_F32, h, 1},
                               .b = {a->w.data, a->w.dtype, 1, a->w.ld},
                               .c = {c->logits, MT_F32, c->ld, 0},
                               .i_count = n,
                               .j_count = v,
                               .k_count = h};
  mt_cpu_products(be, &logits, 1);
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
  for (int64_t r = 0; r < n; r++) row_loss(a, c, r);
  if (a->dx.data) {
    struct cpu_product dx = {.a = {c->logits, MT_F32, c->ld, 1},
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
    struct cpu_product dw = {.a = {c->logits, MT_F32, 1, c->ld},
                             .b = {c->x, MT_F32, h, 1},
                             .c = {a->dw.data, a->dw.dtype, a->dw.ld, accumulate},
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
    for (; t < rows && c.count < c.capacity; t++) {
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
    cpu_zero_columns(&a->dw, 0, h);
  }
  return MT_OK;
}

mt_err mt_cpu_tally(struct mt_backend *be, const struct mt_tally_args *a) {
  (void)be;
  MT_TRY(mt_check_tally(a));
  MT_TRY(mt_cpu_format("tally", &a->loss));
  const float *loss = a->loss.data;
  double sums[4] = {0, 0, *a->aux_weight * (double)*(const float *)a->aux.data, 0};
  if (a->z_loss.data) sums[3] = *a->aux_weight * (double)*(const float *)a->z_loss.data;
  for (int64_t t = 0; t < a->loss.dim[0]; t++) {
    sums[0] += (double)loss[t];
    sums[1] += a->correct[t];
  }
  for (int i = 0; i < 4; i++) a->sums[i] = (a->accumulate ? a->sums[i] : 0) + sums[i];
  for (int64_t i = 0; i < a->load_count; i++) {
    a->load_sums[i] = (a->accumulate ? a->load_sums[i] : 0) + a->load[i];
  }
  return MT_OK;
}
