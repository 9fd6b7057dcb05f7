/* RoPE, causal attention over packed sequences, attention against a cache. */
#include <math.h>
#include <stdlib.h>

#include "kernels/ref/ref.h"

mt_err mt_ref_rope_table(struct mt_backend *be, const struct mt_rope_table_args *a) {
  (void)be;
  MT_TRY(mt_check_rope_table(a));
  for (int64_t t = 0; t < a->cos.dim[0]; t++) {
    for (int64_t i = 0; i < a->cos.dim[1]; i++) {
      double angle = (double)a->positions[t] * a->inv_freq[i];
      ref_set(&a->cos, t, i, cos(angle));
      ref_set(&a->sin, t, i, sin(angle));
    }
  }
  return MT_OK;
}

mt_err mt_ref_rope(struct mt_backend *be, const struct mt_rope_args *a) {
  (void)be;
  MT_TRY(mt_check_rope(a));
  int64_t d = a->head_dim, half = d / 2, group = (a->q_per_kv + 2) * d;
  for (int64_t t = 0; t < a->qkv.dim[0]; t++) {
    for (int64_t head = 0; head < (int64_t)a->kv_heads * (a->q_per_kv + 1); head++) {
      /* Queries and the key of each group; the value, its last head, stays. */
      int64_t base = head / (a->q_per_kv + 1) * group + head % (a->q_per_kv + 1) * d;
      for (int64_t i = 0; i < half; i++) {
        double c = ref_get(&a->cos, t, i), s = ref_get(&a->sin, t, i);
        if (a->inverse) s = -s;
        double x = ref_get(&a->qkv, t, base + i), y = ref_get(&a->qkv, t, base + half + i);
        ref_set(&a->qkv, t, base + i, x * c - y * s);
        ref_set(&a->qkv, t, base + half + i, y * c + x * s);
      }
    }
  }
  return MT_OK;
}

/* Where head q of group g, its K and its V begin in a row of qkv. */
struct columns {
  int64_t q, k, v, out;
};

static struct columns columns_of(int q_per_kv, int head_dim, int64_t g, int64_t q) {
  int64_t d = head_dim, base = g * (q_per_kv + 2) * d;
  return (struct columns){base + q * d, base + q_per_kv * d, base + (q_per_kv + 1) * d,
                          (g * q_per_kv + q) * d};
}

/* First key that query i sees. */
static int64_t first_key(int64_t begin, int64_t i, int window) {
  return window > 0 && i - window + 1 > begin ? i - window + 1 : begin;
}

static double dot(const struct mt_tensor *x, int64_t xr, int64_t xc, const struct mt_tensor *y,
                  int64_t yr, int64_t yc, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += ref_get(x, xr, xc + i) * ref_get(y, yr, yc + i);
  return sum;
}

/* One query row against keys [lo, hi): out (=), returns the log of the softmax's denominator.
 * p is scratch of hi - lo. */
static double attend(const struct mt_tensor *q, int64_t qr, int64_t qc, const struct mt_tensor *k,
                     int64_t kc, const struct mt_tensor *v, int64_t vc, int64_t lo, int64_t hi,
                     int64_t d, double scale, double *p, const struct mt_tensor *out, int64_t oc) {
  double top = -INFINITY, sum = 0;
  for (int64_t j = lo; j < hi; j++) {
    p[j - lo] = scale * dot(q, qr, qc, k, j, kc, d);
    if (p[j - lo] > top) top = p[j - lo];
  }
  for (int64_t j = lo; j < hi; j++) sum += p[j - lo] = exp(p[j - lo] - top);
  for (int64_t i = 0; i < d; i++) {
    double o = 0;
    for (int64_t j = lo; j < hi; j++) o += p[j - lo] * ref_get(v, j, vc + i);
    ref_set(out, qr, oc + i, o / sum);
  }
  return top + log(sum);
}

mt_err mt_ref_attention_fwd(struct mt_backend *be, const struct mt_attention_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_attention_fwd(a));
  int64_t rows = a->qkv.dim[0], d = a->head_dim, heads = (int64_t)a->kv_heads * a->q_per_kv;
  double *p = malloc((size_t)(rows + 1) * sizeof *p);
  if (!p) return mt_fail(MT_ENOMEM, "attention_fwd: %lld rows", (long long)rows);
  for (int64_t t = a->cu_seqlens[a->sequence_count]; t < rows; t++) {
    for (int64_t i = 0; i < heads * d; i++) ref_set(&a->out, t, i, 0);
    for (int64_t i = 0; i < heads; i++) ref_set(&a->lse, t, i, 0);
  }
  for (int s = 0; s < a->sequence_count; s++) {
    int64_t begin = a->cu_seqlens[s], end = a->cu_seqlens[s + 1];
    for (int64_t head = 0; head < heads; head++) {
      struct columns c =
          columns_of(a->q_per_kv, a->head_dim, head / a->q_per_kv, head % a->q_per_kv);
      for (int64_t i = begin; i < end; i++) {
        double lse =
            attend(&a->qkv, i, c.q, &a->qkv, c.k, &a->qkv, c.v, first_key(begin, i, a->window),
                   i + 1, d, (double)a->scale, p, &a->out, c.out);
        ref_set(&a->lse, i, head, lse);
      }
    }
  }
  free(p);
  return MT_OK;
}

