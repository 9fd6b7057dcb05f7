/* Writing a checkpoint. Where the rows come from is one function: the source's files, the model's
 * memory, or a random generator; everything else is the same. */
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/json.h"
#include "base/rng.h"
#include "hf/source.h"
#include "io/checksums.h"

enum { STAGE_BYTES = 4 << 20 };

/* One tensor to write. */
struct item {
  struct mt_hf_tensor t;
  const struct mt_param *param; /* NULL: a tensor we do not know, copied from `raw` */
  const struct mt_st_tensor *raw;
  enum mt_dtype dtype;
  int shard;
};

struct export {
  const struct mt_hf_checkpoint *h; /* NULL: random weights */
  const struct mt_config *config;
  struct mt_params names; /* rows to write; values by name from `model` */
  const struct mt_params *model;
  const struct mt_hf_gather *gather;
  struct mt_backend *be;
  uint64_t seed;
  double init_range;
  struct item *items;
  int item_count, shard_count;
  void *stage, *wide; /* converted rows; rows as float32 */
};

static mt_err random_rows(struct export *x, const struct mt_param *p, int64_t row,
                          struct mt_hf_rows *out) {
  int64_t n = mt_param_row_elems(p);
  float *w = x->wide;
  int index = (int)(p - x->names.row);
  for (int64_t r = 0; r < out->count; r++) {
    struct mt_rng rng = mt_rng_make(x->seed, ((uint64_t)index << 40) + (uint64_t)(row + r));
    for (int64_t i = 0; i < n; i++) {
      w[r * n + i] = p->rank == 1 ? 1.0f : (float)(x->init_range * mt_rng_normal(&rng));
    }
  }
  out->data = x->wide;
  out->dtype = MT_F32;
  return MT_OK;
}

/* Up to out->count rows of a parameter from wherever they are; sets how many follow. */
static mt_err fetch_rows(struct export *x, const struct mt_param *p, int64_t row,
                         struct mt_hf_rows *out) {
  if (!x->h) return random_rows(x, p, row, out);
  const struct mt_param *live = x->model ? &x->model->row[p - x->names.row] : NULL;
  if (!live || !live->learns) {
    int64_t most = out->count;
    MT_TRY(mt_hf_source_rows(x->h, p, row, out));
    if (out->count > most) out->count = most;
    return MT_OK;
  }
  out->data = x->wide;
  if (x->gather)
    return x->gather->rows(x->gather->context, p, row, out->count, x->wide, &out->dtype);
  const struct mt_tensor *t = live->master.data ? &live->master : &live->compute;
  size_t row_bytes = (size_t)mt_param_row_elems(p) * mt_dtype_bytes(t->dtype);
  out->dtype = t->dtype;
  return x->be->download(x->be, x->wide, (const char *)t->data + (size_t)row * row_bytes,
                         (size_t)out->count * row_bytes);
}

static bool writes(const struct export *x) {
  return !x->gather || x->gather->writes;
}

/* w is NULL on ranks that only hand over what they hold: they make the same way through the same
 * items. */
static mt_err write_item(struct export *x, struct mt_st_writer *w, const struct item *it) {
  if (!it->param) return w ? mt_st_write(w, it->raw->data, it->raw->size_bytes) : MT_OK;
  int64_t n = mt_param_row_elems(it->param), most = STAGE_BYTES / (n * 8);
  if (most < 1) most = 1;
  for (int64_t b = 0; b < it->t.blocks; b++) {
    for (int64_t r = 0; r < it->t.block_rows;) {
      struct mt_hf_rows rows = {.count = it->t.block_rows - r < most ? it->t.block_rows - r : most};
      MT_TRY(fetch_rows(x, it->param, it->t.param_row + b * it->t.param_stride + r, &rows));
      r += rows.count;
      if (!w) continue;
      mt_dtype_convert(x->stage, it->dtype, rows.data, rows.dtype, (size_t)(rows.count * n));
      MT_TRY(mt_st_write(w, x->stage, (size_t)(rows.count * n) * mt_dtype_bytes(it->dtype)));
    }
  }
  return MT_OK;
}

