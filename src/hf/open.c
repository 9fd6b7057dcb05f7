/* Opening a checkpoint: which files, which tensors, do they fit the config. */
#include <stdio.h>
#include <stdlib.h>

#include "base/json.h"
#include "hf/checkpoint.h"
#include "hf/source.h"

enum { INDEX_LIMIT = 256 << 20 };

const struct mt_st_tensor *mt_hf_find(const struct mt_hf_checkpoint *h, const char *name,
                                      int *shard) {
  for (int i = 0; i < h->shard_count; i++) {
    const struct mt_st_tensor *t = mt_st_find(&h->shard[i], name);
    if (!t) continue;
    if (shard) *shard = i;
    return t;
  }
  return NULL;
}

/* A shard is a file of this directory and nothing else: the index is untrusted. */
static mt_err check_shard_name(const char *index, const char *name) {
  size_t length = strlen(name);
  if (length == 0 || length >= 256 || strchr(name, '/') || strcmp(name, ".") == 0 ||
      strcmp(name, "..") == 0) {
    return mt_fail(MT_EFORMAT, "%s: shard name '%.80s' is no plain file name", index, name);
  }
  return MT_OK;
}

static mt_err add_shard(struct mt_hf_checkpoint *h, const char *name) {
  char path[MT_PATH_MAX];
  for (int i = 0; i < h->shard_count; i++) {
    if (strcmp(h->shard_name[i], name) == 0) return MT_OK;
  }
  MT_TRY(mt_path_join(path, h->dir, name));
  void *shards = realloc(h->shard, (size_t)(h->shard_count + 1) * sizeof *h->shard);
  if (shards) h->shard = shards;
  void *names = realloc(h->shard_name, (size_t)(h->shard_count + 1) * sizeof *h->shard_name);
  if (names) h->shard_name = names;
  if (!shards || !names) return mt_fail(MT_ENOMEM, "%s: %d shards", h->dir, h->shard_count + 1);
  MT_TRY(mt_st_open(path, &h->shard[h->shard_count]));
  snprintf(h->shard_name[h->shard_count++], sizeof *h->shard_name, "%s", name);
  return MT_OK;
}

static mt_err open_index(struct mt_hf_checkpoint *h, const char *path) {
  char *text = NULL;
  size_t size;
  json_t *root = NULL;
  json_error_t why;
  mt_err err;
  MT_GO(mt_file_read(path, INDEX_LIMIT, &text, &size));
  if (!mt_json_bearable(text, size)) {
    err = mt_fail(MT_EFORMAT, "%s: far more brackets or commas than an index needs", path);
    goto done;
  }
  root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  json_t *map = json_object_get(root, "weight_map");
  if (!json_is_object(map)) {
    err = mt_fail(MT_EFORMAT, "%s: %s", path, root ? "'weight_map' is missing" : why.text);
    goto done;
  }
  const char *tensor;
  json_t *value;
  json_object_foreach(map, tensor, value) {
    const char *name = json_string_value(value);
    if (!name) {
      err = mt_fail(MT_EFORMAT, "%s: the shard of '%.80s' is no string", path, tensor);
      goto done;
    }
    MT_GO(check_shard_name(path, name));
    MT_GO(add_shard(h, name));
    if (!mt_st_find(&h->shard[h->shard_count - 1], tensor) && !mt_hf_find(h, tensor, NULL)) {
      err = mt_fail(MT_EFORMAT, "%s: tensor '%.80s' is not in '%s'", path, tensor, name);
      goto done;
    }
  }
done:
  json_decref(root);
  free(text);
  return err;
}

static mt_err open_files(struct mt_hf_checkpoint *h) {
  char path[MT_PATH_MAX];
  MT_TRY(mt_path_join(path, h->dir, "model.safetensors.index.json"));
  if (mt_path_exists(path)) return open_index(h, path);
  MT_TRY(mt_path_join(path, h->dir, "model.safetensors"));
  if (mt_path_exists(path)) return add_shard(h, "model.safetensors");
  return mt_fail(MT_ENOENT, "'%s' holds neither model.safetensors nor model.safetensors.index.json",
                 h->dir);
}

enum { SHAPE_TEXT = 192 };

static void shape_text(const int64_t *dim, int rank, char out[SHAPE_TEXT]) {
  int used = snprintf(out, SHAPE_TEXT, "[");
  for (int i = 0; i < rank && used < SHAPE_TEXT; i++)
    used += snprintf(out + used, (size_t)(SHAPE_TEXT - used), "%s%lld", i ? "," : "",
                     (long long)dim[i]);
  if (used < SHAPE_TEXT) snprintf(out + used, (size_t)(SHAPE_TEXT - used), "]");
}

