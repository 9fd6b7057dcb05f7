/* Operations against their textbook formulas, written here once more and naively, on every
 * backend. */
#include "kernels/bed.h"

static void softmax(const double *x, int64_t n, double *p) {
  double top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; i++) top = fmax(top, x[i]);
  for (int64_t i = 0; i < n; i++) sum += p[i] = exp(x[i] - top);
  for (int64_t i = 0; i < n; i++) p[i] /= sum;
}

/* x [n,k] times w [m,k] transposed. */
static double *product(struct bed *b, const double *x, const double *w, int64_t n, int64_t m,
                       int64_t k) {
  double *y = host_mem(b, (size_t)(n * m) * sizeof *y);
  for (int64_t i = 0; i < n * m; i++) {
    for (int64_t j = 0; j < k; j++) y[i] += x[i / m * k + j] * w[i % m * k + j];
  }
  return y;
}

static double *transposed(struct bed *b, const double *x, int64_t rows, int64_t cols) {
  double *y = host_mem(b, (size_t)(rows * cols) * sizeof *y);
  for (int64_t i = 0; i < rows * cols; i++) y[i % cols * rows + i / cols] = x[i];
  return y;
}

static void linear_is_a_product(struct bed *b) {
  enum { M = 33, IN = 40, OUT = 65 };
  double *x = normals(b, M * IN, 1), *w = normals(b, OUT * IN, 1), *d = normals(b, M * OUT, 1);
  struct mt_tensor tx = act(b, x, M, IN), tw = act(b, w, OUT, IN), td = act(b, d, M, OUT);
  struct mt_tensor y = act(b, NULL, M, OUT), dx = act(b, NULL, M, IN), dw = grad(b, NULL, OUT, IN);
  DO(b, linear_fwd, .x = tx, .w = tw, .y = y);
  DO(b, linear_dgrad, .dy = td, .w = tw, .dx = dx);
  DO(b, linear_wgrad, .dy = td, .x = tx, .dw = dw);
  double *wt = transposed(b, w, OUT, IN), *dt = transposed(b, d, M, OUT);
  double *xt = transposed(b, x, M, IN);
  expect_close(b, "y", values(b, &y), product(b, x, w, M, OUT, IN), M * OUT, 1);
  expect_close(b, "dx", values(b, &dx), product(b, d, wt, M, IN, OUT), M * IN, 1);
  expect_close(b, "dw", values(b, &dw), product(b, dt, xt, OUT, IN, M), OUT * IN, 1);
}

static void combine_weighs_the_rows(struct bed *b) {
  enum { T = 4, K = 2, R = 5, H = 33 };
  static const int32_t token_row[T * K] = {3, 0, -1, 1, 4, 2, -1, -1};
  double *ys = normals(b, R * H, 1), *prob = normals(b, T * K, 1);
  double *want = host_mem(b, sizeof(double) * T * H);
  struct mt_tensor rows = act(b, ys, R, H), p = stat(b, prob, T, K), y = act(b, NULL, T, H);
  for (int i = 0; i < T * K * H; i++) {
    int choice = i / H;
    if (token_row[choice] < 0) continue;
    want[choice / K * H + i % H] += prob[choice] * ys[token_row[choice] * H + i % H];
  }
  DO(b, combine_fwd, .ys = rows, .token_row = ints(b, token_row, T * K), .prob = p, .top_k = K,
     .y = y);
  expect_close(b, "y", values(b, &y), want, T * H, 1);
}

