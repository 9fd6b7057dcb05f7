/* Grouped and dense products of the CUDA backend, with the chip's own kernels and the portable
 * ones, against float64 sums of the same rounded inputs. Around the data lies NaN: rows past the
 * last group and columns past the views, which must neither leak in nor be written. The same bits
 * from run to run, also of products that make way for others. */
#include "gpu/ragged.h"

enum kind { FWD, DGRAD, WGRAD, KINDS };

static const char *const kind_name[] = {"fwd", "dgrad", "wgrad"};

/* A weight is [groups, n, k], or without groups (DENSE) [n, k]; pad: columns between the rows of
 * the activations' views. */
struct shape {
  enum rows_of rows;
  int groups, n, k, pad;
};
static const struct shape shapes[] = {
    {MIXED, 8, 128, 256, 0},   {MIXED, 8, 512, 264, 8},       {MIXED, 8, 264, 512, 0},
    {MIXED, 8, 136, 2048, 16}, {ONE_EXPERT, 4, 2600, 136, 0}, {ONE_EXPERT, 4, 520, 768, 8},
    {EVEN, 4, 768, 512, 0},    {RANDOM, 130, 136, 72, 0},     {RANDOM, 3, 2048, 768, 0},
    {NONE, 4, 256, 128, 0},    {RANDOM, 8, 200, 72, 3},       {MIXED, 8, 67, 131, 5},
    {RANDOM, 1, 640, 320, 0},  {RANDOM, 3, 8, 8, 0},          {DENSE, 1, 512, 264, 8},
    {DENSE, 1, 67, 131, 0},    {DENSE, 1, 128, 384, 3},       {DENSE_ONE, 1, 640, 80, 0},
    {DENSE, 1, 1, 8, 1},       {RANDOM, 130, 1400, 72, 0},
};

struct product {
  enum kind kind;
  struct both x, w, y; /* activations [R,k], weight [G*n,k], activations [R,n] */
  int32_t offsets[GROUPS_MOST + 1];
  int32_t *dev_offsets; /* NULL: dense */
  int groups, accumulate;
  double *dev_sumsq, sumsq; /* wgrad without columns beyond the view: else NULL */
};

static struct both *output(struct product *p) {
  return p->kind == FWD ? &p->y : p->kind == DGRAD ? &p->x : &p->w;
}

static void run(struct mt_backend *be, struct product *p) {
  struct both *out = output(p);
  struct mt_tensor w = p->w.dev;
  if (p->dev_offsets) {
    w.rank = 3;
    w.dim[0] = p->groups, w.dim[1] = p->w.rows / p->groups, w.dim[2] = p->w.cols;
  }
  OK(be->upload(be, out->dev.data, out->was, out->bytes));
  if (p->kind == FWD) {
    struct mt_linear_fwd_args a = {.x = p->x.dev, .w = w, .y = p->y.dev, .offsets = p->dev_offsets};
    OK(be->ops.linear_fwd(be, &a));
  } else if (p->kind == DGRAD) {
    struct mt_linear_dgrad_args a = {.dy = p->y.dev,
                                     .w = w,
                                     .dx = p->x.dev,
                                     .offsets = p->dev_offsets,
                                     .accumulate = p->accumulate};
    OK(be->ops.linear_dgrad(be, &a));
  } else {
    struct mt_linear_wgrad_args a = {.dy = p->y.dev,
                                     .x = p->x.dev,
                                     .dw = w,
                                     .offsets = p->dev_offsets,
                                     .accumulate = p->accumulate,
                                     .sumsq = p->dev_sumsq};
    if (p->dev_sumsq) OK(be->upload(be, p->dev_sumsq, &(double){NAN}, sizeof(double)));
    OK(be->ops.linear_wgrad(be, &a));
    if (p->dev_sumsq) OK(be->download(be, &p->sumsq, p->dev_sumsq, sizeof(double)));
  }
  OK(be->download(be, out->raw, out->dev.data, out->bytes));
}

