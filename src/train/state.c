#include "train/state.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/json.h"
#include "base/log.h"
#include "io/checksums.h"

enum { STATE_VERSION = 1, STAGE_BYTES = 8 << 20, STATE_LIMIT = 1 << 20 };

static const char tensors_name[] = "moetune-state.safetensors";
static const char facts_name[] = "moetune-state.json";

/* The optimizer's copies of a parameter: X(suffix, field). */
#define FORMS(X) X("master", master) X("m", m) X("v", v)

struct form {
  char name[64];
  struct mt_tensor tensor;
};

/* Lists what must be kept; *out is freed by the caller. */
static mt_err list_forms(const struct mt_params *params, struct form **out, int *count) {
  struct form *f = calloc((size_t)params->count * 3, sizeof *f);
  if (!f) return mt_fail(MT_ENOMEM, "training state");
  int n = 0;
  for (int i = 0; i < params->count; i++) {
    const struct mt_param *p = &params->row[i];
    if (!p->learns) continue;
#define X(suffix, field)                                                                           \
  snprintf(f[n].name, sizeof f[n].name, "%s." suffix, p->name);                                    \
  f[n++].tensor = p->field;
    FORMS(X)
#undef X
  }
  *out = f;
  *count = n;
  return MT_OK;
}

static mt_err save_tensors(struct mt_session *s, const char *path) {
  struct form *forms;
  struct mt_st_entry *entries = NULL;
  struct mt_st_writer w = {.fd = -1};
  char *stage = NULL;
  int count;
  mt_err err;
  MT_TRY(list_forms(&s->model.params, &forms, &count));
  entries = calloc((size_t)count + 1, sizeof *entries);
  stage = malloc(STAGE_BYTES);
  if (!entries || !stage) {
    err = mt_fail(MT_ENOMEM, "training state");
    goto done;
  }
  for (int i = 0; i < count; i++) {
    const struct mt_tensor *t = &forms[i].tensor;
    entries[i] = (struct mt_st_entry){.name = forms[i].name,
                                      .dtype_name = mt_dtype_name(t->dtype),
                                      .rank = t->rank,
                                      .dim = {t->dim[0], t->dim[1], t->dim[2]},
                                      .size_bytes = mt_bytes(t)};
  }
  MT_GO(mt_st_create(&w, path, entries, (size_t)count));
  for (int i = 0; i < count; i++) {
    size_t bytes = mt_bytes(&forms[i].tensor);
    for (size_t at = 0; at < bytes; at += STAGE_BYTES) {
      size_t n = bytes - at < STAGE_BYTES ? bytes - at : STAGE_BYTES;
      MT_GO(s->be.download(&s->be, stage, (char *)forms[i].tensor.data + at, n));
      MT_GO(mt_st_write(&w, stage, n));
    }
  }
  MT_GO(mt_st_finish(&w));
done:
  mt_st_abort(&w);
  free(stage);
  free(entries);
  free(forms);
  return err;
}

/* Options that a resumed run must share with the run it continues. */
static json_t *shared_options(const struct mt_train_options *o, const struct mt_recipe *recipe) {
  return json_pack("{s:I, s:i, s:i, s:i, s:s, s:s, s:b}", "seed", (json_int_t)o->seed, "batch-size",
                   o->batch_size, "grad-accum", o->grad_accum, "max-seq-length", o->max_seq_length,
                   "precision", recipe->precision, "optim-state", recipe->states, "train-on-prompt",
                   o->train_on_prompt);
}

static mt_err save_facts(const struct mt_optimizer *o, const struct mt_loader *l,
                         const struct mt_train_options *options, const char *path) {
  json_t *root =
      json_pack("{s:i, s:I, s:I, s:I, s:I, s:o}", "version", STATE_VERSION, "step",
                (json_int_t)o->step, "epoch", (json_int_t)l->next.epoch, "index",
                (json_int_t)l->next.index, "samples", (json_int_t)mt_dataset_stats(l->data).samples,
                "options", shared_options(options, o->model->recipe));
  char *text = mt_json_text(root, JSON_INDENT(2));
  json_decref(root);
  if (!text) return mt_fail(MT_ENOMEM, "training state");
  mt_err err = mt_file_write_atomic(path, text, strlen(text));
  free(text);
  return err;
}

