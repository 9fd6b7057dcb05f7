/* One MoE block, router to combine and back, and each of its operations: what mt_moe_forward and
 * mt_moe_backward take on a model of one layer with random weights and tokens, so that the routing
 * is the one a random router makes. Medians on the backend's clock: the whole passes first, with
 * marks at their ends alone; then again with a mark after every operation, for the table (what lies
 * between two operations, a zeroing or a read-back, counts to the later one). Counted: 6 k T H F
 * floating-point operations forward and twice that backward, and bytes that each operation must
 * read and write at the least. The norm before the block is outside.
 *   moe_block [--json] [--loop] [--unfused] [--precision RECIPE,...] [--runs N] [backend]
 *             [TOKENS HIDDEN FFN EXPERTS TOP_K]...
 * Recipes: bf16 (float32 gradients of parameters) and bf16-states (bf16 ones), both unless told;
 * those in 8 bits (fp8-states) run with experts fused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "data/dataset.h"
#include "kernels/registry.h"
#include "model/layers.h"
#include "train/bench.h"

enum { WARM = 5, MOST_RUNS = 200, MOST_ROWS = 40, BLOCK = (1 << 20) + 7 };
enum { FWD, BWD, PHASES };
static const char *const phase_names[] = {"forward", "backward"};

struct size {
  int tokens, hidden, ffn, experts, top_k;
};

/* A line of the table: the calls of one operation with one weight. */
struct row {
  int phase;
  const char *op, *part;
  int calls;
  double flop, bytes, ms[MOST_RUNS];
};

static struct {
  struct mt_backend be;
  struct mt_ops real; /* be.ops are wrappers of these */
  struct size size;
  bool detail;
  int run, slot, phase;
  bool in_backward;
  int begin[PHASES], end[PHASES]; /* slots */
  int row_of[MT_STAMPS];          /* what ended at each slot, -1: nothing */
  struct row row[MOST_ROWS];
  int row_count;
} bench;

static mt_err mark(int row) {
  if (bench.slot == MT_STAMPS) return mt_fail(MT_EINVAL, "more operations than stamps");
  bench.row_of[bench.slot] = row;
  return bench.be.stamp(&bench.be, bench.slot++);
}

static mt_err begin(int phase) {
  bench.phase = phase;
  bench.begin[phase] = bench.slot;
  return mark(-1);
}

static mt_err end(void) {
  bench.end[bench.phase] = bench.slot;
  return mark(-1);
}

/* Finds or makes the row, and adds a call's work to it in the first run. */
static mt_err note(const char *op, const char *part, double flop, double bytes) {
  int i = 0;
  if (!bench.detail) return MT_OK;
  while (i < bench.row_count && (bench.row[i].phase != bench.phase || bench.row[i].op != op ||
                                 strcmp(bench.row[i].part, part) != 0))
    i++;
  if (i == MOST_ROWS) return mt_fail(MT_EINVAL, "more kinds of operations than rows");
  if (i == bench.row_count)
    bench.row[bench.row_count++] = (struct row){.phase = bench.phase, .op = op, .part = part};
  if (bench.run == 0) {
    bench.row[i].calls++;
    bench.row[i].flop += flop;
    bench.row[i].bytes += bytes;
  }
  return mark(i);
}

static double size_of(struct mt_tensor t) {
  return t.data ? (double)mt_bytes(&t) : 0;
}

static double least(double a, double b) {
  return a < b ? a : b;
}

/* Of rows that all have an expert, which is so here. */
static double product(struct mt_tensor rows, struct mt_tensor w) {
  return 2.0 * (double)rows.dim[0] * (double)w.dim[w.rank - 1] * (double)w.dim[w.rank - 2];
}

static const char *weight(struct mt_tensor w) {
  return w.dim[w.rank - 2] == 2 * (int64_t)bench.size.ffn ? "gate_up" : "down";
}

static const char *width(struct mt_tensor t) {
  return t.dim[1] == 1 ? "prob" : "";
}

