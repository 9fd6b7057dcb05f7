/* What a run writes down: TensorBoard's records, the best evaluation, experts without tokens, lines
 * kept by a resumed run. */
#include <math.h>

#include "temp_dir.h"
#include "train/evaluation.h"
#include "train/health.h"
#include "train/metrics.h"
#include "train/tensorboard.h"

#include <dirent.h>

/* RFC 3720, appendix B.4, and the catalogue's check value. */
static void crc32c_vectors(void **state) {
  (void)state;
  uint8_t bytes[32] = {0};
  assert_int_equal(mt_crc32c(bytes, 32), 0x8a9136aau);
  memset(bytes, 0xff, sizeof bytes);
  assert_int_equal(mt_crc32c(bytes, 32), 0x62a8ab43u);
  for (int i = 0; i < 32; i++) bytes[i] = (uint8_t)i;
  assert_int_equal(mt_crc32c(bytes, 32), 0x46dd794eu);
  for (int i = 0; i < 32; i++) bytes[i] = (uint8_t)(31 - i);
  assert_int_equal(mt_crc32c(bytes, 32), 0x113fdb5cu);
  assert_int_equal(mt_crc32c("123456789", 9), 0xe3069283u);
  /* The length of the record that opens every event file of TensorFlow's, 24, and its checksum. */
  const uint8_t length[8] = {24};
  assert_int_equal(mt_crc32c_masked(length, 8), 0x224b7fa3u);
}

static uint64_t little(const uint8_t *p, int bytes) {
  uint64_t x = 0;
  for (int i = 0; i < bytes; i++) x |= (uint64_t)p[i] << 8 * i;
  return x;
}

/* A field of a protocol buffer; at moves behind it. */
struct field {
  int number, wire;
  uint64_t value; /* or the length of bytes */
  const uint8_t *bytes;
};

static uint64_t varint(const uint8_t **at) {
  uint64_t x = 0;
  for (int shift = 0;; shift += 7) {
    uint8_t b = *(*at)++;
    x |= (uint64_t)(b & 0x7f) << shift;
    if (!(b & 0x80)) return x;
  }
}

static struct field next_field(const uint8_t **at) {
  uint64_t key = varint(at);
  struct field f = {.number = (int)(key >> 3), .wire = (int)(key & 7)};
  int fixed = f.wire == 1 ? 8 : f.wire == 5 ? 4 : 0;
  if (f.wire == 0) f.value = varint(at);
  if (fixed) {
    f.value = little(*at, fixed);
    *at += fixed;
  }
  if (f.wire == 2) {
    f.value = varint(at);
    f.bytes = *at;
    *at += f.value;
  }
  return f;
}

static int check_value(const struct field *summary, const char *tag, float expected) {
  const uint8_t *at = summary->bytes;
  struct field value = next_field(&at);
  assert_ptr_equal(at, summary->bytes + summary->value);
  assert_int_equal(value.number, 1);
  at = value.bytes;
  struct field name = next_field(&at), number = next_field(&at);
  assert_int_equal(name.number, 1);
  if (name.value != strlen(tag) || memcmp(name.bytes, tag, name.value) != 0) return 0;
  if (number.wire == 5) {
    float x;
    uint32_t bits = (uint32_t)number.value;
    memcpy(&x, &bits, 4);
    assert_int_equal(number.number, 2);
    assert_true(x == expected);
  } else {
    assert_int_equal(number.number, 8); /* a tensor, then what plug-in shows it */
    assert_int_equal(next_field(&at).number, 9);
  }
  assert_ptr_equal(at, value.bytes + value.value);
  return 1;
}

static void event_file(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX] = "";
  struct mt_tensorboard t;
  temp_dir(dir);
  OK(mt_tensorboard_open(&t, dir, 41));
  mt_tensorboard_begin(&t, 300);
  mt_tensorboard_scalar(&t, "train/loss", 1.5);
  mt_tensorboard_text(&t, "warnings", "two\nlines");
  mt_tensorboard_scalar(&t, "held_out/loss", -2);
  OK(mt_tensorboard_end(&t));
  static char huge[MT_TB_EVENT_MAX + 1];
  memset(huge, 'x', sizeof huge - 1);
  mt_tensorboard_begin(&t, 301);
  mt_tensorboard_text(&t, "huge", huge); /* left out, the event stays whole */
  OK(mt_tensorboard_end(&t));
  mt_tensorboard_close(&t);
  mt_tensorboard_scalar(&t, "closed", 1);
  OK(mt_tensorboard_end(&t));

  DIR *d = opendir(dir);
  for (struct dirent *e; (e = readdir(d));) {
    if (strncmp(e->d_name, "events.out.tfevents.", 20) == 0) OK(mt_path_join(path, dir, e->d_name));
  }
  closedir(d);
  struct mt_map map;
  OK(mt_map_open(path, &map));
  const uint8_t *at = map.data, *end = map.data + map.size_bytes;
  uint64_t steps[4];
  int n = 0, values = 0;
  for (; at < end; n++) {
    assert_true(n < 4);
    uint64_t length = little(at, 8);
    assert_int_equal(little(at + 8, 4), mt_crc32c_masked(at, 8));
    const uint8_t *event = at + 12, *p = event;
    assert_int_equal(little(event + length, 4), mt_crc32c_masked(event, length));
    steps[n] = 0;
    while (p < event + length) {
      struct field f = next_field(&p);
      if (f.number == 2) steps[n] = f.value;
      if (n == 0 && f.number == 3) assert_memory_equal(f.bytes, "brain.Event:2", 13);
      if (n == 1 && f.number == 7) assert_memory_equal(f.bytes, "\x08\x01", 2); /* START */
      if (f.number != 5) continue;
      values += check_value(&f, "train/loss", 1.5f);
      values += check_value(&f, "held_out/loss", -2);
      values += check_value(&f, "warnings", 0);
    }
    assert_ptr_equal(p, event + length);
    at = event + length + 4;
  }
  assert_int_equal(n, 4);
  assert_int_equal(little(map.data, 8), 24);
  assert_int_equal(steps[1], 42);
  assert_int_equal(steps[2], 300);
  assert_int_equal(values, 3);
  mt_map_close(&map);
  OK(mt_dir_remove(dir));
}

