/* A number at every step, in bounded memory: buckets of equally many steps, each with the least,
 * the largest and the mean of what fell into it. When they are full, neighbours are joined. */
#ifndef MT_REPORT_SERIES_H
#define MT_REPORT_SERIES_H

#include <stdint.h>

#include "base/error.h"

enum { MT_SERIES_POINTS = 1500, MT_SERIES_FEW = 300 };

struct mt_series_bucket {
  int64_t first, last; /* steps */
  double min, max, sum;
  int64_t count;  /* finite values; 0: min, max and sum say nothing */
  int64_t filled; /* values, finite or not */
};

struct mt_series {
  struct mt_series_bucket *bucket;
  int count, capacity; /* capacity even; 0 before mt_series_create */
  int64_t stride;      /* values a bucket takes */
  double last;         /* value added last that is finite; NaN: none */
};

mt_err mt_series_create(struct mt_series *s, int capacity);
void mt_series_destroy(struct mt_series *s);
void mt_series_clear(struct mt_series *s);
/* Steps rise; one that does not (the same evaluation again) replaces nothing and is passed over. */
void mt_series_add(struct mt_series *s, int64_t step, double value);
/* Mean of a bucket; NaN where it has no finite value. */
double mt_bucket_mean(const struct mt_series_bucket *b);
/* Exponential moving average of the means with this half-life in buckets, corrected for its
 * beginning: out (=) [count]; NaN where the bucket has no value. */
void mt_series_smooth(const struct mt_series *s, double half_life, double *out);

/* The load of every expert over time, in the same way: sums over equally many steps. */
struct mt_frame {
  int64_t first, last, filled;
};
struct mt_frames {
  int layers, experts;
  int count, capacity; /* even */
  int64_t stride;
  struct mt_frame *frame;
  int64_t *load; /* [capacity, layers, experts] */
};

mt_err mt_frames_create(struct mt_frames *f, int layers, int experts);
void mt_frames_destroy(struct mt_frames *f);
void mt_frames_add(struct mt_frames *f, int64_t step, const int32_t *load);
/* [layers, experts] of frame i. */
const int64_t *mt_frames_at(const struct mt_frames *f, int i);

#endif
