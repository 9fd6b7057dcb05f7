#include "kernels/cpu/gemm.h"

#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/tile.h"

/* A thread works on blocks KC x JC of the vectorised operand, packed into its L2 cache (295 KB),
 * and strips of IS rows of the broadcast operand. bf16 results are made in RESULT floats of
 * scratch. */
enum { KC = 512, JC = 3 * NR, IS = 64, IC = 1024 };
/* Strips that must be packed are worth more columns, and so shorter sums. */
enum { KC_COLUMNS = 256, JC_COLUMNS = 6 * NR };
enum {
  STRIP_FLOATS = IS * KC,
  RESULT_FLOATS = 160 * JC,
  BLOCK_FLOATS = KC * JC,
  LINE = 64,
};
_Static_assert((int)STRIP_FLOATS + (int)RESULT_FLOATS + (int)BLOCK_FLOATS <= (int)CPU_THREAD_FLOATS,
               "scratch fits");
_Static_assert(KC_COLUMNS *JC_COLUMNS <= KC * JC, "block fits");
_Static_assert((int)STRIP_FLOATS <= (int)CPU_PRODUCT_FLOATS, "a small product's scratch fits");

static int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* How a product is cut into tasks of ic x jc, and those into blocks of kc. Only kc decides the
 * order of a sum, and it is a function of the shape alone: bits do not depend on the threads. Many
 * products even out over the threads by themselves, so that theirs can be cut into whole tiles. */
struct cut {
  int64_t kc, jc, ic;
  bool columns;  /* the broadcast operand is contiguous along i */
  bool in_place; /* tiles read it where it lies: rows of F32 that do not all fall on the same sets
                    of the cache */
  bool direct;   /* tiles are written to the result itself */
  bool stream;   /* past the caches */
};

/* n in equal parts of at most `most`, rounded up to units; 1 at least. */
static int64_t even_part(int64_t n, int64_t most, int64_t unit) {
  int64_t parts = (n + most - 1) / most;
  if (parts > 1) return round_up((n + parts - 1) / parts, unit);
  return n > 0 ? n : 1;
}

static struct cut cut_of(const struct cpu_product *p, int64_t ic_most, bool many) {
  struct cut c = {.columns = p->a.stride_i == 1 && p->a.stride_k != 1,
                  .direct = p->c.dtype == MT_F32};
  c.in_place = !c.columns && p->a.dtype == MT_F32 && p->a.stride_i % 1024 != 0;
  c.kc = even_part(p->k_count, c.columns ? KC_COLUMNS : KC, 16);
  c.jc = even_part(p->j_count, c.columns ? JC_COLUMNS : JC, many ? NR : VW);
  c.stream = c.columns && c.direct && p->k_count <= c.kc && p->c.stride_i % VW == 0 &&
             (uintptr_t)p->c.data % sizeof(vec) == 0;
  if (!c.direct) ic_most = least(ic_most, RESULT_FLOATS / round_up(c.jc, NR) / MR * MR);
  c.ic = even_part(p->i_count, ic_most, MR);
  return c;
}

/* Memory that will be needed soon, as runs of lines for struct runs: along the rows of the region
 * or down its lines, whichever fits the length of a run better. */
struct region {
  const char *base;
  int64_t rows, row_bytes, lines;
  int64_t row, line, left; /* the next run; runs left */
  bool along;
};

static struct region region_of(const void *base, int64_t rows, int64_t row_bytes, int64_t bytes,
                               int64_t run) {
  struct region r = {.base = base, .rows = rows, .row_bytes = row_bytes};
  r.lines = (bytes + LINE - 1) / LINE;
  int64_t along = rows * ((r.lines + run - 1) / run), down = r.lines * ((rows + run - 1) / run);
  r.along = along <= down;
  r.left = r.along ? along : down;
  return r;
}

enum { REGIONS = 3 };
struct ahead {
  struct region region[REGIONS];
  int64_t run; /* lines of a run */
  const void *idle;
};

static const char *next_run(struct region *r, int64_t run) {
  const char *at = r->base + r->row * r->row_bytes + r->line * LINE;
  if (--r->left > 0) { /* the last one may be asked for again */
    r->line += r->along ? run : 1;
    if (r->line >= r->lines) {
      r->line = 0;
      r->row += r->along ? 1 : run;
    }
  }
  return at;
}

