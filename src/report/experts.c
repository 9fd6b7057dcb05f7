/* The experts' section: how evenly they were used, over time and now. */
#include <math.h>
#include <string.h>

#include "report/html.h"
#include "report/page.h"
#include "report/plot.h"

static const char *const run_css[] = {"c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"};

/* Colours of a load beside an even share: half powers of two from 2^-2.5 to 2^2.5, class h0 to h10,
 * and "hd" where there was no token. */
enum { HEAT_CLASSES = 11, HEAT_MIDDLE = 5, FEW_LAYERS = 8, TABLE_CELLS = 4096 };

static int heat_class(int64_t load, double even) {
  if (load <= 0) return -1;
  long c = lround(2 * log2((double)load / even)) + HEAT_MIDDLE;
  return c < 0 ? 0 : c >= HEAT_CLASSES ? HEAT_CLASSES - 1 : (int)c;
}

static double layer_sum(const int64_t *load, int experts) {
  double sum = 0;
  for (int e = 0; e < experts; e++) sum += (double)load[e];
  return sum;
}

static void write_scale(FILE *f) {
  static const char *const label[HEAT_CLASSES] = {"≤0.18×", "", "0.35×", "", "0.7×", "even",
                                                  "1.4×",   "", "2.8×",  "", "≥5.7×"};
  fputs("<div class=\"scale\" role=\"img\" aria-label=\"Colours: load beside an even share, from a "
        "fifth of it to more than five times it; no token apart\"><span class=\"hd\">none</span>",
        f);
  for (int i = 0; i < HEAT_CLASSES; i++) fprintf(f, "<span class=\"h%d\">%s</span>", i, label[i]);
  fputs("</div>\n", f);
}

/* Cells of one colour as one path; neighbours in time become one rectangle. */
static void write_cells(FILE *f, const struct mt_frames *m, int class, int row_px, int gap_px) {
  if (class < 0)
    fputs("<path class=\"hd\" d=\"", f);
  else
    fprintf(f, "<path class=\"h%d\" d=\"", class);
  for (int l = 0; l < m->layers; l++) {
    for (int e = 0; e < m->experts; e++) {
      int y = (l * m->experts + e) * row_px + l * gap_px, begin = -1;
      for (int i = 0; i <= m->count; i++) {
        bool mine = false;
        if (i < m->count) {
          const int64_t *row = mt_frames_at(m, i) + l * m->experts;
          mine = heat_class(row[e], layer_sum(row, m->experts) / m->experts) == class;
        }
        if (mine && begin < 0) begin = i;
        if (mine || begin < 0) continue;
        fprintf(f, "M%d %dh%dv%dh-%dz", begin, y, i - begin, row_px, i - begin);
        begin = -1;
      }
    }
  }
  fputs("\"/>\n", f);
}

static void write_heat_axes(FILE *f, const struct mt_frames *m, int row_px, int gap_px,
                            int height) {
  char text[MT_SHORT_TEXT];
  double tick[8], x0 = (double)m->frame[0].first, x1 = (double)m->frame[m->count - 1].last + 1;
  int block = m->experts * row_px + gap_px, every = block >= 14 ? 1 : 14 / block + 1;
  for (int l = 0; l < m->layers; l += every)
    fprintf(f, "<text class=\"y\" x=\"-8\" y=\"%d\" dy=\"4\">%d</text>",
            l * block + m->experts * row_px / 2, l);
  int n = mt_ticks(x0, x1, 5, 0, tick, 8);
  for (int i = 0; i < n; i++) {
    if (tick[i] != floor(tick[i])) continue;
    fprintf(f, "<text class=\"x\" x=\"%.2f%%\" y=\"%d\" dy=\"16\">%s</text>",
            100 * (tick[i] - x0) / (x1 - x0), height, mt_short_number(text, tick[i]));
  }
}

/* The shares of all frames for the script, one byte a cell: 0 for no token, else 1 + 254 x
 * share / largest. */
