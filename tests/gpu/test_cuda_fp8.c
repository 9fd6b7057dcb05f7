/* Products of FP8 operands on the GPU's tensor cores against float64 sums of the same stored
 * elements and scales. Blocks differ in their scales, outputs are poisoned, and a wrong scale of
 * one block must be seen. */
#include "gpu/ragged.h"
#include "quant/recipe.h"

#include "base/fp8.h"
#include "quant/linear.h"

enum kind { FWD, DGRAD, WGRAD, KINDS };
enum { BLOCK = 128, PAD = 8 };

static const char *const kind_name[] = {"fwd", "dgrad", "wgrad"};

struct shape {
  enum rows_of rows;
  int groups, n, k;
};
static const struct shape shapes[] = {
    {MIXED, 8, 512, 272},      {MIXED, 8, 272, 512},   {MIXED, 8, 144, 1040},
    {EVEN, 4, 768, 512},       {RANDOM, 130, 144, 80}, {NONE, 4, 256, 128},
    {RANDOM, 3, 16, 16},       {DENSE, 1, 512, 272},   {DENSE_ONE, 1, 640, 80},
    {ONE_EXPERT, 4, 528, 144}, {RANDOM, 3, 400, 640},  {RANDOM, 130, 1408, 80},
};

/* Element (i, d), d along the depth: e[i * ld + d] times scale[i / tall * by_row + d / 128 *
 * by_block]. */
struct operand {
  uint8_t *e;
  float *scale;
  int64_t ld, tall, by_row, by_block, scales;
  void *dev_scale;
};

struct product {
  enum kind kind;
  struct mt_backend *be;
  const struct shape *s;
  int32_t offsets[GROUPS_MOST + 1], padded[GROUPS_MOST + 1];
  int32_t *dev_offsets, *dev_padded; /* NULL: dense */
  struct mt_operand x, dy;
  struct mt_qtensor w;
  struct operand a, b;
  struct both out;
  int accumulate;
  int64_t rows;
};

static void *dev(struct mt_backend *be, size_t bytes) {
  void *p;
  OK(be->mem_alloc(be, bytes ? bytes : 4, &p));
  return p;
}

static struct operand fetch(struct mt_backend *be, const void *e, void *scale, int64_t elements,
                            struct operand o) {
  o.e = take((size_t)elements);
  o.scale = take((size_t)o.scales * sizeof(float));
  o.dev_scale = scale;
  OK(be->download(be, o.e, e, (size_t)elements));
  OK(be->download(be, o.scale, scale, (size_t)o.scales * sizeof(float)));
  return o;
}

static double element(const struct operand *o, int64_t i, int64_t d) {
  return (double)mt_e4m3_to_f32(o->e[i * o->ld + d]) *
         (double)o->scale[i / o->tall * o->by_row + d / BLOCK * o->by_block];
}

/* Random rows whose blocks have scales of their own, either way. */
static struct mt_operand quantized(struct product *p, struct mt_rng *rng, int64_t cols) {
  struct both x = make(p->be, rng, MT_BF16, 1, p->rows, cols, 0, p->rows);
  for (int64_t r = 0; r < p->rows; r++) {
    for (int64_t c = 0; c < cols; c++) {
      float *v = &x.host[r * cols + c];
      *v = ldexpf(*v, (int)((r / 32 * 5 + c / 64 * 3) % 5) - 2);
      ((uint16_t *)x.raw)[r * cols + c] = mt_f32_to_bf16(*v);
    }
  }
  OK(p->be->upload(p->be, x.dev.data, x.raw, x.bytes));
  struct mt_row_groups g = {
      .offsets = p->dev_offsets, .padded = p->dev_padded, .count = p->s->groups};
  size_t bytes = mt_operand_bytes(MT_Q_FP8, p->rows, cols, p->s->groups, MT_SIDE_BOTH);
  struct mt_operand o = {.format = MT_Q_FP8, .memory = dev(p->be, bytes)};
  void *poison = take(bytes);
  memset(poison, 0x7f, bytes);
  OK(p->be->upload(p->be, o.memory, poison, bytes));
  OK(mt_operand_make(p->be, &o, x.dev, p->rows, MT_SIDE_BOTH, &g));
  OK(p->be->sync(p->be));
  free(poison);
  drop(p->be, &x);
  return o;
}

