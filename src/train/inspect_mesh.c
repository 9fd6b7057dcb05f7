/* Which rank of a mesh holds what of a model. */
#include <stdio.h>

#include "train/inspect.h"

void mt_inspect_mesh(const struct mt_mesh *mesh, const struct mt_config *c) {
  printf("\nmesh            %d rank%s: %d x data, %d x expert, %d x pipeline\n", mesh->world,
         mesh->world == 1 ? "" : "s", mesh->dp, mesh->ep, mesh->pp);
  printf("%6s %6s %6s %6s  %-11s %s\n", "rank", "data", "expert", "stage", "layers",
         "experts of each");
  for (int rank = 0; rank < mesh->world; rank++) {
    struct mt_mesh m = mt_mesh_of(mesh, c, rank);
    char layers[48];
    snprintf(layers, sizeof layers, "%lld-%lld", (long long)m.layer_begin,
             (long long)m.layer_end - 1);
    printf("%6d %6d %6d %6d  %-11s %lld-%lld\n", rank, m.dp_rank, m.ep_rank, m.pp_rank, layers,
           (long long)m.expert_begin, (long long)m.expert_end - 1);
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
