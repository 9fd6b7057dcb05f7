/* SIGKILL at random moments, again and again until the run is done: it ends bit for bit as one that
 * was never disturbed. SIGTERM and SIGINT at random moments: the run saves, says how to go on and
 * ends well.
 *   test_faults_kill [KILLS [SEED]] */
#include "base/rng.h"
#include "run.h"

static double undisturbed_s; /* what a run takes */

static void check_no_step_lost(long before, long after, int n) {
  if (after < before) BAD("kill %d: checkpoint-%ld was there, checkpoint-%ld is", n, before, after);
}

/* One run after another, each killed after a random part of a whole run's time; a run that ends is
 * compared and begun anew. */
static void kill_often(int kills, uint64_t seed) {
  struct mt_rng rng = mt_rng_make(seed, 0);
  int killed = 0, ends = 0, by_step[FINAL_STEP + 2] = {0};
  set_run("");
  for (int n = 0; killed < kills && n < 20 * kills && failures < 20; n++) {
    long before = newest();
    struct faults_run r = {.resume = before >= 0,
                           .signal = SIGKILL,
                           .after_s = 1.2 * undisturbed_s * mt_rng_uniform(&rng)};
    start(&r);
    long after = newest();
    check_no_step_lost(before, after, n);
    if (r.status == 128 + SIGKILL) {
      killed++;
      by_step[after + 1 > FINAL_STEP + 1 ? FINAL_STEP + 1 : after + 1]++;
      continue;
    }
    char what[64];
    snprintf(what, sizeof what, "run after %d kills", killed);
    check_end(what, &r);
    if (r.status != 0) BAD("%s: status %d: %s", what, r.status, r.err);
    same_end(what);
    left_over(what, "run");
    ends++;
    set_run("");
  }
  if (killed < kills) BAD("only %d kills", killed);
  recover("after the last kill");
  printf("%d kills (seed %llu), %d runs ended between them; newest checkpoint when killed:", killed,
         (unsigned long long)seed, ends);
  for (int i = 0; i < FINAL_STEP + 2; i++) {
    if (i == 0 && by_step[i]) printf(" none: %d,", by_step[i]);
    if (i > 0 && by_step[i]) printf(" %d: %d,", i - 1, by_step[i]);
  }
  printf(" %d failures\n", failures);
}

static void stop_politely(int signal, int times, uint64_t seed) {
  struct mt_rng rng = mt_rng_make(seed, (uint64_t)signal);
  int early = 0, saved = 0, ended = 0, before_all = failures;
  /* Until one was stopped between steps, too: a start may take longer than all of them. */
  for (int n = 0; n < times || (saved == 0 && n < 8 * times); n++) {
    char what[64], *told;
    struct faults_run r = {.signal = signal,
                           .steps = n % 2 ? FINAL_STEP : 2000,
                           .after_s = undisturbed_s * mt_rng_uniform(&rng)};
    snprintf(what, sizeof what, "signal %d, run %d", signal, n);
    set_run("");
    start(&r);
    check_end(what, &r);
    if (r.status != 0) BAD("%s: status %d: %s", what, r.status, r.err);
    told = strstr(r.err, "go on with --resume ");
    if (strstr(r.err, "before a step was taken")) {
      early++;
      if (newest() >= 0 || !strstr(r.err, "start it again")) BAD("%s: %s", what, r.err);
    } else if (told) {
      char path[MT_PATH_MAX] = "";
      saved++;
      sscanf(told, "go on with --resume %4000s", path);
      if (!mt_path_is_dir(path)) BAD("%s: no '%s'", what, path);
    } else {
      ended++;
      if (!strstr(r.err, "saved ")) BAD("%s: neither ended nor told: %s", what, r.err);
    }
    left_over(what, "run");
    if (r.steps == FINAL_STEP) recover(what);
  }
  printf("%s: %d runs; %d stopped before a step, %d saved, %d ended first; %d failures\n",
         strsignal(signal), times, early, saved, ended, failures - before_all);
  if (saved == 0) BAD("no run was stopped between steps");
}

int main(int argc, char **argv) {
  int kills = argc > 1 ? atoi(argv[1]) : 50;
  uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  set_up();
  struct faults_run r = {0};
  double begin = now_s();
  set_run("");
  start(&r);
  undisturbed_s = now_s() - begin;
  if (r.status != 0) fail_msg("undisturbed: %d: %s", r.status, r.err);
  kill_often(kills, seed);
  stop_politely(SIGTERM, 12, seed);
  stop_politely(SIGINT, 12, seed);
  if (failures == 0) tear_down();
  return failures != 0;
}
