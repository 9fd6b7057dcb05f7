/* experts_up_fwd and experts_down_dgrad of the CUDA backend: beside the two operations that each
 * stands for, on the same device (the same bits wherever nothing more is rounded), and beside
 * float64 sums. NaN lies in rows past the last group and in columns past the views. */
#include "gpu/gpu.h"
#include "gpu/ragged.h"

/* pad: columns between the rows of the activations' views. */
struct shape {
  enum rows_of rows;
  int groups, hidden, ffn, pad;
};
/* Joined on Hopper where ffn is a multiple of 64 and the rest of 8. */
static const struct shape shapes[] = {
    {MIXED, 8, 256, 256, 0},  {MIXED, 8, 64, 64, 0},     {MIXED, 8, 8, 192, 8},
    {MIXED, 8, 136, 640, 16}, {MIXED, 8, 1024, 320, 8},  {ONE_EXPERT, 4, 520, 768, 8},
    {EVEN, 4, 512, 1408, 0},  {RANDOM, 130, 72, 128, 0}, {RANDOM, 3, 768, 2048, 0},
    {NONE, 4, 128, 256, 0},   {RANDOM, 1, 320, 576, 0},  {RANDOM, 3, 2048, 448, 8},
    {RANDOM, 8, 72, 200, 3},  {MIXED, 8, 131, 67, 5},    {RANDOM, 40, 4096, 384, 0},
};

struct experts {
  struct mt_backend *be;
  const struct shape *s;
  struct mt_rng rng;
  int32_t offsets[GROUPS_MOST + 1], *dev_offsets;
  int filled, weighted, in_place;
  enum mt_dtype act;
  struct both prob;
  bool bad;
};

#define EXPECT(e, condition, ...)                                                                  \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      print_error("%s %s hidden %d ffn %d groups %d rows %d pad %d%s%s: ", (e)->be->name,          \
                  mt_dtype_name((e)->act), (e)->s->hidden, (e)->s->ffn, (e)->s->groups,            \
                  (e)->filled, (e)->s->pad, (e)->weighted ? " weighted" : "",                      \
                  (e)->in_place ? " in place" : "");                                               \
      print_error(__VA_ARGS__);                                                                    \
      print_error("\n");                                                                           \
      (e)->bad = true;                                                                             \
    }                                                                                              \
  } while (0)

static struct mt_tensor column(const struct both *x) {
  return mt_vec(x->dev.data, x->dtype, x->rows);
}

static struct mt_tensor weights(const struct both *x, int groups) {
  return mt_cube(x->dev.data, x->dtype, groups, x->rows / groups, x->cols);
}

static struct both activations(struct experts *e, double scale, int64_t cols, bool input) {
  return make(e->be, &e->rng, e->act, scale, e->filled + SLACK_ROWS, cols, e->s->pad,
              input ? e->filled : 0);
}

static void reset(struct experts *e, const struct both *x) {
  OK(e->be->upload(e->be, x->dev.data, x->was, x->bytes));
}

static void fetch(struct experts *e, struct both *x) {
  OK(e->be->download(e->be, x->raw, x->dev.data, x->bytes));
}

/* Elements written outside the groups' rows and the view's columns, NaN left inside. */
static int64_t strays(struct experts *e, struct both *x) {
  size_t width = mt_dtype_bytes(x->dtype);
  int64_t bad = 0;
  for (int64_t r = 0; r < x->rows; r++) {
    for (int64_t c = 0; c < x->ld; c++) {
      size_t i = (size_t)(r * x->ld + c);
      if (r < e->filled && c < x->cols)
        bad += isnan(stored(x, x->raw, (int64_t)i));
      else
        bad += memcmp((char *)x->raw + i * width, (char *)x->was + i * width, width) != 0;
    }
  }
  return bad;
}

