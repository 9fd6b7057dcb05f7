/* Tokens kept in a file: found again, keyed by all that decides them, made anew when damaged, and
 * the same however many threads made them. */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/log.h"
#include "data/tokens.h"
#include "temp_dir.h"

#define TOKENIZER MT_SOURCE_DIR "/tests/golden/tokenizer-mixtral/tokenizer.json"

static struct mt_tokenizer *tokenizer;

struct fixture {
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], cache[MT_PATH_MAX];
  struct mt_dataset_options o;
};

static int open_fixture(void **state) {
  struct fixture *f = calloc(1, sizeof *f);
  if (!tokenizer) OK(mt_tokenizer_load(TOKENIZER, &tokenizer));
  mt_log_set_level(MT_LOG_ERROR);
  temp_dir(f->dir);
  OK(mt_path_join(f->path, f->dir, "data.jsonl"));
  OK(mt_path_join(f->cache, f->dir, "deep/cache"));
  f->o = (struct mt_dataset_options){
      .path = f->path, .max_seq_length = 64, .eos_id = 2, .threads = 2, .cache_dir = f->cache};
  OK(mt_template_find("mistral", &f->o.chat));
  *state = f;
  return 0;
}

static int close_fixture(void **state) {
  struct fixture *f = *state;
  OK(mt_dir_remove(f->dir));
  free(f);
  return 0;
}

/* Lines of changing length, `bytes` of them or some more. */
static void write_data(const char *path, size_t bytes) {
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  for (size_t i = 0, n = 0; n < bytes; i++) {
    int wrote = fprintf(file, "{\"prompt\":\"number %zu\",\"completion\":\" is", i);
    for (size_t k = 0; k < i * i % 97; k++) wrote += fprintf(file, " %zu", (i + k) * k % 1009);
    wrote += fprintf(file, "\"}\n");
    n += (size_t)wrote;
  }
  assert_int_equal(fclose(file), 0);
}

static mt_err load(const struct fixture *f, struct mt_dataset **d) {
  MT_TRY(mt_dataset_open(tokenizer, &f->o, d));
  mt_err err = mt_dataset_wait(*d);
  if (err) mt_dataset_close(*d);
  return err;
}

static int count_files(const char *dir) {
  int n = 0;
  DIR *d = opendir(dir);
  for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
  if (d) closedir(d);
  return n;
}

/* Hashes all that a data set holds. */
static struct mt_hash contents(const struct mt_dataset *d) {
  struct mt_dataset_stats s = mt_dataset_stats(d);
  struct mt_hash sum = mt_hash_bytes(&s, sizeof s);
  for (int64_t i = 0; i < s.samples; i++) {
    struct mt_sample x = mt_dataset_sample(d, i);
    int64_t facts[] = {x.count, x.line, mt_dataset_whole(d, i)};
    struct mt_hash parts[] = {sum, mt_hash_bytes(x.ids, (size_t)x.count * sizeof *x.ids),
                              mt_hash_bytes(x.learn, (size_t)x.count),
                              mt_hash_bytes(facts, sizeof facts)};
    sum = mt_hash_bytes(parts, sizeof parts);
  }
  return sum;
}

/* Opens, notes what is in it and whether it was found, closes. */
static struct mt_hash look(const struct fixture *f, bool cached, char file[MT_PATH_MAX]) {
  struct mt_dataset *d;
  OK(load(f, &d));
  struct mt_dataset_origin o = mt_dataset_origin(d);
  assert_int_equal(o.cached, cached);
  struct mt_hash sum = contents(d);
  if (file) {
    assert_non_null(o.cache);
    snprintf(file, MT_PATH_MAX, "%s", o.cache);
  }
  mt_dataset_close(d);
  return sum;
}