/* X(operation, part, floating-point operations of a product or 0, bytes). */
#define BLOCK_OPS(X)                                                                               \
  X(router_fwd, "", 0, size_of(a->x) + size_of(a->w) + size_of(a->logits) + 2 * size_of(a->prob))  \
  X(permute_plan, "", 0, 12.0 * a->token_count * a->top_k)                                         \
  X(dispatch_fwd, width(a->x), 0, size_of(a->xs) + least(size_of(a->x), size_of(a->xs)))           \
  X(linear_fwd, weight(a->w), product(a->x, a->w), size_of(a->x) + size_of(a->w) + size_of(a->y))  \
  X(swiglu_fwd, "", 0, size_of(a->gate_up) + size_of(a->row_prob) + size_of(a->h))                 \
  X(experts_up_fwd, "", product(a->x, a->w),                                                       \
    size_of(a->x) + size_of(a->w) + size_of(a->gate_up) + size_of(a->h))                           \
  X(experts_down_dgrad, "", product(a->dy, a->w),                                                  \
    size_of(a->dy) + size_of(a->w) + size_of(a->gate_up) + size_of(a->dgate_up) + size_of(a->h))   \
  X(combine_fwd, "", 0, size_of(a->ys) + size_of(a->prob) + size_of(a->y))                         \
  X(scatter_add, "", 0, 3 * size_of(a->ys))                                                        \
  X(combine_bwd, "", 0, least(size_of(a->dy), size_of(a->dys)) + size_of(a->ys) + size_of(a->dys)) \
  X(linear_dgrad, weight(a->w), product(a->dy, a->w),                                              \
    size_of(a->dy) + size_of(a->w) + size_of(a->dx))                                               \
  X(swiglu_bwd, "", 0,                                                                             \
    size_of(a->dh) + size_of(a->gate_up) + size_of(a->dgate_up) + size_of(a->h) +                  \
        size_of(a->row_prob) + size_of(a->drow_prob))                                              \
  X(linear_wgrad, weight(a->dw), product(a->dy, a->dw),                                            \
    size_of(a->dy) + size_of(a->x) + size_of(a->dw))                                               \
  X(dispatch_bwd, width(a->dx), 0, size_of(a->dxs) + size_of(a->dx))                               \
  X(router_bwd, "", 0,                                                                             \
    size_of(a->x) + size_of(a->w) + size_of(a->dw) + size_of(a->logits) + 2 * size_of(a->dprob) +  \
        size_of(a->dx) * (1 + a->accumulate_dx))

#define X(op, part, flop, bytes)                                                                   \
  static mt_err timed_##op(struct mt_backend *be, const struct mt_##op##_args *a) {                \
    MT_TRY(bench.real.op(be, a));                                                                  \
    return note(#op, part, flop, bytes);                                                           \
  }
BLOCK_OPS(X)
#undef X

/* The block begins after the norm and its backward ends before it. Backward makes the norm's output
 * again, which is the block's own cost. */
static mt_err timed_rmsnorm_fwd(struct mt_backend *be, const struct mt_rmsnorm_fwd_args *a) {
  MT_TRY(bench.real.rmsnorm_fwd(be, a));
  return bench.in_backward ? MT_OK : begin(FWD);
}

static mt_err timed_rmsnorm_bwd(struct mt_backend *be, const struct mt_rmsnorm_bwd_args *a) {
  MT_TRY(end());
  return bench.real.rmsnorm_bwd(be, a);
}

static void wrap_operations(void) {
  bench.real = bench.be.ops;
  bench.be.ops.rmsnorm_fwd = timed_rmsnorm_fwd;
  bench.be.ops.rmsnorm_bwd = timed_rmsnorm_bwd;
#define X(op, part, flop, bytes) bench.be.ops.op = timed_##op;
  BLOCK_OPS(X)
#undef X
}

