#include "io/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/json.h"

enum { HEADER_LIMIT = 100 * 1000 * 1000 };

static int by_name(const void *a, const void *b) {
  return strcmp(((const struct mt_st_tensor *)a)->name, ((const struct mt_st_tensor *)b)->name);
}

static int by_offset(const void *a, const void *b) {
  const struct mt_st_tensor *x = a, *y = b;
  if (x->data != y->data) return x->data < y->data ? -1 : 1;
  return x->size_bytes < y->size_bytes ? -1 : x->size_bytes > y->size_bytes;
}

static mt_err bad(const char *file, const char *tensor, const char *why) {
  return mt_fail(MT_EFORMAT, "%s: tensor '%s': %s", file, tensor, why);
}

/* Bytes of one element of the formats that the standard names; 0 when unknown. */
static size_t element_bytes(const char *dtype) {
  static const struct {
    const char *name;
    size_t bytes;
  } known[] = {{"F64", 8},  {"I64", 8},     {"U64", 8},     {"F32", 4},    {"I32", 4}, {"U32", 4},
               {"F16", 2},  {"BF16", 2},    {"I16", 2},     {"U16", 2},    {"I8", 1},  {"U8", 1},
               {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (strcmp(known[i].name, dtype) == 0) return known[i].bytes;
  }
  return 0;
}

static mt_err read_shape(const char *file, struct mt_st_tensor *t, const json_t *shape,
                         size_t *bytes) {
  if (!json_is_array(shape) || json_array_size(shape) > MT_ST_MAX_RANK) {
    return bad(file, t->name, "'shape' is no array of at most 8 numbers");
  }
  t->rank = (int)json_array_size(shape);
  size_t total = element_bytes(t->dtype_name);
  if (total == 0) return bad(file, t->name, "unknown dtype");
  for (int i = 0; i < t->rank; i++) {
    const json_t *d = json_array_get(shape, (size_t)i);
    if (!json_is_integer(d) || json_integer_value(d) < 0) {
      return bad(file, t->name, "'shape' holds something that is no size");
    }
    t->dim[i] = json_integer_value(d);
    if (__builtin_mul_overflow(total, (size_t)t->dim[i], &total)) {
      return bad(file, t->name, "the shape's product overflows");
    }
  }
  *bytes = total;
  return MT_OK;
}

static mt_err read_tensor(const char *file, struct mt_st_tensor *t, const json_t *info,
                          const uint8_t *body, size_t body_bytes) {
  const char *dtype = json_string_value(json_object_get(info, "dtype"));
  const json_t *offsets = json_object_get(info, "data_offsets");
  size_t bytes = 0;
  if (!dtype || strlen(dtype) >= sizeof t->dtype_name) {
    return bad(file, t->name, "'dtype' is missing or no string");
  }
  snprintf(t->dtype_name, sizeof t->dtype_name, "%s", dtype);
  t->dtype = mt_dtype_parse(dtype);
  MT_TRY(read_shape(file, t, json_object_get(info, "shape"), &bytes));
  const json_t *b = json_array_get(offsets, 0), *e = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(b) || !json_is_integer(e)) {
    return bad(file, t->name, "'data_offsets' is no pair of numbers");
  }
  json_int_t begin = json_integer_value(b), end = json_integer_value(e);
  if (begin < 0 || end < begin || (uint64_t)end > body_bytes) {
    return mt_fail(MT_EFORMAT, "%s: tensor '%s': bytes %lld to %lld lie outside the %zu there are",
                   file, t->name, (long long)begin, (long long)end, body_bytes);
  }
  if ((size_t)(end - begin) != bytes) {
    return mt_fail(MT_EFORMAT, "%s: tensor '%s': shape and dtype need %zu bytes, the file has %lld",
                   file, t->name, bytes, (long long)(end - begin));
  }
  t->data = body + begin;
  t->size_bytes = bytes;
  return MT_OK;
}

