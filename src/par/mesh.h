/* The mesh of ranks: world = DP x EP x PP. A rank's place, the groups that it belongs to, and which
 * layers and experts it holds. Pure arithmetic: nothing here communicates.
 *
 * Ranks are laid out with EP innermost, then DP, then PP: rank = (pp * DP + dp) * EP + ep. So the
 * ranks that exchange tokens are neighbours (one host, where links are fastest), and stages, which
 * send least, are farthest apart. Every rank has its own data but for the stages of a pipeline:
 * they share their first stage's. */
#ifndef MT_PAR_MESH_H
#define MT_PAR_MESH_H

#include "model/config.h"

struct mt_mesh {
  int world, dp, ep, pp;               /* sizes */
  int rank, dp_rank, ep_rank, pp_rank; /* this rank's place */
  int64_t layer_begin, layer_end;      /* layers held */
  int64_t expert_begin, expert_end;    /* experts held, of each layer */
};

/* The ranks that share something. */
enum mt_group {
  MT_GROUP_WORLD,  /* everyone */
  MT_GROUP_EXPERT, /* EP: exchange tokens; together they hold all experts of a layer */
  MT_GROUP_DATA,   /* DP: hold the same experts */
  MT_GROUP_DENSE,  /* DP x EP: hold the same dense parameters */
  MT_GROUP_PIPE,   /* PP: stages of one pipeline */
  MT_GROUP_COUNT
};
const char *mt_group_name(enum mt_group group);

/* The place of `rank` of `world`; DP is what is left. Errors, before anything is loaded: MT_EINVAL
 * where world is not a multiple of ep * pp, where experts are not one of ep (every rank holds as
 * many), where pp is more than there are layers, or where a size is below 1;
 * MT_EUNSUPPORTED for stages of a model whose head is tied to its embedding. */
mt_err mt_mesh_make(const struct mt_config *c, int world, int rank, int ep, int pp,
                    struct mt_mesh *out);

/* The members of the rank's group: *first, *first + *stride, ..., *count of them, and its own
 * number among them. */
struct mt_group_span {
  int first, stride, count, index;
};
struct mt_group_span mt_mesh_group(const struct mt_mesh *m, enum mt_group group);

/* The mesh as another rank of the same world sees it. */
struct mt_mesh mt_mesh_of(const struct mt_mesh *m, const struct mt_config *c, int rank);

/* The stage that holds a layer. */
int mt_mesh_stage(const struct mt_mesh *m, const struct mt_config *c, int64_t layer);

/* Ranks that read batches of their own, and this rank's number among them. */
static inline int mt_mesh_readers(const struct mt_mesh *m) {
  return m->dp * m->ep;
}
static inline int mt_mesh_reader(const struct mt_mesh *m) {
  return m->dp_rank * m->ep + m->ep_rank;
}

#endif
