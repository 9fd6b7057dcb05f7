/* `moetune inspect MODEL`: tables of the files. */
#include <math.h>
#include <stdlib.h>

#include "train/inspect.h"
#include "train/terminal.h"

void mt_inspect_text(const char *text) {
  mt_print_safe(stdout, text, strlen(text));
}

/* "BF16 120, F32 3" of one shard. */
static void print_formats(const struct mt_st_file *f) {
  const char *seen[32];
  int count[32] = {0}, kinds = 0;
  for (size_t i = 0; i < f->count; i++) {
    int k = 0;
    while (k < kinds && strcmp(seen[k], f->tensor[i].dtype_name) != 0) k++;
    if (k == 32) continue;
    if (k == kinds) seen[kinds++] = f->tensor[i].dtype_name;
    count[k]++;
  }
  for (int k = 0; k < kinds; k++) printf("%s%s %d", k ? ", " : "", seen[k], count[k]);
}

static size_t shard_bytes(const struct mt_st_file *f) {
  size_t bytes = 0;
  for (size_t i = 0; i < f->count; i++) bytes += f->tensor[i].size_bytes;
  return bytes;
}

void mt_inspect_shards(const struct mt_hf_checkpoint *h) {
  size_t tensors = 0, bytes = 0;
  printf("\n%8s %16s  %-34s %s\n", "tensors", "bytes", "shard", "formats");
  for (int s = 0; s < h->shard_count; s++) {
    const struct mt_st_file *f = &h->shard[s];
    printf("%8zu %16zu  ", f->count, shard_bytes(f));
    mt_inspect_text(h->shard_name[s]);
    printf("%*s ", 34 - (int)strlen(h->shard_name[s]) > 0 ? 34 - (int)strlen(h->shard_name[s]) : 0,
           "");
    print_formats(f);
    putchar('\n');
    tensors += f->count;
    bytes += shard_bytes(f);
  }
  if (h->shard_count > 1) printf("%8zu %16zu  %d shards\n", tensors, bytes, h->shard_count);
}

static void shape_text(const struct mt_st_tensor *t, char *out, size_t size) {
  size_t used = 0;
  *out = '\0';
  for (int d = 0; d < t->rank && used < size - 24; d++) {
    used += (size_t)snprintf(out + used, size - used, d ? " x %lld" : "%lld", (long long)t->dim[d]);
  }
}

static void print_tensor(const char *name, const struct mt_st_tensor *t, const char *last) {
  char shape[256];
  shape_text(t, shape, sizeof shape);
  mt_inspect_text(name);
  printf("%*s %-7s %-22s ", strlen(name) < 60 ? 60 - (int)strlen(name) : 0, "", t->dtype_name,
         shape);
  mt_inspect_text(last);
  putchar('\n');
}

/* Tensors whose names differ in their numbers alone, and that are alike otherwise. */
struct group {
  char *name; /* numbers as * */
  const struct mt_st_tensor *first;
  size_t count;
};

/* The whole name with each run of digits between dots as one star; freed by the caller. */
static char *starred(const char *name) {
  char *out = malloc(strlen(name) + 1), *to = out;
  for (const char *p = name; out && *p;) {
    size_t digits = strspn(p, "0123456789");
    bool whole = digits && (p == name || p[-1] == '.') && (p[digits] == '.' || !p[digits]);
    if (whole)
      *to++ = '*';
    else
      for (size_t i = 0; i < digits + !digits; i++) *to++ = p[i];
    p += digits + !digits;
  }
  if (out) *to = '\0';
  return out;
}

static int compare(const void *a, const void *b) {
  const struct group *x = a, *y = b;
  int order = strcmp(x->name, y->name);
  if (!order) order = strcmp(x->first->dtype_name, y->first->dtype_name);
  if (!order) order = x->first->rank - y->first->rank;
  for (int d = 0; !order && d < x->first->rank; d++) {
    order = (x->first->dim[d] > y->first->dim[d]) - (x->first->dim[d] < y->first->dim[d]);
  }
  return order;
}

