/* Plots of series over steps, as SVG that stretches with its place while its text does not. */
#ifndef MT_REPORT_PLOT_H
#define MT_REPORT_PLOT_H

#include <stdbool.h>
#include <stdio.h>

#include "report/series.h"

struct mt_line {
  const char *label; /* escaped by the plot */
  const char *css;   /* class that gives the colour: "c0" ... */
  const struct mt_series *series;
  bool points; /* few values, dashed between: a circle each, with its number as a title */
  bool smooth; /* a moving average above the values themselves */
};

enum mt_unit { MT_UNIT_NUMBER, MT_UNIT_PERCENT, MT_UNIT_BYTES, MT_UNIT_MS };

enum { MT_PLOT_LINES = 24 };

struct mt_plot {
  const char *id, *title;
  const char *note; /* what is measured, with its unit */
  enum mt_unit unit;
  struct mt_line line[MT_PLOT_LINES];
  int line_count;
  bool wide;      /* over the page's whole width */
  bool stacked;   /* the lines' means add up, from 0 */
  bool log;       /* where all values are positive */
  bool from_zero; /* the axis holds 0 */
  double ceiling; /* the axis ends there; 0: at the data's own */
  double mark;    /* a horizontal line; NaN: none */
  const char *mark_label;
  double first_step, last_step; /* of the axis; last <= first: the data's own */
};

/* A <figure>. A plot without any finite value says so instead. Errors: MT_ENOMEM. */
mt_err mt_plot_write(FILE *f, const struct mt_plot *p);

/* A value as the plot's unit writes it, in out[MT_SHORT_TEXT]. */
const char *mt_unit_text(char *out, enum mt_unit unit, double x);

#endif
