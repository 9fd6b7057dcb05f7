/* What must hold whatever the numbers: identities between operations, on every backend. */
#include "kernels/bed.h"

struct plan {
  int32_t *offsets, *row_source, *token_row;     /* of the backend */
  int32_t *h_offsets, *h_source, *h_row, *index; /* on the host */
  int rows;
};

static struct plan plan_of(struct bed *b, int32_t *index, int tokens, int top_k, int experts) {
  int n = tokens * top_k;
  struct plan p = {.offsets = ints(b, NULL, experts + 1),
                   .row_source = ints(b, NULL, n),
                   .token_row = ints(b, NULL, n),
                   .index = index};
  DO(b, permute_plan, .index = ints(b, index, n), .token_count = tokens, .top_k = top_k,
     .expert_count = experts, .offsets = p.offsets, .row_source = p.row_source,
     .token_row = p.token_row);
  p.h_offsets = read_ints(b, p.offsets, experts + 1);
  p.h_source = read_ints(b, p.row_source, n);
  p.h_row = read_ints(b, p.token_row, n);
  p.rows = p.h_offsets[experts];
  return p;
}

enum routing { UNEVEN, ALL_TO_ONE, SOME_NOWHERE, NOWHERE, ROUTINGS };

/* Distinct experts for each token but where all go to one; the last tenth of the tokens is
 * padding. */
static int32_t *routing_of(struct bed *b, enum routing way, int tokens, int top_k, int experts) {
  int32_t *index = host_mem(b, (size_t)(tokens * top_k) * sizeof *index);
  for (int t = 0; t < tokens; t++) {
    /* Expert 0 gets nothing where it can be spared. */
    int span = experts > top_k ? experts - 1 : experts, first = experts - span;
    int start = (int)mt_rng_below(&b->rng, (uint32_t)span);
    for (int k = 0; k < top_k; k++) {
      int32_t *i = &index[t * top_k + k];
      *i = first + (start + k) % span;
      if (way == ALL_TO_ONE) *i = experts - 1;
      if (way == NOWHERE || t >= tokens - tokens / 10) *i = -1;
      if (way == SOME_NOWHERE && (t + k) % 3 == 0) *i = -1;
    }
  }
  return index;
}

static const struct {
  int tokens, top_k, experts;
} routes[] = {{0, 2, 3},   {1, 1, 1},    {7, 2, 3},     {33, 3, 9},
              {130, 2, 8}, {700, 4, 64}, {257, 16, 512}};
enum { ROUTES = sizeof routes / sizeof *routes };

static void a_plan_is_a_sorted_permutation(struct bed *b) {
  for (int r = 0; r < ROUTES; r++) {
    for (int way = 0; way < ROUTINGS; way++) {
      int t = routes[r].tokens, k = routes[r].top_k, e = routes[r].experts, routed = 0;
      struct plan p = plan_of(b, routing_of(b, (enum routing)way, t, k, e), t, k, e);
      for (int i = 0; i < t * k; i++) {
        routed += p.index[i] >= 0;
        if (p.index[i] < 0) assert_int_equal(p.h_row[i], -1);
        if (p.index[i] >= 0) {
          assert_in_range(p.h_row[i], 0, t * k - 1);
          assert_int_equal(p.h_source[p.h_row[i]], i);
        }
      }
      assert_int_equal(p.h_offsets[0], 0);
      assert_int_equal(p.rows, routed);
      for (int x = 0; x < e; x++) {
        assert_true(p.h_offsets[x] <= p.h_offsets[x + 1]);
        for (int row = p.h_offsets[x]; row < p.h_offsets[x + 1]; row++) {
          assert_int_equal(p.index[p.h_source[row]], x);
          /* In the order of the tokens, so that sums do not depend on anything else. */
          if (row > p.h_offsets[x]) assert_true(p.h_source[row - 1] < p.h_source[row]);
        }
      }
      for (int row = p.rows; row < t * k; row++) assert_int_equal(p.h_source[row], -1);
    }
    bed_clear(b);
  }
}

