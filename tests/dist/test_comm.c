/* Communicators over the host's memory: MPI, or one rank. */
#include "dist/comm_cases.h"

static const struct CMUnitTest tests[] = {COMM_CASES};
DIST_MAIN(tests)
