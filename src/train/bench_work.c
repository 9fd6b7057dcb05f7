/* What a measured run is made of: a model of random weights, random tokens, and the yardstick that
 * takes turns with the steps. */
#include "train/bench.h"

#include <omp.h>
#include <stdlib.h>
#include <oneapi/dnnl/dnnl.h>

#include "base/rng.h"
#include "train/profile.h"
#include "train/session.h"
#include "train/step.h"

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double mt_median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, ascending);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

bool mt_bench_on_gpu(const struct mt_backend *be) {
  return strncmp(be->name, "cuda", 4) == 0;
}

void mt_yardstick_free(struct mt_yardstick *y) {
  struct mt_tensor *t[] = {&y->a, &y->b, &y->c};
  for (int i = 0; i < 3; i++) {
    if (t[i]->data) y->be->mem_free(y->be, t[i]->data, mt_bytes(t[i]));
  }
}

mt_err mt_yardstick_make(struct mt_yardstick *y, struct mt_backend *be,
                         const struct mt_recipe *recipe) {
  *y = (struct mt_yardstick){.be = be, .n = mt_bench_on_gpu(be) ? 8192 : 2048};
  enum mt_dtype dtype = mt_bench_on_gpu(be) ? recipe->act : MT_F32;
  struct mt_tensor *t[] = {&y->a, &y->b, &y->c};
  size_t count = (size_t)(y->n * y->n), bytes = count * mt_dtype_bytes(dtype);
  float *values = malloc(count * sizeof *values);
  mt_err err = values ? MT_OK : mt_fail(MT_ENOMEM, "operands of a product");
  struct mt_rng rng = mt_rng_make(1, 1);
  for (size_t i = 0; values && i < count; i++) values[i] = (float)mt_rng_uniform(&rng) - 0.5f;
  for (int i = 0; !err && i < 3; i++) {
    *t[i] = mt_mat(NULL, dtype, y->n, y->n);
    err = be->mem_alloc(be, bytes, &t[i]->data);
  }
  if (!err && dtype != MT_F32) mt_dtype_convert(values, dtype, values, MT_F32, count);
  for (int i = 0; !err && i < 3; i++) err = be->upload(be, t[i]->data, values, bytes);
  if (!err) err = be->sync(be);
  free(values);
  return err;
}

mt_err mt_yardstick_ms(struct mt_yardstick *y, double *ms) {
  MT_TRY(y->be->sync(y->be));
  double begin = mt_now_s();
  if (mt_bench_on_gpu(y->be)) {
    MT_TRY(y->be->ops.linear_fwd(y->be,
                                 &(struct mt_linear_fwd_args){.x = y->a, .w = y->b, .y = y->c}));
    MT_TRY(y->be->sync(y->be));
  } else {
    omp_set_num_threads(y->be->thread_count);
    dnnl_sgemm('N', 'N', y->n, y->n, y->n, 1.0f, y->a.data, y->n, y->b.data, y->n, 0.0f, y->c.data,
               y->n);
  }
  *ms = (mt_now_s() - begin) * 1e3;
  return MT_OK;
}

mt_err mt_yardstick_copy_rate(struct mt_yardstick *y, double *bytes_per_s) {
  enum { RUNS = 9 };
  double seconds[RUNS];
  for (int i = 0; i < RUNS; i++) {
    MT_TRY(y->be->stamp(y->be, 0));
    MT_TRY(y->be->ops.add(y->be, &(struct mt_add_args){.a = y->a, .b = y->b, .y = y->c}));
    MT_TRY(y->be->stamp(y->be, 1));
    MT_TRY(y->be->stamp_read(y->be, 0, 1, &seconds[i]));
  }
  *bytes_per_s = 3.0 * (double)mt_bytes(&y->a) / mt_median(seconds, RUNS);
  return MT_OK;
}

/* count values in a format to elements [at, at + count) of a form. */
static mt_err put_values(struct mt_backend *be, const struct mt_tensor *form, int64_t at,
                         const void *values, size_t count) {
  size_t item = mt_dtype_bytes(form->dtype);
  return be->upload(be, (char *)form->data + (size_t)at * item, values, count * item);
}