/* A token comes back once for every row it had. */
static void unpermute_undoes_permute(struct bed *b) {
  enum { T = 130, K = 2, E = 8, H = 33 };
  for (int way = 0; way < ROUTINGS; way++) {
    for (int k = 1; k <= K; k++) {
      struct plan p = plan_of(b, routing_of(b, (enum routing)way, T, k, E), T, k, E);
      double *x = normals(b, T * H, 1), *want = host_mem(b, sizeof(double) * T * H);
      struct mt_tensor tokens = act(b, x, T, H), xs = act(b, NULL, T * k, H),
                       back = act(b, NULL, T, H), back2 = act(b, NULL, T, H);
      DO(b, dispatch_fwd, .x = tokens, .row_source = p.row_source, .top_k = k, .xs = xs);
      DO(b, combine_fwd, .ys = xs, .token_row = p.token_row, .top_k = k, .y = back);
      DO(b, dispatch_bwd, .dxs = xs, .token_row = p.token_row, .top_k = k, .dx = back2);
      for (int t = 0; t < T; t++) {
        int copies = 0;
        for (int i = 0; i < k; i++) copies += p.index[t * k + i] >= 0;
        for (int i = 0; i < H; i++) want[t * H + i] = copies * x[t * H + i];
      }
      expect_same(b, "unpermute(permute(x))", values(b, &back), want, T * H);
      expect_same(b, "the same by dispatch_bwd", values(b, &back2), want, T * H);
      double *rows = values(b, &xs);
      for (int row = 0; row < T * k; row++) {
        if (row < p.rows) {
          expect_same(b, "xs", rows + row * H, x + p.h_source[row] / k * H, H);
        } else {
          for (int i = 0; i < H; i++) assert_true(isnan(rows[row * H + i])); /* left alone */
        }
      }
    }
  }
}

/* dispatch and combine on the slice of each expert do what they do on all rows at once. */
static void experts_in_a_loop_equal_all_at_once(struct bed *b) {
  enum { T = 64, K = 3, E = 5, H = 40 };
  for (int way = 0; way < ROUTINGS; way++) {
    if (way == ALL_TO_ONE) continue; /* there a token would appear more than once in a slice */
    struct plan p = plan_of(b, routing_of(b, (enum routing)way, T, K, E), T, K, E);
    struct mt_tensor x = act(b, normals(b, T * H, 1), T, H);
    struct mt_tensor ys = act(b, normals(b, T * K * H, 1), T * K, H);
    struct mt_tensor prob = stat(b, normals(b, T * K, 1), T, K), y = act(b, NULL, T, H);
    struct mt_tensor dy = act(b, normals(b, T * H, 1), T, H), xs = act(b, NULL, T * K, H);
    struct mt_tensor dys = act(b, NULL, T * K, H), dprob = stat(b, NULL, T, K);
    DO(b, combine_fwd, .ys = ys, .token_row = p.token_row, .prob = prob, .top_k = K, .y = y);
    DO(b, combine_bwd, .dy = dy, .ys = ys, .row_source = p.row_source, .prob = prob, .top_k = K,
       .dys = dys, .dprob = dprob);
    DO(b, dispatch_fwd, .x = x, .row_source = p.row_source, .top_k = K, .xs = xs);
    struct mt_tensor y2 = act(b, host_mem(b, sizeof(double) * T * H), T, H);
    struct mt_tensor dys2 = act(b, NULL, T * K, H), dprob2 = stat(b, NULL, T, K);
    struct mt_tensor xs2 = act(b, NULL, T * K, H);
    for (int e = 0; e < E; e++) {
      int begin = p.h_offsets[e], rows = p.h_offsets[e + 1] - begin;
      const int32_t *source = p.row_source + begin;
      struct mt_tensor part = mt_rows(&ys, begin, rows);
      DO(b, scatter_add, .ys = part, .row_source = source, .prob = prob, .top_k = K, .y = y2);
      DO(b, combine_bwd, .dy = dy, .ys = part, .row_source = source, .prob = prob, .top_k = K,
         .dys = mt_rows(&dys2, begin, rows), .dprob = dprob2);
      DO(b, dispatch_fwd, .x = x, .row_source = source, .top_k = K,
         .xs = mt_rows(&xs2, begin, rows));
    }
    /* The loop rounds the sum after every expert. */
    expect_close(b, "scatter_add", values(b, &y2), values(b, &y), T * H, 2);
    expect_same(b, "xs", values(b, &xs2), values(b, &xs), p.rows * H);
    expect_same(b, "dys", values(b, &dys2), values(b, &dys), p.rows * H);
    double *d1 = values(b, &dprob), *d2 = values(b, &dprob2);
    for (int i = 0; i < T * K; i++) {
      if (p.index[i] >= 0) expect_same(b, "dprob", d2 + i, d1 + i, 1);
      if (p.index[i] < 0) assert_true(isnan(d1[i]) && isnan(d2[i]));
    }
  }
}

