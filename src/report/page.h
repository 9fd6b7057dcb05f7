/* The page's sections, written one after another. */
#ifndef MT_REPORT_PAGE_H
#define MT_REPORT_PAGE_H

#include <stdio.h>

#include "report/run.h"

/* refresh_s > 0: browsers load the page again after so many seconds. */
mt_err mt_page_write(FILE *f, const struct mt_run *runs, int count, double refresh_s);

/* Load, entropy and idle experts of every run. */
mt_err mt_page_experts(FILE *f, const struct mt_run *runs, int count);
/* Warnings, samples, configuration. */
void mt_page_warnings(FILE *f, const struct mt_run *runs, int count);
void mt_page_samples(FILE *f, const struct mt_run *runs, int count);
void mt_page_configuration(FILE *f, const struct mt_run *runs, int count);

#endif
