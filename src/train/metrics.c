#include "train/metrics.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "base/json.h"
#include "train/health.h"

/* Step of a complete line; -1 where it has none or is cut short. */
static int64_t line_step(const char *line, ssize_t length) {
  long long step;
  if (length < 1 || line[length - 1] != '\n') return -1;
  return sscanf(line, "{\"step\":%lld", &step) == 1 ? step : -1;
}

static mt_err copy_lines(FILE *from, FILE *to, const char *path, int64_t last_step) {
  char *line = NULL;
  size_t capacity = 0;
  for (ssize_t n; (n = getline(&line, &capacity, from)) >= 0;) {
    int64_t step = line_step(line, n);
    if (step >= 0 && step <= last_step) fwrite(line, 1, (size_t)n, to);
  }
  free(line);
  if (!feof(from)) return mt_fail(MT_EIO, "cannot read '%s': %s", path, strerror(errno));
  return mt_context(mt_lines_sync(to, "its copy"), "'%s'", path);
}

mt_err mt_lines_sync(FILE *f, const char *name) {
  if (!f || (fflush(f) == 0 && !ferror(f) && fsync(fileno(f)) == 0)) return MT_OK;
  return mt_fail(MT_EIO, "cannot sync %s: %s", name, strerror(errno));
}

mt_err mt_lines_keep(const char *path, int64_t last_step) {
  char temp[MT_PATH_MAX + 16];
  snprintf(temp, sizeof temp, "%s.tmp-%d", path, (int)getpid());
  if (!mt_path_exists(path)) return MT_OK;
  FILE *from = fopen(path, "re"), *to = from ? fopen(temp, "we") : NULL;
  mt_err err = to ? copy_lines(from, to, path, last_step)
                  : mt_fail(MT_EIO, "cannot open '%s': %s", from ? temp : path, strerror(errno));
  if (from) fclose(from);
  if (to && fclose(to) != 0 && !err) err = mt_fail(MT_EIO, "cannot close '%s'", temp);
  if (!err && rename(temp, path) != 0)
    err = mt_fail(MT_EIO, "cannot rename to '%s': %s", path, strerror(errno));
  if (err && to) unlink(temp);
  return err;
}

mt_err mt_metrics_best(const char *dir, int64_t last_step, double min_delta, struct mt_best *best) {
  char path[MT_PATH_MAX], *line = NULL;
  size_t capacity = 0;
  *best = (struct mt_best){0};
  MT_TRY(mt_path_join(path, dir, "metrics.jsonl"));
  FILE *f = fopen(path, "re");
  if (!f && errno == ENOENT) return MT_OK;
  if (!f) return mt_fail(MT_EIO, "cannot read '%s': %s", path, strerror(errno));
  for (ssize_t n; (n = getline(&line, &capacity, f)) >= 0;) {
    double loss;
    int64_t step = line_step(line, n);
    if (step < 0 || step > last_step) continue;
    if (sscanf(line, "{\"step\":%*d,\"eval_loss\":%lf", &loss) != 1) continue;
    mt_best_update(best, step, loss, min_delta);
  }
  mt_err err = feof(f) ? MT_OK : mt_fail(MT_EIO, "cannot read '%s': %s", path, strerror(errno));
  free(line);
  fclose(f);
  return err;
}

mt_err mt_metrics_open(struct mt_metrics *m, const char *dir, int64_t keep_steps, bool resume,
                       int64_t timed_steps) {
  char path[MT_PATH_MAX];
  *m = (struct mt_metrics){.capacity = timed_steps};
  MT_TRY(mt_path_join(path, dir, "metrics.jsonl"));
  if (resume) MT_TRY(mt_lines_keep(path, keep_steps));
  m->step_ms = calloc((size_t)timed_steps + 1, sizeof *m->step_ms);
  if (!m->step_ms) return mt_fail(MT_ENOMEM, "times of %lld steps", (long long)timed_steps);
  m->file = fopen(path, resume ? "ae" : "we");
  if (m->file) return MT_OK;
  free(m->step_ms);
  m->step_ms = NULL;
  return mt_fail(MT_EIO, "cannot write '%s': %s", path, strerror(errno));
}

/* JSON has no NaN. */
static void number(FILE *f, const char *key, double x) {
  if (isfinite(x))
    fprintf(f, "\"%s\":%.9g,", key, x);
  else
    fprintf(f, "\"%s\":null,", key);
}

static mt_err flushed(struct mt_metrics *m) {
  if (fflush(m->file) == 0 && !ferror(m->file)) return MT_OK;
  return mt_fail(MT_EIO, "cannot write metrics.jsonl: %s", strerror(errno));
}