static void write_heat_data(FILE *f, const struct mt_frames *m) {
  static const char digit[] = "0123456789abcdef";
  double most = 0;
  for (int i = 0; i < m->count; i++) {
    for (int l = 0; l < m->layers; l++) {
      const int64_t *row = mt_frames_at(m, i) + l * m->experts;
      double sum = layer_sum(row, m->experts);
      for (int e = 0; e < m->experts && sum > 0; e++) most = fmax(most, (double)row[e] / sum);
    }
  }
  fprintf(f,
          "<script type=\"application/json\">{\"layers\":%d,\"experts\":%d,\"most\":%.6g,"
          "\"steps\":[",
          m->layers, m->experts, most);
  for (int i = 0; i < m->count; i++)
    fprintf(f, "%s[%lld,%lld]", i ? "," : "", (long long)m->frame[i].first,
            (long long)m->frame[i].last);
  fputs("],\"load\":\"", f);
  for (int i = 0; i < m->count; i++) {
    for (int l = 0; l < m->layers; l++) {
      const int64_t *row = mt_frames_at(m, i) + l * m->experts;
      double sum = layer_sum(row, m->experts);
      for (int e = 0; e < m->experts; e++) {
        int q = row[e] > 0 ? 1 + (int)lround(254 * (double)row[e] / sum / most) : 0;
        fputc(digit[q >> 4], f);
        fputc(digit[q & 15], f);
      }
    }
  }
  fputs("\"}</script>\n", f);
}

static void write_heat_map(FILE *f, const struct mt_run *r, int index, int count) {
  const struct mt_frames *m = &r->frames;
  int rows = m->layers * m->experts;
  int row_px = rows <= 48     ? 10
               : rows <= 128  ? 6
               : rows <= 1024 ? 4
                              : 2,
      gap_px = rows <= 2048 ? 4 : 1;
  int height = rows * row_px + (m->layers - 1) * gap_px;
  fprintf(f, "<figure class=\"card wide heat\" id=\"heat-%d\"><figcaption><h3>Load over time",
          index);
  if (count > 1) {
    fputs(": ", f);
    mt_html_text(f, r->name);
  }
  fprintf(f,
          "</h3><p>each row an expert, 0 to %d from the top of each layer, whose number stands at "
          "the left; each column %lld "
          "step%s; the colour is its share of the layer's choices beside an even share of %.3g%%"
          "</p></figcaption>\n",
          m->experts - 1, (long long)m->stride, m->stride == 1 ? "" : "s", 100.0 / m->experts);
  write_scale(f);
  fprintf(
      f,
      "<div class=\"scroll tall\" tabindex=\"0\" role=\"region\" aria-label=\"Load of %d experts "
      "in each of %d layers over steps %lld to %lld\"><svg class=\"cells\" height=\"%d\">\n",
      m->experts, m->layers, (long long)m->frame[0].first, (long long)m->frame[m->count - 1].last,
      height);
  write_heat_axes(f, m, row_px, gap_px, height);
  fprintf(f,
          "<svg class=\"curves\" width=\"100%%\" height=\"%d\" viewBox=\"0 0 %d %d\" "
          "preserveAspectRatio=\"none\" shape-rendering=\"crispEdges\">\n",
          height, m->count, height);
  for (int c = -1; c < HEAT_CLASSES; c++) write_cells(f, m, c, row_px, gap_px);
  fputs("</svg></svg></div>\n<p class=\"foot\">step</p>\n"
        "<p class=\"readout\" aria-live=\"polite\">&#160;</p>\n",
        f);
  fprintf(f, "<i class=\"geometry\" data-row=\"%d\" data-gap=\"%d\"></i>\n", row_px, gap_px);
  write_heat_data(f, m);
  fputs("</figure>\n", f);
}

static void write_share(FILE *f, int64_t load, double sum, int experts) {
  int c = heat_class(load, sum / experts);
  double percent = sum > 0 ? 100 * (double)load / sum : 0;
  if (c < 0)
    fputs("<td class=\"hd\">0</td>", f);
  else
    fprintf(f, "<td class=\"h%d\">%.*f</td>", c, percent < 9.95 ? 1 : 0, percent);
}

