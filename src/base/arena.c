#include "base/arena.h"

#include <stdint.h>

void mt_arena_plan(struct mt_arena *a, const char *name) {
  *a = (struct mt_arena){.name = name, .capacity_bytes = SIZE_MAX, .planning = true};
}

void mt_arena_adopt(struct mt_arena *a, const char *name, void *base, size_t capacity_bytes) {
  *a = (struct mt_arena){.name = name, .base = base, .capacity_bytes = capacity_bytes};
}

mt_err mt_arena_alloc(struct mt_arena *a, size_t size_bytes, void **out) {
  *out = NULL;
  size_t room = a->capacity_bytes - a->used_bytes;
  if (size_bytes > SIZE_MAX - MT_ARENA_ALIGN) {
    return mt_fail(MT_ENOMEM, "arena '%s': request of %zu bytes overflows", a->name, size_bytes);
  }
  size_t take = (size_bytes + MT_ARENA_ALIGN - 1) / MT_ARENA_ALIGN * MT_ARENA_ALIGN;
  if (take > room) {
    return mt_fail(MT_ENOMEM, "arena '%s': %zu bytes asked, %zu of %zu left", a->name, take, room,
                   a->capacity_bytes);
  }
  if (a->base) *out = a->base + a->used_bytes;
  a->used_bytes += take;
  if (a->used_bytes > a->peak_bytes) a->peak_bytes = a->used_bytes;
  return MT_OK;
}

size_t mt_arena_mark(const struct mt_arena *a) {
  return a->used_bytes;
}

void mt_arena_reset(struct mt_arena *a, size_t mark) {
  if (mark <= a->used_bytes) a->used_bytes = mark;
}

void mt_arena_reach(struct mt_arena *a, size_t mark) {
  if (mark > a->used_bytes && mark <= a->peak_bytes) a->used_bytes = mark;
}