static mt_err check_tensor(const struct mt_hf_checkpoint *h, const struct mt_hf_tensor *want) {
  int shard;
  const struct mt_st_tensor *t = mt_hf_find(h, want->name, &shard);
  if (!t) return mt_fail(MT_ENOENT, "%s: tensor '%s' is missing", h->dir, want->name);
  const char *file = h->shard[shard].path;
  for (int i = shard + 1; i < h->shard_count; i++) {
    if (mt_st_find(&h->shard[i], want->name)) {
      return mt_fail(MT_EFORMAT, "tensor '%s' stands in '%s' and again in '%s'", want->name, file,
                     h->shard[i].path);
    }
  }
  bool same = t->rank == want->rank;
  for (int i = 0; same && i < want->rank; i++) same = t->dim[i] == want->dim[i];
  if (!same) {
    char is[SHAPE_TEXT], needs[SHAPE_TEXT];
    shape_text(t->dim, t->rank, is);
    shape_text(want->dim, want->rank, needs);
    return mt_fail(MT_ESHAPE, "%s: tensor '%s' is %s, the config needs %s", file, want->name, is,
                   needs);
  }
  if (t->dtype != MT_F32 && t->dtype != MT_BF16 && t->dtype != MT_F16) {
    return mt_fail(MT_EUNSUPPORTED, "%s: tensor '%s' is %s; F32, BF16 and F16 can be read", file,
                   want->name, t->dtype_name);
  }
  return MT_OK;
}

mt_err mt_hf_check(const struct mt_hf_checkpoint *h) {
  struct mt_params params;
  MT_TRY(mt_params_build(&h->config, NULL, &params));
  mt_err err = MT_OK;
  for (int i = 0; !err && i < params.count; i++) {
    int n = mt_hf_tensor_count(&h->config, h->layout, &params.row[i]);
    for (int k = 0; !err && k < n; k++) {
      struct mt_hf_tensor t = mt_hf_tensor_at(&h->config, h->layout, &params.row[i], k);
      err = check_tensor(h, &t);
    }
  }
  mt_params_free(&params);
  return err;
}

mt_err mt_hf_open_config(const char *dir, struct mt_hf_checkpoint *out) {
  *out = (struct mt_hf_checkpoint){0};
  if (strlen(dir) >= MT_PATH_MAX) return mt_fail(MT_EINVAL, "path too long: '%.200s'", dir);
  snprintf(out->dir, sizeof out->dir, "%s", dir);
  if (!mt_path_is_dir(dir)) return mt_fail(MT_ENOENT, "'%s' is no directory", dir);
  return mt_hf_config_load(dir, &out->config, &out->json);
}

mt_err mt_hf_open_shards(struct mt_hf_checkpoint *h) {
  MT_TRY(open_files(h));
  bool packed = mt_hf_find(h, "model.layers.0.mlp.experts.gate_up_proj", NULL) != NULL;
  h->layout = packed ? MT_HF_PACKED : MT_HF_PER_EXPERT;
  return MT_OK;
}

bool mt_hf_has_weights(const char *dir) {
  static const char *const names[] = {"model.safetensors.index.json", "model.safetensors"};
  for (int i = 0; i < 2; i++) {
    char path[MT_PATH_MAX];
    if (mt_path_join(path, dir, names[i]) == MT_OK && mt_path_exists(path)) return true;
  }
  return false;
}

mt_err mt_hf_open(const char *dir, struct mt_hf_checkpoint *out) {
  mt_err err = mt_hf_open_config(dir, out);
  if (!err) err = mt_hf_open_shards(out);
  if (!err) err = mt_hf_check(out);
  if (err) mt_hf_close(out);
  return err;
}

void mt_hf_close(struct mt_hf_checkpoint *h) {
  for (int i = 0; i < h->shard_count; i++) mt_st_close(&h->shard[i]);
  free(h->shard);
  free(h->shard_name);
  json_decref(h->json);
  *h = (struct mt_hf_checkpoint){0};
}

