/* Steps of many ranks on the CPU. */
#include "dist/steps_cases.h"

static void steps_float64(void **state) {
  (void)state;
  steps_on_every_mesh("fp64", (struct near){1e-10, 1e-10, 1e-10, true, true});
}

static void steps_float32(void **state) {
  (void)state;
  steps_on_every_mesh("fp32", (struct near){1e-5, 1e-5, 1e-4, true, true});
}

/* What would run and be wrong. */
static void what_is_not_there_is_refused(void **state) {
  (void)state;
  struct mt_config c = config();
  struct mt_mesh mesh;
  struct mt_ranks ranks;
  if (world.size % 2 == 0) {
    OK(mt_mesh_make(&c, world.size, world.rank, 1, 2, &mesh));
    assert_int_equal(mt_ranks_open(&ranks, &world, &mesh), MT_EUNSUPPORTED);
    assert_non_null(strstr(mt_error_message(), "--pp-size 2"));
  }
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(steps_float64),
                                          cmocka_unit_test(steps_float32),
                                          cmocka_unit_test(what_is_not_there_is_refused)};
DIST_MAIN(tests)
