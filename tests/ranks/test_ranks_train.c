/* Training on many ranks as users start it, against one: losses, loads and parameters; the same
 * bits twice; checkpoints that go on elsewhere; what does not go together is refused. */
#include "ranks/run.h"

#define RUN TRAIN "--train-steps 5 --eval-data @/data.jsonl --sample-tokens 3 --samples 1 "

static void train(int ranks, const char *out, const char *args) {
  char all[4096];
  snprintf(all, sizeof all, "%s %s --out @/%s", RUN, args, out);
  struct start s = {.ranks = ranks, .args = all};
  start_well(&s);
  nothing_left(out);
}

static const char *file(const char *out, const char *name) {
  char path[512];
  snprintf(path, sizeof path, "%.100s/%.400s", out, name);
  return at_home(path);
}

/* Each step's line of metrics has what the stages waited. */
static void waits_are_told(int stages) {
  char *text;
  size_t size;
  OK(mt_file_read(file("many", "metrics.jsonl"), 1 << 20, &text, &size));
  const char *at = text;
  for (int step = 0; step < 6; step++) {
    at = strstr(at, "\"bubble\":");
    if (!at) fail_msg("no bubble of step %d: %s", step + 1, text);
    double share = strtod(at + strlen("\"bubble\":"), NULL);
    assert_true(share > 0 && share < 1);
    at = strstr(at, "\"stage_wait_ms\":[");
    assert_non_null(at);
    int commas = 0;
    for (; *at != ']'; at++) commas += *at == ',';
    assert_int_equal(commas, stages - 1);
  }
  free(text);
}

/* 24 samples a step everywhere: two epochs and a bit. */
static void equals_one_rank(void **state) {
  (void)state;
  static const struct {
    int ranks;
    const char *args;
  } meshes[] = {{1, "--batch-size 24"},
                {2, "--batch-size 12 --ep-size 2"},
                {2, "--batch-size 12"},
                {3, "--batch-size 8"},
                {4, "--batch-size 6 --ep-size 2"},
                {4, "--batch-size 6 --ep-size 4 --ep-chunks 2 --improvement 1"},
                {6, "--batch-size 4 --ep-size 2"},
                {8, "--batch-size 3 --ep-size 4 --ep-chunks 3"},
                {2, "--batch-size 24 --pp-size 2"},
                {4, "--batch-size 12 --pp-size 2 --improvement 0"},
                {4, "--batch-size 12 --pp-size 2 --ep-size 2 --ep-chunks 4 --recompute full"},
                {8, "--batch-size 6 --pp-size 2 --ep-size 2"},
                {2, "--batch-size 24 --pp-size 2 --freeze *layers.0.* --freeze *embed*"},
                {3, "--batch-size 8 --zero 2"},
                {8, "--batch-size 3 --ep-size 2 --zero 2"},
                {8, "--batch-size 6 --pp-size 2 --ep-size 2 --zero 2"},
                {4, "--batch-size 12 --pp-size 2 --freeze *layers.0.* --freeze *embed* --zero 2"},
                {4, "--batch-size 6 --freeze *layers.0.* --freeze *embed* --zero 2"},
                {2, "--batch-size 6 --grad-accum 2 --ep-size 2 --router-aux-coef 0"},
                {4, "--batch-size 3 --grad-accum 2 --ep-size 2 --router-aux-coef 0 --zero 2"},
                {4, "--batch-size 4 --micro-batches 3 --pp-size 2 --router-aux-coef 0 --zero 2"},
                {2, "--batch-size 4 --micro-batches 6 --pp-size 2 --router-aux-coef 0"},
                {4, "--batch-size 4 --micro-batches 3 --pp-size 2 --router-aux-coef 0"}};
  train(0, "one", "--batch-size 24");
  train(0, "one-without", "--batch-size 24 --router-aux-coef 0");
  train(0, "one-frozen", "--batch-size 24 --freeze *layers.0.* --freeze *embed*");
  for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
    /* Ranks are more than cores, and what a sanitizer looks for shows on four as well. */
    if (SANITIZED && meshes[i].ranks > 4) continue;
    const char *one = strstr(meshes[i].args, "aux-coef") ? "one-without" : "one";
    if (strstr(meshes[i].args, "freeze")) one = "one-frozen";
    train(meshes[i].ranks, "many", meshes[i].args);
    if (!strstr(meshes[i].args, "accum 2") && !strstr(meshes[i].args, "micro"))
      same_metrics(file("many", "metrics.jsonl"), file(one, "metrics.jsonl"), 2e-5);
    if (strstr(meshes[i].args, "pp-size")) waits_are_told(2);
    double off = apart(file("many", "model/model.safetensors"),
                       file(one, "model/model.safetensors"), at_home("model/model.safetensors"));
    if (!(off <= 1e-4))
      fail_msg("%d ranks, %s: %.2g of what moved", meshes[i].ranks, meshes[i].args, off);
  }
}