static void grouped_linear_equals_dense_by_group(struct bed *b) {
  enum { M = 130, IN = 40, OUT = 65, G = 5 };
  static const int32_t cuts[][G + 1] = {{0, 0, 1, 33, 33, 121},
                                        {0, 0, 0, 0, 0, 130},
                                        {0, 130, 130, 130, 130, 130},
                                        {0, 7, 40, 57, 103, 130},
                                        {0, 0, 0, 0, 0, 0}};
  for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
    const int32_t *offsets = ints(b, cuts[c], G + 1);
    struct mt_tensor x = act(b, normals(b, M * IN, 1), M, IN);
    struct mt_tensor dy = act(b, normals(b, M * OUT, 1), M, OUT);
    struct mt_tensor w =
        filled(b, mt_cube(NULL, b->recipe->act, G, OUT, IN), normals(b, G * OUT * IN, 1));
    struct mt_tensor dw = filled(b, mt_cube(NULL, b->recipe->grad, G, OUT, IN), NULL);
    struct mt_tensor y = act(b, NULL, M, OUT), dx = act(b, NULL, M, IN);
    struct mt_tensor y1 = act(b, NULL, M, OUT), dx1 = act(b, NULL, M, IN);
    DO(b, linear_fwd, .x = x, .w = w, .y = y, .offsets = offsets);
    DO(b, linear_dgrad, .dy = dy, .w = w, .dx = dx, .offsets = offsets);
    DO(b, linear_wgrad, .dy = dy, .x = x, .dw = dw, .offsets = offsets);
    double *dws = values(b, &dw);
    for (int g = 0; g < G; g++) {
      int begin = cuts[c][g], rows = cuts[c][g + 1] - begin;
      if (rows == 0) {
        for (int i = 0; i < OUT * IN; i++) assert_true(dws[g * OUT * IN + i] == 0);
        continue;
      }
      struct mt_tensor dw1 = grad(b, NULL, OUT, IN), wg = mt_slice(&w, g);
      struct mt_tensor xg = mt_rows(&x, begin, rows), dyg = mt_rows(&dy, begin, rows);
      DO(b, linear_fwd, .x = xg, .w = wg, .y = mt_rows(&y1, begin, rows));
      DO(b, linear_dgrad, .dy = dyg, .w = wg, .dx = mt_rows(&dx1, begin, rows));
      DO(b, linear_wgrad, .dy = dyg, .x = xg, .dw = dw1);
      expect_close(b, "dw", dws + g * OUT * IN, values(b, &dw1), OUT * IN, 1);
    }
    int used = cuts[c][G];
    double *ys = values(b, &y), *dxs = values(b, &dx);
    expect_close(b, "y", ys, values(b, &y1), (int64_t)used * OUT, 1);
    expect_close(b, "dx", dxs, values(b, &dx1), (int64_t)used * IN, 1);
    for (int i = used * OUT; i < M * OUT; i++) assert_true(isnan(ys[i]));
    for (int i = used * IN; i < M * IN; i++) assert_true(isnan(dxs[i]));
  }
}

