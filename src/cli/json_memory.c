#include "cli/json_memory.h"

#include <jansson.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { RESERVE_BYTES = 256 << 10, ALIGN = 16 };

static _Alignas(ALIGN) char reserve[RESERVE_BYTES];
static atomic_size_t used;

/* Of the reserve nothing is given back: whoever lives from it will not live long. */
static void *take(size_t size) {
  void *p = malloc(size);
  if (p) return p;
  size_t room = (size + ALIGN - 1) / ALIGN * ALIGN;
  if (room >= size && room <= RESERVE_BYTES) {
    size_t at = atomic_fetch_add(&used, room);
    if (at <= RESERVE_BYTES - room) return reserve + at;
  }
  fflush(stdout);
  fprintf(stderr, "moetune: error: out of memory: %zu bytes of JSON\n", size);
  _Exit(1);
}

static void give_back(void *p) {
  uintptr_t at = (uintptr_t)p, begin = (uintptr_t)reserve;
  if (at < begin || at >= begin + RESERVE_BYTES) free(p);
}

void mt_json_memory_reserve(void) {
  json_set_alloc_funcs(take, give_back);
}
