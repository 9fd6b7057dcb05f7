/* `moetune report`: what a page says of a run, that it stays whole whatever the run's files hold,
 * and that it stays small. */
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "base/log.h"
#include "report/html.h"
#include "report/report.h"
#include "report/run.h"
#include "temp_dir.h"
#include "unit/well_formed.h"

static void downsampling(void **state) {
  (void)state;
  struct mt_series s;
  OK(mt_series_create(&s, MT_SERIES_POINTS));
  double sum = 0;
  int64_t n = 1000000, count = 0;
  for (int64_t i = 1; i <= n; i++) {
    double x = i == 333333 ? 50 : i == 777777 ? -50 : i % 10 == 0 ? NAN : sin((double)i);
    mt_series_add(&s, i, x);
    mt_series_add(&s, i, 1e9); /* the same step again is passed over */
    if (isfinite(x)) sum += x;
  }
  assert_in_range(s.count, MT_SERIES_POINTS / 2, MT_SERIES_POINTS);
  double total = 0, least = 0, most = 0;
  int64_t next = 1;
  for (int i = 0; i < s.count; i++) {
    assert_int_equal(s.bucket[i].first, next);
    next = s.bucket[i].last + 1;
    total += s.bucket[i].sum;
    count += s.bucket[i].count;
    least = fmin(least, s.bucket[i].min);
    most = fmax(most, s.bucket[i].max);
  }
  assert_int_equal(next, n + 1);
  assert_int_equal(count, n - n / 10);
  assert_true(fabs(total - sum) < 1e-6);
  assert_true(least == -50 && most == 50);
  mt_series_clear(&s);
  mt_series_add(&s, 1, NAN);
  assert_true(isnan(mt_bucket_mean(&s.bucket[0])) && isnan(s.last));
  double out[4];
  mt_series_add(&s, 2, 3);
  mt_series_add(&s, 3, 1);
  mt_series_smooth(&s, 1, out);
  assert_true(isnan(out[0]) && out[1] == 3 && fabs(out[2] - (0.5 * 3 + 1) / 1.5) < 1e-12);
  mt_series_destroy(&s);

  struct mt_frames f;
  OK(mt_frames_create(&f, 2, 3));
  for (int i = 1; i <= 1000; i++) mt_frames_add(&f, i, (const int32_t[]){1, 0, i, 2, 2, 0});
  assert_in_range(f.count, f.capacity / 2, f.capacity);
  int64_t loads[6] = {0};
  for (int i = 0; i < f.count; i++)
    for (int k = 0; k < 6; k++) loads[k] += mt_frames_at(&f, i)[k];
  assert_int_equal(loads[0], 1000);
  assert_int_equal(loads[2], 500500);
  assert_int_equal(loads[4], 2000);
  assert_int_equal(loads[5], 0);
  mt_frames_destroy(&f);
}

static void numbers_for_people(void **state) {
  (void)state;
  char t[MT_SHORT_TEXT];
  static const struct {
    double x;
    const char *text;
  } numbers[] = {{0, "0"},           {1, "1"},
                 {-1.5, "-1.5"},     {0.0123, "0.0123"},
                 {1234, "1234"},     {12345, "12.3k"},
                 {9578752, "9.58M"}, {46.7e9, "46.7G"},
                 {2e-5, "2e-5"},     {3.08e-8, "3.08e-8"},
                 {NAN, "–"},         {INFINITY, "–"},
                 {0.5, "0.5"},       {99.999, "100"},
                 {9999.6, "10k"},    {-12345, "-12.3k"}};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    assert_string_equal(mt_short_number(t, numbers[i].x), numbers[i].text);
  assert_string_equal(mt_short_bytes(t, 38315008), "38.3 MB");
  assert_string_equal(mt_short_percent(t, 0.29588), "29.6%");
  assert_string_equal(mt_short_seconds(t, 46.06), "46.1 s");
  assert_string_equal(mt_short_seconds(t, 3725), "1 h 02 min");
  assert_string_equal(mt_short_seconds(t, 7.5e83), "–");
  assert_string_equal(mt_short_date(t, 1700000000), "2023-11-14 22:13 UTC");
  double tick[16];
  assert_int_equal(mt_ticks(0.1, 5.2, 5, 0, tick, 16), 5);
  assert_true(tick[0] == 1 && tick[4] == 5);
  assert_int_equal(mt_ticks(0.5, 2000, 5, 1, tick, 16), 4);
  assert_true(fabs(tick[0] - 1) < 1e-12 && fabs(tick[3] - 1000) < 1e-9);
  assert_int_equal(mt_ticks(1, 1, 5, 0, tick, 16), 0);
  int many = mt_ticks(1e-300, 1e300, 5, 1, tick, 16); /* a quotient beyond a double */
  assert_true(many >= 4 && many <= 6);
}