static void one_group_is_dense(struct bed *b) {
  enum { M = 33, IN = 64, OUT = 24 };
  static const int32_t all[] = {0, M};
  double *wv = normals(b, OUT * IN, 1);
  struct mt_tensor x = act(b, normals(b, M * IN, 1), M, IN), w = act(b, wv, OUT, IN);
  struct mt_tensor cube = filled(b, mt_cube(NULL, b->recipe->act, 1, OUT, IN), wv);
  struct mt_tensor y = act(b, NULL, M, OUT), y1 = act(b, NULL, M, OUT);
  DO(b, linear_fwd, .x = x, .w = w, .y = y);
  DO(b, linear_fwd, .x = x, .w = cube, .y = y1, .offsets = ints(b, all, 2));
  expect_close(b, "y", values(b, &y1), values(b, &y), M * OUT, 1);
}

struct heads {
  int g, r, d;
};

static int64_t qkv_width(struct heads h) {
  return (int64_t)h.g * (h.r + 2) * h.d;
}

#define HEADS(h) .kv_heads = (h).g, .q_per_kv = (h).r, .head_dim = (h).d

static void rope_turns_back_and_is_relative(struct bed *b) {
  enum { T = 33 };
  const struct heads h = {2, 3, 16};
  int64_t width = qkv_width(h);
  double inv_freq[8];
  int32_t positions[T];
  for (int i = 0; i < 8; i++) inv_freq[i] = pow(10000, -2.0 * i / 16);
  for (int t = 0; t < T; t++) positions[t] = t ? 100 * t + t * t : 0;
  struct mt_tensor cs = stat(b, NULL, T, 8), sn = stat(b, NULL, T, 8);
  DO(b, rope_table, .positions = ints(b, positions, T), .inv_freq = inv_freq, .cos = cs, .sin = sn);
  double *x = normals(b, T * width, 1);
  /* Every row the same, to see the dependence on the position alone. */
  for (int64_t i = width; i < T * width; i++) x[i] = x[i - width];
  struct mt_tensor qkv = act(b, x, T, width);
  DO(b, rope, .qkv = qkv, .cos = cs, .sin = sn, HEADS(h));
  double *y = values(b, &qkv);
  expect_same(b, "position 0", y, x, width);
  for (int t = 0; t < T; t++) {
    for (int g = 0; g < h.g; g++) {
      int64_t value = t * width + g * (h.r + 2) * h.d + (h.r + 1) * h.d;
      expect_same(b, "value", y + value, x + value, h.d);
    }
  }
  /* q(m) . k(n) is a function of m - n: sum over pairs i of
   * (a c + b d) cos + (b c - a d) sin of (m - n) inv_freq[i], (a, b) of q and (c, d) of k. */
  double *dots = host_mem(b, sizeof(double) * T), *want = host_mem(b, sizeof(double) * T);
  const double *q = x, *k = x + h.r * h.d;
  for (int t = 1; t < T; t++) {
    for (int i = 0; i < h.d; i++) dots[t] += y[t * width + i] * y[(t - 1) * width + h.r * h.d + i];
    for (int i = 0; i < 8; i++) {
      double angle = (positions[t] - positions[t - 1]) * inv_freq[i];
      want[t] += (q[i] * k[i] + q[i + 8] * k[i + 8]) * cos(angle);
      want[t] += (q[i] * k[i + 8] - q[i + 8] * k[i]) * sin(angle);
    }
  }
  expect_close(b, "q.k", dots, want, T, 4);
  DO(b, rope, .qkv = qkv, .cos = cs, .sin = sn, HEADS(h), .inverse = 1);
  expect_close(b, "inverse(rope(x))", values(b, &qkv), x, T * width, 2);
}