static void next_runs(struct ahead *a, struct runs *out) {
  struct region *r = a->region;
  while (r < a->region + REGIONS && r->left <= 0) r++;
  if (r == a->region + REGIONS) {
    for (int n = 0; n < 4; n++) out->start[n] = a->idle;
    out->step = 0;
    return;
  }
  out->step = r->along ? LINE : r->row_bytes;
  for (int n = 0; n < 4; n++) out->start[n] = next_run(r, a->run);
}

/* One tile of mr x nv; the layouts of a are compile-time constants of the inner loop. */
struct tile_args {
  int64_t kc;
  const float *a;
  int64_t lda; /* rows: between rows; columns: unused, panels of MR */
  const float *b;
  float *c;
  int64_t ldc;
  enum tile_store how;
};

#define ONE_TILE(mr, nv)                                                                           \
  (columns ? tile(mr, nv, t->kc, t->a, 1, MR, t->b, t->c, t->ldc, t->how, ahead)                   \
           : tile(mr, nv, t->kc, t->a, t->lda, 1, t->b, t->c, t->ldc, t->how, ahead))

static void run_tile(bool columns, bool half, int64_t vectors, const struct tile_args *t,
                     const struct runs *ahead) {
  switch ((half ? 3 : 0) + vectors) {
  case 1:
    ONE_TILE(MR, 1);
    break;
  case 2:
    ONE_TILE(MR, 2);
    break;
  case 3:
    ONE_TILE(MR, 3);
    break;
  case 4:
    ONE_TILE(MR / 2, 1);
    break;
  case 5:
    ONE_TILE(MR / 2, 2);
    break;
  default:
    ONE_TILE(MR / 2, 3);
    break;
  }
}

/* Where the result of a strip goes. */
struct target {
  float *c; /* element (first row of the strip, first column of the block) */
  int64_t ldc;
  enum tile_store how;
  bool exact; /* nothing may be written past the last row and column */
};

/* a: the strip's rows (lda) or panels; b: packed block [panels][kc][NR]. */
static void run_strip(bool columns, const float *a, int64_t lda, const float *b, int64_t kc,
                      int64_t in, int64_t jn, const struct target *to, struct ahead *ahead) {
  for (int64_t i = 0; i < in; i += MR) {
    int64_t rows = least(in - i, MR);
    for (int64_t j = 0; j < jn; j += NR) {
      int64_t lanes = least(jn - j, NR), vectors = (lanes + VW - 1) / VW;
      bool half = rows <= MR / 2;
      bool whole = !to->exact || (lanes % VW == 0 && (rows == MR || rows == MR / 2));
      float edge[MR * NR], *c = to->c + i * to->ldc + j;
      struct runs soon;
      next_runs(ahead, &soon);
      struct tile_args t = {kc,
                            columns ? a + i * kc : a + i * lda,
                            lda,
                            b + j * kc,
                            whole ? c : edge,
                            whole ? to->ldc : NR,
                            whole ? to->how : TILE_SET};
      run_tile(columns, half, vectors, &t, &soon);
      if (whole) continue;
      for (int64_t r = 0; r < rows; r++) {
        float *dst = c + r * to->ldc;
        const float *src = edge + r * NR;
        if (to->how == TILE_ADD) {
          for (int64_t n = 0; n < lanes; n++) dst[n] += src[n];
        } else {
          for (int64_t n = 0; n < lanes; n++) dst[n] = src[n];
        }
      }
    }
  }
}

/* Strip [i, i+n) of a at k0, as it lies in memory. */
static struct region strip_region(const struct cpu_product *p, const struct cut *cut, int64_t i,
                                  int64_t k0, int64_t run) {
  int64_t n = least(p->i_count - i, IS), kc = least(p->k_count - k0, cut->kc);
  int64_t item = (int64_t)mt_dtype_bytes(p->a.dtype);
  const char *base = (const char *)p->a.data + (i * p->a.stride_i + k0 * p->a.stride_k) * item;
  return cut->columns ? region_of(base, kc, p->a.stride_k * item, n * item, run)
                      : region_of(base, n, p->a.stride_i * item, kc * item, run);
}