mt_err mt_metrics_board(struct mt_metrics *m, const char *dir, int64_t first_step) {
  return mt_tensorboard_open(&m->board, dir, first_step);
}

/* The last one, MT_PHASE_PIPELINE, is of pipelines alone. */
static int phases_of(const struct mt_step_result *r) {
  return r->stage_count > 0 ? MT_PHASE_COUNT : MT_PHASE_PIPELINE;
}

/* What the loads of a step say in a few numbers. */
static mt_err board_step(struct mt_metrics *m, const struct mt_step_result *r,
                         const struct mt_model *model) {
  struct mt_tensorboard *b = &m->board;
  char tag[64];
  if (!b->file) return MT_OK;
  mt_tensorboard_begin(b, r->step);
  mt_tensorboard_scalar(b, "train/loss", r->loss);
  mt_tensorboard_scalar(b, "train/cross_entropy", r->cross_entropy);
  mt_tensorboard_scalar(b, "train/aux_loss", r->aux);
  if (model->options.z_coef > 0) mt_tensorboard_scalar(b, "train/z_loss", r->z);
  mt_tensorboard_scalar(b, "train/grad_norm", r->grad_norm);
  mt_tensorboard_scalar(b, "train/learning_rate", r->lr);
  mt_tensorboard_scalar(b, "train/accuracy", (double)r->correct_count / (double)r->target_count);
  mt_tensorboard_scalar(b, "speed/tokens_per_s", (double)r->token_count / r->ms * 1e3);
  mt_tensorboard_scalar(b, "speed/step_ms", r->ms);
  for (int p = 0; p < phases_of(r); p++) {
    snprintf(tag, sizeof tag, "phase_ms/%s", mt_phase_name((enum mt_phase)p));
    mt_tensorboard_scalar(b, tag, r->phase_s[p] * 1e3);
  }
  if (r->stage_count > 0) mt_tensorboard_scalar(b, "speed/bubble", r->bubble);
  for (int l = 0; l < model->config.layers; l++) {
    struct mt_load_facts f =
        mt_load_facts(r->load + l * model->config.experts, model->config.experts);
    snprintf(tag, sizeof tag, "experts/layer_%d/largest_share", l);
    mt_tensorboard_scalar(b, tag, f.most);
    snprintf(tag, sizeof tag, "experts/layer_%d/smallest_share", l);
    mt_tensorboard_scalar(b, tag, f.least);
    snprintf(tag, sizeof tag, "experts/layer_%d/load_entropy", l);
    mt_tensorboard_scalar(b, tag, f.entropy);
    snprintf(tag, sizeof tag, "experts/layer_%d/without_token", l);
    mt_tensorboard_scalar(b, tag, f.idle);
  }
  return mt_tensorboard_end(b);
}

/* How long each stage of the pipeline waited for others. */
static void write_stages(FILE *f, const struct mt_step_result *r) {
  number(f, "bubble", r->bubble);
  fputs("\"stage_wait_ms\":[", f);
  for (int s = 0; s < r->stage_count; s++)
    fprintf(f, s ? ",%.4g" : "%.4g", r->stage_wait_s[s] * 1e3);
  fputs("],", f);
}

mt_err mt_metrics_step(struct mt_metrics *m, const struct mt_step_result *r,
                       const struct mt_model *model, bool timed) {
  FILE *f = m->file;
  struct rusage usage;
  struct mt_memory memory = mt_model_memory(model);
  if (timed && m->count < m->capacity) m->step_ms[m->count++] = r->ms;
  fprintf(f, "{\"step\":%lld,\"time\":%lld,", (long long)r->step, (long long)time(NULL));
  number(f, "loss", r->loss);
  number(f, "cross_entropy", r->cross_entropy);
  number(f, "aux", r->aux);
  if (model->options.z_coef > 0) number(f, "z_loss", r->z);
  number(f, "grad_norm", r->grad_norm);
  number(f, "lr", r->lr);
  number(f, "accuracy", (double)r->correct_count / (double)r->target_count);
  fprintf(f, "\"tokens\":%lld,\"targets\":%lld,", (long long)r->token_count,
          (long long)r->target_count);
  number(f, "tokens_per_s", (double)r->token_count / r->ms * 1e3);
  number(f, "step_ms", r->ms);
  fputs("\"phase_ms\":{", f);
  for (int p = 0; p < phases_of(r); p++) {
    fprintf(f, "%s\"%s\":%.4g", p ? "," : "", mt_phase_name((enum mt_phase)p), r->phase_s[p] * 1e3);
  }
  fputs("},", f);
  if (r->stage_count > 0) write_stages(f, r);
  fputs("\"expert_load\":[", f);
  for (int l = 0; l < model->config.layers; l++) {
    fputs(l ? ",[" : "[", f);
    for (int e = 0; e < model->config.experts; e++) {
      fprintf(f, e ? ",%lld" : "%lld", (long long)r->load[l * model->config.experts + e]);
    }
    fputc(']', f);
  }
  getrusage(RUSAGE_SELF, &usage);
  fprintf(f,
          "],\"graph\":%s,\"memory_bytes\":{\"parameters\":%zu,\"gradients\":%zu,\"optimizer\":%zu,"
          "\"activations\":%zu,\"process_peak\":%lld}}\n",
          r->replayed ? "true" : "false", memory.parameters, memory.gradients, memory.optimizer,
          memory.activations, (long long)usage.ru_maxrss * 1024);
  MT_TRY(flushed(m));
  return board_step(m, r, model);
}