/* Generation sees what training saw: one sequence through attention_fwd, and through a cache in
 * chunks (all at once; one by one; a prompt, then the rest). */
static void a_cache_equals_the_whole_sequence(struct bed *b) {
  enum { T = 40 };
  static const struct heads shapes[] = {{1, 1, 8}, {2, 4, 16}, {2, 1, 80}, {1, 3, 128}};
  static const int windows[] = {0, 1, 3}, chunks[] = {T, 1, 13};
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    for (int way = 0; way < 9; way++) {
      struct heads h = shapes[s];
      int window = windows[way / 3], chunk = chunks[way % 3];
      int64_t width = (int64_t)h.g * h.r * h.d, cache = (int64_t)h.g * h.d;
      float scale = 1 / sqrtf((float)h.d);
      int32_t cu[] = {0, T};
      struct mt_tensor qkv = act(b, normals(b, T * qkv_width(h), 1), T, qkv_width(h));
      struct mt_tensor whole = act(b, NULL, T, width), parts = act(b, NULL, T, width);
      struct mt_tensor lse = stat(b, NULL, T, (int64_t)h.g * h.r);
      struct mt_tensor k = act(b, NULL, T + 2, cache), v = act(b, NULL, T + 2, cache);
      DO(b, attention_fwd, .qkv = qkv, .cu_seqlens = ints(b, cu, 2), .sequence_count = 1, HEADS(h),
         .window = window, .scale = scale, .out = whole, .lse = lse);
      for (int start = 0; start < T; start += chunk) {
        int n = chunk < T - start ? chunk : T - start;
        struct mt_tensor now = mt_rows(&qkv, start, n);
        DO(b, kv_append, .qkv = now, .k = k, .v = v, .start = start, HEADS(h));
        DO(b, attention_cache, .qkv = now, .k = k, .v = v, .start = start, HEADS(h),
           .window = window, .scale = scale, .out = mt_rows(&parts, start, n));
      }
      expect_close(b, "attention", values(b, &parts), values(b, &whole), T * width, 2);
    }
    bed_clear(b);
  }
}

/* No sequence sees another, nor the padding, nor anything after the query; the same for the
 * gradients. */
static void packing_changes_nothing(struct bed *b) {
  enum { T = 60, S = 5 };
  const struct heads h = {2, 2, 16};
  static const int32_t cu[S + 1] = {0, 17, 17, 18, 50, 50};
  int64_t width = (int64_t)h.g * h.r * h.d, wide = qkv_width(h);
  for (int window = 0; window < 6; window += 5) {
    double *x = normals(b, T * wide, 1), *d = normals(b, T * width, 1);
    for (int64_t i = cu[S] * wide; i < T * wide; i++) x[i] = NAN;
    for (int64_t i = cu[S] * width; i < T * width; i++) d[i] = NAN;
    struct mt_tensor qkv = act(b, x, T, wide), dout = act(b, d, T, width);
    struct mt_tensor out = act(b, NULL, T, width), lse = stat(b, NULL, T, (int64_t)h.g * h.r);
    struct mt_tensor dqkv = act(b, NULL, T, wide);
    struct mt_attention_fwd_args f = {.qkv = qkv,
                                      .cu_seqlens = ints(b, cu, S + 1),
                                      .sequence_count = S,
                                      HEADS(h),
                                      .window = window,
                                      .scale = 0.25f,
                                      .out = out,
                                      .lse = lse};
    OK(b->be.ops.attention_fwd(&b->be, &f));
    DO(b, attention_bwd, .fwd = f, .dout = dout, .dqkv = dqkv);
    double *all = values(b, &out), *dall = values(b, &dqkv);
    for (int64_t i = cu[S] * width; i < T * width; i++) assert_true(all[i] == 0);
    for (int64_t i = cu[S] * wide; i < T * wide; i++) assert_true(dall[i] == 0);
    for (int s = 0; s < S; s++) {
      int64_t n = cu[s + 1] - cu[s];
      int32_t alone[] = {0, (int32_t)n};
      struct mt_attention_fwd_args g = f;
      g.qkv = mt_rows(&qkv, cu[s], n);
      g.cu_seqlens = ints(b, alone, 2);
      g.sequence_count = 1;
      g.out = act(b, NULL, n, width);
      g.lse = stat(b, NULL, n, (int64_t)h.g * h.r);
      struct mt_tensor dg = act(b, NULL, n, wide);
      if (n == 0) continue;
      OK(b->be.ops.attention_fwd(&b->be, &g));
      DO(b, attention_bwd, .fwd = g, .dout = mt_rows(&dout, cu[s], n), .dqkv = dg);
      expect_close(b, "one sequence", all + cu[s] * width, values(b, &g.out), n * width, 1);
      expect_close(b, "its gradient", dall + cu[s] * wide, values(b, &dg), n * wide, 1);
    }
  }
}