/* Rows [i0, i0+in) of a times the packed block, strip by strip. */
static void run_rows(const struct cpu_product *p, const struct cut *cut, const float *block,
                     int64_t k0, int64_t kc, int64_t i0, int64_t in, int64_t jn,
                     const struct target *to, struct ahead *ahead, float *strip) {
  for (int64_t i = 0; i < in; i += IS) {
    int64_t n = least(in - i, IS), whole = cut->in_place ? n / MR * MR : 0;
    int64_t k_next = i + IS < in || k0 + kc >= p->k_count ? k0 : k0 + kc;
    int64_t i_next = i + IS < in ? i0 + i + IS : k_next > k0 ? i0 : i0 + in;
    if (i_next >= p->i_count) i_next = k_next = 0;
    ahead->region[0] = strip_region(p, cut, i_next, k_next, ahead->run);
    struct target here = *to;
    here.c += i * to->ldc;
    if (cut->columns) {
      mt_cpu_pack_columns(&p->a, i0 + i, n, k0, kc, strip);
      run_strip(true, strip, 0, block, kc, n, jn, &here, ahead);
      continue;
    }
    const float *a = (const float *)p->a.data + (i0 + i) * p->a.stride_i + k0;
    if (whole) run_strip(false, a, p->a.stride_i, block, kc, whole, jn, &here, ahead);
    if (whole < n) {
      mt_cpu_copy_rows(&p->a, i0 + i + whole, n - whole, k0, kc, strip);
      here.c += whole * to->ldc;
      run_strip(false, strip, kc, block, kc, n - whole, jn, &here, ahead);
    }
  }
}

/* Float32 scratch [in][ld] rounded into the result. */
static void store_scratch(const struct cpu_result *c, int64_t i0, int64_t in, int64_t j0,
                          int64_t jn, const float *result, int64_t ld) {
  for (int64_t i = 0; i < in; i++) {
    uint16_t *dst = (uint16_t *)c->data + (i0 + i) * c->stride_i + j0;
    const float *src = result + i * ld;
    if (c->accumulate) {
      for (int64_t j = 0; j < jn; j++) dst[j] = mt_f32_to_bf16(src[j] + mt_bf16_to_f32(dst[j]));
    } else {
      for (int64_t j = 0; j < jn; j++) dst[j] = mt_f32_to_bf16(src[j]);
    }
  }
}

static void store_zeros(const struct cpu_product *p, int64_t i0, int64_t in, int64_t j0,
                        int64_t jn) {
  size_t item = mt_dtype_bytes(p->c.dtype);
  if (p->c.accumulate) return;
  for (int64_t i = i0; i < i0 + in; i++) {
    memset((char *)p->c.data + (size_t)(i * p->c.stride_i + j0) * item, 0, (size_t)jn * item);
  }
}

/* One thread's place: what its packed block holds. */
struct worker {
  float *strip, *result, *block;
  const struct cpu_product *held;
  int64_t held_k, held_j;
};

static void hold_block(struct worker *w, const struct cpu_product *p, int64_t k0, int64_t kc,
                       int64_t j0, int64_t jn) {
  if (w->held == p && w->held_k == k0 && w->held_j == j0) return;
  mt_cpu_pack_vector(&p->b, k0, kc, j0, jn, w->block);
  w->held = p;
  w->held_k = k0;
  w->held_j = j0;
}

struct task {
  int64_t i0, in, j0, jn;
};

/* The block that will be packed after (k0, task), if it lies in the same product. */
static struct region block_after(const struct cpu_product *p, const struct cut *cut,
                                 const struct task *t, int64_t k0, int64_t run) {
  int64_t j0 = t->j0, item = (int64_t)mt_dtype_bytes(p->b.dtype);
  k0 += cut->kc;
  if (k0 >= p->k_count) {
    if (cut->kc < p->k_count || t->i0 + t->in >= p->i_count) j0 += cut->jc;
    if (j0 == t->j0 || j0 >= p->j_count) return (struct region){0};
    k0 = 0;
  }
  int64_t kc = least(p->k_count - k0, cut->kc), jn = least(p->j_count - j0, cut->jc);
  const char *base = (const char *)p->b.data + (k0 * p->b.stride_k + j0 * p->b.stride_j) * item;
  return p->b.stride_j == 1 ? region_of(base, kc, p->b.stride_k * item, jn * item, run)
                            : region_of(base, jn, p->b.stride_j * item, kc * item, run);
}

static void run_task(struct worker *w, const struct cpu_product *p, const struct cut *cut,
                     const struct task *t) {
  int64_t ld = cut->direct ? p->c.stride_i : round_up(t->jn, NR);
  for (int64_t k0 = 0; k0 < p->k_count; k0 += cut->kc) {
    int64_t kc = least(p->k_count - k0, cut->kc);
    struct ahead ahead = {.run = kc / 16 + 1, .idle = w->block};
    struct target to = {w->result, ld, k0 > 0 ? TILE_ADD : TILE_SET, false};
    hold_block(w, p, k0, kc, t->j0, t->jn);
    ahead.region[1] = block_after(p, cut, t, k0, ahead.run);
    if (cut->direct) {
      to = (struct target){(float *)p->c.data + t->i0 * ld + t->j0, ld,
                           p->c.accumulate || k0 > 0 ? TILE_ADD
                           : cut->stream             ? TILE_STREAM
                                                     : TILE_SET,
                           true};
      if (k0 == 0 && to.how != TILE_STREAM)
        ahead.region[2] = region_of(to.c, t->in, ld * 4, t->jn * 4, ahead.run);
    }
    run_rows(p, cut, w->block, k0, kc, t->i0, t->in, t->jn, &to, &ahead, w->strip);
  }
  if (p->k_count == 0)
    store_zeros(p, t->i0, t->in, t->j0, t->jn);
  else if (!cut->direct)
    store_scratch(&p->c, t->i0, t->in, t->j0, t->jn, w->result, ld);
}