static mt_err board_evaluation(struct mt_metrics *m, int64_t step, const struct mt_evaluation *e,
                               const struct mt_routing *routing) {
  struct mt_tensorboard *b = &m->board;
  char tag[64];
  mt_tensorboard_begin(b, step);
  mt_tensorboard_scalar(b, "held_out/loss", e->cross_entropy);
  mt_tensorboard_scalar(b, "held_out/perplexity", e->perplexity);
  mt_tensorboard_scalar(b, "held_out/accuracy", e->accuracy);
  for (int l = 0; routing && l < routing->layers; l++) {
    snprintf(tag, sizeof tag, "experts/layer_%d/router_entropy", l);
    mt_tensorboard_scalar(b, tag, routing->entropy[l]);
  }
  return mt_tensorboard_end(b);
}

/* Without the brace that closes the line. */
static void write_routing(FILE *f, const struct mt_routing *r) {
  fputs(",\"eval_router_entropy\":[", f);
  for (int l = 0; l < r->layers; l++) {
    if (isfinite(r->entropy[l]))
      fprintf(f, l ? ",%.6g" : "%.6g", r->entropy[l]);
    else
      fputs(l ? ",null" : "null", f);
  }
  fputs("],\"eval_expert_load\":[", f);
  for (int l = 0; l < r->layers; l++) {
    fputs(l ? ",[" : "[", f);
    for (int e = 0; e < r->experts; e++)
      fprintf(f, e ? ",%lld" : "%lld", (long long)r->load[l * r->experts + e]);
    fputc(']', f);
  }
  fputc(']', f);
}

mt_err mt_metrics_evaluation(struct mt_metrics *m, int64_t step, const struct mt_evaluation *e,
                             const struct mt_routing *routing) {
  fprintf(m->file, "{\"step\":%lld,", (long long)step);
  number(m->file, "eval_loss", e->cross_entropy);
  number(m->file, "eval_perplexity", e->perplexity);
  number(m->file, "eval_accuracy", e->accuracy);
  fprintf(m->file, "\"eval_samples\":%lld,\"eval_targets\":%lld,\"time\":%lld",
          (long long)e->samples, (long long)e->targets, (long long)time(NULL));
  if (routing) write_routing(m->file, routing);
  fputs("}\n", m->file);
  MT_TRY(flushed(m));
  return board_evaluation(m, step, e, routing);
}

mt_err mt_metrics_warning(struct mt_metrics *m, int64_t step, const char *text) {
  json_t *value = json_string(text);
  char *quoted = value ? mt_json_text(value, JSON_ENCODE_ANY) : NULL;
  json_decref(value);
  if (!quoted) return mt_fail(MT_ENOMEM, "a warning's line");
  fprintf(m->file, "{\"step\":%lld,\"warning\":%s}\n", (long long)step, quoted);
  free(quoted);
  mt_tensorboard_begin(&m->board, step);
  mt_tensorboard_text(&m->board, "warnings", text);
  MT_TRY(flushed(m));
  return mt_tensorboard_end(&m->board);
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double mt_metrics_median_ms(struct mt_metrics *m) {
  int64_t n = m->count;
  if (n == 0) return 0;
  qsort(m->step_ms, (size_t)n, sizeof *m->step_ms, ascending);
  return n % 2 ? m->step_ms[n / 2] : 0.5 * (m->step_ms[n / 2 - 1] + m->step_ms[n / 2]);
}

void mt_metrics_close(struct mt_metrics *m) {
  if (m->file) fclose(m->file);
  free(m->step_ms);
  mt_tensorboard_close(&m->board);
  *m = (struct mt_metrics){0};
}
