/* Text -> values of the option table. */
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "cli/options.h"

static mt_err check_range(const struct mt_option *row, double value, const char *text) {
  if (row->min == 0 && row->max == 0) return MT_OK;
  if (value >= row->min && value <= row->max && !(row->above_min && value == row->min)) {
    return MT_OK;
  }
  const char *low = row->above_min ? "above" : "at least";
  if (row->max >= DBL_MAX) {
    return mt_fail(MT_EINVAL, "%s is out of range: %s %g expected", text, low, row->min);
  }
  return mt_fail(MT_EINVAL, "%s is out of range: %s %.10g and at most %.10g expected", text, low,
                 row->min, row->max);
}

/* strtoll and its kin skip white space in front; we do not. */
static bool begins_number(const char *text, bool may_be_negative) {
  if (may_be_negative && *text == '-') text++;
  return *text >= '0' && *text <= '9';
}

static mt_err parse_int(const struct mt_option *row, const char *text, long long low,
                        long long high, long long *out) {
  char *end = NULL;
  errno = 0;
  *out = strtoll(text, &end, 10);
  if (!begins_number(text, true) || *end) {
    return mt_fail(MT_EINVAL, "'%s' is not a whole number", text);
  }
  if (errno || *out < low || *out > high) return mt_fail(MT_EINVAL, "%s is out of range", text);
  return check_range(row, (double)*out, text);
}

static mt_err parse_uint64(const struct mt_option *row, const char *text, uint64_t *out) {
  char *end = NULL;
  errno = 0;
  unsigned long long value = strtoull(text, &end, 10);
  if (!begins_number(text, false) || *end) {
    return mt_fail(MT_EINVAL, "'%s' is not a whole number of 0 or more", text);
  }
  if (errno) return mt_fail(MT_EINVAL, "%s is out of range", text);
  *out = value;
  return check_range(row, (double)value, text);
}

static mt_err parse_real(const struct mt_option *row, const char *text, double *out) {
  char *end = NULL;
  /* No hexadecimal, no "nan", no "inf". */
  bool plain = *text && strspn(text, "0123456789+-.eE") == strlen(text);
  errno = 0;
  *out = plain ? strtod(text, &end) : 0;
  if (!plain || *end) return mt_fail(MT_EINVAL, "'%s' is not a number", text);
  if (!isfinite(*out)) return mt_fail(MT_EINVAL, "%s is out of range", text);
  return check_range(row, *out, text);
}

static mt_err parse_bytes(const struct mt_option *row, const char *text, uint64_t *out) {
  static const struct {
    const char *suffix;
    double factor;
  } unit[] = {
      {"", 1},      {"B", 1},        {"KB", 1e3},     {"MB", 1e6},     {"GB", 1e9},
      {"TB", 1e12}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40},
  };
  size_t digits = strspn(text, "0123456789.");
  char *end = NULL;
  double number = digits ? strtod(text, &end) : 0;
  if (digits && end == text + digits) {
    for (size_t i = 0; i < sizeof unit / sizeof *unit; i++) {
      if (strcasecmp(end, unit[i].suffix) != 0) continue;
      double bytes = number * unit[i].factor;
      if (bytes >= 0x1p63) return mt_fail(MT_EINVAL, "%s is out of range", text);
      *out = (uint64_t)bytes;
      return check_range(row, bytes, text);
    }
  }
  return mt_fail(MT_EINVAL, "'%s' is not a size such as 500MB, 5GB or 4GiB", text);
}

/* Index of text in "a|b|c". */
static mt_err parse_choice(const struct mt_option *row, const char *text, int *index) {
  size_t length = strlen(text);
  const char *name = row->choices;
  for (int i = 0;; i++) {
    size_t name_length = strcspn(name, "|");
    if (name_length == length && memcmp(name, text, length) == 0) {
      *index = i;
      return MT_OK;
    }
    if (!name[name_length]) break;
    name += name_length + 1;
  }
  return mt_fail(MT_EINVAL, "'%s' is none of %s", text, row->choices);
}

mt_err mt_option_parse_value(const struct mt_option *row, const char *text, void *field) {
  long long whole;
  int index;
  switch (row->type) {
  case MT_OPT_FLAG:
    if (strcmp(text, "true") == 0 || strcmp(text, "false") == 0) {
      *(bool *)field = *text == 't';
      return MT_OK;
    }
    return mt_fail(MT_EINVAL, "'%s' is neither true nor false", text);
  case MT_OPT_INT:
    MT_TRY(parse_int(row, text, INT32_MIN, INT32_MAX, &whole));
    *(int *)field = (int)whole;
    return MT_OK;
  case MT_OPT_INT64:
    MT_TRY(parse_int(row, text, INT64_MIN, INT64_MAX, &whole));
    *(int64_t *)field = whole;
    return MT_OK;
  case MT_OPT_UINT64:
    return parse_uint64(row, text, field);
  case MT_OPT_REAL:
    return parse_real(row, text, field);
  case MT_OPT_BYTES:
    return parse_bytes(row, text, field);
  case MT_OPT_CHOICE:
    return parse_choice(row, text, field);
  case MT_OPT_NAME:
    MT_TRY(parse_choice(row, text, &index));
    *(const char **)field = text;
    return MT_OK;
  case MT_OPT_TEXT:
    if (!*text) return mt_fail(MT_EINVAL, "the value is empty");
    *(const char **)field = text;
    return MT_OK;
  case MT_OPT_OPTIONAL:
    *(const char **)field = text;
    return MT_OK;
  case MT_OPT_LIST:
    break;
  }
  return mt_fail(MT_EINVAL, "a list");
}