static size_t item_bytes(const struct item *it) {
  if (!it->param) return it->raw->size_bytes;
  return (size_t)(it->t.dim[0] * it->t.dim[1] * it->t.dim[2]) * mt_dtype_bytes(it->dtype);
}

static struct mt_st_entry item_entry(const struct item *it) {
  struct mt_st_entry e = {.size_bytes = item_bytes(it)};
  e.name = it->param ? it->t.name : it->raw->name;
  e.dtype_name = it->param ? mt_dtype_name(it->dtype) : it->raw->dtype_name;
  e.rank = it->param ? it->t.rank : it->raw->rank;
  const int64_t *dim = it->param ? it->t.dim : it->raw->dim;
  for (int i = 0; i < e.rank; i++) e.dim[i] = dim[i];
  return e;
}

static void shard_name(char out[64], int shard, int count) {
  if (count == 1)
    snprintf(out, 64, "model.safetensors");
  else
    snprintf(out, 64, "model-%05d-of-%05d.safetensors", shard + 1, count);
}

static mt_err hand_over(struct export *x) {
  for (int i = 0; i < x->item_count; i++) MT_TRY(write_item(x, NULL, &x->items[i]));
  return MT_OK;
}

static mt_err write_shard(struct export *x, const char *dir, int shard) {
  char name[64], path[MT_PATH_MAX];
  struct mt_st_writer w = {.fd = -1};
  struct mt_st_entry *entries = calloc((size_t)x->item_count, sizeof *entries);
  if (!entries) return mt_fail(MT_ENOMEM, "%d tensors", x->item_count);
  size_t count = 0;
  for (int i = 0; i < x->item_count; i++) {
    if (x->items[i].shard == shard) entries[count++] = item_entry(&x->items[i]);
  }
  mt_err err;
  shard_name(name, shard, x->shard_count);
  MT_GO(mt_path_join(path, dir, name));
  MT_GO(mt_st_create(&w, path, entries, count));
  for (int i = 0; i < x->item_count; i++) {
    if (x->items[i].shard == shard) MT_GO(write_item(x, &w, &x->items[i]));
  }
  MT_GO(mt_st_finish(&w));
done:
  mt_st_abort(&w);
  free(entries);
  return err;
}

static mt_err write_index(const struct export *x, const char *dir) {
  char name[64], path[MT_PATH_MAX];
  size_t total = 0;
  json_t *map = json_object();
  for (int i = 0; i < x->item_count; i++) {
    struct mt_st_entry e = item_entry(&x->items[i]);
    shard_name(name, x->items[i].shard, x->shard_count);
    if (json_object_set_new(map, e.name, json_string(name)) != 0) {
      json_decref(map);
      return mt_fail(MT_ENOMEM, "index of %d tensors", x->item_count);
    }
    total += e.size_bytes;
  }
  json_t *root =
      json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
  char *text = mt_json_text(root, JSON_INDENT(2));
  json_decref(root);
  if (!text) return mt_fail(MT_ENOMEM, "index of %d tensors", x->item_count);
  mt_err err = mt_path_join(path, dir, "model.safetensors.index.json");
  if (!err) err = mt_file_write_atomic(path, text, strlen(text));
  free(text);
  return err;
}

/* The small files that belong to a checkpoint. */
static bool carried(const char *name) {
  static const char *const endings[] = {".json", ".jinja", ".model", ".txt"};
  if (strcmp(name, "model.safetensors.index.json") == 0) return false;
  if (strncmp(name, "moetune-", 8) == 0) return false; /* the state of a run, not of a model */
  const char *dot = strrchr(name, '.');
  for (size_t i = 0; dot && i < sizeof endings / sizeof *endings; i++) {
    if (strcmp(dot, endings[i]) == 0) return true;
  }
  return false;
}

