/* What transformers computes on every case directory under $MOETUNE_GOLDEN_DIR (default: this
 * folder): logits, every gradient, four losses and gradient norms, parameters after four AdamW
 * steps. A case is a directory with model/, expected.safetensors and expected.json. */
#ifndef TESTS_GOLDEN_MODEL_CASES_H
#define TESTS_GOLDEN_MODEL_CASES_H

#include <dirent.h>

#include "hf/checkpoint.h"
#include "model/small.h"
#include "train/step.h"

/* How far from the fixture each backend may be. gradient: |d| <= gradient |g| + 1e-8 global norm.
 */
struct bounds {
  const char *backend, *recipe;
  double logits, gradient, loss, norm, after;
};

/* bf16 storage: every tensor is rounded to 8 bits. A token near a tie may be routed elsewhere,
 * which one gradient of a small expert shows most. */
#define GOLDEN_BF16 0.4, 0.6, 0.15, 0.15, 0.05

struct golden {
  char dir[MT_PATH_MAX];
  struct mt_st_file tensors;
  json_t *json;
  struct mt_hf_checkpoint checkpoint;
  struct mt_backend be;
  struct mt_model m;
  struct mt_batch batch;
  int64_t samples, length;
};

static const struct mt_st_tensor *expected(const struct golden *g, const char *prefix,
                                           const char *name) {
  char key[256];
  snprintf(key, sizeof key, "%s%s", prefix, name);
  const struct mt_st_tensor *t = mt_st_find(&g->tensors, key);
  if (!t) fail_msg("%s: expected.safetensors has no '%s'", g->dir, key);
  return t;
}

static int64_t integer(const struct mt_st_tensor *t, int64_t i) {
  int64_t x;
  assert_int_equal(t->dtype, MT_I64);
  memcpy(&x, t->data + 8 * i, 8);
  return x;
}

static double real(const struct mt_st_tensor *t, int64_t i) {
  double x;
  size_t item = mt_dtype_bytes(t->dtype);
  assert_int_equal(mt_dtype_convert(&x, MT_F64, t->data + (size_t)i * item, t->dtype, 1), 0);
  return x;
}

/* Right-padded samples packed into one row. */
static void pack(struct golden *g) {
  const struct mt_st_tensor *ids = expected(g, "", "input_ids"),
                            *mask = expected(g, "", "attention_mask"),
                            *labels = expected(g, "", "labels");
  int64_t n = ids->dim[0], s = ids->dim[1], t = 0;
  g->samples = n, g->length = s;
  struct mt_batch *b = &g->batch;
  *b = (struct mt_batch){.sequence_count = (int)n, .token_capacity = (int)(n * s)};
  b->ids = calloc((size_t)(n * s + 8), 4), b->positions = calloc((size_t)(n * s + 8), 4);
  b->labels = calloc((size_t)(n * s + 8), 4), b->cu_seqlens = calloc((size_t)n + 1, 4);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < s && integer(mask, i * s + j); j++, t++) {
      b->ids[t] = (int32_t)integer(ids, i * s + j);
      b->positions[t] = (int32_t)j;
      bool last = j + 1 == s || !integer(mask, i * s + j + 1);
      b->labels[t] = last ? MT_IGNORE : (int32_t)integer(labels, i * s + j + 1);
      b->target_count += b->labels[t] >= 0;
    }
    b->cu_seqlens[i + 1] = (int32_t)t;
  }
  b->valid_count = (int)t;
  b->token_count = (int)((t + 7) / 8 * 8);
  for (int64_t i = t; i < b->token_count; i++) b->labels[i] = MT_IGNORE;
}

static double setting(const struct golden *g, const char *key) {
  return json_number_value(json_object_get(json_object_get(g->json, "adamw"), key));
}

static double series(const struct golden *g, const char *key, size_t i) {
  const json_t *v = json_array_get(json_object_get(g->json, key), i);
  if (!json_is_number(v)) fail_msg("%s: expected.json has no '%s'[%zu]", g->dir, key, i);
  return json_number_value(v);
}

static void open_case(struct golden *g, const struct bounds *b, struct mt_model_options options) {
  char path[MT_PATH_MAX];
  struct mt_params params;
  OK(mt_path_join(path, g->dir, "expected.safetensors"));
  OK(mt_st_open(path, &g->tensors));
  OK(mt_path_join(path, g->dir, "expected.json"));
  g->json = json_load_file(path, 0, NULL);
  assert_non_null(g->json);
  pack(g);
  OK(mt_path_join(path, g->dir, "model"));
  OK(mt_hf_open(path, &g->checkpoint));
  OK(mt_backend_create(&g->be, b->backend, 2));
  OK(mt_params_build(&g->checkpoint.config, NULL, &params));
  options.training = true;
  options.token_capacity = g->batch.token_count;
  options.sequence_capacity = g->samples;
  bool aux = json_is_true(json_object_get(g->json, "aux_loss_in_loss"));
  options.aux_coef = aux ? g->checkpoint.config.aux_coef : 0;
  OK(mt_model_create(&g->m, &g->checkpoint.config, &params, mt_recipe_find(b->recipe), &g->be,
                     &options));
  OK(mt_hf_load(&g->checkpoint, &g->m.params, &g->be));
}