/* What row r of the output must be: want [cols]; false where it must be left as it was. */
static bool expected_row(struct product *p, int64_t r, double *want) {
  struct both *out = output(p);
  int64_t n = p->w.rows / p->groups, k = p->w.cols;
  for (int64_t c = 0; c < out->cols; c++)
    want[c] = p->accumulate ? (double)out->host[r * out->ld + c] : 0;
  if (p->kind == WGRAD) {
    int64_t g = r / n;
    for (int64_t i = p->offsets[g]; i < p->offsets[g + 1]; i++) {
      double d = (double)p->y.host[i * p->y.ld + r % n];
      const float *x = p->x.host + i * p->x.ld;
      for (int64_t c = 0; c < k; c++) want[c] += d * (double)x[c];
    }
    return true;
  }
  if (r >= p->offsets[p->groups]) return false;
  int g = 0;
  while (r >= p->offsets[g + 1]) g++;
  const float *w = p->w.host + g * n * p->w.ld;
  for (int64_t i = 0; i < n; i++) {
    const float *row = w + i * p->w.ld;
    if (p->kind == FWD) {
      const float *x = p->x.host + r * p->x.ld;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < k; c++) sum += (double)x[c] * (double)row[c];
      want[i] += sum;
    } else {
      double d = (double)p->y.host[r * p->y.ld + i];
      for (int64_t c = 0; c < k; c++) want[c] += d * (double)row[c];
    }
  }
  return true;
}

/* The largest error of the rows looked at over the largest value; infinite where a NaN came in.
 * All rows where they are few, else random ones and those at the groups' ends. */
static double worst_error(struct product *p, struct mt_rng *rng) {
  struct both *out = output(p);
  int64_t per_row = p->kind == WGRAD ? p->w.cols * (p->offsets[p->groups] / p->groups + 1)
                                     : p->w.rows / p->groups * p->w.cols;
  int64_t count = WORK_MOST / (per_row + 1) + 1;
  bool all = count >= out->rows;
  if (all) count = out->rows;
  int64_t *rows = take((size_t)count * sizeof *rows);
  for (int64_t i = 0; i < count; i++) {
    rows[i] = all ? i : (int64_t)mt_rng_below(rng, (uint32_t)out->rows);
    bool ends = !all && p->kind != WGRAD && i < 2 * p->groups && p->offsets[p->groups] > 0;
    if (ends) rows[i] = p->offsets[i / 2 + i % 2] - i % 2;
    if (rows[i] < 0) rows[i] = 0;
  }
  double worst = 0, top = 0;
#pragma omp parallel for schedule(dynamic) reduction(max : worst, top)
  for (int64_t i = 0; i < count; i++) {
    double *want = malloc((size_t)out->cols * sizeof *want);
    if (want && expected_row(p, rows[i], want)) {
      for (int64_t c = 0; c < out->cols; c++) {
        double d = fabs((double)stored(out, out->raw, rows[i] * out->ld + c) - want[c]);
        worst = fmax(worst, isnan(d) ? INFINITY : d);
        top = fmax(top, fabs(want[c]));
      }
    }
    if (!want) worst = INFINITY;
    free(want);
  }
  free(rows);
  return worst == 0 ? 0 : worst / (top > 0 ? top : 1);
}

/* Elements written outside the groups' rows and the view's columns, NaN left inside. */
static int64_t strays(struct product *p) {
  struct both *out = output(p);
  size_t width = mt_dtype_bytes(out->dtype);
  int64_t filled = p->kind == WGRAD ? out->rows : p->offsets[p->groups], bad = 0;
#pragma omp parallel for reduction(+ : bad)
  for (int64_t r = 0; r < out->rows; r++) {
    for (int64_t c = 0; c < out->ld; c++) {
      size_t i = (size_t)(r * out->ld + c);
      bool inside = r < filled && c < out->cols;
      if (inside)
        bad += isnan(stored(out, out->raw, (int64_t)i));
      else
        bad += memcmp((char *)out->raw + i * width, (char *)out->was + i * width, width) != 0;
    }
  }
  return bad;
}

/* How far the sum of squares is from that of what is stored. */
static double sumsq_error(struct product *p) {
  if (!p->dev_sumsq) return 0;
  int64_t n = p->w.rows * p->w.cols;
  double sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    double x = (double)stored(&p->w, p->w.raw, i);
    sum += x * x;
  }
  double d = fabs(p->sumsq - sum);
  return isnan(d) ? INFINITY : sum > 0 ? d / sum : d;
}

