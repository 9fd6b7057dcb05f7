/* Fails on purpose; CTest expects it to (WILL_FAIL in cmake/Tests.cmake). */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

static void fails(void **state) {
  (void)state;
  assert_int_equal(1, 2);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(fails)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
