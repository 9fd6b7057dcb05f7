/* The building blocks through their header alone: chains against their parts, the two places where
 * routing probabilities may enter, gradients by finite differences, recipes, and misuse. What
 * single operations compute is tested in tests/kernels. */
#include "moetune/blocks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { E = 4, H = 24, F = 16, ROWS = 22 };
static const int32_t sizes[E] = {7, 0, 12, 3};

static void ok(mt_err err) {
  if (err) fail_msg("%s: %s", mt_err_name(err), mt_error_message());
}

static void fails(mt_err err, mt_err expected, const char *text) {
  if (err != expected || !strstr(mt_error_message(), text)) {
    fail_msg("'%s' (%s), expected '%s' naming '%s'", mt_err_name(err), mt_error_message(),
             mt_err_name(expected), text);
  }
}

static mt_space *space(const char *device) {
  mt_space *s;
  ok(mt_space_open(device, 2, &s));
  return s;
}

static mt_array *array(mt_space *s, enum mt_array_kind kind, int64_t rows, int64_t columns) {
  mt_array *a;
  ok(mt_array_create(s, kind, columns ? 2 : 1, (const int64_t[]){rows, columns}, &a));
  return a;
}

static double *values(const mt_array *a) {
  double *v = malloc((size_t)mt_array_count(a) * sizeof *v);
  assert_non_null(v);
  ok(mt_array_read(a, v));
  return v;
}

static void set(mt_array *a, double value) {
  double *v = values(a);
  for (int64_t i = 0; i < mt_array_count(a); i++) v[i] = value;
  ok(mt_array_write(a, v));
  free(v);
}

static void fill(mt_array *a, double size) {
  double *v = values(a);
  for (int64_t i = 0; i < mt_array_count(a); i++) v[i] = size * (2 * drand48() - 1);
  ok(mt_array_write(a, v));
  free(v);
}

static void near(const mt_array *a, const mt_array *b, double factor, double tolerance) {
  double *x = values(a), *y = values(b), size = 0;
  assert_int_equal(mt_array_count(a), mt_array_count(b));
  for (int64_t i = 0; i < mt_array_count(b); i++) size = fmax(size, fabs(factor * y[i]));
  assert_true(size > 1e-3 && isfinite(size)); /* else nothing is compared */
  for (int64_t i = 0; i < mt_array_count(b); i++) {
    if (!(fabs(x[i] - factor * y[i]) <= tolerance * size))
      fail_msg("element %lld: %g, expected %g", (long long)i, x[i], factor * y[i]);
  }
  free(x);
  free(y);
}

/* The experts as a sequence, with the same parameters each time. */
static mt_block *experts(mt_space *s, int fuse) {
  mt_block *part[3], *b;
  ok(mt_grouped_linear_create(s, E, H, 2 * F, &part[0]));
  ok(mt_scaled_swiglu_create(s, E, F, &part[1]));
  ok(mt_grouped_linear_create(s, E, F, H, &part[2]));
  ok(mt_sequence_create(s, part, 3, fuse, &b));
  srand48(7);
  fill(mt_block_parameter(b, 0), 0.5);
  fill(mt_block_parameter(b, 1), 0.5);
  assert_null(mt_block_parameter(b, 2));
  assert_null(mt_block_parameter(b, -1));
  assert_int_equal(mt_sequence_fused_count(b), fuse != 0);
  return b;
}

