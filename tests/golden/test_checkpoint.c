/* Checkpoints in and out, on the golden models: loading against transformers' packed names, byte
 * identity of export and of conversions there and back, and broken directories. */
#include "hf/checkpoint.h"
#include "kernels/registry.h"
#include "model/model.h"
#include "temp_dir.h"

#define TINY MT_SOURCE_DIR "/tests/golden/mixtral-tiny/model"
#define AUX  MT_SOURCE_DIR "/tests/golden/mixtral-aux/model"

static struct mt_backend host(void) {
  struct mt_backend be = {.name = "host"};
  mt_backend_use_host_memory(&be);
  return be;
}

/* Every tensor of a is in b with the same bytes, shape and dtype, and the other way round. */
static void same_tensors(const char *a_dir, const char *b_dir) {
  struct mt_hf_checkpoint a, b;
  OK(mt_hf_open(a_dir, &a));
  OK(mt_hf_open(b_dir, &b));
  size_t seen = 0, have = 0;
  for (int s = 0; s < b.shard_count; s++) have += b.shard[s].count;
  for (int s = 0; s < a.shard_count; s++) {
    for (size_t i = 0; i < a.shard[s].count; i++, seen++) {
      const struct mt_st_tensor *x = &a.shard[s].tensor[i], *y = NULL;
      for (int k = 0; k < b.shard_count && !y; k++) y = mt_st_find(&b.shard[k], x->name);
      if (!y) fail_msg("'%s' is missing", x->name);
      assert_int_equal(x->dtype, y->dtype);
      assert_int_equal(x->rank, y->rank);
      assert_int_equal(x->size_bytes, y->size_bytes);
      if (memcmp(x->data, y->data, x->size_bytes) != 0) fail_msg("'%s' differs", x->name);
    }
  }
  assert_int_equal(seen, have);
  mt_hf_close(&a);
  mt_hf_close(&b);
}

static void convert(const char *from, const char *to, int layout, int dtype, uint64_t shard) {
  struct mt_hf_checkpoint h;
  struct mt_hf_export_options o = {.layout = layout, .dtype = dtype, .max_shard_bytes = shard};
  OK(mt_hf_open(from, &h));
  OK(mt_hf_export(&h, NULL, NULL, to, &o));
  mt_hf_close(&h);
}

static void loads_what_transformers_holds(void **state) {
  (void)state;
  struct mt_hf_checkpoint h;
  struct mt_params params;
  struct mt_st_file want;
  struct mt_backend be = host();
  OK(mt_hf_open(TINY, &h));
  OK(mt_st_open(MT_SOURCE_DIR "/tests/golden/mixtral-tiny/fused_names.safetensors", &want));
  OK(mt_params_build(&h.config, NULL, &params));
  for (int i = 0; i < params.count; i++) {
    struct mt_param *p = &params.row[i];
    size_t n = (size_t)mt_param_count(p);
    p->compute = mt_vec(calloc(n, 2), MT_BF16, (int64_t)n);
    p->master = mt_vec(calloc(n, 4), MT_F32, (int64_t)n);
  }
  OK(mt_hf_load(&h, &params, &be));
  for (int i = 0; i < params.count; i++) {
    struct mt_param *p = &params.row[i];
    const float *master = p->master.data;
    const uint16_t *compute = p->compute.data;
    for (int64_t k = 0; k < mt_param_count(p); k++)
      assert_int_equal(compute[k], mt_f32_to_bf16(master[k]));
    if (p->kind == MT_PARAM_QKV) { /* row layout: per group its queries, K, V */
      int64_t d = h.config.head_dim, r = h.config.heads / h.config.kv_heads, w = h.config.hidden;
      static const char *const parts[] = {"q", "k", "v"};
      for (int part = 0; part < 3; part++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.%d.self_attn.%s_proj.weight", p->layer,
                 parts[part]);
        const struct mt_st_tensor *t = mt_st_find(&want, name);
        assert_non_null(t);
        int64_t rows = part ? d : r * d, at = part == 0 ? 0 : (r + part - 1) * d;
        for (int64_t g = 0; g < h.config.kv_heads; g++) {
          assert_memory_equal(master + (g * (r + 2) * d + at) * w,
                              t->data + (size_t)(g * rows * w) * 4, (size_t)(rows * w) * 4);
        }
      }
      continue;
    }
    struct mt_hf_tensor t = mt_hf_tensor_at(&h.config, MT_HF_PACKED, p, 0);
    const struct mt_st_tensor *x = mt_st_find(&want, t.name);
    if (!x) fail_msg("'%s' is not in the fixture", t.name);
    assert_memory_equal(master, x->data, x->size_bytes);
  }
  for (int i = 0; i < params.count; i++)
    free(params.row[i].compute.data), free(params.row[i].master.data);
  mt_params_free(&params);
  mt_st_close(&want);
  mt_hf_close(&h);
}

