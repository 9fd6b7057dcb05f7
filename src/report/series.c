#include "report/series.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { HEAT_CELLS = 30000, MIN_FRAMES = 8, MAX_FRAMES = 120 };

mt_err mt_series_create(struct mt_series *s, int capacity) {
  *s = (struct mt_series){.capacity = capacity, .stride = 1, .last = NAN};
  s->bucket = malloc((size_t)capacity * sizeof *s->bucket);
  return s->bucket ? MT_OK : mt_fail(MT_ENOMEM, "a series of %d points", capacity);
}

void mt_series_destroy(struct mt_series *s) {
  free(s->bucket);
  *s = (struct mt_series){0};
}

void mt_series_clear(struct mt_series *s) {
  s->count = 0;
  s->stride = 1;
  s->last = NAN;
}

static void join(struct mt_series_bucket *a, const struct mt_series_bucket *b) {
  if (a->count == 0 || (b->count > 0 && b->min < a->min)) a->min = b->min;
  if (a->count == 0 || (b->count > 0 && b->max > a->max)) a->max = b->max;
  a->sum = (a->count ? a->sum : 0) + (b->count ? b->sum : 0);
  a->last = b->last;
  a->count += b->count;
  a->filled += b->filled;
}

void mt_series_add(struct mt_series *s, int64_t step, double value) {
  struct mt_series_bucket one = {step, step, value, value, value, isfinite(value) ? 1 : 0, 1};
  struct mt_series_bucket *end = s->count ? &s->bucket[s->count - 1] : NULL;
  if (end && step <= end->last) return;
  if (one.count) s->last = value;
  if (end && end->filled < s->stride) {
    join(end, &one);
    return;
  }
  if (s->count == s->capacity) {
    for (int i = 0; i < s->capacity / 2; i++) {
      struct mt_series_bucket pair = s->bucket[2 * i];
      join(&pair, &s->bucket[2 * i + 1]);
      s->bucket[i] = pair;
    }
    s->count = s->capacity / 2;
    s->stride *= 2;
  }
  s->bucket[s->count++] = one;
}

double mt_bucket_mean(const struct mt_series_bucket *b) {
  return b->count ? b->sum / (double)b->count : NAN;
}

void mt_series_smooth(const struct mt_series *s, double half_life, double *out) {
  double keep = exp2(-1 / half_life), sum = 0, weight = 0;
  for (int i = 0; i < s->count; i++) {
    double x = mt_bucket_mean(&s->bucket[i]);
    if (isfinite(x)) {
      sum = keep * sum + x;
      weight = keep * weight + 1;
    }
    out[i] = isfinite(x) ? sum / weight : NAN;
  }
}

static size_t frame_cells(const struct mt_frames *f) {
  return (size_t)f->layers * (size_t)f->experts;
}

mt_err mt_frames_create(struct mt_frames *f, int layers, int experts) {
  int capacity = HEAT_CELLS / (layers * experts) / 2 * 2;
  if (capacity < MIN_FRAMES) capacity = MIN_FRAMES;
  if (capacity > MAX_FRAMES) capacity = MAX_FRAMES;
  *f = (struct mt_frames){.layers = layers, .experts = experts, .capacity = capacity, .stride = 1};
  f->frame = calloc((size_t)capacity, sizeof *f->frame);
  f->load = calloc((size_t)capacity * frame_cells(f), sizeof *f->load);
  if (f->frame && f->load) return MT_OK;
  mt_frames_destroy(f);
  return mt_fail(MT_ENOMEM, "loads of %d layers of %d experts", layers, experts);
}

void mt_frames_destroy(struct mt_frames *f) {
  free(f->frame);
  free(f->load);
  *f = (struct mt_frames){0};
}

const int64_t *mt_frames_at(const struct mt_frames *f, int i) {
  return f->load + (size_t)i * frame_cells(f);
}

static void join_frames(struct mt_frames *f) {
  size_t n = frame_cells(f);
  for (int i = 0; i < f->capacity / 2; i++) {
    int64_t *a = f->load + (size_t)(2 * i) * n, *b = a + n, *to = f->load + (size_t)i * n;
    for (size_t k = 0; k < n; k++) to[k] = a[k] + b[k];
    f->frame[i] = (struct mt_frame){f->frame[2 * i].first, f->frame[2 * i + 1].last,
                                    f->frame[2 * i].filled + f->frame[2 * i + 1].filled};
  }
  f->count = f->capacity / 2;
  f->stride *= 2;
}

void mt_frames_add(struct mt_frames *f, int64_t step, const int32_t *load) {
  size_t n = frame_cells(f);
  if (f->count && step <= f->frame[f->count - 1].last) return;
  if (f->count == 0 || f->frame[f->count - 1].filled == f->stride) {
    if (f->count == f->capacity) join_frames(f);
    f->frame[f->count] = (struct mt_frame){step, step, 0};
    memset(f->load + (size_t)f->count * n, 0, n * sizeof *f->load);
    f->count++;
  }
  int64_t *to = f->load + (size_t)(f->count - 1) * n;
  for (size_t k = 0; k < n; k++) to[k] += load[k];
  f->frame[f->count - 1].last = step;
  f->frame[f->count - 1].filled++;
}