static void a_second_start_finds_them(void **state) {
  struct fixture *f = *state;
  char first[MT_PATH_MAX], second[MT_PATH_MAX];
  write_data(f->path, 200000);
  f->o.cache_dir = NULL;
  struct mt_hash plain = look(f, false, NULL);
  f->o.cache_dir = f->cache;
  struct mt_hash made = look(f, false, first), found = look(f, true, second);
  assert_true(mt_hash_equal(plain, made) && mt_hash_equal(made, found));
  assert_string_equal(first, second);
  assert_int_equal(strncmp(first, f->cache, strlen(f->cache)), 0);
  assert_int_equal(count_files(f->cache), 1); /* nothing temporary stays */
  /* The same content under another name is the same data. */
  char other[MT_PATH_MAX];
  OK(mt_path_join(other, f->dir, "data.jsonl.bak"));
  assert_int_equal(rename(f->path, other), 0);
  FAILS(load(f, &(struct mt_dataset *){0}), MT_ENOENT, "data.jsonl");
}

static void everything_that_decides_is_in_the_key(void **state) {
  struct fixture *f = *state;
  write_data(f->path, 20000);
  struct mt_dataset_options first = f->o;
  look(f, false, NULL);
  look(f, true, NULL);
  f->o.max_seq_length = 63;
  look(f, false, NULL);
  f->o = first, f->o.eos_id = 3;
  look(f, false, NULL);
  f->o = first, f->o.train_on_prompt = true;
  look(f, false, NULL);
  f->o = first, f->o.skip_bad_lines = true;
  look(f, false, NULL);
  f->o = first;
  OK(mt_template_find("chatml", &f->o.chat));
  look(f, false, NULL);
  /* A tokenizer whose file differs in one blank. */
  struct mt_tokenizer *before = tokenizer;
  char *text;
  size_t size;
  OK(mt_file_read(TOKENIZER, 1 << 26, &text, &size));
  text[size] = ' '; /* the end's place */
  OK(mt_tokenizer_parse(text, size + 1, "tokenizer", &tokenizer));
  free(text);
  f->o = first;
  look(f, false, NULL);
  mt_tokenizer_free(tokenizer);
  tokenizer = before;
  f->o.threads = 1; /* decides nothing */
  look(f, true, NULL);
  write_data(f->path, 20001 + 2000);
  look(f, false, NULL);
  assert_int_equal(count_files(f->cache), 8);
}

static void threads_do_not_matter(void **state) {
  struct fixture *f = *state;
  struct mt_map one, many;
  char path[MT_PATH_MAX];
  write_data(f->path, 5 << 20); /* several pieces */
  f->o.max_seq_length = 48;
  f->o.threads = 1;
  look(f, false, path);
  OK(mt_map_open(path, &one));
  for (int threads = 2; threads <= 7; threads += 5) {
    assert_int_equal(unlink(path), 0);
    f->o.threads = threads;
    look(f, false, path);
    OK(mt_map_open(path, &many));
    assert_int_equal(one.size_bytes, many.size_bytes);
    assert_memory_equal(one.data, many.data, one.size_bytes);
    mt_map_close(&many);
  }
  mt_map_close(&one);
  /* Nor for what goes wrong: of two bad lines, pieces apart, the first is reported. */
  FILE *file = fopen(f->path, "r+");
  assert_non_null(file);
  static const long places[] = {4 << 20, 5 << 19};
  for (int i = 0; i < 2; i++) {
    int c;
    assert_int_equal(fseek(file, places[i], SEEK_SET), 0);
    while ((c = getc(file)) != '\n') assert_true(c != EOF);
    assert_int_equal(fseek(file, 0, SEEK_CUR), 0);
    assert_true(fputc('!', file) == '!');
  }
  assert_int_equal(fclose(file), 0);
  char first[1024] = "";
  for (int threads = 1; threads <= 4; threads++) {
    f->o.threads = threads;
    FAILS(load(f, &(struct mt_dataset *){0}), MT_EFORMAT, "data.jsonl:");
    if (threads == 1) snprintf(first, sizeof first, "%s", mt_error_message());
    assert_string_equal(first, mt_error_message());
  }
}

