#include "backend/device.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static mt_err host_alloc(struct mt_backend *be, size_t size_bytes, void **out) {
  (void)be;
  *out = NULL;
  if (size_bytes == 0) return MT_OK;
  /* mmap rather than malloc: pages are resident only once touched, and huge pages can be asked
   * for (they are worth several percent of a product's time). */
  void *p = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    return mt_fail(MT_ENOMEM, "cannot reserve %zu bytes of host memory", size_bytes);
  }
  (void)madvise(p, size_bytes, MADV_HUGEPAGE);
  *out = p;
  return MT_OK;
}

static void host_free(struct mt_backend *be, void *p, size_t size_bytes) {
  (void)be;
  if (p) munmap(p, size_bytes);
}

static mt_err host_copy(struct mt_backend *be, void *dst, const void *src, size_t size_bytes) {
  (void)be;
  if (size_bytes) memcpy(dst, src, size_bytes);
  return MT_OK;
}

static mt_err host_zero(struct mt_backend *be, void *p, size_t size_bytes) {
  (void)be;
  if (size_bytes) memset(p, 0, size_bytes);
  return MT_OK;
}

static mt_err host_sync(struct mt_backend *be) {
  (void)be;
  return MT_OK;
}

static struct timespec host_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t;
}

static mt_err host_stamp(struct mt_backend *be, int slot) {
  struct timespec t = host_now();
  be->host_stamp_s[slot] = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
  return MT_OK;
}

static mt_err host_clock_enter(struct mt_backend *be, struct mt_clock *clock, int phase,
                               bool restart) {
  struct timespec t = host_now();
  uint64_t now = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
  (void)be;
  if (restart)
    *clock = (struct mt_clock){.phase = -1};
  else if (clock->phase >= 0)
    clock->phase_ns[clock->phase] += now - clock->last_ns;
  clock->last_ns = now;
  clock->phase = phase;
  return MT_OK;
}

static mt_err host_stamp_read(struct mt_backend *be, int from, int to, double *seconds) {
  *seconds = be->host_stamp_s[to] - be->host_stamp_s[from];
  return MT_OK;
}

static mt_err host_stamp_wait(struct mt_backend *be, int slot) {
  (void)be;
  (void)slot;
  return MT_OK;
}

static mt_err host_stamp_passed(struct mt_backend *be, int slot, bool *passed) {
  (void)be;
  (void)slot;
  *passed = true;
  return MT_OK;
}

static mt_err host_calloc(struct mt_backend *be, size_t size_bytes, void **out) {
  (void)be;
  *out = calloc(1, size_bytes ? size_bytes : 1);
  return *out ? MT_OK : mt_fail(MT_ENOMEM, "%zu bytes", size_bytes);
}

static void host_release(struct mt_backend *be, void *p) {
  (void)be;
  free(p);
}

void mt_backend_use_host_memory(struct mt_backend *be) {
  be->mem_alloc = host_alloc;
  be->mem_free = host_free;
  be->upload = host_copy;
  be->download = host_copy;
  be->zero = host_zero;
  be->copy = host_copy;
  be->sync = host_sync;
  be->stamp = host_stamp;
  be->stamp_read = host_stamp_read;
  be->stamp_passed = host_stamp_passed;
  be->stamp_wait = host_stamp_wait;
  be->clock_enter = host_clock_enter;
  be->download_later = host_copy;
  be->host_alloc = host_calloc;
  be->host_free = host_release;
  be->steps_ahead = 1;
}

void mt_backend_destroy(struct mt_backend *be) {
  if (be->destroy) be->destroy(be);
  *be = (struct mt_backend){0};
}

const char *mt_op_name(int i) {
  static const char *const names[] = {
#define X(op) #op,
      MT_OP_LIST(X)
#undef X
  };
  return i >= 0 && i < (int)(sizeof names / sizeof *names) ? names[i] : NULL;
}

mt_err mt_backend_check(const struct mt_backend *be) {
#define X(op)                                                                                      \
  if (!be->ops.op) {                                                                               \
    return mt_fail(MT_EUNSUPPORTED, "backend '%s' has no operation '%s'", be->name, #op);          \
  }
  MT_OP_LIST(X)
#undef X
  return MT_OK;
}
