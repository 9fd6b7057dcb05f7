/* Every allocation and every file call of the load-train-save path fails in turn: the program says
 * so or does without, and goes on from the last checkpoint as if nothing had happened.
 *   test_faults_injected [STRIDE [WHAT]]   every STRIDE-th (1: all of them), else a few hundred;
 *                                          WHAT: of the sweeps whose name holds this
 * Under AddressSanitizer memory that is not given back is a failure too. */
#include "run.h"
#include "kernels/registry.h"

struct sweep {
  const char *what, *variable, *kind;
  bool sticky, resume;
  long most; /* runs by default */
};

static long counted[2][2]; /* of an undisturbed run: [resumed][allocations, file calls] */

static void count_calls(bool resume) {
  char counts[MT_PATH_MAX + 16];
  size_t size;
  snprintf(counts, sizeof counts, "FAULTS_COUNTS=%s/counts", home);
  struct faults_run r = {.resume = resume, .env = {"LD_PRELOAD=" MT_FAULTS_PATH, counts}};
  set_run(resume ? "first" : "");
  start(&r);
  if (r.status != 0) fail_msg("with the faults' library but no fault: %d: %s", r.status, r.err);
  char *text = slurp(at_home("counts"), &size);
  long *n = counted[resume];
  if (!text || sscanf(text, "%ld %ld", &n[0], &n[1]) != 2) fail_msg("no counts");
  free(text);
  if (n[0] < 1000 || n[1] < 100) fail_msg("%ld allocations, %ld file calls", n[0], n[1]);
  same_end("no fault");
}

/* That a leak would be seen, with the library preloaded as it is. */
static void check_leak_is_seen(void) {
  struct faults_run r = {.env = {"LD_PRELOAD=" MT_FAULTS_PATH, "FAULTS_LEAK=1"}};
  if (!SANITIZED) return;
  set_run("");
  start(&r);
  if (r.status != 99 || !strstr(r.err, "LeakSanitizer")) BAD("a leak gives %d", r.status);
}

static void one(const struct sweep *s, long n) {
  char what[128], number[64], kind[32];
  snprintf(number, sizeof number, "%s=%ld", s->variable, n);
  snprintf(kind, sizeof kind, "FAULTS_KIND=%s", s->kind);
  snprintf(what, sizeof what, "%s %ld%s, %s", s->what, n, s->sticky ? " and later" : "",
           s->resume ? "resumed" : "afresh");
  struct faults_run r = {.resume = s->resume,
                         .env = {"LD_PRELOAD=" MT_FAULTS_PATH, number, kind,
                                 s->sticky ? "FAULTS_STICKY=1" : "FAULTS_STICKY=0"}};
  bool killed = strcmp(s->kind, "kill") == 0 || strcmp(s->kind, "torn") == 0;
  set_run(s->resume ? "first" : "");
  start(&r);
  if (killed) {
    if (r.status != 0 && r.status != 128 + SIGKILL) BAD("%s: status %d", what, r.status);
  } else {
    check_end(what, &r);
  }
  if (s->resume && newest() < 2) BAD("%s: the checkpoint is gone", what);
  /* A run that says so goes on without samples; the history of them is then another. */
  if (r.status == 0 && strstr(r.err, "no samples: ")) return;
  if (r.status == 0) same_end(what);
  if (strcmp(s->kind, "short") == 0 && r.status != 0) BAD("%s: status %d", what, r.status);
  /* Without memory no directory can be read, so none removed: the next run does it. */
  bool blind = s->sticky || strstr(r.err, "cannot open directory");
  if (strcmp(s->kind, "") == 0 && !blind) left_over(what, "run");
  recover(what);
}

int main(int argc, char **argv) {
  static const struct sweep sweeps[] = {
      {"allocation", "FAULTS_MEMORY", "", false, true, 80},
      {"allocation", "FAULTS_MEMORY", "", false, false, 30},
      {"allocation", "FAULTS_MEMORY", "", true, true, 30},
      {"no space at call", "FAULTS_FILE", "space", true, true, 40},
      {"no space at call", "FAULTS_FILE", "space", false, true, 20},
      {"failing call", "FAULTS_FILE", "io", false, true, 40},
      {"failing call", "FAULTS_FILE", "io", false, false, 30},
      {"read-only at call", "FAULTS_FILE", "readonly", true, true, 20},
      {"short call", "FAULTS_FILE", "short", false, true, 20},
      {"killed at call", "FAULTS_FILE", "kill", false, true, 40},
      {"killed in call", "FAULTS_FILE", "torn", false, true, 40},
      {"slow", "FAULTS_FILE", "slow", false, true, 1},
  };
  long given = argc > 1 ? atol(argv[1]) : 0;
  struct mt_backend planned;
  bool with_cuda = mt_backend_cuda_plan(&planned, false) == MT_OK;
  set_up();
  count_calls(false);
  count_calls(true);
  check_leak_is_seen();
  for (size_t i = 0; i < sizeof sweeps / sizeof *sweeps; i++) {
    const struct sweep *s = &sweeps[i];
    if (argc > 2 && !strstr(s->what, argv[2])) continue;
    /* NVIDIA's static run-time registers kernels before main() and crashes where it gets no memory;
     * builds without CUDA show what is ours. */
    if (with_cuda && strcmp(s->variable, "FAULTS_MEMORY") == 0) {
      printf("%s: left out, this build has CUDA\n", s->what);
      continue;
    }
    long total = counted[s->resume][strcmp(s->variable, "FAULTS_FILE") == 0];
    long most = SANITIZED ? (s->most + 3) / 4 : s->most;
    long stride = given > 0 ? given : (total + most - 1) / most, runs = 0;
    if (strcmp(s->kind, "slow") == 0) stride = total;
    double begin = now_s();
    int before = failures;
    for (long n = 1 + stride / 2; n <= total && failures < 100; n += stride, runs++) one(s, n);
    printf("%s (%s%s): %ld of %ld, stride %ld, %d failures, %.1f s\n", s->what,
           s->resume ? "resumed" : "afresh", s->sticky ? ", and all later" : "", runs, total,
           stride, failures - before, now_s() - begin);
    fflush(stdout);
  }
  if (failures == 0) tear_down();
  return failures != 0;
}
