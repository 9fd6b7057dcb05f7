/* Norm of all gradients and AdamW: bound by memory, one pass each. */
#include <omp.h>

#include "kernels/cpu/cpu.h"
#include "kernels/rounding.h"

/* Elements of one task; sums are made per block, so they do not depend on the threads. */
enum { BLOCK = 1 << 16 };

/* Floats between what is computed and what is asked of memory: about its latency. */
enum { AHEAD = 512, LINE_FLOATS = 16 };

/* Elements of bfloat16 that are worked on at once, in float32 on the stack. */
enum { RUN = 256 };

static int64_t blocks_of(int64_t n) {
  return (n + BLOCK - 1) / BLOCK;
}

/* Squares in double: a float32 one is infinite from 1.9e19 on, where the gradient is not. Two
 * streams of independent sums, asked for well ahead: what the hardware prefetches of one stream
 * alone leaves half of the memory's rate unused. */
static double block_sumsq(const float *x, int64_t n) {
  enum { STREAMS = 2, LANES = 16 };
  double lane[STREAMS][LANES] = {{0}}, sum = 0;
  int64_t part = n / STREAMS / LANES * LANES;
  for (int64_t i = 0; i < part; i += LANES) {
#pragma GCC unroll 2
    for (int s = 0; s < STREAMS; s++) {
      const float *y = x + s * part + i;
      __builtin_prefetch(y + AHEAD, 0, 3);
#pragma omp simd
      for (int l = 0; l < LANES; l++) lane[s][l] += (double)y[l] * (double)y[l];
    }
  }
  for (int64_t i = STREAMS * part; i < n; i++) sum += (double)x[i] * (double)x[i];
  for (int s = 0; s < STREAMS; s++) {
    for (int l = 0; l < LANES; l++) sum += lane[s][l];
  }
  return sum;
}

static double block_sumsq_bf16(const uint16_t *x, int64_t n) {
  float wide[RUN];
  double sum = 0;
  for (int64_t i = 0; i < n; i += RUN) {
    int64_t count = n - i < RUN ? n - i : RUN;
    for (int64_t k = 0; k < count; k++) wide[k] = mt_bf16_to_f32(x[i + k]);
    sum += block_sumsq(wide, count);
  }
  return sum;
}

static double sumsq_at(const struct mt_tensor *t, int64_t begin, int64_t end) {
  if (t->dtype == MT_BF16) return block_sumsq_bf16((const uint16_t *)t->data + begin, end - begin);
  return block_sumsq((const float *)t->data + begin, end - begin);
}

mt_err mt_cpu_sumsq(struct mt_backend *be, const struct mt_sumsq_args *a) {
  MT_TRY(mt_check_sumsq(a));
  size_t room;
  double *partial = (double *)mt_cpu_shared_scratch(be, &room);
  double total = 0;
  for (int i = 0; i < a->tensor_count; i++) {
    const struct mt_tensor *t = &a->tensors[i];
    int64_t n = mt_count(t);
    MT_TRY(mt_cpu_format("sumsq", t));
    /* Rounds of as many blocks as the workspace holds sums for. */
    for (int64_t first = 0; first < blocks_of(n);) {
      int64_t count = blocks_of(n) - first, most = (int64_t)(room / 2);
      if (count > most) count = most;
#pragma omp parallel for num_threads(be->thread_count) schedule(static)
      for (int64_t b = 0; b < count; b++) {
        int64_t begin = (first + b) * BLOCK, end = begin + BLOCK < n ? begin + BLOCK : n;
        partial[b] = sumsq_at(t, begin, end);
      }
      for (int64_t b = 0; b < count; b++) total += partial[b];
      first += count;
    }
  }
  for (int i = 0; i < a->part_count; i++) total += a->parts[i];
  *a->out = total;
  return MT_OK;
}

struct update {
  struct mt_adamw_factors factors;
  float scale, keep;
  uint64_t seed;
  uint32_t step;
};

struct state {
  float *restrict w, *restrict m, *restrict v;
  const float *restrict g;
};

static inline __attribute__((always_inline)) void update_run(struct state s, int64_t begin,
                                                             int64_t count, struct update u) {
#pragma omp simd
  for (int64_t i = begin; i < begin + count; i++) {
    mt_adamw_one(&s.w[i], &s.m[i], &s.v[i], s.g[i], u.keep, u.scale, u.factors);
  }
}

static void update_block(const struct mt_adamw_segment *s, int64_t begin, int64_t end,
                         struct update u) {
  struct state x = {s->master.data, s->m.data, s->v.data, s->grad.data};
  int64_t line = begin;
  for (; line + LINE_FLOATS <= end; line += LINE_FLOATS) {
    __builtin_prefetch(x.w + line + AHEAD, 1, 3);
    __builtin_prefetch(x.m + line + AHEAD, 1, 3);
    __builtin_prefetch(x.v + line + AHEAD, 1, 3);
    __builtin_prefetch(x.g + line + AHEAD, 0, 3);
    update_run(x, line, LINE_FLOATS, u);
  }
  update_run(x, line, end - line, u);
  if (!s->compute.data) return;
  uint16_t *h = s->compute.data;
  for (int64_t i = begin; i < end; i++) h[i] = mt_f32_to_bf16(x.w[i]);
}

