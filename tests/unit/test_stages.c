/* The order of a pipeline's work: each stage's list, and what all of them take together. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "par/pipeline.h"

enum { STAGES = 8, MICRO = 12, FORWARD = 2, BACKWARD = 3 };

/* Everything once, in the micro-batches' order, no more kept than is said, and as many. */
static void check_list(bool sequential, int stage, int p, int m) {
  int forward = 0, backward = 0, most = 0;
  for (int k = 0; k < 2 * m; k++) {
    struct mt_stage_action a = mt_stage_action(sequential, stage, p, m, k);
    assert_int_equal(a.micro, a.backward ? backward++ : forward++);
    assert_true(backward <= forward);
    if (forward - backward > most) most = forward - backward;
  }
  assert_int_equal(forward, m);
  assert_int_equal(backward, m);
  int bound = sequential ? 1 : p - stage;
  assert_int_equal(mt_stage_in_flight(sequential, stage, p, m), bound < m ? bound : m);
  /* What has come forward and is not back: one more than stays for the last backward's turn. */
  assert_int_equal(most, bound < m ? bound : m);
}

/* Time at which the last action is over, each stage doing its list as soon as its neighbours have
 * done what it needs; fails where nobody can go on. */
static int makespan(bool sequential, int p, int m) {
  int done_at[2][STAGES][MICRO], next[STAGES] = {0}, free_at[STAGES] = {0}, left = p, end = 0;
  bool done[2][STAGES][MICRO] = {0};
  while (left > 0) {
    bool moved = false;
    for (int s = 0; s < p; s++) {
      if (next[s] == 2 * m) continue;
      struct mt_stage_action a = mt_stage_action(sequential, s, p, m, next[s]);
      int before = a.backward ? s + 1 : s - 1, at = free_at[s];
      if (before >= 0 && before < p) {
        if (!done[a.backward][before][a.micro]) continue;
        if (done_at[a.backward][before][a.micro] > at) at = done_at[a.backward][before][a.micro];
      }
      free_at[s] = at + (a.backward ? BACKWARD : FORWARD);
      done[a.backward][s][a.micro] = true;
      done_at[a.backward][s][a.micro] = free_at[s];
      if (free_at[s] > end) end = free_at[s];
      left -= ++next[s] == 2 * m;
      moved = true;
    }
    if (!moved) fail_msg("%d stages, %d micro-batches: nobody can go on", p, m);
  }
  return end;
}

/* Messages in groups, as between GPUs: before an action what it needs comes, in one group with what
 * the action before sends, and the group is over when all its counterparts have set out. Fails
 * where nobody can go on. */
struct group {
  int send, recv; /* actions, -1: none */
};

static struct group group_before(bool sequential, int s, int p, int m, int k) {
  struct group g = {-1, -1};
  if (k > 0) {
    struct mt_stage_action a = mt_stage_action(sequential, s, p, m, k - 1);
    if (a.backward ? s > 0 : s + 1 < p) g.send = k - 1;
  }
  if (k < 2 * m) {
    struct mt_stage_action a = mt_stage_action(sequential, s, p, m, k);
    if (a.backward ? s + 1 < p : s > 0) g.recv = k;
  }
  return g;
}

/* The number of an action in a stage's list. */
static int number_of(bool sequential, int s, int p, int m, struct mt_stage_action a) {
  for (int k = 0;; k++) {
    struct mt_stage_action b = mt_stage_action(sequential, s, p, m, k);
    if (a.backward == b.backward && a.micro == b.micro) return k;
  }
}

static void groups_come_through(bool sequential, int p, int m) {
  int set_out[STAGES] = {0}, over[STAGES] = {0}; /* groups of each stage */
  for (int left = p; left > 0;) {
    bool moved = false;
    for (int s = 0; s < p; s++) {
      if (over[s] > 2 * m) continue;
      if (set_out[s] == over[s]) set_out[s]++, moved = true;
      struct group g = group_before(sequential, s, p, m, over[s]);
      if (g.send >= 0) {
        struct mt_stage_action a = mt_stage_action(sequential, s, p, m, g.send);
        int peer = a.backward ? s - 1 : s + 1;
        if (set_out[peer] <= number_of(sequential, peer, p, m, a)) continue;
      }
      if (g.recv >= 0) {
        struct mt_stage_action a = mt_stage_action(sequential, s, p, m, g.recv);
        int peer = a.backward ? s + 1 : s - 1;
        if (set_out[peer] <= number_of(sequential, peer, p, m, a) + 1) continue;
      }
      left -= ++over[s] > 2 * m;
      moved = true;
    }
    if (!moved) fail_msg("%d stages, %d micro-batches: groups wait for each other", p, m);
  }
}

static void lists_and_times(void **state) {
  (void)state;
  for (int p = 1; p <= STAGES; p++) {
    for (int m = 1; m <= MICRO; m++) {
      for (int s = 0; s < p; s++) {
        check_list(false, s, p, m);
        check_list(true, s, p, m);
      }
      assert_int_equal(makespan(false, p, m), (m + p - 1) * (FORWARD + BACKWARD));
      assert_int_equal(makespan(true, p, m), m * p * (FORWARD + BACKWARD));
      groups_come_through(false, p, m);
      groups_come_through(true, p, m);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(lists_and_times)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
