/* What faults.c writes down of a run's file calls, one record after another: a header, the paths
 * (without a 0 at their ends), the data. Calls that failed are not in it. */
#ifndef MT_TESTS_FAULTS_TRACE_H
#define MT_TESTS_FAULTS_TRACE_H

#include <stdint.h>

enum trace_kind {
  TRACE_OPEN,     /* a: path, flags as open's; fd */
  TRACE_CONTENT,  /* fd; data: all that the file holds now */
  TRACE_SYNC,     /* fd: of a file or a directory */
  TRACE_CLOSE,    /* fd */
  TRACE_RENAME,   /* a to b */
  TRACE_EXCHANGE, /* a and b */
  TRACE_LINK,     /* a ("/proc/self/fd/N" for one without a name) as b */
  TRACE_UNLINK,   /* a; a directory too */
  TRACE_MKDIR     /* a */
};

struct trace_record {
  int32_t kind, fd, flags;
  uint32_t a_length, b_length, data_length;
  int64_t told; /* bytes of standard error at that time */
};

#endif