static void close_case(struct golden *g) {
  mt_model_destroy(&g->m);
  mt_backend_destroy(&g->be);
  mt_hf_close(&g->checkpoint);
  mt_st_close(&g->tensors);
  json_decref(g->json);
  free(g->batch.ids), free(g->batch.positions), free(g->batch.labels), free(g->batch.cu_seqlens);
}

static inline void check_logits(struct golden *g, const struct bounds *b) {
  const struct mt_st_tensor *want = expected(g, "", "logits");
  int64_t vocab = g->m.config.vocab;
  float *got = malloc((size_t)(g->batch.valid_count * vocab) * sizeof *got);
  OK(mt_model_logits(&g->m, 0, g->batch.valid_count, got));
  double worst = 0, top = 0;
  for (int64_t s = 0; s < g->samples; s++) {
    for (int64_t t = g->batch.cu_seqlens[s]; t < g->batch.cu_seqlens[s + 1]; t++) {
      int64_t at = (s * g->length + t - g->batch.cu_seqlens[s]) * vocab;
      for (int64_t v = 0; v < vocab; v++) {
        double w = real(want, at + v);
        worst = fmax(worst, fabs((double)got[t * vocab + v] - w));
        top = fmax(top, fabs(w));
      }
    }
  }
  print_message("    logits %.2e\n", worst / top);
  if (!(worst / top <= b->logits))
    fail_msg("%s %s: logits are off by %.3g", g->dir, b->backend, worst / top);
  free(got);
}

/* Squared distance and squared size of what `form` holds of a tensor, against the fixture's; of
 * experts those that are here. */
static inline void compare_tensor(struct golden *g, const struct mt_param *p, const double *form,
                                  const struct mt_hf_tensor *t, const struct mt_st_tensor *want,
                                  double *distance, double *size) {
  int64_t n = mt_param_row_elems(p);
  *distance = *size = 0;
  int64_t elems = 1;
  for (int i = 0; i < want->rank; i++) elems *= want->dim[i];
  int64_t experts = p->sync == MT_SYNC_EXPERT ? want->dim[0] : 1;
  int64_t here = p->sync == MT_SYNC_EXPERT ? p->dim[0] : 1;
  if (elems / experts * here != t->blocks * t->block_rows * n)
    fail_msg("%s: '%s' has another size", g->dir, want->name);
  int64_t first = p->first * (elems / experts);
  for (int64_t b = 0; b < t->blocks; b++) {
    for (int64_t r = 0; r < t->block_rows; r++) {
      int64_t from = (t->param_row + b * t->param_stride + r) * n;
      for (int64_t i = 0; i < n; i++) {
        double x = form[from + i];
        double w = real(want, first + (b * t->block_rows + r) * n + i);
        *distance += (x - w) * (x - w);
        *size += w * w;
      }
    }
  }
}

/* What a form holds, on the host in float64. */
static double *mirror(struct golden *g, const struct mt_tensor *form) {
  size_t n = (size_t)mt_count(form);
  void *raw = malloc(mt_bytes(form));
  double *x = malloc(n * sizeof *x);
  assert_non_null(raw);
  assert_non_null(x);
  OK(g->be.download(&g->be, raw, form->data, mt_bytes(form)));
  assert_int_equal(mt_dtype_convert(x, MT_F64, raw, form->dtype, n), 0);
  free(raw);
  return x;
}

/* Every gradient or value of the parameters that are here; returns the worst share of its bound.
 * *seen (+=) tensors of the fixture. */
static inline double check_held(struct golden *g, const char *prefix, bool gradient, double bound,
                                int64_t *seen) {
  double floor = gradient ? 1e-8 * series(g, "grad_norms_before_clip", 0) : 0, worst = 0;
  for (int i = 0; i < g->m.params.count; i++) {
    struct mt_param *p = &g->m.params.row[i];
    double *form = mirror(g, gradient ? &p->grad : &p->master);
    for (int k = 0; k < mt_hf_tensor_count(&g->m.config, MT_HF_PACKED, p); k++, ++*seen) {
      struct mt_hf_tensor t = mt_hf_tensor_at(&g->m.config, MT_HF_PACKED, p, k);
      double distance, size;
      compare_tensor(g, p, form, &t, expected(g, prefix, t.name), &distance, &size);
      double share = sqrt(distance) / (bound * sqrt(size) + floor);
      worst = fmax(worst, share);
      if (!(share <= 1))
        fail_msg("%s: %s%s is off by %.3g relative", g->dir, prefix, t.name, sqrt(distance / size));
    }
    free(form);
  }
  return worst;
}

