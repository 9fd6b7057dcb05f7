/* A small model and data, the program started on them with faults or signals, and what must hold
 * afterwards. */
#ifndef MT_TESTS_FAULTS_RUN_H
#define MT_TESTS_FAULTS_RUN_H

#include "temp_dir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

enum { FINAL_STEP = 6, TEXT_BYTES = 1 << 16 };
enum { LIMIT_S = SANITIZED ? 120 : 30 };

/* Of one start of the program. */
struct faults_run {
  bool resume;
  int steps;            /* 0: FINAL_STEP */
  const char *every;    /* steps between saves and evaluations; NULL: 2 */
  const char *args[8];  /* more arguments, ended by NULL */
  const char *env[8];   /* NAME=VALUE more, ended by NULL */
  int signal;           /* 0: none; sent after this time, once the program has said something */
  double after_s;       /* of its start */
  int status;           /* exit status; 128 + signal; -1: it hung */
  char err[TEXT_BYTES]; /* standard error */
};

/* The directory that holds all: model, data.jsonl, run, first (a run stopped after its first
 * checkpoint), whole (one that was never disturbed). */
static char home[MT_PATH_MAX - 512];
static int failures;

#define BAD(...) (failures++, fprintf(stderr, "FAILED: " __VA_ARGS__), fputc('\n', stderr))

static inline const char *at_home(const char *name) {
  static char path[4][MT_PATH_MAX];
  static int next;
  char *p = path[next++ % 4];
  snprintf(p, MT_PATH_MAX, "%s/%s", home, name);
  return p;
}

static inline double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline char *slurp(const char *path, size_t *size) {
  char *text = NULL;
  *size = 0;
  if (mt_file_read(path, (size_t)1 << 28, &text, size)) return NULL;
  return text;
}

static inline void shell(const char *command) {
  if (system(command) != 0) fail_msg("%s", command);
}

/* run/ and the cache anew: "" or a copy of home/template. */
static inline void set_run(const char *template) {
  char command[4 * MT_PATH_MAX];
  int n = snprintf(command, sizeof command, "cd '%s' && rm -rf run cache", home);
  if (*template) snprintf(command + n, sizeof command - (size_t)n, " && cp -a '%s' run", template);
  shell(command);
}

/* Waits for the end, sends the signal when its time has come. */
static inline int supervise(const struct faults_run *r, pid_t pid, const char *err_path) {
  double begin = now_s();
  bool sent = r->signal == 0;
  for (;;) {
    int status;
    struct stat st;
    double passed = now_s() - begin;
    if (waitpid(pid, &status, WNOHANG) == pid)
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (passed > LIMIT_S) {
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      return -1;
    }
    bool spoke = r->signal == SIGKILL || (stat(err_path, &st) == 0 && st.st_size > 0);
    if (!sent && spoke && passed >= r->after_s) {
      kill(pid, r->signal);
      sent = true;
    }
    nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
  }
}

/* Starts `moetune train` on home/run. */
static inline void start(struct faults_run *r) {
  char steps[16], dir[MT_PATH_MAX + 16];
  const char *env[64];
  int env_count = 0;
  size_t size;
  snprintf(steps, sizeof steps, "%d", r->steps ? r->steps : FINAL_STEP);
  snprintf(dir, sizeof dir, "FAULTS_DIR=%s", home);
  const char *every = r->every ? r->every : "2";
  const char *argv[64] = {MT_CLI_PATH,
                          "train",
                          "--model",
                          at_home("model"),
                          "--data",
                          at_home("data.jsonl"),
                          "--eval-data",
                          at_home("data.jsonl"),
                          "--out",
                          "",
                          "--cache-dir",
                          "",
                          "--chat-template",
                          "mistral",
                          "--train-steps",
                          steps,
                          "--warmup-steps",
                          "0",
                          "--lr-schedule",
                          "constant",
                          "--lr",
                          "1e-2",
                          "--batch-size",
                          "2",
                          "--max-seq-length",
                          "32",
                          "--save-every",
                          every,
                          "--eval-every",
                          every,
                          "--keep-last",
                          "2",
                          "--keep-best",
                          "--threads",
                          "1",
                          "--samples",
                          "1",
                          "--sample-tokens",
                          "2",
                          "--log-every",
                          "1"};
  int argc = 0;
  while (argv[argc]) argc++;
  for (int i = 0; i < 8 && r->args[i]; i++) argv[argc++] = r->args[i];
  if (r->resume) argv[argc++] = "--resume";
  char out[MT_PATH_MAX], cache[MT_PATH_MAX], err_path[MT_PATH_MAX];
  snprintf(out, sizeof out, "%s/run", home);
  snprintf(cache, sizeof cache, "%s/cache", home);
  snprintf(err_path, sizeof err_path, "%s.err", home);
  argv[9] = out;
  argv[11] = cache;
  for (char **e = environ; *e && env_count < 48; e++) {
    if (strncmp(*e, "LD_PRELOAD=", 11) != 0 && strncmp(*e, "ASAN_OPTIONS=", 13) != 0)
      env[env_count++] = *e;
  }
  env[env_count++] =
      "ASAN_OPTIONS=verify_asan_link_order=0:allocator_may_return_null=1:exitcode=99";
  env[env_count++] = dir;
  env[env_count++] = "OMP_WAIT_POLICY=passive";
  for (int i = 0; i < 8 && r->env[i]; i++) env[env_count++] = r->env[i];
  env[env_count] = NULL;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 2, err_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  pid_t pid = -1;
  int failed = posix_spawn(&pid, MT_CLI_PATH, &actions, NULL, (char *const *)(uintptr_t)argv,
                           (char *const *)(uintptr_t)env);
  posix_spawn_file_actions_destroy(&actions);
  if (failed) fail_msg("cannot start %s", MT_CLI_PATH);
  r->status = supervise(r, pid, err_path);
  char *text = slurp(err_path, &size);
  snprintf(r->err, sizeof r->err, "%s", text ? text : "");
  free(text);
}

