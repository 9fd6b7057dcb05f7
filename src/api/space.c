/* Spaces and arrays. */
#include <limits.h>
#include <stdlib.h>

#include "api/blocks.h"
#include "base/error.h"
#include "kernels/registry.h"

mt_err mt_space_open(const char *device, int threads, mt_space **out) {
  if (!device) return mt_fail(MT_EINVAL, "device is NULL");
  if (threads < 0 || threads > 1024) return mt_fail(MT_EINVAL, "threads %d", threads);
  const char *name = device;
  if (strcmp(device, "auto") == 0) name = mt_cuda_device_count() > 0 ? "cuda" : "cpu";
  struct mt_space *s = calloc(1, sizeof *s);
  if (!s) return mt_fail(MT_ENOMEM, "a space");
  mt_err err = mt_backend_create(&s->be, name, threads);
  if (err) {
    free(s);
    return err;
  }
  bool reference = strcmp(name, "ref") == 0;
  s->full = reference ? MT_F64 : MT_F32;
  s->limits = (struct mt_limits){
      .experts = 1, .top_k = 1, .vocab = 1, .heads = 1, .kv_heads = 1, .head_dim = 2};
  s->recipe[0] = mt_recipe_find(reference ? "fp64" : "fp32");
  *out = s;
  return MT_OK;
}

void mt_space_close(mt_space *s) {
  if (!s) return;
  if (s->be.workspace) s->be.mem_free(&s->be, s->be.workspace, s->be.workspace_size_bytes);
  mt_backend_destroy(&s->be);
  free(s);
}

mt_err mt_recipe_begin(mt_space *s, const char *name) {
  const struct mt_recipe *r = name ? mt_recipe_choose(name, "fp32") : NULL;
  if (!r || r->stat != s->full || r->qformat != MT_Q_NONE) {
    return mt_fail(MT_EUNSUPPORTED, "no recipe '%s' on %s", name ? name : "(null)", s->be.name);
  }
  if (s->depth == MT_RECIPE_DEPTH) return mt_fail(MT_EINVAL, "recipes nested too deep");
  s->recipe[++s->depth] = r;
  return MT_OK;
}

mt_err mt_recipe_end(mt_space *s) {
  if (s->depth == 0) return mt_fail(MT_EINVAL, "no recipe was begun");
  s->depth--;
  return MT_OK;
}

/* Raises *most to n, and says so in *grown. */
static void raise_to(int64_t *most, int64_t n, bool *grown) {
  if (n <= *most) return;
  *most = n;
  *grown = true;
}

mt_err mt_space_reserve(struct mt_space *s, const struct mt_limits *l) {
  struct mt_limits *m = &s->limits, old = *m;
  struct mt_backend *be = &s->be;
  int64_t rows = l->rows > l->tokens ? l->rows : l->tokens;
  int64_t width = l->hidden > l->ffn ? l->hidden : l->ffn;
  bool grown = false;
  raise_to(&m->tokens, rows, &grown);
  raise_to(&m->rows, rows, &grown);
  raise_to(&m->hidden, width, &grown);
  raise_to(&m->ffn, width, &grown);
  raise_to(&m->experts, l->experts, &grown);
  raise_to(&m->top_k, l->top_k, &grown);
  raise_to(&m->heads, l->heads, &grown);
  raise_to(&m->kv_heads, l->kv_heads, &grown);
  raise_to(&m->head_dim, l->head_dim, &grown);
  if (!grown) return MT_OK;
  const enum mt_dtype formats[] = {s->full, s->full == MT_F64 ? MT_F64 : MT_BF16};
  size_t need = 0;
  for (int i = 0; i < 2; i++) {
    m->act = formats[i];
    size_t bytes = be->workspace_bytes(be, m);
    if (bytes > need) need = bytes;
  }
  if (need <= be->workspace_size_bytes) return MT_OK;
  void *fresh;
  mt_err err = be->sync(be);
  if (!err) err = be->mem_alloc(be, need, &fresh);
  if (err) {
    *m = old;
    return err;
  }
  if (be->workspace) be->mem_free(be, be->workspace, be->workspace_size_bytes);
  be->workspace = fresh;
  be->workspace_size_bytes = need;
  return MT_OK;
}

