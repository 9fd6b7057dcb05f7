#include "train/metrics.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <sys/resource.h>

enum { METRICS_LIMIT = 1 << 30 };

/* Lines of the file whose step is at most keep_steps, in memory. */
static mt_err keep_lines(const char *path, int64_t keep_steps) {
  char *text;
  size_t size, kept = 0;
  if (!mt_path_exists(path)) return MT_OK;
  MT_TRY(mt_file_read(path, METRICS_LIMIT, &text, &size));
  for (char *at = text, *end; at < text + size && (end = strchr(at, '\n')); at = end + 1) {
    long long step;
    if (sscanf(at, "{\"step\":%lld", &step) != 1 || step > keep_steps) continue;
    memmove(text + kept, at, (size_t)(end + 1 - at));
    kept += (size_t)(end + 1 - at);
  }
  mt_err err = mt_file_write_atomic(path, text, kept);
  free(text);
  return err;
}

mt_err mt_metrics_open(struct mt_metrics *m, const char *dir, int64_t keep_steps, bool resume,
                       int64_t timed_steps) {
  char path[MT_PATH_MAX];
  *m = (struct mt_metrics){.capacity = timed_steps};
  MT_TRY(mt_path_join(path, dir, "metrics.jsonl"));
  if (resume) MT_TRY(keep_lines(path, keep_steps));
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

mt_err mt_metrics_step(struct mt_metrics *m, const struct mt_step_result *r,
                       const struct mt_model *model, bool timed) {
  FILE *f = m->file;
  struct rusage usage;
  struct mt_memory memory = mt_model_memory(model);
  if (timed && m->count < m->capacity) m->step_ms[m->count++] = r->ms;
  fprintf(f, "{\"step\":%lld,", (long long)r->step);
  number(f, "loss", r->loss);
  number(f, "cross_entropy", r->cross_entropy);
  number(f, "aux", r->aux);
  number(f, "grad_norm", r->grad_norm);
  number(f, "lr", r->lr);
  number(f, "accuracy", (double)r->correct_count / (double)r->target_count);
  fprintf(f, "\"tokens\":%lld,\"targets\":%lld,", (long long)r->token_count,
          (long long)r->target_count);
  number(f, "tokens_per_s", (double)r->token_count / r->ms * 1e3);
  number(f, "step_ms", r->ms);
  fputs("\"phase_ms\":{", f);
  for (int p = 0; p < MT_PHASE_COUNT; p++) {
    fprintf(f, "%s\"%s\":%.4g", p ? "," : "", mt_phase_name((enum mt_phase)p), r->phase_s[p] * 1e3);
  }
  fputs("},\"expert_load\":[", f);
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
  return flushed(m);
}

mt_err mt_metrics_evaluation(struct mt_metrics *m, int64_t step, const struct mt_evaluation *e) {
  fprintf(m->file, "{\"step\":%lld,", (long long)step);
  number(m->file, "eval_loss", e->cross_entropy);
  number(m->file, "eval_perplexity", e->perplexity);
  number(m->file, "eval_accuracy", e->accuracy);
  fprintf(m->file, "\"eval_targets\":%lld}\n", (long long)e->targets);
  return flushed(m);
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
  *m = (struct mt_metrics){0};
}
