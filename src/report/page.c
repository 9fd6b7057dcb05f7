#include "report/page.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "report/html.h"
#include "report/plot.h"

static const char *const run_css[] = {"c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"};

static void write_status(FILE *f, const struct mt_run *r) {
  const char *status = mt_run_status(r);
  double total = mt_run_number(r, "options", "total-steps", 0);
  const char *css = !status                           ? "unknown"
                    : strcmp(status, "running") == 0  ? "running"
                    : strcmp(status, "finished") == 0 ? "good"
                    : strcmp(status, "failed") == 0   ? "bad"
                                                      : "odd";
  fprintf(f, "<span class=\"status %s\">", css);
  mt_html_text(f, status ? status : "no run.json");
  fprintf(f, "</span> step %lld", (long long)r->last_step);
  if (total > 0) fprintf(f, " of %.0f", total);
}

static double run_seconds(const struct mt_run *r) {
  double started = mt_run_number(r, NULL, "started", NAN);
  if (mt_run_ended(r)) return mt_run_number(r, "result", "seconds", NAN);
  return r->last_time > 0 ? r->last_time - started : NAN;
}

static double step_ms(const struct mt_run *r) {
  double median = mt_run_number(r, "result", "median_step_ms", 0);
  return median > 0 ? median : r->step_count ? r->ms_sum / (double)r->step_count : NAN;
}

/* What compares with the held-out loss, and between runs: without the auxiliary loss. */
static const struct mt_series *training_loss(const struct mt_run *r) {
  return isfinite(r->cross_entropy.last) ? &r->cross_entropy : &r->loss;
}

/* Mean loss of the last twentieth of the steps: one step's own says little. */
static double late_loss(const struct mt_run *r) {
  const struct mt_series *s = training_loss(r);
  int from = s->count - (s->count + 19) / 20;
  double sum = 0;
  int64_t n = 0;
  for (int i = from < 0 ? 0 : from; i < s->count; i++) {
    if (s->bucket[i].count == 0) continue;
    sum += s->bucket[i].sum;
    n += s->bucket[i].count;
  }
  return n ? sum / (double)n : NAN;
}

static double memory_total(const struct mt_run *r) {
  double sum = 0;
  for (int i = 0; i < r->memory_count; i++) sum += r->memory[i].bytes;
  return r->memory_count ? sum : NAN;
}

static void fact_open(FILE *f, const char *label) {
  fprintf(f, "<div class=\"fact\"><dt>%s</dt><dd>", label);
}

static void fact_close(FILE *f, const char *small) {
  fprintf(f, "<small>%s</small></dd></div>\n", small);
}

static void evaluation_facts(FILE *f, const struct mt_run *r) {
  char a[MT_SHORT_TEXT], b[MT_SHORT_TEXT], c[MT_SHORT_TEXT], small[160];
  if (r->eval_count == 0) return;
  fact_open(f, "Held-out loss");
  fprintf(f, "<span class=\"was\">%s →</span> %s", mt_short_number(a, r->first_eval.loss),
          mt_short_number(b, r->last_eval.loss));
  snprintf(small, sizeof small, "nats a token; best %s at step %lld",
           mt_short_number(c, r->best_eval.loss), (long long)r->best_eval.step);
  fact_close(f, small);
  fact_open(f, "Perplexity");
  fprintf(f, "<span class=\"was\">%s →</span> %s", mt_short_number(a, r->first_eval.perplexity),
          mt_short_number(b, r->last_eval.perplexity));
  fact_close(f, "held out, e to the loss");
  fact_open(f, "Tokens guessed right");
  fprintf(f, "<span class=\"was\">%s →</span> %s", mt_short_percent(a, r->first_eval.accuracy),
          mt_short_percent(b, r->last_eval.accuracy));
  fact_close(f, "of the held-out answers");
}

