/* The program as users start it on many ranks, and what it leaves behind. */
#ifndef MT_TESTS_RANKS_RUN_H
#define MT_TESTS_RANKS_RUN_H

#include "temp_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/wait.h>
#include <time.h>

#include "io/safetensors.h"

enum { ARGS_MOST = 96, TEXT_BYTES = 1 << 16 };

static char home[MT_PATH_MAX - 512]; /* model, data.jsonl, and a directory a run */

static inline const char *at_home(const char *name) {
  static char path[8][MT_PATH_MAX];
  static int next;
  char *p = path[next++ % 8];
  snprintf(p, MT_PATH_MAX, "%s/%.500s", home, name);
  return p;
}

static inline double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A start of the program. */
struct start {
  int ranks;         /* 0: without mpirun */
  const char *args;  /* of the program, separated by blanks; @ is home */
  const char *other; /* of the last rank, instead of args, where it differs */
  const char *env;   /* NAME=VALUE NAME=VALUE that ranks get */
  int signal;        /* to mpirun (or the program) once it has said this: */
  const char *when;
  int status; /* exit status; 128 + signal; -1: it took more than limit_s */
  double limit_s, took_s;
  char out[TEXT_BYTES]; /* both outputs */
};

/* Appends the words of a text, @ replaced; the words' memory is kept till the next start. */
static inline int add_words(const char **argv, int argc, const char *text) {
  static char memory[1 << 16];
  static size_t used;
  if (argc == 0) used = 0;
  while (*text) {
    while (*text == ' ') text++;
    if (!*text) break;
    char *word = memory + used;
    while (*text && *text != ' ') {
      if (*text == '@')
        used += (size_t)snprintf(memory + used, sizeof memory - used, "%s", home);
      else
        memory[used++] = *text;
      text++;
    }
    memory[used++] = '\0';
    argv[argc++] = word;
  }
  argv[argc] = NULL;
  return argc;
}

static inline int command(const struct start *s, const char **argv) {
  char n[16];
  int argc = add_words(argv, 0, "");
  if (s->ranks == 0) return add_words(argv, add_words(argv, argc, MT_CLI_PATH), s->args);
  argc = add_words(argv, 0, MT_MPIEXEC " --allow-run-as-root --oversubscribe --bind-to none");
  for (int part = 0; part < (s->other ? 2 : 1); part++) {
    int ranks = s->other ? (part ? 1 : s->ranks - 1) : s->ranks;
    if (part) argc = add_words(argv, argc, ":");
    snprintf(n, sizeof n, " -n %d ", ranks);
    argc = add_words(argv, argc, n);
    char text[4096];
    for (const char *e = s->env; e && *e;) {
      size_t length = strcspn(e, " ");
      snprintf(text, sizeof text, "-x %.*s", (int)length, e);
      argc = add_words(argv, argc, text);
      e += length + (e[length] == ' ');
    }
    argc = add_words(argv, argc, MT_CLI_PATH);
    argc = add_words(argv, argc, part ? s->other : s->args);
  }
  return argc;
}

static inline void start(struct start *s) {
  const char *argv[ARGS_MOST];
  double begin = now_s(), limit = s->limit_s > 0 ? s->limit_s : 100;
  char log[MT_PATH_MAX], *text = NULL;
  size_t size = 0;
  bool sent = s->signal == 0;
  command(s, argv);
  snprintf(log, sizeof log, "%s/log", home);
  unlink(log); /* what an earlier start has said is not this one's */
  pid_t pid = fork();
  if (pid == 0) {
    int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600),
        in = open("/dev/null", O_RDONLY);
    setpgid(0, 0);
    dup2(in, 0), dup2(fd, 1), dup2(fd, 2);
    execvp(argv[0], (char *const *)(uintptr_t)argv);
    _exit(127);
  }
  for (;;) {
    int status;
    if (waitpid(pid, &status, WNOHANG) == pid) {
      s->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      break;
    }
    if (now_s() - begin > limit) {
      kill(-pid, SIGKILL);
      waitpid(pid, &status, 0);
      s->status = -1;
      break;
    }
    if (!sent && !mt_file_read(log, (size_t)1 << 24, &text, &size)) {
      if (strstr(text, s->when)) kill(pid, s->signal), sent = true;
      free(text), text = NULL;
    }
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
  }
  s->took_s = now_s() - begin;
  OK(mt_file_read(log, (size_t)1 << 24, &text, &size));
  snprintf(s->out, sizeof s->out, "%s", text);
  free(text);
}