static mt_err make(struct mt_space *s, enum mt_array_kind kind, enum mt_dtype dtype, int rank,
                   const int64_t *dim, struct mt_array **out) {
  struct mt_tensor t = {.dtype = dtype, .rank = rank, .dim = {1, 1, 1}};
  int64_t count = 1;
  for (int i = 0; i < rank; i++) {
    if (dim[i] < 1 || dim[i] > INT_MAX || dim[i] > INT64_MAX / 16 / count)
      return mt_fail(MT_ESHAPE, "an array's dimension %d is %lld", i, (long long)dim[i]);
    t.dim[i] = dim[i];
    count *= dim[i];
  }
  t.ld = dim[rank - 1];
  struct mt_array *a = calloc(1, sizeof *a);
  if (!a) return mt_fail(MT_ENOMEM, "an array");
  *a = (struct mt_array){.s = s, .kind = kind, .t = t, .size_bytes = mt_bytes(&t), .version = 1};
  mt_err err = s->be.mem_alloc(&s->be, a->size_bytes, &a->t.data);
  if (!err) err = s->be.zero(&s->be, a->t.data, a->size_bytes);
  if (err)
    mt_array_free(a);
  else
    *out = a;
  return err;
}

mt_err mt_array_create(mt_space *s, enum mt_array_kind kind, int rank, const int64_t *dim,
                       mt_array **out) {
  if (rank < 1 || rank > MT_MAX_RANK) return mt_fail(MT_ESHAPE, "an array of rank %d", rank);
  switch (kind) {
  case MT_ARRAY_ACT:
    return make(s, kind, mt_space_recipe(s)->act, rank, dim, out);
  case MT_ARRAY_FULL:
    return make(s, kind, s->full, rank, dim, out);
  case MT_ARRAY_INT:
    return make(s, kind, MT_I32, rank, dim, out);
  }
  return mt_fail(MT_EINVAL, "no array kind %d", (int)kind);
}

void mt_array_free(mt_array *a) {
  if (!a) return;
  if (a->t.data) a->s->be.mem_free(&a->s->be, a->t.data, a->size_bytes);
  free(a);
}

mt_err mt_array_ensure(struct mt_space *s, struct mt_array **a, enum mt_dtype dtype, int rank,
                       int64_t d0, int64_t d1, int64_t d2) {
  const int64_t dim[MT_MAX_RANK] = {d0, d1, d2};
  struct mt_tensor want = {.dtype = dtype, .rank = rank, .dim = {d0, d1, d2}, .ld = dim[rank - 1]};
  if (*a && mt_bytes(&want) <= (*a)->size_bytes) {
    want.data = (*a)->t.data;
    (*a)->t = want;
    return MT_OK;
  }
  mt_array_free(*a);
  *a = NULL;
  return make(s, dtype == MT_I32 ? MT_ARRAY_INT : MT_ARRAY_ACT, dtype, rank, dim, a);
}

mt_err mt_array_ensure_ints(struct mt_space *s, struct mt_array **a, int64_t n) {
  return mt_array_ensure(s, a, MT_I32, 1, n, 1, 1);
}

int64_t mt_array_count(const mt_array *a) {
  return mt_count(&a->t);
}

int mt_array_rank(const mt_array *a) {
  return a->t.rank;
}

int64_t mt_array_dim(const mt_array *a, int i) {
  return i >= 0 && i < a->t.rank ? a->t.dim[i] : 0;
}

mt_err mt_array_check(const struct mt_array *a, const struct mt_space *s, const char *what,
                      enum mt_dtype dtype, int rank, int64_t d0, int64_t d1) {
  if (!a) return mt_fail(MT_EINVAL, "%s is NULL", what);
  if (a->s != s) return mt_fail(MT_EINVAL, "%s is of another space", what);
  if (a->t.dtype != dtype) {
    return mt_fail(MT_EINVAL, "%s is %s, expected %s: was it made under another recipe?", what,
                   mt_dtype_name(a->t.dtype), mt_dtype_name(dtype));
  }
  if (a->t.rank == rank && a->t.dim[0] == d0 && (rank < 2 || a->t.dim[1] == d1)) return MT_OK;
  return mt_fail(MT_ESHAPE, "%s has rank %d, dimensions %lld, %lld; expected rank %d, %lld, %lld",
                 what, a->t.rank, (long long)a->t.dim[0], (long long)a->t.dim[1], rank,
                 (long long)d0, (long long)(rank < 2 ? 1 : d1));
}

static mt_err check_ints(const mt_array *a, bool ints) {
  if ((a->t.dtype == MT_I32) == ints) return MT_OK;
  return mt_fail(MT_EINVAL, "the array holds %s", ints ? "numbers, not int32" : "int32");
}

mt_err mt_array_write(mt_array *a, const double *from) {
  MT_TRY(check_ints(a, false));
  void *stage = malloc(a->size_bytes);
  if (!stage) return mt_fail(MT_ENOMEM, "%zu bytes", a->size_bytes);
  mt_dtype_convert(stage, a->t.dtype, from, MT_F64, (size_t)mt_count(&a->t));
  mt_err err = a->s->be.upload(&a->s->be, a->t.data, stage, mt_bytes(&a->t));
  a->version++;
  free(stage);
  return err;
}