static char *config_text(const char *dir) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  OK(mt_path_join(path, dir, "config.json"));
  OK(mt_file_read(path, 1 << 20, &text, &size));
  return text;
}

/* An export changes no more of config.json than the dtype, and not how its numbers are written. */
static void config_keeps_its_numbers(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], out[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(out, dir, "out"));
  convert(AUX, out, MT_HF_KEEP, MT_F32, 0);
  char *text = config_text(out);
  if (!strstr(text, "\"rms_norm_eps\": 1e-6,")) fail_msg("numbers changed: %s", text);
  free(text);
  convert(AUX, out, MT_HF_KEEP, MT_BF16, 0);
  char *same = config_text(out), *original = config_text(AUX);
  assert_string_equal(same, original);
  free(same);
  free(original);
  OK(mt_dir_remove(dir));
}

static void conversions_come_back(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], a[MT_PATH_MAX], b[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(a, dir, "a"));
  OK(mt_path_join(b, dir, "b"));
  const char *const sources[] = {TINY, AUX};
  for (int i = 0; i < 2; i++) {
    convert(sources[i], a, MT_HF_PACKED, MT_HF_KEEP, 100000);
    convert(a, b, MT_HF_PER_EXPERT, MT_HF_KEEP, 0);
    same_tensors(sources[i], b);
  }
  convert(AUX, a, MT_HF_KEEP, MT_F32, 0); /* bf16 -> f32 -> bf16 loses nothing */
  convert(a, b, MT_HF_KEEP, MT_BF16, 0);
  same_tensors(AUX, b);
  struct mt_hf_checkpoint h;
  OK(mt_hf_open(a, &h));
  assert_string_equal(json_string_value(json_object_get(h.json, "torch_dtype")), "float32");
  mt_hf_close(&h);
  OK(mt_dir_remove(dir));
}

/* Learned rows come from memory, frozen ones byte for byte from the source. */
static void export_of_a_model(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], out[MT_PATH_MAX];
  struct mt_hf_checkpoint h, back;
  struct mt_params params;
  struct mt_model m;
  struct mt_backend be;
  struct mt_model_options o = {.training = true, .token_capacity = 8, .sequence_capacity = 1};
  const char *const frozen[] = {"*self_attn*", "model.layers.1.mlp.experts.*"};
  temp_dir(dir);
  OK(mt_path_join(out, dir, "out"));
  OK(mt_hf_open(AUX, &h));
  OK(mt_backend_create(&be, "cpu", 1));
  OK(mt_params_build(&h.config, NULL, &params));
  OK(mt_hf_freeze(&h.config, &params, frozen, 2));
  OK(mt_model_create(&m, &h.config, &params, mt_recipe_find("bf16"), &be, &o));
  OK(mt_hf_load(&h, &m.params, &be));
  struct mt_hf_export_options e = {
      .layout = MT_HF_KEEP, .dtype = MT_HF_KEEP, .max_shard_bytes = 50000};
  OK(mt_hf_export(&h, &m.params, &be, out, &e));
  same_tensors(AUX, out); /* nothing has changed yet */
  float *w = mt_params_find(&m.params, MT_PARAM_ROUTER, 2)->master.data;
  w[5] = 7;
  float *hidden = mt_params_find(&m.params, MT_PARAM_QKV, 0)->compute.data;
  memset(hidden, 0, 64); /* frozen: memory does not count */
  OK(mt_hf_export(&h, &m.params, &be, out, &e));
  OK(mt_hf_open(out, &back));
  assert_true(back.shard_count > 3);
  int changed = 0;
  for (int s = 0; s < h.shard_count; s++) {
    for (size_t i = 0; i < h.shard[s].count; i++) {
      const struct mt_st_tensor *x = &h.shard[s].tensor[i], *y = NULL;
      for (int k = 0; k < back.shard_count && !y; k++) y = mt_st_find(&back.shard[k], x->name);
      assert_non_null(y);
      if (memcmp(x->data, y->data, x->size_bytes) == 0) continue;
      assert_string_equal(x->name, "model.layers.2.block_sparse_moe.gate.weight");
      assert_int_equal(((const uint16_t *)(const void *)y->data)[5], mt_f32_to_bf16(7));
      changed++;
    }
  }
  assert_int_equal(changed, 1);
  mt_hf_close(&back);
  mt_model_destroy(&m);
  mt_backend_destroy(&be);
  mt_hf_close(&h);
  OK(mt_dir_remove(dir));
}