static void model_facts(FILE *f, const struct mt_run *r) {
  char a[MT_SHORT_TEXT], b[MT_SHORT_TEXT], small[200];
  double parameters = mt_run_number(r, "model", "parameters", NAN);
  if (!isfinite(parameters)) return;
  fact_open(f, "Model");
  fprintf(f, "%s", mt_short_number(a, parameters));
  snprintf(small, sizeof small, "parameters, %s a token; %.0f layers, %.0f experts, top-%.0f",
           mt_short_number(b, mt_run_number(r, "model", "parameters_a_token", NAN)),
           mt_run_number(r, "model", "layers", r->layers),
           mt_run_number(r, "model", "experts", r->experts), mt_run_number(r, "model", "top_k", 0));
  fact_close(f, small);
  fact_open(f, "Data");
  fprintf(f, "%s", mt_short_number(a, mt_run_number(r, "data", "samples", NAN)));
  snprintf(small, sizeof small, "samples, %s tokens; %s tokens trained on",
           mt_short_number(b, mt_run_number(r, "data", "tokens", NAN)),
           mt_short_number(a, r->token_sum));
  fact_close(f, small);
}

static void write_facts(FILE *f, const struct mt_run *r) {
  char a[MT_SHORT_TEXT], b[MT_SHORT_TEXT], small[160];
  fputs("<dl class=\"facts\">\n", f);
  evaluation_facts(f, r);
  fact_open(f, "Training loss");
  fprintf(f, "%s", mt_short_number(a, late_loss(r)));
  fact_close(f, "mean of the last twentieth of the steps");
  fact_open(f, "Step");
  fprintf(f, "%s ms", mt_short_number(a, step_ms(r)));
  snprintf(small, sizeof small, "%s; %s tokens/s over all",
           mt_run_number(r, "result", "median_step_ms", 0) > 0 ? "median" : "mean",
           mt_short_number(b, r->ms_sum > 0 ? r->token_sum / r->ms_sum * 1e3 : NAN));
  fact_close(f, small);
  fact_open(f, "Time");
  fprintf(f, "%s", mt_short_seconds(a, run_seconds(r)));
  double started = mt_run_number(r, NULL, "started", NAN);
  snprintf(small, sizeof small, "from %s",
           fabs(started) < 1e15 ? mt_short_date(b, (int64_t)started) : "an unknown time");
  fact_close(f, small);
  model_facts(f, r);
  fputs("</dl>\n", f);
}

/* One row a run, for runs side by side. */
static void write_comparison(FILE *f, const struct mt_run *runs, int count) {
  char t[MT_SHORT_TEXT];
  fputs("<div class=\"card wide scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Runs\">"
        "<table><thead><tr><th scope=\"col\">Run</th><th scope=\"col\">Status</th>"
        "<th scope=\"col\">Training loss</th><th scope=\"col\">Held-out loss</th>"
        "<th scope=\"col\">Best</th><th scope=\"col\">Guessed right</th>"
        "<th scope=\"col\">Step, ms</th><th scope=\"col\">Tokens/s</th><th scope=\"col\">Time</th>"
        "<th scope=\"col\">Memory</th></tr></thead><tbody>\n",
        f);
  for (int i = 0; i < count; i++) {
    const struct mt_run *r = &runs[i];
    fprintf(f, "<tr><th scope=\"row\" class=\"%s key\"><i></i>", run_css[i]);
    mt_html_text(f, r->name);
    fputs("</th><td>", f);
    write_status(f, r);
    fprintf(f, "</td><td>%s</td>", mt_short_number(t, late_loss(r)));
    fprintf(f, "<td>%s", mt_short_number(t, r->eval_count ? r->first_eval.loss : NAN));
    fprintf(f, " → <b>%s</b></td>", mt_short_number(t, r->eval_count ? r->last_eval.loss : NAN));
    fprintf(f, "<td>%s</td>", mt_short_number(t, r->eval_count ? r->best_eval.loss : NAN));
    fprintf(f, "<td>%s</td>", mt_short_percent(t, r->eval_count ? r->last_eval.accuracy : NAN));
    fprintf(f, "<td>%s</td>", mt_short_number(t, step_ms(r)));
    fprintf(f, "<td>%s</td>",
            mt_short_number(t, r->ms_sum > 0 ? r->token_sum / r->ms_sum * 1e3 : NAN));
    fprintf(f, "<td>%s</td>", mt_short_seconds(t, run_seconds(r)));
    fprintf(f, "<td>%s</td></tr>\n", mt_short_bytes(t, memory_total(r)));
  }
  fputs("</tbody></table></div>\n", f);
}

