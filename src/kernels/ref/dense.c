/* Embedding, residual add, RMSNorm, linear. */
#include <math.h>

#include "kernels/ref/ref.h"

mt_err mt_ref_embed_fwd(struct mt_backend *be, const struct mt_embed_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_embed_fwd(a));
  for (int64_t t = 0; t < a->out.dim[0]; t++) {
    for (int64_t i = 0; i < a->out.dim[1]; i++) {
      ref_set(&a->out, t, i, ref_get(&a->table, a->ids[t], i));
    }
  }
  return MT_OK;
}

mt_err mt_ref_embed_bwd(struct mt_backend *be, const struct mt_embed_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_embed_bwd(a));
  int64_t h = a->dtable.dim[1];
  if (!a->accumulate) {
    for (int64_t v = 0; v < a->dtable.dim[0]; v++) {
      for (int64_t i = 0; i < h; i++) ref_set(&a->dtable, v, i, 0);
    }
  }
  for (int64_t t = 0; t < *a->valid_count; t++) {
    for (int64_t i = 0; i < h; i++) ref_acc(&a->dtable, a->ids[t], i, ref_get(&a->dout, t, i), 1);
  }
  return MT_OK;
}

mt_err mt_ref_add(struct mt_backend *be, const struct mt_add_args *a) {
  (void)be;
  MT_TRY(mt_check_add(a));
  for (int64_t t = 0; t < a->y.dim[0]; t++) {
    for (int64_t i = 0; i < a->y.dim[1]; i++) {
      ref_set(&a->y, t, i, ref_get(&a->a, t, i) + ref_get(&a->b, t, i));
    }
  }
  return MT_OK;
}

mt_err mt_ref_rmsnorm_fwd(struct mt_backend *be, const struct mt_rmsnorm_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_rmsnorm_fwd(a));
  int64_t h = a->x.dim[1];
  for (int64_t t = 0; t < a->x.dim[0]; t++) {
    double square = 0;
    for (int pass = 0; pass < 2; pass++) {
      double rstd = 1 / sqrt(square / (double)h + (double)a->eps);
      for (int64_t i = 0; i < h; i++) {
        /* The second pass must see the sum before it overwrites x or residual with it. */
        double s = ref_get(&a->x, t, i);
        if (a->residual.data) s = ref_round(&a->x, s + ref_get(&a->residual, t, i));
        if (pass == 0) {
          square += s * s;
        } else {
          if (a->sum.data) ref_set(&a->sum, t, i, s);
          ref_set(&a->y, t, i, s * rstd * ref_at(&a->weight, i));
        }
      }
      if (pass == 1) ref_put(&a->rstd, t, rstd);
    }
  }
  return MT_OK;
}

/* y_i = w_i x_i r, r = (mean(x^2) + eps)^-1/2:
 * dx_i = r (w_i dy_i - x_i r^2 mean_j(w_j dy_j x_j)), dw_i = sum_t dy_i x_i r. */
mt_err mt_ref_rmsnorm_bwd(struct mt_backend *be, const struct mt_rmsnorm_bwd_args *a) {
  (void)be;
  MT_TRY(mt_check_rmsnorm_bwd(a));
  int64_t rows = a->x.dim[0], h = a->x.dim[1];
  if (a->dweight.data) {
    for (int64_t i = 0; i < h; i++) {
      double sum = 0;
      for (int64_t t = 0; t < rows; t++) {
        sum += ref_get(&a->dy, t, i) * ref_get(&a->x, t, i) * ref_at(&a->rstd, t);
      }
      ref_acc(&a->dweight, 0, i, sum, a->accumulate);
    }
  }
  for (int64_t t = 0; t < rows; t++) {
    double r = ref_at(&a->rstd, t), dot = 0;
    for (int64_t i = 0; i < h; i++) {
      dot += ref_get(&a->dy, t, i) * ref_at(&a->weight, i) * ref_get(&a->x, t, i);
    }
    for (int64_t i = 0; i < h; i++) {
      double wdy = ref_get(&a->dy, t, i) * ref_at(&a->weight, i);
      double dx = r * (wdy - ref_get(&a->x, t, i) * r * r * dot / (double)h);
      if (a->dresidual.data) dx += ref_get(&a->dresidual, t, i);
      ref_set(&a->dx, t, i, dx);
    }
  }
  return MT_OK;
}

/* Row range of group g; a dense product is one group of all rows. */
static void group_rows(const int32_t *offsets, int64_t rows, int64_t g, int64_t *begin,
                       int64_t *end) {
  *begin = offsets ? offsets[g] : 0;
  *end = offsets ? offsets[g + 1] : rows;
}

static int64_t group_count(const struct mt_tensor *w) {
  return w->rank == 3 ? w->dim[0] : 1;
}

static struct mt_tensor group_weight(const struct mt_tensor *w, int64_t g) {
  return w->rank == 3 ? mt_slice(w, g) : *w;
}

mt_err mt_ref_linear_fwd(struct mt_backend *be, const struct mt_linear_fwd_args *a) {
  (void)be;
  MT_TRY(mt_check_linear_fwd(a));
  for (int64_t g = 0; g < group_count(&a->w); g++) {
    struct mt_tensor w = group_weight(&a->w, g);
    int64_t begin, end;
    group_rows(a->offsets, a->x.dim[0], g, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
      for (int64_t n = 0; n < w.dim[0]; n++) {
        double sum = 0;
        for (int64_t k = 0; k < w.dim[1]; k++) sum += ref_get(&a->x, r, k) * ref_get(&w, n, k);
        ref_set(&a->y, r, n, sum);
      }
    }
  }
  return MT_OK;
}

mt_err mt_ref_linear_dgrad(struct mt_backend *be, const struct mt_linear_dgrad_args *a) {
  (void)be;
  MT_TRY(mt_check_linear_dgrad(a));
  for (int64_t g = 0; g < group_count(&a->w); g++) {
    struct mt_tensor w = group_weight(&a->w, g);
    int64_t begin, end;
    group_rows(a->offsets, a->dy.dim[0], g, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
      for (int64_t k = 0; k < w.dim[1]; k++) {
        double sum = 0;
        for (int64_t n = 0; n < w.dim[0]; n++) sum += ref_get(&a->dy, r, n) * ref_get(&w, n, k);
        ref_acc(&a->dx, r, k, sum, a->accumulate);
      }
    }
  }
  return MT_OK;
}

mt_err mt_ref_linear_wgrad(struct mt_backend *be, const struct mt_linear_wgrad_args *a) {
  MT_TRY(mt_check_linear_wgrad(a));
  for (int64_t g = 0; g < group_count(&a->dw); g++) {
    struct mt_tensor dw = group_weight(&a->dw, g);
    int64_t begin, end;
    group_rows(a->offsets, a->x.dim[0], g, &begin, &end);
    for (int64_t n = 0; n < dw.dim[0]; n++) {
      for (int64_t k = 0; k < dw.dim[1]; k++) {
        double sum = 0;
        for (int64_t r = begin; r < end; r++) sum += ref_get(&a->dy, r, n) * ref_get(&a->x, r, k);
        ref_acc(&dw, n, k, sum, a->accumulate);
      }
    }
  }
  if (!a->sumsq) return MT_OK;
  return mt_ref_sumsq(
      be, &(struct mt_sumsq_args){.tensors = &a->dw, .tensor_count = 1, .out = a->sumsq});
}
