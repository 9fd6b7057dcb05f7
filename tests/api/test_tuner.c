/* The public interface, through its header alone: what it refuses, and that it computes what the
 * program does. */
#include "moetune/moetune.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MODEL MT_SOURCE_DIR "/models/tiny"
#define TRAIN MT_SOURCE_DIR "/data/jargon.train.jsonl"

static void ok(mt_err err) {
  if (err) fail_msg("%s: %s", mt_err_name(err), mt_error_message());
}

static void fails(mt_err err, mt_err expected, const char *text) {
  if (err != expected || !strstr(mt_error_message(), text)) {
    fail_msg("'%s' (%s), expected '%s' naming '%s'", mt_err_name(err), mt_error_message(),
             mt_err_name(expected), text);
  }
}

static struct mt_tuner_options small(void) {
  struct mt_tuner_options o = mt_tuner_defaults(MODEL);
  o.device = "cpu";
  o.batch_size = 4;
  o.max_seq_length = 96;
  o.grad_accum = 2;
  o.lr = 5e-4;
  o.threads = 2;
  return o;
}

/* The first `count` lines of the data, in a file that the caller removes. */
static void some_lines(char path[64], int count) {
  static char line[1 << 16];
  snprintf(path, 64, "/tmp/moetune-api-XXXXXX");
  int fd = mkstemp(path);
  FILE *in = fopen(TRAIN, "r"), *out = fdopen(fd, "w");
  assert_non_null(in);
  assert_non_null(out);
  for (int i = 0; i < count; i++) {
    assert_non_null(fgets(line, sizeof line, in));
    fputs(line, out);
  }
  fclose(in);
  assert_int_equal(fclose(out), 0);
}

static void refuses_options(void **state) {
  (void)state;
  mt_tuner *t = NULL;
  struct mt_tuner_options o;
#define REFUSED(change, error, text)                                                               \
  do {                                                                                             \
    o = small();                                                                                   \
    change;                                                                                        \
    fails(mt_tuner_open(&o, &t), error, text);                                                     \
    assert_null(t);                                                                                \
  } while (0)
  REFUSED(o.model = NULL, MT_EINVAL, "model");
  REFUSED(o.model = "/nowhere", MT_ENOENT, "/nowhere");
  REFUSED(o.device = "tpu", MT_EINVAL, "device 'tpu'");
  REFUSED(o.device = NULL, MT_EINVAL, "device");
  REFUSED(o.precision = "fp3", MT_EUNSUPPORTED, "fp3");
  REFUSED(o.chat_template = "none-such", MT_EUNSUPPORTED, "none-such");
  REFUSED(o.recompute = "half", MT_EINVAL, "recompute 'half'");
  REFUSED(o.batch_size = 0, MT_EINVAL, "batch_size");
  REFUSED(o.max_seq_length = 1, MT_EINVAL, "max_seq_length");
  REFUSED((o.batch_size = 65536, o.max_seq_length = 1048576), MT_EINVAL, "too large");
  REFUSED(o.lr = NAN, MT_EINVAL, "lr");
  REFUSED(o.adam_beta2 = 1, MT_EINVAL, "adam_beta2");
  REFUSED(o.router_z_loss = -1, MT_EINVAL, "router_z_loss");
  REFUSED(o.lr_schedule = "cosine", MT_EINVAL, "total_steps");
  REFUSED(o.freeze_count = 1, MT_EINVAL, "freeze_count");
  const char *all[] = {"*"};
  REFUSED((o.freeze = all, o.freeze_count = 1), MT_EINVAL, "frozen");
#undef REFUSED
  o = (struct mt_tuner_options){.model = MODEL}; /* without mt_tuner_defaults */
  fails(mt_tuner_open(&o, &t), MT_EINVAL, "device");
}

