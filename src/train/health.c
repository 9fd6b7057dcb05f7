#include "train/health.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

struct mt_load_facts mt_load_facts(const int32_t *load, int experts) {
  struct mt_load_facts f = {.least = 1};
  double sum = 0;
  for (int e = 0; e < experts; e++) sum += load[e];
  if (!(sum > 0)) return (struct mt_load_facts){0};
  for (int e = 0; e < experts; e++) {
    double share = load[e] / sum;
    if (share < f.least) f.least = share;
    if (share > f.most) f.most = share;
    if (share > 0)
      f.entropy -= share * log(share);
    else
      f.idle++;
  }
  return f;
}

mt_err mt_expert_watch_create(struct mt_expert_watch *w, int layers, int experts, int64_t patience,
                              int64_t first_step) {
  size_t n = (size_t)layers * (size_t)experts;
  *w = (struct mt_expert_watch){layers, experts, patience, NULL};
  if (patience <= 0) return MT_OK;
  w->last_step = malloc(n * sizeof *w->last_step);
  if (!w->last_step) return mt_fail(MT_ENOMEM, "watch over %zu experts", n);
  for (size_t i = 0; i < n; i++) w->last_step[i] = first_step;
  return MT_OK;
}

void mt_expert_watch_destroy(struct mt_expert_watch *w) {
  free(w->last_step);
  *w = (struct mt_expert_watch){0};
}

int mt_expert_watch_step(struct mt_expert_watch *w, int64_t step, const int32_t *load, char *text,
                         size_t size) {
  int found = 0, named_layer = -1;
  size_t used = 0;
  if (!w->last_step) return 0;
  for (int i = 0; i < w->layers * w->experts; i++) {
    int layer = i / w->experts;
    if (load[i] > 0) w->last_step[i] = step;
    if (step - w->last_step[i] != w->patience) continue;
    found++;
    if (used + 40 > size) continue; /* counted, not named */
    if (layer != named_layer) {
      used += (size_t)snprintf(text + used, size - used, "%slayer %d:", used ? "; " : "", layer);
    }
    used += (size_t)snprintf(text + used, size - used, " %d", i % w->experts);
    named_layer = layer;
  }
  return found;
}
