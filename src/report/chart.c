#include "report/chart.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/files.h"
#include "report/html.h"

enum { WIDTH = 800, LEFT = 70, RIGHT = 190, PANEL = 190, ABOVE = 64, BETWEEN = 66, LINE = 16 };

static const char *const colours[MT_CHART_LINES] = {"#1f6feb", "#d1600a", "#2a8f4e", "#8250df",
                                                    "#b5254b", "#3b8ea5", "#9a6700", "#57606a"};

static void open_svg(FILE *f, int height) {
  fprintf(f,
          "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
          "height=\"%d\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n"
          "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
          WIDTH, height, WIDTH, height);
}

static void text_at(FILE *f, double x, double y, const char *more, const char *text) {
  fprintf(f, "<text x=\"%.1f\" y=\"%.1f\"%s>", x, y, more);
  mt_html_text(f, text);
  fputs("</text>\n", f);
}

/* Writes to memory first, so that the file is whole or not there. */
static mt_err finish(FILE *f, char **text, const size_t *size, const char *path) {
  fputs("</svg>\n", f);
  bool bad = ferror(f) != 0;
  bad |= fclose(f) != 0;
  mt_err err = bad ? mt_fail(MT_ENOMEM, "a chart") : mt_file_write_atomic(path, *text, *size);
  free(*text);
  return err;
}

struct area {
  double x0, x1, y1, top; /* x0, x1: logarithms of 2; the values' largest; pixels */
};

static double px(const struct area *a, double x) {
  double t = a->x1 > a->x0 ? (log2(x) - a->x0) / (a->x1 - a->x0) : 0.5;
  return LEFT + t * (WIDTH - LEFT - RIGHT);
}

static double py(const struct area *a, double y) {
  return a->top + PANEL * (1 - y / a->y1);
}

static struct area find_area(const struct mt_chart *c, const struct mt_chart_panel *p, double top) {
  struct area a = {.x0 = INFINITY, .x1 = -INFINITY, .top = top};
  for (int k = 0; k < c->panel_count; k++) {
    for (int i = 0; i < c->panel[k].line_count; i++) {
      const struct mt_chart_line *l = &c->panel[k].line[i];
      for (int j = 0; j < l->count; j++) {
        a.x0 = fmin(a.x0, log2(l->x[j]));
        a.x1 = fmax(a.x1, log2(l->x[j]));
        if (&c->panel[k] == p && isfinite(l->y[j])) a.y1 = fmax(a.y1, l->y[j]);
      }
    }
  }
  a.y1 = a.y1 > 0 ? a.y1 * 1.08 : 1;
  return a;
}

static void write_axes(FILE *f, const struct area *a) {
  double tick[8];
  char text[MT_SHORT_TEXT];
  int n = mt_ticks(0, a->y1, 4, 0, tick, 8);
  for (int i = 0; i < n; i++) {
    double y = py(a, tick[i]);
    fprintf(f, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/>\n", LEFT,
            WIDTH - RIGHT, y, y);
    text_at(f, LEFT - 8, y + 4, " text-anchor=\"end\"", mt_short_number(text, tick[i]));
  }
  for (int e = (int)ceil(a->x0); e <= a->x1 + 1e-9; e++) {
    snprintf(text, sizeof text, "%.0f", exp2(e));
    text_at(f, px(a, exp2(e)), a->top + PANEL + 17, " text-anchor=\"middle\"", text);
  }
}

static void write_line(FILE *f, const struct mt_chart_line *l, const struct area *a,
                       const char *colour) {
  bool down = false;
  fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"2\" d=\"", colour);
  for (int i = 0; i < l->count; i++) {
    if (isfinite(l->y[i]))
      fprintf(f, "%s%.1f %.1f", down ? "L" : "M", px(a, l->x[i]), py(a, l->y[i]));
    down = isfinite(l->y[i]);
  }
  fputs("\"/>\n", f);
  for (int i = 0; i < l->count; i++) {
    char text[MT_SHORT_TEXT];
    if (!isfinite(l->y[i])) continue;
    fprintf(
        f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"><title>%.0f: %s</title></circle>\n",
        px(a, l->x[i]), py(a, l->y[i]), colour, l->x[i], mt_short_number(text, l->y[i]));
  }
}

static void write_panel(FILE *f, const struct mt_chart *c, const struct mt_chart_panel *p,
                        double top) {
  struct area a = find_area(c, p, top);
  text_at(f, LEFT, top - 12, " font-weight=\"bold\"", p->title);
  write_axes(f, &a);
  for (int i = 0; i < p->line_count; i++) {
    double y = top + 14 + i * 20;
    write_line(f, &p->line[i], &a, colours[i]);
    fprintf(f, "<rect x=\"%d\" y=\"%.1f\" width=\"14\" height=\"3\" fill=\"%s\"/>\n",
            WIDTH - RIGHT + 14, y - 5, colours[i]);
    text_at(f, WIDTH - RIGHT + 34, y, "", p->line[i].label);
  }
}

mt_err mt_chart_write(const char *path, const struct mt_chart *c) {
  char *text = NULL;
  size_t size = 0;
  int notes = 0;
  while (notes < MT_CHART_NOTES && c->note[notes]) notes++;
  int below = ABOVE + c->panel_count * (PANEL + BETWEEN);
  FILE *f = open_memstream(&text, &size);
  if (!f) return mt_fail(MT_ENOMEM, "a chart");
  open_svg(f, below + notes * LINE + 10);
  text_at(f, 10, 20, " font-size=\"14\"", c->title);
  for (int i = 0; i < c->panel_count; i++)
    write_panel(f, c, &c->panel[i], ABOVE + i * (PANEL + BETWEEN));
  text_at(f, (LEFT + WIDTH - RIGHT) / 2.0, below - BETWEEN + 36, " text-anchor=\"middle\"",
          c->x_title);
  for (int i = 0; i < notes; i++)
    text_at(f, 10, below + 4 + i * LINE, " font-size=\"11\" fill=\"#57606a\"", c->note[i]);
  return finish(f, &text, &size, path);
}

mt_err mt_bars_write(const char *path, const char *title, const struct mt_bar *bars, int count) {
  enum { LABELS = 230, BAR = 20, STEP = 30, TOP = 40, ROOM = 180 };
  char *text = NULL;
  size_t size = 0;
  double most = 0;
  FILE *f = open_memstream(&text, &size);
  if (!f) return mt_fail(MT_ENOMEM, "a chart");
  for (int i = 0; i < count; i++) most = fmax(most, bars[i].value);
  open_svg(f, TOP + count * STEP + 10);
  text_at(f, 10, 20, " font-size=\"14\"", title);
  for (int i = 0; i < count; i++) {
    double width = most > 0 ? (WIDTH - LABELS - ROOM) * bars[i].value / most : 0;
    int y = TOP + i * STEP;
    text_at(f, LABELS - 8, y + 15, " text-anchor=\"end\"", bars[i].label);
    fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/>\n", LABELS, y,
            width, BAR, i ? colours[0] : "#9aa4b2");
    text_at(f, LABELS + width + 6, y + 15, "", bars[i].text);
  }
  return finish(f, &text, &size, path);
}