static void chain_is_its_parts(void **state) {
  (void)state;
  static const char *const device[] = {"cpu", "cpu", "ref"}, *const recipe[] = {"fp32", "bf16",
                                                                                "fp64"};
  static const double tolerance[] = {1e-5, 2e-2, 1e-12};
  for (int d = 0; d < 3; d++) {
    mt_space *s = space(device[d]);
    ok(mt_recipe_begin(s, recipe[d]));
    mt_array *offsets = array(s, MT_ARRAY_INT, E + 1, 0), *scale = array(s, MT_ARRAY_FULL, ROWS, 0);
    mt_array *x = array(s, MT_ARRAY_ACT, ROWS, H), *dy = array(s, MT_ARRAY_ACT, ROWS, H);
    mt_array *y[2], *dx[2], *dscale[2];
    mt_block *b[2];
    ok(mt_offsets_from_sizes(sizes, E, offsets));
    fill(x, 1);
    fill(dy, 1);
    fill(scale, 1);
    const struct mt_rows_info info = {.offsets = offsets, .row_scale = scale};
    for (int fuse = 0; fuse < 2; fuse++) {
      b[fuse] = experts(s, fuse);
      y[fuse] = array(s, MT_ARRAY_ACT, ROWS, H);
      dx[fuse] = array(s, MT_ARRAY_ACT, ROWS, H);
      dscale[fuse] = array(s, MT_ARRAY_FULL, ROWS, 0);
      mt_array *const written[] = {y[fuse], dx[fuse], dscale[fuse], mt_block_gradient(b[fuse], 0),
                                   mt_block_gradient(b[fuse], 1)};
      for (int i = 0; i < 5; i++) set(written[i], NAN);
      ok(mt_block_forward(b[fuse], x, &info, y[fuse]));
      ok(mt_block_backward(b[fuse], dy, dx[fuse], dscale[fuse], 0));
    }
    near(y[1], y[0], 1, tolerance[d]);
    near(dx[1], dx[0], 1, tolerance[d]);
    near(dscale[1], dscale[0], 1, tolerance[d]);
    for (int i = 0; i < 2; i++)
      near(mt_block_gradient(b[1], i), mt_block_gradient(b[0], i), 1, tolerance[d]);
    /* A second backward of the same forward, added to the first. */
    for (int fuse = 0; fuse < 2; fuse++) ok(mt_block_backward(b[fuse], dy, dx[fuse], NULL, 1));
    mt_block *once = experts(s, 1);
    ok(mt_block_forward(once, x, &info, y[0]));
    ok(mt_block_backward(once, dy, dx[0], NULL, 0));
    for (int fuse = 0; fuse < 2; fuse++) {
      for (int i = 0; i < 2; i++)
        near(mt_block_gradient(b[fuse], i), mt_block_gradient(once, i), 2, tolerance[d]);
    }
    mt_array *const all[] = {offsets, scale, x, dy, y[0], y[1], dx[0], dx[1], dscale[0], dscale[1]};
    for (int i = 0; i < 10; i++) mt_array_free(all[i]);
    mt_block_free(once);
    mt_block_free(b[0]);
    mt_block_free(b[1]);
    mt_space_close(s);
  }
}