static int64_t blocks(int64_t n) {
  return (n + BLOCK - 1) / BLOCK;
}

static struct operand rows_of_operand(struct product *p, const struct mt_qtensor *q) {
  int64_t k = q->dim[1];
  struct operand o = {.ld = k, .tall = 1, .by_row = 1, .by_block = q->scale_ld};
  o.scales = blocks(k) * q->scale_ld;
  return fetch(p->be, q->row, q->row_scale, q->dim[0] * k, o);
}
static struct operand columns_of_operand(struct product *p, const struct mt_qtensor *q) {
  struct operand o = {.ld = q->col_rows, .tall = 1, .by_row = 1, .by_block = q->dim[1]};
  o.scales = q->col_rows / BLOCK * q->dim[1];
  return fetch(p->be, q->col, q->col_scale, q->dim[1] * q->col_rows, o);
}
/* Of [matrices][rows][depth]; element() takes the rows of one matrix. */
static struct operand weight_operand(struct product *p, const uint8_t *e, void *scale, int64_t rows,
                                     int64_t depth) {
  struct operand o = {.ld = depth, .tall = BLOCK, .by_row = blocks(depth), .by_block = 1};
  o.scales = p->s->groups * blocks(rows) * blocks(depth);
  return fetch(p->be, e, scale, p->s->groups * rows * depth, o);
}

static void run(struct product *p) {
  struct mt_backend *be = p->be;
  OK(be->upload(be, p->out.dev.data, p->out.was, p->out.bytes));
  if (p->kind == FWD) {
    OK(be->ops.qlinear_fwd(
        be, &(struct mt_qlinear_fwd_args){
                .x = p->x.q, .w = p->w, .y = p->out.dev, .offsets = p->dev_offsets}));
  } else if (p->kind == DGRAD) {
    OK(be->ops.qlinear_dgrad(be, &(struct mt_qlinear_dgrad_args){.dy = p->dy.q,
                                                                 .w = p->w,
                                                                 .dx = p->out.dev,
                                                                 .offsets = p->dev_offsets,
                                                                 .accumulate = p->accumulate}));
  } else {
    struct mt_tensor dw = p->out.dev;
    if (p->dev_offsets)
      dw.rank = 3, dw.dim[0] = p->s->groups, dw.dim[1] = p->s->n, dw.dim[2] = p->s->k;
    OK(be->ops.qlinear_wgrad(be, &(struct mt_qlinear_wgrad_args){.dy = p->dy.q,
                                                                 .x = p->x.q,
                                                                 .dw = dw,
                                                                 .offsets = p->dev_offsets,
                                                                 .padded = p->dev_padded,
                                                                 .accumulate = p->accumulate}));
  }
  OK(be->download(be, p->out.raw, p->out.dev.data, p->out.bytes));
}

/* Row r of the output: its row of a, its matrix of b, what is summed. False: not to be written. */
static bool place(const struct product *p, int64_t r, int64_t *row, int64_t *g, int64_t *begin,
                  int64_t *end) {
  *begin = 0, *end = p->kind == FWD ? p->s->k : p->s->n;
  *row = r, *g = 0;
  if (p->kind == WGRAD) {
    *g = r / p->s->n, *row = r % p->s->n;
    *begin = p->padded[*g], *end = p->padded[*g + 1];
    return true;
  }
  if (r >= p->offsets[p->s->groups]) return false;
  while (r >= p->offsets[*g + 1]) ++*g;
  return true;
}

/* The largest error beyond the output's own rounding, over the sum of magnitudes; infinite for
 * elements that should not have been touched. */
