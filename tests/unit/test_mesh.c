/* The mesh: every rank in its place, groups that partition the world, bad sizes refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "par/mesh.h"

static struct mt_mesh mesh(const struct mt_config *c, int world, int rank, int ep, int pp) {
  struct mt_mesh m;
  assert_int_equal(mt_mesh_make(c, world, rank, ep, pp, &m), MT_OK);
  return m;
}

static void groups_partition_the_world(void **state) {
  (void)state;
  struct mt_config c = {.layers = 7, .experts = 8};
  const int sizes[][3] = {{1, 1, 1},  {8, 1, 1},  {8, 2, 1}, {8, 2, 2},
                          {12, 2, 3}, {16, 8, 2}, {7, 1, 7}};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    int world = sizes[s][0];
    for (int g = 0; g < MT_GROUP_COUNT; g++) {
      for (int rank = 0; rank < world; rank++) {
        struct mt_mesh m = mesh(&c, world, rank, sizes[s][1], sizes[s][2]);
        struct mt_group_span span = mt_mesh_group(&m, (enum mt_group)g);
        assert_int_equal(span.first + span.index * span.stride, rank);
        assert_in_range(span.index, 0, span.count - 1);
        /* Every member names the same members. */
        for (int i = 0; i < span.count; i++) {
          struct mt_mesh other = mt_mesh_of(&m, &c, span.first + i * span.stride);
          struct mt_group_span seen = mt_mesh_group(&other, (enum mt_group)g);
          assert_int_equal(seen.first, span.first);
          assert_int_equal(seen.stride, span.stride);
          assert_int_equal(seen.count, span.count);
          assert_int_equal(seen.index, i);
        }
      }
    }
  }
}

static void everything_is_held(void **state) {
  (void)state;
  struct mt_config c = {.layers = 7, .experts = 8};
  int held[7][8] = {{0}};
  for (int rank = 0; rank < 24; rank++) {
    struct mt_mesh m = mesh(&c, 24, rank, 4, 3);
    assert_int_equal(m.dp, 2);
    assert_int_equal(mt_mesh_readers(&m), 8);
    for (int64_t l = m.layer_begin; l < m.layer_end; l++) {
      for (int64_t e = m.expert_begin; e < m.expert_end; e++) held[l][e]++;
    }
  }
  for (int l = 0; l < 7; l++) {
    for (int e = 0; e < 8; e++) assert_int_equal(held[l][e], 2);
  }
  /* Stages of nearly the same size, the first with more. */
  struct mt_mesh first = mesh(&c, 3, 0, 1, 3), last = mesh(&c, 3, 2, 1, 3);
  assert_int_equal(first.layer_end - first.layer_begin, 3);
  assert_int_equal(last.layer_end - last.layer_begin, 2);
}

static void bad_sizes_are_named(void **state) {
  (void)state;
  struct mt_config c = {.layers = 4, .experts = 8};
  const struct {
    int world, ep, pp;
    const char *says;
  } cases[] = {{8, 0, 1, "--ep-size 0"},
               {8, 3, 1, "not a multiple of 3"},
               {6, 3, 1, "does not divide the model's 8 experts"},
               {8, 1, 8, "more than the model's 4 layers"},
               {8, 2, -1, "--pp-size -1"},
               {1, 1 << 16, 1 << 16, "not a multiple of 4294967296"},
               {2, 1 << 16, 1 << 15, "not a multiple of 2147483648"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct mt_mesh m;
    assert_int_equal(mt_mesh_make(&c, cases[i].world, 0, cases[i].ep, cases[i].pp, &m), MT_EINVAL);
    if (!strstr(mt_error_message(), cases[i].says)) fail_msg("%s", mt_error_message());
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(groups_partition_the_world),
                                     cmocka_unit_test(everything_is_held),
                                     cmocka_unit_test(bad_sizes_are_named)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