/* Probabilities that weigh the outputs or enter with SwiGLU: the same output and gradients. */
static void probabilities_enter_anywhere(void **state) {
  (void)state;
  enum { T = 11, K = 2 };
  mt_space *s = space("ref");
  mt_dispatcher *d;
  mt_block *b[2] = {experts(s, 1), experts(s, 1)};
  mt_array *x = array(s, MT_ARRAY_ACT, T, H), *dy = array(s, MT_ARRAY_ACT, T, H);
  mt_array *xs = array(s, MT_ARRAY_ACT, T * K, H), *ys = array(s, MT_ARRAY_ACT, T * K, H);
  mt_array *dys = array(s, MT_ARRAY_ACT, T * K, H), *dxs = array(s, MT_ARRAY_ACT, T * K, H);
  mt_array *prob = array(s, MT_ARRAY_FULL, T, K), *index = array(s, MT_ARRAY_INT, T, K);
  mt_array *scale = array(s, MT_ARRAY_FULL, T * K, 0), *dscale = array(s, MT_ARRAY_FULL, T * K, 0);
  mt_array *y[2], *dx[2], *dprob[2];
  int32_t choice[T * K];
  ok(mt_dispatcher_create(s, E, K, &d));
  assert_null(mt_dispatcher_offsets(d));
  fails(mt_dispatch_forward(d, x, xs), MT_EINVAL, "no plan");
  for (int t = 0; t < T; t++) {
    choice[t * K] = t % E;
    choice[t * K + 1] = (t % E + 1 + t % (E - 1)) % E;
  }
  ok(mt_array_write_ints(index, choice));
  ok(mt_dispatcher_plan(d, index));
  fill(x, 1);
  fill(dy, 1);
  fill(prob, 1);
  ok(mt_dispatch_forward(d, x, xs));
  ok(mt_dispatch_prob_forward(d, prob, scale));
  for (int with = 0; with < 2; with++) {
    y[with] = array(s, MT_ARRAY_ACT, T, H);
    dx[with] = array(s, MT_ARRAY_ACT, T, H);
    dprob[with] = array(s, MT_ARRAY_FULL, T, K);
    set(dprob[with], NAN);
    const struct mt_rows_info info = {.offsets = mt_dispatcher_offsets(d),
                                      .row_scale = with ? scale : NULL};
    ok(mt_block_forward(b[with], xs, &info, ys));
    ok(mt_combine_forward(d, ys, with ? NULL : prob, y[with]));
    ok(mt_combine_backward(d, dy, with ? NULL : prob, with ? NULL : ys, dys,
                           with ? NULL : dprob[with]));
    ok(mt_block_backward(b[with], dys, dxs, with ? dscale : NULL, 0));
    if (with) ok(mt_dispatch_prob_backward(d, dscale, dprob[with]));
    ok(mt_dispatch_backward(d, dxs, dx[with]));
  }
  near(y[1], y[0], 1, 1e-12);
  near(dx[1], dx[0], 1, 1e-12);
  near(dprob[1], dprob[0], 1, 1e-12);
  for (int i = 0; i < 2; i++)
    near(mt_block_gradient(b[1], i), mt_block_gradient(b[0], i), 1, 1e-12);
  fails(mt_combine_backward(d, dy, prob, NULL, dys, NULL), MT_EINVAL, "go together");
  mt_array *const all[] = {x,     dy,     xs,   ys,   dys,   dxs,   prob,     index,
                           scale, dscale, y[0], y[1], dx[0], dx[1], dprob[0], dprob[1]};
  for (int i = 0; i < 16; i++) mt_array_free(all[i]);
  mt_block_free(b[0]);
  mt_block_free(b[1]);
  mt_dispatcher_free(d);
  mt_space_close(s);
}

/* The auxiliary losses are what docs/math.md says, and backward adds their gradients by their
 * coefficients. */