/* Layer x expert as it was in the last frame; the slider shows the others. */
static void write_matrix(FILE *f, const struct mt_run *r, int index, int count) {
  const struct mt_frames *m = &r->frames;
  const struct mt_frame *last = &m->frame[m->count - 1];
  const int64_t *load = mt_frames_at(m, m->count - 1);
  if (m->layers * m->experts > TABLE_CELLS) return;
  fprintf(f,
          "<figure class=\"card wide matrix\" data-heat=\"heat-%d\"><figcaption><h3>Load by layer "
          "and expert",
          index);
  if (count > 1) {
    fputs(": ", f);
    mt_html_text(f, r->name);
  }
  fprintf(f,
          "</h3><p>percent of the layer's choices; even is %.3g. <output>Steps %lld to %lld"
          "</output></p></figcaption>\n",
          100.0 / m->experts, (long long)last->first, (long long)last->last);
  fprintf(f,
          "<label class=\"slider\" hidden=\"hidden\">Time <input type=\"range\" min=\"0\" "
          "max=\"%d\" value=\"%d\"/></label>\n",
          m->count - 1, m->count - 1);
  fputs("<div class=\"scroll tall\" tabindex=\"0\" role=\"region\" aria-label=\"Load by layer and "
        "expert\"><table class=\"loads\"><thead><tr><th scope=\"col\">layer</th>",
        f);
  for (int e = 0; e < m->experts; e++) fprintf(f, "<th scope=\"col\">%d</th>", e);
  fputs("</tr></thead><tbody>\n", f);
  for (int l = 0; l < m->layers; l++) {
    const int64_t *row = load + l * m->experts;
    fprintf(f, "<tr><th scope=\"row\">%d</th>", l);
    for (int e = 0; e < m->experts; e++)
      write_share(f, row[e], layer_sum(row, m->experts), m->experts);
    fputs("</tr>\n", f);
  }
  fputs("</tbody></table></div></figure>\n", f);
}

/* A line a layer where there are few; the first, the middle and the last where there are many; of
 * several runs the means over the layers, a line a run. */
static void add_layers(struct mt_plot *p, char names[][320], const struct mt_run *r, int run,
                       int count, const struct mt_series *layers, const struct mt_series *mean,
                       bool points) {
  int step = r->layers > FEW_LAYERS ? (r->layers - 1) / 2 : 1;
  int lines = count > 1 ? 1 : r->layers;
  for (int l = 0; l < lines && p->line_count < MT_PLOT_LINES; l += step) {
    const struct mt_series *s = count > 1 ? mean : &layers[l];
    char *label = names[p->line_count];
    if (s->count == 0) continue;
    if (count > 1)
      snprintf(label, 320, "%s, mean of its layers", r->name);
    else
      snprintf(label, 320, "layer %d", l);
    const char *css = count > 1 ? run_css[run] : run_css[p->line_count % 8];
    p->line[p->line_count++] = (struct mt_line){
        .label = label, .css = css, .series = s, .points = points, .smooth = !points};
  }
}

static mt_err write_entropy(FILE *f, const struct mt_run *runs, int count, bool *routers) {
  char names[MT_PLOT_LINES][320];
  struct mt_plot load = {.id = "load-entropy",
                         .title = "Evenness of the load",
                         .note =
                             "entropy of a layer's shares beside that of even ones: 100% is even",
                         .unit = MT_UNIT_PERCENT,
                         .mark = NAN};
  struct mt_plot router = {
      .id = "router-entropy",
      .title = "Router entropy",
      .note = "mean over held-out tokens beside ln(experts): 100% is undecided, 0% is sure",
      .unit = MT_UNIT_PERCENT,
      .mark = NAN};
  for (int i = 0; i < count; i++)
    add_layers(&load, names, &runs[i], i, count, runs[i].load_entropy, &runs[i].load_evenness,
               false);
  MT_TRY(mt_plot_write(f, &load));
  for (int i = 0; i < count; i++)
    add_layers(&router, names, &runs[i], i, count, runs[i].router_entropy, &runs[i].router_evenness,
               true);
  *routers = router.line_count > 0;
  return *routers ? mt_plot_write(f, &router) : MT_OK;
}