/* Normal numbers, one block of them again and again (making billions would take minutes). */
static mt_err fill(struct mt_tensor t, double scale, uint64_t stream) {
  struct mt_backend *be = &bench.be;
  size_t item = mt_dtype_bytes(t.dtype);
  double *values = malloc(BLOCK * sizeof *values);
  char *rounded = malloc(BLOCK * sizeof *values);
  mt_err err = values && rounded ? MT_OK : mt_fail(MT_ENOMEM, "random numbers");
  struct mt_rng rng = mt_rng_make(1, stream);
  int64_t n = mt_count(&t);
  for (int64_t i = 0; !err && i < BLOCK && i < n; i++) values[i] = scale * mt_rng_normal(&rng);
  if (!err) err = mt_dtype_convert(rounded, t.dtype, values, MT_F64, BLOCK < n ? BLOCK : (size_t)n);
  for (int64_t at = 0; !err && at < n; at += BLOCK) {
    size_t count = (size_t)(n - at < BLOCK ? n - at : BLOCK);
    err = be->upload(be, (char *)t.data + (size_t)at * item, rounded, count * item);
  }
  if (!err) err = be->sync(be);
  free(values);
  free(rounded);
  return err;
}

static mt_err ones(struct mt_tensor t) {
  size_t n = (size_t)mt_count(&t);
  double *values = malloc(n * sizeof *values);
  void *rounded = malloc(n * sizeof *values);
  mt_err err = values && rounded ? MT_OK : mt_fail(MT_ENOMEM, "a norm's weight");
  for (size_t i = 0; !err && i < n; i++) values[i] = 1;
  if (!err) err = mt_dtype_convert(rounded, t.dtype, values, MT_F64, n);
  if (!err) err = bench.be.upload(&bench.be, t.data, rounded, mt_bytes(&t));
  if (!err) err = bench.be.sync(&bench.be);
  free(values);
  free(rounded);
  return err;
}

static mt_err make_model(struct mt_model *m, const struct size *z, const struct mt_recipe *recipe,
                         enum mt_experts_strategy experts, enum mt_blocks_strategy blocks) {
  /* Attention and head are no part of this: as small as they can be. */
  struct mt_config c = {.model_type = "mixtral",
                        .hidden = z->hidden,
                        .ffn = z->ffn,
                        .layers = 1,
                        .heads = 1,
                        .kv_heads = 1,
                        .head_dim = 64,
                        .experts = z->experts,
                        .top_k = z->top_k,
                        .vocab = 64,
                        .rms_eps = 1e-5,
                        .rope_theta = 1e6,
                        .layer[0].renormalize = true};
  struct mt_model_options o = {.experts = experts,
                               .blocks = blocks,
                               .training = true,
                               .token_capacity = z->tokens,
                               .sequence_capacity = 1};
  struct mt_params params;
  MT_TRY(mt_config_check(&c));
  MT_TRY(mt_params_build(&c, NULL, &params));
  for (int i = 0; i < params.count; i++) {
    enum mt_param_kind kind = params.row[i].kind;
    params.row[i].learns = kind == MT_PARAM_MLP_NORM || kind == MT_PARAM_ROUTER ||
                           kind == MT_PARAM_GATE_UP || kind == MT_PARAM_DOWN;
  }
  MT_TRY(mt_model_create(m, &c, &params, recipe, &bench.be, &o));
  for (int i = 0; i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    if (!p->learns) continue;
    if (p->rank == 1)
      MT_TRY(ones(p->compute));
    else
      MT_TRY(fill(p->compute.data ? p->compute : p->master, 0.02, (uint64_t)i));
  }
  MT_TRY(mt_model_quantize_weights(m));
  struct mt_batch batch = {0};
  mt_acts_enter(&m->acts, &bench.be, MT_ROOM_MOE);
  mt_err err = mt_random_batch(&batch, 0, 1, z->tokens, 64, 1);
  if (!err) err = mt_acts_load(&m->acts, &bench.be, &batch);
  if (!err) err = bench.be.sync(&bench.be);
  mt_batch_destroy(&batch);
  MT_TRY(err);
  return fill(m->acts.layer[0].s1, 1, 100);
}

