#include "base/json.h"

#include <stdlib.h>
#include <string.h>

struct text {
  char *data;
  size_t size, capacity;
  bool failed;
};

static int append(const char *data, size_t size, void *arg) {
  struct text *t = arg;
  if (t->failed) return -1;
  if (t->capacity - t->size <= size) { /* and a terminating 0 */
    size_t capacity = t->capacity * 2 + size + 256;
    char *grown = realloc(t->data, capacity);
    if (!grown) {
      t->failed = true;
      return -1;
    }
    t->data = grown;
    t->capacity = capacity;
  }
  memcpy(t->data + t->size, data, size);
  t->size += size;
  t->data[t->size] = '\0';
  return 0;
}

char *mt_json_text(const json_t *json, size_t flags) {
  struct text t = {0};
  if (json && json_dump_callback(json, append, &t, flags) == 0 && !t.failed) return t.data;
  free(t.data);
  return NULL;
}

bool mt_json_bearable(const char *text, size_t size) {
  size_t brackets = 0, commas = 0;
  bool quoted = false;
  if (size <= (size_t)1 << 20) return true;
  for (size_t i = 0; i < size; i++) {
    char c = text[i];
    if (c == '"')
      quoted = !quoted;
    else if (quoted)
      i += c == '\\';
    else if (c == '{' || c == '[')
      brackets++;
    else if (c == ',')
      commas++;
  }
  return brackets <= size / 8 && commas <= size / 4;
}
