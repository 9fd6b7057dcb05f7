#include "train/graphs.h"

#include "base/log.h"

enum { FAILURES_MOST = 3 };

bool mt_graphs_possible(const struct mt_backend *be, enum mt_experts_strategy experts) {
  return be->graph_begin && experts != MT_EXPERTS_LOOP;
}

/* Whether its experts' products read counts back in this recipe. */
static bool counts_are_read(const struct mt_model *m) {
  enum mt_qformat format = m->acts.moe_format;
  return format != MT_Q_NONE && format == m->be->counted_format;
}

void mt_graphs_open(struct mt_graphs *g, struct mt_model *m, bool on) {
  *g = (struct mt_graphs){0};
  if (on && mt_graphs_possible(m->be, m->options.experts) && !counts_are_read(m)) g->model = m;
}

void mt_graphs_close(struct mt_graphs *g) {
  for (int i = 0; i < g->key_count; i++) {
    if (g->graph[i].exec) g->model->be->graph_free(g->model->be, g->graph[i].exec);
  }
  *g = (struct mt_graphs){0};
}

static struct mt_graph *graph_of(struct mt_graphs *g, struct mt_graph_key key) {
  for (int i = 0; i < g->key_count; i++) {
    struct mt_graph *x = &g->graph[i];
    if (x->key.tokens == key.tokens && x->key.accumulate == key.accumulate &&
        x->key.several == key.several)
      return x;
  }
  if (g->key_count == MT_GRAPH_KEYS) return NULL;
  g->graph[g->key_count] = (struct mt_graph){.key = key};
  return &g->graph[g->key_count++];
}

/* Nothing runs; x->exec (=). */
static mt_err capture(struct mt_graphs *g, struct mt_graph *x, mt_err (*launch)(void *context),
                      void *context) {
  struct mt_backend *be = g->model->be;
  MT_TRY(be->graph_begin(be));
  mt_err err = launch(context);
  mt_err end = be->graph_end(be, err ? NULL : &x->exec);
  if (err) return err;
  if (!end) g->count++;
  return end;
}

mt_err mt_graphs_run(struct mt_graphs *g, struct mt_graph_key key, mt_err (*launch)(void *context),
                     void *context, bool *replayed) {
  struct mt_model *m = g->model;
  *replayed = false;
  if (!m || m->grad_ready || m->be->profile) return launch(context);
  struct mt_graph *x = graph_of(g, key);
  if (!x) return launch(context);
  bool make = !x->exec && g->warm && g->count < MT_GRAPHS && g->failures < FAILURES_MOST;
  if (make && capture(g, x, launch, context)) {
    if (g->failures++ == 0)
      mt_warn("no graph of this part of a step: %s; it is launched as usual", mt_error_message());
  }
  if (!x->exec) return launch(context);
  *replayed = true;
  mt_range(m, key.tokens < 0 ? "update" : "pass");
  return m->be->graph_replay(m->be, x->exec);
}