static void same_bits_twice(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++)
    train(4, i ? "again" : "once", "--batch-size 3 --ep-size 2 --ep-chunks 3 --save-every 6");
  same_tensors(file("once", "checkpoint-6/moetune-state.safetensors"),
               file("again", "checkpoint-6/moetune-state.safetensors"));
  same_metrics(file("once", "metrics.jsonl"), file("again", "metrics.jsonl"), 0);
}

/* Saved on one mesh, taken up on another: to save it again there at once, and to go on. */
static void goes_on_elsewhere(void **state) {
  (void)state;
  static const struct {
    int ranks;
    const char *args;
  } meshes[] = {{0, "--batch-size 12"},
                {2, "--batch-size 6 --ep-size 2"},
                {2, "--batch-size 6"},
                {4, "--batch-size 3 --ep-size 4"},
                {2, "--batch-size 12 --pp-size 2"},
                {4, "--batch-size 6 --pp-size 2 --ep-size 2"},
                {4, "--batch-size 3 --zero 2"},
                {3, "--batch-size 4 --zero 2"},
                {4, "--batch-size 6 --pp-size 2 --zero 2"},
                {4, "--batch-size 3 --ep-size 2 --zero 2"},
                {4, "--batch-size 3 --ep-size 2"}};
  char args[512], command[4 * MT_PATH_MAX];
  train(4, "from", "--batch-size 3 --ep-size 2 --save-every 3 --keep-best --eval-every 3");
  for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
    snprintf(args, sizeof args, "%s --train-steps 2 --save-every 3 --resume @/from/checkpoint-3",
             meshes[i].args);
    train(meshes[i].ranks, "here", args);
    same_tensors(file("here", "checkpoint-3/moetune-state.safetensors"),
                 file("from", "checkpoint-3/moetune-state.safetensors"));
    same_tensors(file("here", "model/model.safetensors"),
                 file("from", "checkpoint-3/model.safetensors"));
    snprintf(command, sizeof command, "cp -r '%s'/from/metrics.jsonl '%s'/here/", home, home);
    assert_int_equal(system(command), 0);
    snprintf(args, sizeof args, "%s --save-every 3 --eval-every 3 --resume @/from/checkpoint-3",
             meshes[i].args);
    train(meshes[i].ranks, "here", args);
    bool same = i + 2 >= sizeof meshes / sizeof *meshes;
    same_metrics(file("here", "metrics.jsonl"), file("from", "metrics.jsonl"), same ? 0 : 2e-5);
    if (same) {
      same_tensors(file("here", "checkpoint-6/moetune-state.safetensors"),
                   file("from", "checkpoint-6/moetune-state.safetensors"));
    }
    OK(mt_dir_remove(at_home("here")));
  }
}

/* From stages to as many readers without: another number of ranks, whose micro-batches may be
 * others. On as many they may not. */
