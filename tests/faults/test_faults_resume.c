/* A run that is saved and resumed after every step ends bit for bit as one that never was, in
 * float32 and in bfloat16 with stochastic rounding.
 *   test_faults_resume [CYCLES] */
#include "run.h"

static void cycle(int cycles, const char *what, const char *precision, const char *states) {
  struct faults_run r = {
      .every = "1",
      .steps = cycles + 1,
      .args = {"--precision", precision, "--optim-state", states, "--no-report"}};
  char command[2 * MT_PATH_MAX];
  double begin = now_s();
  int before = failures;
  set_run("");
  start(&r);
  if (r.status != 0) fail_msg("undisturbed: %d: %s", r.status, r.err);
  snprintf(command, sizeof command, "cd '%s' && rm -rf long && mv run long", home);
  shell(command);
  for (r.steps = 1; r.steps <= cycles + 1; r.steps++) {
    r.resume = r.steps > 1;
    start(&r);
    if (r.status != 0) {
      BAD("%s: step %d: status %d: %s", what, r.steps, r.status, r.err);
      return;
    }
  }
  same_as(what, "long", cycles + 1);
  left_over(what, "run");
  printf("%s: resumed %d times, %d failures, %.1f s\n", what, cycles, failures - before,
         now_s() - begin);
}

int main(int argc, char **argv) {
  int cycles = argc > 1 ? atoi(argv[1]) : SANITIZED ? 10 : 100;
  set_up();
  cycle(cycles, "fp32", "fp32", "fp32");
  cycle(cycles / 5 + 1, "bf16, bf16 states", "bf16", "bf16");
  if (failures == 0) tear_down();
  return failures != 0;
}