mt_err mt_array_read(const mt_array *a, double *to) {
  MT_TRY(check_ints(a, false));
  void *stage = malloc(a->size_bytes);
  if (!stage) return mt_fail(MT_ENOMEM, "%zu bytes", a->size_bytes);
  mt_err err = a->s->be.download(&a->s->be, stage, a->t.data, mt_bytes(&a->t));
  if (!err) mt_dtype_convert(to, MT_F64, stage, a->t.dtype, (size_t)mt_count(&a->t));
  free(stage);
  return err;
}

mt_err mt_array_write_ints(mt_array *a, const int32_t *from) {
  MT_TRY(check_ints(a, true));
  return a->s->be.upload(&a->s->be, a->t.data, from, mt_bytes(&a->t));
}

mt_err mt_array_read_ints(const mt_array *a, int32_t *to) {
  MT_TRY(check_ints(a, true));
  return a->s->be.download(&a->s->be, to, a->t.data, mt_bytes(&a->t));
}

mt_err mt_array_add(const mt_array *a, const mt_array *b, mt_array *y) {
  struct mt_space *s = a->s;
  if (a->t.rank != 2) return mt_fail(MT_ESHAPE, "add: a has rank %d, expected 2", a->t.rank);
  MT_TRY(mt_array_check(b, s, "b", a->t.dtype, 2, a->t.dim[0], a->t.dim[1]));
  MT_TRY(mt_array_check(y, s, "y", a->t.dtype, 2, a->t.dim[0], a->t.dim[1]));
  y->version++; /* it may be a parameter */
  return s->be.ops.add(&s->be, &(struct mt_add_args){.a = a->t, .b = b->t, .y = y->t});
}

mt_err mt_offsets_from_sizes(const int32_t *sizes, int groups, mt_array *offsets) {
  if (groups < 1) return mt_fail(MT_EINVAL, "%d groups", groups);
  MT_TRY(mt_array_check(offsets, offsets->s, "offsets", MT_I32, 1, (int64_t)groups + 1, 1));
  int32_t *host = calloc((size_t)groups + 1, sizeof *host);
  if (!host) return mt_fail(MT_ENOMEM, "%d offsets", groups);
  mt_err err = MT_OK;
  for (int g = 0; g < groups && !err; g++) {
    if (sizes[g] < 0 || sizes[g] > INT32_MAX - host[g])
      err = mt_fail(MT_EINVAL, "size %d of group %d", (int)sizes[g], g);
    else
      host[g + 1] = host[g] + sizes[g];
  }
  if (!err) err = mt_array_write_ints(offsets, host);
  free(host);
  return err;
}

mt_err mt_weight_create(struct mt_space *s, struct mt_weight *w, int rank, int64_t d0, int64_t d1,
                        int64_t d2, double fill) {
  const int64_t dim[] = {d0, d1, d2};
  MT_TRY(make(s, MT_ARRAY_FULL, s->full, rank, dim, &w->value));
  MT_TRY(make(s, MT_ARRAY_FULL, s->full, rank, dim, &w->grad));
  if (fill == 0) return MT_OK;
  size_t n = (size_t)mt_count(&w->value->t);
  double *host = malloc(n * sizeof *host);
  if (!host) return mt_fail(MT_ENOMEM, "a parameter");
  for (size_t i = 0; i < n; i++) host[i] = fill;
  mt_err err = mt_array_write(w->value, host);
  free(host);
  return err;
}

void mt_weight_free(struct mt_weight *w) {
  mt_array_free(w->value);
  mt_array_free(w->grad);
  mt_array_free(w->rounded);
  *w = (struct mt_weight){0};
}

mt_err mt_weight_compute(struct mt_weight *w, const struct mt_recipe *r, struct mt_tensor *out) {
  const struct mt_array *v = w->value;
  *out = v->t;
  if (r->act == v->t.dtype) return MT_OK;
  if (!w->rounded) {
    MT_TRY(make(v->s, MT_ARRAY_ACT, r->act, v->t.rank, v->t.dim, &w->rounded));
    w->rounded_version = 0;
  }
  *out = w->rounded->t;
  if (w->rounded_version == v->version) return MT_OK;
  double *host = malloc((size_t)mt_count(&v->t) * sizeof *host);
  if (!host) return mt_fail(MT_ENOMEM, "a rounded parameter");
  mt_err err = mt_array_read(v, host);
  if (!err) err = mt_array_write(w->rounded, host);
  if (!err) w->rounded_version = v->version;
  free(host);
  return err;
}