/* Sorted, those that are alike as one; SIZE_MAX without memory. */
static size_t list_groups(const struct mt_hf_checkpoint *h, struct group *g) {
  size_t n = 0, kept = 0;
  for (int s = 0; s < h->shard_count; s++) {
    for (size_t i = 0; i < h->shard[s].count; i++) {
      const struct mt_st_tensor *t = &h->shard[s].tensor[i];
      g[n] = (struct group){starred(t->name), t, 1};
      if (!g[n++].name) return SIZE_MAX;
    }
  }
  qsort(g, n, sizeof *g, compare);
  for (size_t i = 0; i < n; i++) {
    struct group one = g[i];
    g[i].name = NULL;
    if (kept > 0 && compare(&g[kept - 1], &one) == 0) {
      free(one.name);
      g[kept - 1].count++;
    } else {
      g[kept++] = one;
    }
  }
  return kept;
}

static mt_err print_groups(const struct mt_hf_checkpoint *h) {
  size_t total = 0;
  for (int s = 0; s < h->shard_count; s++) total += h->shard[s].count;
  struct group *g = calloc(total + 1, sizeof *g);
  size_t n = g ? list_groups(h, g) : SIZE_MAX;
  for (size_t i = 0; n != SIZE_MAX && i < n; i++) {
    char count[32];
    snprintf(count, sizeof count, "%zu", g[i].count);
    print_tensor(g[i].name, g[i].first, count);
  }
  for (size_t i = 0; g && i < total; i++) free(g[i].name);
  free(g);
  return n == SIZE_MAX ? mt_fail(MT_ENOMEM, "list of %zu tensors", total) : MT_OK;
}

mt_err mt_inspect_tensors(const struct mt_hf_checkpoint *h, bool all) {
  printf("\n%-60s %-7s %-22s %s\n", "tensor", "dtype", "shape", all ? "file" : "count");
  if (!all) return print_groups(h);
  for (int s = 0; s < h->shard_count; s++) {
    for (size_t i = 0; i < h->shard[s].count; i++) {
      print_tensor(h->shard[s].tensor[i].name, &h->shard[s].tensor[i], h->shard_name[s]);
    }
  }
  return MT_OK;
}

static double whole_norm(const struct mt_hf_expert_norms *n) {
  return sqrt(n->gate * n->gate + n->up * n->up + n->down * n->down);
}

static void print_layer(int layer, const struct mt_hf_expert_norms *norms, int experts, bool each) {
  int least = 0, most = 0, odd = 0;
  double sum = 0;
  for (int e = 0; e < experts; e++) {
    double n = whole_norm(&norms[e]);
    if (n < whole_norm(&norms[least])) least = e;
    if (n > whole_norm(&norms[most])) most = e;
    odd += !isfinite(n);
    sum += n;
  }
  printf("%5d %10.4g %10.4g (%3d) %10.4g (%3d)", layer, sum / experts, whole_norm(&norms[least]),
         least, whole_norm(&norms[most]), most);
  for (int e = 0; each && e < experts; e++) {
    if (e % 8 == 0) printf("%s", e ? "\n                                                " : "  ");
    printf(" %9.4g", whole_norm(&norms[e]));
  }
  if (odd) printf("  %d experts hold NaN or infinity", odd);
  putchar('\n');
}

mt_err mt_inspect_norms(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                        bool each) {
  enum { EACH_UP_TO = 16 };
  const struct mt_config *c = &h->config;
  struct mt_hf_expert_norms *norms = calloc((size_t)c->experts, sizeof *norms);
  mt_err err = norms ? MT_OK : mt_fail(MT_ENOMEM, "norms of %d experts", c->experts);
  each |= c->experts <= EACH_UP_TO;
  if (!err) {
    printf("\nL2 norms of the experts' weights, gate, up and down together\n");
    printf("%5s %10s %16s %16s%s\n", "layer", "mean", "least (expert)", "most (expert)",
           each ? "   experts 0, 1, ..." : "");
  }
  for (int l = 0; !err && l < c->layers; l++) {
    err = mt_hf_expert_norms(h, params, l, norms);
    if (!err) print_layer(l, norms, c->experts, each);
  }
  free(norms);
  return err;
}
