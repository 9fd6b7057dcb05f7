#include "par/mesh.h"

static const char *const group_names[MT_GROUP_COUNT] = {[MT_GROUP_WORLD] = "world",
                                                        [MT_GROUP_EXPERT] = "expert",
                                                        [MT_GROUP_DATA] = "data",
                                                        [MT_GROUP_DENSE] = "dense",
                                                        [MT_GROUP_PIPE] = "pipeline"};

const char *mt_group_name(enum mt_group group) {
  return group_names[group];
}

/* Stages differ by one layer at most, the earlier ones holding more: the last also has the head. */
static int64_t stage_begin(int64_t layers, int pp, int stage) {
  int64_t each = layers / pp, more = layers % pp;
  return stage * each + (stage < more ? stage : more);
}

static void place(struct mt_mesh *m, const struct mt_config *c, int rank) {
  int64_t experts = c->experts / m->ep;
  m->rank = rank;
  m->ep_rank = rank % m->ep;
  m->dp_rank = rank / m->ep % m->dp;
  m->pp_rank = rank / (m->ep * m->dp);
  m->layer_begin = stage_begin(c->layers, m->pp, m->pp_rank);
  m->layer_end = stage_begin(c->layers, m->pp, m->pp_rank + 1);
  m->expert_begin = m->ep_rank * experts;
  m->expert_end = m->expert_begin + experts;
}

mt_err mt_mesh_make(const struct mt_config *c, int world, int rank, int ep, int pp,
                    struct mt_mesh *out) {
  *out = (struct mt_mesh){0};
  if (ep < 1 || pp < 1) {
    return mt_fail(MT_EINVAL, "--ep-size %d, --pp-size %d: both must be at least 1", ep, pp);
  }
  int64_t each = (int64_t)ep * pp;
  if (world % each != 0) {
    return mt_fail(MT_EINVAL,
                   "%d ranks cannot be cut into --ep-size %d x --pp-size %d: %d is not a multiple "
                   "of %lld",
                   world, ep, pp, world, (long long)each);
  }
  if (c->experts % ep != 0) {
    return mt_fail(MT_EINVAL, "--ep-size %d does not divide the model's %d experts", ep,
                   c->experts);
  }
  if (pp > c->layers) {
    return mt_fail(MT_EINVAL, "--pp-size %d is more than the model's %d layers", pp, c->layers);
  }
  if (pp > 1 && c->tied_head) {
    return mt_fail(MT_EUNSUPPORTED,
                   "--pp-size %d: tie_word_embeddings: the first stage's embedding would be the "
                   "last one's head",
                   pp);
  }
  *out = (struct mt_mesh){.world = world, .dp = (int)(world / each), .ep = ep, .pp = pp};
  place(out, c, rank);
  return MT_OK;
}

struct mt_mesh mt_mesh_of(const struct mt_mesh *m, const struct mt_config *c, int rank) {
  struct mt_mesh other = *m;
  place(&other, c, rank);
  return other;
}

int mt_mesh_stage(const struct mt_mesh *m, const struct mt_config *c, int64_t layer) {
  int stage = 0;
  while (stage + 1 < m->pp && stage_begin(c->layers, m->pp, stage + 1) <= layer) stage++;
  return stage;
}

struct mt_group_span mt_mesh_group(const struct mt_mesh *m, enum mt_group group) {
  int stage = m->ep * m->dp, first_of_stage = m->pp_rank * stage;
  switch (group) {
  case MT_GROUP_EXPERT:
    return (struct mt_group_span){m->rank - m->ep_rank, 1, m->ep, m->ep_rank};
  case MT_GROUP_DATA:
    return (struct mt_group_span){first_of_stage + m->ep_rank, m->ep, m->dp, m->dp_rank};
  case MT_GROUP_DENSE:
    return (struct mt_group_span){first_of_stage, 1, stage, mt_mesh_reader(m)};
  case MT_GROUP_PIPE:
    return (struct mt_group_span){mt_mesh_reader(m), stage, m->pp, m->pp_rank};
  default:
    return (struct mt_group_span){0, 1, m->world, m->rank};
  }
}