static char *page_of(const char *const *dirs, int count, const char *out) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  struct mt_report_options o = {.dirs = dirs, .dir_count = count, .out = out};
  OK(mt_report_write(&o, path));
  OK(mt_file_read(path, 1 << 26, &text, &size));
  assert_int_equal(strlen(text), size);
  assert_well_formed(text);
  return text;
}

static char *page(const char *dir) {
  return page_of(&dir, 1, NULL);
}

static void has(const char *text, const char *part) {
  if (!strstr(text, part)) fail_msg("the page lacks '%s'", part);
}

static void lacks(const char *text, const char *part) {
  if (strstr(text, part)) fail_msg("the page holds '%s'", part);
}

static const char facts[] =
    "{\"started\":1700000000,\"result\":{\"status\":\"finished\",\"step\":3,\"seconds\":12.5,"
    "\"median_step_ms\":250.4},\"options\":{\"model\":\"m\",\"data\":\"d.jsonl\",\"lr\":0.0005,"
    "\"total-steps\":3,\"grad-clip\":1.0},\"model\":{\"parameters\":9578752,\"layers\":2,"
    "\"experts\":2,\"top_k\":1},\"data\":{\"samples\":77,\"tokens\":4321}}";

static const char metrics[] =
    "{\"step\":0,\"eval_loss\":4.5,\"eval_perplexity\":90.0,\"eval_accuracy\":0.25,"
    "\"eval_router_entropy\":[0.5,null]}\n"
    "{\"step\":1,\"time\":1700000001,\"loss\":4.25,\"cross_entropy\":4.125,\"aux\":2.0,"
    "\"grad_norm\":1.5,\"lr\":0.001,\"accuracy\":0.3,\"tokens\":100,\"tokens_per_s\":400,"
    "\"step_ms\":250,\"phase_ms\":{\"head\":100,\"moe_forward\":140},\"expert_load\":[[60,40],"
    "[100,0]],\"memory_bytes\":{\"parameters\":1000000,\"process_peak\":5000000}}\n"
    "{\"step\":2,\"loss\":null,\"cross_entropy\":null,\"grad_norm\":null,\"lr\":0.0005,"
    "\"tokens\":100,\"step_ms\":250,\"expert_load\":[[50,50],[100,0]]}\n"
    "{\"step\":2,\"warning\":\"1 expert without a token for 2 steps (layer 1: 1)\"}\n"
    "{\"step\":3,\"loss\":3.5,\"cross_entropy\":3.25,\"grad_norm\":0.75,\"lr\":0,\"tokens\":100,"
    "\"step_ms\":250,\"expert_load\":[[50,50],[99,1]]}\n"
    "{\"step\":3,\"eval_loss\":3.875,\"eval_perplexity\":48.2,\"eval_accuracy\":0.375,"
    "\"eval_router_entropy\":[0.5,0.25]}\n";

static void a_run(void **state) {
  (void)state;
  char dir[MT_PATH_MAX];
  temp_dir(dir);
  temp_text(dir, "run.json", facts);
  temp_text(dir, "metrics.jsonl", metrics);
  temp_text(
      dir, "samples.jsonl",
      "{\"step\":0,\"index\":0,\"prompt\":\"Why?\",\"answer\":\"Old.\",\"expected\":\"So.\"}\n"
      "{\"step\":3,\"index\":0,\"prompt\":\"Why?\",\"answer\":\"New.\",\"expected\":\"So.\"}\n");
  char *text = page(dir);
  has(text, ">finished</span> step 3 of 3");
  has(text, "<span class=\"was\">4.5 →</span> 3.875");
  has(text, "best 3.875 at step 3");
  has(text, "<span class=\"was\">25.0% →</span> 37.5%");
  has(text, "250.4 ms");
  has(text, "12.5 s");
  has(text, "9.58M");
  has(text, "held out, step 3: 3.875</title>"); /* a point's own number */
  has(text, "training: from 4.125 at step 1 to 3.25 at step 3.");
  has(text, "\"y\":[4.125,null,3.25]");                   /* NaN is a gap */
  has(text, "<path class=\"hd\" d=\"M0 34h2v10h-2z\"/>"); /* layer 1, expert 1, two steps */
  has(text, "<td class=\"h0\">1.0</td>");
  has(text, "1 warning");
  has(text, "layer 1: 1");
  has(text, "parameters <b>1 MB</b>");
  has(text, "moe forward <b>140</b>");
  has(text, "<dt>step 3</dt><dd>New.</dd>");
  has(text, "<th scope=\"row\">lr</th><td>0.0005</td>");
  has(text, "Tokens dropped: 0");
  /* Nothing from elsewhere. */
  lacks(text, " src=");
  lacks(text, "url(");
  lacks(text, "@import");
  lacks(text, "href=\"http");
  lacks(text, "http-equiv=\"refresh\"");
  has(text, "default-src 'none'");
  free(text);
  OK(mt_dir_remove(dir));
}