/* What of a line of metrics.jsonl does not depend on the clock. */
static inline void append_line(const char *line, size_t length, char *out, size_t *used) {
  const char *end = line + length, *time = memmem(line, length, "\"time\":", 7);
  const char *speed = memmem(line, length, "\"tokens_per_s\"", 14);
  bool evaluation = memmem(line, length, "\"eval_loss\"", 11) != NULL;
  const char *stop = evaluation ? time : speed ? speed : end, *from = line;
  if (!evaluation && time) {
    memcpy(out + *used, line, (size_t)(time - line));
    *used += (size_t)(time - line);
    from = memchr(time, ',', (size_t)(end - time));
  }
  memcpy(out + *used, from, (size_t)(stop - from));
  *used += (size_t)(stop - from);
  out[(*used)++] = '\n';
}

/* The file's text without times; NULL: there is none. */
static inline char *read_record(const char *path, size_t *size) {
  char *text = slurp(path, size);
  const char *slash = strrchr(path, '/');
  if (!text || strcmp(slash, "/metrics.jsonl") != 0) return text;
  char *out = malloc(2 * *size + 1);
  size_t used = 0;
  assert_non_null(out);
  for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1)
    append_line(line, (size_t)(end - line), out, &used);
  free(text);
  *size = used;
  return out;
}

/* Is home/run after this step as home/template, bit for bit? */
static inline bool same_as(const char *what, const char *template, int step) {
  static const char *const names[] = {"model/model.safetensors",
                                      "model/config.json",
                                      "best/model.safetensors",
                                      "checkpoint-%d/model.safetensors",
                                      "checkpoint-%d/moetune-state.safetensors",
                                      "checkpoint-%d/moetune-state.json",
                                      "checkpoint-%d/moetune-checksums.json",
                                      "metrics.jsonl",
                                      "samples.jsonl"};
  bool same = true;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    char name[256], a[MT_PATH_MAX], b[MT_PATH_MAX];
    size_t a_size, b_size;
    const char *at = strchr(names[i], '%');
    snprintf(name, sizeof name, "%s", names[i]);
    if (at) snprintf(name, sizeof name, "%.*s%d%s", (int)(at - names[i]), names[i], step, at + 2);
    snprintf(a, sizeof a, "%s/%s/%s", home, template, name);
    snprintf(b, sizeof b, "%s/run/%s", home, name);
    char *x = read_record(a, &a_size), *y = read_record(b, &b_size);
    if (!x || !y || a_size != b_size || memcmp(x, y, a_size) != 0) {
      BAD("%s: %s is %s", what, name, !x || !y ? "missing" : "another");
      same = false;
    }
    free(x);
    free(y);
  }
  return same;
}

static inline bool same_end(const char *what) {
  return same_as(what, "whole", FINAL_STEP);
}

/* The names in a directory of home that hold .tmp- or .gone-; how many. */
static inline int left_over(const char *what, const char *name) {
  int count = 0;
  DIR *d = opendir(at_home(name));
  for (struct dirent *e; d && (e = readdir(d));) {
    if (!strstr(e->d_name, ".tmp-") && !strstr(e->d_name, ".gone-")) continue;
    BAD("%s: %s/%s is left", what, name, e->d_name);
    count++;
  }
  if (d) closedir(d);
  return count;
}