/* No byte of the file can change, nor its end be lost, without its being made again. */
static void damage_is_found(void **state) {
  struct fixture *f = *state;
  char path[MT_PATH_MAX];
  struct stat st;
  write_data(f->path, 4000);
  struct mt_hash want = look(f, false, path);
  assert_int_equal(stat(path, &st), 0);
  long size = (long)st.st_size;
  for (long at = 0, step = 0; at < size; at += 1 + step++ % 41) {
    char byte;
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 4;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
    struct mt_dataset *d;
    OK(load(f, &d));
    struct mt_hash sum = contents(d);
    bool cached = mt_dataset_origin(d).cached;
    mt_dataset_close(d);
    /* Blanks between blocks hold nothing. */
    if (cached && !mt_hash_equal(sum, want)) fail_msg("byte %ld goes unnoticed", at);
    assert_true(mt_hash_equal(sum, want));
    if (at < 100) assert_false(cached);
  }
  static const long ends[] = {0, 1, 100, 300};
  for (size_t i = 0; i < 6; i++) {
    assert_int_equal(truncate(path, i < 4 ? ends[i] : size - 1 - 64 * (long)(i - 4)), 0);
    assert_true(mt_hash_equal(look(f, false, path), want));
    assert_true(mt_hash_equal(look(f, true, NULL), want));
  }
  int fd = open(path, O_WRONLY | O_APPEND);
  assert_int_equal(write(fd, "more", 4), 4);
  close(fd);
  assert_true(mt_hash_equal(look(f, false, NULL), want));
}

/* Sound sums over nonsense: what another program wrote there is not followed out of its bounds. */
static void lies_are_not_followed(void **state) {
  struct fixture *f = *state;
  char path[MT_PATH_MAX];
  OK(mt_path_join(path, f->dir, "lies.tokens"));
  struct mt_hash key = {1, 2};
  struct mt_dataset_stats stats = {.samples = 1, .tokens = 4};
  static const struct mt_tokens_record lies[] = {
      {.at = 0, .line = 1, .count = 4, .whole = 4}, /* no lie */
      {.at = 4, .line = 1, .count = 4, .whole = 4},
      {.at = 2, .line = 1, .count = 3, .whole = 4},
      {.at = 0, .line = 1, .count = 5, .whole = 4},
      {.at = 0, .line = 1, .count = -1, .whole = 4},
      {.at = 0, .line = 1, .count = INT32_MAX, .whole = 4},
      {.at = UINT64_MAX - 3, .line = 1, .count = 4, .whole = 4},
  };
  int32_t payload[5] = {1, 2, 9, 4, 0};
  for (size_t i = 0; i < sizeof lies / sizeof *lies + 2; i++) {
    struct mt_tokens_record r = lies[i < sizeof lies / sizeof *lies ? i : 0];
    struct mt_tokens_writer w;
    struct mt_tokens made, read;
    payload[2] = i == sizeof lies / sizeof *lies ? 10 : i > sizeof lies / sizeof *lies ? -1 : 9;
    OK(mt_tokens_create(&w, f->dir));
    OK(mt_tokens_append(&w, &r, 1, payload, sizeof payload));
    OK(mt_tokens_finish(&w, key, &stats, &made));
    OK(mt_tokens_publish(&w, path));
    mt_tokens_release(&w);
    mt_tokens_close(&made);
    if (i == 0) {
      OK(mt_tokens_open(&read, path, key, 10, 2));
      mt_tokens_close(&read);
      FAILS(mt_tokens_open(&read, path, (struct mt_hash){2, 1}, 10, 2), MT_EFORMAT, "damaged");
    } else {
      FAILS(mt_tokens_open(&read, path, key, 10, 2), MT_EFORMAT, "damaged");
    }
  }
}

static void many_writers(void **state) {
  struct fixture *f = *state;
  write_data(f->path, 300000);
  pid_t pid[4];
  for (int i = 0; i < 4; i++) {
    pid[i] = fork();
    assert_true(pid[i] >= 0);
    if (pid[i] == 0) {
      struct mt_dataset *d[2];
      int status = 0;
      for (int k = 0; k < 2; k++) status |= mt_dataset_open(tokenizer, &f->o, &d[k]) != MT_OK;
      for (int k = 0; k < 2; k++) status |= mt_dataset_wait(d[k]) != MT_OK;
      struct mt_hash a = contents(d[0]), b = contents(d[1]);
      _exit(status | !mt_hash_equal(a, b));
    }
  }
  for (int i = 0; i < 4; i++) {
    int status;
    assert_int_equal(waitpid(pid[i], &status, 0), pid[i]);
    assert_int_equal(status, 0);
  }
  assert_int_equal(count_files(f->cache), 1);
  look(f, true, NULL);
}