/* P = exp(scale q.k - lse); dV_j += P_ij dO_i; dS_ij = P_ij (dO_i.V_j - dO_i.O_i);
 * dQ_i += scale dS_ij K_j; dK_j += scale dS_ij Q_i (FlashAttention-2, Dao 2023, section 3.1). */
mt_err mt_ref_attention_bwd(struct mt_backend *be, const struct mt_attention_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_attention_bwd(a));
  const struct mt_attention_fwd_args *f = &a->fwd;
  int64_t rows = f->qkv.dim[0], width = f->qkv.dim[1], d = f->head_dim;
  int64_t heads = (int64_t)f->kv_heads * f->q_per_kv;
  double scale = (double)f->scale, *acc = calloc((size_t)(rows * width + 1), sizeof *acc);
  if (!acc) return mt_fail(MT_ENOMEM, "attention_bwd: %lld rows", (long long)rows);
  for (int s = 0; s < f->sequence_count; s++) {
    int64_t begin = f->cu_seqlens[s], end = f->cu_seqlens[s + 1];
    for (int64_t head = 0; head < heads; head++) {
      struct columns c =
          columns_of(f->q_per_kv, f->head_dim, head / f->q_per_kv, head % f->q_per_kv);
      for (int64_t i = begin; i < end; i++) {
        double lse = ref_get(&f->lse, i, head);
        double delta = dot(&a->dout, i, c.out, &f->out, i, c.out, d);
        for (int64_t j = first_key(begin, i, f->window); j <= i; j++) {
          double p = exp(scale * dot(&f->qkv, i, c.q, &f->qkv, j, c.k, d) - lse);
          double ds = p * (dot(&a->dout, i, c.out, &f->qkv, j, c.v, d) - delta) * scale;
          for (int64_t n = 0; n < d; n++) {
            acc[i * width + c.q + n] += ds * ref_get(&f->qkv, j, c.k + n);
            acc[j * width + c.k + n] += ds * ref_get(&f->qkv, i, c.q + n);
            acc[j * width + c.v + n] += p * ref_get(&a->dout, i, c.out + n);
          }
        }
      }
    }
  }
  for (int64_t t = 0; t < rows; t++) {
    for (int64_t i = 0; i < width; i++) ref_set(&a->dqkv, t, i, acc[t * width + i]);
  }
  free(acc);
  return MT_OK;
}

mt_err mt_ref_kv_append(struct mt_backend *be, const struct mt_kv_append_args *a) {
  (void)be;
  MT_TRY(mt_check_kv_append(a));
  int64_t d = a->head_dim;
  for (int64_t t = 0; t < a->qkv.dim[0]; t++) {
    for (int64_t g = 0; g < a->kv_heads; g++) {
      struct columns c = columns_of(a->q_per_kv, a->head_dim, g, 0);
      for (int64_t i = 0; i < d; i++) {
        ref_set(&a->k, a->start + t, g * d + i, ref_get(&a->qkv, t, c.k + i));
        ref_set(&a->v, a->start + t, g * d + i, ref_get(&a->qkv, t, c.v + i));
      }
    }
  }
  return MT_OK;
}

mt_err mt_ref_attention_cache(struct mt_backend *be, const struct mt_attention_cache_args *a) {
  (void)be;
  MT_TRY(mt_check_attention_cache(a));
  int64_t rows = a->qkv.dim[0], d = a->head_dim, heads = (int64_t)a->kv_heads * a->q_per_kv;
  double *p = malloc((size_t)(a->start + rows + 1) * sizeof *p);
  if (!p) return mt_fail(MT_ENOMEM, "attention_cache: %lld rows", (long long)(a->start + rows));
  for (int64_t t = 0; t < rows; t++) {
    int64_t hi = a->start + t + 1;
    for (int64_t head = 0; head < heads; head++) {
      int64_t g = head / a->q_per_kv;
      struct columns c = columns_of(a->q_per_kv, a->head_dim, g, head % a->q_per_kv);
      attend(&a->qkv, t, c.q, &a->k, g * d, &a->v, g * d, first_key(0, hi - 1, a->window), hi, d,
             (double)a->scale, p, &a->out, c.out);
    }
  }
  free(p);
  return MT_OK;
}
