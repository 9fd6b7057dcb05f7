/* A rank that is killed or hangs in each phase: all end with a status in time, what hangs is named,
 * nothing is left behind, and the run goes on bit for bit. Signals end all after the same step. */
#include "ranks/run.h"

enum { STEPS = 6 };
#define RUN                                                                                        \
  TRAIN "--train-steps 5 --batch-size 4 --ep-size 2 --save-every 2 --comm-timeout 2 --keep-last "  \
        "2 "
#define PRELOAD "LD_PRELOAD=" MT_KILL_PATH

/* Calls of all_to_all in a step with 2 layers: 4 a layer forward, 3 back; and the sums of dense
 * gradients, of both layers, embedding, last norm and head, the last of which ends the step. */
enum { FORWARD = 8, BACKWARD = 6, SUMS = 5, A_STEP = FORWARD + BACKWARD + SUMS };

static void begin_run(const char *out) {
  char args[2048];
  snprintf(args, sizeof args, RUN "--out @/%s", out);
  char env[MT_PATH_MAX * 2];
  snprintf(env, sizeof env, PRELOAD " RANKS_COUNT=%s", home);
  struct start s = {.ranks = 2, .args = args, .env = env};
  start_well(&s);
}

static long counted(int rank, const char *call) {
  char name[32], *text;
  size_t size;
  snprintf(name, sizeof name, "count-%d", rank);
  OK(mt_file_read(at_home(name), 4096, &text, &size));
  const char *at = strstr(text, call);
  assert_non_null(at);
  long n = strtol(at + strlen(call), NULL, 10);
  free(text);
  return n;
}

/* After that: the run is taken up, or begun anew, and ends as the one that was let be. */
static void recover(const char *what) {
  bool any = mt_path_is_dir(at_home("run/checkpoint-2")) ||
             mt_path_is_dir(at_home("run/checkpoint-4")) ||
             mt_path_is_dir(at_home("run/checkpoint-6"));
  struct start s = {.ranks = 2, .args = any ? RUN "--out @/run --resume" : RUN "--out @/run"};
  start(&s);
  if (s.status != 0) fail_msg("%s: going on gives %d: %s", what, s.status, s.out);
  same_tensors(at_home("run/checkpoint-6/moetune-state.safetensors"),
               at_home("whole/checkpoint-6/moetune-state.safetensors"));
  same_tensors(at_home("run/model/model.safetensors"), at_home("whole/model/model.safetensors"));
  same_metrics(at_home("run/metrics.jsonl"), at_home("whole/metrics.jsonl"), 0);
  nothing_left("run");
}

static void disturb(const char *what, int rank, const char *call, long n, const char *how,
                    struct start *s) {
  char env[MT_PATH_MAX * 2];
  OK(mt_dir_remove(at_home("run")));
  snprintf(env, sizeof env, PRELOAD " RANKS_KILL=%d,%s,%ld,%s", rank, call, n, how);
  *s = (struct start){.ranks = 2, .args = RUN "--out @/run", .env = env, .limit_s = 30};
  start(s);
  if (s->status == 0 || s->status == -1) fail_msg("%s: status %d: %s", what, s->status, s->out);
  no_process_left();
}

static void killed_in_each_phase(void **state) {
  (void)state;
  begin_run("whole");
  /* The numbers below mean what they say as long as this holds. */
  assert_int_equal(counted(0, "MPI_Ialltoallv"), STEPS * A_STEP);
  const struct {
    const char *what;
    int rank;
    const char *call;
    long n;
  } kills[] = {{"dispatch", 1, "MPI_Ialltoallv", 4 * A_STEP + 2},
               {"backward", 0, "MPI_Ialltoallv", 4 * A_STEP + FORWARD + SUMS},
               {"sync", 1, "MPI_Ialltoallv", 3 * A_STEP},
               {"handing over", 1, "MPI_Isend", counted(1, "MPI_Isend") / 2},
               {"checkpoint write", 0, "fsync", counted(0, "fsync") / 2},
               {"checkpoint's end", 0, "fsync", counted(0, "fsync") / 2 + 3}};
  for (size_t i = 0; i < sizeof kills / sizeof *kills; i++) {
    struct start s;
    disturb(kills[i].what, kills[i].rank, kills[i].call, kills[i].n, "KILL", &s);
    recover(kills[i].what);
  }
}

/* Who is stopped answers nobody, and the others say so. */
static void what_hangs_is_named(void **state) {
  (void)state;
  struct start s;
  disturb("a hanging dispatch", 1, "MPI_Ialltoallv", 4 * A_STEP + 2, "STOP", &s);
  if (!strstr(s.out, "rank 0: step 5: expert group") || !strstr(s.out, "rank 1 does not answer"))
    fail_msg("%s", s.out);
  recover("a hanging dispatch");
}