static void rmsnorm_gives_rows_of_size_one(struct bed *b) {
  enum { T = 33, H = 130 };
  double ones[H], *x = normals(b, T * H, 1), *r = normals(b, T * H, 1), *want;
  for (int i = 0; i < H; i++) ones[i] = 1;
  want = host_mem(b, sizeof(double) * T * H);
  struct mt_tensor tx = act(b, x, T, H), tr = act(b, r, T, H), y = act(b, NULL, T, H);
  struct mt_tensor w = filled(b, mt_vec(NULL, b->recipe->act, H), ones);
  struct mt_tensor rstd = stat_vec(b, NULL, T);
  /* The sum takes the residual's place, as the model runs it. */
  DO(b, rmsnorm_fwd, .x = tx, .residual = tr, .weight = w, .eps = 0, .sum = tr, .y = y,
     .rstd = rstd);
  double *s = values(b, &tr), *stored = values(b, &y), *rs = values(b, &rstd), size[T], same[T];
  for (int i = 0; i < T * H; i++) want[i] = x[i] + r[i];
  expect_close(b, "sum", s, want, T * H, 1);
  for (int t = 0; t < T; t++) {
    double square = 0;
    size[t] = 0;
    for (int i = 0; i < H; i++) square += s[t * H + i] * s[t * H + i] / H;
    for (int i = 0; i < H; i++) size[t] += stored[t * H + i] * stored[t * H + i] / H;
    same[t] = sqrt(square) * rs[t]; /* of the sum as it was stored, not as it was added */
    for (int i = 0; i < H; i++) want[t * H + i] = s[t * H + i] / sqrt(square);
  }
  expect_close(b, "y", stored, want, T * H, 1);
  /* eps joins the mean square, not the root. */
  struct mt_tensor y2 = act(b, NULL, T, H);
  DO(b, rmsnorm_fwd, .x = tr, .weight = w, .eps = 0.5f, .y = y2, .rstd = rstd);
  for (int t = 0; t < T; t++) {
    for (int i = 0; i < H; i++) want[t * H + i] = s[t * H + i] / sqrt(1 / (rs[t] * rs[t]) + 0.5);
  }
  expect_close(b, "y with eps", values(b, &y2), want, T * H, 1);
  for (int t = 0; t < T; t++) {
    assert_true(fabs(size[t] - 1) < 2 * b->recipe->op_tolerance);
    assert_true(fabs(same[t] - 1) < (b->recipe->stat == MT_F64 ? 1e-12 : 1e-6));
  }
}

/* All scores of a sequence at once, softmax over what the mask leaves. */
static void attention_is_a_masked_softmax(struct bed *b) {
  enum { T = 50, G = 2, R = 3, D = 16, WIDE = G * (R + 2) * D, WIDTH = G * R * D };
  for (int window = 0; window < 9; window += 4) {
    double *x = normals(b, T * WIDE, 1), *want = host_mem(b, sizeof(double) * T * WIDTH);
    double *want_lse = host_mem(b, sizeof(double) * T * G * R);
    int32_t cu[] = {0, T};
    struct mt_tensor out = act(b, NULL, T, WIDTH), lse = stat(b, NULL, T, G * R);
    DO(b, attention_fwd, .qkv = act(b, x, T, WIDE), .cu_seqlens = ints(b, cu, 2),
       .sequence_count = 1, .kv_heads = G, .q_per_kv = R, .head_dim = D, .window = window,
       .scale = 0.25f, .out = out, .lse = lse);
    for (int head = 0; head < G * R; head++) {
      int g = head / R, q = (g * (R + 2) + head % R) * D, k = (g * (R + 2) + R) * D, v = k + D;
      for (int i = 0; i < T; i++) {
        double score[T], p[T], sum = 0;
        for (int j = 0; j < T; j++) {
          bool seen = j <= i && (window == 0 || i - j < window);
          score[j] = seen ? 0 : -INFINITY;
          for (int n = 0; seen && n < D; n++) {
            score[j] += 0.25 * x[i * WIDE + q + n] * x[j * WIDE + k + n];
          }
          if (seen) sum += exp(score[j]);
        }
        want_lse[i * G * R + head] = log(sum);
        softmax(score, T, p);
        for (int j = 0; j < T; j++) {
          for (int n = 0; n < D; n++) {
            want[i * WIDTH + head * D + n] += p[j] * x[j * WIDE + v + n];
          }
        }
      }
    }
    expect_close(b, "out", values(b, &out), want, T * WIDTH, 1);
    /* A float32 sum, whatever the storage of the output. */
    expect_close(b, "lse", values(b, &lse), want_lse, T * G * R, 1);
  }
}

struct router {
  struct mt_tensor logits, prob, aux_prob, z_sum;
  int32_t *index, *aux_count, *load;
};

