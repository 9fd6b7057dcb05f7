/* A rank reads its own slices of a checkpoint and nothing else: all pages that hold other ranks'
 * tensors alone are taken away before it loads. */
#include <sys/mman.h>

#include "dist/dist.h"
#include "hf/checkpoint.h"
#include "par/ranks.h"
#include "temp_dir.h"

static const char config[] =
    "{\"model_type\":\"mixtral\",\"hidden_size\":64,\"intermediate_size\":128,"
    "\"num_hidden_layers\":4,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
    "\"num_local_experts\":8,\"num_experts_per_tok\":2,\"vocab_size\":512}";

static char dir[MT_PATH_MAX];

static void make_checkpoint(void) {
  char base[MT_PATH_MAX];
  if (world.rank == 0) {
    temp_dir(base);
    temp_text(base, "config.json", config);
    OK(mt_path_join(dir, base, "model"));
    OK(mt_hf_init(base, dir, 1, MT_F32));
  }
  OK(mt_comm_broadcast(&everyone, dir, sizeof dir, 0));
}

static bool is_of(const struct mt_config *c, const struct mt_params *params, const char *name) {
  for (int i = 0; i < params->count; i++) {
    const struct mt_param *p = &params->row[i];
    int from = 0, to = mt_hf_tensor_count(c, MT_HF_PER_EXPERT, p), each = to / c->experts;
    if (p->sync == MT_SYNC_EXPERT) from = (int)p->first * each, to = from + (int)p->dim[0] * each;
    for (int k = from; k < to; k++) {
      struct mt_hf_tensor t = mt_hf_tensor_at(c, MT_HF_PER_EXPERT, p, k);
      if (strcmp(t.name, name) == 0) return true;
    }
  }
  return false;
}

/* Bytes that cannot be read any more. */
static int64_t take_others_away(const struct mt_hf_checkpoint *h, const struct mt_params *params) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  int64_t bytes = 0;
  for (int s = 0; s < h->shard_count; s++) {
    for (size_t i = 0; i < h->shard[s].count; i++) {
      const struct mt_st_tensor *t = &h->shard[s].tensor[i];
      uintptr_t begin = ((uintptr_t)t->data + page - 1) / page * page;
      uintptr_t end = ((uintptr_t)t->data + t->size_bytes) / page * page;
      if (begin >= end || is_of(&h->config, params, t->name)) continue;
      assert_int_equal(mprotect((void *)begin, end - begin, PROT_NONE), 0);
      bytes += (int64_t)(end - begin);
    }
  }
  return bytes;
}

static void open_model(struct mt_hf_checkpoint *h, struct mt_model *m,
                       const struct mt_shard *shard) {
  struct mt_params params;
  struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .training = true,
                               .token_capacity = 8,
                               .sequence_capacity = 1};
  if (shard) o.shard = *shard;
  OK(mt_hf_open(dir, h));
  OK(mt_hf_params(&h->config, shard, NULL, 0, NULL, &params));
  OK(mt_model_create(m, &h->config, &params, mt_recipe_find("fp32"), &dist_be, &o));
}

static void on_mesh(int ep, int pp, const struct mt_model *whole) {
  struct mt_hf_checkpoint h;
  struct mt_model m;
  struct mt_mesh mesh;
  OK(mt_mesh_make(&whole->config, world.size, world.rank, ep, pp, &mesh));
  struct mt_shard shard = mt_ranks_shard(&mesh);
  open_model(&h, &m, &shard);
  int64_t away = take_others_away(&h, &m.params), others = 0;
  OK(mt_hf_load(&h, &m.params, &dist_be));
  for (int i = 0; i < h.shard_count; i++) others += (int64_t)h.shard[i].map.size_bytes;
  for (int i = 0; i < m.params.count; i++) others -= mt_param_count(&m.params.row[i]) * 4;
  /* Pages at tensors' ends are shared, and the header is everyone's. */
  if (!((double)away >= 0.8 * (double)others - 65536))
    fail_msg("ep %d, pp %d: %lld of %lld bytes are away", ep, pp, (long long)away,
             (long long)others);
  for (int i = 0; i < m.params.count; i++) {
    const struct mt_param *p = &m.params.row[i];
    const struct mt_param *w = mt_params_find(&whole->params, p->kind, p->layer);
    size_t each = mt_bytes(&w->compute) / (size_t)w->dim[0];
    assert_memory_equal(p->compute.data, (char *)w->compute.data + (size_t)p->first * each,
                        mt_bytes(&p->compute));
  }
  mt_model_destroy(&m);
  mt_hf_close(&h);
}

static void a_rank_reads_its_own(void **state) {
  (void)state;
  struct mt_hf_checkpoint h;
  struct mt_model whole;
  make_checkpoint();
  open_model(&h, &whole, NULL);
  OK(mt_hf_load(&h, &whole.params, &dist_be));
  for (int ep = 1; ep <= 8; ep *= 2) {
    for (int pp = 1; pp <= 4; pp++) {
      if (world.size % (ep * pp) == 0) on_mesh(ep, pp, &whole);
    }
  }
  mt_model_destroy(&whole);
  mt_hf_close(&h);
  OK(mt_comm_barrier(&everyone));
  if (world.rank == 0) {
    *strrchr(dir, '/') = 0;
    OK(mt_dir_remove(dir));
  }
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(a_rank_reads_its_own)};
DIST_MAIN(tests)