static void told_once(const struct start *s) {
  const char *first = strstr(s->out, "moetune: error: ");
  if (!first || strncmp(first, "moetune: error: rank 0: ", 24) != 0 ||
      strstr(first + 1, "moetune: error: "))
    fail_msg("status %d: %s", s->status, s->out);
}

/* What one rank alone cannot do ends all, told once; nothing of it is left. */
static void one_ranks_error_ends_all(void **state) {
  (void)state;
  struct start s = {.ranks = 2, .args = RUN "--out /proc/none"};
  start(&s);
  told_once(&s);
  if (s.status <= 0 || !strstr(s.out, "/proc/none")) fail_msg("status %d: %s", s.status, s.out);
  disturb("a full disk", 0, "fsync", counted(0, "fsync") / 2, "FAIL", &s);
  told_once(&s);
  nothing_left("run");
  recover("a full disk");
}

/* Who cannot write a model that may take its time does not wait for that time: the others, who
 * still hand over, would never come. */
static void who_cannot_write_says_so_soon(void **state) {
  (void)state;
  char command[8 * MT_PATH_MAX];
  snprintf(command, sizeof command,
           "cp -r '%s/seed' '%s/large-seed' && sed -i 's/_layers\":2/_layers\":6/; "
           "s/_experts\":4/_experts\":16/; s/iate_size\":32/iate_size\":4096/' "
           "'%s/large-seed/config.json'",
           home, home, home);
  assert_int_equal(system(command), 0);
  struct start s = {.args = "convert --init @/large-seed --out @/large --seed 1 --dtype bf16"};
  start_well(&s);
  s = (struct start){.ranks = 2,
                     .args = RUN "--model @/large --train-steps 1 --save-every 1 --samples 0 "
                                 "--out @/run",
                     .env = PRELOAD " RANKS_KILL=0,fsync,6,FAIL"};
  start(&s);
  told_once(&s);
  if (s.status <= 0 || !strstr(s.out, "/checkpoint-1.tmp-"))
    fail_msg("status %d: %s", s.status, s.out);
  /* 14.4 s are what 18.9 M elements may take; the time-out is 2 s, and as long all are asked. */
  if (s.took_s > 14) fail_msg("%.1f s until %s", s.took_s, s.out);
  no_process_left();
  OK(mt_dir_remove(at_home("large")));
  OK(mt_dir_remove(at_home("run")));
}

/* A call that fails on one rank in backward, with sums under way: who and what is told, and the
 * others do not wait for their time-out's end. */
static void one_ranks_call_ends_all(void **state) {
  (void)state;
  struct start s;
  disturb("a call that fails", 1, "MPI_Ialltoallv", 3 * A_STEP + FORWARD + SUMS, "FAIL", &s);
  if (!strstr(s.out, "moetune: error: rank 1: ") || !strstr(s.out, "all_to_all") ||
      strstr(s.out, "Sanitizer"))
    fail_msg("status %d: %s", s.status, s.out);
  recover("a call that fails");
}

/* Reading all of a checkpoint may take one rank longer than the time-out. */
static void checksums_are_waited_for(void **state) {
  (void)state;
  struct start s = {.ranks = 2,
                    .args = "eval --model @/whole/model --verify --data @/data.jsonl --cache-dir "
                            "@/cache --chat-template mistral --max-seq-length 32 --threads 1 "
                            "--comm-timeout 2",
                    .env = PRELOAD " RANKS_SLOW=1,model.safetensors"};
  start_well(&s);
  assert_true(s.took_s > 5);
}

/* A signal to any rank, or one that the launcher hands on, ends all after the same step. */
static void a_signal_stops_all(void **state) {
  (void)state;
  OK(mt_dir_remove(at_home("run")));
  struct start s = {.ranks = 2,
                    .args = RUN "--out @/run --train-steps 30000",
                    .signal = SIGUSR1,
                    .when = "step 4/",
                    .limit_s = 60};
  start(&s);
  if (s.status != 0 || !strstr(s.out, "stopped by signal") || !strstr(s.out, "go on with --resume"))
    fail_msg("status %d: %s", s.status, s.out);
  nothing_left("run");
  no_process_left();
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(killed_in_each_phase),
                                          cmocka_unit_test(what_hangs_is_named),
                                          cmocka_unit_test(one_ranks_error_ends_all),
                                          cmocka_unit_test(one_ranks_call_ends_all),
                                          cmocka_unit_test(who_cannot_write_says_so_soon),
                                          cmocka_unit_test(checksums_are_waited_for),
                                          cmocka_unit_test(a_signal_stops_all)};
int main(void) {
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