static void goes_on_without_stages(void **state) {
  (void)state;
  train(4, "from",
        "--pp-size 2 --batch-size 4 --micro-batches 3 --router-aux-coef 0 --save-every 3");
  train(2, "here",
        "--batch-size 12 --router-aux-coef 0 --save-every 3 --resume @/from/checkpoint-3");
  const char *files[] = {"here", "from"};
  char *last[2];
  size_t size;
  for (int i = 0; i < 2; i++) {
    char *text;
    OK(mt_file_read(file(files[i], "metrics.jsonl"), 1 << 20, &text, &size));
    last[i] = strstr(text, "{\"step\":6");
    assert_non_null(last[i]);
    last[i] = strdup(strstr(last[i], "\"loss\":") + 7);
    free(text);
  }
  double got = strtod(last[0], NULL), want = strtod(last[1], NULL);
  if (!(fabs(got - want) <= 2e-5 * want)) fail_msg("loss %.9g, not %.9g", got, want);
  free(last[0]), free(last[1]);
  struct start s = {.ranks = 4,
                    .args = RUN "--pp-size 2 --batch-size 12 --router-aux-coef 0 --out @/never "
                                "--resume @/from/checkpoint-3"};
  start(&s);
  if (s.status <= 0 || !strstr(s.out, "another --batch-size"))
    fail_msg("status %d: %s", s.status, s.out);
  /* A fresh run where there are checkpoints says what they could be taken for. */
  s = (struct start){.ranks = 2, .args = RUN "--batch-size 12 --out @/here"};
  start_well(&s);
  if (!strstr(s.out, "holds checkpoint-6 of an earlier run")) fail_msg("%s", s.out);
  OK(mt_dir_remove(at_home("here")));
}

/* Cut over the ranks or not: the same bits, in checkpoints too, and from one to the other. */
static void sharded_state_is_the_same(void **state) {
  (void)state;
  static const char *const recipes[] = {"fp32", "bf16", "bf16 --optim-state bf16",
                                        "fp8 --fp8-skip attn",
                                        "fp8 --fp8-skip attn --optim-state bf16"};
  char args[512];
  for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++) {
    static const char *const outs[] = {"whole", "cut", "cut-too"};
    for (int zero = 0; zero < 3; zero++) {
      snprintf(args, sizeof args,
               "--batch-size 3 --ep-size 2 --save-every 3 --keep-best --zero %d --precision %s",
               zero, recipes[i]);
      train(4, outs[zero], args);
    }
    static const char *const files[] = {"checkpoint-3/moetune-state.safetensors",
                                        "checkpoint-6/moetune-state.safetensors",
                                        "checkpoint-6/model.safetensors", "best/model.safetensors"};
    for (int zero = 1; zero < 3; zero++) {
      for (size_t f = 0; f < sizeof files / sizeof *files; f++)
        same_tensors(file(outs[zero], files[f]), file("whole", files[f]));
      same_metrics(file(outs[zero], "metrics.jsonl"), file("whole", "metrics.jsonl"), 0);
    }
    /* Saved cut, taken up whole, and the other way round. */
    for (int zero = 0; zero < 3; zero++) {
      snprintf(args, sizeof args,
               "--batch-size 3 --ep-size 2 --save-every 3 --zero %d --precision %s --resume "
               "@/%s/checkpoint-3",
               zero, recipes[i], outs[(zero + 1) % 3]);
      train(4, "here", args);
      same_tensors(file("here", files[1]), file("whole", files[1]));
      OK(mt_dir_remove(at_home("here")));
    }
  }
}

static size_t planned(const char *out, const char *what) {
  const char *at = strstr(out, what);
  return at ? strtoull(at + strlen(what), NULL, 10) : 0;
}

