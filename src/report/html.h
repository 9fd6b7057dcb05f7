/* Pieces of HTML: what comes from a run's files is escaped here and nowhere else. */
#ifndef MT_REPORT_HTML_H
#define MT_REPORT_HTML_H

#include <jansson.h>
#include <stdint.h>
#include <stdio.h>

enum { MT_SHORT_TEXT = 48 };

/* Text for an element or a quoted attribute: & < > " ' escaped, control characters but tab and line
 * end, and bytes that are no UTF-8, as U+FFFD. */
void mt_html_text(FILE *f, const char *text);
/* A JSON value as a person writes it: strings bare, numbers short, lists with commas; NULL: "–". */
void mt_html_json(FILE *f, const json_t *value);

/* Numbers for people, in out[MT_SHORT_TEXT]; "–" for NaN. */
const char *mt_short_number(char *out, double x); /* 4 digits: 0.0123, 1234, 12.3k, 4.5M, 1.2e-5 */
const char *mt_short_percent(char *out, double share);
const char *mt_short_bytes(char *out, double bytes); /* 1.23 GB, powers of 1000 */
const char *mt_short_seconds(char *out, double seconds);
const char *mt_short_date(char *out, int64_t seconds_since_1970); /* UTC */

/* Axis ticks at 1, 2 or 5 times a power of ten (log: at 1, 2, 5 of each decade, or decades alone)
 * within [lo, hi]: out (=) [max]; returns how many. */
int mt_ticks(double lo, double hi, int wanted, int log, double *out, int max);

/* The page's style and script. */
extern const char mt_report_style[], mt_report_script[];

#endif