/* What is trained is the sum that the result's parts make. */
static void losses_add_up(void **state) {
  (void)state;
  char path[64];
  struct mt_tuner_step_result step;
  mt_tuner *t;
  mt_corpus *c;
  some_lines(path, 6);
  for (int z = 0; z < 2; z++) {
    struct mt_tuner_options o = small();
    o.router_aux_coef = 0.5;
    o.router_z_loss = z ? 0.25 : 0;
    ok(mt_tuner_open(&o, &t));
    ok(mt_corpus_open(t, path, 0, &c));
    ok(mt_tuner_step(t, c, &step));
    assert_true(z ? step.z_loss > 0.1 : step.z_loss == 0);
    double sum = step.cross_entropy + 0.5 * step.aux + 0.25 * step.z_loss;
    if (!(fabs(step.loss - sum) < 1e-9 * sum)) fail_msg("%.12g, not %.12g", step.loss, sum);
    mt_corpus_close(c);
    mt_tuner_close(t);
  }
  unlink(path);
}

static void refuses_misuse(void **state) {
  (void)state;
  char path[64];
  struct mt_tuner_options o = small();
  struct mt_tuner_step_result step;
  struct mt_tuner_eval_result e;
  mt_tuner *reads, *other;
  mt_corpus *c, *none = NULL;
  o.training = 0;
  ok(mt_tuner_open(&o, &reads));
  ok(mt_tuner_open(&o, &other));
  some_lines(path, 6);
  ok(mt_corpus_open(reads, path, 0, &c));
  fails(mt_tuner_step(reads, c, &step), MT_EINVAL, "without training");
  fails(mt_tuner_evaluate(other, c, &e), MT_EINVAL, "another tuner");
  ok(mt_tuner_evaluate(reads, c, &e));
  assert_int_equal(e.samples, 6);
  fails(mt_corpus_open(reads, "/nowhere.jsonl", 0, &none), MT_ENOENT, "/nowhere.jsonl");
  fails(mt_corpus_open(reads, path, 64, &none), MT_EINVAL, "64");
  FILE *f = fopen(path, "a");
  fputs("{\"text\": \n", f);
  fclose(f);
  fails(mt_corpus_open(reads, path, 0, &none), MT_EFORMAT, ":7");
  assert_null(none);
  ok(mt_corpus_open(reads, path, MT_CORPUS_SKIP_BAD_LINES, &none));
  assert_int_equal(mt_corpus_describe(none).bad_lines, 1);
  assert_int_equal(mt_corpus_describe(none).samples, 6);

  struct mt_prompt p = mt_prompt_defaults("A hacker");
  char *answer = NULL;
  fails(mt_tuner_generate(reads, &p, NULL), MT_EINVAL, "nobody listens");
  p.top_p = 0;
  fails(mt_tuner_generate(reads, &p, &answer), MT_EINVAL, "top_p");
  p = mt_prompt_defaults("\xff");
  p.chat = 1;
  fails(mt_tuner_generate(reads, &p, &answer), MT_EFORMAT, "UTF-8");
  p.chat = 0;
  fails(mt_tuner_generate(reads, &p, &answer), MT_EFORMAT, "UTF-8");
  assert_null(answer);
  mt_corpus_close(none);
  mt_corpus_close(c);
  mt_corpus_close(NULL);
  mt_tuner_close(other);
  mt_tuner_close(reads);
  mt_tuner_close(NULL);
  unlink(path);
}

struct heard {
  char text[4096];
  size_t size;
  int calls, limit;
};

static int hear(void *context, const char *bytes, size_t byte_count) {
  struct heard *h = context;
  assert_true(h->size + byte_count < sizeof h->text);
  memcpy(h->text + h->size, bytes, byte_count);
  h->size += byte_count;
  return ++h->calls == h->limit;
}