/* Largest difference of two outputs over the second's largest value; rows of the groups alone. */
static double distance(struct experts *e, const struct both *a, const struct both *b) {
  double off = 0, top = 0;
  for (int64_t r = 0; r < e->filled; r++) {
    for (int64_t c = 0; c < a->cols; c++) {
      double x = (double)stored(a, a->raw, r * a->ld + c);
      double y = (double)stored(b, b->raw, r * b->ld + c), d = fabs(x - y);
      off = fmax(off, isnan(d) ? INFINITY : d);
      top = fmax(top, fabs(y));
    }
  }
  return off == 0 ? 0 : off / (top > 0 ? top : 1);
}

/* Rows to hold against float64: a few, those at the groups' ends among them. */
static int64_t some_row(struct experts *e, int64_t i) {
  if (i < 2 * e->s->groups) {
    int64_t r = e->offsets[i / 2 + i % 2] - i % 2;
    return r < 0 ? 0 : r >= e->filled ? e->filled - 1 : r;
  }
  return (int64_t)mt_rng_below(&e->rng, (uint32_t)e->filled);
}

static int group_of(const struct experts *e, int64_t row) {
  int g = 0;
  while (row >= e->offsets[g + 1]) g++;
  return g;
}

static int64_t row_count(const struct experts *e) {
  int64_t count = WORK_MOST / ((int64_t)e->s->hidden * e->s->ffn) + 2 * e->s->groups;
  return e->filled == 0 ? 0 : count < e->filled ? count : e->filled;
}

static double weight_of(const struct experts *e, int64_t row) {
  return e->weighted ? (double)e->prob.host[row] : 1;
}

struct error {
  double off, top;
};
static void note(struct error *x, double got, double want) {
  double d = fabs(got - want);
  x->off = fmax(x->off, isnan(d) ? INFINITY : d);
  x->top = fmax(x->top, fabs(want));
}
static double share(const struct error *x) {
  return x->off == 0 ? 0 : x->off / (x->top > 0 ? x->top : 1);
}

/* What is stored in half a unit of the last place, or sums in float32. */
static double limit(const struct experts *e) {
  return e->act == MT_BF16 ? 6e-3 : 2e-5;
}

static void up_against_float64(struct experts *e, const struct both *x, const struct both *w,
                               const struct both *gu, const struct both *h) {
  struct error in_gu = {0, 0}, in_h = {0, 0};
  int64_t f = e->s->ffn, count = row_count(e);
  for (int64_t n = 0; n < count; n++) {
    int64_t r = some_row(e, n);
    const float *wg = w->host + group_of(e, r) * 2 * f * w->ld, *xr = x->host + r * x->ld;
    for (int64_t i = 0; i < 2 * f; i++) {
      double sum = 0;
      for (int64_t k = 0; k < x->cols; k++) sum += (double)xr[k] * (double)wg[i * w->ld + k];
      note(&in_gu, (double)stored(gu, gu->raw, r * gu->ld + i), sum);
      if (i >= f) continue;
      double g = (double)stored(gu, gu->raw, r * gu->ld + i);
      double u = (double)stored(gu, gu->raw, r * gu->ld + f + i);
      note(&in_h, (double)stored(h, h->raw, r * h->ld + i),
           g / (1 + exp(-g)) * u * weight_of(e, r));
    }
  }
  EXPECT(e, share(&in_gu) <= limit(e), "gate_up is off by %.2g", share(&in_gu));
  EXPECT(e, share(&in_h) <= limit(e), "h is off by %.2g of what its gate_up gives", share(&in_h));
}