static void router_balances(void **state) {
  (void)state;
  enum { T = 9, K = 2 };
  const double coef = 0.3, z_coef = 0.2, h = 1e-5;
  const struct mt_router_shape shape = {
      .hidden = H, .experts = E, .top_k = K, .aux_coef = coef, .z_coef = z_coef};
  mt_space *s = space("ref");
  mt_router *r;
  mt_array *x = array(s, MT_ARRAY_ACT, T, H), *dx = array(s, MT_ARRAY_ACT, T, H);
  mt_array *prob = array(s, MT_ARRAY_FULL, T, K), *dprob = array(s, MT_ARRAY_FULL, T, K);
  mt_array *index = array(s, MT_ARRAY_INT, T, K);
  double loss, z_loss, side[2], p[E] = {0}, count[E] = {0};
  int32_t choice[T * K];
  ok(mt_router_create(s, &shape, &r));
  fails(mt_router_backward(r, dprob, dx, 0), MT_EINVAL, "without a forward");
  srand48(3);
  fill(x, 1);
  fill(mt_router_parameter(r), 0.7);
  ok(mt_router_forward(r, x, prob, index));
  ok(mt_router_aux_loss(r, &loss));
  ok(mt_router_z_loss(r, &z_loss));
  ok(mt_array_read_ints(index, choice));
  double *w = values(mt_router_parameter(r)), *v = values(x), *chosen = values(prob), expected = 0,
         z = 0;
  for (int t = 0; t < T; t++) {
    double e[E], sum = 0;
    for (int i = 0; i < E; i++) {
      e[i] = 0;
      for (int k = 0; k < H; k++) e[i] += v[t * H + k] * w[i * H + k];
      sum += e[i] = exp(e[i]);
    }
    z += log(sum) * log(sum) / T;
    for (int i = 0; i < E; i++) p[i] += e[i] / sum;
    for (int k = 0; k < K; k++) {
      count[choice[t * K + k]]++;
      assert_true(fabs(chosen[t * K + k] - e[choice[t * K + k]] / sum) < 1e-12);
    }
  }
  for (int i = 0; i < E; i++) expected += E * count[i] / T * p[i] / T;
  if (!(fabs(loss - expected) < 1e-12)) fail_msg("%.15g, expected %.15g", loss, expected);
  if (!(fabs(z_loss - z) < 1e-12)) fail_msg("z-loss %.15g, expected %.15g", z_loss, z);

  set(dx, 0); /* dprob is 0: the auxiliary losses alone */
  set(mt_router_gradient(r), NAN);
  ok(mt_router_backward(r, dprob, dx, 0));
  double *g = values(mt_router_gradient(r)), *gx = values(dx), most = 0;
  for (int64_t i = 0; i < E * H + T * H; i += 5) {
    mt_array *a = i < E * H ? mt_router_parameter(r) : x;
    double *value = i < E * H ? &w[i] : &v[i - E * H], old = *value;
    for (int k = 0; k < 2; k++) {
      *value = old + (k ? -h : h);
      ok(mt_array_write(a, i < E * H ? w : v));
      ok(mt_router_forward(r, x, prob, index));
      ok(mt_router_aux_loss(r, &side[k]));
      ok(mt_router_z_loss(r, &z_loss));
      side[k] = coef * side[k] + z_coef * z_loss;
    }
    *value = old;
    ok(mt_array_write(a, i < E * H ? w : v));
    double slope = (side[0] - side[1]) / (2 * h), have = i < E * H ? g[i] : gx[i - E * H];
    assert_true(fabs(slope - have) < 1e-8);
    most = fmax(most, fabs(slope));
  }
  assert_true(most > 1e-3);
  double *const host[] = {w, v, chosen, g, gx};
  for (int i = 0; i < 5; i++) free(host[i]);
  mt_array *const all[] = {x, dx, prob, dprob, index};
  for (int i = 0; i < 5; i++) mt_array_free(all[i]);
  mt_router_free(r);
  mt_space_close(s);
}