/* Text with the fewest digits that read back as the same numbers, so that 1e-05 stays one. */
static char *shortest_json(const json_t *json) {
  for (size_t digits = 6; digits <= 17; digits++) {
    char *text = mt_json_text(json, JSON_INDENT(2) | JSON_REAL_PRECISION(digits));
    json_t *back = text ? json_loads(text, 0, NULL) : NULL;
    bool same = back && json_equal(json, back);
    json_decref(back);
    if (same || digits == 17) return text;
    free(text);
  }
  return NULL;
}

/* config.json with another dtype; unless it has that one already: then as it lies. */
static mt_err copy_config(const struct mt_hf_checkpoint *h, const char *from, const char *to,
                          int dtype) {
  static const char *const names[] = {
      [MT_F32] = "float32", [MT_BF16] = "bfloat16", [MT_F16] = "float16"};
  const char *key = json_object_get(h->json, "torch_dtype") ? "torch_dtype" : "dtype";
  const char *was = json_string_value(json_object_get(h->json, key));
  if (was && strcmp(was, names[dtype]) == 0) return mt_file_copy(from, to);
  json_t *json = json_copy(h->json);
  bool set = json_object_set_new(json, key, json_string(names[dtype])) == 0;
  char *text = set ? shortest_json(json) : NULL;
  json_decref(json);
  if (!text) return mt_fail(MT_ENOMEM, "config.json");
  mt_err err = mt_file_write_atomic(to, text, strlen(text));
  free(text);
  return err;
}

static mt_err copy_files(const struct mt_hf_checkpoint *h, const char *from_dir, const char *dir,
                         int dtype) {
  DIR *d = opendir(from_dir);
  if (!d) return mt_fail(MT_EIO, "cannot read directory '%s'", from_dir);
  mt_err err = MT_OK;
  for (struct dirent *e; !err && (e = readdir(d));) {
    char from[MT_PATH_MAX], to[MT_PATH_MAX];
    if (!carried(e->d_name)) continue;
    err = mt_path_join(from, from_dir, e->d_name);
    if (!err) err = mt_path_join(to, dir, e->d_name);
    if (err) break;
    bool config = h && dtype != MT_HF_KEEP && strcmp(e->d_name, "config.json") == 0;
    err = config ? copy_config(h, from, to, dtype) : mt_file_copy(from, to);
  }
  closedir(d);
  return err;
}

/* Tensors of the files that no parameter asks for are carried along, but for the head of a tied
 * checkpoint, which would be stale. */
static bool extra(const struct export *x, const struct mt_st_tensor *t) {
  if (x->config->tied_head && strcmp(t->name, "lm_head.weight") == 0) return false;
  for (int i = 0; i < x->names.count; i++) {
    const struct mt_param *p = &x->names.row[i];
    for (int k = 0; k < mt_hf_tensor_count(x->config, x->h->layout, p); k++) {
      if (strcmp(mt_hf_tensor_at(x->config, x->h->layout, p, k).name, t->name) == 0) return false;
    }
  }
  return true;
}

static mt_err list_items(struct export *x, enum mt_hf_layout layout, int dtype) {
  size_t capacity = 0;
  for (int i = 0; i < x->names.count; i++) {
    capacity += (size_t)mt_hf_tensor_count(x->config, layout, &x->names.row[i]);
  }
  for (int s = 0; x->h && s < x->h->shard_count; s++) capacity += x->h->shard[s].count;
  x->items = calloc(capacity, sizeof *x->items);
  if (!x->items) return mt_fail(MT_ENOMEM, "list of %zu tensors", capacity);
  for (int i = 0; i < x->names.count; i++) {
    const struct mt_param *p = &x->names.row[i];
    for (int k = 0; k < mt_hf_tensor_count(x->config, layout, p); k++) {
      struct item *it = &x->items[x->item_count++];
      *it = (struct item){.t = mt_hf_tensor_at(x->config, layout, p, k), .param = p};
      struct mt_hf_rows from = {.dtype = MT_F32};
      if (x->h) MT_TRY(mt_hf_source_rows(x->h, p, it->t.param_row, &from));
      it->dtype = dtype == MT_HF_KEEP ? from.dtype : (enum mt_dtype)dtype;
    }
  }
  for (int s = 0; x->h && s < x->h->shard_count; s++) {
    for (size_t k = 0; k < x->h->shard[s].count; k++) {
      const struct mt_st_tensor *t = &x->h->shard[s].tensor[k];
      if (extra(x, t)) x->items[x->item_count++] = (struct item){.raw = t};
    }
  }
  return MT_OK;
}

