/* Hashes of files, and a directory's list of them: every damaged byte is found and its file named.
 */
#include "base/hash.h"
#include "temp_dir.h"
#include "io/checksums.h"

#define LIST "moetune-checksums.json"

static void known_hashes(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], text[MT_HASH_TEXT];
  struct mt_hash h;
  uint64_t size;
  /* xxhsum -H2 */
  mt_hash_text(mt_hash_bytes("", 0), text);
  assert_string_equal(text, "99aa06d3014798d86001c324468d497f");
  mt_hash_text(mt_hash_bytes("abc", 3), text);
  assert_string_equal(text, "06b05ab6733a618578af5f94892f3950");
  temp_dir(dir);
  OK(mt_path_join(path, dir, "file"));
  size_t n = (5 << 20) + 3; /* several pieces */
  uint8_t *data = malloc(n);
  assert_non_null(data);
  for (size_t i = 0; i < n; i++) data[i] = (uint8_t)(i * i >> 7);
  temp_file(dir, "file", data, n);
  OK(mt_hash_file(path, &h, &size));
  assert_int_equal(size, n);
  assert_true(mt_hash_equal(h, mt_hash_bytes(data, n)));
  data[n - 1] ^= 1;
  assert_false(mt_hash_equal(h, mt_hash_bytes(data, n)));
  free(data);
  FAILS(mt_hash_file(dir, &h, NULL), MT_EIO, dir);
  OK(mt_dir_remove(dir));
  FAILS(mt_hash_file(path, &h, NULL), MT_ENOENT, path);
}

static void flip(const char *dir, const char *name, size_t at) {
  char path[MT_PATH_MAX], *data;
  size_t size;
  OK(mt_path_join(path, dir, name));
  OK(mt_file_read(path, 1 << 20, &data, &size));
  assert_true(at < size);
  data[at] ^= 0x10;
  temp_file(dir, name, data, size);
  free(data);
}

static void damage_is_named(void **state) {
  (void)state;
  static const char *const names[] = {"a.safetensors", "b \"quoted\" \xc3\xa9.json", "empty"};
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  bool listed = true;
  temp_dir(dir);
  temp_text(dir, names[0], "some weights");
  temp_text(dir, names[1], "{}");
  temp_text(dir, names[2], "");
  OK(mt_checksums_verify(dir, &listed));
  assert_false(listed);
  OK(mt_checksums_write(dir));
  OK(mt_checksums_verify(dir, &listed));
  assert_true(listed);
  for (size_t at = 0; at < strlen("some weights"); at++) {
    flip(dir, names[0], at);
    FAILS(mt_checksums_verify(dir, &listed), MT_EFORMAT, "a.safetensors' is damaged");
    flip(dir, names[0], at);
  }
  OK(mt_checksums_verify(dir, &listed));
  flip(dir, names[1], 1);
  FAILS(mt_checksums_verify(dir, &listed), MT_EFORMAT, names[1]);
  flip(dir, names[1], 1);
  temp_text(dir, names[2], "x");
  FAILS(mt_checksums_verify(dir, &listed), MT_EFORMAT, "empty' is damaged: 1 bytes, 0");
  OK(mt_path_join(path, dir, names[2]));
  assert_int_equal(unlink(path), 0);
  FAILS(mt_checksums_verify(dir, &listed), MT_EFORMAT, "empty' is missing");
  temp_text(dir, names[2], "");
  temp_text(dir, "more", "that came later");
  OK(mt_checksums_verify(dir, &listed));
  OK(mt_checksums_demand(dir));
  OK(mt_dir_remove(dir));
}

/* What is listed stays as it is listed, read or not; what is new is listed too. */
static void a_list_is_extended(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  bool listed;
  temp_dir(dir);
  temp_text(dir, "weights", "abc");
  FAILS(mt_checksums_demand(dir), MT_ENOENT, LIST);
  OK(mt_checksums_extend(dir));
  OK(mt_checksums_demand(dir));
  flip(dir, "weights", 1);
  temp_text(dir, "state", "later");
  OK(mt_checksums_extend(dir));
  FAILS(mt_checksums_verify(dir, &listed), MT_EFORMAT, "weights' is damaged");
  flip(dir, "weights", 1);
  OK(mt_checksums_demand(dir));
  flip(dir, "state", 1);
  FAILS(mt_checksums_demand(dir), MT_EFORMAT, "state' is damaged");
  OK(mt_path_join(path, dir, LIST));
  flip(dir, LIST, 20);
  FAILS(mt_checksums_extend(dir), MT_EFORMAT, LIST);
  OK(mt_dir_remove(dir));
}

/* Whatever byte of the list is hit, the list is named, or it says the same as before. */
static void damage_of_the_list(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], *data;
  size_t size;
  bool listed;
  temp_dir(dir);
  temp_text(dir, "weights", "abc");
  OK(mt_checksums_write(dir));
  OK(mt_path_join(path, dir, LIST));
  OK(mt_file_read(path, 1 << 20, &data, &size));
  assert_non_null(strstr(data, "06b05ab6733a618578af5f94892f3950"));
  free(data);
  int found = 0;
  for (size_t at = 0; at < size; at++) {
    flip(dir, LIST, at);
    mt_err err = mt_checksums_verify(dir, &listed);
    if (err && !strstr(mt_error_message(), LIST)) fail_msg("%zu: %s", at, mt_error_message());
    found += err != MT_OK;
    flip(dir, LIST, at);
  }
  assert_true(found > (int)size / 2);
  temp_text(dir, LIST, "{}");
  FAILS(mt_checksums_verify(dir, &listed), MT_EFORMAT, LIST);
  temp_text(dir, LIST, "{\"version\": 99}");
  FAILS(mt_checksums_verify(dir, &listed), MT_EUNSUPPORTED, "later version");
  OK(mt_dir_remove(dir));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(known_hashes), cmocka_unit_test(damage_is_named),
      cmocka_unit_test(a_list_is_extended), cmocka_unit_test(damage_of_the_list)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