static struct router route(struct bed *b, struct mt_tensor x, struct mt_tensor w, int k, int valid,
                           int renormalize, const struct router *before) {
  int64_t t = x.dim[0], e = w.dim[0];
  struct router r = {.logits = stat(b, NULL, t, e),
                     .prob = stat(b, NULL, t, k),
                     .index = ints(b, NULL, t * k),
                     .load = ints(b, NULL, e)};
  int32_t *zeros = host_mem(b, (size_t)e * sizeof *zeros);
  r.aux_prob = before ? before->aux_prob : stat_vec(b, host_mem(b, (size_t)e * 8), e);
  r.z_sum = before ? before->z_sum : stat_vec(b, host_mem(b, 8), 1);
  r.aux_count = before ? before->aux_count : ints(b, zeros, e);
  DO(b, router_fwd, .x = x, .w = w, .valid_count = one(b, valid), .renormalize = renormalize,
     .logits = r.logits, .prob = r.prob, .index = r.index, .aux_prob = r.aux_prob,
     .aux_count = r.aux_count, .z_sum = r.z_sum, .load = r.load);
  return r;
}

static void the_router_takes_the_largest(struct bed *b) {
  enum { T = 130, VALID = 121, H = 40, E = 9, K = 3 };
  double *x = normals(b, T * H, 1), *w = normals(b, E * H, 0.3);
  /* Experts 2 and 6, 4 and 5 are twins: their logits are equal to the bit, and ties must go to the
   * lower index. */
  memcpy(w + 6 * H, w + 2 * H, sizeof(double) * H);
  memcpy(w + 5 * H, w + 4 * H, sizeof(double) * H);
  for (int i = 0; i < H; i++) x[7 * H + i] = 0; /* and here all are */
  for (int i = VALID * H; i < T * H; i++) x[i] = NAN;
  struct mt_tensor tx = act(b, x, T, H), tw = act(b, w, E, H);
  double *logits = product(b, x, w, VALID, E, H), *want = host_mem(b, sizeof(double) * T * K);
  for (int renormalize = 0; renormalize < 2; renormalize++) {
    struct router r = route(b, tx, tw, K, VALID, renormalize, NULL);
    double *prob = values(b, &r.prob), *got = values(b, &r.logits);
    int32_t *index = read_ints(b, r.index, T * K), *load = read_ints(b, r.load, E);
    int32_t chosen[E] = {0};
    expect_close(b, "logits", got, logits, VALID * E, 1);
    for (int t = 0; t < VALID; t++) {
      double p[E], sum = 0;
      softmax(logits + t * E, E, p);
      for (int k = 0; k < K; k++) {
        int e = index[t * K + k];
        assert_in_range(e, 0, E - 1);
        /* As many as k are larger, or equal and lower. */
        int before = 0;
        for (int i = 0; i < E; i++) {
          before += got[t * E + i] > got[t * E + e] || (got[t * E + i] == got[t * E + e] && i < e);
        }
        assert_int_equal(before, k);
        chosen[e]++;
        sum += p[e];
      }
      for (int k = 0; k < K; k++) {
        want[t * K + k] = p[index[t * K + k]] / (renormalize ? sum : 1);
      }
      if (renormalize) {
        sum = 0;
        for (int k = 0; k < K; k++) sum += prob[t * K + k];
        assert_true(fabs(sum - 1) < (b->recipe->stat == MT_F64 ? 1e-14 : 1e-6));
      }
    }
    for (int k = 0; k < K; k++) assert_int_equal(index[7 * K + k], k);
    expect_close(b, "prob", prob, want, VALID * K, 2);
    for (int i = VALID * K; i < T * K; i++) assert_true(index[i] == -1 && prob[i] == 0);
    for (int i = VALID * E; i < T * E; i++) assert_true(got[i] == 0);
    for (int e = 0; e < E; e++) assert_int_equal(load[e], chosen[e]);
  }
}

/* transformers' load_balancing_loss_func step by step: the layers' logits concatenated, softmax,
 * top-k, one-hot, means over the tokens that the attention mask keeps. And its router_z_loss_func:
 * the mean of torch.logsumexp(logits, -1) ** 2. */
