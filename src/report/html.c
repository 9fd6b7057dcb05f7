#include "report/html.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <utf8proc.h>

void mt_html_text(FILE *f, const char *text) {
  const utf8proc_uint8_t *p = (const utf8proc_uint8_t *)text;
  for (utf8proc_ssize_t left = (utf8proc_ssize_t)strlen(text); left > 0;) {
    utf8proc_int32_t c;
    utf8proc_ssize_t n = utf8proc_iterate(p, left, &c);
    bool bad =
        n <= 0 || (c < 32 && c != '\n' && c != '\t') || c == 127 || c == 0xfffe || c == 0xffff;
    if (n <= 0) n = 1;
    if (bad)
      fputs("\xef\xbf\xbd", f);
    else if (c == '&')
      fputs("&amp;", f);
    else if (c == '<')
      fputs("&lt;", f);
    else if (c == '>')
      fputs("&gt;", f);
    else if (c == '"')
      fputs("&quot;", f);
    else if (c == '\'')
      fputs("&#39;", f);
    else
      fwrite(p, 1, (size_t)n, f);
    p += n;
    left -= n;
  }
}

void mt_html_json(FILE *f, const json_t *v) {
  if (json_is_string(v)) {
    mt_html_text(f, json_string_value(v));
  } else if (json_is_integer(v)) {
    fprintf(f, "%lld", (long long)json_integer_value(v));
  } else if (json_is_real(v)) {
    fprintf(f, "%.6g", json_real_value(v));
  } else if (json_is_boolean(v)) {
    fputs(json_is_true(v) ? "yes" : "no", f);
  } else if (json_is_array(v) && json_array_size(v) > 0) {
    for (size_t i = 0; i < json_array_size(v); i++) {
      if (i) fputs(", ", f);
      mt_html_json(f, json_array_get(v, i));
    }
  } else {
    fputs("–", f);
  }
}

static const char *none(char *out) {
  snprintf(out, MT_SHORT_TEXT, "–");
  return out;
}

/* So many significant digits, without zeros at the end. */
static void trimmed(char *out, double x, int digits, const char *suffix) {
  double a = fabs(x);
  int decimals = a > 0 ? digits - 1 - (int)floor(log10(a)) : 0;
  snprintf(out, MT_SHORT_TEXT, "%.*f", decimals < 0 ? 0 : decimals, x);
  if (strchr(out, '.')) {
    size_t n = strlen(out);
    while (out[n - 1] == '0') out[--n] = '\0';
    if (out[n - 1] == '.') out[--n] = '\0';
  }
  strncat(out, suffix, MT_SHORT_TEXT - 1 - strlen(out));
}

const char *mt_short_number(char *out, double x) {
  static const char *const suffix[] = {"", "k", "M", "G", "T"};
  double a = fabs(x);
  int i = 0;
  if (!isfinite(x)) return none(out);
  if (a != 0 && (a < 1e-3 || a >= 1e15)) {
    char text[MT_SHORT_TEXT];
    snprintf(text, sizeof text, "%.2e", x);
    char *e = strchr(text, 'e');
    int power = e ? (int)strtol(e + 1, NULL, 10) : 0;
    if (e) *e = '\0';
    while (strchr(text, '.') && (text[strlen(text) - 1] == '0' || text[strlen(text) - 1] == '.'))
      text[strlen(text) - 1] = '\0';
    snprintf(out, MT_SHORT_TEXT, "%.20se%d", text, power);
    return out;
  }
  for (; a >= (i ? 999.5 : 9999.5) && i < 4; i++) a /= 1000;
  if (i == 0 && a < 9999.5)
    trimmed(out, x, 4, "");
  else
    trimmed(out, x < 0 ? -a : a, 3, suffix[i]);
  return out;
}

const char *mt_short_percent(char *out, double share) {
  double p = 100 * share;
  if (!isfinite(share)) return none(out);
  snprintf(out, MT_SHORT_TEXT, p != 0 && fabs(p) < 0.1 ? "%.2g%%" : "%.1f%%", p);
  return out;
}

const char *mt_short_bytes(char *out, double bytes) {
  static const char *const suffix[] = {" B", " kB", " MB", " GB", " TB"};
  int i = 0;
  if (!isfinite(bytes)) return none(out);
  for (; bytes >= 999.5 && i < 4; i++) bytes /= 1000;
  trimmed(out, bytes, 3, suffix[i]);
  return out;
}

const char *mt_short_seconds(char *out, double s) {
  if (!(fabs(s) < 1e15)) return none(out); /* no time that anyone has measured */
  if (s < 60) {
    trimmed(out, s, s < 10 ? 2 : 3, " s");
    return out;
  }
  long long t = (long long)(s + 0.5);
  if (t < 3600)
    snprintf(out, MT_SHORT_TEXT, "%lld min %02lld s", t / 60, t % 60);
  else if (t < 48 * 3600)
    snprintf(out, MT_SHORT_TEXT, "%lld h %02lld min", t / 3600, t / 60 % 60);
  else
    snprintf(out, MT_SHORT_TEXT, "%lld d %lld h", t / 86400, t / 3600 % 24);
  return out;
}

const char *mt_short_date(char *out, int64_t seconds) {
  time_t t = (time_t)seconds;
  struct tm tm;
  if (!gmtime_r(&t, &tm) || strftime(out, MT_SHORT_TEXT, "%Y-%m-%d %H:%M UTC", &tm) == 0)
    return none(out);
  return out;
}

static int log_ticks(double lo, double hi, int wanted, double *out, int max) {
  static const double part[] = {1, 2, 5};
  double decades = log10(hi) - log10(lo); /* hi / lo may be infinite */
  int parts = decades * 3 <= wanted + 2 ? 3 : 1, n = 0;
  int every = parts == 1 ? (int)ceil(decades / wanted) : 1;
  if (every < 1) every = 1;
  for (int d = (int)floor(log10(lo)); d <= (int)ceil(log10(hi)); d++) {
    if (d % every != 0) continue;
    for (int i = 0; i < parts && n < max; i++) {
      double x = part[i] * pow(10, d);
      if (x >= lo * (1 - 1e-9) && x <= hi * (1 + 1e-9)) out[n++] = x;
    }
  }
  return n;
}

int mt_ticks(double lo, double hi, int wanted, int log, double *out, int max) {
  if (!(hi > lo) || wanted < 1) return 0;
  if (log) return log_ticks(lo, hi, wanted, out, max);
  double raw = (hi - lo) / wanted, power = pow(10, floor(log10(raw)));
  double part = raw / power;
  double step = power * (part < 1.5 ? 1 : part < 3.5 ? 2 : part < 7.5 ? 5 : 10);
  double first = ceil(lo / step - 1e-9);
  int n = 0;
  for (; n < max && (first + n) * step <= hi + 1e-9 * step; n++)
    out[n] = first + n == 0 ? 0 : (first + n) * step;
  return n;
}
