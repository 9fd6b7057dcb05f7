#include "report/run.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "train/health.h"

enum { FACTS_LIMIT = 1 << 22, MAX_PAIRS = 1 << 20 };

static mt_err wrong(const struct mt_tail *t, const char *why) {
  return mt_fail(MT_EFORMAT, "%s:%lld: %s", t->path, (long long)t->line, why);
}

static double number(const json_t *object, const char *key) {
  const json_t *v = json_object_get(object, key);
  return json_is_number(v) ? json_number_value(v) : NAN;
}

/* Per-layer series once the first line has said how many there are. */
static mt_err open_experts(struct mt_run *r, int layers, int experts) {
  r->layers = layers;
  r->experts = experts;
  r->load = calloc((size_t)layers * (size_t)experts, sizeof *r->load);
  r->load_entropy = calloc((size_t)layers, sizeof *r->load_entropy);
  r->router_entropy = calloc((size_t)layers, sizeof *r->router_entropy);
  if (!r->load || !r->load_entropy || !r->router_entropy)
    return mt_fail(MT_ENOMEM, "%d layers of %d experts", layers, experts);
  for (int l = 0; l < layers; l++) {
    MT_TRY(mt_series_create(&r->load_entropy[l], MT_SERIES_FEW));
    MT_TRY(mt_series_create(&r->router_entropy[l], MT_SERIES_FEW));
  }
  return mt_frames_create(&r->frames, layers, experts);
}

static void close_experts(struct mt_run *r) {
  for (int l = 0; l < r->layers; l++) {
    if (r->load_entropy) mt_series_destroy(&r->load_entropy[l]);
    if (r->router_entropy) mt_series_destroy(&r->router_entropy[l]);
  }
  free(r->load);
  free(r->load_entropy);
  free(r->router_entropy);
  r->load = NULL;
  r->load_entropy = r->router_entropy = NULL;
  mt_frames_destroy(&r->frames);
  r->layers = r->experts = 0;
}

/* r->load (=) of "expert_load": [[...], ...]. */
static mt_err read_load(struct mt_run *r, const json_t *rows) {
  size_t layers = json_array_size(rows), experts = json_array_size(json_array_get(rows, 0));
  if (layers < 1 || experts < 1 || layers > MAX_PAIRS || experts > MAX_PAIRS / layers)
    return wrong(&r->metrics, "expert_load is no matrix");
  if (r->layers == 0) MT_TRY(open_experts(r, (int)layers, (int)experts));
  if ((int)layers != r->layers) return wrong(&r->metrics, "expert_load has other layers");
  for (size_t l = 0; l < layers; l++) {
    const json_t *row = json_array_get(rows, l);
    if ((int)json_array_size(row) != r->experts)
      return wrong(&r->metrics, "expert_load has other experts");
    for (size_t e = 0; e < json_array_size(row); e++) {
      json_int_t n = json_integer_value(json_array_get(row, e));
      r->load[l * json_array_size(row) + e] = (int32_t)(n < 0 || n > INT32_MAX ? 0 : n);
    }
  }
  return MT_OK;
}

static void take_load(struct mt_run *r, int64_t step) {
  double largest = 0, evenness = 0, even = log((double)r->experts);
  int idle = 0;
  for (int l = 0; l < r->layers; l++) {
    struct mt_load_facts f = mt_load_facts(r->load + l * r->experts, r->experts);
    double one = even > 0 ? f.entropy / even : 1;
    mt_series_add(&r->load_entropy[l], step, one);
    evenness += one / r->layers;
    if (f.most > largest) largest = f.most;
    idle += f.idle;
  }
  mt_series_add(&r->load_evenness, step, evenness);
  mt_series_add(&r->largest, step, largest);
  mt_series_add(&r->idle, step, (double)idle / (double)(r->layers * r->experts));
  mt_frames_add(&r->frames, step, r->load);
}

static mt_err take_phases(struct mt_run *r, int64_t step, json_t *phases) {
  const char *key;
  json_t *value;
  json_object_foreach(phases, key, value) {
    int i = 0;
    while (i < r->phase_count && strncmp(r->phase_name[i], key, sizeof *r->phase_name - 1) != 0)
      i++;
    if (i == MT_RUN_PHASES) continue;
    if (i == r->phase_count) {
      MT_TRY(mt_series_create(&r->phase[i], MT_SERIES_POINTS));
      snprintf(r->phase_name[i], sizeof r->phase_name[i], "%s", key);
      r->phase_count++;
    }
    mt_series_add(&r->phase[i], step, json_is_number(value) ? json_number_value(value) : NAN);
  }
  return MT_OK;
}