static void freezing(void **state) {
  (void)state;
  struct mt_hf_checkpoint h;
  struct mt_params p;
  OK(mt_hf_open(AUX, &h));
  OK(mt_params_build(&h.config, NULL, &p));
  FAILS(mt_hf_freeze(&h.config, &p, (const char *[]){"nothing"}, 1), MT_EINVAL, "nothing");
  FAILS(mt_hf_freeze(&h.config, &p, (const char *[]){"*q_proj*"}, 1), MT_EUNSUPPORTED, "together");
  FAILS(mt_hf_freeze(&h.config, &p, (const char *[]){"*experts.1.w1*"}, 1), MT_EUNSUPPORTED,
        "together");
  OK(mt_hf_freeze(&h.config, &p, (const char *[]){"layers.0.*", "*embed*"}, 2));
  for (int i = 0; i < p.count; i++) {
    assert_int_equal(p.row[i].learns, p.row[i].layer != 0 && p.row[i].kind != MT_PARAM_EMBED);
  }
  mt_params_free(&p);
  mt_hf_close(&h);
}

/* A copy of the small bf16 checkpoint with one file replaced. */
static void broken(const char *dir, const char *file, const char *text) {
  static const char *const files[] = {
      "config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors",
      "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"};
  for (int i = 0; i < 5; i++) temp_copy(AUX, files[i], dir);
  char path[MT_PATH_MAX];
  OK(mt_path_join(path, dir, file));
  if (text)
    temp_text(dir, file, text);
  else
    assert_int_equal(unlink(path), 0);
}

static char *edited(const char *file, const char *from, const char *to) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  OK(mt_path_join(path, AUX, file));
  OK(mt_file_read(path, 1 << 20, &text, &size));
  char *at = strstr(text, from), *out = malloc(size + strlen(to) + 1);
  assert_non_null(at);
  snprintf(out, size + strlen(to) + 1, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
  free(text);
  return out;
}

static void broken_directories(void **state) {
  (void)state;
  char dir[MT_PATH_MAX];
  struct mt_hf_checkpoint h;
  temp_dir(dir);
  static const char index[] = "model.safetensors.index.json";
  const struct {
    const char *file, *from, *to;
    mt_err err;
    const char *names;
  } cases[] = {
      {"config.json", "\"vocab_size\": 384", "\"vocab_size\": 385", MT_ESHAPE,
       "model.embed_tokens.weight"},
      {"config.json", "\"num_local_experts\": 4", "\"num_local_experts\": 5", MT_ESHAPE,
       "gate.weight"},
      {"config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", MT_ENOENT,
       "model.layers.3"},
      {index, "model-00001-of-00003.safetensors", "../../etc/passwd", MT_EFORMAT,
       "no plain file name"},
      {index, "model-00001-of-00003.safetensors", "/etc/passwd", MT_EFORMAT, "no plain file name"},
      {index, "model-00001-of-00003.safetensors", "model-00009.safetensors", MT_ENOENT,
       "model-00009"},
      {index, "\"lm_head.weight\"", "\"lm_head.other\"", MT_EFORMAT, "lm_head.other"},
      {index, "weight_map", "weight_cap", MT_EFORMAT, "weight_map"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char *text = edited(cases[i].file, cases[i].from, cases[i].to);
    broken(dir, cases[i].file, text);
    FAILS(mt_hf_open(dir, &h), cases[i].err, cases[i].names);
    free(text);
  }
  broken(dir, "model-00002-of-00003.safetensors", NULL);
  FAILS(mt_hf_open(dir, &h), MT_ENOENT, "model-00002-of-00003.safetensors");
  broken(dir, index, NULL);
  FAILS(mt_hf_open(dir, &h), MT_ENOENT, "neither model.safetensors nor");
  FAILS(mt_hf_open("/no/such/dir", &h), MT_ENOENT, "/no/such/dir");
  OK(mt_dir_remove(dir));
}

static void random_weights_repeat(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], base[MT_PATH_MAX], a[MT_PATH_MAX], b[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(base, dir, "base"));
  OK(mt_path_join(a, dir, "a"));
  OK(mt_path_join(b, dir, "b"));
  OK(mt_dir_create(base));
  temp_copy(TINY, "config.json", base);
  OK(mt_hf_init(base, a, 1, MT_HF_KEEP));
  OK(mt_hf_init(base, b, 1, MT_HF_KEEP));
  same_tensors(a, b);
  struct mt_hf_checkpoint h;
  OK(mt_hf_open(a, &h));
  double sum = 0;
  const struct mt_st_tensor *t = mt_st_find(&h.shard[0], "model.embed_tokens.weight");
  for (size_t i = 0; i < t->size_bytes / 4; i++) {
    float x;
    memcpy(&x, t->data + 4 * i, 4);
    sum += (double)x * x;
  }
  double sd = sum / (double)(t->size_bytes / 4);
  assert_true(sd > 0.00038 && sd < 0.00042); /* 0.02^2 */
  mt_hf_close(&h);
  OK(mt_dir_remove(dir));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(loads_what_transformers_holds),
      cmocka_unit_test(config_keeps_its_numbers),
      cmocka_unit_test(conversions_come_back),
      cmocka_unit_test(export_of_a_model),
      cmocka_unit_test(freezing),
      cmocka_unit_test(broken_directories),
      cmocka_unit_test(random_weights_repeat),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