static void cut_shards(struct export *x, uint64_t limit) {
  uint64_t used = 0;
  x->shard_count = 1;
  for (int i = 0; i < x->item_count; i++) {
    uint64_t bytes = item_bytes(&x->items[i]);
    if (used > 0 && bytes > limit - (used < limit ? used : limit)) {
      x->shard_count++;
      used = 0;
    }
    x->items[i].shard = x->shard_count - 1;
    used += bytes;
  }
}

static mt_err run(struct export *x, const char *files_dir, const char *out_dir,
                  const struct mt_hf_export_options *o) {
  struct mt_dir_txn txn = {0};
  int64_t widest = 0;
  mt_err err;
  MT_GO(mt_params_build(x->config, NULL, &x->names));
  enum mt_hf_layout keep = x->h ? x->h->layout : MT_HF_PER_EXPERT;
  MT_GO(list_items(x, o->layout == MT_HF_KEEP ? keep : (enum mt_hf_layout)o->layout, o->dtype));
  cut_shards(x, o->max_shard_bytes ? o->max_shard_bytes : 5000000000u);
  for (int i = 0; i < x->names.count; i++) {
    int64_t n = mt_param_row_elems(&x->names.row[i]);
    widest = n > widest ? n : widest;
  }
  size_t bytes = (size_t)(widest * 8 > STAGE_BYTES ? widest * 8 : STAGE_BYTES);
  x->stage = malloc(bytes);
  x->wide = malloc(bytes);
  if (!x->stage || !x->wide) {
    err = mt_fail(MT_ENOMEM, "export buffers");
    goto done;
  }
  if (!writes(x)) {
    err = hand_over(x);
    goto done;
  }
  MT_GO(mt_dir_begin(&txn, out_dir));
  MT_GO(copy_files(x->h, files_dir, txn.temp, o->dtype));
  for (int s = 0; s < x->shard_count; s++) MT_GO(write_shard(x, txn.temp, s));
  if (x->shard_count > 1) MT_GO(write_index(x, txn.temp));
  MT_GO(mt_checksums_write(txn.temp));
  MT_GO(mt_dir_commit(&txn));
done:
  mt_dir_abort(&txn);
  free(x->stage);
  free(x->wide);
  free(x->items);
  mt_params_free(&x->names);
  return err;
}

mt_err mt_hf_export(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                    struct mt_backend *be, const char *out_dir,
                    const struct mt_hf_export_options *options) {
  struct export x = {
      .h = h, .config = &h->config, .model = params, .gather = options->gather, .be = be};
  return run(&x, h->dir, out_dir, options);
}

mt_err mt_hf_init(const char *config_dir, const char *out_dir, uint64_t seed, int dtype) {
  struct mt_config config;
  json_t *json;
  MT_TRY(mt_hf_config_load(config_dir, &config, &json));
  const json_t *range = json_object_get(json, "initializer_range");
  struct export x = {.config = &config,
                     .seed = seed,
                     .init_range = json_is_number(range) ? json_number_value(range) : 0.02};
  json_decref(json);
  struct mt_hf_export_options o = {.layout = MT_HF_PER_EXPERT, .dtype = dtype};
  return run(&x, config_dir, out_dir, &o);
}