/* The newest step that home/run could be resumed from; -1: none. */
static inline long newest(void) {
  long most = -1;
  DIR *d = opendir(at_home("run"));
  for (struct dirent *e; d && (e = readdir(d));) {
    long n;
    char end;
    if (sscanf(e->d_name, "checkpoint-%ld%c", &n, &end) == 1 && n > most) most = n;
  }
  if (d) closedir(d);
  return most;
}

/* Goes on undisturbed with what is there: it must end as if nothing had happened. */
static inline void recover(const char *what) {
  struct faults_run r = {.resume = newest() >= 0};
  start(&r);
  if (r.status != 0) {
    BAD("%s: going on (%s) gives %d: %s", what, r.resume ? "resumed" : "afresh", r.status, r.err);
    return;
  }
  same_end(what);
  left_over(what, "run");
}

/* Ended well or with a message; never by a signal, never by hanging. */
static inline void check_end(const char *what, const struct faults_run *r) {
  const char *said = strstr(r->err, "moetune: error: ");
  bool told = (said && said[16] > ' ') || strstr(r->err, "libgomp: ");
  /* The sanitizer's run-time cannot start a thread without memory; that is not the program's. */
  if (SANITIZED && strstr(r->err, "CHECK failed: sanitizer_")) return;
  if (r->status == -1)
    BAD("%s: hangs", what);
  else if (r->status >= 128 || r->status == 99 || strstr(r->err, "Sanitizer"))
    BAD("%s: status %d: %s", what, r->status, r->err);
  else if (r->status != 0 && !told)
    BAD("%s: status %d without a message: '%s'", what, r->status, r->err);
}

static inline void write_inputs(const char *seed_dir) {
  static const char config[] =
      "{\"architectures\":[\"MixtralForCausalLM\"],\"model_type\":\"mixtral\",\"bos_token_id\":0,"
      "\"eos_token_id\":0,\"hidden_act\":\"silu\",\"hidden_size\":16,\"intermediate_size\":16,"
      "\"max_position_embeddings\":64,\"num_attention_heads\":2,\"num_experts_per_tok\":2,"
      "\"num_hidden_layers\":2,\"num_key_value_heads\":1,\"num_local_experts\":4,"
      "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"router_aux_loss_coef\":0.02,"
      "\"tie_word_embeddings\":false,\"vocab_size\":257,\"torch_dtype\":\"bfloat16\"}";
  char json[16384], data[8192];
  size_t used = (size_t)snprintf(json, sizeof json,
                                 "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,"
                                 "\"merges\":[],\"vocab\":{\"<s>\":0");
  for (int b = 0; b < 256; b++)
    used += (size_t)snprintf(json + used, sizeof json - used, ",\"<0x%02X>\":%d", b, b + 1);
  snprintf(json + used, sizeof json - used, "}}}");
  used = 0;
  for (int i = 0; i < 24; i++)
    used += (size_t)snprintf(data + used, sizeof data - used,
                             "{\"prompt\":\"q%d\",\"completion\":\"answer %d\"}\n", i, i * 7 % 24);
  OK(mt_dir_create(seed_dir));
  temp_text(seed_dir, "config.json", config);
  temp_text(seed_dir, "tokenizer.json", json);
  temp_text(home, "data.jsonl", data);
}

/* Makes home: inputs, the undisturbed run and the one that was stopped after two steps. */
static inline void set_up(void) {
  char dir[MT_PATH_MAX], command[4 * MT_PATH_MAX];
  /* Thousands of syncs: in memory unless told otherwise. */
  if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
  temp_dir(dir);
  if (strlen(dir) >= sizeof home) fail_msg("TMPDIR is too long");
  memcpy(home, dir, strlen(dir) + 1);
  write_inputs(at_home("seed"));
  snprintf(command, sizeof command,
           "'%s' convert --init '%s/seed' --out '%s/model' --seed 1 --dtype bf16", MT_CLI_PATH,
           home, home);
  shell(command);
  static const struct {
    const char *name;
    int steps;
  } runs[] = {{"first", 2}, {"whole", FINAL_STEP}};
  for (int i = 0; i < 2; i++) {
    struct faults_run r = {.steps = runs[i].steps};
    set_run("");
    start(&r);
    if (r.status != 0) fail_msg("the undisturbed run gives %d: %s", r.status, r.err);
    char to[MT_PATH_MAX];
    snprintf(to, sizeof to, "%s/%s", home, runs[i].name);
    if (rename(at_home("run"), to) != 0) fail_msg("cannot rename to %s", to);
  }
}

static inline void tear_down(void) {
  char command[2 * MT_PATH_MAX];
  snprintf(command, sizeof command, "rm -rf '%s' '%s.err'", home, home);
  shell(command);
}

#endif