static inline void start_well(struct start *s) {
  start(s);
  if (s->status != 0)
    fail_msg("%d ranks, %s: status %d:\n%s", s->ranks, s->args, s->status, s->out);
}

/* What every training here is given. */
#define TRAIN                                                                                      \
  "train --model @/model --data @/data.jsonl --cache-dir @/cache --chat-template mistral "         \
  "--lr-schedule constant --lr 3e-3 --adam-eps 1e-6 --warmup-steps 1 --max-seq-length 32 "         \
  "--router-aux-coef 0.1 --threads 1 --log-every 1 --no-report "

/* Whether two files of tensors hold the same bits under the same names. */
static inline void same_tensors(const char *a, const char *b) {
  struct mt_st_file x, y;
  OK(mt_st_open(a, &x));
  OK(mt_st_open(b, &y));
  assert_int_equal(x.count, y.count);
  for (size_t i = 0; i < x.count; i++) {
    const struct mt_st_tensor *t = &x.tensor[i], *u = mt_st_find(&y, t->name);
    if (!u || u->size_bytes != t->size_bytes || memcmp(t->data, u->data, t->size_bytes) != 0)
      fail_msg("%s of %s is another one in %s", t->name, a, b);
  }
  mt_st_close(&x);
  mt_st_close(&y);
}

/* How far two float32 models are apart, of what one is from where both began. */
static inline double apart(const char *a, const char *b, const char *before) {
  struct mt_st_file x, y, z;
  double off = 0, moved = 0;
  OK(mt_st_open(a, &x));
  OK(mt_st_open(b, &y));
  OK(mt_st_open(before, &z));
  for (size_t i = 0; i < x.count; i++) {
    const struct mt_st_tensor *t = &x.tensor[i], *u = mt_st_find(&y, t->name),
                              *v = mt_st_find(&z, t->name);
    assert_true(u && v && t->dtype == MT_F32 && u->dtype == MT_F32 && v->dtype == MT_F32);
    assert_int_equal(t->size_bytes, u->size_bytes);
    for (size_t k = 0; k < t->size_bytes; k += 4) {
      float p, q, r;
      memcpy(&p, t->data + k, 4), memcpy(&q, u->data + k, 4), memcpy(&r, v->data + k, 4);
      off += (double)(p - q) * (p - q);
      moved += (double)(q - r) * (q - r);
    }
  }
  mt_st_close(&x), mt_st_close(&y), mt_st_close(&z);
  return sqrt(off / moved);
}

/* Compares the numbers of two runs' metrics.jsonl, line by line, till the times begin. */
static inline void same_metrics(const char *a, const char *b, double bound) {
  char *x, *y, *xs = NULL, *ys = NULL;
  size_t size;
  OK(mt_file_read(a, 1 << 20, &x, &size));
  OK(mt_file_read(b, 1 << 20, &y, &size));
  char *p = strtok_r(x, "\n", &xs), *q = strtok_r(y, "\n", &ys);
  for (; p && q; p = strtok_r(NULL, "\n", &xs), q = strtok_r(NULL, "\n", &ys)) {
    static const char *const keys[] = {"step",      "loss",      "cross_entropy",
                                       "aux",       "grad_norm", "tokens",
                                       "eval_loss", "targets",   "eval_targets"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
      char key[32];
      snprintf(key, sizeof key, "\"%s\":", keys[i]);
      const char *m = strstr(p, key), *n = strstr(q, key);
      if (!m != !n) fail_msg("%s: %s\n%s", keys[i], p, q);
      if (!m) continue;
      double v = strtod(m + strlen(key), NULL), w = strtod(n + strlen(key), NULL);
      if (fabs(v - w) > bound * fabs(w)) fail_msg("%s %.9g, not %.9g: %s", keys[i], v, w, a);
    }
    const char *m = strstr(p, "expert_load"), *n = strstr(q, "expert_load");
    assert_true(!m == !n);
    if (m && strncmp(m, n, strcspn(m, "g")) != 0) fail_msg("loads differ:\n%s\n%s", p, q);
  }
  assert_true(!p && !q);
  free(x), free(y);
}

