/* safetensors files: round trip, and every way in which one can lie. */
#include "io/safetensors.h"
#include "temp_dir.h"

#include <signal.h>
#include <sys/resource.h>

/* Header text and a body of `body` zero bytes as a file in memory. */
static size_t build(uint8_t *out, const char *header, size_t body) {
  size_t n = strlen(header);
  for (int i = 0; i < 8; i++) out[i] = (uint8_t)((uint64_t)n >> (8 * i));
  memcpy(out + 8, header, n);
  memset(out + 8 + n, 0, body);
  return 8 + n + body;
}

static void refused(void **state) {
  (void)state;
  static const struct {
    const char *header;
    size_t body;
    const char *names;
  } cases[] = {
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4, "outside"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 12, "behind the last"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8, "need 12 bytes"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "outside"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, "outside"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
       "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}",
       6, "overlaps"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
       "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}",
       12, "hole"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
       "overflows"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", 4, "no size"},
      {"{\"a\":{\"dtype\":\"Q9\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype"},
      {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "data_offsets"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
       "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
       4, "duplicate"},
      {"{\"\xff\":1}", 0, "header"},
      {"[1]", 0, "no object"},
      {"{\"a\":3}", 0, "dtype"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    uint8_t data[512];
    struct mt_st_file f = {0};
    size_t n = build(data, cases[i].header, cases[i].body);
    FAILS(mt_st_parse(data, n, "file.safetensors", &f), MT_EFORMAT, cases[i].names);
    assert_non_null(strstr(mt_error_message(), "file.safetensors"));
  }
}

static void header_length_lies(void **state) {
  (void)state;
  uint8_t data[32] = {0};
  struct mt_st_file f = {0};
  FAILS(mt_st_parse(data, 7, "f", &f), MT_EFORMAT, "too few");
  data[7] = 0x80; /* 2^63 */
  FAILS(mt_st_parse(data, sizeof data, "f", &f), MT_EFORMAT, "header length 9223372036854775808");
  memset(data, 0, 8);
  data[0] = 25; /* one more than there is */
  FAILS(mt_st_parse(data, sizeof data, "f", &f), MT_EFORMAT, "header length 25");
}

static void round_trip(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(path, dir, "x.safetensors"));
  const float a[3] = {1, 2, 3};
  const struct mt_st_entry entries[] = {
      {"b.a", "F32", 1, {3}, 12}, {"a.empty", "BF16", 2, {0, 4}, 0}, {"scalar", "U8", 0, {0}, 1}};
  struct mt_st_writer w;
  OK(mt_st_create(&w, path, entries, 3));
  OK(mt_st_write(&w, a, sizeof a));
  OK(mt_st_write(&w, "x", 1));
  OK(mt_st_finish(&w));
  mt_st_abort(&w);
  struct mt_st_file f;
  OK(mt_st_open(path, &f));
  assert_int_equal(f.count, 3);
  const struct mt_st_tensor *t = mt_st_find(&f, "b.a");
  assert_non_null(t);
  assert_int_equal(t->dtype, MT_F32);
  assert_memory_equal(t->data, a, sizeof a);
  assert_null(mt_st_find(&f, "b"));
  assert_int_equal(*mt_st_find(&f, "scalar")->data, 'x');
  mt_st_close(&f);
  /* Fewer bytes than declared: nothing appears, the old file stays. */
  OK(mt_st_create(&w, path, entries, 3));
  OK(mt_st_write(&w, "y", 1));
  FAILS(mt_st_finish(&w), MT_EINVAL, "13 bytes declared, 1 written");
  OK(mt_st_open(path, &f));
  mt_st_close(&f);
  OK(mt_dir_remove(dir));
}

/* No room left on the device, as the limit of a file's size: the earlier file stays whole. */
static void no_space(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  struct rlimit old, small;
  temp_dir(dir);
  OK(mt_path_join(path, dir, "x.safetensors"));
  temp_text(dir, "x.safetensors", "old");
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  small = old;
  small.rlim_cur = 4096;
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
  static char big[10000];
  struct mt_st_writer w;
  mt_err err = mt_st_create(&w, path, &(struct mt_st_entry){"a", "U8", 1, {10000}, 10000}, 1);
  if (!err) err = mt_st_write(&w, big, sizeof big);
  setrlimit(RLIMIT_FSIZE, &old);
  FAILS(err, MT_EIO, "x.safetensors");
  mt_st_abort(&w);
  char *text;
  size_t size;
  OK(mt_file_read(path, 100, &text, &size));
  assert_string_equal(text, "old");
  free(text);
  OK(mt_path_join(path, dir, "missing.safetensors"));
  struct mt_st_file f;
  FAILS(mt_st_open(path, &f), MT_ENOENT, "missing.safetensors");
  OK(mt_dir_remove(dir));
}

static void directories_appear_whole(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], file[MT_PATH_MAX], *text;
  size_t size;
  struct mt_dir_txn t;
  temp_dir(dir);
  OK(mt_path_join(path, dir, "out"));
  OK(mt_path_join(file, path, "f"));
  for (int round = 0; round < 2; round++) { /* new, then in place of an old one */
    OK(mt_dir_begin(&t, path));
    temp_text(t.temp, "f", round ? "new" : "old");
    if (round == 0) assert_false(mt_path_exists(path));
    OK(mt_dir_commit(&t));
    mt_dir_abort(&t);
    OK(mt_file_read(file, 100, &text, &size));
    assert_string_equal(text, round ? "new" : "old");
    free(text);
    assert_false(mt_path_exists(t.temp));
  }
  OK(mt_dir_begin(&t, path));
  temp_text(t.temp, "f", "never");
  mt_dir_abort(&t);
  OK(mt_file_read(file, 100, &text, &size));
  assert_string_equal(text, "new");
  free(text);
  FAILS(mt_file_read(file, 2, &text, &size), MT_EFORMAT, "more than the 2 allowed");
  FAILS(mt_dir_create("/proc/no/such"), MT_ENOENT, "/proc/no");
  OK(mt_dir_remove(dir));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(refused),
      cmocka_unit_test(header_length_lies),
      cmocka_unit_test(round_trip),
      cmocka_unit_test(no_space),
      cmocka_unit_test(directories_appear_whole),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