/* Forward and backward once, from the same tokens and the same gradient ds. */
static mt_err pass(struct mt_model *m, struct mt_tensor ds) {
  struct mt_backend *be = &bench.be;
  struct mt_acts *a = &m->acts;
  struct mt_view v = {.tokens = ds.dim[0], .sequences = 1};
  bench.slot = 0;
  bench.in_backward = false;
  MT_TRY(be->zero(be, a->branch.data, mt_bytes(&a->branch)));
  MT_TRY(be->zero(be, a->aux_prob.data, mt_bytes(&a->aux_prob)));
  MT_TRY(be->zero(be, a->aux_count, (size_t)m->config.experts * sizeof(int32_t)));
  MT_TRY(bench.real.add(be, &(struct mt_add_args){.a = ds, .b = a->branch, .y = a->ds}));
  MT_TRY(mt_moe_forward(m, 0, &v));
  MT_TRY(end());
  MT_TRY(begin(BWD));
  bench.in_backward = true;
  return mt_moe_backward(m, 0, &v);
}

/* The passes' times, and in detail the operations'. */
static mt_err read_times(double ms[PHASES][MOST_RUNS]) {
  struct mt_backend *be = &bench.be;
  double seconds;
  for (int p = 0; p < PHASES && !bench.detail; p++) {
    MT_TRY(be->stamp_read(be, bench.begin[p], bench.end[p], &seconds));
    ms[p][bench.run] = seconds * 1e3;
  }
  for (int i = 1; i < bench.slot; i++) {
    if (bench.row_of[i] < 0) continue;
    MT_TRY(be->stamp_read(be, i - 1, i, &seconds));
    bench.row[bench.row_of[i]].ms[bench.run] += seconds * 1e3;
  }
  return MT_OK;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, ascending);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

static mt_err measure(struct mt_model *m, struct mt_tensor ds, int runs, bool table, double *ms) {
  static double all[PHASES][MOST_RUNS];
  bench.row_count = 0;
  for (int detail = 0; detail <= (table ? 1 : 0); detail++) {
    bench.detail = detail;
    for (int i = -WARM; i < runs; i++) {
      bench.run = i < 0 ? 0 : i;
      if (i <= 0) bench.row_count = 0; /* what the warm-up noted */
      MT_TRY(pass(m, ds));
      MT_TRY(read_times(all));
    }
  }
  for (int p = 0; p < PHASES; p++) ms[p] = median(all[p], runs);
  return MT_OK;
}

struct result {
  const struct size *size;
  const char *recipe, *experts, *blocks;
  enum mt_dtype weights, gradients;
  int runs;
  int least_rows, most_rows; /* of an expert */
  double ms[PHASES];
};

static double flop_of(const struct size *z, int phase) {
  return (phase == FWD ? 6.0 : 12.0) * z->top_k * z->tokens * (double)z->hidden * z->ffn;
}

/* What a phase must read and write. Weights and their gradients do not shrink with the tokens. */
static void print_bytes(const struct result *r, int phase) {
  const struct size *z = r->size;
  double bytes = 0, experts = 3.0 * z->experts * (double)z->hidden * z->ffn;
  for (int i = 0; i < bench.row_count; i++) {
    if (bench.row[i].phase == phase) bytes += bench.row[i].bytes;
  }
  if (bytes <= 0) return;
  printf("  %.2f GB at the least, of which %.2f weights", bytes * 1e-9,
         experts * (double)mt_dtype_bytes(r->weights) * 1e-9);
  if (phase == BWD)
    printf(" and %.2f their gradients", experts * (double)mt_dtype_bytes(r->gradients) * 1e-9);
  printf("\n");
}

