#include "train/profile.h"

#include <stdio.h>
#include <string.h>

/* Marks of the backend's clock: the upper half, since phases use the lower one. */
enum { FIRST_STAMP = MT_STAMPS / 2, PAIRS = MT_STAMPS / 4 };

enum {
#define X(op) OP_##op,
  MT_OP_LIST(X)
#undef X
};

static double b(struct mt_tensor t) {
  return t.data ? (double)mt_bytes(&t) : 0;
}

static double n(struct mt_tensor t) {
  return (double)mt_count(&t);
}

/* Twice where it is read before it is written. */
static double acc(struct mt_tensor t, int accumulate) {
  return b(t) * (accumulate ? 2 : 1);
}

#define WORK(op) static struct mt_work work_##op(const struct mt_##op##_args *a, double length)
#define MEMORY(op, total)                                                                          \
  WORK(op) {                                                                                       \
    (void)length;                                                                                  \
    return (struct mt_work){0, total};                                                             \
  }

MEMORY(embed_fwd, 2 * b(a->out))
MEMORY(embed_bwd, b(a->dout) + acc(a->dtable, a->accumulate))
MEMORY(add, b(a->a) + b(a->b) + b(a->y))
MEMORY(rmsnorm_fwd, b(a->x) + b(a->residual) + b(a->sum) + b(a->y))
MEMORY(rmsnorm_bwd, b(a->dy) + b(a->x) + b(a->dresidual) + b(a->dx))
MEMORY(rope_table, b(a->cos) + b(a->sin))
MEMORY(rope, 2 * b(a->qkv))
MEMORY(kv_append, 2 * (n(a->qkv) ? b(mt_rows(&a->k, 0, a->qkv.dim[0])) : 0) * 2)
MEMORY(attention_cache, 2 * b(mt_rows(&a->k, 0, a->start + a->qkv.dim[0])))
MEMORY(aux_loss, b(a->aux_prob))
MEMORY(permute_plan, 3.0 * 4 * a->token_count * a->top_k)
MEMORY(tally, b(a->loss) + 4 * n(a->loss))
MEMORY(dispatch_fwd, 2 * b(a->xs))
MEMORY(dispatch_bwd, b(a->dxs) + acc(a->dx, a->accumulate))
MEMORY(combine_fwd, b(a->ys) + b(a->y))
MEMORY(combine_bwd, b(a->dys) + b(a->ys) + b(a->dy))
MEMORY(arrival_plan, 2.0 * 4 * (double)a->row_count)
MEMORY(aux_join, a->rank_count *b(a->aux_sums) * 2)
MEMORY(parts_sum, b(a->parts) + acc(a->out, a->accumulate))
MEMORY(scatter_add, 3 * b(a->ys))
MEMORY(swiglu_fwd, b(a->gate_up) + b(a->h))
MEMORY(swiglu_bwd, b(a->dh) + b(a->gate_up) + b(a->dgate_up) + b(a->h))

WORK(linear_fwd) {
  (void)length;
  return (struct mt_work){2 * n(a->x) * (double)a->y.dim[1], b(a->x) + b(a->w) + b(a->y)};
}
WORK(linear_dgrad) {
  (void)length;
  return (struct mt_work){2 * n(a->dy) * (double)a->dx.dim[1],
                          b(a->dy) + b(a->w) + acc(a->dx, a->accumulate)};
}
WORK(linear_wgrad) {
  (void)length;
  return (struct mt_work){2 * n(a->dy) * (double)a->x.dim[1],
                          b(a->dy) + b(a->x) + acc(a->dw, a->accumulate)};
}
/* An 8-bit operand's copies, without its scales. */
static double q(struct mt_qtensor t) {
  double count = (double)(t.dim[0] * t.dim[1] * (t.rank == 3 ? t.dim[2] : 1));
  return count * ((t.row ? 1 : 0) + (t.col ? 1 : 0));
}
/* One copy of it. */
static double side(struct mt_qtensor t) {
  return (double)(t.dim[0] * t.dim[1] * (t.rank == 3 ? t.dim[2] : 1));
}
MEMORY(pad_offsets, 8.0 * a->group_count)
MEMORY(quantize,
       (double)a->q.dim[0] * (double)(a->q.dim[1] * (int64_t)mt_dtype_bytes(a->x.dtype)) + q(a->q))
