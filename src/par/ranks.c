#include "par/ranks.h"

#include <stdlib.h>
#include <string.h>

#include "par/exchange.h"

/* Gradients summed at a time, and what a rank's part of them is a multiple of. */
enum { BUCKET_ELEMENTS = 8 << 20, PART_ELEMENTS = 64 };

struct mt_shard mt_ranks_shard(const struct mt_mesh *mesh) {
  return (struct mt_shard){(int)mesh->expert_begin, (int)mesh->expert_end};
}

mt_err mt_ranks_open(struct mt_ranks *r, struct mt_world *world, const struct mt_mesh *mesh) {
  mt_err err = MT_OK;
  *r = (struct mt_ranks){.world = world, .mesh = *mesh, .bucket_elements = BUCKET_ELEMENTS};
  if (mesh->pp > 1) {
    return mt_fail(MT_EUNSUPPORTED, "--pp-size %d: a model is not cut into stages yet", mesh->pp);
  }
  for (int g = 0; g < MT_GROUP_COUNT; g++) {
    MT_GO(mt_world_group(world, mesh, (enum mt_group)g, &r->comm[g]));
  }
done:
  if (err) mt_ranks_close(r);
  return err;
}

void mt_ranks_close(struct mt_ranks *r) {
  if (r->model) mt_exchange_close(r->model);
  for (int g = 0; g < MT_GROUP_COUNT; g++) mt_comm_destroy(&r->comm[g]);
  free(r->views);
  free(r->parts);
  *r = (struct mt_ranks){0};
}

mt_err mt_ranks_join(struct mt_ranks *r, struct mt_model *m) {
  if (m->be->memory_used) {
    return mt_fail(MT_EUNSUPPORTED, "%s: ranks exchange what is in the host's memory alone yet",
                   m->be->name);
  }
  r->views = calloc((size_t)m->params.count, sizeof *r->views);
  if (!r->views) return mt_fail(MT_ENOMEM, "%d gradients", m->params.count);
  r->model = m;
  return mt_exchange_over(m, &r->comm[MT_GROUP_EXPERT], &r->comm[MT_GROUP_DENSE]);
}

/* Everyone's numbers in the order of ranks. */
static mt_err gather(struct mt_ranks *r, const void *mine, size_t bytes, char **all) {
  struct mt_comm *c = &r->comm[MT_GROUP_DENSE];
  size_t n = (size_t)c->size;
  int64_t *parts = calloc(2 * n, sizeof *parts);
  *all = malloc(n * bytes);
  mt_err err = MT_ENOMEM;
  if (!parts || !*all) {
    mt_fail(MT_ENOMEM, "numbers of %d ranks", c->size);
    goto done;
  }
  for (int i = 0; i < c->size; i++) parts[i] = 1, parts[c->size + i] = i;
  memcpy(*all + (size_t)c->rank * bytes, mine, bytes);
  err = mt_comm_all_gather(c, *all, (struct mt_parts){parts, parts + n}, bytes, NULL);
done:
  free(parts);
  return err;
}

mt_err mt_ranks_sum_counts(struct mt_ranks *r, int64_t *numbers, int n) {
  size_t bytes = (size_t)n * sizeof *numbers;
  char *all = NULL;
  mt_err err = gather(r, numbers, bytes, &all);
  if (!err) memset(numbers, 0, bytes);
  for (int i = 0; !err && i < r->comm[MT_GROUP_DENSE].size; i++) {
    const int64_t *one = (const int64_t *)(const void *)(all + (size_t)i * bytes);
    for (int k = 0; k < n; k++) numbers[k] += one[k];
  }
  free(all);
  return err;
}

mt_err mt_ranks_sum(struct mt_ranks *r, double *numbers, int n) {
  size_t bytes = (size_t)n * sizeof *numbers;
  char *all = NULL;
  mt_err err = gather(r, numbers, bytes, &all);
  if (!err) memset(numbers, 0, bytes);
  for (int i = 0; !err && i < r->comm[MT_GROUP_DENSE].size; i++) {
    const double *one = (const double *)(const void *)(all + (size_t)i * bytes);
    for (int k = 0; k < n; k++) numbers[k] += one[k];
  }
  free(all);
  return err;
}

mt_err mt_ranks_token(struct mt_ranks *r, int32_t *id) {
  return r ? mt_comm_broadcast(&r->comm[MT_GROUP_WORLD], id, sizeof *id, 0) : MT_OK;
}

/* Parts of equal size but for the last; part i is elements [start[i], start[i] + count[i]). */
static void cut(int64_t n, int ranks, int64_t *count, int64_t *start) {
  int64_t each = (n + ranks - 1) / ranks;
  each = (each + PART_ELEMENTS - 1) / PART_ELEMENTS * PART_ELEMENTS;
  for (int i = 0; i < ranks; i++) {
    start[i] = each * i < n ? each * i : n;
    count[i] = n - start[i] < each ? n - start[i] : each;
  }
}

