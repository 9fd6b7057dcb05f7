/* JSON as text. */
#ifndef MT_BASE_JSON_H
#define MT_BASE_JSON_H

#include <jansson.h>

/* The value's text under json_dumps' flags, freed by the caller; NULL when json is NULL, cannot be
 * written or memory is short. json_dumps itself leaves names out when a part of it finds none. */
char *mt_json_text(const json_t *json, size_t flags);

#endif