static void answers_between_steps(void **state) {
  (void)state;
  struct mt_tuner_options o = small();
  struct mt_prompt p = mt_prompt_defaults("A hacker is");
  struct heard h = {.limit = -1};
  char *all, *cut, path[64];
  mt_tuner *t;
  mt_corpus *c;
  some_lines(path, 16);
  ok(mt_tuner_open(&o, &t));
  ok(mt_corpus_open(t, path, 0, &c));
  ok(mt_tuner_step(t, c, NULL));
  p.max_new_tokens = 24;
  p.on_text = hear;
  p.context = &h;
  ok(mt_tuner_generate(t, &p, &all));
  assert_true(h.calls > 3);
  assert_int_equal(strlen(all), h.size);
  assert_memory_equal(all, h.text, h.size);
  h = (struct heard){.limit = 3}; /* ended by the listener */
  ok(mt_tuner_generate(t, &p, &cut));
  assert_int_equal(h.calls, 3);
  assert_true(strlen(cut) < strlen(all));
  assert_memory_equal(all, cut, strlen(cut));
  mt_text_free(cut);
  char last[] = {all[strlen(all) / 2], '\0'}; /* a text to stop at */
  const char *stop[] = {last};
  p.on_text = NULL;
  p.stop = stop;
  p.stop_count = 1;
  ok(mt_tuner_generate(t, &p, &cut));
  assert_int_equal(strlen(cut), strcspn(all, last));
  mt_text_free(cut);
  mt_text_free(all);
  ok(mt_tuner_step(t, c, NULL));
  assert_int_equal(mt_tuner_describe(t).step, 2);
  mt_corpus_close(c);
  mt_tuner_close(t);
  unlink(path);
}

/* What two identical trainings give, what frozen parameters and the schedule do. */
static void trains_as_asked(void **state) {
  (void)state;
  const char *experts[] = {"*experts*"};
  struct mt_tuner_step_result a[3], b;
  char path[64];
  some_lines(path, 32);
  for (int round = 0; round < 2; round++) {
    struct mt_tuner_options o = small();
    mt_tuner *t;
    mt_corpus *c;
    o.lr_schedule = "linear";
    o.warmup_steps = 1;
    o.total_steps = 3;
    ok(mt_tuner_open(&o, &t));
    ok(mt_corpus_open(t, path, 0, &c));
    assert_int_equal(mt_corpus_describe(c).steps_per_epoch, 4);
    for (int i = 0; i < 3; i++) {
      ok(mt_tuner_step(t, c, round ? &b : &a[i]));
      if (!round) continue;
      assert_true(a[i].loss == b.loss && a[i].grad_norm == b.grad_norm);
      assert_int_equal(b.step, i + 1);
      assert_true(b.targets > 0 && b.correct >= 0 && b.correct <= b.targets);
    }
    assert_true(a[0].lr == 2.5e-4 && a[1].lr == 5e-4 && a[2].lr == 2.5e-4);
    mt_corpus_close(c);
    mt_tuner_close(t);
  }
  struct mt_tuner_options o = small();
  mt_tuner *t;
  ok(mt_tuner_open(&o, &t));
  struct mt_tuner_facts all = mt_tuner_describe(t);
  mt_tuner_close(t);
  o.freeze = experts;
  o.freeze_count = 1;
  ok(mt_tuner_open(&o, &t));
  struct mt_tuner_facts some = mt_tuner_describe(t);
  mt_tuner_close(t);
  assert_int_equal(all.learning, all.parameters);
  assert_true(some.learning < all.learning && some.learning > 0);
  assert_true(some.memory_bytes < all.memory_bytes);
  assert_true(all.active < all.parameters);
  assert_string_equal(all.device, "cpu");
  assert_string_equal(all.precision, "fp32");
  unlink(path);
}