/* Nothing of the directory is temporary, and no process of it is left. */
static inline void nothing_left(const char *name) {
  DIR *d = opendir(at_home(name));
  for (struct dirent *e; d && (e = readdir(d));) {
    if (strstr(e->d_name, ".tmp-") || strstr(e->d_name, ".gone-"))
      fail_msg("%s/%s is left", name, e->d_name);
  }
  if (d) closedir(d);
}

static inline void no_process_left(void) {
  for (int wait = 0; wait < 100; wait++) {
    int found = 0;
    DIR *d = opendir("/proc");
    for (struct dirent *e; d && (e = readdir(d));) {
      char path[512], text[4096];
      snprintf(path, sizeof path, "/proc/%s/cmdline", e->d_name);
      FILE *f = atoi(e->d_name) > 0 ? fopen(path, "r") : NULL;
      size_t n = f ? fread(text, 1, sizeof text, f) : 0;
      found += n > 0 && memmem(text, n, home, strlen(home)) != NULL;
      if (f) fclose(f);
    }
    if (d) closedir(d);
    if (found == 0) return;
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
  }
  fail_msg("processes of %s are left", home);
}

static inline int set_up(void **state) {
  static const char config[] =
      "{\"architectures\":[\"MixtralForCausalLM\"],\"model_type\":\"mixtral\",\"bos_token_id\":0,"
      "\"eos_token_id\":0,\"hidden_act\":\"silu\",\"hidden_size\":16,\"intermediate_size\":32,"
      "\"max_position_embeddings\":64,\"num_attention_heads\":2,\"num_experts_per_tok\":2,"
      "\"num_hidden_layers\":2,\"num_key_value_heads\":1,\"num_local_experts\":4,"
      "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"router_aux_loss_coef\":0.02,"
      "\"tie_word_embeddings\":false,\"vocab_size\":257,\"torch_dtype\":\"float32\"}";
  char json[16384], data[16384], dir[MT_PATH_MAX], seed[MT_PATH_MAX];
  (void)state;
  if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
  setenv("OMP_WAIT_POLICY", "passive", 1);
  setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 1);
  setenv("LSAN_OPTIONS", "detect_leaks=0", 1);           /* MPI's own have no name */
  setenv("ASAN_OPTIONS", "verify_asan_link_order=0", 1); /* kill.c is preloaded */
  temp_dir(dir);
  if (strlen(dir) >= sizeof home) return -1;
  memcpy(home, dir, strlen(dir) + 1);
  size_t used = (size_t)snprintf(json, sizeof json,
                                 "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,"
                                 "\"merges\":[],\"vocab\":{\"<s>\":0");
  for (int b = 0; b < 256; b++)
    used += (size_t)snprintf(json + used, sizeof json - used, ",\"<0x%02X>\":%d", b, b + 1);
  snprintf(json + used, sizeof json - used, "}}}");
  used = 0;
  for (int i = 0; i < 53; i++)
    used += (size_t)snprintf(data + used, sizeof data - used,
                             "{\"prompt\":\"q%d\",\"completion\":\"%.*s %d\"}\n", i, i % 13,
                             "answer, long", i * 7 % 24);
  snprintf(seed, sizeof seed, "%s/seed", home);
  OK(mt_dir_create(seed));
  temp_text(seed, "config.json", config);
  temp_text(seed, "tokenizer.json", json);
  temp_text(home, "data.jsonl", data);
  struct start s = {.args = "convert --init @/seed --out @/model --seed 1 --dtype fp32"};
  start_well(&s);
  return 0;
}

static inline int tear_down(void **state) {
  (void)state;
  OK(mt_dir_remove(home));
  return 0;
}

#endif
