/* JSON as text. */
#ifndef MT_BASE_JSON_H
#define MT_BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>

/* The value's text under json_dumps' flags, freed by the caller; NULL when json is NULL, cannot be
 * written or memory is short. json_dumps itself leaves names out when a part of it finds none. */
char *mt_json_text(const json_t *json, size_t flags);

/* Whether untrusted text may be parsed: a value of two or three bytes ({}, or 1 in a list) takes up
 * to two hundred in memory, so that a large text of nothing else is refused. True up to 1 MiB, and
 * beyond for up to one bracket in 8 bytes and one comma in 4, which what we read stays below. */
bool mt_json_bearable(const char *text, size_t size);

#endif