static void take_memory(struct mt_run *r, int64_t step, json_t *memory) {
  const char *key;
  json_t *value;
  if (!memory) return;
  r->memory_count = 0;
  json_object_foreach(memory, key, value) {
    double bytes = json_number_value(value);
    if (strcmp(key, "process_peak") == 0) {
      mt_series_add(&r->process_peak, step, bytes);
    } else if (r->memory_count < MT_RUN_MEMORY) {
      int i = r->memory_count++;
      snprintf(r->memory[i].name, sizeof r->memory[i].name, "%s", key);
      r->memory[i].bytes = bytes;
    }
  }
}

static mt_err take_step(struct mt_run *r, int64_t step, const json_t *o) {
  const json_t *load = json_object_get(o, "expert_load");
  double tokens = number(o, "tokens"), ms = number(o, "step_ms");
  if (r->step_count && step <= r->last_step) return MT_OK;
#define X(field, key) mt_series_add(&r->field, step, number(o, key));
  MT_STEP_NUMBERS(X)
#undef X
  r->step_count++;
  r->last_step = step;
  if (isfinite(tokens)) r->token_sum += tokens;
  if (isfinite(ms)) r->ms_sum += ms;
  MT_TRY(take_phases(r, step, json_object_get(o, "phase_ms")));
  take_memory(r, step, json_object_get(o, "memory_bytes"));
  if (!load) return MT_OK;
  MT_TRY(read_load(r, load));
  take_load(r, step);
  return MT_OK;
}

static mt_err take_evaluation(struct mt_run *r, int64_t step, const json_t *o) {
  const json_t *entropy = json_object_get(o, "eval_router_entropy");
  const json_t *load = json_object_get(o, "eval_expert_load");
  struct mt_run_point p = {step, number(o, "eval_loss"), number(o, "eval_perplexity"),
                           number(o, "eval_accuracy")};
  if (r->eval_count && step <= r->last_eval.step) return MT_OK;
#define X(field, key) mt_series_add(&r->field, step, number(o, key));
  MT_EVAL_NUMBERS(X)
#undef X
  if (r->eval_count++ == 0) r->first_eval = r->best_eval = p;
  r->last_eval = p;
  if (p.loss < r->best_eval.loss || isnan(r->best_eval.loss)) r->best_eval = p;
  if (load && r->layers == 0) MT_TRY(read_load(r, load)); /* for their number alone */
  if (!entropy || r->layers == 0) return MT_OK;
  if ((int)json_array_size(entropy) != r->layers)
    return wrong(&r->metrics, "eval_router_entropy has other layers");
  double evenness = 0, even = log((double)r->experts);
  for (int l = 0; l < r->layers; l++) {
    const json_t *v = json_array_get(entropy, (size_t)l);
    double x = json_is_number(v) ? json_number_value(v) : NAN, one = even > 0 ? x / even : 1;
    mt_series_add(&r->router_entropy[l], step, one);
    evenness += one / r->layers;
  }
  mt_series_add(&r->router_evenness, step, evenness);
  return MT_OK;
}

static mt_err take_warning(struct mt_run *r, int64_t step, const char *text) {
  r->warning_total++;
  if (r->warning_count == MT_RUN_WARNINGS) return MT_OK;
  r->warning[r->warning_count].step = step;
  r->warning[r->warning_count].text = strdup(text);
  if (!r->warning[r->warning_count].text) return mt_fail(MT_ENOMEM, "a warning");
  r->warning_count++;
  return MT_OK;
}

static mt_err take_metrics(struct mt_run *r, json_t *o) {
  const json_t *step = json_object_get(o, "step"), *warning = json_object_get(o, "warning");
  double time = number(o, "time");
  if (!json_is_integer(step)) return wrong(&r->metrics, "no \"step\"");
  if (isfinite(time)) r->last_time = time;
  if (json_is_string(warning))
    return take_warning(r, json_integer_value(step), json_string_value(warning));
  if (json_object_get(o, "eval_loss")) return take_evaluation(r, json_integer_value(step), o);
  return take_step(r, json_integer_value(step), o);
}