/* Whose the numbers are where they are not all ranks'. */
static void a_run_on_ranks(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], many[2048];
  temp_dir(dir);
  snprintf(many, sizeof many,
           "%.*s,\"device\":{\"backend\":\"cpu\"},\"ranks\":{\"world\":8,\"data\":2,\"expert\":4,"
           "\"pipeline\":1}}",
           (int)strlen(facts) - 1, facts);
  temp_text(dir, "run.json", many);
  temp_text(dir, "metrics.jsonl", metrics);
  char *text = page(dir);
  has(text, "cpu · 8 ranks: 2 x data, 4 x expert, 1 x pipeline");
  has(text, "stacked; of rank 0");
  has(text, "in host memory; of several ranks, rank 0's</p>");
  free(text);
  temp_text(dir, "run.json", facts);
  text = page(dir);
  lacks(text, "ranks");
  lacks(text, "rank 0");
  free(text);
  OK(mt_dir_remove(dir));
}

/* Names, options, warnings and samples that would like to be markup. */
static void hostile_texts(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], run[MT_PATH_MAX];
  static const char evil[] = "</script><script>alert('1')</script>";
  temp_dir(dir);
  OK(mt_path_join(run, dir, "a\"b<img onerror=x>&\xff"));
  OK(mt_dir_create(run));
  temp_text(run, "run.json",
            "{\"result\":{\"status\":\"<b>\",\"error\":\"<i>]]>\"},\"options\":{\"model\":"
            "\"</script><script>alert('1')</script>\",\"<u>key\":\"\\u0001\\u001b\"}}");
  temp_text(run, "metrics.jsonl",
            "{\"step\":1,\"loss\":1,\"phase_ms\":{\"</script><script>alert('1')</script>\":3},"
            "\"memory_bytes\":{\"<svg>\":5}}\n"
            "{\"step\":1,\"warning\":\"</script><script>alert('1')</script>\"}\n");
  temp_text(run, "samples.jsonl",
            "{\"step\":1,\"index\":0,\"prompt\":\"</script><script>alert('1')</script>\","
            "\"answer\":\"\\\"'<&>\",\"expected\":\"<!--\"}\n"
            "{\"step\":1,\"index\":1,\"prompt\":5,\"answer\":[1]}\n");
  char *text = page(run);
  lacks(text, evil);
  lacks(text, "<img");
  lacks(text, "<u>");
  lacks(text, "<!--");
  has(text, "&lt;/script&gt;&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;");
  has(text, "a&quot;b&lt;img onerror=x&gt;&amp;\xef\xbf\xbd");
  has(text, "&quot;&#39;&lt;&amp;&gt;");
  free(text);
  OK(mt_dir_remove(dir));
}

static mt_err report(const char *dir) {
  char path[MT_PATH_MAX];
  struct mt_report_options o = {.dirs = &dir, .dir_count = 1};
  return mt_report_write(&o, path);
}