static int ranks_of(const struct mt_run *r) {
  double n = mt_run_number(r, "ranks", "world", 1);
  return n > 1 && n < 1e6 ? (int)n : 1;
}

static void write_header(FILE *f, const struct mt_run *runs, int count) {
  const json_t *error;
  char date[MT_SHORT_TEXT];
  fputs("<header><h1>", f);
  for (int i = 0; i < count; i++) {
    if (i) fputs(i + 1 == count ? " and " : ", ", f);
    mt_html_text(f, runs[i].name);
  }
  fputs("</h1>\n<p class=\"lead\">", f);
  if (count == 1) {
    write_status(f, &runs[0]);
    fputs(" · fine-tuning ", f);
    mt_html_json(f, mt_run_fact(&runs[0], "options", "model"));
    fputs(" on ", f);
    mt_html_json(f, mt_run_fact(&runs[0], "options", "data"));
    const char *device = json_string_value(mt_run_fact(&runs[0], "device", "description"));
    const char *backend = json_string_value(mt_run_fact(&runs[0], "device", "backend"));
    if (backend) {
      fputs(" · ", f);
      mt_html_text(f, device && *device ? device : backend);
    }
    if (ranks_of(&runs[0]) > 1)
      fprintf(f, " · %d ranks: %.0f x data, %.0f x expert, %.0f x pipeline", ranks_of(&runs[0]),
              mt_run_number(&runs[0], "ranks", "data", 1),
              mt_run_number(&runs[0], "ranks", "expert", 1),
              mt_run_number(&runs[0], "ranks", "pipeline", 1));
  } else {
    fprintf(f, "%d runs side by side", count);
  }
  fprintf(f, " · page of %s</p>\n", mt_short_date(date, (int64_t)time(NULL)));
  fputs(
      "<nav aria-label=\"Sections\"><a href=\"#plots\">Plots</a> <a href=\"#experts\">Experts</a> "
      "<a href=\"#samples\">Samples</a> <a href=\"#configuration\">Configuration</a></nav>"
      "</header>\n<main>\n",
      f);
  if (count == 1)
    write_facts(f, &runs[0]);
  else
    write_comparison(f, runs, count);
  for (int i = 0; i < count; i++) {
    error = mt_run_fact(&runs[i], "result", "error");
    if (!json_is_string(error)) continue;
    fputs("<p class=\"card wide failure\" role=\"alert\"><b>", f);
    mt_html_text(f, runs[i].name);
    fputs(" failed:</b> ", f);
    mt_html_json(f, error);
    fputs("</p>\n", f);
  }
}

/* Names of lines outlive the plot that is being filled. */
struct names {
  char text[MT_PLOT_LINES][320];
  int count;
};

static void add(struct mt_plot *p, struct names *n, const struct mt_run *r, int count,
                const char *what, const char *css, const struct mt_series *s, bool points) {
  if (p->line_count == MT_PLOT_LINES || s->count == 0) return;
  char *label = n->text[n->count++];
  if (count > 1)
    snprintf(label, sizeof *n->text, *what ? "%s, %s" : "%s%s", r->name, what);
  else
    snprintf(label, sizeof *n->text, "%s", what);
  p->line[p->line_count++] = (struct mt_line){
      .label = label, .css = css, .series = s, .points = points, .smooth = !points};
}

static mt_err write_loss_and_accuracy(FILE *f, const struct mt_run *runs, int count) {
  struct names names = {.count = 0};
  struct mt_plot loss = {.id = "loss",
                         .title = "Loss",
                         .note = "cross-entropy in nats a token; training's bold line is a moving "
                                 "average",
                         .log = false,
                         .mark = NAN};
  struct mt_plot accuracy = {.id = "accuracy",
                             .title = "Tokens guessed right",
                             .note = "share of the target tokens that were the likeliest",
                             .unit = MT_UNIT_PERCENT,
                             .mark = NAN};
  for (int i = 0; i < count; i++) {
    const char *css = run_css[i], *held = count > 1 ? run_css[i] : run_css[1];
    add(&loss, &names, &runs[i], count, "training", css, training_loss(&runs[i]), false);
    add(&loss, &names, &runs[i], count, "held out", held, &runs[i].eval_loss, true);
  }
  MT_TRY(mt_plot_write(f, &loss));
  names.count = 0;
  for (int i = 0; i < count; i++) {
    const char *css = run_css[i], *held = count > 1 ? run_css[i] : run_css[1];
    add(&accuracy, &names, &runs[i], count, "training", css, &runs[i].accuracy, false);
    add(&accuracy, &names, &runs[i], count, "held out", held, &runs[i].eval_accuracy, true);
  }
  return mt_plot_write(f, &accuracy);
}

