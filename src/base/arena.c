#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

void mt_arena_plan(struct mt_arena *a, const char *name) {
  *a = (struct mt_arena){.name = name, .capacity_bytes = SIZE_MAX, .planning = true};
}

mt_err mt_arena_create(struct mt_arena *a, const char *name, size_t capacity_bytes) {
  *a = (struct mt_arena){.name = name, .capacity_bytes = capacity_bytes};
  if (capacity_bytes == 0) return MT_OK;
  /* mmap rather than malloc: pages come zeroed and are only resident once touched, and huge pages
   * can be asked for (they are worth several percent of a GEMM's time). */
  void *p = mmap(NULL, capacity_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    return mt_fail(MT_ENOMEM, "arena '%s': cannot reserve %zu bytes", name, capacity_bytes);
  }
  (void)madvise(p, capacity_bytes, MADV_HUGEPAGE);
  a->base = p;
  return MT_OK;
}

void mt_arena_adopt(struct mt_arena *a, const char *name, void *base, size_t capacity_bytes) {
  *a = (struct mt_arena){.name = name, .base = base, .capacity_bytes = capacity_bytes};
}

void mt_arena_destroy(struct mt_arena *a) {
  if (a->base) munmap(a->base, a->capacity_bytes);
  *a = (struct mt_arena){.name = a->name};
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
