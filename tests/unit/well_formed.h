/* A strict look at a page: as XML, every element closed in order, attributes quoted and not twice,
 * nothing but known entities. */
#ifndef TESTS_UNIT_WELL_FORMED_H
#define TESTS_UNIT_WELL_FORMED_H

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

static inline void bad_page(const char *text, const char *at, const char *why) {
  int line = 1;
  for (const char *p = text; p < at; p++) line += *p == '\n';
  fail_msg("line %d: %s: %.80s", line, why, at);
}

/* An entity at p; its length. */
static inline size_t page_entity(const char *text, const char *p) {
  static const char *const known[] = {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&#160;"};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (strncmp(p, known[i], strlen(known[i])) == 0) return strlen(known[i]);
  bad_page(text, p, "unknown entity");
  return 1;
}

static inline const char *page_attributes(const char *text, const char *p) {
  const char *names[32];
  size_t lengths[32];
  int count = 0;
  for (;;) {
    size_t space = strspn(p, " \n\t");
    p += space;
    if (*p == '>' || *p == '/') return p;
    if (!space) bad_page(text, p, "no space before an attribute");
    size_t n = strcspn(p, "= \n\t<>\"'");
    if (!n || p[n] != '=' || p[n + 1] != '"') bad_page(text, p, "an attribute without quotes");
    for (int i = 0; i < count; i++)
      if (lengths[i] == n && memcmp(names[i], p, n) == 0) bad_page(text, p, "an attribute twice");
    if (count == 32) bad_page(text, p, "many attributes");
    names[count] = p;
    lengths[count++] = n;
    for (p += n + 2; *p != '"';) {
      if (!*p || *p == '<') bad_page(text, p, "an attribute that does not end");
      p += *p == '&' ? page_entity(text, p) : 1;
    }
    p++;
  }
}

static inline void assert_well_formed(const char *text) {
  char stack[64][32];
  int depth = 0;
  const char *p = text;
  if (strncmp(p, "<!DOCTYPE html>\n", 16) != 0) bad_page(text, p, "no document type");
  for (p += 16; *p;) {
    unsigned char c = (unsigned char)*p;
    if (c < 32 && c != '\n' && c != '\t') bad_page(text, p, "a control character");
    if (*p == '&') {
      p += page_entity(text, p);
    } else if (strncmp(p, "<![CDATA[", 9) == 0) {
      const char *end = strstr(p, "]]>");
      if (!end) bad_page(text, p, "CDATA that does not end");
      p = end + 3;
    } else if (p[0] == '<' && p[1] == '/') {
      size_t n = strcspn(p + 2, ">");
      if (!depth || strlen(stack[depth - 1]) != n || memcmp(stack[depth - 1], p + 2, n) != 0)
        bad_page(text, p, depth ? stack[depth - 1] : "nothing is open");
      depth--;
      p += n + 3;
    } else if (*p == '<') {
      size_t n = strcspn(p + 1, " \n\t/>");
      if (!isalpha((unsigned char)p[1]) || n > 31 || depth == 64) bad_page(text, p, "no element");
      snprintf(stack[depth], sizeof stack[depth], "%.*s", (int)n, p + 1);
      p = page_attributes(text, p + 1 + n);
      if (*p == '/' && p[1] != '>') bad_page(text, p, "a lone slash");
      depth += *p == '>';
      p += *p == '>' ? 1 : 2;
    } else {
      if (strncmp(p, "]]>", 3) == 0) bad_page(text, p, "CDATA ends where none began");
      p++;
    }
  }
  if (depth) bad_page(text, p, stack[depth - 1]);
}

#endif
