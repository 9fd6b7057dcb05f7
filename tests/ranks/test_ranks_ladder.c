/* The ladder on many ranks: every rung of one rank and of several trains on the same tokens with
 * the same weights, read or random, so that the losses are the same; and a mesh that there is not.
 */
#include "ranks/run.h"

#define LADDER "ladder --threads 1 --max-seq-length 16 --warmup-steps 0 --train-steps 1 --json "

static void climb(int ranks, const char *what, int batch, int ep, double loss[3]) {
  char args[1024];
  snprintf(args, sizeof args, LADDER "%s --batch-size %d --ep-size %d --log-level error", what,
           batch, ep);
  struct start s = {.ranks = ranks, .args = args};
  start_well(&s);
  const char *p = strstr(s.out, "\"rungs\":");
  for (int i = 0; i < 3; i++) {
    char rung[32];
    snprintf(rung, sizeof rung, "\"rung\":%d", i);
    p = p ? strstr(p, rung) : NULL;
    if (!p) fail_msg("rung %d is missing in %s", i, s.out);
    const char *end = strchr(p, '}'), *l = strstr(p, "\"loss\":");
    loss[i] = l && l < end ? strtod(l + 7, NULL) : NAN; /* it did not run */
  }
  assert_true(isfinite(loss[0]) && isfinite(loss[1]) && isfinite(loss[2]));
}

static void the_same_work_on_any_mesh(void **state) {
  (void)state;
  static const char *const models[] = {"--model @/model", "--random @/model"};
  for (int i = 0; i < 2; i++) {
    double one[3], many[3];
    climb(0, models[i], 4, 1, one);

    for (int ep = 1; ep <= 2; ep++) {
      for (int ranks = 2; ranks <= 4; ranks += 2) {
        climb(ranks, models[i], 4 / ranks, ep, many);
        for (int k = 0; k < 3; k++) {
          if (!(fabs(many[k] - one[0]) <= 2e-5 * one[0]))
            fail_msg("%s, %d ranks, ep %d, rung %d: loss %.9g, not %.9g", models[i], ranks, ep, k,
                     many[k], one[0]);
        }
      }
    }
  }
}

static void meshes_that_are_not(void **state) {
  (void)state;
  struct start s = {.ranks = 2, .args = LADDER "@/model --ep-size 3"};
  start(&s);
  assert_int_not_equal(s.status, 0);
  assert_non_null(strstr(s.out, "2 ranks cannot be cut into --ep-size 3"));
  s = (struct start){.args = LADDER "@/model --ep-size 2"};
  start(&s);
  assert_int_not_equal(s.status, 0);
  assert_non_null(strstr(s.out, "1 ranks cannot be cut into --ep-size 2"));
}

/* The last rung does not run on any rank, which is no error; what rank 0 alone cannot do then, is.
 */
static void one_ranks_error_behind_a_rung(void **state) {
  (void)state;
  struct start s = {.ranks = 2, .args = LADDER "@/model --svg /proc/none/ladder.svg"};
  start(&s);
  if (s.status <= 0 || !strstr(s.out, "rung 3 did not run") ||
      !strstr(s.out, "moetune: error: rank 0: cannot create '/proc/none"))
    fail_msg("status %d: %s", s.status, s.out);
}

/* A rung that does not run here says why, and has no times. */
static void a_rung_that_does_not_run(void **state) {
  (void)state;
  char command[4 * MT_PATH_MAX];
  snprintf(command, sizeof command,
           "cp -r '%s/seed' '%s/tied' && sed -i 's/embeddings\":false/embeddings\":true/' "
           "'%s/tied/config.json'",
           home, home, home);
  assert_int_equal(system(command), 0);
  struct start s = {.ranks = 2,
                    .args = "ladder --threads 1 --max-seq-length 16 --warmup-steps 0 "
                            "--train-steps 1 --random @/tied"};
  start_well(&s);
  assert_non_null(strstr(s.out, "did not run: --pp-size 2: tie_word_embeddings"));
  const char *row = strstr(s.out, "  optimizer ");
  assert_non_null(row);
  row += strlen("  optimizer ");
  assert_int_equal(row[strspn(row, " ")], '-');
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_same_work_on_any_mesh), cmocka_unit_test(meshes_that_are_not),
    cmocka_unit_test(one_ranks_error_behind_a_rung), cmocka_unit_test(a_rung_that_does_not_run)};
int main(void) {
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
