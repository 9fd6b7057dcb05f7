#include "report/report.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "report/page.h"

static volatile sig_atomic_t stop_signal;

static void on_signal(int number) {
  stop_signal = number;
}

static void catch_signals(void) {
  struct sigaction a = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
  stop_signal = 0;
  sigemptyset(&a.sa_mask);
  sigaction(SIGINT, &a, NULL);
  sigaction(SIGTERM, &a, NULL);
}

static mt_err write_page(const struct mt_run *runs, int count, double refresh_s, const char *path) {
  char *text = NULL;
  size_t size = 0;
  FILE *f = open_memstream(&text, &size);
  if (!f) return mt_fail(MT_ENOMEM, "a report");
  mt_err err = mt_page_write(f, runs, count, refresh_s);
  bool whole = !ferror(f);
  if (fclose(f) != 0 || !whole) err = err ? err : mt_fail(MT_ENOMEM, "a report");
  if (!err) err = mt_file_write_atomic(path, text, size);
  free(text);
  return err;
}

static bool all_ended(const struct mt_run *runs, int count) {
  bool ended = true;
  for (int i = 0; i < count; i++) ended &= mt_run_ended(&runs[i]);
  return ended;
}

static mt_err read_all(struct mt_run *runs, int count, bool *changed) {
  *changed = false;
  for (int i = 0; i < count; i++) {
    bool one;
    MT_TRY(mt_run_read(&runs[i], &one));
    *changed |= one;
  }
  return MT_OK;
}

/* A signal ends the wait. */
static void wait_s(double seconds) {
  struct timespec t = {.tv_sec = (time_t)seconds,
                       .tv_nsec = (long)(1e9 * (seconds - floor(seconds)))};
  if (!stop_signal) (void)nanosleep(&t, NULL);
}

static mt_err follow(struct mt_run *runs, const struct mt_report_options *o, const char *path) {
  bool ended = all_ended(runs, o->dir_count), changed;
  catch_signals();
  if (!ended)
    mt_info("report   %s, written anew every %g s while the run goes on", path, o->interval_s);
  while (!ended && !stop_signal) {
    wait_s(o->interval_s);
    MT_TRY(read_all(runs, o->dir_count, &changed));
    ended = all_ended(runs, o->dir_count);
    if (changed || ended) MT_TRY(write_page(runs, o->dir_count, ended ? 0 : o->interval_s, path));
  }
  /* A page that nobody writes any more must not reload itself. */
  return ended ? MT_OK : write_page(runs, o->dir_count, 0, path);
}

/* Directories of one name are told apart by their whole paths. */
static void name_apart(struct mt_run *runs, int count) {
  bool same = false;
  for (int i = 0; i < count; i++) {
    for (int k = 0; k < i; k++) same |= strcmp(runs[i].name, runs[k].name) == 0;
  }
  for (int i = 0; same && i < count; i++)
    snprintf(runs[i].name, sizeof runs[i].name, "%s", runs[i].dir);
}

mt_err mt_report_write(const struct mt_report_options *o, char path[MT_PATH_MAX]) {
  struct mt_run *runs;
  bool changed;
  mt_err err;
  if (o->dir_count < 1 || o->dir_count > MT_REPORT_RUNS)
    return mt_fail(MT_EINVAL, "a report shows 1 to %d runs, not %d", MT_REPORT_RUNS, o->dir_count);
  runs = calloc((size_t)o->dir_count, sizeof *runs);
  if (!runs) return mt_fail(MT_ENOMEM, "a report");
  for (int i = 0; i < o->dir_count; i++) MT_GO(mt_run_open(&runs[i], o->dirs[i]));
  name_apart(runs, o->dir_count);
  if (o->out)
    snprintf(path, MT_PATH_MAX, "%s", o->out);
  else
    MT_GO(mt_path_join(path, o->dirs[0], o->dir_count > 1 ? "comparison.html" : "report.html"));
  MT_GO(read_all(runs, o->dir_count, &changed));
  bool live = o->watch && !all_ended(runs, o->dir_count);
  MT_GO(write_page(runs, o->dir_count, live ? o->interval_s : 0, path));
  if (o->watch) err = follow(runs, o, path);
done:
  for (int i = 0; i < o->dir_count; i++) mt_run_close(&runs[i]);
  free(runs);
  return err;
}