MEMORY(pack_rows,
       (double)a->row_count *((double)(a->x.dim[1] * (int64_t)mt_dtype_bytes(a->x.dtype)) +
                              (double)mt_q_record_bytes(a->format, a->x.dim[1])))
MEMORY(unpack_rows, b(a->xs) + (double)(a->xs.dim[0] * mt_q_record_bytes(a->format, a->xs.dim[1])))
MEMORY(quantize_weight, b(a->w) + q(a->q))
MEMORY(swiglu_quantize_fwd, b(a->gate_up) + q(a->h))
MEMORY(swiglu_quantize_bwd, b(a->dh) + b(a->gate_up) + q(a->dgate_up) + (a->h.format ? q(a->h) : 0))
WORK(qlinear_fwd) {
  (void)length;
  return (struct mt_work){2 * side(a->x) * (double)a->y.dim[1], side(a->x) + side(a->w) + b(a->y)};
}
WORK(qlinear_dgrad) {
  (void)length;
  return (struct mt_work){2 * side(a->dy) * (double)a->dx.dim[1],
                          side(a->dy) + side(a->w) + acc(a->dx, a->accumulate)};
}
WORK(qlinear_wgrad) {
  (void)length;
  return (struct mt_work){2 * side(a->dy) * (double)a->x.dim[1],
                          side(a->dy) + side(a->x) + acc(a->dw, a->accumulate)};
}
WORK(experts_up_fwd) {
  (void)length;
  return (struct mt_work){2 * n(a->x) * (double)a->gate_up.dim[1],
                          b(a->x) + b(a->w) + b(a->gate_up) + b(a->h)};
}
WORK(experts_down_dgrad) {
  (void)length;
  return (struct mt_work){2 * n(a->dy) * (double)a->h.dim[1],
                          b(a->dy) + b(a->w) + b(a->gate_up) + b(a->dgate_up) + b(a->h)};
}
WORK(router_fwd) {
  (void)length;
  return (struct mt_work){2 * n(a->x) * (double)a->w.dim[0], b(a->x) + b(a->w) + b(a->logits)};
}
WORK(router_bwd) {
  (void)length;
  return (struct mt_work){4 * n(a->x) * (double)a->w.dim[0],
                          b(a->x) + acc(a->dx, a->accumulate_dx) + 2 * b(a->dlogits)};
}
WORK(head_loss) {
  (void)length;
  double pass = 2 * n(a->x) * (double)a->w.dim[0];
  return (struct mt_work){pass * (a->dx.data ? 3 : 1),
                          b(a->x) + b(a->w) + b(a->dx) + acc(a->dw, a->accumulate)};
}
/* Two products forward and five backward, of half the square (docs/math.md counts four backward).
 */
WORK(attention_fwd) {
  return (struct mt_work){4 * n(a->out) * length / 2, b(a->qkv) + b(a->out)};
}
WORK(attention_bwd) {
  return (struct mt_work){10 * n(a->fwd.out) * length / 2,
                          b(a->fwd.qkv) + 2 * b(a->fwd.out) + b(a->dqkv)};
}
WORK(sumsq) {
  (void)length;
  struct mt_work w = {0};
  for (int i = 0; i < a->tensor_count; i++) w.bytes += b(a->tensors[i]);
  return w;
}
WORK(adamw) {
  (void)length;
  struct mt_work w = {0};
  for (int i = 0; i < a->segment_count; i++) {
    const struct mt_adamw_segment *s = &a->segments[i];
    w.bytes += b(s->grad) + 2 * (b(s->master) + b(s->m) + b(s->v)) + b(s->compute);
  }
  return w;
}

static mt_err collect(struct mt_profile *p) {
  for (int i = 0; i < p->pending_count; i++) {
    double seconds;
    MT_TRY(p->be->stamp_read(p->be, FIRST_STAMP + 2 * i, FIRST_STAMP + 2 * i + 1, &seconds));
    p->row[p->pending[i]].seconds += seconds;
  }
  p->pending_count = 0;
  return MT_OK;
}