static void try_up(struct experts *e) {
  int64_t f = e->s->ffn, hidden = e->s->hidden;
  struct both x = activations(e, 1, hidden, true);
  struct both w = make(e->be, &e->rng, e->act, 1.5 / sqrt((double)hidden), e->s->groups * 2 * f,
                       hidden, 0, e->s->groups * 2 * f);
  struct both gu = activations(e, 1, 2 * f, false), h = activations(e, 1, f, false);
  struct both gu2 = activations(e, 1, 2 * f, false), h2 = activations(e, 1, f, false);
  struct mt_experts_up_fwd_args a = {.x = x.dev,
                                     .w = weights(&w, e->s->groups),
                                     .offsets = e->dev_offsets,
                                     .gate_up = gu.dev,
                                     .h = h.dev};
  if (e->weighted) a.row_prob = column(&e->prob);
  OK(e->be->ops.experts_up_fwd(e->be, &a));
  fetch(e, &gu), fetch(e, &h);
  int64_t stray = strays(e, &gu) + strays(e, &h);
  EXPECT(e, stray == 0, "up: %lld strays", (long long)stray);
  up_against_float64(e, &x, &w, &gu, &h);

  OK(e->be->ops.linear_fwd(
      e->be,
      &(struct mt_linear_fwd_args){.x = x.dev, .w = a.w, .y = gu2.dev, .offsets = e->dev_offsets}));
  OK(e->be->ops.swiglu_fwd(e->be,
                           &(struct mt_swiglu_fwd_args){.gate_up = gu.dev,
                                                        .row_prob = a.row_prob,
                                                        .row_count = e->dev_offsets + e->s->groups,
                                                        .h = h2.dev}));
  fetch(e, &gu2), fetch(e, &h2);
  EXPECT(e, memcmp(gu.raw, gu2.raw, gu.bytes) == 0, "gate_up is not linear_fwd's, off by %.2g",
         distance(e, &gu, &gu2));
  EXPECT(e, memcmp(h.raw, h2.raw, h.bytes) == 0, "h is not swiglu_fwd's, off by %.2g",
         distance(e, &h, &h2));

  a.gate_up = gu2.dev, a.h = h2.dev;
  for (int i = 0; i < 3; i++) {
    reset(e, &gu2), reset(e, &h2);
    e->be->makes_way = i == 2; /* in rounds: other blocks make the same tiles */
    OK(e->be->ops.experts_up_fwd(e->be, &a));
    fetch(e, &gu2), fetch(e, &h2);
    EXPECT(e, memcmp(gu.raw, gu2.raw, gu.bytes) == 0 && memcmp(h.raw, h2.raw, h.bytes) == 0,
           "up differs from run to run");
  }
  e->be->makes_way = false;
  drop(e->be, &x), drop(e->be, &w), drop(e->be, &gu), drop(e->be, &h);
  drop(e->be, &gu2), drop(e->be, &h2);
}

struct down {
  struct both dy, w, gu, dgu, h, dprob;
};

static void down_against_float64(struct experts *e, const struct down *d) {
  struct error in_dgu = {0, 0}, in_h = {0, 0}, in_prob = {0, 0};
  int64_t f = e->s->ffn, count = row_count(e);
  double *dh = take((size_t)f * sizeof *dh);
  for (int64_t n = 0; n < count; n++) {
    int64_t r = some_row(e, n);
    const float *wg = d->w.host + group_of(e, r) * e->s->hidden * d->w.ld;
    double dp = 0, p = weight_of(e, r);
    memset(dh, 0, (size_t)f * sizeof *dh);
    for (int64_t k = 0; k < e->s->hidden; k++) {
      double dy = (double)d->dy.host[r * d->dy.ld + k];
      for (int64_t i = 0; i < f; i++) dh[i] += dy * (double)wg[k * d->w.ld + i];
    }
    for (int64_t i = 0; i < f; i++) {
      double g = (double)d->gu.host[r * d->gu.ld + i], u = (double)d->gu.host[r * d->gu.ld + f + i];
      double sig = 1 / (1 + exp(-g)), silu = g * sig;
      const struct both *out = e->in_place ? &d->gu : &d->dgu;
      note(&in_dgu, (double)stored(out, out->raw, r * out->ld + i),
           dh[i] * p * u * sig * (1 + g * (1 - sig)));
      note(&in_dgu, (double)stored(out, out->raw, r * out->ld + f + i), dh[i] * p * silu);
      note(&in_h, (double)stored(&d->h, d->h.raw, r * d->h.ld + i), silu * u * p);
      dp += dh[i] * silu * u;
    }
    if (e->weighted) note(&in_prob, (double)stored(&d->dprob, d->dprob.raw, r * d->dprob.ld), dp);
  }
  free(dh);
  /* Where dh is rounded, too, half as much again. */
  EXPECT(e, share(&in_dgu) <= 1.5 * limit(e), "dgate_up is off by %.2g", share(&in_dgu));
  EXPECT(e, share(&in_h) <= limit(e), "h again is off by %.2g", share(&in_h));
  EXPECT(e, share(&in_prob) <= limit(e), "drow_prob is off by %.2g", share(&in_prob));
}

