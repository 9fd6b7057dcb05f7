/* A bump allocator for memory of one lifetime (parameters, gradients, optimizer, activations).
 *
 * Planning is the same code on an arena without memory: mt_arena_plan() makes one whose
 * allocations return NULL but are counted, so what `moetune inspect --train` prints is what a run
 * reserves, to the byte. A real arena is then given exactly the planned peak. */
#ifndef MT_BASE_ARENA_H
#define MT_BASE_ARENA_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"

enum { MT_ARENA_ALIGN = 256 }; /* cache lines, AVX-512 loads, TMA's 128 B, quantization blocks */

struct mt_arena {
  const char *name; /* static string, for messages */
  char *base;       /* NULL when planning */
  size_t capacity_bytes;
  size_t used_bytes;
  size_t peak_bytes;
  bool planning;
};

/* An arena without memory that only counts. */
void mt_arena_plan(struct mt_arena *a, const char *name);

/* An arena over memory that somebody else owns (a backend's: host or device), aligned to
 * MT_ARENA_ALIGN. base may be NULL when capacity_bytes is 0. */
void mt_arena_adopt(struct mt_arena *a, const char *name, void *base, size_t capacity_bytes);

/* Takes size_bytes rounded up to MT_ARENA_ALIGN; *out (=) is aligned to it, or NULL when planning.
 * Contents are undefined. Errors: MT_ENOMEM naming the arena (also on overflow of size_t). */
mt_err mt_arena_alloc(struct mt_arena *a, size_t size_bytes, void **out);

/* Stack discipline for scratch: everything taken after mark is given back by reset; the peak
 * remains. */
size_t mt_arena_mark(const struct mt_arena *a);
void mt_arena_reset(struct mt_arena *a, size_t mark);

/* Alternatives, sets of buffers that never live at one time, are laid over each other: each is
 * taken from one mark, with a reset between them. Reaching the farthest of their ends (marks) then
 * keeps the memory of all of them. */
void mt_arena_reach(struct mt_arena *a, size_t mark);

#endif