static void best_and_patience(void **state) {
  (void)state;
  struct mt_best b = {0};
  assert_true(mt_best_update(&b, 0, 3.0, 0.1));
  assert_false(mt_best_update(&b, 10, 2.95, 0.1)); /* not by enough */
  assert_int_equal(b.since, 1);
  assert_false(
      mt_best_update(&b, 10, 2.0, 0.1)); /* the same step again, as a resumed run sees it */
  assert_int_equal(b.since, 1);
  assert_true(mt_best_update(&b, 20, 2.5, 0.1));
  assert_int_equal(b.step, 20);
  assert_int_equal(b.since, 0);
  assert_false(mt_best_update(&b, 30, NAN, 0.1));
  assert_int_equal(b.since, 1);
}

static void resumed_files(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], path[MT_PATH_MAX], *text;
  size_t size;
  struct mt_best b;
  temp_dir(dir);
  OK(mt_metrics_best(dir, 9, 0, &b));
  assert_false(b.any);
  temp_text(dir, "metrics.jsonl",
            "{\"step\":0,\"eval_loss\":4.5}\n{\"step\":1,\"loss\":1}\n"
            "{\"step\":2,\"eval_loss\":4.25}\n{\"step\":4,\"eval_loss\":4.75}\n"
            "{\"step\":5,\"loss\":1}\n{\"step\":6,\"eval_loss\":1}\n{\"step\":3,\"lo");
  OK(mt_metrics_best(dir, 5, 0, &b));
  assert_true(b.loss == 4.25f);
  assert_int_equal(b.step, 2);
  assert_int_equal(b.since, 1);
  OK(mt_path_join(path, dir, "metrics.jsonl"));
  OK(mt_lines_keep(path, 4));
  OK(mt_file_read(path, 1 << 16, &text, &size));
  assert_string_equal(text, "{\"step\":0,\"eval_loss\":4.5}\n{\"step\":1,\"loss\":1}\n"
                            "{\"step\":2,\"eval_loss\":4.25}\n{\"step\":4,\"eval_loss\":4.75}\n");
  free(text);
  OK(mt_path_join(path, dir, "absent.jsonl"));
  OK(mt_lines_keep(path, 4));
  assert_false(mt_path_exists(path));
  OK(mt_dir_remove(dir));
}

static void silent_experts(void **state) {
  (void)state;
  struct mt_expert_watch w;
  char text[64];
  OK(mt_expert_watch_create(&w, 2, 3, 4, 10));
  const int32_t all[6] = {1, 1, 1, 1, 1, 1}, some[6] = {5, 0, 2, 0, 0, 7};
  assert_int_equal(mt_expert_watch_step(&w, 11, all, text, sizeof text), 0);
  for (int step = 12; step < 15; step++)
    assert_int_equal(mt_expert_watch_step(&w, step, some, text, sizeof text), 0);
  assert_int_equal(mt_expert_watch_step(&w, 15, some, text, sizeof text), 3);
  assert_string_equal(text, "layer 0: 1; layer 1: 0 1");
  assert_int_equal(mt_expert_watch_step(&w, 16, some, text, sizeof text), 0); /* told once */
  assert_int_equal(mt_expert_watch_step(&w, 17, all, text, sizeof text), 0);
  for (int step = 18; step < 21; step++)
    assert_int_equal(mt_expert_watch_step(&w, step, some, text, sizeof text), 0);
  assert_int_equal(mt_expert_watch_step(&w, 21, some, text, 41), 3); /* room for one */
  assert_string_equal(text, "layer 0: 1");
  mt_expert_watch_destroy(&w);
  OK(mt_expert_watch_create(&w, 2, 3, 0, 0));
  assert_int_equal(mt_expert_watch_step(&w, 1, some, text, sizeof text), 0);
  mt_expert_watch_destroy(&w);
}

static void loads_in_numbers(void **state) {
  (void)state;
  const int32_t load[4] = {2, 0, 1, 1}, none[4] = {0};
  struct mt_load_facts f = mt_load_facts(load, 4);
  assert_true(f.most == 0.5 && f.least == 0 && f.idle == 1);
  assert_true(fabs(f.entropy - 1.5 * log(2)) < 1e-12);
  assert_int_equal(mt_load_facts(none, 4).idle, 0);
  const double even[3] = {7, 7, 7}, sure[3] = {0, 800, -800}, some[2] = {0, log(3)};
  assert_true(fabs(mt_softmax_entropy(even, 3) - log(3)) < 1e-12);
  assert_true(fabs(mt_softmax_entropy(sure, 3)) < 1e-12);
  assert_true(fabs(mt_softmax_entropy(some, 2) - (log(4) - 0.75 * log(3))) < 1e-12);
  const int64_t shares[6] = {0, 0, 0, 1, 2, 1};
  double least, most;
  mt_routing_shares(shares, 2, 3, &least, &most);
  assert_true(least == 0.25 && most == 0.5);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(crc32c_vectors),    cmocka_unit_test(event_file),
      cmocka_unit_test(best_and_patience), cmocka_unit_test(resumed_files),
      cmocka_unit_test(silent_experts),    cmocka_unit_test(loads_in_numbers),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