static void print_text(const struct result *r) {
  const struct size *z = r->size;
  printf(
      "%d tokens, hidden %d, ffn %d, %d experts of %d to %d rows, top-%d; %s, experts %s, blocks "
      "%s; %s%s%s\n",
      z->tokens, z->hidden, z->ffn, z->experts, r->least_rows, r->most_rows, z->top_k, r->recipe,
      r->experts, r->blocks, bench.be.name, bench.be.description[0] ? ", " : "",
      bench.be.description);
  for (int p = 0; p < PHASES; p++) {
    double sum = 0, ms[MOST_ROWS];
    printf("%-22s %9.3f ms %8.1f TFLOP/s  (median of %d)\n", phase_names[p], r->ms[p],
           flop_of(z, p) / r->ms[p] * 1e-9, r->runs);
    for (int i = 0; i < bench.row_count; i++) {
      ms[i] = median(bench.row[i].ms, r->runs);
      if (bench.row[i].phase == p) sum += ms[i];
    }
    for (int i = 0; i < bench.row_count; i++) {
      const struct row *w = &bench.row[i];
      if (w->phase != p) continue;
      printf("  %-18s %-7s %9.3f ms ", w->op, w->part, ms[i]);
      if (w->flop > 0)
        printf("%8.1f TFLOP/s", w->flop / ms[i] * 1e-9);
      else
        printf("%16s", "");
      printf(" %7.1f GB/s %5.1f%%", w->bytes / ms[i] * 1e-6, 100 * ms[i] / sum);
      if (w->calls > 1) printf("  %d calls", w->calls);
      printf("\n");
    }
    print_bytes(r, p);
  }
}

static void print_json(const struct result *r) {
  const struct size *z = r->size;
  printf("{\"tokens\": %d, \"hidden\": %d, \"ffn\": %d, \"experts\": %d, \"top_k\": %d, "
         "\"least_rows\": %d, \"most_rows\": %d, \"precision\": \"%s\", \"experts_way\": \"%s\", "
         "\"blocks\": \"%s\", \"backend\": \"%s\", \"device\": \"%s\", \"runs\": %d",
         z->tokens, z->hidden, z->ffn, z->experts, z->top_k, r->least_rows, r->most_rows, r->recipe,
         r->experts, r->blocks, bench.be.name, bench.be.description, r->runs);
  for (int p = 0; p < PHASES; p++) {
    printf(", \"%s_ms\": %.4f, \"%s_tflops\": %.2f", phase_names[p], r->ms[p], phase_names[p],
           flop_of(z, p) / r->ms[p] * 1e-9);
  }
  printf(", \"operations\": [");
  for (int i = 0; i < bench.row_count; i++) {
    struct row *w = &bench.row[i];
    double ms = median(w->ms, r->runs);
    printf("%s{\"phase\": \"%s\", \"op\": \"%s\", \"part\": \"%s\", \"calls\": %d, \"ms\": %.4f, "
           "\"tflops\": %.2f, \"gb_s\": %.1f}",
           i ? ", " : "", phase_names[w->phase], w->op, w->part, w->calls, ms, w->flop / ms * 1e-9,
           w->bytes / ms * 1e-6);
  }
  printf("]}\n");
}

struct options {
  const char *backend, *precision;
  bool json, loop, unfused;
  int runs;
};