static int64_t task_count(const struct cpu_product *p, const struct cut *c) {
  return ((p->i_count + c->ic - 1) / c->ic) * ((p->j_count + c->jc - 1) / c->jc);
}

/* i varies fastest: neighbouring tasks share the packed block. */
static struct task task_at(const struct cpu_product *p, const struct cut *c, int64_t n) {
  int64_t rows = (p->i_count + c->ic - 1) / c->ic;
  struct task t = {.i0 = n % rows * c->ic, .j0 = n / rows * c->jc};
  t.in = least(p->i_count - t.i0, c->ic);
  t.jn = least(p->j_count - t.j0, c->jc);
  return t;
}

/* Takes the next stretch of tasks: long ones first, so that a thread keeps its packed blocks, then
 * ever shorter ones, so that all threads end together. */
static int64_t take_tasks(int64_t *next, int64_t total, int threads, int64_t *begin) {
  int64_t left = total - __atomic_load_n(next, __ATOMIC_RELAXED);
  int64_t n = left / (4 * threads);
  if (n < 1) n = 1;
  *begin = __atomic_fetch_add(next, n, __ATOMIC_RELAXED);
  return least(*begin + n, total);
}

/* Rows of a task: as many as leave every thread the same share, since each task packs its block
 * anew. Tasks of one product are alike; those of several need to be more to even out. */
static int64_t choose_rows(const struct cpu_product *products, int count, int threads,
                           int64_t *total) {
  for (int64_t ic = IC;; ic /= 2) {
    *total = 0;
    for (int g = 0; g < count; g++) {
      struct cut cut = cut_of(&products[g], ic, count > 1);
      *total += task_count(&products[g], &cut);
    }
    if (*total >= 8 * (int64_t)threads || ic <= IS) return ic;
    if (count == 1 && *total % threads == 0) return ic;
  }
}

void mt_cpu_products(const struct mt_backend *be, const struct cpu_product *products, int count) {
  int64_t total, next = 0, ic = choose_rows(products, count, be->thread_count, &total);
  if (total == 0) return;
#pragma omp parallel num_threads(be->thread_count)
  {
    float *scratch = mt_cpu_thread_scratch(be, omp_get_thread_num());
    struct worker w = {.strip = scratch,
                       .result = scratch + STRIP_FLOATS,
                       .block = scratch + STRIP_FLOATS + RESULT_FLOATS};
    int64_t begin, end, first = 0;
    int g = 0;
    struct cut cut = cut_of(&products[0], ic, count > 1);
    while ((end = take_tasks(&next, total, omp_get_num_threads(), &begin)) > begin) {
      for (int64_t n = begin; n < end; n++) {
        while (n - first >= task_count(&products[g], &cut)) {
          first += task_count(&products[g], &cut);
          cut = cut_of(&products[++g], ic, count > 1);
        }
        struct task t = task_at(&products[g], &cut, n - first);
        run_task(&w, &products[g], &cut, &t);
      }
    }
    tile_stream_fence();
  }
}

size_t mt_cpu_packed_floats(int64_t j_count, int64_t k_count) {
  return (size_t)round_up(j_count, NR) * (size_t)k_count;
}

void mt_cpu_pack_here(const struct cpu_product *p, float *packed) {
  mt_cpu_pack_vector(&p->b, 0, p->k_count, 0, p->j_count, packed);
}

void mt_cpu_product_here(const struct cpu_product *p, const float *packed, float *scratch) {
  struct cut cut = cut_of(p, IC, false);
  struct ahead ahead = {.run = 1, .idle = packed};
  struct target to = {p->c.data, p->c.stride_i, p->c.accumulate ? TILE_ADD : TILE_SET, true};
  run_rows(p, &cut, packed, 0, p->k_count, 0, p->i_count, p->j_count, &to, &ahead, scratch);
}
