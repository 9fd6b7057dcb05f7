#include "io/checksums.h"

#include <dirent.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/files.h"
#include "base/hash.h"
#include "base/json.h"

enum { LIST_VERSION = 1, LIST_LIMIT = 16 << 20 };

static const char list_name[] = "moetune-checksums.json";

/* Of the list's own lines, so that a damaged list is not taken for damaged files. */
static mt_err hash_list(const json_t *files, char out[MT_HASH_TEXT]) {
  char *text = mt_json_text(files, JSON_COMPACT | JSON_SORT_KEYS);
  if (!text) return mt_fail(MT_ENOMEM, "%s", list_name);
  mt_hash_text(mt_hash_bytes(text, strlen(text)), out);
  free(text);
  return MT_OK;
}

static mt_err add_file(const char *dir, const char *name, json_t *files) {
  char path[MT_PATH_MAX], text[MT_HASH_TEXT];
  struct mt_hash hash;
  struct stat st;
  uint64_t size;
  MT_TRY(mt_path_join(path, dir, name));
  if (stat(path, &st) != 0 || !S_ISREG(st.st_mode)) return MT_OK;
  MT_TRY(mt_hash_file(path, &hash, &size));
  mt_hash_text(hash, text);
  json_t *entry = json_pack("{s:I, s:s}", "bytes", (json_int_t)size, "xxh3-128", text);
  if (json_object_set_new(files, name, entry)) return mt_fail(MT_ENOMEM, "%s", list_name);
  return MT_OK;
}

/* Adds what `files` does not list. */
static mt_err list_files(const char *dir, json_t *files) {
  DIR *d = opendir(dir);
  if (!d) return mt_fail(MT_EIO, "cannot read directory '%s'", dir);
  mt_err err = MT_OK;
  for (struct dirent *e; !err && (e = readdir(d));) {
    if (e->d_name[0] == '.' || strcmp(e->d_name, list_name) == 0) continue;
    if (json_object_get(files, e->d_name)) continue;
    err = add_file(dir, e->d_name, files);
  }
  closedir(d);
  return err;
}

/* files: what is listed already. Takes it over. */
static mt_err write_list(const char *dir, json_t *files) {
  char path[MT_PATH_MAX], own[MT_HASH_TEXT], *text = NULL;
  json_t *root = NULL;
  mt_err err;
  MT_GO(mt_path_join(path, dir, list_name));
  MT_GO(list_files(dir, files));
  MT_GO(hash_list(files, own));
  root = json_pack("{s:i, s:O, s:s}", "version", LIST_VERSION, "files", files, "list", own);
  text = mt_json_text(root, JSON_INDENT(2) | JSON_SORT_KEYS);
  if (!text) {
    err = mt_fail(MT_ENOMEM, "%s", list_name);
    goto done;
  }
  MT_GO(mt_file_write_atomic(path, text, strlen(text)));
done:
  free(text);
  json_decref(root);
  json_decref(files);
  return err;
}

mt_err mt_checksums_write(const char *dir) {
  return write_list(dir, json_object());
}

static mt_err verify_file(const char *dir, const char *name, const json_t *entry) {
  char path[MT_PATH_MAX], text[MT_HASH_TEXT];
  struct mt_hash hash;
  uint64_t size;
  const char *want = json_string_value(json_object_get(entry, "xxh3-128"));
  json_int_t want_bytes = json_integer_value(json_object_get(entry, "bytes"));
  MT_TRY(mt_path_join(path, dir, name));
  if (!want || strchr(name, '/')) return mt_fail(MT_EFORMAT, "%s/%s is damaged", dir, list_name);
  if (!mt_path_exists(path)) {
    return mt_fail(MT_EFORMAT, "'%s' is missing: %s lists it", path, list_name);
  }
  MT_TRY(mt_hash_file(path, &hash, &size));
  if (size != (uint64_t)want_bytes) {
    return mt_fail(MT_EFORMAT, "'%s' is damaged: %llu bytes, %lld were written", path,
                   (unsigned long long)size, (long long)want_bytes);
  }
  mt_hash_text(hash, text);
  if (strcmp(text, want) == 0) return MT_OK;
  return mt_fail(MT_EFORMAT, "'%s' is damaged: its checksum is %s, %s was written", path, text,
                 want);
}

/* What dir's list holds, whole; NULL where it has none. */
static mt_err read_list(const char *dir, json_t **out) {
  char path[MT_PATH_MAX], own[MT_HASH_TEXT], *text = NULL;
  size_t size;
  json_t *root = NULL;
  json_error_t why;
  mt_err err;
  *out = NULL;
  MT_TRY(mt_path_join(path, dir, list_name));
  if (!mt_path_exists(path)) return MT_OK;
  MT_GO(mt_file_read(path, LIST_LIMIT, &text, &size));
  if (!mt_json_bearable(text, size)) {
    err = mt_fail(MT_EFORMAT, "%s is damaged: mostly brackets", path);
    goto done;
  }
  root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  const json_t *version = json_object_get(root, "version");
  if (json_is_integer(version) && json_integer_value(version) > LIST_VERSION) {
    err = mt_fail(MT_EUNSUPPORTED, "%s is a later version's", path);
    goto done;
  }
  json_t *files = json_object_get(root, "files");
  const char *list = json_string_value(json_object_get(root, "list"));
  if (!json_is_object(files) || !list) {
    err = mt_fail(MT_EFORMAT, "%s is damaged: %s", path, root ? "it lists nothing" : why.text);
    goto done;
  }
  MT_GO(hash_list(files, own));
  if (strcmp(own, list) != 0) {
    err = mt_fail(MT_EFORMAT, "%s is damaged: it does not hold what was written", path);
    goto done;
  }
  *out = json_incref(files);
done:
  json_decref(root);
  free(text);
  return err;
}

mt_err mt_checksums_verify(const char *dir, bool *listed) {
  json_t *files, *entry;
  const char *name;
  *listed = true; /* if it cannot be read, it is there */
  MT_TRY(read_list(dir, &files));
  *listed = files != NULL;
  mt_err err = MT_OK;
  json_object_foreach(files, name, entry) {
    if (!err) err = verify_file(dir, name, entry);
  }
  json_decref(files);
  return err;
}

mt_err mt_checksums_demand(const char *dir) {
  bool listed;
  MT_TRY(mt_checksums_verify(dir, &listed));
  return listed ? MT_OK : mt_fail(MT_ENOENT, "'%s' has no %s to verify", dir, list_name);
}

mt_err mt_checksums_extend(const char *dir) {
  json_t *files;
  MT_TRY(read_list(dir, &files));
  return write_list(dir, files ? files : json_object());
}