static double worst_error(const struct product *p) {
  const struct both *out = &p->out;
  double worst = 0, rounding = out->dtype == MT_BF16 ? 0x1p-8 : 0x1p-23;
  size_t width = mt_dtype_bytes(out->dtype);
#pragma omp parallel for schedule(dynamic) reduction(max : worst)
  for (int64_t r = 0; r < out->rows; r++) {
    int64_t row, g, begin, end;
    bool inside = place(p, r, &row, &g, &begin, &end);
    const struct operand *b = &p->b;
    struct operand m = *b;
    if (p->kind != WGRAD) { /* matrix g of the weight */
      m.e += g * out->cols * b->ld;
      m.scale += g * blocks(out->cols) * b->by_row;
    }
    double *av = calloc((size_t)(end - begin + 1), sizeof *av);
    if (!av) abort();
    for (int64_t d = begin; inside && d < end; d++) av[d - begin] = element(&p->a, row, d);
    for (int64_t c = 0; c < out->ld; c++) {
      int64_t at = r * out->ld + c;
      if (!inside || c >= out->cols) {
        if (memcmp((char *)out->raw + at * (int64_t)width, (char *)out->was + at * (int64_t)width,
                   width) != 0)
          worst = INFINITY;
        continue;
      }
      double want = p->accumulate ? (double)out->host[at] : 0, size = fabs(want);
      for (int64_t d = begin; d < end; d++) {
        double x = av[d - begin] * element(&m, c, d);
        want += x, size += fabs(x);
      }
      double off = fabs((double)stored(out, out->raw, at) - want) - rounding * fabs(want);
      if (isnan(off)) off = INFINITY;
      if (off > 0) worst = fmax(worst, off / fmax(size, 1e-30));
    }
    free(av);
  }
  return worst;
}

/* Doubles one block's scale that the product reads, on the device alone; or back. */
static void spoil(struct product *p, struct operand *o, int64_t at, float by) {
  o->scale[at] *= by;
  OK(p->be->upload(p->be, o->dev_scale, o->scale, (size_t)o->scales * sizeof(float)));
  OK(p->be->sync(p->be));
}

/* Stored elements of a product and its output, made ready. */
static void make_product(struct product *p, struct mt_rng *rng, enum mt_dtype grad) {
  const struct shape *s = p->s;
  bool dense = s->rows == DENSE || s->rows == DENSE_ONE;
  int64_t filled = fill_offsets(p->offsets, s->rows, s->groups, rng);
  for (int g = 0; g < s->groups; g++)
    p->padded[g + 1] = p->padded[g] + (int)mt_q_padded(p->offsets[g + 1] - p->offsets[g]);
  p->rows = filled + (dense ? 0 : SLACK_ROWS);
  size_t bytes = (size_t)(s->groups + 1) * sizeof(int32_t);
  if (!dense) {
    p->dev_offsets = dev(p->be, bytes), p->dev_padded = dev(p->be, bytes);
    OK(p->be->upload(p->be, p->dev_offsets, p->offsets, bytes));
    OK(p->be->ops.pad_offsets(
        p->be, &(struct mt_pad_offsets_args){p->dev_offsets, s->groups, p->dev_padded}));
  }
  p->x = quantized(p, rng, s->k);
  p->dy = quantized(p, rng, s->n);
  struct both w =
      make(p->be, rng, MT_F32, 0.3, (int64_t)s->groups * s->n, s->k, 0, (int64_t)s->groups * s->n);
  if (!dense) w.dev.rank = 3, w.dev.dim[0] = s->groups, w.dev.dim[1] = s->n, w.dev.dim[2] = s->k;
  void *memory = dev(p->be, mt_qweight_bytes(MT_Q_FP8, w.dev.rank, w.dev.dim, MT_SIDE_BOTH));
  mt_qweight_shape(&p->w, MT_Q_FP8, w.dev.rank, w.dev.dim, MT_SIDE_BOTH, memory);
  OK(p->be->ops.quantize_weight(p->be, &(struct mt_quantize_weight_args){w.dev, p->w}));
  OK(p->be->sync(p->be));
  drop(p->be, &w);
  if (p->kind == FWD) {
    p->a = rows_of_operand(p, &p->x.q);
    p->b = weight_operand(p, p->w.row, p->w.row_scale, s->n, s->k);
  } else if (p->kind == DGRAD) {
    p->a = rows_of_operand(p, &p->dy.q);
    p->b = weight_operand(p, p->w.col, p->w.col_scale, s->k, s->n);
  } else {
    p->a = columns_of_operand(p, &p->dy.q);
    p->b = columns_of_operand(p, &p->x.q);
  }
  int64_t out_rows = p->kind == WGRAD ? (int64_t)s->groups * s->n : p->rows;
  p->out = make(p->be, rng, grad, 1, out_rows, p->kind == FWD ? s->n : s->k, PAD,
                p->accumulate ? (p->kind == WGRAD ? out_rows : filled) : 0);
}

