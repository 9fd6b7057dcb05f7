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

/* Messages as between GPUs: those of a direction one after the other, in the order in which a stage
 * starts them, and each waits for its counterpart. An action starts what it receives, waits for it
 * and then sends; it does not wait for that. Fails where nobody can go on. */
struct queue {
  int started, over;
};

/* Number of micro-batch i's message among those of its direction on a stage that receives, sends,
 * or both. */
static int place(int i, bool receives, bool sends, bool sent) {
  return i * (receives + sends) + (sent && receives);
}

static bool has(int stage, int p) {
  return stage >= 0 && stage < p;
}

/* What can be over is. */
static bool deliver(struct queue q[2][STAGES], int p, int m) {
  bool any = false;
  for (int back = 0; back < 2; back++) {
    int step = back ? -1 : 1;
    for (int s = 0; s < p; s++) {
      int to = s + step;
      for (int i = 0; has(to, p) && i < m; i++) {
        int here = place(i, has(s - step, p), true, true);
        int there = place(i, true, has(to + step, p), false);
        struct queue *a = &q[back][s], *b = &q[back][to];
        if (a->over != here || b->over != there || a->started <= here || b->started <= there)
          continue;
        a->over++;
        b->over++;
        any = true;
      }
    }
  }
  return any;
}

static void messages_come_through(bool sequential, int p, int m) {
  struct queue q[2][STAGES] = {0};
  int next[STAGES] = {0};
  bool waits[STAGES] = {0};
  for (int left = p; left > 0;) {
    bool moved = deliver(q, p, m);
    for (int s = 0; s < p; s++) {
      if (next[s] == 2 * m) continue;
      struct mt_stage_action a = mt_stage_action(sequential, s, p, m, next[s]);
      int step = a.backward ? -1 : 1;
      bool receives = has(s - step, p), sends = has(s + step, p);
      struct queue *mine = &q[a.backward][s];
      if (receives && !waits[s]) mine->started++, waits[s] = moved = true;
      if (receives && mine->over <= place(a.micro, receives, sends, false)) continue;
      waits[s] = false;
      mine->started += sends;
      left -= ++next[s] == 2 * m;
      moved = true;
    }
    if (!moved) fail_msg("%d stages, %d micro-batches: messages wait for each other", p, m);
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
      messages_come_through(false, p, m);
      messages_come_through(true, p, m);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(lists_and_times)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