/* Random bits for the RUN elements from `begin` on: two elements a word, the lower one in its lower
 * half. */
static void random_run(struct update u, uint32_t tensor, uint32_t purpose, int64_t begin,
                       uint32_t *restrict bits) {
  uint64_t block = (uint64_t)begin / MT_ROUND_BLOCK;
#pragma omp simd
  for (int b = 0; b < RUN / MT_ROUND_BLOCK; b++) {
    mt_rounding_bits(u.seed, tensor, purpose, u.step, block + (uint64_t)b, &bits[4 * b],
                     &bits[4 * b + 1], &bits[4 * b + 2], &bits[4 * b + 3]);
  }
}

static inline __attribute__((always_inline)) void store_run(const float *restrict x,
                                                            const uint32_t *restrict bits,
                                                            int64_t count, uint32_t purpose,
                                                            uint16_t *restrict out) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits16 = bits[i / 2] >> (16 * (i % 2)) & 0xffffu;
    out[i] = mt_round_at_random(x[i], mt_rounding_addend(bits16, purpose));
  }
}

static void load_run(const struct mt_tensor *t, int64_t begin, int64_t count, float *restrict x) {
  const uint16_t *h = (const uint16_t *)t->data + begin;
  for (int64_t i = 0; i < count; i++) x[i] = mt_bf16_to_f32(h[i]);
}

/* begin is a multiple of RUN. */
static void update_block_bf16(const struct mt_adamw_segment *s, int64_t begin, int64_t end,
                              struct update u) {
  float w[RUN] = {0}, m[RUN] = {0}, v[RUN] = {0}, g[RUN] = {0};
  for (int64_t i = begin; i < end; i += RUN) {
    int64_t count = end - i < RUN ? end - i : RUN;
    uint32_t bits[RUN / 2];
    load_run(&s->master, i, count, w);
    load_run(&s->m, i, count, m);
    load_run(&s->v, i, count, v);
    load_run(&s->grad, i, count, g);
    update_run((struct state){w, m, v, g}, 0, RUN, u);
    random_run(u, s->tensor, MT_ROUND_WEIGHT, s->first + i, bits);
    store_run(w, bits, count, MT_ROUND_WEIGHT, (uint16_t *)s->master.data + i);
    random_run(u, s->tensor, MT_ROUND_M, s->first + i, bits); /* V's too */
    store_run(m, bits, count, MT_ROUND_M, (uint16_t *)s->m.data + i);
    store_run(v, bits, count, MT_ROUND_V, (uint16_t *)s->v.data + i);
  }
}

mt_err mt_cpu_adamw(struct mt_backend *be, const struct mt_adamw_args *a) {
  MT_TRY(mt_check_adamw(a));
  if (a->grad_sumsq && !isfinite(*a->grad_sumsq)) return MT_OK;
  double scale = 1;
  if (a->clip > 0 && a->grad_sumsq) scale = fmin(1.0, a->clip / (sqrt(*a->grad_sumsq) + 1e-6));
  for (int i = 0; i < a->segment_count; i++) {
    const struct mt_adamw_segment *s = &a->segments[i];
    MT_TRY(mt_cpu_format("adamw", &s->master));
    if (s->compute.data && s->compute.dtype != MT_BF16) {
      return mt_fail(MT_EUNSUPPORTED, "adamw: a rounded copy in %s",
                     mt_dtype_name(s->compute.dtype));
    }
  }
  struct update u = {.factors = {.beta1 = (float)a->beta1,
                                 .beta2 = (float)a->beta2,
                                 .step_size = (float)a->values->step_size,
                                 .root_c2 = (float)a->values->root_c2,
                                 .eps = (float)a->eps},
                     .scale = (float)scale,
                     .seed = a->values->seed,
                     .step = (uint32_t)a->values->step};
#pragma omp parallel num_threads(be->thread_count)
  for (int i = 0; i < a->segment_count; i++) {
    const struct mt_adamw_segment *s = &a->segments[i];
    int64_t n = s->master.dim[0];
    struct update mine = u;
    mine.keep = s->decay ? (float)a->values->keep : 1.0f;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < blocks_of(n); b++) {
      int64_t begin = b * BLOCK, end = begin + BLOCK < n ? begin + BLOCK : n;
      if (s->master.dtype == MT_BF16)
        update_block_bf16(s, begin, end, mine);
      else
        update_block(s, begin, end, mine);
    }
  }
  return MT_OK;
}