static mt_err write_optimizer(FILE *f, const struct mt_run *runs, int count) {
  struct names names = {.count = 0};
  struct mt_plot lr = {.id = "learning-rate",
                       .title = "Learning rate",
                       .note = "of every step's update",
                       .from_zero = true,
                       .mark = NAN};
  struct mt_plot norm = {.id = "gradient-norm",
                         .title = "Gradient norm",
                         .note =
                             "global L2 norm before clipping; the bold line is a moving average",
                         .log = true,
                         .mark = mt_run_number(&runs[0], "options", "grad-clip", NAN),
                         .mark_label = "clipped above"};
  if (!(norm.mark > 0)) norm.mark = NAN;
  for (int i = 0; i < count; i++) {
    if (mt_run_number(&runs[i], "options", "grad-clip", NAN) != norm.mark) norm.mark = NAN;
    add(&lr, &names, &runs[i], count, count > 1 ? "" : "learning rate", run_css[i], &runs[i].lr,
        false);
    if (lr.line_count) lr.line[lr.line_count - 1].smooth = false;
    add(&norm, &names, &runs[i], count, count > 1 ? "" : "norm", run_css[i], &runs[i].grad_norm,
        false);
  }
  MT_TRY(mt_plot_write(f, &lr));
  return mt_plot_write(f, &norm);
}

static mt_err write_speed(FILE *f, const struct mt_run *runs, int count) {
  static const char *const phase_css[] = {"p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8"};
  enum { PHASE_CSS = sizeof phase_css / sizeof *phase_css };
  struct names names = {.count = 0};
  struct mt_plot speed = {.id = "tokens",
                          .title = "Tokens per second",
                          .note = "of every step, data included; the bold line is a moving average",
                          .from_zero = true,
                          .mark = NAN};
  for (int i = 0; i < count; i++)
    add(&speed, &names, &runs[i], count, count > 1 ? "" : "tokens/s", run_css[i],
        &runs[i].tokens_per_s, false);
  MT_TRY(mt_plot_write(f, &speed));
  for (int i = 0; i < count; i++) {
    char id[32], title[320];
    struct mt_plot phases = {.id = id,
                             .title = title,
                             .note = ranks_of(&runs[i]) > 1
                                         ? "milliseconds of a step by phase, stacked; of rank 0"
                                         : "milliseconds of a step by phase, stacked",
                             .unit = MT_UNIT_MS,
                             .stacked = true,
                             .mark = NAN};
    snprintf(id, sizeof id, "phases-%d", i);
    if (count > 1)
      snprintf(title, sizeof title, "Step time by phase: %s", runs[i].name);
    else
      snprintf(title, sizeof title, "Step time by phase");
    names.count = 0;
    for (int k = 0; k < runs[i].phase_count; k++) {
      char *copy = names.text[names.count++];
      snprintf(copy, sizeof *names.text, "%s", runs[i].phase_name[k]);
      for (char *c = copy; *c; c++) *c = *c == '_' ? ' ' : *c;
      phases.line[phases.line_count++] = (struct mt_line){
          .label = copy, .css = phase_css[k % PHASE_CSS], .series = &runs[i].phase[k]};
    }
    MT_TRY(mt_plot_write(f, &phases));
  }
  return MT_OK;
}

static void replace_underscores(FILE *f, const char *text) {
  char copy[64];
  snprintf(copy, sizeof copy, "%s", text);
  for (char *c = copy; *c; c++) *c = *c == '_' ? ' ' : *c;
  mt_html_text(f, copy);
}

