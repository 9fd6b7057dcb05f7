/* Held-out losses of several runs as one SVG: the losses, and below how far each is from the first
 * run's.
 *   loss_curves OUT.svg LABEL=RUN_DIR... (the first is the measure) */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  RUNS_MOST = 6,
  POINTS_MOST = 512,
  WIDTH = 760,
  LEFT = 64,
  RIGHT = 120,
  PLOT = 200,
  GAP = 56
};

struct run {
  char label[32];
  double step[POINTS_MOST], loss[POINTS_MOST];
  int count;
};

static const char *const colours[RUNS_MOST] = {"#444444", "#1f77b4", "#d62728",
                                               "#2ca02c", "#9467bd", "#ff7f0e"};

static void give_up(const char *what, const char *name) {
  fprintf(stderr, "loss_curves: %s: %s\n", what, name);
  exit(1);
}

static void read_run(struct run *r, const char *argument) {
  char path[4096], *line = NULL;
  const char *cut = strchr(argument, '=');
  size_t room = 0;
  if (!cut) give_up("LABEL=RUN_DIR expected", argument);
  snprintf(r->label, sizeof r->label, "%.*s", (int)(cut - argument), argument);
  snprintf(path, sizeof path, "%s/metrics.jsonl", cut + 1);
  FILE *f = fopen(path, "r");
  if (!f) give_up("cannot read", path);
  while (getline(&line, &room, f) > 0) {
    json_t *j = json_loads(line, 0, NULL), *loss = json_object_get(j, "eval_loss");
    if (loss && r->count < POINTS_MOST) {
      r->step[r->count] = json_number_value(json_object_get(j, "step"));
      r->loss[r->count++] = json_number_value(loss);
    }
    json_decref(j);
  }
  free(line);
  fclose(f);
  if (r->count < 2) give_up("fewer than two evaluations", path);
}

/* A frame from `top` with values low to high, and its lines. */
struct frame {
  int top;
  double low, high, last_step;
};

static double x_of(const struct frame *p, double step) {
  return LEFT + step / p->last_step * (WIDTH - LEFT - RIGHT);
}
static double y_of(const struct frame *p, double v) {
  return p->top + (p->high - v) / (p->high - p->low) * PLOT;
}

static void draw_axes(FILE *f, const struct frame *p, const char *title, const char *format) {
  fprintf(f, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text>\n", LEFT, p->top - 12, title);
  for (int i = 0; i <= 4; i++) {
    double v = p->low + (p->high - p->low) * i / 4, y = y_of(p, v);
    fprintf(f,
            "<path d=\"M%d %.1fH%d\" stroke=\"#dddddd\"/><text x=\"%d\" y=\"%.1f\" "
            "text-anchor=\"end\">",
            LEFT, y, WIDTH - RIGHT, LEFT - 6, y + 4);
    fprintf(f, format, v);
    fputs("</text>\n", f);
  }
  for (int i = 0; i <= 4; i++) {
    double step = p->last_step * i / 4;
    fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.0f</text>\n", x_of(p, step),
            p->top + PLOT + 16, step);
  }
}

static void draw_line(FILE *f, const struct frame *p, const struct run *r, const struct run *base,
                      int colour, int row) {
  fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\" d=\"", colours[colour]);
  for (int i = 0; i < r->count; i++) {
    double v = base ? 100 * (r->loss[i] / base->loss[i] - 1) : r->loss[i];
    fprintf(f, "%c%.1f %.1f", i ? 'L' : 'M', x_of(p, r->step[i]), y_of(p, v));
  }
  double last =
      base ? 100 * (r->loss[r->count - 1] / base->loss[r->count - 1] - 1) : r->loss[r->count - 1];
  fprintf(f, "\"/>\n<text x=\"%d\" y=\"%d\" fill=\"%s\">%s ", WIDTH - RIGHT + 8,
          p->top + 14 + 16 * row, colours[colour], r->label);
  fprintf(f, base ? "%+.3f%%</text>\n" : "%.4f</text>\n", last);
}

int main(int argc, char **argv) {
  static struct run run[RUNS_MOST];
  int count = argc - 2;
  if (count < 2 || count > RUNS_MOST) give_up("usage", "loss_curves OUT.svg LABEL=RUN_DIR...");
  double low = INFINITY, high = -INFINITY, off = 0.05;
  for (int i = 0; i < count; i++) {
    read_run(&run[i], argv[i + 2]);
    if (run[i].count != run[0].count) give_up("evaluated at other steps", argv[i + 2]);
    for (int k = 0; k < run[i].count; k++) {
      low = fmin(low, run[i].loss[k]), high = fmax(high, run[i].loss[k]);
      off = fmax(off, 110 * fabs(run[i].loss[k] / run[0].loss[k] - 1));
    }
  }
  FILE *f = fopen(argv[1], "w");
  if (!f) give_up("cannot write", argv[1]);
  double last = run[0].step[run[0].count - 1];
  struct frame losses = {32, floor(low * 10) / 10, ceil(high * 10) / 10, last},
               shares = {32 + PLOT + GAP, -off, off, last};
  fprintf(f,
          "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
          "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
          "fill=\"white\"/>\n",
          WIDTH, shares.top + PLOT + 28);
  draw_axes(f, &losses, "Held-out loss by step", "%.2f");
  for (int i = 0; i < count; i++) draw_line(f, &losses, &run[i], NULL, i, i);
  char title[96];
  snprintf(title, sizeof title, "Beside %s, percent", run[0].label);
  draw_axes(f, &shares, title, "%+.2f");
  for (int i = 1; i < count; i++) draw_line(f, &shares, &run[i], &run[0], i, i - 1);
  fputs("</svg>\n", f);
  if (fclose(f)) give_up("cannot write", argv[1]);
  return 0;
}