static void aux_loss_is_that_of_transformers(struct bed *b) {
  enum { T = 33, VALID = 29, LAYERS = 2, H = 24, E = 5, K = 2, N = LAYERS * VALID };
  double tokens_per_expert[K][E] = {{0}}, router_prob[E] = {0}, want = 0, want_grad[E];
  double want_z = 0, want_z_grad = 2 * (double)0.03f / N;
  struct router r = {0};
  for (int layer = 0; layer < LAYERS; layer++) {
    double *x = normals(b, T * H, 1), *w = normals(b, E * H, 0.3);
    struct mt_tensor tx = act(b, x, T, H), tw = act(b, w, E, H);
    r = route(b, tx, tw, K, VALID, 1, layer ? &r : NULL);
    double *logits = product(b, x, w, VALID, E, H);
    for (int t = 0; t < VALID; t++) {
      double p[E], sum = 0;
      for (int e = 0; e < E; e++) sum += exp(logits[t * E + e]);
      want_z += log(sum) * log(sum) / N;
      int first = 0, second = -1;
      softmax(logits + t * E, E, p);
      for (int e = 1; e < E; e++) first = p[e] > p[first] ? e : first;
      for (int e = 0; e < E; e++) {
        if (e != first && (second < 0 || p[e] > p[second])) second = e;
        router_prob[e] += p[e] / N;
      }
      tokens_per_expert[0][first] += 1.0 / N;
      tokens_per_expert[1][second] += 1.0 / N;
    }
  }
  for (int k = 0; k < K; k++) {
    for (int e = 0; e < E; e++) want += E * tokens_per_expert[k][e] * router_prob[e];
  }
  /* coef times the loss, by the sum over tokens of one expert's probability. */
  for (int e = 0; e < E; e++) {
    want_grad[e] = (double)0.02f * E * (tokens_per_expert[0][e] + tokens_per_expert[1][e]) / N;
  }
  struct mt_tensor loss = stat_vec(b, NULL, 1), dprob = stat_vec(b, NULL, E);
  struct mt_tensor z_loss = stat_vec(b, NULL, 1), z_grad = stat_vec(b, NULL, 1);
  DO(b, aux_loss, .aux_prob = r.aux_prob, .aux_count = r.aux_count, .valid_count = one(b, VALID),
     .layer_count = LAYERS, .coef = one_float(b, 0.02f), .loss = loss, .grad = dprob,
     .z_sum = r.z_sum, .z_coef = one_float(b, 0.03f), .z_loss = z_loss, .z_grad = z_grad);
  expect_close(b, "loss", values(b, &loss), &want, 1, 1);
  expect_close(b, "grad", values(b, &dprob), want_grad, E, 1);
  expect_close(b, "z-loss", values(b, &z_loss), &want_z, 1, 1);
  expect_close(b, "z_grad", values(b, &z_grad), &want_z_grad, 1, 1);
}

static double silu(double x) {
  return x / (1 + exp(-x));
}

static void swiglu_is_silu_times_up(struct bed *b) {
  enum { R = 33, F = 24 };
  double *gu = normals(b, R * 2 * F, 2), *p = normals(b, R, 1);
  double *want = host_mem(b, sizeof(double) * R * F);
  /* Where e^-x overflows and where it is nothing. */
  gu[0] = -1e4, gu[1] = 1e4, gu[2] = -90, gu[3] = 90, gu[4] = 0;
  struct mt_tensor tgu = act(b, gu, R, 2 * F), h = act(b, NULL, R, F), prob = stat_vec(b, p, R);
  struct mt_tensor dgu = act(b, NULL, R, 2 * F), dh = act(b, normals(b, R * F, 1), R, F);
  for (int i = 0; i < R * F; i++) {
    int at = i / F * 2 * F + i % F;
    want[i] = silu(gu[at]) * gu[at + F] * p[i / F];
  }
  DO(b, swiglu_fwd, .gate_up = tgu, .row_prob = prob, .h = h);
  DO(b, swiglu_bwd, .dh = dh, .gate_up = tgu, .row_prob = prob, .dgate_up = dgu);
  double *got = values(b, &h), *back = values(b, &dgu), *up = values(b, &dh);
  expect_close(b, "h", got, want, F, 1);
  expect_close(b, "h", got + F, want + F, (R - 1) * F, 1);
  for (int i = 0; i < R * 2 * F; i++) assert_true(isfinite(back[i]));
  assert_true(back[0] == 0);               /* flat far below zero */
  double slope = up[1] * p[0] * gu[1 + F]; /* and a line far above */
  expect_close(b, "dgate", back + 1, &slope, 1, 1);
}