static mt_err write_extremes(FILE *f, const struct mt_run *runs, int count) {
  char names[MT_PLOT_LINES][320];
  struct mt_plot idle = {.id = "idle-experts",
                         .title = "Experts without a token",
                         .note = "share of all layers' experts that no token of the step reached",
                         .unit = MT_UNIT_PERCENT,
                         .from_zero = true,
                         .mark = NAN};
  struct mt_plot largest = {.id = "largest-share",
                            .title = "Busiest expert",
                            .note = "its share of its layer's choices, the largest of all layers",
                            .unit = MT_UNIT_PERCENT,
                            .from_zero = true,
                            .mark = 1.0 / runs[0].experts,
                            .mark_label = "even share"};
  for (int i = 0; i < count; i++) {
    if (runs[i].layers == 0) continue;
    snprintf(names[i], sizeof *names, "%s", count > 1 ? runs[i].name : "share");
    if (runs[i].experts != runs[0].experts) largest.mark = NAN;
    idle.line[idle.line_count++] = (struct mt_line){
        .label = names[i], .css = run_css[i], .series = &runs[i].idle, .smooth = true};
    largest.line[largest.line_count++] = (struct mt_line){
        .label = names[i], .css = run_css[i], .series = &runs[i].largest, .smooth = true};
  }
  MT_TRY(mt_plot_write(f, &idle));
  return mt_plot_write(f, &largest);
}

static mt_err write_aux(FILE *f, const struct mt_run *runs, int count, bool wide) {
  char names[MT_PLOT_LINES][320];
  struct mt_plot aux = {.id = "auxiliary-loss",
                        .title = "Load-balancing loss",
                        .note = "before its coefficient; even loads give the number of experts a "
                                "token goes to",
                        .wide = wide,
                        .mark = mt_run_number(&runs[0], "model", "top_k", NAN),
                        .mark_label = "even"};
  for (int i = 0; i < count; i++) {
    if (mt_run_number(&runs[i], "model", "top_k", NAN) != aux.mark) aux.mark = NAN;
    if (!isfinite(runs[i].aux.last)) continue;
    snprintf(names[i], sizeof *names, "%s", count > 1 ? runs[i].name : "loss");
    aux.line[aux.line_count++] = (struct mt_line){
        .label = names[i], .css = run_css[i], .series = &runs[i].aux, .smooth = true};
  }
  return aux.line_count ? mt_plot_write(f, &aux) : MT_OK;
}

/* Of the runs that had one. */
static mt_err write_z_loss(FILE *f, const struct mt_run *runs, int count, bool wide) {
  char names[MT_PLOT_LINES][320];
  struct mt_plot z = {.id = "z-loss",
                      .title = "Router z-loss",
                      .note = "before its coefficient: the mean square of the routers' logsumexp",
                      .wide = wide,
                      .mark = NAN};
  for (int i = 0; i < count; i++) {
    if (!isfinite(runs[i].z_loss.last)) continue;
    snprintf(names[i], sizeof *names, "%s", count > 1 ? runs[i].name : "loss");
    z.line[z.line_count++] = (struct mt_line){
        .label = names[i], .css = run_css[i], .series = &runs[i].z_loss, .smooth = true};
  }
  return z.line_count ? mt_plot_write(f, &z) : MT_OK;
}

mt_err mt_page_experts(FILE *f, const struct mt_run *runs, int count) {
  bool any = false, routers, z_loss = false;
  for (int i = 0; i < count; i++) any |= runs[i].layers > 0 && runs[i].frames.count > 0;
  for (int i = 0; i < count; i++) z_loss |= isfinite(runs[i].z_loss.last);
  fputs("<section aria-labelledby=\"experts\"><h2 id=\"experts\">Experts</h2>\n", f);
  if (!any) {
    fputs("<p class=\"empty\">No loads of experts yet.</p></section>\n", f);
    return MT_OK;
  }
  fputs("<p class=\"lead\">Tokens dropped: 0. Every expert takes all tokens that are routed to it; "
        "there is no capacity to overflow.</p>\n<div class=\"grid\">\n",
        f);
  for (int i = 0; i < count; i++) {
    if (runs[i].frames.count == 0) continue;
    write_matrix(f, &runs[i], i, count);
    write_heat_map(f, &runs[i], i, count);
  }
  MT_TRY(write_entropy(f, runs, count, &routers));
  MT_TRY(write_extremes(f, runs, count));
  /* The row is full: two plots side by side, or one across it. */
  MT_TRY(write_aux(f, runs, count, routers && !z_loss));
  MT_TRY(write_z_loss(f, runs, count, !routers));
  fputs("</div></section>\n", f);
  return MT_OK;
}