static void run_down(struct experts *e, struct down *d) {
  struct both *out = e->in_place ? &d->gu : &d->dgu;
  struct mt_experts_down_dgrad_args a = {.dy = d->dy.dev,
                                         .w = weights(&d->w, e->s->groups),
                                         .offsets = e->dev_offsets,
                                         .gate_up = d->gu.dev,
                                         .dgate_up = out->dev,
                                         .h = d->h.dev};
  if (e->weighted) a.row_prob = column(&e->prob), a.drow_prob = column(&d->dprob);
  reset(e, &d->gu), reset(e, &d->dgu), reset(e, &d->h), reset(e, &d->dprob);
  OK(e->be->ops.experts_down_dgrad(e->be, &a));
  fetch(e, out), fetch(e, &d->h), fetch(e, &d->dprob);
}

static void compose_down(struct experts *e, struct down *d) {
  const int32_t *rows = e->dev_offsets + e->s->groups;
  struct mt_swiglu_bwd_args a = {.dh = d->h.dev,
                                 .gate_up = d->gu.dev,
                                 .row_count = rows,
                                 .dgate_up = d->dgu.dev,
                                 .h = d->h.dev};
  if (e->weighted) a.row_prob = column(&e->prob), a.drow_prob = column(&d->dprob);
  reset(e, &d->gu), reset(e, &d->dgu), reset(e, &d->h), reset(e, &d->dprob);
  OK(e->be->ops.linear_dgrad(e->be,
                             &(struct mt_linear_dgrad_args){.dy = d->dy.dev,
                                                            .w = weights(&d->w, e->s->groups),
                                                            .dx = d->h.dev,
                                                            .offsets = e->dev_offsets}));
  OK(e->be->ops.swiglu_bwd(e->be, &a));
  fetch(e, &d->dgu), fetch(e, &d->h), fetch(e, &d->dprob);
}

static struct both copy_of(const struct both *x) {
  struct both y = *x;
  y.raw = take(x->bytes);
  memcpy(y.raw, x->raw, x->bytes);
  return y;
}

static bool same(const struct both *a, const struct both *b) {
  return memcmp(a->raw, b->raw, a->bytes) == 0;
}