static double try_one(struct mt_backend *be, const struct shape *s, enum kind kind,
                      enum mt_dtype act, int way, struct mt_rng *rng) {
  int accumulate = way & 1;
  enum mt_dtype grad = way & 2 ? act : MT_F32;
  struct product p = {.kind = kind, .groups = s->groups, .accumulate = accumulate};
  bool dense = s->rows == DENSE || s->rows == DENSE_ONE;
  int64_t filled = fill_offsets(p.offsets, s->rows, s->groups, rng),
          rows = filled + (dense ? 0 : SLACK_ROWS);
  int64_t w_rows = (int64_t)s->groups * s->n;
  bool wgrad = kind == WGRAD;
  p.x = make(be, rng, act, 1, rows, s->k, s->pad, kind == DGRAD && !accumulate ? 0 : filled);
  p.y = make(be, rng, act, 1, rows, s->n, s->pad, kind == FWD ? 0 : filled);
  p.w = make(be, rng, wgrad ? grad : act, 1, w_rows, s->k, wgrad ? s->pad : 0,
             wgrad && !accumulate ? 0 : w_rows);
  size_t offsets_bytes = (size_t)(s->groups + 1) * sizeof *p.offsets;
  void *data;
  OK(be->mem_alloc(be, offsets_bytes, &data));
  OK(be->upload(be, data, p.offsets, offsets_bytes));
  p.dev_offsets = dense ? NULL : data;
  void *sumsq = NULL;
  if (wgrad && s->pad == 0) OK(be->mem_alloc(be, sizeof(double), &sumsq));
  p.dev_sumsq = sumsq;

  struct both *out = output(&p);
  run(be, &p);
  double error = worst_error(&p, rng);
  int64_t stray = strays(&p);
  void *first = take(out->bytes);
  memcpy(first, out->raw, out->bytes);
  double first_sumsq = p.sumsq, off = sumsq_error(&p);
  bool same = true;
  for (int again = 0; again < 2; again++) {
    be->makes_way = again == 1; /* in rounds: other blocks make the same tiles */
    run(be, &p);
    same &= memcmp(first, out->raw, out->bytes) == 0 && p.sumsq == first_sumsq;
  }
  be->makes_way = false;
  free(first);
  double limit = out->dtype == MT_BF16 ? 6e-3 : 1e-5;
  if (!(error <= limit) || stray || !same || !(off <= 5e-7)) {
    print_error("%s %s %s to %s %s groups %d n %d k %d pad %d rows %d acc %d: error %.2g of %.0g, "
                "%lld strays, squares off by %.2g, %s\n",
                be->name, mt_dtype_name(act), kind_name[kind], mt_dtype_name(out->dtype),
                dense ? "dense" : "grouped", s->groups, s->n, s->k, s->pad, (int)filled, accumulate,
                error, limit, (long long)stray, off, same ? "repeats" : "DIFFERS from run to run");
    error = INFINITY;
  }
  if (sumsq) be->mem_free(be, sumsq, sizeof(double));
  be->mem_free(be, data, offsets_bytes);
  drop(be, &p.x), drop(be, &p.y), drop(be, &p.w);
  return error;
}

static void all_shapes(const char *backend, enum mt_dtype act) {
  struct mt_backend be;
  int failures = 0;
  OK(mt_backend_create(&be, backend, 1));
  struct mt_limits limits = {.tokens = 512,
                             .rows = 2048,
                             .hidden = 64,
                             .ffn = 64,
                             .experts = 8,
                             .top_k = 2,
                             .vocab = 64,
                             .heads = 2,
                             .kv_heads = 2,
                             .head_dim = 64,
                             .act = act};
  be.workspace_size_bytes = be.workspace_bytes(&be, &limits);
  OK(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
  for (int kind = 0; kind < KINDS; kind++) {
    double worst = 0;
    for (size_t i = 0; i < shapes_tried; i++) {
      int ways = kind == FWD ? 1 : kind == DGRAD || act == MT_F32 ? 2 : 4;
      for (int way = 0; way < ways; way++) {
        struct mt_rng rng = mt_rng_make(17 + i, (uint64_t)(4 * kind + way));
        double error = try_one(&be, &shapes[i], (enum kind)kind, act, way, &rng);
        if (isinf(error))
          failures++;
        else
          worst = fmax(worst, error);
      }
    }
    print_message("  %-13s %-4s %-5s worst error %.2e\n", backend, mt_dtype_name(act),
                  kind_name[kind], worst);
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

static void portable_f32(void **state) {
  (void)state;
  all_shapes("cuda-portable", MT_F32);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(portable_bf16),
      cmocka_unit_test(portable_f32),
      cmocka_unit_test(native_bf16),
      cmocka_unit_test(native_f32),
  };
  GPU_OR_SKIP();
  shapes_tried = shapes_asked(argc, argv, sizeof shapes / sizeof *shapes);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