static void broken_files(void **state) {
  (void)state;
  char dir[MT_PATH_MAX];
  temp_dir(dir);
  FAILS(report(dir), MT_ENOENT, "is no run directory");
  FAILS(report("/no/such/run"), MT_ENOENT, "/no/such/run");
  temp_text(dir, "metrics.jsonl", ""); /* it has only begun */
  char *text = page(dir);
  has(text, "No values yet.");
  has(text, "no run.json");
  free(text);
  temp_text(dir, "run.json", "{}");
  free(page(dir));
  temp_text(dir, "metrics.jsonl",
            "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"lo"); /* being written */
  text = page(dir);
  has(text, "step 1");
  has(text, "2.5");
  free(text);
  temp_text(dir, "metrics.jsonl", "{\"step\":1,\"loss\":2}\n{\"step\":2,\"lo\n");
  FAILS(report(dir), MT_EFORMAT, "metrics.jsonl:2: ");
  temp_text(dir, "metrics.jsonl", "\n{\"step\":1,\"loss\":2}\r\n[1]\n");
  FAILS(report(dir), MT_EFORMAT, "metrics.jsonl:3: no JSON object");
  temp_text(dir, "metrics.jsonl", "{\"loss\":2}\n");
  FAILS(report(dir), MT_EFORMAT, "metrics.jsonl:1: no \"step\"");
  temp_text(dir, "metrics.jsonl",
            "{\"step\":1,\"expert_load\":[[1,2]]}\n{\"step\":2,\"expert_load\":[[1,2],[3,4]]}\n");
  FAILS(report(dir), MT_EFORMAT, "metrics.jsonl:2: expert_load");
  temp_text(dir, "metrics.jsonl", "{\"step\":1,\"expert_load\":[[1,2],[3]]}\n");
  FAILS(report(dir), MT_EFORMAT, "metrics.jsonl:1: expert_load");
  temp_text(dir, "metrics.jsonl", "{\"step\":1,\"expert_load\":[[-1,9999999999]]}\n");
  free(page(dir));
  temp_text(dir, "metrics.jsonl", "");
  temp_text(dir, "samples.jsonl", "x\n");
  FAILS(report(dir), MT_EFORMAT, "samples.jsonl:1: ");
  temp_text(dir, "samples.jsonl", "");
  temp_text(dir, "run.json", "{\n\"a\":");
  FAILS(report(dir), MT_EFORMAT, "run.json:2: ");
  OK(mt_dir_remove(dir));
}

static void runs_side_by_side(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], a[MT_PATH_MAX], b[MT_PATH_MAX], out[MT_PATH_MAX], path[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(a, dir, "first"));
  OK(mt_path_join(b, dir, "second"));
  OK(mt_path_join(out, dir, "page.html"));
  OK(mt_dir_create(a));
  OK(mt_dir_create(b));
  temp_text(a, "run.json", facts);
  temp_text(a, "metrics.jsonl", metrics);
  temp_text(b, "run.json",
            "{\"result\":{\"status\":\"running\"},\"options\":{\"model\":\"m\",\"lr\":0.25}}");
  temp_text(b, "metrics.jsonl",
            "{\"step\":1,\"loss\":4,\"lr\":0.25,\"expert_load\":[[5,5],[7,0]]}\n"
            "{\"step\":9,\"loss\":2}\n");
  const char *dirs[] = {a, b, b, b, b, b, b, b, b};
  char *text = page_of(dirs, 2, out);
  has(text, "first and second");
  has(text, "first, training: from 4.125 at step 1");
  has(text, "second, training: from 4 at step 1 to 2 at step 9.");
  has(text, "lr <span class=\"tag\">differs</span></th><td>0.0005</td><td>0.25</td>");
  has(text, "second, mean of its layers <b>50.0%</b>"); /* one even, one all to one */
  lacks(text, "model <span class=\"tag\">");
  has(text, ">running</span>");
  free(text);
  text = page_of(dirs, 8, NULL); /* of one name: told apart */
  has(text, "8 runs side by side");
  has(text, b);
  free(text);
  OK(mt_path_join(out, a, "comparison.html"));
  assert_true(mt_path_exists(out));
  struct mt_report_options o = {.dirs = dirs, .dir_count = 9};
  FAILS(mt_report_write(&o, path), MT_EINVAL, "1 to 8 runs");
  OK(mt_dir_remove(dir));
}

