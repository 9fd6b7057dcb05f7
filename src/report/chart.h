/* Charts that stand alone: an SVG file each, for pages that are not reports. */
#ifndef MT_REPORT_CHART_H
#define MT_REPORT_CHART_H

#include "base/error.h"

enum { MT_CHART_LINES = 8, MT_CHART_POINTS = 16, MT_CHART_PANELS = 3, MT_CHART_NOTES = 6 };

struct mt_chart_line {
  const char *label;
  int count;
  double x[MT_CHART_POINTS], y[MT_CHART_POINTS]; /* a y that is not finite: no point */
};

/* Lines over x of powers of two, from 0 up. */
struct mt_chart_panel {
  const char *title;
  struct mt_chart_line line[MT_CHART_LINES];
  int line_count;
};

struct mt_chart {
  const char *title, *x_title;
  struct mt_chart_panel panel[MT_CHART_PANELS];
  int panel_count;
  const char *note[MT_CHART_NOTES]; /* a line each, below; NULL ends them */
};

struct mt_bar {
  const char *label, *text; /* text: behind the bar */
  double value;
};

/* Writes path whole or not at all. Errors: MT_EIO, MT_ENOMEM. */
mt_err mt_chart_write(const char *path, const struct mt_chart *chart);
mt_err mt_bars_write(const char *path, const char *title, const struct mt_bar *bars, int count);

#endif