static void a_later_token_changes_nothing_before(struct bed *b) {
  enum { T = 40, CHANGED = 23 };
  const struct heads h = {1, 3, 16};
  int64_t width = (int64_t)h.g * h.r * h.d, wide = qkv_width(h);
  int32_t cu[] = {0, T};
  double *x = normals(b, T * wide, 1), *first = NULL;
  for (int round = 0; round < 2; round++) {
    struct mt_tensor out = act(b, NULL, T, width), lse = stat(b, NULL, T, (int64_t)h.g * h.r);
    DO(b, attention_fwd, .qkv = act(b, x, T, wide), .cu_seqlens = ints(b, cu, 2),
       .sequence_count = 1, HEADS(h), .scale = 0.25f, .out = out, .lse = lse);
    double *y = values(b, &out);
    if (first) {
      expect_close(b, "earlier rows", y, first, CHANGED * width, 1);
      for (int64_t t = CHANGED; t < T; t++) {
        assert_true(distance(y + t * width, first + t * width, width) > 0.01);
      }
    }
    first = y;
    for (int64_t i = 0; i < wide; i++) x[CHANGED * wide + i] += 3;
  }
}

static void a_table_gradient_is_a_product_with_one_hot(struct bed *b) {
  enum { T = 130, VALID = 121, V = 17, H = 40 };
  int32_t ids[T];
  double *hot = host_mem(b, sizeof(double) * T * V);
  for (int t = 0; t < T; t++) {
    ids[t] = (int32_t)mt_rng_below(&b->rng, V - 3);
    hot[t * V + ids[t]] = t < VALID;
  }
  struct mt_tensor dout = act(b, normals(b, T * H, 1), T, H);
  struct mt_tensor dtable = grad(b, NULL, V, H), product = grad(b, NULL, V, H);
  DO(b, linear_wgrad, .dy = act(b, hot, T, V), .x = dout, .dw = product);
  DO(b, embed_bwd, .ids = ints(b, ids, T), .valid_count = one(b, VALID), .dout = dout,
     .dtable = dtable);
  expect_close(b, "dtable", values(b, &dtable), values(b, &product), V * H, 1);
  DO(b, embed_bwd, .ids = ints(b, ids, T), .valid_count = one(b, VALID), .dout = dout,
     .dtable = dtable, .accumulate = 1);
  double *twice = values(b, &product);
  for (int i = 0; i < V * H; i++) twice[i] *= 2;
  expect_close(b, "dtable twice", values(b, &dtable), twice, V * H, 1);
}