/* Logits up to a few hundred, rows without a label, a label that is the best and ones that are
 * not. */
static void head_loss_is_a_naive_cross_entropy(struct bed *b) {
  enum { T = 130, H = 33, V = 300 };
  static const double scales[] = {0.3, 20};
  for (int round = 0; round < 2; round++) {
    double *x = normals(b, T * H, 1), *w = normals(b, V * H, scales[round]);
    struct mt_tensor tx = act(b, x, T, H), tw = act(b, w, V, H), dx = act(b, NULL, T, H);
    struct mt_tensor loss = stat_vec(b, NULL, T), dw = grad(b, NULL, V, H);
    double *logits = product(b, x, w, T, V, H), *g = host_mem(b, sizeof(double) * T * V);
    double *want = host_mem(b, sizeof(double) * T), *p = host_mem(b, sizeof(double) * V);
    double *want_dx = host_mem(b, sizeof(double) * T * H);
    double *want_dw = host_mem(b, sizeof(double) * V * H);
    int32_t labels[T], best[T];
    for (int t = 0; t < T; t++) {
      best[t] = 0;
      for (int v = 1; v < V; v++)
        best[t] = logits[t * V + v] > logits[t * V + best[t]] ? v : best[t];
      labels[t] = t % 4 == 3 ? best[t] : (int32_t)mt_rng_below(&b->rng, V);
      if (t % 5 == 1 || t >= 120) labels[t] = -100;
      if (labels[t] < 0) continue;
      double *row = logits + t * V, sum = 0;
      softmax(row, V, p);
      for (int v = 0; v < V; v++) {
        sum += exp(row[v] - row[best[t]]);
        g[t * V + v] = 0.125 * (p[v] - (v == labels[t]));
      }
      want[t] = row[best[t]] - row[labels[t]] + log(sum);
    }
    for (int i = 0; i < T * V; i++) {
      for (int n = 0; n < H; n++) {
        want_dx[i / V * H + n] += g[i] * w[i % V * H + n];
        want_dw[i % V * H + n] += g[i] * x[i / V * H + n];
      }
    }
    int32_t *correct = ints(b, NULL, T);
    DO(b, head_loss, .x = tx, .w = tw, .labels = ints(b, labels, T),
       .loss_scale = one_float(b, 0.125f), .loss = loss, .correct = correct, .dx = dx, .dw = dw);
    /* The largest logit's rounding is that of the difference: the second round loses two digits. */
    double slack = round ? 100 : 2;
    if (b->recipe->act == MT_BF16) slack = 1; /* the inputs are exact, so are the products */
    double *ls = values(b, &loss), *dxs = values(b, &dx);
    expect_close(b, "loss", ls, want, T, slack);
    expect_close(b, "dx", dxs, want_dx, T * H, slack);
    expect_close(b, "dw", values(b, &dw), want_dw, V * H, slack);
    int32_t *hits = read_ints(b, correct, T);
    for (int t = 0; t < T; t++) {
      assert_int_equal(hits[t], labels[t] >= 0 && labels[t] == best[t]);
      if (labels[t] >= 0) continue;
      assert_true(ls[t] == 0);
      for (int n = 0; n < H; n++) assert_true(dxs[t * H + n] == 0);
    }
    /* Without a backward, the same losses. */
    struct mt_tensor again = stat_vec(b, NULL, T);
    DO(b, head_loss, .x = tx, .w = tw, .labels = ints(b, labels, T),
       .loss_scale = one_float(b, 0.125f), .loss = again);
    expect_close(b, "loss alone", values(b, &again), ls, T, slack);
  }
}