mt_err mt_hf_source_rows(const struct mt_hf_checkpoint *h, const struct mt_param *p, int64_t row,
                         struct mt_hf_rows *out) {
  for (int i = 0; i < mt_hf_tensor_count(&h->config, h->layout, p); i++) {
    struct mt_hf_tensor t = mt_hf_tensor_at(&h->config, h->layout, p, i);
    for (int64_t b = 0; b < t.blocks; b++) {
      int64_t into = row - (t.param_row + b * t.param_stride);
      if (into < 0 || into >= t.block_rows) continue;
      const struct mt_st_tensor *s = mt_hf_find(h, t.name, NULL);
      size_t row_bytes = (size_t)mt_param_row_elems(p) * mt_dtype_bytes(s->dtype);
      out->data = s->data + (size_t)(b * t.block_rows + into) * row_bytes;
      out->dtype = s->dtype;
      out->count = t.block_rows - into;
      return MT_OK;
    }
  }
  return mt_fail(MT_EINVAL, "row %lld of '%s' belongs to no tensor", (long long)row, p->name);
}

enum { STAGE_BYTES = 4 << 20 };

static mt_err load_rows(const struct mt_param *p, struct mt_backend *be, int64_t row,
                        struct mt_hf_rows from, void *stage) {
  const struct mt_tensor *forms[] = {&p->compute, &p->master};
  int64_t n = mt_param_row_elems(p);
  int form_count = p->master.data && p->master.data != p->compute.data ? 2 : 1;
  for (int f = p->compute.data ? 0 : 1; f < form_count; f++) {
    size_t item = mt_dtype_bytes(forms[f]->dtype);
    mt_dtype_convert(stage, forms[f]->dtype, from.data, from.dtype, (size_t)(from.count * n));
    MT_TRY(be->upload(be, (char *)forms[f]->data + (size_t)(row * n) * item, stage,
                      (size_t)(from.count * n) * item));
  }
  mt_map_forget(from.data, (size_t)(from.count * n) * mt_dtype_bytes(from.dtype));
  return MT_OK;
}

mt_err mt_hf_load(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                  struct mt_backend *be) {
  struct mt_params all;
  mt_err err = mt_params_build(&h->config, NULL, &all);
  for (int i = 0; !err && i < params->count; i++) {
    const struct mt_param *p = &params->row[i];
    /* Files hold the whole of it: rows here are those from `skip` on there. */
    const struct mt_param *whole = mt_params_find(&all, p->kind, p->layer);
    int64_t skip = p->first * (mt_param_rows(p) / p->dim[0]);
    int64_t n = mt_param_row_elems(p), most = STAGE_BYTES / (n * 8);
    if (most < 1) most = 1;
    void *stage = malloc((size_t)(most * n) * 8);
    if (!stage) {
      err = mt_fail(MT_ENOMEM, "staging %lld rows of '%s'", (long long)most, p->name);
      break;
    }
    for (int64_t row = 0; !err && row < mt_param_rows(p);) {
      struct mt_hf_rows from;
      err = mt_hf_source_rows(h, whole, skip + row, &from);
      if (err) break;
      if (from.count > most) from.count = most;
      if (from.count > mt_param_rows(p) - row) from.count = mt_param_rows(p) - row;
      err = mt_context(load_rows(p, be, row, from, stage), "loading '%s'", p->name);
      row += from.count;
    }
    free(stage);
  }
  mt_params_free(&all);
  return err;
}

mt_err mt_hf_load_run(const struct mt_hf_checkpoint *h, const struct mt_param *p, int64_t first,
                      const struct mt_tensor *to, struct mt_backend *be) {
  struct mt_params all = {0};
  int64_t n = mt_param_row_elems(p), count = mt_count(to), most = STAGE_BYTES / 8;
  void *stage = malloc(STAGE_BYTES);
  if (!stage) return mt_fail(MT_ENOMEM, "staging '%s'", p->name);
  mt_err err = mt_params_build(&h->config, NULL, &all);
  if (err) goto done;
  const struct mt_param *whole = mt_params_find(&all, p->kind, p->layer);
  int64_t from = p->first * (mt_param_count(p) / p->dim[0]) + first;
  for (int64_t done = 0, take; !err && done < count; done += take) {
    int64_t at = from + done, into = at % n;
    struct mt_hf_rows rows;
    MT_GO(mt_hf_source_rows(h, whole, at / n, &rows));
    take = rows.count * n - into;
    if (take > most) take = most;
    if (take > count - done) take = count - done;
    mt_dtype_convert(stage, to->dtype, rows.data + (size_t)into * mt_dtype_bytes(rows.dtype),
                     rows.dtype, (size_t)take);
    size_t item = mt_dtype_bytes(to->dtype);
    err = be->upload(be, (char *)to->data + (size_t)done * item, stage, (size_t)take * item);
  }
done:
  mt_params_free(&all);
  free(stage);
  return err;
}