static mt_err check_layout(struct mt_st_file *f, const uint8_t *body, size_t body_bytes) {
  size_t at = 0;
  qsort(f->tensor, f->count, sizeof *f->tensor, by_offset);
  for (size_t i = 0; i < f->count; i++) {
    size_t begin = (size_t)(f->tensor[i].data - body);
    if (begin < at) return bad(f->path, f->tensor[i].name, "overlaps another tensor");
    if (begin > at) return bad(f->path, f->tensor[i].name, "leaves a hole before it");
    at = begin + f->tensor[i].size_bytes;
  }
  if (at != body_bytes) {
    return mt_fail(MT_EFORMAT, "%s: %zu bytes behind the last tensor", f->path, body_bytes - at);
  }
  qsort(f->tensor, f->count, sizeof *f->tensor, by_name);
  return MT_OK;
}

mt_err mt_st_parse(const uint8_t *data, size_t size_bytes, const char *name,
                   struct mt_st_file *file) {
  mt_err err = MT_EFORMAT;
  json_t *header = NULL;
  json_error_t why;
  uint64_t length = 0;
  file->path = strdup(name);
  if (!file->path) return mt_fail(MT_ENOMEM, "%s", name);
  if (size_bytes < 8) {
    mt_fail(err, "%s: %zu bytes are too few for a safetensors file", name, size_bytes);
    goto done;
  }
  for (int i = 0; i < 8; i++) length |= (uint64_t)data[i] << (8 * i);
  if (length > size_bytes - 8 || length > HEADER_LIMIT) {
    mt_fail(err, "%s: header length %llu exceeds the file (%zu bytes) or the limit of 100 MB", name,
            (unsigned long long)length, size_bytes);
    goto done;
  }
  if (!mt_json_bearable((const char *)data + 8, length)) {
    mt_fail(err, "%s: header: far more brackets or commas than tensors need", name);
    goto done;
  }
  header = json_loadb((const char *)data + 8, length, JSON_REJECT_DUPLICATES, &why);
  if (!json_is_object(header)) {
    mt_fail(err, "%s: header: %s", name, header ? "is no object" : why.text);
    goto done;
  }
  file->tensor = calloc(json_object_size(header) + 1, sizeof *file->tensor);
  if (!file->tensor) {
    err = mt_fail(MT_ENOMEM, "%s: table of %zu tensors", name, json_object_size(header));
    goto done;
  }
  const char *key;
  json_t *info;
  json_object_foreach(header, key, info) {
    if (strcmp(key, "__metadata__") == 0) continue;
    struct mt_st_tensor *t = &file->tensor[file->count++];
    t->name = strdup(key);
    if (!t->name) {
      err = mt_fail(MT_ENOMEM, "%s", name);
      goto done;
    }
    MT_GO(read_tensor(name, t, info, data + 8 + length, size_bytes - 8 - length));
  }
  MT_GO(check_layout(file, data + 8 + length, size_bytes - 8 - length));
done:
  json_decref(header);
  if (err) mt_st_close(file);
  return err;
}

mt_err mt_st_open(const char *path, struct mt_st_file *file) {
  struct mt_map map;
  *file = (struct mt_st_file){0};
  MT_TRY(mt_map_open(path, &map));
  mt_err err = mt_st_parse(map.data, map.size_bytes, path, file);
  if (err)
    mt_map_close(&map);
  else
    file->map = map;
  return err;
}

void mt_st_close(struct mt_st_file *file) {
  for (size_t i = 0; i < file->count; i++) free(file->tensor[i].name);
  free(file->tensor);
  free(file->path);
  mt_map_close(&file->map);
  *file = (struct mt_st_file){0};
}

const struct mt_st_tensor *mt_st_find(const struct mt_st_file *file, const char *name) {
  struct mt_st_tensor key = {.name = (char *)(uintptr_t)name};
  return bsearch(&key, file->tensor, file->count, sizeof key, by_name);
}