static inline double check_params(struct golden *g, const char *prefix, bool gradient,
                                  double bound) {
  int64_t seen = 0;
  double worst = check_held(g, prefix, gradient, bound, &seen);
  assert_int_equal(seen, json_array_size(json_object_get(g->json, "param_names")));
  return worst;
}

static inline struct mt_optimizer_options adamw_of(const struct golden *g) {
  const json_t *betas = json_object_get(json_object_get(g->json, "adamw"), "betas");
  return (struct mt_optimizer_options){.lr = setting(g, "lr"),
                                       .beta1 = json_number_value(json_array_get(betas, 0)),
                                       .beta2 = json_number_value(json_array_get(betas, 1)),
                                       .eps = setting(g, "eps"),
                                       .weight_decay = setting(g, "weight_decay_on_2d_and_up"),
                                       .clip = setting(g, "clip"),
                                       .schedule = MT_SCHEDULE_CONSTANT};
}

static inline void check_step(const struct golden *g, const struct bounds *b, size_t step,
                              const struct mt_step_result *r) {
  double dl = fabs(r->loss - series(g, "losses", step)),
         norm = series(g, "grad_norms_before_clip", step);
  double dc = fabs(r->cross_entropy - series(g, "cross_entropy", step)),
         dn = fabs(r->grad_norm - norm) / norm;
  if (!(dl <= b->loss) || !(dc <= b->loss))
    fail_msg("%s step %zu: loss is off by %.3g", g->dir, step, dl);
  if (!(dn <= b->norm)) fail_msg("%s step %zu: gradient norm is off by %.3g", g->dir, step, dn);
}

static inline void run_case(const char *dir, const struct bounds *b,
                            struct mt_model_options options) {
  struct golden g = {0};
  struct mt_loss loss;
  struct mt_step_result r;
  struct mt_optimizer o;
  struct mt_step_queue q;
  snprintf(g.dir, sizeof g.dir, "%s", dir);
  open_case(&g, b, options);
  struct mt_optimizer_options oo = adamw_of(&g);
  print_message("  %s, %s %s, experts %d, blocks %d\n", dir, b->backend, b->recipe,
                (int)options.experts, (int)options.blocks);
  OK(mt_optimizer_create(&o, &g.m, &oo));
  OK(mt_step_queue_create(&q, &o, true));
  OK(mt_model_eval_pass(&g.m, &g.batch, &loss));
  check_logits(&g, b);
  struct mt_batch *micro[] = {&g.batch};
  OK(mt_step_gradients(&g.m, micro, 1, &r));
  print_message("    gradients %.2f of the bound\n", check_params(&g, "grad.", true, b->gradient));
  for (size_t step = 0; step < 4; step++) {
    OK(mt_step_run(&q, micro, 1, &r));
    check_step(&g, b, step, &r);
  }
  print_message("    parameters after four steps %.2f of the bound\n",
                check_params(&g, "after4.", false, b->after));
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
  close_case(&g);
}

/* Calls f for every case; at least `least` must be there. */
static inline void each_case(int least, void (*f)(const char *dir)) {
  const char *root = getenv("MOETUNE_GOLDEN_DIR");
  char path[MT_PATH_MAX], dir[MT_PATH_MAX];
  if (!root) root = MT_SOURCE_DIR "/tests/golden";
  DIR *d = opendir(root);
  if (!d) fail_msg("cannot read '%s'", root);
  int count = 0;
  for (struct dirent *e; (e = readdir(d));) {
    OK(mt_path_join(dir, root, e->d_name));
    OK(mt_path_join(path, dir, "expected.safetensors"));
    if (!mt_path_exists(path)) continue;
    f(dir);
    count++;
  }
  closedir(d);
  assert_true(count >= least);
}

/* All ways through experts and blocks. */
static inline void every_way(const char *dir, const struct bounds *b) {
  for (int way = 0; way < 6; way++) {
    struct mt_model_options o = {.experts = (enum mt_experts_strategy)(way % 3),
                                 .blocks = (enum mt_blocks_strategy)(way / 3)};
    run_case(dir, b, o);
  }
}

static inline int cases_at_least(void) {
  return getenv("MOETUNE_GOLDEN_DIR") ? 0 : 2;
}

#endif