static void try_down(struct experts *e) {
  int64_t f = e->s->ffn, hidden = e->s->hidden;
  struct down d = {.dy = activations(e, 1, hidden, true),
                   .gu = activations(e, 1.5, 2 * f, true),
                   .dgu = activations(e, 1, 2 * f, false),
                   .h = activations(e, 1, f, false)};
  d.w = make(e->be, &e->rng, e->act, 1 / sqrt((double)hidden), e->s->groups * hidden, f, 0,
             e->s->groups * hidden);
  d.dprob = make(e->be, &e->rng, MT_F32, 1, e->filled + SLACK_ROWS, 1, 0, 0);
  struct both *out = e->in_place ? &d.gu : &d.dgu;

  run_down(e, &d);
  int64_t stray = strays(e, out) + strays(e, &d.h);
  if (e->weighted) stray += strays(e, &d.dprob);
  EXPECT(e, stray == 0, "down: %lld strays", (long long)stray);
  down_against_float64(e, &d);
  struct both dgu = copy_of(out), h = copy_of(&d.h), dprob = copy_of(&d.dprob);
  for (int i = 0; i < 3; i++) {
    e->be->makes_way = i == 2;
    run_down(e, &d);
    EXPECT(e, same(&dgu, out) && same(&h, &d.h) && same(&dprob, &d.dprob),
           "down differs from run to run");
  }
  e->be->makes_way = false;

  compose_down(e, &d);
  EXPECT(e, same(&h, &d.h), "h again is not swiglu_bwd's, off by %.2g", distance(e, &h, &d.h));
  double off = distance(e, &dgu, &d.dgu);
  EXPECT(e, off <= 2.5 * limit(e), "dgate_up is off by %.2g of swiglu_bwd's", off);
  off = e->weighted ? distance(e, &dprob, &d.dprob) : 0;
  EXPECT(e, off <= 2 * limit(e), "drow_prob is off by %.2g of swiglu_bwd's", off);
  free(dgu.raw), free(h.raw), free(dprob.raw);
  drop(e->be, &d.dy), drop(e->be, &d.w), drop(e->be, &d.gu), drop(e->be, &d.dgu);
  drop(e->be, &d.h), drop(e->be, &d.dprob);
}

static bool try_shape(struct mt_backend *be, enum mt_dtype act, const struct shape *s, int way) {
  struct experts e = {.be = be, .s = s, .act = act, .weighted = way & 1, .in_place = way >> 1 & 1};
  e.rng = mt_rng_make(91 + (uint64_t)(s - shapes), (uint64_t)way);
  e.filled = fill_offsets(e.offsets, s->rows, s->groups, &e.rng);
  size_t bytes = (size_t)(s->groups + 1) * sizeof *e.offsets;
  void *data;
  OK(be->mem_alloc(be, bytes, &data));
  OK(be->upload(be, data, e.offsets, bytes));
  e.dev_offsets = data;
  e.prob = make(be, &e.rng, MT_F32, 1, e.filled + SLACK_ROWS, 1, 0, e.filled);
  if (e.in_place == 0) try_up(&e);
  try_down(&e);
  drop(be, &e.prob);
  be->mem_free(be, data, bytes);
  return !e.bad;
}

static void all_shapes(const char *backend, enum mt_dtype act) {
  struct mt_backend be;
  int failures = 0;
  OK(mt_backend_create(&be, backend, 1));
  struct mt_limits limits = {.tokens = 4096,
                             .rows = 8192,
                             .hidden = 4096,
                             .ffn = 2048,
                             .experts = 160,
                             .top_k = 2,
                             .vocab = 64,
                             .heads = 2,
                             .kv_heads = 2,
                             .head_dim = 64,
                             .act = act};
  be.workspace_size_bytes = be.workspace_bytes(&be, &limits);
  OK(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
  for (size_t i = 0; i < shapes_tried; i++) {
    for (int way = 0; way < 4; way++) failures += !try_shape(&be, act, &shapes[i], way);
  }
  be.mem_free(&be, be.workspace, be.workspace_size_bytes);
  mt_backend_destroy(&be);
  assert_int_equal(failures, 0);
}

static void native_bf16(void **state) {
  (void)state;
  all_shapes("cuda", MT_BF16);
}

static void native_f32(void **state) {
  (void)state;
  all_shapes("cuda", MT_F32);
}

static void portable_bf16(void **state) {
  (void)state;
  all_shapes("cuda-portable", MT_BF16);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(portable_bf16),
      cmocka_unit_test(native_f32),
      cmocka_unit_test(native_bf16),
  };
  GPU_OR_SKIP();
  shapes_tried = shapes_asked(argc, argv, sizeof shapes / sizeof *shapes);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
