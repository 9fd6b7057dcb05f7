/* Builds a decoder layer of attention and a mixture of experts from moetune's blocks, runs it
 * forward and back, and checks its gradients by finite differences in float64; then runs the same
 * layer in float32 and bfloat16 and says how far they lie from that. moe_layer [DEVICE]      (cpu,
 * or cuda where there is one) cc moe_layer.c $(pkg-config --cflags --libs moetune) -lm */
#include <moetune/blocks.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 24, H = 32, F = 48, E = 4, K = 2, R = T * K, PARAMETERS = 7 };
static const int32_t lengths[] = {16, 8}; /* two sequences in one row */

struct layer {
  mt_space *space;
  mt_block *attention, *norm, *experts;
  mt_router *router;
  mt_dispatcher *dispatcher;
  mt_array *parameter[PARAMETERS], *gradient[PARAMETERS];
  mt_array *x, *h, *xn, *xs, *ys, *moe, *y, *dy, *dx, *dh, *dxn, *dxs, *dys; /* activations */
  mt_array *prob, *dprob, *row_scale, *drow_scale, *index;
};

static void check(mt_err err) {
  if (!err) return;
  fprintf(stderr, "moe_layer: %s: %s\n", mt_err_name(err), mt_error_message());
  exit(1);
}

static mt_array *array(mt_space *s, enum mt_array_kind kind, int64_t rows, int64_t columns) {
  mt_array *a;
  check(mt_array_create(s, kind, columns ? 2 : 1, (const int64_t[]){rows, columns}, &a));
  return a;
}

/* Values in [-size, size) that depend on seed alone. */
static void fill(mt_array *a, double size, uint64_t seed) {
  double *v = malloc((size_t)mt_array_count(a) * sizeof *v);
  if (!v) exit(1);
  for (int64_t i = 0; i < mt_array_count(a); i++) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    v[i] = size * ((double)(seed >> 33) / 1073741824.0 - 1);
  }
  check(mt_array_write(a, v));
  free(v);
}

/* The layer in the recipe that is in force. */
static void build(struct layer *l, mt_space *s) {
  const struct mt_attention_shape attention = {.hidden = H,
                                               .heads = 4,
                                               .kv_heads = 2,
                                               .head_dim = 8,
                                               .rope_theta = 1e4,
                                               .norm_eps = 1e-5,
                                               .residual = 1};
  const struct mt_router_shape router = {.hidden = H, .experts = E, .top_k = K, .renormalize = 1};
  mt_block *parts[3];
  l->space = s;
  check(mt_attention_create(s, &attention, &l->attention));
  check(mt_norm_create(s, H, 1e-5, &l->norm));
  check(mt_router_create(s, &router, &l->router));
  check(mt_dispatcher_create(s, E, K, &l->dispatcher));
  check(mt_grouped_linear_create(s, E, H, 2 * F, &parts[0]));
  check(mt_scaled_swiglu_create(s, E, F, &parts[1]));
  check(mt_grouped_linear_create(s, E, F, H, &parts[2]));
  check(mt_sequence_create(s, parts, 3, 1, &l->experts)); /* becomes the fused chain */
  for (int i = 0; i < PARAMETERS; i++) {
    mt_block *b = i < 3 ? l->attention : i == 3 ? l->norm : l->experts;
    int k = i < 3 ? i : i == 3 ? 0 : i - 4;
    l->parameter[i] = i == 6 ? mt_router_parameter(l->router) : mt_block_parameter(b, k);
    l->gradient[i] = i == 6 ? mt_router_gradient(l->router) : mt_block_gradient(b, k);
    fill(l->parameter[i], i == 0 || i == 3 ? 1.5 : 0.4, (uint64_t)i + 1);
  }
  mt_array **const tokens[] = {&l->x,  &l->h,  &l->xn, &l->moe, &l->y,
                               &l->dy, &l->dx, &l->dh, &l->dxn};
  mt_array **const rows[] = {&l->xs, &l->ys, &l->dxs, &l->dys};
  for (int i = 0; i < 9; i++) *tokens[i] = array(s, MT_ARRAY_ACT, T, H);
  for (int i = 0; i < 4; i++) *rows[i] = array(s, MT_ARRAY_ACT, R, H);
  l->prob = array(s, MT_ARRAY_FULL, T, K);
  l->dprob = array(s, MT_ARRAY_FULL, T, K);
  l->row_scale = array(s, MT_ARRAY_FULL, R, 0);
  l->drow_scale = array(s, MT_ARRAY_FULL, R, 0);
  l->index = array(s, MT_ARRAY_INT, T, K);
  fill(l->x, 1, 100);
  fill(l->dy, 1, 200);
}

static void forward(struct layer *l) {
  const struct mt_rows_info sequences = {.sequence_lengths = lengths, .sequence_count = 2};
  check(mt_block_forward(l->attention, l->x, &sequences, l->h));
  check(mt_block_forward(l->norm, l->h, NULL, l->xn));
  check(mt_router_forward(l->router, l->xn, l->prob, l->index));
  check(mt_dispatcher_plan(l->dispatcher, l->index));
  check(mt_dispatch_forward(l->dispatcher, l->xn, l->xs));
  check(mt_dispatch_prob_forward(l->dispatcher, l->prob, l->row_scale));
  const struct mt_rows_info routed = {.offsets = mt_dispatcher_offsets(l->dispatcher),
                                      .row_scale = l->row_scale};
  check(mt_block_forward(l->experts, l->xs, &routed, l->ys));
  check(mt_combine_forward(l->dispatcher, l->ys, NULL, l->moe));
  check(mt_array_add(l->h, l->moe, l->y));
}