/* Sequences in a row do not see each other, and no token sees those after it. */
static void attention_keeps_apart(void **state) {
  (void)state;
  enum { T = 12, FIRST = 7 };
  const struct mt_attention_shape shape = {
      .hidden = H, .heads = 4, .kv_heads = 2, .head_dim = 8, .rope_theta = 1e4, .norm_eps = 1e-5};
  const int32_t lengths[] = {FIRST, T - FIRST}, wrong[] = {FIRST, T};
  const struct mt_rows_info info = {.sequence_lengths = lengths, .sequence_count = 2};
  mt_space *s = space("cpu");
  mt_block *b;
  mt_array *x = array(s, MT_ARRAY_ACT, T, H), *y = array(s, MT_ARRAY_ACT, T, H);
  ok(mt_attention_create(s, &shape, &b));
  for (int i = 1; i < 3; i++) fill(mt_block_parameter(b, i), 0.3);
  assert_null(mt_block_parameter(b, 3));
  fill(x, 1);
  ok(mt_block_forward(b, x, &info, y));
  double *before = values(y), *v = values(x);
  for (int changed = 0; changed < T; changed += 4) {
    v[changed * H + 1] += 1;
    ok(mt_array_write(x, v));
    ok(mt_block_forward(b, x, &info, y));
    double *after = values(y);
    for (int t = 0; t < T; t++) {
      bool sees = t >= changed && (t < FIRST) == (changed < FIRST);
      bool same = memcmp(after + t * H, before + t * H, H * sizeof *after) == 0;
      assert_int_equal(sees, !same);
    }
    v[changed * H + 1] -= 1;
    free(after);
  }
  fails(mt_block_forward(b, x, NULL, y), MT_EINVAL, "sequence_lengths");
  fails(mt_block_forward(b, x,
                         &(struct mt_rows_info){.sequence_lengths = wrong, .sequence_count = 2}, y),
        MT_ESHAPE, "sequence 1");
  fails(mt_block_forward(
            b, x, &(struct mt_rows_info){.sequence_lengths = lengths, .sequence_count = 1}, y),
        MT_ESHAPE, "add up to 7");
  fails(mt_block_backward(b, y, x, NULL, 0), MT_EINVAL, "without a forward"); /* it failed */
  free(before);
  free(v);
  mt_array_free(x);
  mt_array_free(y);
  mt_block_free(b);
  mt_space_close(s);
}

static void recipes_are_scopes(void **state) {
  (void)state;
  mt_space *s = space("cpu");
  mt_block *b;
  fails(mt_recipe_end(s), MT_EINVAL, "no recipe");
  fails(mt_recipe_begin(s, "fp64"), MT_EUNSUPPORTED, "fp64");
  fails(mt_recipe_begin(s, "fp3"), MT_EUNSUPPORTED, "fp3");
  ok(mt_norm_create(s, H, 1e-5, &b));
  mt_array *full = array(s, MT_ARRAY_ACT, 3, H), *y_full = array(s, MT_ARRAY_ACT, 3, H);
  ok(mt_recipe_begin(s, "bf16"));
  mt_array *x = array(s, MT_ARRAY_ACT, 3, H), *y = array(s, MT_ARRAY_ACT, 3, H);
  mt_array *dy = array(s, MT_ARRAY_ACT, 3, H), *dx = array(s, MT_ARRAY_ACT, 3, H);
  fails(mt_block_forward(b, full, NULL, y), MT_EINVAL, "another recipe");
  fill(x, 1);
  fill(dy, 1);
  ok(mt_block_forward(b, x, NULL, y));
  double *first = values(y), *v = values(x);
  for (int i = 0; i < 3 * H; i++) assert_true(v[i] == (double)(float)v[i] && fabs(v[i]) <= 1);
  set(mt_block_parameter(b, 0), 2); /* seen although a rounded copy is kept */
  ok(mt_block_forward(b, x, NULL, y));
  double *second = values(y);
  for (int i = 0; i < 3 * H; i++) assert_true(second[i] == 2 * first[i]);
  ok(mt_recipe_begin(s, "fp32")); /* nested */
  ok(mt_array_write(full, v));
  fails(mt_block_forward(b, x, NULL, y), MT_EINVAL, "another recipe");
  ok(mt_block_backward(b, dy, dx, NULL, 0)); /* of the forward under bf16 */
  ok(mt_recipe_end(s));
  ok(mt_block_forward(b, x, NULL, y));
  ok(mt_recipe_end(s));
  ok(mt_block_forward(b, full, NULL, y_full));
  near(y, y_full, 1, 1e-2);
  fails(mt_recipe_end(s), MT_EINVAL, "no recipe");
  for (int i = 0; i < 16; i++) ok(mt_recipe_begin(s, "bf16"));
  fails(mt_recipe_begin(s, "bf16"), MT_EINVAL, "too deep");
  double *const host[] = {first, second, v};
  for (int i = 0; i < 3; i++) free(host[i]);
  mt_array *const all[] = {full, y_full, x, y, dy, dx};
  for (int i = 0; i < 6; i++) mt_array_free(all[i]);
  mt_block_free(b);
  mt_space_close(s);
}