/* The held-out loss and the checkpoint are the program's, to the last printed digit. */
static void agrees_with_the_program(void **state) {
  (void)state;
  char path[64], dir[] = "/tmp/moetune-api-XXXXXX", out[128], command[512], line[256];
  struct mt_tuner_options o = small();
  struct mt_tuner_eval_result e, reopened;
  struct mt_tuner_step_result step;
  double program = NAN;
  mt_tuner *t;
  mt_corpus *c;
  some_lines(path, 32);
  assert_non_null(mkdtemp(dir));
  snprintf(out, sizeof out, "%s/model", dir);
  ok(mt_tuner_open(&o, &t));
  ok(mt_corpus_open(t, path, 0, &c));
  for (int i = 0; i < 3; i++) ok(mt_tuner_step(t, c, &step));
  ok(mt_tuner_evaluate(t, c, &e));
  ok(mt_tuner_save(t, out));
  mt_corpus_close(c);
  mt_tuner_close(t);

  o.model = out;
  o.training = 0;
  ok(mt_tuner_open(&o, &t));
  ok(mt_corpus_open(t, path, 0, &c));
  ok(mt_tuner_evaluate(t, c, &reopened));
  ok(mt_tuner_save(t, out)); /* over its own source */
  mt_corpus_close(c);
  mt_tuner_close(t);
  assert_true(fabs(e.loss - reopened.loss) < 0.01); /* saved in BF16, as its source is */

  snprintf(
      command, sizeof command,
      "%s eval --model %s --data %s --batch-size 4 --max-seq-length 96 --threads 2 --device cpu "
      "--no-cache --json",
      MT_CLI_PATH, out, path);
  FILE *f = popen(command, "r");
  assert_non_null(f);
  while (fgets(line, sizeof line, f)) sscanf(line, "{\"loss\": %lf", &program);
  assert_int_equal(pclose(f), 0);
  if (!(fabs(program - reopened.loss) < 1e-8)) fail_msg("%.9g, %.9g", program, reopened.loss);
  snprintf(command, sizeof command, "rm -r %s", dir);
  assert_int_equal(system(command), 0);
  unlink(path);
}

struct worker {
  pthread_t thread;
  const char *data;
  struct mt_tuner_step_result last;
  mt_err err, failed; /* of training; of a call that must fail */
  char message[256];
};

/* Trains, then fails: its message must be its own. */
static void *work(void *argument) {
  struct worker *w = argument;
  struct mt_tuner_options o = small();
  mt_tuner *t = NULL;
  mt_corpus *c = NULL, *none;
  w->err = mt_tuner_open(&o, &t);
  if (!w->err) w->err = mt_corpus_open(t, w->data, 0, &c);
  for (int i = 0; i < 3 && !w->err; i++) w->err = mt_tuner_step(t, c, &w->last);
  if (!w->err) w->failed = mt_corpus_open(t, w->message, 0, &none);
  snprintf(w->message, sizeof w->message, "%s", mt_error_message());
  mt_corpus_close(c);
  mt_tuner_close(t);
  return NULL;
}

static void tuners_in_threads(void **state) {
  (void)state;
  char path[64], name[64];
  struct worker alone = {.message = "/nowhere-alone"}, w[2] = {0};
  some_lines(path, 24);
  alone.data = path;
  work(&alone);
  if (alone.err) fail_msg("%s", alone.message);
  for (int i = 0; i < 2; i++) {
    w[i].data = path;
    snprintf(w[i].message, sizeof w[i].message, "/nowhere-%d", i);
    assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
  }
  for (int i = 0; i < 2; i++) {
    pthread_join(w[i].thread, NULL);
    if (w[i].err) fail_msg("%s", w[i].message);
    assert_true(w[i].last.loss == alone.last.loss && w[i].last.grad_norm == alone.last.grad_norm);
    assert_int_equal(w[i].failed, MT_ENOENT);
    snprintf(name, sizeof name, "/nowhere-%d", i);
    assert_non_null(strstr(w[i].message, name));
  }
  unlink(path);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(refuses_options),   cmocka_unit_test(losses_add_up),
      cmocka_unit_test(refuses_misuse),    cmocka_unit_test(answers_between_steps),
      cmocka_unit_test(trains_as_asked),   cmocka_unit_test(agrees_with_the_program),
      cmocka_unit_test(tuners_in_threads),
  };
  mt_set_log_level(1);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
