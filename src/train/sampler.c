#include "train/sampler.h"

#include <math.h>
#include <stdlib.h>

mt_err mt_sampler_create(struct mt_sampler *s, int vocab) {
  size_t n = (size_t)vocab;
  *s = (struct mt_sampler){.vocab = vocab};
  s->logits = calloc(n, sizeof *s->logits);
  s->weight = calloc(n, sizeof *s->weight);
  s->order = calloc(n, sizeof *s->order);
  if (s->logits && s->weight && s->order) return MT_OK;
  mt_sampler_destroy(s);
  return mt_fail(MT_ENOMEM, "sampling from %d tokens", vocab);
}

void mt_sampler_destroy(struct mt_sampler *s) {
  free(s->logits);
  free(s->weight);
  free(s->order);
  *s = (struct mt_sampler){0};
}

/* Moves the heaviest of the heap order[0..n) to its end. */
static void sift(struct mt_sampler *s, int i, int n) {
  for (;;) {
    int child = 2 * i + 1;
    if (child >= n) return;
    if (child + 1 < n && s->weight[s->order[child + 1]] > s->weight[s->order[child]]) child++;
    if (s->weight[s->order[child]] <= s->weight[s->order[i]]) return;
    int32_t t = s->order[i];
    s->order[i] = s->order[child];
    s->order[child] = t;
    i = child;
  }
}

int32_t mt_sampler_pick(struct mt_sampler *s, double temperature, double top_p,
                        struct mt_rng *rng) {
  int32_t best = -1;
  for (int32_t i = 0; i < s->vocab; i++) {
    if (!isnan(s->logits[i]) && (best < 0 || s->logits[i] > s->logits[best])) best = i;
  }
  if (best < 0 || temperature <= 0) return best;
  double sum = 0, kept = 0;
  for (int32_t i = 0; i < s->vocab; i++) {
    double w = exp(((double)s->logits[i] - (double)s->logits[best]) / temperature);
    s->weight[i] = isnan(w) ? 0 : w;
    sum += s->weight[i];
    s->order[i] = i;
  }
  /* A heap gives the most probable one by one: only the nucleus is ever sorted. */
  for (int i = s->vocab / 2 - 1; i >= 0; i--) sift(s, i, s->vocab);
  int n = s->vocab;
  while (n > 0 && kept < top_p * sum) {
    int32_t top = s->order[0];
    kept += s->weight[top];
    s->order[0] = s->order[--n];
    s->order[n] = top;
    sift(s, 0, n);
  }
  double at = mt_rng_uniform(rng) * kept;
  for (int i = s->vocab - 1; i >= n; i--) {
    at -= s->weight[s->order[i]];
    if (at < 0) return s->order[i];
  }
  return best;
}