mt_err mt_state_save(struct mt_session *s, const struct mt_optimizer *o, const struct mt_loader *l,
                     const struct mt_train_options *options, char path[MT_PATH_MAX]) {
  char name[64], file[MT_PATH_MAX];
  struct mt_dir_txn txn = {0};
  struct mt_hf_export_options export = {MT_HF_KEEP, MT_HF_KEEP, options->max_shard_bytes};
  mt_err err;
  snprintf(name, sizeof name, "checkpoint-%lld", (long long)o->step);
  MT_GO(mt_path_join(path, options->out, name));
  MT_GO(mt_dir_begin(&txn, path));
  MT_GO(mt_hf_export(&s->checkpoint, &s->model.params, &s->be, txn.temp, &export));
  MT_GO(mt_path_join(file, txn.temp, tensors_name));
  MT_GO(save_tensors(s, file));
  MT_GO(mt_path_join(file, txn.temp, facts_name));
  MT_GO(save_facts(o, l, options, file));
  MT_GO(mt_checksums_extend(txn.temp));
  MT_GO(mt_dir_commit(&txn));
  /* The next export copies the small files from here: the checkpoint that the run was resumed from
   * may be removed by then. */
  snprintf(s->checkpoint.dir, sizeof s->checkpoint.dir, "%s", path);
done:
  mt_dir_abort(&txn);
  return err;
}

/* The largest N below `limit` of OUT/checkpoint-N; -1: none. */
static void below(const char *out, int64_t limit, int64_t *found) {
  *found = -1;
  DIR *d = opendir(out);
  for (struct dirent *e; d && (e = readdir(d));) {
    long long n;
    int used = 0;
    if (sscanf(e->d_name, "checkpoint-%lld%n", &n, &used) != 1 || e->d_name[used]) continue;
    if (n < limit && n > *found) *found = n;
  }
  if (d) closedir(d);
}

static mt_err remove_checkpoint(const char *out, int64_t n) {
  char name[64], path[MT_PATH_MAX], gone[MT_PATH_MAX];
  snprintf(name, sizeof name, "checkpoint-%lld", (long long)n);
  MT_TRY(mt_path_join(path, out, name));
  snprintf(name, sizeof name, "checkpoint-%lld.gone-%d", (long long)n, (int)getpid());
  MT_TRY(mt_path_join(gone, out, name));
  if (rename(path, gone) != 0)
    return mt_fail(MT_EIO, "cannot remove '%s': %s", path, strerror(errno));
  return mt_dir_remove(gone);
}

mt_err mt_state_retain(const char *out, int64_t step, int keep) {
  int64_t n = step + 1;
  for (int kept = 0; keep > 0 && n >= 0; kept++) {
    below(out, n, &n);
    if (n >= 0 && kept >= keep) MT_TRY(remove_checkpoint(out, n));
  }
  return MT_OK;
}

/* PREFIX.tmp-PID and the like, whose process is gone (or had this one's number). */
static bool stale(const char *name) {
  static const char *const ours[] = {"checkpoint-",    "model.",    "best.",       "metrics.jsonl.",
                                     "samples.jsonl.", "run.json.", "report.html."};
  const char *tail = strrchr(name, '.');
  size_t i = 0;
  int used = 0;
  long pid = 0;
  while (i < sizeof ours / sizeof *ours && strncmp(name, ours[i], strlen(ours[i])) != 0) i++;
  if (i == sizeof ours / sizeof *ours || !tail) return false;
  if (sscanf(tail, ".tmp-%ld%n", &pid, &used) != 1 && sscanf(tail, ".gone-%ld%n", &pid, &used) != 1)
    return false;
  if (tail[used] || pid <= 0 || pid > INT32_MAX) return false;
  return pid == getpid() || (kill((pid_t)pid, 0) != 0 && errno == ESRCH);
}

void mt_state_sweep(const char *out) {
  DIR *d = opendir(out);
  for (struct dirent *e; d && (e = readdir(d));) {
    char path[MT_PATH_MAX];
    if (!stale(e->d_name) || mt_path_join(path, out, e->d_name)) continue;
    struct stat st;
    bool dir = lstat(path, &st) == 0 && S_ISDIR(st.st_mode);
    if (dir ? mt_dir_remove(path) != MT_OK : unlink(path) != 0)
      mt_warn("%s is left of a run that was killed and cannot be removed", path);
    else
      mt_info("removed  %s, left of a run that was killed", path);
  }
  if (d) closedir(d);
}

mt_err mt_state_find(const struct mt_train_options *options, char path[MT_PATH_MAX]) {
  char file[MT_PATH_MAX];
  if (*options->resume) {
    MT_TRY(mt_path_join(file, options->resume, facts_name));
    if (!mt_path_exists(file)) {
      return mt_fail(MT_ENOENT, "'%s' is no checkpoint of a run: it has no %s", options->resume,
                     facts_name);
    }
    snprintf(path, MT_PATH_MAX, "%s", options->resume);
    return MT_OK;
  }
  int64_t newest;
  below(options->out, INT64_MAX, &newest);
  if (newest < 0) return mt_fail(MT_ENOENT, "'%s' holds no checkpoint to resume", options->out);
  char name[64];
  snprintf(name, sizeof name, "checkpoint-%lld", (long long)newest);
  return mt_path_join(path, options->out, name);
}

