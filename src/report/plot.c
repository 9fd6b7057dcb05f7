#include "report/plot.h"

#include <math.h>
#include <stdlib.h>

#include "report/html.h"

/* Curves are drawn on a square of SIDE units that is stretched to the plot's size. */
enum { SIDE = 1000, MAX_TICKS = 16 };

struct axes {
  double x0, x1, y0, y1;
  bool log;
  double below, above; /* values that the axis does not reach; NaN: none */
};

const char *mt_unit_text(char *out, enum mt_unit unit, double x) {
  if (unit == MT_UNIT_PERCENT) return mt_short_percent(out, x);
  if (unit == MT_UNIT_BYTES) return mt_short_bytes(out, x);
  return mt_short_number(out, x);
}

static double x_at(const struct axes *a, double step) {
  return SIDE * (step - a->x0) / (a->x1 - a->x0);
}

static double y_at(const struct axes *a, double y) {
  double t = a->log ? log(y / a->y0) / log(a->y1 / a->y0) : (y - a->y0) / (a->y1 - a->y0);
  return SIDE * (1 - t);
}

static double middle(const struct mt_series_bucket *b) {
  return 0.5 * ((double)b->first + (double)b->last);
}

/* What a stacked plot's lines add up to at bucket i, up to and with line `top`. */
static double stack_sum(const struct mt_plot *p, int top, int i) {
  double sum = 0;
  for (int k = 0; k <= top; k++) {
    const struct mt_series *s = p->line[k].series;
    double x = i < s->count ? mt_bucket_mean(&s->bucket[i]) : NAN;
    if (isfinite(x)) sum += x;
  }
  return sum;
}

