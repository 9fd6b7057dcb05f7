/* A run directory as one HTML page to look at: plots, experts, samples, configuration. The page
 * holds everything it needs (no network, no file beside it), is readable without its script, and
 * its size does not grow with the number of steps. */
#ifndef MT_REPORT_REPORT_H
#define MT_REPORT_REPORT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/files.h"

enum { MT_REPORT_RUNS = 8 }; /* that one page compares at most */

struct mt_report_options {
  const char *const *dirs; /* run directories, 1 to MT_REPORT_RUNS */
  int dir_count;
  const char *out; /* the page; NULL: report.html in the directory, or comparison.html in the first
                      of several */
  bool watch;      /* write it anew as the runs go on, until the last has ended or a signal */
  double interval_s; /* between looks at the files, with watch */
};

/* Reads metrics.jsonl, samples.jsonl and run.json of each directory (each may be missing, but not
 * all) and writes the page, which appears whole. path (=) its name, [MT_PATH_MAX].
 * A last line without its end is passed over: it is being written. Errors: MT_ENOENT naming a
 * directory that holds no run; MT_EFORMAT naming FILE:LINE; MT_EIO. */
mt_err mt_report_write(const struct mt_report_options *options, char path[MT_PATH_MAX]);

#endif