/* Arguments that say nothing are refused by name, not run. */
static void empty_arguments_are_refused(struct bed *b) {
#define X(op)                                                                                      \
  {                                                                                                \
    struct mt_##op##_args a;                                                                       \
    memset(&a, 0, sizeof a);                                                                       \
    mt_err err = b->be.ops.op(&b->be, &a);                                                         \
    if (err != MT_ESHAPE && err != MT_EINVAL) fail_msg("%s ran on nothing", #op);                  \
    if (!strstr(mt_error_message(), #op)) fail_msg("%s: %s", #op, mt_error_message());             \
  }
  MT_OP_LIST(X)
#undef X
}

static void wrong_shapes_are_named(struct bed *b) {
  struct mt_tensor x = act(b, NULL, 7, 33), y = act(b, NULL, 6, 33), w = act(b, NULL, 5, 34);
  struct mt_tensor odd = act(b, NULL, 7, 5);
  struct mt_add_args add = {.a = x, .b = y, .y = x};
  assert_int_equal(b->be.ops.add(&b->be, &add), MT_ESHAPE);
  assert_non_null(strstr(mt_error_message(), "[6,33]"));
  assert_non_null(strstr(mt_error_message(), "[7,33]"));
  struct mt_linear_fwd_args f = {.x = x, .w = w, .y = odd};
  assert_int_equal(b->be.ops.linear_fwd(&b->be, &f), MT_ESHAPE);
  assert_non_null(strstr(mt_error_message(), "linear_fwd"));
  f.w = act(b, NULL, 5, 33);
  f.y.ld = 4; /* rows that overlap */
  assert_int_equal(b->be.ops.linear_fwd(&b->be, &f), MT_ESHAPE);
  struct mt_tensor k = act(b, NULL, 8, 16), qkv = act(b, NULL, 5, 48);
  struct mt_kv_append_args append = {
      .qkv = qkv, .k = k, .v = k, .start = 4, .kv_heads = 1, .q_per_kv = 1, .head_dim = 16};
  assert_int_equal(b->be.ops.kv_append(&b->be, &append), MT_ESHAPE);
  append.start = -1;
  assert_int_equal(b->be.ops.kv_append(&b->be, &append), MT_ESHAPE);
}

ON_EVERY_BACKEND(a_plan_is_a_sorted_permutation)
ON_EVERY_BACKEND(unpermute_undoes_permute)
ON_EVERY_BACKEND(experts_in_a_loop_equal_all_at_once)
ON_EVERY_BACKEND(grouped_linear_equals_dense_by_group)
ON_EVERY_BACKEND(one_group_is_dense)
ON_EVERY_BACKEND(rope_turns_back_and_is_relative)
ON_EVERY_BACKEND(a_cache_equals_the_whole_sequence)
ON_EVERY_BACKEND(packing_changes_nothing)
ON_EVERY_BACKEND(a_later_token_changes_nothing_before)
ON_EVERY_BACKEND(a_table_gradient_is_a_product_with_one_hot)
ON_EVERY_BACKEND(empty_arguments_are_refused)
ON_EVERY_BACKEND(wrong_shapes_are_named)

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_a_plan_is_a_sorted_permutation),
      cmocka_unit_test(test_unpermute_undoes_permute),
      cmocka_unit_test(test_experts_in_a_loop_equal_all_at_once),
      cmocka_unit_test(test_grouped_linear_equals_dense_by_group),
      cmocka_unit_test(test_one_group_is_dense),
      cmocka_unit_test(test_rope_turns_back_and_is_relative),
      cmocka_unit_test(test_a_cache_equals_the_whole_sequence),
      cmocka_unit_test(test_packing_changes_nothing),
      cmocka_unit_test(test_a_later_token_changes_nothing_before),
      cmocka_unit_test(test_a_table_gradient_is_a_product_with_one_hot),
      cmocka_unit_test(test_empty_arguments_are_refused),
      cmocka_unit_test(test_wrong_shapes_are_named),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