static void widen(double *lo, double *hi, double x) {
  if (!isfinite(x)) return;
  if (!(x >= *lo)) *lo = x;
  if (!(x <= *hi)) *hi = x;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Spikes must not flatten what there is to see: where the outermost percent of the values reaches
 * far beyond the others, the axis does not follow (and the plot says so). */
static void value_range(const struct mt_plot *p, struct axes *a, double *lo, double *hi,
                        double *values) {
  int n = 0;
  *lo = *hi = a->below = a->above = NAN;
  for (int k = 0; k < p->line_count; k++) {
    const struct mt_series *s = p->line[k].series;
    for (int i = 0; i < s->count; i++) {
      const struct mt_series_bucket *b = &s->bucket[i];
      if (p->stacked) {
        if (k == p->line_count - 1) values[n++] = stack_sum(p, k, i);
      } else if (b->count) {
        values[n++] = b->min;
        values[n++] = b->max;
      }
    }
  }
  if (n == 0) return;
  qsort(values, (size_t)n, sizeof *values, ascending);
  *lo = values[0];
  *hi = values[n - 1];
  double low = values[n / 100], high = values[n - 1 - n / 100];
  double margin = 0.25 * (high - low);
  if (n < 50 || p->log) return;
  if (*hi > high + 8 * margin) {
    a->above = *hi;
    *hi = high + margin;
  }
  if (*lo < low - 8 * margin) {
    a->below = *lo;
    *lo = low - margin;
  }
}

static bool find_axes(const struct mt_plot *p, double *values, struct axes *a) {
  double lo, hi;
  *a = (struct axes){.x0 = NAN, .x1 = NAN};
  for (int k = 0; k < p->line_count; k++) {
    const struct mt_series *s = p->line[k].series;
    if (s->count == 0) continue;
    widen(&a->x0, &a->x1, (double)s->bucket[0].first);
    widen(&a->x0, &a->x1, (double)s->bucket[s->count - 1].last);
  }
  if (p->last_step > p->first_step) {
    widen(&a->x0, &a->x1, p->first_step);
    widen(&a->x0, &a->x1, p->last_step);
  }
  if (a->x1 <= a->x0) a->x1 = a->x0 + 1;
  value_range(p, a, &lo, &hi, values);
  if (!isfinite(lo)) return false;
  widen(&lo, &hi, p->mark <= 2 * hi ? p->mark : NAN);
  if (p->from_zero || p->stacked) widen(&lo, &hi, 0);
  if (p->ceiling > 0) hi = p->ceiling;
  a->log = p->log && lo > 0 && hi > 20 * lo;
  if (hi <= lo) {
    double room = lo != 0 ? fabs(lo) * 0.1 : 1;
    hi += room;
    if (!(p->from_zero && lo == 0)) lo -= room;
  }
  double room = 0.05 * (hi - lo);
  a->y0 = a->log ? lo / 1.1 : (lo >= 0 && lo - room < 0) || p->from_zero ? fmin(lo, 0) : lo - room;
  a->y1 = a->log ? hi * 1.1 : p->ceiling > 0 ? hi : hi + room;
  return true;
}

static void write_grid(FILE *f, const struct mt_plot *p, const struct axes *a) {
  double tick[MAX_TICKS];
  char text[MT_SHORT_TEXT];
  int n = mt_ticks(a->y0, a->y1, 5, a->log, tick, MAX_TICKS);
  fputs("<g class=\"axes\">", f);
  for (int i = 0; i < n; i++) {
    double y = y_at(a, tick[i]) / SIDE * 100;
    fprintf(f, "<line x1=\"0\" x2=\"100%%\" y1=\"%.2f%%\" y2=\"%.2f%%\"/>", y, y);
    fprintf(f, "<text x=\"-8\" y=\"%.2f%%\" dy=\"4\" class=\"y\">%s</text>", y,
            mt_unit_text(text, p->unit, tick[i]));
  }
  n = mt_ticks(a->x0, a->x1, 5, 0, tick, MAX_TICKS);
  for (int i = 0; i < n; i++) {
    if (tick[i] != floor(tick[i])) continue; /* no half steps */
    double x = x_at(a, tick[i]) / SIDE * 100;
    fprintf(f, "<line class=\"tick\" x1=\"%.2f%%\" x2=\"%.2f%%\" y1=\"100%%\" y2=\"100%%\"/>", x,
            x);
    fprintf(f, "<text x=\"%.2f%%\" y=\"100%%\" dy=\"17\" class=\"x\">%s</text>", x,
            mt_short_number(text, tick[i]));
  }
  fputs("</g>\n", f);
  if (!isfinite(p->mark) || p->mark < a->y0 || p->mark > a->y1) return;
  double y = y_at(a, p->mark) / SIDE * 100;
  fprintf(f, "<g class=\"mark\"><line x1=\"0\" x2=\"100%%\" y1=\"%.2f%%\" y2=\"%.2f%%\"/>", y, y);
  fprintf(f, "<text x=\"100%%\" y=\"%.2f%%\" dy=\"%d\" dx=\"-4\">", y, y < 10 ? 14 : -5);
  mt_html_text(f, p->mark_label);
  fputs("</text></g>\n", f);
}

/* A path through the values that are there; where one is missing the pen is lifted. */
static void write_path(FILE *f, const char *css, const struct axes *a, const struct mt_series *s,
                       const double *y) {
  bool down = false;
  fprintf(f, "<path class=\"%s\" d=\"", css);
  for (int i = 0; i < s->count; i++) {
    if (!isfinite(y[i])) {
      down = false;
      continue;
    }
    bool alone = !down && (i + 1 == s->count || !isfinite(y[i + 1]));
    double x = x_at(a, middle(&s->bucket[i])), v = y_at(a, y[i]);
    fprintf(f, "%s%.1f %.1f", down ? "L" : "M", x, v);
    if (alone) fprintf(f, "h0"); /* a dot, by its round cap */
    down = true;
  }
  fputs("\"/>\n", f);
}

/* Between the least and the largest of every bucket. */
static void write_envelope(FILE *f, const struct axes *a, const struct mt_series *s) {
  fputs("<path class=\"band\" d=\"", f);
  for (int i = 0; i < s->count;) {
    int end = i;
    while (end < s->count && s->bucket[end].count) end++;
    for (int k = i; k < end; k++)
      fprintf(f, "%s%.1f %.1f", k > i ? "L" : "M", x_at(a, middle(&s->bucket[k])),
              y_at(a, s->bucket[k].max));
    for (int k = end - 1; k >= i; k--)
      fprintf(f, "L%.1f %.1f", x_at(a, middle(&s->bucket[k])), y_at(a, s->bucket[k].min));
    if (end > i) fputc('Z', f);
    i = end + 1;
  }
  fputs("\"/>\n", f);
}

static void write_line(FILE *f, const struct mt_line *l, const struct axes *a, double *y) {
  const struct mt_series *s = l->series;
  for (int i = 0; i < s->count; i++) y[i] = mt_bucket_mean(&s->bucket[i]);
  fprintf(f, "<g class=\"%s\">", l->css);
  if (s->stride > 1) write_envelope(f, a, s);
  if (l->smooth && s->count >= 20) {
    if (s->stride == 1) write_path(f, "faint", a, s, y);
    mt_series_smooth(s, s->count / 60.0 + 1, y);
  }
  write_path(f, l->points ? "dashed" : "line", a, s, y);
  fputs("</g>", f);
}

static void write_points(FILE *f, const struct mt_plot *p, const struct mt_line *l,
                         const struct axes *a) {
  char text[MT_SHORT_TEXT];
  const struct mt_series *s = l->series;
  if (!l->points || s->count > 200) return;
  fprintf(f, "<g class=\"%s\">", l->css);
  for (int i = 0; i < s->count; i++) {
    double y = mt_bucket_mean(&s->bucket[i]);
    if (!isfinite(y)) continue;
    fprintf(f, "<circle cx=\"%.2f%%\" cy=\"%.2f%%\" r=\"3.5\"><title>",
            x_at(a, middle(&s->bucket[i])) / SIDE * 100, y_at(a, y) / SIDE * 100);
    mt_html_text(f, l->label);
    fprintf(f, ", step %lld: %s</title></circle>", (long long)s->bucket[i].last,
            mt_unit_text(text, p->unit, y));
  }
  fputs("</g>\n", f);
}

/* The area between the sums up to the line below and up to this one. */
static void write_area(FILE *f, const struct mt_plot *p, int k, const struct axes *a) {
  const struct mt_series *s = p->line[k].series;
  fprintf(f, "<path class=\"area %s\" d=\"", p->line[k].css);
  for (int i = 0; i < s->count; i++)
    fprintf(f, "%s%.1f %.1f", i ? "L" : "M", x_at(a, middle(&s->bucket[i])),
            y_at(a, stack_sum(p, k, i)));
  for (int i = s->count - 1; i >= 0; i--)
    fprintf(f, "L%.1f %.1f", x_at(a, middle(&s->bucket[i])), y_at(a, stack_sum(p, k - 1, i)));
  fputs("Z\"/>\n", f);
}

/* The numbers that the script reads out under the pointer. */
static void write_data(FILE *f, const struct mt_plot *p, const struct axes *a) {
  static const char *const units[] = {"n", "p", "b", "n"};
  fprintf(f, "<script type=\"application/json\">{\"x0\":%.9g,\"x1\":%.9g,\"u\":\"%s\",\"s\":[",
          a->x0, a->x1, units[p->unit]);
  for (int k = 0; k < p->line_count; k++) {
    const struct mt_series *s = p->line[k].series;
    fputs(k ? ",{\"x\":[" : "{\"x\":[", f);
    for (int i = 0; i < s->count; i++)
      fprintf(f, i ? ",%lld" : "%lld", (long long)(s->bucket[i].first + s->bucket[i].last) / 2);
    fputs("],\"y\":[", f);
    for (int i = 0; i < s->count; i++) {
      double y = mt_bucket_mean(&s->bucket[i]);
      if (i) fputc(',', f);
      if (isfinite(y))
        fprintf(f, "%.4g", y);
      else
        fputs("null", f);
    }
    fputs("]}", f);
  }
  fputs("]}</script>\n", f);
}

static void write_legend(FILE *f, const struct mt_plot *p, const struct axes *a) {
  char text[MT_SHORT_TEXT];
  int64_t joined = 1;
  fputs("<ul class=\"legend\">", f);
  for (int i = 0; i < p->line_count; i++) {
    const struct mt_line *l = &p->line[i];
    fprintf(f, "<li class=\"%s%s\"><i></i>", l->css,
            p->stacked  ? " fill"
            : l->points ? " dash"
                        : "");
    mt_html_text(f, l->label);
    fprintf(f, " <b>%s</b></li>", mt_unit_text(text, p->unit, l->series->last));
    if (l->series->stride > joined) joined = l->series->stride;
  }
  if (joined > 1 && !p->stacked)
    fprintf(f, "<li class=\"aside\">shaded: least to largest of %lld steps</li>",
            (long long)joined);
  if (isfinite(a->above))
    fprintf(f, "<li class=\"aside\">beyond the axis: up to %s</li>",
            mt_unit_text(text, p->unit, a->above));
  if (isfinite(a->below))
    fprintf(f, "<li class=\"aside\">beyond the axis: down to %s</li>",
            mt_unit_text(text, p->unit, a->below));
  fputs("</ul>\n", f);
}

/* For those who hear it: each line's way from its first value to its last. */
static void write_summary(FILE *f, const struct mt_plot *p) {
  char a[MT_SHORT_TEXT], b[MT_SHORT_TEXT];
  mt_html_text(f, p->title);
  fputs(" by step. ", f);
  for (int k = 0; k < p->line_count; k++) {
    const struct mt_series *s = p->line[k].series;
    if (s->count == 0) continue;
    mt_html_text(f, p->line[k].label);
    fprintf(f, ": from %s at step %lld to %s at step %lld. ",
            mt_unit_text(a, p->unit, mt_bucket_mean(&s->bucket[0])), (long long)s->bucket[0].first,
            mt_unit_text(b, p->unit, s->last), (long long)s->bucket[s->count - 1].last);
  }
}

static void write_head(FILE *f, const struct mt_plot *p) {
  fprintf(f, "<figure class=\"card plot%s\" id=\"%s\">\n<figcaption><h3>", p->wide ? " wide" : "",
          p->id);
  mt_html_text(f, p->title);
  fputs("</h3><p>", f);
  mt_html_text(f, p->note);
  fputs("</p></figcaption>\n", f);
}

static void write_curves(FILE *f, const struct mt_plot *p, const struct axes *a, double *scratch) {
  fprintf(f,
          "<svg class=\"curves\" width=\"100%%\" height=\"100%%\" viewBox=\"0 0 %d %d\" "
          "preserveAspectRatio=\"none\">\n",
          SIDE, SIDE);
  for (int k = 0; k < p->line_count; k++) {
    if (p->line[k].series->count == 0) continue;
    if (p->stacked)
      write_area(f, p, k, a);
    else
      write_line(f, &p->line[k], a, scratch);
  }
  fputs("</svg>\n", f);
  for (int k = 0; k < p->line_count && !p->stacked; k++) write_points(f, p, &p->line[k], a);
}

mt_err mt_plot_write(FILE *f, const struct mt_plot *p) {
  struct axes a;
  double *scratch = malloc(sizeof *scratch * 2 * MT_SERIES_POINTS * MT_PLOT_LINES);
  if (!scratch) return mt_fail(MT_ENOMEM, "a plot");
  write_head(f, p);
  if (find_axes(p, scratch, &a)) {
    write_legend(f, p, &a);
    fputs("<div class=\"area\"><svg class=\"frame\" role=\"img\" aria-label=\"", f);
    write_summary(f, p);
    fputs("\">\n", f);
    write_grid(f, p, &a);
    write_curves(f, p, &a, scratch);
    fputs("<line class=\"cross\" x1=\"0\" x2=\"0\" y1=\"0\" y2=\"100%\"/></svg></div>\n"
          "<p class=\"foot\">step</p>\n",
          f);
    write_data(f, p, &a);
  } else {
    fputs("<p class=\"empty\">No values yet.</p>\n", f);
  }
  fputs("</figure>\n", f);
  free(scratch);
  return MT_OK;
}