/* What --dry-run and inspect say of memory is what a run takes, and a cut state is so much less. */
static void memory_is_as_planned(void **state) {
  (void)state;
  char args[1024], *text;
  size_t size, state_bytes[3];
  for (int zero = 0; zero < 3; zero++) {
    snprintf(args, sizeof args, "--batch-size 3 --ep-size 2 --zero %d", zero);
    train(4, "run", args);
    OK(mt_file_read(file("run", "run.json"), 1 << 20, &text, &size));
    size_t got = planned(strstr(text, "\"memory_bytes\""), "\"optimizer\": ");
    snprintf(args, sizeof args, "%s --batch-size 3 --ep-size 2 --zero %d --out @/none --dry-run",
             RUN, zero);
    struct start s = {.ranks = 4, .args = args}, t;
    start_well(&s);
    assert_int_equal(planned(s.out, "\noptimizer "), got);
    assert_int_equal(planned(s.out, "\nparameters "),
                     planned(strstr(text, "\"memory_bytes\""), "\"parameters\": "));
    /* Rank 0's line of the mesh ends in the sum of what follows. */
    const char *line = strstr(s.out, "\n     0 "), *end = line ? strchr(line + 1, '\n') : NULL;
    assert_non_null(end);
    while (end[-1] != ' ') end--;
    assert_int_equal(strtoull(end, NULL, 10), planned(s.out, "\narenas "));
    size_t gradients = planned(strstr(text, "\"memory_bytes\""), "\"gradients\": ");
    assert_true(gradients > 0);
    assert_int_equal(planned(s.out, "\ngradients "), gradients);
    snprintf(args, sizeof args,
             "inspect --model @/model --train --mesh 4 --ep-size 2 --zero %d --batch-size 3 "
             "--max-seq-length 32 --router-aux-coef 0.1 --threads 1",
             zero);
    t = (struct start){.args = args};
    start_well(&t);
    assert_int_equal(planned(t.out, "\noptimizer "), got);
    state_bytes[zero] = got;
    free(text);
  }
  /* Nothing is written, also where a run has been. */
  struct start dry = {.args = RUN "--report --out @/run --dry-run"};
  start_well(&dry);
  assert_true(mt_path_exists(file("run", "run.json")));
  assert_false(mt_path_exists(file("run", "report.html")));
  /* Dense parts are a fourth each, experts' a half. */
  assert_true(state_bytes[1] * 2 < state_bytes[0] + 4096 && state_bytes[1] * 4 > state_bytes[0]);
  assert_int_equal(state_bytes[2], state_bytes[1]);
}

static void refused(struct start *s, const char *why) {
  start(s);
  if (s->status <= 0 || !strstr(s->out, why))
    fail_msg("status %d, not '%s': %s", s->status, why, s->out);
  const char *told = strstr(s->out, "moetune: error");
  if (told && strstr(told + 1, "moetune: error")) fail_msg("told twice: %s", s->out);
}

static void differences_are_refused(void **state) {
  (void)state;
  static const char base[] = RUN "--batch-size 3 --out @/never";
  char data[MT_PATH_MAX];
  refused(&(struct start){.ranks = 2,
                          .args = base,
                          .other = RUN "--batch-size 3 --out @/never --seed 4"},
          "rank 1: another command than rank 0: '--seed 4', there '--seed 1'");
  refused(&(struct start){.ranks = 3, .args = RUN "--out @/never --ep-size 3"},
          "--ep-size 3 does not divide the model's 4 experts");
  refused(&(struct start){.ranks = 3, .args = RUN "--out @/never --ep-size 2"},
          "3 ranks cannot be cut into --ep-size 2");
  refused(&(struct start){.ranks = 0, .args = RUN "--out @/never --ep-size 2"}, "mpirun -n 2");
  refused(&(struct start){.ranks = 4, .args = RUN "--out @/never --zero 3"},
          "error: --zero: 3 is out of range");
  refused(&(struct start){.ranks = 3, .args = base, .other = RUN "--out @/never --zerro 1"},
          "error: rank 2: unknown option '--zerro'");
  refused(&(struct start){.ranks = 2,
                          .args = RUN "--batch-size 3 --ep-size 2 --out @/never --train-steps 1 "
                                      "--resume @/from/checkpoint-3"},
          "checkpoint-3 is of step 3, the run would end after 2");
  refused(&(struct start){.ranks = 4,
                          .args = "eval --model @/model --data @/none.jsonl --no-cache "
                                  "--chat-template mistral"},
          "none.jsonl");
  /* Working directories differ, so that one path names two files. */
  snprintf(data, sizeof data, "cd '%s' && mkdir other && head -50 data.jsonl >other/data.jsonl",
           home);
  assert_int_equal(system(data), 0);
  assert_int_equal(chdir(home), 0);
  char command[4 * MT_PATH_MAX], *text;
  size_t size;
  const char *one = MT_CLI_PATH " eval --model ../model --data data.jsonl --no-cache "
                                "--chat-template mistral";
  snprintf(command, sizeof command,
           MT_MPIEXEC " --allow-run-as-root --oversubscribe -n 1 --wdir '%s/seed' %s : "
                      "-n 1 --wdir '%s/other' %s >two 2>&1",
           home, one, home, one);
  assert_int_equal(system("cp data.jsonl seed/"), 0);
  assert_int_not_equal(system(command), 0);
  OK(mt_file_read(at_home("two"), 1 << 16, &text, &size));
  if (!strstr(text, "another data file than rank 0")) fail_msg("%s", text);
  free(text);
  /* So do checkpoints of one name, of two steps, on disks of two hosts. */
  one = MT_CLI_PATH " eval --model ck --data data.jsonl --no-cache --chat-template mistral";
  snprintf(command, sizeof command,
           "cp -r from/checkpoint-3 seed/ck && cp -r from/checkpoint-6 other/ck && " MT_MPIEXEC
           " --allow-run-as-root --oversubscribe -n 1 --wdir '%s/seed' %s : "
           "-n 1 --wdir '%s/other' %s >two 2>&1",
           home, one, home, one);
  assert_int_not_equal(system(command), 0);
  OK(mt_file_read(at_home("two"), 1 << 16, &text, &size));
  if (!strstr(text, "rank 1: another model than rank 0: 'moetune-checksums.json"))
    fail_msg("%s", text);
  free(text);
}

