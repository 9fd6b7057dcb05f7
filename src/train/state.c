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
#include "par/collect.h"

enum { STATE_VERSION = 1, STAGE_BYTES = 8 << 20, STATE_LIMIT = 1 << 20 };

static const char tensors_name[] = "moetune-state.safetensors";
static const char facts_name[] = "moetune-state.json";

/* The optimizer's copies of a parameter, and what they are called there. */
static const struct {
  const char *suffix;
  enum mt_form form;
} kept[] = {{"master", MT_FORM_MASTER}, {"m", MT_FORM_M}, {"v", MT_FORM_V}};
enum { KEPT = sizeof kept / sizeof *kept };

struct form {
  char name[64];
  const struct mt_param *whole;
  enum mt_form form;
};

/* Lists what must be kept, of the whole model; *out is freed by the caller. */
static mt_err list_forms(const struct mt_params *whole, struct form **out, int *count) {
  struct form *f = calloc((size_t)whole->count * KEPT, sizeof *f);
  if (!f) return mt_fail(MT_ENOMEM, "training state");
  int n = 0;
  for (int i = 0; i < whole->count; i++) {
    const struct mt_param *p = &whole->row[i];
    for (int k = 0; p->learns && k < KEPT; k++) {
      f[n] = (struct form){.whole = p, .form = kept[k].form};
      snprintf(f[n++].name, sizeof f->name, "%s.%s", p->name, kept[k].suffix);
    }
  }
  *out = f;
  *count = n;
  return MT_OK;
}

/* Elements [begin, begin + n) of a form of the whole model: out (=) on the rank that writes. */
static mt_err fetch(struct mt_session *s, const struct form *f, int64_t begin, int64_t n,
                    void *out) {
  if (s->ranks) return mt_ranks_collect(s->ranks, f->whole, f->form, begin, n, out);
  const struct mt_param *p = mt_params_find(&s->model.params, f->whole->kind, f->whole->layer);
  struct mt_tensor t = mt_param_form(p, f->form);
  size_t item = mt_dtype_bytes(t.dtype);
  return s->be.download(&s->be, out, (const char *)t.data + (size_t)begin * item, (size_t)n * item);
}

/* w: NULL on a rank that hands over only. */
static mt_err save_form(struct mt_session *s, const struct form *f, struct mt_st_writer *w,
                        void *stage) {
  size_t item = mt_dtype_bytes(s->recipe->state);
  int64_t all = mt_param_count(f->whole), most = STAGE_BYTES / (int64_t)item;
  for (int64_t at = 0; at < all; at += most) {
    int64_t n = all - at < most ? all - at : most;
    MT_TRY(fetch(s, f, at, n, stage));
    if (w) MT_TRY(mt_st_write(w, stage, (size_t)n * item));
  }
  return MT_OK;
}

static mt_err create_tensors(const struct mt_session *s, const struct form *forms, int count,
                             const char *path, struct mt_st_writer *w) {
  struct mt_st_entry *entries = calloc((size_t)count + 1, sizeof *entries);
  if (!entries) return mt_fail(MT_ENOMEM, "training state");
  for (int i = 0; i < count; i++) {
    const struct mt_param *p = forms[i].whole;
    entries[i] = (struct mt_st_entry){.name = forms[i].name,
                                      .dtype_name = mt_dtype_name(s->recipe->state),
                                      .rank = p->rank,
                                      .dim = {p->dim[0], p->dim[1], p->dim[2]},
                                      .size_bytes = (size_t)mt_param_count(p) *
                                                    mt_dtype_bytes(s->recipe->state)};
  }
  mt_err err = mt_st_create(w, path, entries, (size_t)count);
  free(entries);
  return err;
}