mt_err mt_state_verify(const char *path) {
  bool listed;
  MT_TRY(mt_checksums_verify(path, &listed));
  if (!listed) mt_info("%s was made without checksums: it goes unchecked", path);
  return MT_OK;
}

static mt_err load_tensors(const char *path, struct mt_session *s) {
  struct mt_st_file file;
  struct form *forms = NULL;
  int count;
  mt_err err;
  MT_TRY(mt_st_open(path, &file));
  MT_GO(list_forms(&s->model.params, &forms, &count));
  for (int i = 0; i < count; i++) {
    const struct mt_st_tensor *t = mt_st_find(&file, forms[i].name);
    if (!t || t->dtype != forms[i].tensor.dtype || t->size_bytes != mt_bytes(&forms[i].tensor)) {
      err =
          mt_fail(MT_EFORMAT, "%s: '%s' is missing or of another size: was something else frozen?",
                  path, forms[i].name);
      goto done;
    }
    MT_GO(s->be.upload(&s->be, forms[i].tensor.data, t->data, t->size_bytes));
  }
  /* What operations read is the master, rounded. */
  for (int i = 0; i < s->model.params.count; i++) {
    const struct mt_param *p = &s->model.params.row[i];
    if (!p->learns || p->compute.data == p->master.data) continue;
    char name[64];
    snprintf(name, sizeof name, "%s.master", p->name);
    const struct mt_st_tensor *t = mt_st_find(&file, name);
    void *rounded = malloc(mt_bytes(&p->compute));
    if (!rounded) {
      err = mt_fail(MT_ENOMEM, "'%s'", p->name);
      goto done;
    }
    mt_dtype_convert(rounded, p->compute.dtype, t->data, t->dtype, (size_t)mt_param_count(p));
    err = s->be.upload(&s->be, p->compute.data, rounded, mt_bytes(&p->compute));
    free(rounded);
    if (err) goto done;
  }
done:
  free(forms);
  mt_st_close(&file);
  return err;
}

static mt_err check_options(const char *path, const json_t *root,
                            const struct mt_train_options *options, const struct mt_loader *l,
                            const struct mt_recipe *recipe) {
  json_t *mine = shared_options(options, recipe), *value;
  const json_t *theirs = json_object_get(root, "options");
  const char *key;
  mt_err err = mine ? MT_OK : mt_fail(MT_ENOMEM, "%s: options", path);
  json_object_foreach(mine, key, value) {
    const json_t *their = json_object_get(theirs, key);
    /* Checkpoints of before there was a choice have float32 states. */
    bool before = !their && strcmp(key, "optim-state") == 0 && strcmp(recipe->states, "fp32") == 0;
    if (!err && !before && !json_equal(value, their)) {
      err = mt_fail(MT_EINVAL, "%s was made with another --%s: a resumed run must keep it", path,
                    key);
    }
  }
  json_decref(mine);
  json_int_t samples = json_integer_value(json_object_get(root, "samples"));
  if (!err && samples != mt_dataset_stats(l->data).samples) {
    err = mt_fail(MT_EINVAL, "%s was made with %lld samples, the data has %lld", path,
                  (long long)samples, (long long)mt_dataset_stats(l->data).samples);
  }
  return err;
}

mt_err mt_state_load(const char *path, struct mt_session *s, struct mt_optimizer *o,
                     struct mt_loader *l, const struct mt_train_options *options) {
  char file[MT_PATH_MAX], *text = NULL;
  size_t size;
  json_t *root = NULL;
  json_error_t why;
  mt_err err;
  MT_GO(mt_path_join(file, path, facts_name));
  MT_GO(mt_file_read(file, STATE_LIMIT, &text, &size));
  root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  if (!root || json_integer_value(json_object_get(root, "version")) != STATE_VERSION) {
    err = mt_fail(MT_EFORMAT, "%s: %s", file, root ? "another version's state" : why.text);
    goto done;
  }
  MT_GO(check_options(path, root, options, l, s->recipe));
  MT_GO(mt_path_join(file, path, tensors_name));
  MT_GO(load_tensors(file, s));
  o->step = json_integer_value(json_object_get(root, "step"));
  l->next.epoch = json_integer_value(json_object_get(root, "epoch"));
  l->next.index = json_integer_value(json_object_get(root, "index"));
  if (o->step < 0 || l->next.epoch < 0 || l->next.index < 0) {
    err = mt_fail(MT_EFORMAT, "%s: negative step or position", path);
  }
done:
  json_decref(root);
  free(text);
  return err;
}
