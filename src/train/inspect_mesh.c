/* Which rank of a mesh holds what of a model. */
#include <stdio.h>
#include <stdlib.h>

#include "train/inspect.h"

void mt_inspect_mesh(const struct mt_mesh *mesh, const struct mt_config *c, const uint64_t *bytes) {
  printf("\nmesh            %d rank%s: %d x data, %d x expert, %d x pipeline\n", mesh->world,
         mesh->world == 1 ? "" : "s", mesh->dp, mesh->ep, mesh->pp);
  printf("%6s %6s %6s %6s  %-11s %s%s\n", "rank", "data", "expert", "stage", "layers",
         "experts of each", bytes ? "     bytes of arenas" : "");
  for (int rank = 0; rank < mesh->world; rank++) {
    struct mt_mesh m = mt_mesh_of(mesh, c, rank);
    char layers[48], experts[48];
    snprintf(layers, sizeof layers, "%lld-%lld", (long long)m.layer_begin,
             (long long)m.layer_end - 1);
    snprintf(experts, sizeof experts, "%lld-%lld", (long long)m.expert_begin,
             (long long)m.expert_end - 1);
    printf("%6d %6d %6d %6d  %-11s ", rank, m.dp_rank, m.ep_rank, m.pp_rank, layers);
    if (bytes)
      printf("%-15s %19llu\n", experts, (unsigned long long)bytes[rank]);
    else
      printf("%s\n", experts);
  }
}

void mt_inspect_plan(const struct mt_memory *m, const char *of) {
  const struct {
    const char *name;
    size_t bytes;
  } rows[] = {{"parameters", m->parameters},
              {"gradients", m->gradients},
              {"optimizer", m->optimizer},
              {"activations", m->activations},
              {"arenas", m->parameters + m->gradients + m->optimizer + m->activations}};
  printf("\n%-12s %16s %10s%s\n", "memory", "bytes", "MiB", of);
  for (int i = 0; i < 5; i++) {
    printf("%-12s %16zu %10.1f\n", rows[i].name, rows[i].bytes, (double)rows[i].bytes / 1048576);
  }
}

static mt_err of_ranks(struct mt_world *w, const struct mt_mesh *mesh, const struct mt_config *c,
                       const struct mt_memory *mine) {
  uint64_t *bytes = calloc((size_t)w->size, sizeof *bytes);
  if (!bytes) return mt_fail(MT_ENOMEM, "the memory of %d ranks", w->size);
  bytes[w->rank] = mine->parameters + mine->gradients + mine->optimizer + mine->activations;
  mt_err err = mt_comm_gather_each(&w->all, bytes, sizeof *bytes);
  if (!err && w->rank == 0) {
    mt_inspect_mesh(mesh, c, bytes);
    mt_inspect_plan(mine, "  of rank 0");
  }
  free(bytes);
  return err;
}

mt_err mt_inspect_session(struct mt_session *s, const struct mt_model_options *o,
                          const struct mt_string_list *freeze) {
  const struct mt_config *c = &s->checkpoint.config;
  struct mt_memory memory;
  struct mt_mesh alone;
  mt_err err = mt_session_plan(s, o, freeze, &memory);
  MT_TRY(mt_world_meet(s->world, err, NULL));
  if (s->ranks) return of_ranks(s->world, &s->ranks->mesh, c, &memory);
  MT_TRY(mt_mesh_make(c, 1, 0, 1, 1, &alone));
  mt_inspect_mesh(&alone, c, NULL);
  mt_inspect_plan(&memory, "");
  return MT_OK;
}