/* Ranks that may run on the same cores share them: with as many threads as cores each, a step takes
 * many times as long. */
static void ranks_share_the_cores(void **state) {
  (void)state;
  cpu_set_t mine;
  char threads[64];
  assert_int_equal(sched_getaffinity(0, sizeof mine, &mine), 0);
  int cores = CPU_COUNT(&mine);
  for (int ranks = 0; ranks < 4; ranks += 2) {
    struct start s = {.ranks = ranks, .args = RUN "--threads 0 --train-steps 1 --out @/cores"};
    start_well(&s);
    snprintf(threads, sizeof threads, "cpu, %d threads",
             ranks == 0       ? cores
             : cores >= ranks ? cores / ranks
                              : 1);
    if (!strstr(s.out, threads)) fail_msg("%d ranks, not '%s': %s", ranks, threads, s.out);
    OK(mt_dir_remove(at_home("cores")));
  }
}

/* eval and generate say the same on any mesh. */
static void answers_are_the_same(void **state) {
  (void)state;
  static const char eval[] = "eval --model @/model --data @/data.jsonl --cache-dir @/cache "
                             "--chat-template mistral --threads 1 --json --batch-size ";
  static const char say[] = "generate --model @/model --prompt q3 --max-new-tokens 8 --seed 3 "
                            "--threads 1";
  char args[1024], loads[4096];
  double loss = 0;
  struct start s = {.args = say}, t;
  start_well(&s);
  static const struct {
    int ranks, ep, pp;
  } meshes[] = {{0, 1, 1}, {1, 1, 1}, {2, 2, 1}, {3, 1, 1}, {4, 4, 1}, {2, 1, 2}, {4, 2, 2}};
  for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
    int n = meshes[i].ranks, ep = meshes[i].ep, pp = meshes[i].pp;
    snprintf(args, sizeof args, "%s%d --ep-size %d --pp-size %d", eval, n == 3 ? 1 : 7, ep, pp);
    t = (struct start){.ranks = n, .args = args};
    start_well(&t);
    const char *load = strstr(t.out, "\"expert_load\""), *at = strstr(t.out, "\"loss\": ");
    assert_true(load && at);
    double got = strtod(at + 8, NULL);
    if (n == 0) loss = got, snprintf(loads, sizeof loads, "%s", load);
    if (fabs(got - loss) > 1e-6 * loss) fail_msg("%d ranks: loss %.9g, not %.9g", n, got, loss);
    if (strcmp(load, loads) != 0) fail_msg("%d ranks: %s, not %s", n, load, loads);
    snprintf(args, sizeof args, "%s --ep-size %d --pp-size %d", say, ep, pp);
    t = (struct start){.ranks = n, .args = args};
    start_well(&t);
    assert_string_equal(t.out, s.out);
  }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(equals_one_rank),           cmocka_unit_test(same_bits_twice),
    cmocka_unit_test(goes_on_elsewhere),         cmocka_unit_test(goes_on_without_stages),
    cmocka_unit_test(sharded_state_is_the_same), cmocka_unit_test(memory_is_as_planned),
    cmocka_unit_test(ranks_share_the_cores),     cmocka_unit_test(differences_are_refused),
    cmocka_unit_test(answers_are_the_same)};
int main(void) {
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
