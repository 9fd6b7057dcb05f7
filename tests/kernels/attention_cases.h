/* Cases of rotary embedding and attention; part of backend_cases.h. */
#ifndef TESTS_KERNELS_ATTENTION_CASES_H
#define TESTS_KERNELS_ATTENTION_CASES_H

static void case_rope_table(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct dual_ints positions = random_ids(c, z->t, 4096);
  struct dual co = S("cos", 'n', 1, z->t, z->d / 2, 0), si = S("sin", 'n', 1, z->t, z->d / 2, 0);
  double *inv = own(c, (size_t)z->d * sizeof *inv);
  for (int i = 0; i < z->d / 2; i++) inv[i] = pow(10000.0, -2.0 * i / z->d);
  ARGS(rope_table, T(cos, co); T(sin, si); N(inv_freq, inv); dev.positions = positions.dev;
       ref.positions = positions.ref;)
  RUN(rope_table);
  expect(c, &co);
  expect(c, &si);
}

#define HEADS     N(kv_heads, z->g), N(q_per_kv, z->r), N(head_dim, z->d)
#define QKV_WIDTH (int64_t) z->g *(z->r + 2) * z->d

static void case_rope(struct bench_case *c, const struct size *z, int acc) {
  struct dual co = S("cos", 'r', 1, z->t, z->d / 2, 0), si = S("sin", 'r', 1, z->t, z->d / 2, 0);
  struct dual qkv = A("qkv", 'r', 1, z->t, QKV_WIDTH, 0);
  ARGS(rope, T(cos, co); T(sin, si); T(qkv, qkv); HEADS; N(inverse, acc);)
  RUN(rope);
  expect(c, &qkv);
}

struct attention {
  struct dual qkv, out, lse;
  struct dual_ints cu;
};

static struct attention attention_of(struct bench_case *c, const struct size *z) {
  return (struct attention){.qkv = A("qkv", 'r', 1, z->t, QKV_WIDTH, 0),
                            .out = A("out", 'n', 1, z->t, (int64_t)z->g * z->r * z->d, 0),
                            .lse = S("lse", 'n', 1, z->t, (int64_t)z->g * z->r, 0),
                            .cu = lengths(c, z)};
}

#define ATTENTION(f, x)                                                                            \
  T(f qkv, (x).qkv), T(f out, (x).out), T(f lse, (x).lse),                                         \
      dev.f cu_seqlens = (x).cu.dev, ref.f cu_seqlens = (x).cu.ref,                                \
            N(f sequence_count, z->sequences), N(f kv_heads, z->g), N(f q_per_kv, z->r),           \
            N(f head_dim, z->d), N(f window, z->window), N(f scale, 1.0f / sqrtf((float)z->d))

static void case_attention_fwd(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct attention x = attention_of(c, z);
  ARGS(attention_fwd, ATTENTION(, x);)
  RUN(attention_fwd);
  expect(c, &x.out);
  expect(c, &x.lse);
}

static void case_attention_bwd(struct bench_case *c, const struct size *z, int acc) {
  (void)acc;
  struct attention x = attention_of(c, z);
  struct dual dout = A("dout", 'r', 1, z->t, (int64_t)z->g * z->r * z->d, 0);
  struct dual dqkv = A("dqkv", 'n', 1, z->t, QKV_WIDTH, 0);
  {
    ARGS(attention_fwd, ATTENTION(, x);)
    RUN(attention_fwd);
  }
  ARGS(attention_bwd, ATTENTION(fwd., x); T(dout, dout); T(dqkv, dqkv);)
  RUN(attention_bwd);
  expect(c, &dqkv);
}

/* A cache with room for nine tokens more than are appended, filled so. */
struct cache {
  struct dual qkv, k, v;
  int start;
};

static struct cache cache_of(struct bench_case *c, const struct size *z, char fill, int acc) {
  int64_t wide = (int64_t)z->g * z->d;
  struct cache x = {.start = acc ? 5 : 0};
  x.qkv = A("qkv", 'r', 1, z->t, QKV_WIDTH, 0);
  x.k = A("k", fill, 1, z->t + 9, wide, 0);
  x.v = A("v", fill, 1, z->t + 9, wide, 0);
  return x;
}

#define CACHE(x) T(qkv, (x).qkv), T(k, (x).k), T(v, (x).v), HEADS, N(start, (x).start)

static void case_kv_append(struct bench_case *c, const struct size *z, int acc) {
  struct cache x = cache_of(c, z, 'n', acc);
  ARGS(kv_append, CACHE(x);)
  RUN(kv_append);
  expect(c, &x.k);
  expect(c, &x.v);
}

static void case_attention_cache(struct bench_case *c, const struct size *z, int acc) {
  struct cache x = cache_of(c, z, 'r', acc);
  struct dual out = A("out", 'n', 1, z->t, (int64_t)z->g * z->r * z->d, 0);
  ARGS(attention_cache, CACHE(x); T(out, out); N(window, z->window);
       N(scale, 1.0f / sqrtf((float)z->d));)
  RUN(attention_cache);
  expect(c, &out);
}

#undef CACHE
#undef HEADS
#undef QKV_WIDTH
#undef ATTENTION

#endif