static mt_err before(struct mt_profile *p) {
  if (p->pending_count == PAIRS) MT_TRY(collect(p));
  return p->be->stamp(p->be, FIRST_STAMP + 2 * p->pending_count);
}

static mt_err after(struct mt_profile *p, int op, struct mt_work w) {
  struct mt_profile_row *r = &p->row[op];
  r->flops += w.flops;
  r->bytes += w.bytes;
  r->calls++;
  p->pending[p->pending_count] = (signed char)op;
  return p->be->stamp(p->be, FIRST_STAMP + 2 * p->pending_count++ + 1);
}

#define X(op)                                                                                      \
  static mt_err timed_##op(struct mt_backend *be, const struct mt_##op##_args *a) {                \
    struct mt_profile *p = be->profile;                                                            \
    MT_TRY(before(p));                                                                             \
    MT_TRY(p->inner.op(be, a));                                                                    \
    return after(p, OP_##op, work_##op(a, p->sequence_length));                                    \
  }
MT_OP_LIST(X)
#undef X

void mt_profile_begin(struct mt_profile *p, struct mt_backend *be, double sequence_length) {
  *p = (struct mt_profile){.be = be, .inner = be->ops, .sequence_length = sequence_length};
  be->profile = p;
#define X(op) be->ops.op = timed_##op;
  MT_OP_LIST(X)
#undef X
}

#define X(op)                                                                                      \
  static mt_err counted_##op(struct mt_backend *be, const struct mt_##op##_args *a) {              \
    struct mt_profile *p = be->profile;                                                            \
    struct mt_profile_row *r = &p->row[OP_##op];                                                   \
    struct mt_work w = work_##op(a, p->sequence_length);                                           \
    r->calls++;                                                                                    \
    r->flops += w.flops;                                                                           \
    r->bytes += w.bytes;                                                                           \
    r->seconds += p->seconds(p->context, OP_##op, w);                                              \
    return MT_OK;                                                                                  \
  }
MT_OP_LIST(X)
#undef X

void mt_profile_count(struct mt_profile *p, struct mt_backend *be, double sequence_length,
                      double (*seconds)(const void *context, int op, struct mt_work work),
                      const void *context) {
  *p = (struct mt_profile){
      .be = be, .sequence_length = sequence_length, .seconds = seconds, .context = context};
  be->profile = p;
#define X(op) be->ops.op = counted_##op;
  MT_OP_LIST(X)
#undef X
}

mt_err mt_profile_end(struct mt_profile *p) {
  p->be->ops = p->inner;
  p->be->profile = NULL;
  return collect(p);
}

void mt_profile_print(const struct mt_profile *p, int steps, struct mt_ceilings c, bool json) {
  double total = 0;
  for (int i = 0; i < MT_PROFILE_OPS; i++) total += p->row[i].seconds;
  if (!json) {
    printf("%-18s %6s %9s %14s %7s %11s\n", "operation", "calls", "ms", "rate", "share",
           "over floor");
  }
  bool first = true;
  for (int i = 0; i < MT_PROFILE_OPS; i++) {
    const struct mt_profile_row *r = &p->row[i];
    if (r->calls == 0) continue;
    double by_flops = r->flops / c.flops_per_s, by_bytes = r->bytes / c.bytes_per_s;
    bool products = by_flops > by_bytes;
    double floor = products ? by_flops : by_bytes, ms = r->seconds * 1e3 / steps;
    double rate = (products ? r->flops : r->bytes) / r->seconds;
    if (json) {
      printf("%s\"%s\": {\"ms\": %.4f, \"calls\": %lld, \"%s\": %.4g, \"floor_ms\": %.4f}",
             first ? "" : ", ", mt_op_name(i), ms, (long long)r->calls / steps,
             products ? "flops_per_s" : "bytes_per_s", rate, floor * 1e3 / steps);
    } else {
      printf("%-18s %6lld %9.3f %8.1f %-5s %6.1f%% %10.2fx\n", mt_op_name(i),
             (long long)r->calls / steps, ms, rate * (products ? 1e-12 : 1e-9),
             products ? "TFLOP/s" : "GB/s", 100 * r->seconds / total, r->seconds / floor);
    }
    first = false;
  }
}