static void places_that_do_not_do(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d;
  write_data(f->path, 5000);
  struct mt_hash want = look(f, false, NULL);
  f->o.cache_dir = "/proc/no/such"; /* nobody can make that */
  OK(load(f, &d));
  assert_null(mt_dataset_origin(d).cache);
  assert_true(mt_hash_equal(contents(d), want));
  mt_dataset_close(d);
  f->o.cache_dir = f->path; /* a file */
  assert_true(mt_hash_equal(look(f, false, NULL), want));
  assert_int_equal(setenv("TMPDIR", "/proc/no/such", 1), 0); /* then memory has to do */
  assert_true(mt_hash_equal(look(f, false, NULL), want));
  assert_int_equal(unsetenv("TMPDIR"), 0);
  /* A directory where the file should be. */
  char file[MT_PATH_MAX];
  f->o.cache_dir = f->cache;
  look(f, true, file);
  assert_int_equal(unlink(file), 0);
  OK(mt_dir_create(file));
  assert_true(mt_hash_equal(look(f, false, NULL), want));
  assert_int_equal(count_files(f->cache), 1);
}

/* What a name may hold is nothing to the cache's. */
static void names(void **state) {
  struct fixture *f = *state;
  static const char *const hostile[] = {"-rf", "a b;rm $HOME'\"\n\x1b[31m.jsonl", "..x", "\xff\xfe",
                                        "%s%n%s"};
  for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
    char data[MT_PATH_MAX], file[MT_PATH_MAX];
    OK(mt_path_join(data, f->dir, hostile[i]));
    f->o.path = data;
    write_data(data, 500 + 100 * i);
    look(f, false, file);
    const char *name = strrchr(file, '/') + 1;
    assert_int_equal(strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                  "0123456789._-"),
                     strlen(name));
    assert_true(name[0] != '-' && name[0] != '.');
    look(f, true, NULL);
  }
}

static void *feed(void *arg) {
  const struct fixture *f = arg;
  write_data(f->path, 3 << 20);
  return NULL;
}

static void pipes(void **state) {
  struct fixture *f = *state;
  pthread_t writer;
  assert_int_equal(mkfifo(f->path, 0600), 0);
  assert_int_equal(pthread_create(&writer, NULL, feed, f), 0);
  struct mt_hash piped = look(f, false, NULL);
  pthread_join(writer, NULL);
  assert_int_equal(count_files(f->cache), 0);
  assert_int_equal(unlink(f->path), 0);
  write_data(f->path, 3 << 20);
  assert_true(mt_hash_equal(look(f, false, NULL), piped));
}

/* Closing gives up what is not done. */
static void giving_up(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d;
  double share = -1;
  write_data(f->path, 8 << 20);
  OK(mt_dataset_open(tokenizer, &f->o, &d));
  assert_false(mt_dataset_wait_ms(d, 20, &share));
  assert_true(share >= 0 && share < 1);
  mt_dataset_close(d);
  assert_int_equal(count_files(f->cache), 0);
}

/* Ids and masks of a known file. When this changes, what was kept is wrong: raise
 * MT_TOKENS_VERSION, then put the new hash here. */
static void version(void **state) {
  struct fixture *f = *state;
  char text[MT_HASH_TEXT];
  f->o.path = MT_SOURCE_DIR "/data/jargon.eval.jsonl";
  mt_hash_text(look(f, false, NULL), text);
  assert_int_equal(MT_TOKENS_VERSION, 1);
  assert_string_equal(text, "98cd4a985a8938962524471c8ab353fb");
}

#define T(f) cmocka_unit_test_setup_teardown(f, open_fixture, close_fixture)
int main(void) {
  const struct CMUnitTest tests[] = {
      T(a_second_start_finds_them),
      T(everything_that_decides_is_in_the_key),
      T(threads_do_not_matter),
      T(damage_is_found),
      T(lies_are_not_followed),
      T(many_writers),
      T(places_that_do_not_do),
      T(names),
      T(pipes),
      T(giving_up),
      T(version),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  mt_tokenizer_free(tokenizer);
  return failed;
}
