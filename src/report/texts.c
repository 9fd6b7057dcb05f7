/* The page's words: warnings, samples, configuration. */
#include <string.h>

#include "report/html.h"
#include "report/page.h"

void mt_page_warnings(FILE *f, const struct mt_run *runs, int count) {
  for (int i = 0; i < count; i++) {
    const struct mt_run *r = &runs[i];
    if (r->warning_total == 0) continue;
    fprintf(f, "<details class=\"card wide warnings\" open=\"open\"><summary>%lld warning%s",
            (long long)r->warning_total, r->warning_total == 1 ? "" : "s");
    if (count > 1) {
      fputs(" of ", f);
      mt_html_text(f, r->name);
    }
    fputs("</summary><ul>\n", f);
    for (int k = 0; k < r->warning_count; k++) {
      fprintf(f, "<li><b>step %lld</b> ", (long long)r->warning[k].step);
      mt_html_text(f, r->warning[k].text);
      fputs("</li>\n", f);
    }
    if (r->warning_total > r->warning_count)
      fprintf(f, "<li>and %lld more</li>\n", (long long)(r->warning_total - r->warning_count));
    fputs("</ul></details>\n", f);
  }
}

static const char *member(const struct mt_run_sample *s, const char *key) {
  return json_string_value(json_object_get(s->object, key));
}

/* One question and what the model said to it, the oldest first. */
static void write_question(FILE *f, const struct mt_run *r, int index) {
  const struct mt_run_sample *any = NULL;
  for (int i = 0; i < r->sample_count; i++) {
    if (r->sample[i].index == index) any = &r->sample[i];
  }
  if (!any) return;
  fputs("<article class=\"card sample\"><h4>", f);
  const char *prompt = member(any, "prompt"), *expected = member(any, "expected");
  mt_html_text(f, prompt ? prompt : "");
  fputs("</h4>\n", f);
  if (expected) {
    fputs("<p class=\"expected\"><b>The data's answer</b> ", f);
    mt_html_text(f, expected);
    fputs("</p>\n", f);
  }
  fputs("<dl>\n", f);
  for (int i = 0; i < r->sample_count; i++) {
    const struct mt_run_sample *s = &r->sample[i];
    if (s->index != index) continue;
    const char *answer = member(s, "answer");
    fprintf(f, "<dt>step %lld</dt><dd>", (long long)s->step);
    mt_html_text(f, answer && *answer ? answer : "(nothing)");
    fputs("</dd>\n", f);
  }
  fputs("</dl></article>\n", f);
}

void mt_page_samples(FILE *f, const struct mt_run *runs, int count) {
  fputs("<section aria-labelledby=\"samples\"><h2 id=\"samples\">Samples</h2>\n", f);
  bool any = false;
  for (int i = 0; i < count; i++) {
    const struct mt_run *r = &runs[i];
    int most = -1;
    for (int k = 0; k < r->sample_count; k++) {
      if (r->sample[k].index > most) most = r->sample[k].index;
    }
    if (most < 0) continue;
    if (!any)
      fputs("<p class=\"lead\">The same questions at every evaluation, answered by the likeliest "
            "tokens.</p>\n",
            f);
    any = true;
    if (count > 1) {
      fputs("<h3>", f);
      mt_html_text(f, r->name);
      fputs("</h3>\n", f);
    }
    fputs("<div class=\"grid\">\n", f);
    for (int index = 0; index <= most && index < MT_RUN_SAMPLES; index++)
      write_question(f, r, index);
    fputs("</div>\n", f);
  }
  if (!any) fputs("<p class=\"empty\">No samples.</p>\n", f);
  fputs("</section>\n", f);
}

static bool differs(const struct mt_run *runs, int count, const char *section, const char *key) {
  for (int i = 1; i < count; i++) {
    const json_t *a = mt_run_fact(&runs[0], section, key), *b = mt_run_fact(&runs[i], section, key);
    if (!a != !b || (a && !json_equal(a, b))) return true;
  }
  return false;
}

static void write_key(FILE *f, const struct mt_run *runs, int count, const char *section,
                      const char *key) {
  bool other = differs(runs, count, section, key);
  fprintf(f, "<tr%s><th scope=\"row\">", other ? " class=\"differs\"" : "");
  char text[96];
  snprintf(text, sizeof text, "%s", key);
  for (char *c = text; *c; c++) *c = *c == '_' ? ' ' : *c;
  mt_html_text(f, text);
  if (other) fputs(" <span class=\"tag\">differs</span>", f);
  fputs("</th>", f);
  for (int i = 0; i < count; i++) {
    fputs("<td>", f);
    mt_html_json(f, mt_run_fact(&runs[i], section, key));
    fputs("</td>", f);
  }
  fputs("</tr>\n", f);
}

/* Keys of the first run that has each, in its order. */
static void write_section(FILE *f, const struct mt_run *runs, int count, const char *section,
                          const char *title) {
  bool any = false;
  for (int i = 0; i < count; i++) any |= json_object_get(runs[i].facts, section) != NULL;
  if (!any) return;
  fprintf(f,
          "<div class=\"card scroll\" tabindex=\"0\" role=\"region\" aria-label=\"%s\">"
          "<table class=\"pairs\"><caption>%s</caption>\n",
          title, title);
  if (count > 1) {
    fputs("<thead><tr><td></td>", f);
    for (int i = 0; i < count; i++) {
      fputs("<th scope=\"col\">", f);
      mt_html_text(f, runs[i].name);
      fputs("</th>", f);
    }
    fputs("</tr></thead>\n", f);
  }
  fputs("<tbody>\n", f);
  for (int i = 0; i < count; i++) {
    const char *key;
    json_t *value;
    json_object_foreach(json_object_get(runs[i].facts, section), key, value) {
      bool before = false;
      for (int k = 0; k < i; k++) before |= mt_run_fact(&runs[k], section, key) != NULL;
      if (!before) write_key(f, runs, count, section, key);
    }
  }
  fputs("</tbody></table></div>\n", f);
}

void mt_page_configuration(FILE *f, const struct mt_run *runs, int count) {
  fputs("<section aria-labelledby=\"configuration\"><h2 id=\"configuration\">Configuration</h2>\n"
        "<div class=\"grid\">\n",
        f);
  write_section(f, runs, count, "options", "Options");
  fputs("<div class=\"column\">\n", f);
  write_section(f, runs, count, "model", "Model");
  write_section(f, runs, count, "data", "Training data");
  write_section(f, runs, count, "eval_data", "Held-out data");
  write_section(f, runs, count, "device", "Device");
  fputs("</div></div></section>\n", f);
}