/* Random weights in all forms; one random block again and again, since billions of random numbers
 * would take longer than what is measured. */
mt_err mt_random_weights(struct mt_model *m, uint64_t seed) {
  enum { BLOCK = (1 << 20) + 7 };
  float *values = malloc(BLOCK * sizeof *values);
  uint16_t *rounded = malloc(BLOCK * sizeof *rounded);
  mt_err err = values && rounded ? MT_OK : mt_fail(MT_ENOMEM, "random weights");
  for (int i = 0; !err && i < m->params.count; i++) {
    struct mt_param *p = &m->params.row[i];
    uint64_t stream = (uint64_t)(p->layer + 1) * MT_PARAM_KIND_COUNT + (uint64_t)p->kind;
    struct mt_rng rng = mt_rng_make(seed, stream);
    int64_t n = mt_param_count(p), begin = p->first * (n / p->dim[0]); /* in the whole one */
    int64_t needed = begin + n < BLOCK ? begin + n : BLOCK;
    for (int64_t k = 0; k < needed; k++) {
      values[k] = p->rank == 1 ? 1.0f : (float)((mt_rng_uniform(&rng) - 0.5) * 0.07);
    }
    bool narrow = p->compute.data && p->compute.dtype != MT_F32, wide = p->master.dtype == MT_F32;
    if (narrow) mt_dtype_convert(rounded, p->compute.dtype, values, MT_F32, (size_t)needed);
    for (int64_t at = 0; !err && at < n;) {
      int64_t from = (begin + at) % BLOCK;
      size_t count = (size_t)(n - at < BLOCK - from ? n - at : BLOCK - from);
      if (wide) err = put_values(m->be, &p->master, at, values + from, count);
      if (!err && narrow) err = put_values(m->be, &p->compute, at, rounded + from, count);
      at += (int64_t)count;
    }
  }
  if (!err) err = mt_model_quantize_weights(m);
  if (!err) err = m->be->sync(m->be);
  free(values);
  free(rounded);
  return err;
}

mt_err mt_random_model(struct mt_model *m, const struct mt_config *c,
                       const struct mt_recipe *recipe, struct mt_backend *be,
                       const struct mt_model_options *options, uint64_t seed) {
  struct mt_params params;
  MT_TRY(mt_config_check(c));
  const struct mt_shard *shard = options->shard.expert_end ? &options->shard : NULL;
  MT_TRY(mt_params_build(c, shard, &params));
  mt_err err = mt_model_create(m, c, &params, recipe, be, options);
  if (!err) err = mt_random_weights(m, seed);
  if (err && m->be) mt_model_destroy(m);
  mt_params_free(&params);
  return err;
}

mt_err mt_random_batch(struct mt_batch *b, int first, int samples, int length, int vocab,
                       uint64_t seed) {
  int n = length;
  int32_t *ids = malloc((size_t)n * sizeof *ids);
  uint8_t *learn = malloc((size_t)n);
  mt_err err = MT_ENOMEM;
  if (!ids || !learn) {
    mt_fail(err, "random tokens");
    goto done;
  }
  MT_GO(mt_batch_create(b, samples * n, samples));
  mt_batch_begin(b);
  for (int s = 0; s < samples; s++) {
    struct mt_rng rng = mt_rng_make(seed, (1u << 20) + (uint64_t)(first + s));
    for (int i = 0; i < n; i++) ids[i] = (int32_t)mt_rng_below(&rng, (uint32_t)vocab), learn[i] = 1;
    MT_GO(mt_batch_add(b, &(struct mt_sample){ids, learn, n, s + 1}));
  }
done:
  free(ids);
  free(learn);
  return err;
}

mt_err mt_profile_steps(struct mt_profile *p, struct mt_step_queue *q, struct mt_batch *batch,
                        double sequence_length, int steps) {
  mt_err err = MT_OK;
  mt_profile_begin(p, q->model->be, sequence_length);
  for (int i = 0; !err && i < steps; i++) {
    struct mt_step_result r;
    err = mt_step_run(q, &batch, 1, &r);
  }
  mt_err end = mt_profile_end(p);
  return err ? err : end;
}