/* path: NULL on a rank that hands over only. */
static mt_err save_tensors(struct mt_session *s, const char *path) {
  struct form *forms = NULL;
  struct mt_st_writer w = {.fd = -1};
  int count;
  mt_err err = MT_OK;
  MT_TRY(list_forms(&s->whole, &forms, &count));
  void *stage = malloc(STAGE_BYTES);
  if (!stage) {
    err = mt_fail(MT_ENOMEM, "training state");
    goto done;
  }
  if (path) MT_GO(create_tensors(s, forms, count, path, &w));
  for (int i = 0; i < count; i++) MT_GO(save_form(s, &forms[i], path ? &w : NULL, stage));
  if (path) MT_GO(mt_st_finish(&w));
done:
  mt_st_abort(&w);
  free(stage);
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

static int ranks_of(const struct mt_session *s) {
  return s->world ? s->world->size : 1;
}

/* The position is one of all ranks' samples; readers says how many share a micro-batch. */
static mt_err save_facts(const struct mt_session *s, const struct mt_optimizer *o,
                         const struct mt_loader *l, const struct mt_train_options *options,
                         const char *path) {
  json_t *root = json_pack(
      "{s:i, s:I, s:I, s:I, s:I, s:i, s:i, s:o}", "version", STATE_VERSION, "step",
      (json_int_t)o->step, "epoch", (json_int_t)l->next.epoch, "index", (json_int_t)l->next.index,
      "samples", (json_int_t)mt_dataset_stats(l->data).samples, "readers", l->options.world,
      "ranks", ranks_of(s), "options", shared_options(options, o->model->recipe));
  char *text = mt_json_text(root, JSON_INDENT(2));
  json_decref(root);
  if (!text) return mt_fail(MT_ENOMEM, "training state");
  mt_err err = mt_file_write_atomic(path, text, strlen(text));
  free(text);
  return err;
}

static mt_err give_rows(void *context, const struct mt_param *whole, int64_t row, int64_t count,
                        void *out, enum mt_dtype *dtype) {
  struct mt_session *s = context;
  int64_t n = mt_param_row_elems(whole);
  *dtype = s->recipe->state;
  return mt_ranks_collect(s->ranks, whole, MT_FORM_MASTER, row * n, count * n, out);
}

mt_err mt_state_export(struct mt_session *s, const char *dir, uint64_t max_shard_bytes) {
  struct mt_hf_gather gather = {.writes = mt_session_speaks(s), .rows = give_rows, .context = s};
  struct mt_hf_export_options o = {.layout = MT_HF_KEEP,
                                   .dtype = MT_HF_KEEP,
                                   .max_shard_bytes = max_shard_bytes,
                                   .gather = s->ranks ? &gather : NULL};
  return mt_hf_export(&s->checkpoint, s->ranks ? &s->whole : &s->model.params, &s->be, dir, &o);
}

/* The rank that writes. */
static mt_err write_checkpoint(struct mt_session *s, const struct mt_optimizer *o,
                               const struct mt_loader *l, const struct mt_train_options *options,
                               const char *path) {
  char file[MT_PATH_MAX];
  struct mt_dir_txn txn = {0};
  mt_err err;
  MT_GO(mt_dir_begin(&txn, path));
  MT_GO(mt_state_export(s, txn.temp, options->max_shard_bytes));
  MT_GO(mt_path_join(file, txn.temp, tensors_name));
  MT_GO(save_tensors(s, file));
  MT_GO(mt_path_join(file, txn.temp, facts_name));
  MT_GO(save_facts(s, o, l, options, file));
  MT_GO(mt_checksums_extend(txn.temp));
  MT_GO(mt_dir_commit(&txn));
done:
  mt_dir_abort(&txn);
  return err;
}

mt_err mt_state_save(struct mt_session *s, const struct mt_optimizer *o, const struct mt_loader *l,
                     const struct mt_train_options *options, char path[MT_PATH_MAX]) {
  char name[64];
  mt_err err;
  snprintf(name, sizeof name, "checkpoint-%lld", (long long)o->step);
  MT_TRY(mt_path_join(path, options->out, name));
  if (mt_session_speaks(s)) {
    err = write_checkpoint(s, o, l, options, path);
  } else {
    err = mt_state_export(s, path, options->max_shard_bytes);
    if (!err) err = save_tensors(s, NULL);
  }
  /* A failure is not brought here: who hands over may be waiting for this rank (mt_world_end). */
  MT_TRY(err);
  MT_TRY(mt_world_meet(s->world, MT_OK, NULL));
  /* The next export copies the small files from here: the checkpoint that the run was resumed from
   * may be removed by then. */
  snprintf(s->checkpoint.dir, sizeof s->checkpoint.dir, "%s", path);
  return MT_OK;
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
  MT_TRY(mt_path_sync(out)); /* or the power fails, and it is found without its files */
  return mt_dir_remove(gone);
}

mt_err mt_state_retain(const char *out, int64_t step, int keep) {
  int64_t n = step + 1;
  for (int left = 0; keep > 0 && n >= 0; left++) {
    below(out, n, &n);
    if (n >= 0 && left >= keep) MT_TRY(remove_checkpoint(out, n));
  }
  return MT_OK;
}

/* Whether the process has ended and nobody has taken note: where a launcher was killed with it, in
 * a container without init, that can last. */
static bool dead(pid_t pid) {
  char path[64], text[512] = "";
  snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
  FILE *f = fopen(path, "re");
  size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
  if (f) fclose(f);
  const char *name_end = n ? strrchr(text, ')') : NULL;
  return name_end && (name_end[1] == ' ' && (name_end[2] == 'Z' || name_end[2] == 'X'));
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
  return pid == getpid() || (kill((pid_t)pid, 0) != 0 && errno == ESRCH) || dead((pid_t)pid);
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

void mt_state_warn_of_earlier(const char *out) {
  int64_t newest;
  below(out, INT64_MAX, &newest);
  if (newest < 0) return;
  mt_warn("%s holds checkpoint-%lld of an earlier run, which --resume without DIR would take until "
          "this one has made a later one",
          out, (long long)newest);
}

mt_err mt_state_verify(const char *path) {
  bool listed;
  MT_TRY(mt_checksums_verify(path, &listed));
  if (!listed) mt_info("%s was made without checksums: it goes unchecked", path);
  return MT_OK;
}

/* A form of a row from a file's elements, or what is kept of it here. */
static mt_err put_form(struct mt_session *s, int row, enum mt_form form, const uint8_t *data) {
  const struct mt_model *m = &s->model;
  const struct mt_param *p = &m->params.row[row];
  struct mt_tensor t = mt_param_form(p, form);
  size_t item = mt_dtype_bytes(s->recipe->state);
  if (t.data) return s->be.upload(&s->be, t.data, data, mt_bytes(&t));
  t = mt_model_share(m, p->sync, form);
  int64_t begin, n, state;
  for (int64_t from = 0; mt_buckets_run(&m->buckets, &m->params, row, from, &begin, &n, &state);
       from = begin + n) {
    MT_TRY(s->be.upload(&s->be, (char *)t.data + (size_t)state * item, data + (size_t)begin * item,
                        (size_t)n * item));
  }
  return MT_OK;
}

/* What of the file's tensor of a form is here. */
static mt_err load_form(const char *path, const struct mt_st_file *file, struct mt_session *s,
                        int row, int k) {
  const struct mt_param *p = &s->model.params.row[row];
  const struct mt_param *whole = mt_params_find(&s->whole, p->kind, p->layer);
  enum mt_dtype dtype = s->recipe->state;
  size_t item = mt_dtype_bytes(dtype), n = (size_t)mt_param_count(p);
  size_t first = (size_t)p->first * (n / (size_t)p->dim[0]);
  char name[64];
  snprintf(name, sizeof name, "%s.%s", p->name, kept[k].suffix);
  const struct mt_st_tensor *t = mt_st_find(file, name);
  if (!t || t->dtype != dtype || t->size_bytes != (size_t)mt_param_count(whole) * item) {
    return mt_fail(MT_EFORMAT, "%s: '%s' is missing or of another size: was something else frozen?",
                   path, name);
  }
  MT_TRY(put_form(s, row, kept[k].form, t->data + first * item));
  if (kept[k].form != MT_FORM_MASTER || !p->compute.data || s->recipe->act == s->recipe->state)
    return MT_OK;
  /* What operations read is the master, rounded. */
  void *rounded = malloc(mt_bytes(&p->compute));
  if (!rounded) return mt_fail(MT_ENOMEM, "'%s'", p->name);
  mt_dtype_convert(rounded, p->compute.dtype, t->data + first * item, dtype, n);
  mt_err err = s->be.upload(&s->be, p->compute.data, rounded, mt_bytes(&p->compute));
  free(rounded);
  return err;
}

static mt_err load_tensors(const char *path, struct mt_session *s) {
  struct mt_st_file file;
  mt_err err = MT_OK;
  MT_TRY(mt_st_open(path, &file));
  for (int i = 0; !err && i < s->model.params.count; i++) {
    bool learns = s->model.params.row[i].learns;
    for (int k = 0; !err && learns && k < KEPT; k++) err = load_form(path, &file, s, i, k);
  }
  if (!err) err = mt_model_quantize_weights(&s->model);
  mt_st_close(&file);
  return err;
}

/* Whether so many ranks did not make it: what a step takes of the data is then told apart. */
static bool other_ranks(const char *path, const json_t *root, const struct mt_session *s,
                        const struct mt_train_options *options, const struct mt_loader *l) {
  const json_t *theirs = json_object_get(root, "options");
  const json_t *count = json_object_get(root, "readers"); /* absent: of before there were any */
  json_int_t readers = count ? json_integer_value(count) : 1;
  const json_t *ranks = json_object_get(root, "ranks"); /* absent: taken for as many */
  bool as_many = !ranks || json_integer_value(ranks) == ranks_of(s);
  if (readers == l->options.world && as_many) return false;
  json_int_t was = readers * json_integer_value(json_object_get(theirs, "batch-size")) *
                   json_integer_value(json_object_get(theirs, "grad-accum"));
  json_int_t is = (json_int_t)l->options.world * options->batch_size * options->grad_accum;
  if (was != is) {
    mt_warn("%s is of a run that took %lld samples a step; this one takes %lld", path,
            (long long)was, (long long)is);
  }
  return true;
}

static mt_err check_options(const char *path, const json_t *root, const struct mt_session *s,
                            const struct mt_train_options *options, const struct mt_loader *l) {
  const struct mt_recipe *recipe = s->recipe;
  json_t *mine = shared_options(options, recipe), *value;
  const json_t *theirs = json_object_get(root, "options");
  const char *key;
  mt_err err = mine ? MT_OK : mt_fail(MT_ENOMEM, "%s: options", path);
  if (mine && other_ranks(path, root, s, options, l)) {
    json_object_del(mine, "batch-size");
    json_object_del(mine, "grad-accum");
  }
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
  MT_GO(check_options(path, root, s, options, l));
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