/* Every second step that is neither the first nor among the last goes. */
static void thin_samples(struct mt_run *r) {
  int kept = 0, group = 0;
  for (int i = 0; i < r->sample_count; i++) {
    if (i > 0 && r->sample[i].step != r->sample[i - 1].step) group++;
    if (i < r->sample_count / 2 && group % 2 == 1) {
      json_decref(r->sample[i].object);
      r->sample[i].object = NULL;
    }
  }
  for (int i = 0; i < r->sample_count; i++) {
    if (r->sample[i].object) r->sample[kept++] = r->sample[i];
  }
  if (kept == MT_RUN_SAMPLES) json_decref(r->sample[--kept].object); /* one step has them all */
  r->sample_count = kept;
}

static mt_err take_sample(struct mt_run *r, json_t *o) {
  const json_t *step = json_object_get(o, "step"), *index = json_object_get(o, "index");
  if (!json_is_integer(step)) return wrong(&r->samples_file, "no \"step\"");
  struct mt_run_sample s = {json_integer_value(step), (int)json_integer_value(index),
                            json_incref(o)};
  for (int i = 0; i < r->sample_count; i++) {
    if (r->sample[i].step != s.step || r->sample[i].index != s.index) continue;
    json_decref(r->sample[i].object);
    r->sample[i] = s;
    return MT_OK;
  }
  if (r->sample_count == MT_RUN_SAMPLES) thin_samples(r);
  r->sample[r->sample_count++] = s;
  return MT_OK;
}

static mt_err take_line(struct mt_run *r, struct mt_tail *t, const char *text, size_t size) {
  json_error_t why;
  while (size && (text[size - 1] == '\n' || text[size - 1] == '\r')) size--;
  if (size == 0) return MT_OK;
  json_t *o = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  if (!json_is_object(o)) {
    json_decref(o);
    return wrong(t, o ? "no JSON object" : why.text);
  }
  mt_err err = t == &r->metrics ? take_metrics(r, o) : take_sample(r, o);
  json_decref(o);
  return err;
}

static mt_err read_lines(struct mt_run *r, struct mt_tail *t, FILE *f, bool *changed) {
  char *line = NULL;
  size_t capacity = 0;
  mt_err err = MT_OK;
  if (fseeko(f, (off_t)t->offset, SEEK_SET) != 0)
    return mt_fail(MT_EIO, "cannot read '%s': %s", t->path, strerror(errno));
  for (ssize_t n; (n = getline(&line, &capacity, f)) > 0;) {
    if (line[n - 1] != '\n') break; /* being written */
    t->offset += n;
    t->line++;
    *changed = true;
    MT_GO(take_line(r, t, line, (size_t)n));
  }
  if (!feof(f)) err = mt_fail(MT_EIO, "cannot read '%s': %s", t->path, strerror(errno));
done:
  free(line);
  return err;
}

static void forget_metrics(struct mt_run *r) {
#define X(field, key) mt_series_clear(&r->field);
  MT_STEP_NUMBERS(X)
  MT_EVAL_NUMBERS(X)
#undef X
  mt_series_clear(&r->process_peak);
  mt_series_clear(&r->load_evenness);
  mt_series_clear(&r->router_evenness);
  mt_series_clear(&r->idle);
  mt_series_clear(&r->largest);
  for (int i = 0; i < r->phase_count; i++) mt_series_destroy(&r->phase[i]);
  for (int i = 0; i < r->warning_count; i++) free(r->warning[i].text);
  close_experts(r);
  r->phase_count = r->memory_count = r->warning_count = 0;
  r->step_count = r->last_step = r->eval_count = r->warning_total = 0;
  r->token_sum = r->ms_sum = r->last_time = 0;
}

static void forget_samples(struct mt_run *r) {
  for (int i = 0; i < r->sample_count; i++) json_decref(r->sample[i].object);
  r->sample_count = 0;
}

/* A file that is not there has no lines (yet). */
static mt_err read_tail(struct mt_run *r, struct mt_tail *t, bool *changed) {
  struct stat st;
  FILE *f = fopen(t->path, "re");
  if (!f && errno == ENOENT) return MT_OK;
  if (!f || fstat(fileno(f), &st) != 0) {
    mt_err err = mt_fail(MT_EIO, "cannot read '%s': %s", t->path, strerror(errno));
    if (f) fclose(f);
    return err;
  }
  if ((uint64_t)st.st_ino != t->inode || st.st_size < t->offset) {
    if (t == &r->metrics)
      forget_metrics(r);
    else
      forget_samples(r);
    t->inode = (uint64_t)st.st_ino;
    t->offset = t->line = 0;
    *changed = true;
  }
  mt_err err = read_lines(r, t, f, changed);
  fclose(f);
  return err;
}

