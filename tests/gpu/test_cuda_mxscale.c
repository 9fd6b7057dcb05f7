/* The kernel that brings MX's scales into Blackwell's order, on any GPU. */
#include <stdio.h>

#include "gpu/gpu.h"

#ifdef MOETUNE_WITH_CUDA
#include "kernels/cuda/mxscale.cuh"
#include "kernels/mxscale_cases.h"
#include "ok.h"

static void *on_device(struct mt_backend *be, const void *host, size_t bytes) {
  void *p;
  OK(be->mem_alloc(be, bytes, &p));
  OK(be->upload(be, p, host, bytes));
  return p;
}

static void scales_are_in_blackwells_order(void **state) {
  (void)state;
  struct mt_backend be;
  OK(mt_backend_create(&be, "cuda", 1));
  for (int i = 0; i < SCALE_CASES; i++) {
    struct scales_tried t;
    scales_make(&t, &scale_cases[i]);
    uint8_t *got = malloc((size_t)t.bytes);
    memset(got, SCALE_POISON, (size_t)t.bytes);
    uint8_t *to = on_device(&be, got, (size_t)t.bytes);
    void *source = on_device(&be, t.source, (size_t)t.source_bytes);
    void *offsets = on_device(&be, t.offsets, sizeof t.offsets);
    void *padded = on_device(&be, t.padded, sizeof t.padded);
    struct mt_mx_scales s = t.s;
    s.scales = source;
    if (s.offsets) s.offsets = offsets, s.padded = padded;
    OK(mt_cuda_mx_scales(&be, &s, to));
    OK(be.download(&be, got, to, (size_t)t.bytes));
    if (memcmp(got, t.want, (size_t)t.bytes) != 0) fail_msg("case %d differs", i);
    be.mem_free(&be, to, (size_t)t.bytes);
    be.mem_free(&be, source, (size_t)t.source_bytes);
    be.mem_free(&be, offsets, sizeof t.offsets);
    be.mem_free(&be, padded, sizeof t.padded);
    free(got);
    scales_free(&t);
  }
  mt_backend_destroy(&be);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(scales_are_in_blackwells_order)};
  GPU_OR_SKIP();
  return cmocka_run_group_tests(tests, NULL, NULL);
}

#else

int main(void) {
  printf("skipped: this build has no CUDA\n");
  return GPU_SKIPPED;
}

#endif
