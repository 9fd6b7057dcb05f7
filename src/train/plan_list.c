/* All meshes of so many ranks, best first; and the best ones as ranks become more. */
#include <stdlib.h>

#include "train/plan.h"

static double rate(const struct mt_plan *p) {
  return p->tokens / p->time.step;
}

static int better(const void *x, const void *y) {
  const struct mt_plan *a = x, *b = y;
  if (a->fits != b->fits) return a->fits ? -1 : 1;
  if (!a->fits) return (a->memory.total > b->memory.total) - (a->memory.total < b->memory.total);
  if (rate(a) != rate(b)) return rate(a) > rate(b) ? -1 : 1;
  return (a->memory.total > b->memory.total) - (a->memory.total < b->memory.total);
}

/* ZeRO shares something out only where several ranks hold the same. */
static bool pointless(const struct mt_plan *p) {
  return p->zero > 0 && p->dp * p->ep == 1;
}

static bool left_out(const struct mt_plan_options *o, const struct mt_plan *p) {
  return (o->fixed_ep && p->ep != o->ep_size) || (o->fixed_pp && p->pp != o->pp_size) ||
         (o->fixed_zero && p->zero != o->zero) ||
         (o->fixed_recompute && p->recompute != o->recompute);
}

struct list {
  struct mt_plan *plan;
  int count, capacity;
};

static mt_err add(struct list *l, const struct mt_plan *p) {
  if (l->count == l->capacity) {
    int more = l->capacity ? 2 * l->capacity : 64;
    void *grown = realloc(l->plan, (size_t)more * sizeof *l->plan);
    if (!grown) return mt_fail(MT_ENOMEM, "%d meshes", more);
    l->plan = grown;
    l->capacity = more;
  }
  l->plan[l->count++] = *p;
  return MT_OK;
}

static mt_err add_ways(struct mt_planner *p, int gpus, int ep, int pp, struct list *l) {
  for (int zero = 0; zero <= 2; zero++) {
    for (int recompute = 0; recompute <= MT_RECOMPUTE_FULL; recompute++) {
      struct mt_plan plan = {.gpus = gpus,
                             .ep = ep,
                             .pp = pp,
                             .dp = gpus / ep / pp,
                             .zero = zero,
                             .recompute = recompute,
                             .micro = p->options->micro_batches};
      if (left_out(p->options, &plan) || (pointless(&plan) && !p->options->fixed_zero)) continue;
      MT_TRY(mt_plan_mesh(p, &plan));
      MT_TRY(add(l, &plan));
    }
  }
  return MT_OK;
}

mt_err mt_plan_meshes(struct mt_planner *p, int gpus, struct mt_plan **plans, int *count) {
  struct list l = {0};
  mt_err err = MT_OK;
  for (int ep = 1; ep <= p->config.experts && ep <= gpus; ep++) {
    for (int pp = 1; pp <= p->config.layers && ep * pp <= gpus; pp++) {
      if (p->config.experts % ep != 0 || gpus % (ep * pp) != 0) continue;
      if (pp > 1 && p->config.tied_head) continue; /* no mesh: mt_mesh_make */
      MT_GO(add_ways(p, gpus, ep, pp, &l));
    }
  }
  if (l.count) qsort(l.plan, (size_t)l.count, sizeof *l.plan, better);
done:
  if (err) free(l.plan);
  *plans = err ? NULL : l.plan;
  *count = err ? 0 : l.count;
  return err;
}

mt_err mt_plan_sweep(struct mt_planner *p, int most, struct mt_sweep *out) {
  *out = (struct mt_sweep){0};
  for (int gpus = 1; gpus <= most && out->count < MT_SWEEP_POINTS; gpus *= 2) {
    struct mt_plan *plans;
    int count;
    MT_TRY(mt_plan_meshes(p, gpus, &plans, &count));
    if (count == 0) continue;
    struct mt_plan best = plans[0], plain = {0};
    int host = p->machine.host_ranks;
    /* Data parallelism around one host's experts, nothing else. */
    for (int i = count - 1; i >= 0; i--) {
      bool one_host = plans[i].pp == 1 && plans[i].ep == (gpus < host ? gpus : host);
      if (plans[i].fits && one_host) plain = plans[i];
    }
    free(plans);
    if (!best.fits) continue;
    out->plain[out->count] = plain;
    out->best[out->count++] = best;
  }
  if (out->count) return MT_OK;
  return mt_fail(MT_EINVAL, "no mesh of up to %d ranks fits", most);
}
