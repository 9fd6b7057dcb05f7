#include "train/terminal.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utf8proc.h>

bool mt_color_wanted(enum mt_color choice, FILE *out) {
  const char *term = getenv("TERM"), *refused = getenv("NO_COLOR");
  if (choice != MT_COLOR_AUTO) return choice == MT_COLOR_ALWAYS;
  if (refused && *refused) return false;
  return isatty(fileno(out)) == 1 && term && strcmp(term, "dumb") != 0;
}

size_t mt_printable(const char *text, size_t size, size_t *skip) {
  int32_t c;
  *skip = 1;
  if ((uint8_t)text[0] >= 0x20 && (uint8_t)text[0] < 0x7f) return 1;
  utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)size, &c);
  if (n <= 0) return 0;
  utf8proc_category_t kind = utf8proc_category(c);
  *skip = (size_t)n;
  bool hidden = kind == UTF8PROC_CATEGORY_CC || kind == UTF8PROC_CATEGORY_CF ||
                kind == UTF8PROC_CATEGORY_ZL || kind == UTF8PROC_CATEGORY_ZP;
  if (c == 0x200c || c == 0x200d) hidden = false; /* joiners: words and emoji need them */
  return hidden ? 0 : (size_t)n;
}

void mt_print_safe(FILE *out, const char *text, size_t size) {
  for (size_t at = 0, skip; at < size; at += skip) {
    size_t n = mt_printable(text + at, size - at, &skip);
    if (n) fwrite(text + at, 1, n, out);
    for (size_t i = 0; !n && i < skip; i++) fprintf(out, "\\x%02x", (uint8_t)text[at + i]);
  }
}

void mt_print_bar(FILE *out, double share, int width) {
  int cells = (int)(share * width + 0.5);
  if (cells == 0 && share > 0) cells = 1;
  for (int i = 0; i < cells && i < width; i++) fputc('#', out);
}