/* Three steps of one number, as torch.optim.AdamW and clip_grad_norm_ give them: worked out with
 * decimal arithmetic outside. lr 0.1, betas 0.9 0.95, eps 1e-8, weight decay 0.1, w = 1, gradients
 * 0.5, -2, 0.25. */
static void adamw_takes_three_known_steps(struct bed *b) {
  static const struct {
    double clip;
    int decay;
    double want[3];
  } runs[] = {
      {0, 0, {0.900000001999999966, 0.955340179062770467, 0.990633045735528128}},
      {0, 1, {0.890000001999999957, 0.936440179042770438, 0.962368643925100464}},
      {1, 0, {0.900000001999999966, 0.936337378239374241, 0.950059672747701200}},
      {1, 1, {0.890000001999999957, 0.917437378219374322, 0.921985298945507403}},
  };
  static const double gradients[] = {0.5, -2, 0.25};
  for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
    double w = 1, zero[2] = {0, 0};
    enum mt_dtype wide = b->recipe->grad;
    struct mt_adamw_segment s = {.master = filled(b, mt_vec(NULL, wide, 1), &w),
                                 .m = filled(b, mt_vec(NULL, wide, 1), zero),
                                 .v = filled(b, mt_vec(NULL, wide, 1), zero + 1),
                                 .decay = runs[i].decay};
    bool copied = b->recipe->act != wide;
    if (copied) s.compute = filled(b, mt_vec(NULL, b->recipe->act, 1), NULL);
    for (int step = 1; step <= 3; step++) {
      double g = gradients[step - 1];
      s.grad = filled(b, mt_vec(NULL, wide, 1), &g);
      struct mt_tensor norm = filled(b, mt_vec(NULL, MT_F64, 1), NULL);
      DO(b, sumsq, .tensors = &s.grad, .tensor_count = 1, .out = norm.data);
      DO(b, adamw, .segments = &s, .segment_count = 1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
         .values = adamw_values(b, 0.1, 0.1, step, 0), .clip = runs[i].clip,
         .grad_sumsq = norm.data);
      double got = *values(b, &s.master);
      if (!(fabs(got - runs[i].want[step - 1]) < (wide == MT_F64 ? 1e-14 : 2e-7))) {
        fail_msg("clip %g decay %d step %d: %.17g, not %.17g", runs[i].clip, runs[i].decay, step,
                 got, runs[i].want[step - 1]);
      }
      if (!copied) continue;
      double rounded = got; /* the copy is the master, rounded once */
      filled(b, mt_vec(NULL, b->recipe->act, 1), &rounded);
      assert_true(*values(b, &s.compute) == rounded);
    }
  }
}

static void sumsq_adds_everything_up(struct bed *b) {
  enum { N = 100003 };
  double *x = normals(b, N, 1), *y = normals(b, 7 * 33, 3), want = 0;
  struct mt_tensor list[] = {filled(b, mt_vec(NULL, b->recipe->grad, N), x), grad(b, y, 7, 33)};
  for (int i = 0; i < N; i++) want += x[i] * x[i];
  for (int i = 0; i < 7 * 33; i++) want += y[i] * y[i];
  struct mt_tensor out = filled(b, mt_vec(NULL, MT_F64, 1), NULL);
  DO(b, sumsq, .tensors = list, .tensor_count = 2, .out = out.data);
  double got = *values(b, &out);
  if (!(fabs(got - want) < 1e-12 * want)) { /* float64, whatever the storage */
    fail_msg("%s %s: %.17g, not %.17g", b->be.name, b->recipe->name, got, want);
  }
  double known[] = {0.25, 1e6, 3};
  struct mt_tensor parts = filled(b, mt_vec(NULL, MT_F64, 3), known);
  DO(b, sumsq, .parts = parts.data, .part_count = 3, .out = out.data);
  assert_true(*values(b, &out) == 1000003.25);
  DO(b, sumsq, .out = out.data);
  assert_true(*values(b, &out) == 0);
  x[5] = -1e25; /* its square is past float32's range */
  list[0] = filled(b, mt_vec(NULL, b->recipe->grad, N), x);
  DO(b, sumsq, .tensors = list, .tensor_count = 2, .out = out.data);
  assert_true(fabs(*values(b, &out) / (x[5] * x[5]) - 1) < 1e-12);
  static const double bad[] = {NAN, INFINITY, -INFINITY};
  for (int i = 0; i < 3; i++) {
    x[N - 2] = bad[i];
    list[0] = filled(b, mt_vec(NULL, b->recipe->grad, N), x);
    DO(b, sumsq, .tensors = list, .tensor_count = 2, .out = out.data);
    got = *values(b, &out);
    assert_true(i == 0 ? isnan(got) : isinf(got));
  }
}