static mt_err read_facts(struct mt_run *r, bool *changed) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  struct stat st;
  json_error_t why;
  MT_TRY(mt_path_join(path, r->dir, "run.json"));
  if (stat(path, &st) != 0) return MT_OK;
  int64_t id = (int64_t)st.st_ino * 1000003 + (int64_t)st.st_mtim.tv_nsec + st.st_size;
  if (r->facts && id == r->facts_id) return MT_OK;
  MT_TRY(mt_file_read(path, FACTS_LIMIT, &text, &size));
  json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  free(text);
  if (!json_is_object(root)) {
    json_decref(root);
    return mt_fail(MT_EFORMAT, "%s:%d: %s", path, root ? 1 : why.line,
                   root ? "no JSON object" : why.text);
  }
  json_decref(r->facts);
  r->facts = root;
  r->facts_id = id;
  *changed = true;
  return MT_OK;
}

mt_err mt_run_read(struct mt_run *r, bool *changed) {
  *changed = false;
  /* First, so that no line is missed of a run that it calls ended. */
  MT_TRY(read_facts(r, changed));
  MT_TRY(read_tail(r, &r->metrics, changed));
  return read_tail(r, &r->samples_file, changed);
}

static void name_run(struct mt_run *r) {
  size_t end = strlen(r->dir);
  while (end > 1 && r->dir[end - 1] == '/') end--;
  size_t begin = end;
  while (begin > 0 && r->dir[begin - 1] != '/') begin--;
  if (begin == end) begin = 0;
  snprintf(r->name, sizeof r->name, "%.*s", (int)(end - begin), r->dir + begin);
}

mt_err mt_run_open(struct mt_run *r, const char *dir) {
  char facts[MT_PATH_MAX];
  mt_err err;
  *r = (struct mt_run){.dir = dir};
  name_run(r);
  MT_GO(mt_path_join(r->metrics.path, dir, "metrics.jsonl"));
  MT_GO(mt_path_join(r->samples_file.path, dir, "samples.jsonl"));
  MT_GO(mt_path_join(facts, dir, "run.json"));
  if (!mt_path_exists(r->metrics.path) && !mt_path_exists(facts)) {
    err = mt_fail(MT_ENOENT, "'%s' is no run directory: it has neither metrics.jsonl nor run.json",
                  dir);
    goto done;
  }
#define X(field, key) MT_GO(mt_series_create(&r->field, MT_SERIES_POINTS));
  MT_STEP_NUMBERS(X)
  MT_EVAL_NUMBERS(X)
#undef X
  MT_GO(mt_series_create(&r->process_peak, MT_SERIES_POINTS));
  MT_GO(mt_series_create(&r->load_evenness, MT_SERIES_POINTS));
  MT_GO(mt_series_create(&r->router_evenness, MT_SERIES_POINTS));
  MT_GO(mt_series_create(&r->idle, MT_SERIES_POINTS));
  MT_GO(mt_series_create(&r->largest, MT_SERIES_POINTS));
done:
  if (err) mt_run_close(r);
  return err;
}

void mt_run_close(struct mt_run *r) {
  forget_metrics(r);
  forget_samples(r);
#define X(field, key) mt_series_destroy(&r->field);
  MT_STEP_NUMBERS(X)
  MT_EVAL_NUMBERS(X)
#undef X
  mt_series_destroy(&r->process_peak);
  mt_series_destroy(&r->load_evenness);
  mt_series_destroy(&r->router_evenness);
  mt_series_destroy(&r->idle);
  mt_series_destroy(&r->largest);
  json_decref(r->facts);
  *r = (struct mt_run){0};
}

const json_t *mt_run_fact(const struct mt_run *r, const char *section, const char *key) {
  const json_t *at = section ? json_object_get(r->facts, section) : r->facts;
  return json_object_get(at, key);
}

double mt_run_number(const struct mt_run *r, const char *section, const char *key, double none) {
  const json_t *v = mt_run_fact(r, section, key);
  return json_is_number(v) ? json_number_value(v) : none;
}

const char *mt_run_status(const struct mt_run *r) {
  return json_string_value(mt_run_fact(r, "result", "status"));
}

bool mt_run_ended(const struct mt_run *r) {
  const char *status = mt_run_status(r);
  return status && strcmp(status, "running") != 0;
}