static mt_err one_size(const struct size *z, const struct options *o, const char *precision) {
  struct mt_model m = {0};
  struct mt_tensor ds = {0};
  int32_t load[MT_MAX_EXPERTS];
  static const char *const names[] = {"loop", "grouped", "fused"};
  const struct mt_recipe *recipe = mt_recipe_find(precision);
  if (!recipe) return mt_fail(MT_EUNSUPPORTED, "no precision '%s'", precision);
  enum mt_experts_strategy experts = o->loop                        ? MT_EXPERTS_LOOP
                                     : recipe->qformat == MT_Q_NONE ? MT_EXPERTS_GROUPED
                                                                    : MT_EXPERTS_FUSED;
  struct result r = {.size = z,
                     .recipe = precision,
                     .experts = names[experts],
                     .blocks = o->unfused ? "unfused" : "fused",
                     .weights = recipe->act,
                     .gradients = recipe->grad,
                     .runs = o->runs,
                     .least_rows = z->tokens};
  mt_err err;
  bench.size = *z;
  MT_GO(make_model(&m, z, recipe, experts, o->unfused ? MT_BLOCKS_UNFUSED : MT_BLOCKS_FUSED));
  struct mt_tensor shape = m.acts.ds;
  MT_GO(bench.be.mem_alloc(&bench.be, mt_bytes(&shape), &shape.data));
  ds = shape;
  MT_GO(fill(ds, 1e-3, 101));
  MT_GO(measure(&m, ds, o->runs, !o->loop || z->experts <= 64, r.ms));
  MT_GO(
      bench.be.download(&bench.be, load, m.acts.layer[0].load, (size_t)z->experts * sizeof *load));
  for (int e = 0; e < z->experts; e++) {
    if (load[e] < r.least_rows) r.least_rows = load[e];
    if (load[e] > r.most_rows) r.most_rows = load[e];
  }
  if (o->json)
    print_json(&r);
  else
    print_text(&r);
  fflush(stdout);
done:
  if (ds.data) bench.be.mem_free(&bench.be, ds.data, mt_bytes(&ds));
  if (m.be) mt_model_destroy(&m);
  return err;
}

static mt_err usage(void) {
  return mt_fail(MT_EINVAL, "moe_block [--json] [--loop] [--unfused] [--precision RECIPE,...] "
                            "[--runs N] [backend] [TOKENS HIDDEN FFN EXPERTS TOP_K]...");
}

/* sizes [16] (=), *count of them. */
static mt_err parse(int argc, char **argv, struct options *o, struct size *sizes, int *count) {
  int numbers[16 * 5], n = 0;
  for (int i = 1; i < argc; i++) {
    char *rest;
    long value = strtol(argv[i], &rest, 10);
    if (strcmp(argv[i], "--json") == 0)
      o->json = true;
    else if (strcmp(argv[i], "--loop") == 0)
      o->loop = true;
    else if (strcmp(argv[i], "--unfused") == 0)
      o->unfused = true;
    else if (strcmp(argv[i], "--precision") == 0 && i + 1 < argc)
      o->precision = argv[++i];
    else if (strcmp(argv[i], "--runs") == 0 && i + 1 < argc)
      o->runs = atoi(argv[++i]);
    else if (rest != argv[i] && *rest == '\0' && value > 0 && value <= 1 << 24 && n < 16 * 5)
      numbers[n++] = (int)value;
    else if (argv[i][0] != '-' && rest == argv[i])
      o->backend = argv[i];
    else
      return usage();
  }
  if (n % 5 || o->runs < 1 || o->runs > MOST_RUNS) return usage();
  for (int i = 0; i < n / 5; i++) {
    const int *z = numbers + 5 * (size_t)i;
    sizes[i] = (struct size){z[0], z[1], z[2], z[3], z[4]};
  }
  if (n) *count = n / 5;
  return MT_OK;
}

int main(int argc, char **argv) {
  struct size sizes[16] = {{2048, 4096, 14336, 8, 2},
                           {8192, 4096, 14336, 8, 2},
                           {16384, 4096, 14336, 8, 2},
                           {8192, 2048, 768, 128, 8}};
  struct options o = {.backend = "cuda", .runs = 20};
  char recipes[128];
  int count = 4;
  mt_err err;
  MT_GO(parse(argc, argv, &o, sizes, &count));
  MT_GO(mt_backend_create(&bench.be, o.backend, 0));
  wrap_operations();
  bool gpu = strncmp(o.backend, "cuda", 4) == 0;
  snprintf(recipes, sizeof recipes, "%s",
           o.precision ? o.precision
           : gpu       ? "bf16,bf16-states"
                       : "fp32");
  for (char *rest, *one = strtok_r(recipes, ",", &rest); one; one = strtok_r(NULL, ",", &rest)) {
    for (int i = 0; i < count; i++) MT_GO(one_size(&sizes[i], &o, one));
  }
done:
  if (err) fprintf(stderr, "moe_block: %s\n", mt_error_message());
  mt_backend_destroy(&bench.be);
  return err ? 1 : 0;
}