/* Of dw as it stands, in whatever format, whatever it was made of: added to or not, where experts
 * are empty, past the range of float32's squares; and not a number of NaN. */
static void wgrad_adds_up_its_squares(struct bed *b) {
  enum { R = 150, OUT = 136, IN = 24, GROUPS = 3 };
  static const int32_t offsets[GROUPS + 1] = {0, 70, 70, 140};
  static const double scales[] = {1, 1e20};
  int32_t *at = ints(b, offsets, GROUPS + 1);
  for (int way = 0; way < 8; way++) {
    enum mt_dtype format = way & 4 ? b->recipe->act : b->recipe->grad;
    double scale = scales[way >> 1 & 1], want = 0;
    double *d = normals(b, R * OUT, scale), *old = normals(b, GROUPS * OUT * IN, scale);
    struct mt_tensor dy = act(b, d, R, OUT), x = act(b, normals(b, R * IN, 1), R, IN);
    struct mt_tensor dw = filled(b, mt_cube(NULL, format, GROUPS, OUT, IN), way & 1 ? old : NULL);
    struct mt_tensor sum = filled(b, mt_vec(NULL, MT_F64, 1), NULL);
    DO(b, linear_wgrad, .dy = dy, .x = x, .dw = dw, .offsets = at, .accumulate = way & 1,
       .sumsq = sum.data);
    double *v = values(b, &dw), got = *values(b, &sum);
    for (int i = 0; i < GROUPS * OUT * IN; i++) want += v[i] * v[i];
    if (!(fabs(got - want) < 5e-7 * want)) {
      fail_msg("%s %s way %d: %.17g, not %.17g", b->be.name, b->recipe->name, way, got, want);
    }
    d[75 * OUT + 3] = NAN; /* of the last expert */
    dy = act(b, d, R, OUT);
    DO(b, linear_wgrad, .dy = dy, .x = x, .dw = dw, .offsets = at, .sumsq = sum.data);
    assert_true(isnan(*values(b, &sum)));
  }
}

ON_EVERY_BACKEND(linear_is_a_product)
ON_EVERY_BACKEND(combine_weighs_the_rows)
ON_EVERY_BACKEND(rmsnorm_gives_rows_of_size_one)
ON_EVERY_BACKEND(attention_is_a_masked_softmax)
ON_EVERY_BACKEND(the_router_takes_the_largest)
ON_EVERY_BACKEND(aux_loss_is_that_of_transformers)
ON_EVERY_BACKEND(swiglu_is_silu_times_up)
ON_EVERY_BACKEND(head_loss_is_a_naive_cross_entropy)
ON_EVERY_BACKEND(adamw_takes_three_known_steps)
ON_EVERY_BACKEND(sumsq_adds_everything_up)
ON_EVERY_BACKEND(wgrad_adds_up_its_squares)

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_linear_is_a_product),
      cmocka_unit_test(test_combine_weighs_the_rows),
      cmocka_unit_test(test_rmsnorm_gives_rows_of_size_one),
      cmocka_unit_test(test_attention_is_a_masked_softmax),
      cmocka_unit_test(test_the_router_takes_the_largest),
      cmocka_unit_test(test_aux_loss_is_that_of_transformers),
      cmocka_unit_test(test_swiglu_is_silu_times_up),
      cmocka_unit_test(test_head_loss_is_a_naive_cross_entropy),
      cmocka_unit_test(test_adamw_takes_three_known_steps),
      cmocka_unit_test(test_sumsq_adds_everything_up),
      cmocka_unit_test(test_wgrad_adds_up_its_squares),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
