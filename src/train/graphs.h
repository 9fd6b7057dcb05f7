/* Parts of a step that are launched again and again as one graph, where the backend has graphs.
 * What a part launches must depend on its key alone (backend/ops.h). */
#ifndef MT_TRAIN_GRAPHS_H
#define MT_TRAIN_GRAPHS_H

#include "model/model.h"

/* Graphs held, and keys that are told apart: what comes beyond is launched as usual. */
enum { MT_GRAPHS = 8, MT_GRAPH_KEYS = 32 };

/* Lengths of a packed row that graphs are to be spent on: the update has one, each length one with
 * and, where a step has several micro-batches, one without accumulation. */
static inline int mt_graph_lengths(int micro_count) {
  return micro_count > 1 ? (MT_GRAPHS - 1) / 2 : MT_GRAPHS - 1;
}

struct mt_graph_key {
  int64_t tokens; /* of a pass; -1: the update */
  int accumulate;
  bool several; /* passes in the step: backward leaves no squares then */
};

struct mt_graph {
  struct mt_graph_key key;
  void *exec; /* the backend's, or NULL */
};

struct mt_graphs {
  struct mt_model *model; /* NULL: no graphs */
  struct mt_graph graph[MT_GRAPH_KEYS];
  int key_count, count; /* count: those that exist */
  bool warm;            /* set by the caller once every kind of part has been launched */
  int failures;
};

/* Whether the model's steps can be replayed: a backend with graphs, and counts that stay there. */
bool mt_graphs_possible(const struct mt_backend *be, enum mt_experts_strategy experts);

/* on: as far as possible. */
void mt_graphs_open(struct mt_graphs *g, struct mt_model *m, bool on);
void mt_graphs_close(struct mt_graphs *g);

/* Runs launch(context), by a graph where there is one or can be one: none is made before `warm`, so
 * that what a backend sets up at first use is there, and none while the host must see each launch
 * (a profile, finished gradients). *replayed (=) says whether a graph ran. A backend that fails to
 * make one gets the launches themselves, and is asked no more after some times.
 * Errors: launch's. */
mt_err mt_graphs_run(struct mt_graphs *g, struct mt_graph_key key, mt_err (*launch)(void *context),
                     void *context, bool *replayed);

#endif