static void backward(struct layer *l) {
  check(mt_combine_backward(l->dispatcher, l->dy, NULL, NULL, l->dys, NULL));
  check(mt_block_backward(l->experts, l->dys, l->dxs, l->drow_scale, 0));
  check(mt_dispatch_backward(l->dispatcher, l->dxs, l->dxn));
  check(mt_dispatch_prob_backward(l->dispatcher, l->drow_scale, l->dprob));
  check(mt_router_backward(l->router, l->dprob, l->dxn, 0)); /* adds to dxn */
  check(mt_block_backward(l->norm, l->dxn, l->dh, NULL, 0));
  check(mt_array_add(l->dh, l->dy, l->dh)); /* the residual */
  check(mt_block_backward(l->attention, l->dh, l->dx, NULL, 0));
}

static void release(struct layer *l) {
  mt_array *const all[] = {l->x,   l->h,    l->xn,    l->xs,        l->ys,         l->moe,
                           l->y,   l->dy,   l->dx,    l->dh,        l->dxn,        l->dxs,
                           l->dys, l->prob, l->dprob, l->row_scale, l->drow_scale, l->index};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) mt_array_free(all[i]);
  mt_block_free(l->attention);
  mt_block_free(l->norm);
  mt_block_free(l->experts);
  mt_router_free(l->router);
  mt_dispatcher_free(l->dispatcher);
}

/* <y, dy>, of which backward gives the gradient. */
static double objective(struct layer *l) {
  double y[T * H], dy[T * H], sum = 0;
  forward(l);
  check(mt_array_read(l->y, y));
  check(mt_array_read(l->dy, dy));
  for (int i = 0; i < T * H; i++) sum += y[i] * dy[i];
  return sum;
}

/* Largest error of some of a gradient's elements against finite differences of what it is of. */
static double gradient_error(struct layer *l, mt_array *value, mt_array *gradient) {
  enum { PROBES = 16 };
  int64_t n = mt_array_count(value);
  double *v = malloc((size_t)n * sizeof *v), *g = malloc((size_t)n * sizeof *g), worst = 0,
         h = 1e-5;
  if (!v || !g) exit(1);
  check(mt_array_read(value, v));
  check(mt_array_read(gradient, g));
  for (int p = 0; p < PROBES; p++) {
    int64_t i = (2 * p + 1) * n / (2 * PROBES);
    double old = v[i], side[2];
    for (int k = 0; k < 2; k++) {
      v[i] = old + (k ? -h : h);
      check(mt_array_write(value, v));
      side[k] = objective(l);
    }
    v[i] = old;
    check(mt_array_write(value, v));
    worst = fmax(worst, fabs((side[0] - side[1]) / (2 * h) - g[i]) / (1 + fabs(g[i])));
  }
  free(v);
  free(g);
  return worst;
}

/* max |a - b| / max |b| */
static double distance(const mt_array *a, const double *b) {
  double x[T * H], most = 0, size = 0;
  check(mt_array_read(a, x));
  for (int i = 0; i < T * H; i++) {
    most = fmax(most, isfinite(x[i]) ? fabs(x[i] - b[i]) : INFINITY);
    size = fmax(size, fabs(b[i]));
  }
  return most / size;
}

int main(int argc, char **argv) {
  static const char *const names[PARAMETERS] = {"attention norm", "qkv",  "attention out", "norm",
                                                "gate_up",        "down", "router"};
  static const char *const recipes[] = {"fp32", "bf16"};
  static const double limits[] = {2e-5, 8e-2};
  struct layer l;
  mt_space *s;
  double y[T * H], dx[T * H];
  int bad = 0;
  check(mt_space_open("ref", 1, &s));
  build(&l, s);
  printf("fused chains %d\n", mt_sequence_fused_count(l.experts));
  forward(&l);
  backward(&l);
  check(mt_array_read(l.y, y));
  check(mt_array_read(l.dx, dx));
  for (int i = 0; i <= PARAMETERS; i++) {
    double e = i < PARAMETERS ? gradient_error(&l, l.parameter[i], l.gradient[i])
                              : gradient_error(&l, l.x, l.dx);
    printf("gradient of %-14s error %.1e\n", i < PARAMETERS ? names[i] : "x", e);
    bad |= !(e < 1e-6);
  }
  release(&l);
  mt_space_close(s);

  check(mt_space_open(argc > 1 ? argv[1] : "cpu", 0, &s));
  for (int i = 0; i < 2; i++) {
    check(mt_recipe_begin(s, recipes[i]));
    build(&l, s);
    forward(&l);
    backward(&l);
    check(mt_recipe_end(s));
    double ey = distance(l.y, y), ex = distance(l.dx, dx);
    printf("%s: y %.1e, dx %.1e from float64\n", recipes[i], ey, ex);
    bad |= !(ey < limits[i] && ex < limits[i]);
    release(&l);
  }
  mt_space_close(s);
  if (bad) printf("too far\n");
  return bad;
}