static void drop_product(struct product *p) {
  struct mt_backend *be = p->be;
  be->mem_free(be, p->x.memory, 0);
  be->mem_free(be, p->dy.memory, 0);
  be->mem_free(be, p->w.row < p->w.col ? p->w.row : p->w.col, 0);
  if (p->dev_offsets) be->mem_free(be, p->dev_offsets, 0), be->mem_free(be, p->dev_padded, 0);
  free(p->a.e), free(p->a.scale), free(p->b.e), free(p->b.scale);
  drop(be, &p->out);
}

/* A scale that matters: of an element of the depth that the last group has. */
static bool wrong_scales_are_seen(struct product *p, double limit) {
  int64_t filled = p->offsets[p->s->groups];
  if (filled == 0) return true;
  int64_t g = p->s->groups - 1;
  while (p->offsets[g + 1] == p->offsets[g]) g--;
  int64_t a_at = p->kind == WGRAD ? p->padded[g] / BLOCK * p->a.by_block + 3 : p->offsets[g];
  int64_t b_at = p->kind == WGRAD ? p->padded[g] / BLOCK * p->b.by_block + 5
                                  : g * blocks(p->out.cols) * p->b.by_row;
  struct operand *o[2] = {&p->a, &p->b};
  int64_t at[2] = {a_at, b_at};
  bool seen = true;
  for (int i = 0; i < 2; i++) {
    spoil(p, o[i], at[i], 2);
    run(p);
    o[i]->scale[at[i]] /= 2; /* what the reference goes by */
    if (worst_error(p) <= limit) seen = false;
    spoil(p, o[i], at[i], 1);
  }
  return seen;
}

static void products(void **state) {
  (void)state;
  const double limit = mt_recipe_find("fp8")->sum_tolerance;
  struct mt_backend be;
  OK(mt_backend_create(&be, "cuda", 1));
  be.workspace_size_bytes = (size_t)1 << 30;
  OK(be.mem_alloc(&be, be.workspace_size_bytes, &be.workspace));
  int failures = 0;
  for (int kind = 0; kind < KINDS; kind++) {
    double worst = 0;
    for (size_t i = 0; i < shapes_tried; i++) {
      for (int way = 0; way < (kind == FWD ? 1 : kind == DGRAD ? 2 : 4); way++) {
        struct mt_rng rng = mt_rng_make(31 + i, (uint64_t)(4 * kind + way));
        struct product p = {
            .kind = (enum kind)kind, .be = &be, .s = &shapes[i], .accumulate = way & 1};
        make_product(&p, &rng, kind == WGRAD && !(way & 2) ? MT_F32 : MT_BF16);
        run(&p);
        double error = worst_error(&p);
        void *first = take(p.out.bytes);
        memcpy(first, p.out.raw, p.out.bytes);
        bool same = true;
        for (int again = 0; again < 2; again++) {
          be.makes_way = again == 1; /* in rounds: other blocks make the same tiles */
          run(&p);
          same &= memcmp(first, p.out.raw, p.out.bytes) == 0;
        }
        be.makes_way = false;
        bool seen = way != 0 || wrong_scales_are_seen(&p, limit);
        if (!(error <= limit) || !same || !seen) {
          failures++;
          print_error("%s groups %d n %d k %d rows %d way %d: error %.3g%s%s\n", kind_name[kind],
                      shapes[i].groups, shapes[i].n, shapes[i].k, (int)p.rows, way, error,
                      same ? "" : ", differs from run to run",
                      seen ? "" : ", a wrong scale is not seen");
        }
        worst = fmax(worst, error);
        free(first);
        drop_product(&p);
      }
    }
    print_message("  %-5s worst error %.2e\n", kind_name[kind], worst);
  }
  be.mem_free(&be, be.workspace, be.workspace_size_bytes);
  mt_backend_destroy(&be);
  assert_int_equal(failures, 0);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(products)};
  GPU_OR_SKIP();
  shapes_tried = shapes_asked(argc, argv, sizeof shapes / sizeof *shapes);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