/* What the run reserved, a bar a run on one scale, and what the process took at most. */
static void write_memory(FILE *f, const struct mt_run *runs, int count) {
  char t[MT_SHORT_TEXT];
  double most = 0;
  bool many = false;
  for (int i = 0; i < count; i++) {
    many |= ranks_of(&runs[i]) > 1;
    most = fmax(most, fmax(memory_total(&runs[i]), runs[i].process_peak.last));
  }
  fprintf(f, "<figure class=\"card plot%s\" id=\"memory\">", count % 2 ? " wide" : "");
  fprintf(f,
          "<figcaption><h3>Memory</h3><p>reserved for the run, by what it holds; below it the most "
          "that the process had in host memory%s</p></figcaption>\n",
          many ? "; of several ranks, rank 0's" : "");
  if (!(most > 0)) fputs("<p class=\"empty\">No values yet.</p>\n", f);
  for (int i = 0; i < count && most > 0; i++) {
    const struct mt_run *r = &runs[i];
    double at = 0;
    if (count > 1) {
      fputs("<h4>", f);
      mt_html_text(f, r->name);
      fputs("</h4>", f);
    }
    fprintf(f, "<svg class=\"bars\" role=\"img\" aria-label=\"Memory: %s in all\">",
            mt_short_bytes(t, memory_total(r)));
    for (int k = 0; k < r->memory_count; k++) {
      double share = 100 * r->memory[k].bytes / most;
      fprintf(f, "<rect class=\"p%d\" x=\"%.2f%%\" width=\"%.2f%%\" y=\"0\" height=\"26\"><title>",
              k % 8, at, share);
      mt_html_text(f, r->memory[k].name);
      fprintf(f, ": %s</title></rect>", mt_short_bytes(t, r->memory[k].bytes));
      at += share;
    }
    if (r->process_peak.last > 0)
      fprintf(f, "<rect class=\"peak\" x=\"0\" width=\"%.2f%%\" y=\"30\" height=\"8\"/>",
              100 * r->process_peak.last / most);
    fputs("</svg>\n<ul class=\"legend\">", f);
    for (int k = 0; k < r->memory_count; k++) {
      fprintf(f, "<li class=\"p%d fill\"><i></i>", k % 8);
      replace_underscores(f, r->memory[k].name);
      fprintf(f, " <b>%s</b></li>", mt_short_bytes(t, r->memory[k].bytes));
    }
    fprintf(f, "<li class=\"sum\">in all <b>%s</b></li>", mt_short_bytes(t, memory_total(r)));
    if (r->process_peak.last > 0)
      fprintf(f, "<li class=\"peak fill\"><i></i>process at most <b>%s</b></li>",
              mt_short_bytes(t, r->process_peak.last));
    fputs("</ul>\n", f);
  }
  fputs("</figure>\n", f);
}

mt_err mt_page_write(FILE *f, const struct mt_run *runs, int count, double refresh_s) {
  fputs("<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\"><head>"
        "<meta charset=\"utf-8\"/>\n<meta name=\"viewport\" content=\"width=device-width, "
        "initial-scale=1\"/>\n<meta name=\"color-scheme\" content=\"light dark\"/>\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
        "'unsafe-inline'; script-src 'unsafe-inline'\"/>\n",
        f);
  if (refresh_s > 0)
    fprintf(f, "<meta http-equiv=\"refresh\" content=\"%.0f\"/>\n", ceil(refresh_s));
  fputs("<title>", f);
  mt_html_text(f, runs[0].name);
  if (count > 1) fprintf(f, " and %d more", count - 1);
  fprintf(f, " – moetune</title>\n<style>%s</style></head>\n<body>\n", mt_report_style);
  write_header(f, runs, count);
  mt_page_warnings(f, runs, count);
  fputs("<section aria-labelledby=\"plots\"><h2 id=\"plots\">Plots</h2>\n<div class=\"grid\">\n",
        f);
  MT_TRY(write_loss_and_accuracy(f, runs, count));
  MT_TRY(write_optimizer(f, runs, count));
  MT_TRY(write_speed(f, runs, count));
  write_memory(f, runs, count);
  fputs("</div></section>\n", f);
  MT_TRY(mt_page_experts(f, runs, count));
  mt_page_samples(f, runs, count);
  mt_page_configuration(f, runs, count);
  fputs("</main>\n<footer>Made by moetune " MOETUNE_VERSION
        ". Point at a plot, or focus it and use the arrow keys, to read its values.</footer>\n",
        f);
  fprintf(f, "<script>//<![CDATA[\n%s//]]></script>\n</body></html>\n", mt_report_script);
  return MT_OK;
}