/* out[i] = sum over p of parts[p][i], in the order of p. */
static void add_parts(void *out, const void *parts, enum mt_dtype dtype, int ranks, int64_t n) {
  if (dtype == MT_F64) {
    const double *x = parts;
    for (int64_t i = 0; i < n; i++) {
      double sum = x[i];
      for (int p = 1; p < ranks; p++) sum += x[p * n + i];
      ((double *)out)[i] = sum;
    }
    return;
  }
  if (dtype == MT_F32) {
    const float *x = parts;
    for (int64_t i = 0; i < n; i++) {
      float sum = x[i];
      for (int p = 1; p < ranks; p++) sum += x[p * n + i];
      ((float *)out)[i] = sum;
    }
    return;
  }
  enum { WIDTH = 256 };
  size_t item = mt_dtype_bytes(dtype);
  for (int64_t i = 0; i < n; i += WIDTH) {
    float sum[WIDTH] = {0}, one[WIDTH];
    size_t width = (size_t)(n - i < WIDTH ? n - i : WIDTH);
    for (int p = 0; p < ranks; p++) {
      const char *from = (const char *)parts + (size_t)(p * n + i) * item;
      mt_dtype_convert(one, MT_F32, from, dtype, width);
      for (size_t k = 0; k < width; k++) sum[k] += one[k];
    }
    mt_dtype_convert((char *)out + (size_t)i * item, dtype, sum, MT_F32, width);
  }
}

/* A bucket's sum; [own, own + owned) of it (=) what this rank added up. */
static mt_err sum_bucket(struct mt_ranks *r, struct mt_comm *c, char *grad, enum mt_dtype dtype,
                         int64_t n, int64_t *own, int64_t *owned) {
  size_t item = mt_dtype_bytes(dtype), ranks = (size_t)c->size;
  int64_t *numbers = calloc(4 * ranks, sizeof *numbers);
  mt_err err = MT_ENOMEM;
  if (!numbers) goto no_memory;
  int64_t *count = numbers, *start = count + ranks, *in_count = start + ranks,
          *in_start = in_count + ranks;
  cut(n, c->size, count, start);
  *own = start[c->rank];
  *owned = count[c->rank];
  for (int p = 0; p < c->size; p++) in_count[p] = *owned, in_start[p] = p * *owned;
  size_t need = ranks * (size_t)*owned * item;
  if (r->parts_bytes < need) {
    free(r->parts);
    r->parts = malloc(need);
    r->parts_bytes = r->parts ? need : 0;
    if (!r->parts) goto no_memory;
  }
  MT_GO(mt_comm_all_to_all(c, grad, (struct mt_parts){count, start}, r->parts,
                           (struct mt_parts){in_count, in_start}, item, NULL));
  add_parts(grad + (size_t)*own * item, r->parts, dtype, c->size, *owned);
  err = mt_comm_all_gather(c, grad, (struct mt_parts){count, start}, item, NULL);
done:
  free(numbers);
  return err;
no_memory:
  mt_fail(MT_ENOMEM, "parts of %lld gradients", (long long)n);
  goto done;
}

/* The squares of elements [begin, end) of the memory from base on, of parameters that lie there. */
static mt_err squares(struct mt_ranks *r, enum mt_sync sync, const char *base, enum mt_dtype dtype,
                      int64_t begin, int64_t end, double *sum) {
  struct mt_model *m = r->model;
  int count = 0;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (p->sync != sync || !p->grad.data) continue;
    int64_t at = ((const char *)p->grad.data - base) / (int64_t)mt_dtype_bytes(dtype);
    int64_t from = begin > at ? begin : at, to = at + mt_param_count(p);
    if (to > end) to = end;
    if (from >= to) continue;
    char *data = (char *)p->grad.data + (size_t)(from - at) * mt_dtype_bytes(dtype);
    r->views[count++] = mt_vec(data, dtype, to - from);
  }
  if (count == 0) return MT_OK;
  double here;
  MT_TRY(m->be->ops.sumsq(
      m->be, &(struct mt_sumsq_args){.tensors = r->views, .tensor_count = count, .out = &here}));
  *sum += here;
  return MT_OK;
}

/* A sync class lies in one stretch of the gradients' arena. */
static mt_err sum_class(struct mt_ranks *r, enum mt_sync sync, struct mt_comm *c, double *sum) {
  const struct mt_model *m = r->model;
  enum mt_dtype dtype = m->recipe->grad;
  char *base = NULL, *end = NULL;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_param *p = &m->params.row[i];
    if (p->sync != sync || !p->grad.data) continue;
    if (!base) base = p->grad.data;
    end = (char *)p->grad.data + mt_bytes(&p->grad);
  }
  int64_t item = (int64_t)mt_dtype_bytes(dtype), all = base ? (end - base) / item : 0;
  for (int64_t at = 0; at < all; at += r->bucket_elements) {
    int64_t n = all - at < r->bucket_elements ? all - at : r->bucket_elements, own = 0, owned = n;
    if (c->size > 1) MT_TRY(sum_bucket(r, c, base + at * item, dtype, n, &own, &owned));
    MT_TRY(squares(r, sync, base, dtype, at + own, at + own + owned, sum));
  }
  return MT_OK;
}

mt_err mt_ranks_gradients(struct mt_ranks *r, double *sumsq) {
  double mine = 0;
  MT_TRY(sum_class(r, MT_SYNC_DENSE, &r->comm[MT_GROUP_DENSE], &mine));
  MT_TRY(sum_class(r, MT_SYNC_EXPERT, &r->comm[MT_GROUP_DATA], &mine));
  MT_TRY(mt_ranks_sum(r, &mine, 1));
  *sumsq = mine;
  return MT_OK;
}