static json_t *entry_json(const struct mt_st_entry *e, size_t begin) {
  json_t *shape = json_array();
  for (int i = 0; i < e->rank; i++) {
    if (json_array_append_new(shape, json_integer(e->dim[i])) == 0) continue;
    json_decref(shape);
    return NULL;
  }
  return json_pack("{s:s, s:o, s:[I,I]}", "dtype", e->dtype_name, "shape", shape, "data_offsets",
                   (json_int_t)begin, (json_int_t)(begin + e->size_bytes));
}

/* The header's bytes with its length in front, padded with spaces to a multiple of 8. */
static mt_err header_text(const struct mt_st_entry *entries, size_t count, char **out,
                          size_t *out_bytes, size_t *body_bytes) {
  mt_err err = MT_ENOMEM;
  char *text = NULL;
  size_t at = 0;
  json_t *header = json_object();
  if (json_object_set_new(header, "__metadata__", json_pack("{s:s}", "format", "pt"))) goto done;
  for (size_t i = 0; i < count; i++) {
    if (json_object_set_new(header, entries[i].name, entry_json(&entries[i], at))) goto done;
    at += entries[i].size_bytes;
  }
  text = mt_json_text(header, JSON_COMPACT);
  if (!text) goto done;
  size_t length = strlen(text), padded = (length + 7) / 8 * 8;
  char *all = malloc(8 + padded);
  if (!all) goto done;
  for (int i = 0; i < 8; i++) all[i] = (char)((uint64_t)padded >> (8 * i));
  memcpy(all + 8, text, length);
  memset(all + 8 + length, ' ', padded - length);
  *out = all;
  *out_bytes = 8 + padded;
  *body_bytes = at;
  err = MT_OK;
done:
  if (err) mt_fail(err, "safetensors header of %zu tensors", count);
  free(text);
  json_decref(header);
  return err;
}

mt_err mt_st_create(struct mt_st_writer *w, const char *path, const struct mt_st_entry *entries,
                    size_t count) {
  char *header = NULL;
  size_t header_bytes;
  *w = (struct mt_st_writer){.fd = -1};
  int n = snprintf(w->temp, sizeof w->temp, "%s.tmp-%d", path, (int)getpid());
  if (n < 0 || n >= MT_PATH_MAX) return mt_fail(MT_EINVAL, "path too long: '%.200s'", path);
  snprintf(w->path, sizeof w->path, "%s", path);
  MT_TRY(header_text(entries, count, &header, &header_bytes, &w->expected_bytes));
  w->fd = open(w->temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  mt_err err = w->fd < 0 ? mt_fail(MT_EIO, "cannot create '%s': %s", w->temp, strerror(errno))
                         : mt_fd_write(w->fd, w->path, header, header_bytes);
  free(header);
  if (err) mt_st_abort(w);
  return err;
}

mt_err mt_st_write(struct mt_st_writer *w, const void *data, size_t size_bytes) {
  w->written_bytes += size_bytes;
  return mt_fd_write(w->fd, w->path, data, size_bytes);
}

mt_err mt_st_finish(struct mt_st_writer *w) {
  mt_err err = MT_OK;
  if (w->written_bytes != w->expected_bytes) {
    err = mt_fail(MT_EINVAL, "%s: %zu bytes declared, %zu written", w->path, w->expected_bytes,
                  w->written_bytes);
  }
  if (!err && fsync(w->fd) != 0) {
    err = mt_fail(MT_EIO, "cannot sync '%s': %s", w->path, strerror(errno));
  }
  if (close(w->fd) != 0 && !err) {
    err = mt_fail(MT_EIO, "cannot close '%s': %s", w->path, strerror(errno));
  }
  w->fd = -1;
  if (!err && rename(w->temp, w->path) != 0) {
    err = mt_fail(MT_EIO, "cannot rename to '%s': %s", w->path, strerror(errno));
  }
  if (err) unlink(w->temp);
  return err;
}

void mt_st_abort(struct mt_st_writer *w) {
  if (w->fd < 0) return;
  close(w->fd);
  w->fd = -1;
  unlink(w->temp);
}