/* A long run of a large model: the page stays small. */
static void a_long_run(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(path, dir, "metrics.jsonl"));
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  for (int i = 1; i <= 20000; i++) {
    fprintf(f, "{\"step\":%d,\"loss\":%g,\"step_ms\":100,\"expert_load\":[", i,
            i == 12345 ? 777 : 2 + sin(i));
    for (int l = 0; l < 12; l++) fprintf(f, "%s[%d,7,0,%d]", l ? "," : "", 1 + i % 5, (l * i) % 11);
    fputs("]}\n", f);
    if (i % 50 == 0) fprintf(f, "{\"step\":%d,\"eval_loss\":%g}\n", i, 3 - 1e-5 * i);
    if (i % 50 == 0) fprintf(f, "{\"step\":%d,\"warning\":\"w%d\"}\n", i, i);
  }
  fclose(f);
  OK(mt_path_join(path, dir, "samples.jsonl"));
  f = fopen(path, "w");
  assert_non_null(f);
  for (int i = 0; i < 3000; i++)
    fprintf(f, "{\"step\":%d,\"index\":%d,\"prompt\":\"p%d\",\"answer\":\"a%d\"}\n", i / 3 * 10,
            i % 3, i % 3, i);
  fclose(f);
  char *text = page(dir);
  if (strlen(text) > 1500000) fail_msg("%zu bytes", strlen(text));
  has(text, "beyond the axis: up to 777");
  has(text, "class=\"band\""); /* least and largest of joined steps */
  has(text, "shaded: least to largest of 16 steps");
  has(text, "400 warnings");
  has(text, "and 336 more");
  has(text, "<dt>step 0</dt><dd>a0</dd>"); /* the first and the last of the samples */
  has(text, "<dt>step 9990</dt><dd>a2999</dd>");
  free(text);
  OK(mt_dir_remove(dir));
}

static void pause_ms(long ms) {
  struct timespec t = {.tv_nsec = ms * 1000000};
  (void)nanosleep(&t, NULL);
}

static void append(const char *dir, const char *name, const char *text) {
  char path[MT_PATH_MAX];
  OK(mt_path_join(path, dir, name));
  FILE *f = fopen(path, "a");
  assert_non_null(f);
  fputs(text, f);
  fclose(f);
}

/* A run that goes on while it is watched: a line in two parts, a resumed run's new file, the end.
 */
static void *run_beside(void *argument) {
  const char *dir = argument;
  pause_ms(60);
  append(dir, "metrics.jsonl", "{\"step\":2,\"loss\":");
  pause_ms(60);
  append(dir, "metrics.jsonl", "2.75}\n");
  pause_ms(60);
  temp_text(dir, "metrics.jsonl", "{\"step\":1,\"loss\":8}\n{\"step\":2,\"loss\":7.125}\n");
  pause_ms(60);
  temp_text(dir, "run.json", "{\"result\":{\"status\":\"stopped early\"}}");
  return NULL;
}

static void *interrupt(void *argument) {
  pause_ms(100);
  kill(getpid(), SIGTERM);
  return argument;
}

static void watched_runs(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], *text;
  size_t size;
  pthread_t thread;
  temp_dir(dir);
  mt_log_set_level(MT_LOG_ERROR);
  temp_text(dir, "run.json", "{\"result\":{\"status\":\"running\"}}");
  temp_text(dir, "metrics.jsonl", "{\"step\":1,\"loss\":3}\n");
  const char *dirs[] = {dir};
  struct mt_report_options o = {.dirs = dirs, .dir_count = 1, .watch = true, .interval_s = 0.02};
  assert_int_equal(pthread_create(&thread, NULL, run_beside, dir), 0);
  OK(mt_report_write(&o, path));
  pthread_join(thread, NULL);
  OK(mt_file_read(path, 1 << 24, &text, &size));
  assert_well_formed(text);
  has(text, "stopped early</span> step 2");
  has(text, "from 8 at step 1 to 7.125 at step 2.");
  lacks(text, "http-equiv=\"refresh\"");
  free(text);
  /* A signal ends the watch over a run that does not end; the page stops reloading itself. */
  temp_text(dir, "run.json", "{\"result\":{\"status\":\"running\"}}");
  assert_int_equal(pthread_create(&thread, NULL, interrupt, NULL), 0);
  OK(mt_report_write(&o, path));
  pthread_join(thread, NULL);
  OK(mt_file_read(path, 1 << 24, &text, &size));
  has(text, ">running</span>");
  lacks(text, "http-equiv=\"refresh\"");
  free(text);
  OK(mt_dir_remove(dir));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(downsampling),
      cmocka_unit_test(numbers_for_people),
      cmocka_unit_test(a_run),
      cmocka_unit_test(a_run_on_ranks),
      cmocka_unit_test(hostile_texts),
      cmocka_unit_test(broken_files),
      cmocka_unit_test(runs_side_by_side),
      cmocka_unit_test(a_long_run),
      cmocka_unit_test(watched_runs),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