static void refuses_misuse(void **state) {
  (void)state;
  mt_space *s = space("cpu"), *other = space("ref"), *none = NULL;
  mt_block *part[3], *third, *b = NULL, *q = NULL;
  mt_array *x = array(s, MT_ARRAY_ACT, ROWS, H), *y = array(s, MT_ARRAY_ACT, ROWS, 2 * F);
  mt_array *far = array(other, MT_ARRAY_ACT, ROWS, H), *offsets = array(s, MT_ARRAY_INT, E, 0);
  mt_array *scale = array(s, MT_ARRAY_FULL, ROWS, 0), *a = NULL;
  const struct mt_rows_info info = {.offsets = offsets};
  fails(mt_space_open("abacus", 0, &none), MT_EUNSUPPORTED, "abacus");
  fails(mt_space_open("cpu", -1, &none), MT_EINVAL, "threads");
  fails(mt_array_create(s, MT_ARRAY_ACT, 4, NULL, &a), MT_ESHAPE, "rank 4");
  fails(mt_array_create(s, MT_ARRAY_ACT, 2, (const int64_t[]){3, 0}, &a), MT_ESHAPE, "dimension 1");
  fails(mt_array_write_ints(x, sizes), MT_EINVAL, "not int32");
  fails(mt_array_read(offsets, NULL), MT_EINVAL, "int32");
  fails(mt_grouped_linear_create(s, 0, H, F, &b), MT_EINVAL, "0 groups");
  ok(mt_grouped_linear_create(s, E, H, 2 * F, &part[0]));
  ok(mt_scaled_swiglu_create(s, E, F, &part[1]));
  ok(mt_grouped_linear_create(s, E, H, H, &third));
  part[2] = third;
  fails(mt_block_forward(part[0], far, NULL, y), MT_EINVAL, "another space");
  fails(mt_block_forward(part[0], x, NULL, y), MT_EINVAL, "needs offsets");
  fails(mt_block_forward(part[0], x, &info, y), MT_ESHAPE, "offsets");
  fails(mt_block_forward(part[0], x, &info, x), MT_ESHAPE, "y has");
  fails(mt_block_backward(part[0], y, x, NULL, 0), MT_EINVAL, "without a forward");
  fails(mt_sequence_create(s, part, 3, 1, &q), MT_ESHAPE, "block 2 takes 24 columns");
  part[2] = part[0];
  fails(mt_sequence_create(s, part, 3, 1, &q), MT_EINVAL, "again");
  fails(mt_sequence_create(s, part, 0, 1, &q), MT_EINVAL, "0 blocks");
  ok(mt_sequence_create(s, part, 2, 1, &q)); /* no chain: one projection is missing */
  assert_int_equal(mt_sequence_fused_count(q), 0);
  assert_int_equal(mt_sequence_fused_count(part[1]), 0);
  fails(mt_sequence_create(s, part, 2, 1, &b), MT_EINVAL, "another sequence");
  mt_block_free(part[0]); /* a part: the sequence frees it */
  mt_block_free(q);
  mt_block_free(third);
  mt_block_free(NULL);
  fails(mt_offsets_from_sizes((const int32_t[]){1, -2, 3}, 3, offsets), MT_EINVAL, "group 1");
  mt_array *const all[] = {x, y, far, offsets, scale};
  for (int i = 0; i < 5; i++) mt_array_free(all[i]);
  mt_array_free(NULL);
  mt_space_close(s);
  mt_space_close(other);
  mt_space_close(NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(chain_is_its_parts), cmocka_unit_test(probabilities_enter_anywhere),
      cmocka_unit_test(router_balances),    cmocka_unit_test(attention_keeps_apart),
      cmocka_unit_test(recipes_are_scopes), cmocka_unit_test(refuses_misuse),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
