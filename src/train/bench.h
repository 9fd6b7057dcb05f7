/* What a measured run is made of; `moetune bench`, `ladder` and `plan --machine this` share it. */
#ifndef MT_TRAIN_BENCH_H
#define MT_TRAIN_BENCH_H

#include "model/model.h"

struct mt_profile;
struct mt_step_queue;

/* Sorts x[n] and gives its middle. */
double mt_median(double *x, int n);
bool mt_bench_on_gpu(const struct mt_backend *be);

/* The yardstick of a device: on the CPU oneDNN's dnnl_sgemm of 2048 cubed on all threads, on a GPU
 * the backend's own dense product of 8192 cubed in the recipe's format. It takes turns with the
 * steps, so that what else the machine does falls on both. */
struct mt_yardstick {
  struct mt_backend *be;
  int64_t n;
  struct mt_tensor a, b, c;
};
/* Errors: MT_ENOMEM. Freed also after an error; safe on a zeroed one. */
mt_err mt_yardstick_make(struct mt_yardstick *y, struct mt_backend *be,
                         const struct mt_recipe *recipe);
void mt_yardstick_free(struct mt_yardstick *y);
/* *ms (=) of one product, which is waited for. */
mt_err mt_yardstick_ms(struct mt_yardstick *y, double *ms);
/* Bytes a second of y = a + b over the yardstick's matrices, the median of several. */
mt_err mt_yardstick_copy_rate(struct mt_yardstick *y, double *bytes_per_s);

/* Steps of the queue with every operation timed into *p (=). Errors: those of a step, with the
 * backend's own operations given back. */
mt_err mt_profile_steps(struct mt_profile *p, struct mt_step_queue *q, struct mt_batch *batch,
                        double sequence_length, int steps);

/* Random weights in all forms (=), those of the whole model whatever part of it is here; one random
 * block again and again, since billions of random numbers would take longer than what is measured.
 */
mt_err mt_random_weights(struct mt_model *m, uint64_t seed);

/* A model of random weights, of what options->shard says is here. Errors: those of mt_config_check
 * and mt_model_create; nothing is kept then. */
mt_err mt_random_model(struct mt_model *m, const struct mt_config *c,
                       const struct mt_recipe *recipe, struct mt_backend *be,
                       const struct mt_model_options *options, uint64_t seed);

/* Samples number `first` and following of `length` random tokens each, all of them targets.
 * Released with mt_batch_destroy. */
mt_err mt_random_batch(struct mt_batch *b, int first, int samples, int length, int vocab,
                       uint64_t seed);

#endif
