/* Blocks in a row; where grouped linear, scaled SwiGLU, grouped linear follow on each other, the
 * fused chain runs in their place. */
#include <stdlib.h>

#include "api/block_impl.h"

enum { MOST_BLOCKS = 64, CHAIN = 3 };

/* What runs at once: one block, or a chain of three. */
struct stage {
  struct mt_block *block;                  /* the first, or only one */
  struct mt_block *down;                   /* of a chain: its last; else NULL */
  int scaled;                              /* whether it takes row_scale */
  struct mt_array *y;                      /* what the next one reads; not of the last */
  struct mt_array *dy;                     /* its gradient */
  struct mt_array *gate_up, *h, *dgate_up; /* of a chain */
};

struct sequence {
  struct mt_block b;
  struct mt_block *block[MOST_BLOCKS];
  int block_count;
  struct stage stage[MOST_BLOCKS];
  int stage_count, scaled_count;
};

static int stage_out(const struct stage *g) {
  return g->down ? g->down->out : g->block->out;
}

static mt_err chain_forward(struct mt_block *b, struct stage *g, const struct mt_array *x,
                            struct mt_array *y) {
  struct mt_space *s = b->s;
  struct mt_block *up = g->block, *down = g->down;
  int64_t rows = x->t.dim[0];
  struct mt_tensor w1, w2;
  if (!b->info.offsets) return mt_fail(MT_EINVAL, "grouped linear needs offsets");
  MT_TRY(mt_array_check(b->info.offsets, s, "offsets", MT_I32, 1, (int64_t)up->groups + 1, 1));
  if (b->info.row_scale)
    MT_TRY(mt_array_check(b->info.row_scale, s, "row_scale", s->full, 1, rows, 1));
  MT_TRY(mt_space_reserve(s, &(struct mt_limits){.rows = rows,
                                                 .hidden = up->in > down->out ? up->in : down->out,
                                                 .ffn = up->out,
                                                 .experts = up->groups}));
  MT_TRY(mt_array_ensure(s, &g->gate_up, b->recipe->act, 2, rows, up->out, 1));
  MT_TRY(mt_array_ensure(s, &g->h, b->recipe->act, 2, rows, down->in, 1));
  MT_TRY(mt_weight_compute(&up->weight[0], b->recipe, &w1));
  MT_TRY(mt_weight_compute(&down->weight[0], b->recipe, &w2));
  const int32_t *offsets = b->info.offsets->t.data;
  up->x = x;
  MT_TRY(mt_linear_experts_up(
      &s->be, &(struct mt_experts_up_fwd_args){.x = x->t,
                                               .w = w1,
                                               .offsets = offsets,
                                               .row_prob = mt_array_tensor(b->info.row_scale),
                                               .gate_up = g->gate_up->t,
                                               .h = g->h->t}));
  return mt_linear_forward(&s->be, g->h->t, w2, y->t, offsets);
}

static mt_err chain_backward(struct mt_block *b, struct stage *g, const struct mt_array *dy,
                             struct mt_array *dx, struct mt_array *drow_scale, int accumulate) {
  struct mt_space *s = b->s;
  struct mt_block *up = g->block, *down = g->down;
  struct mt_tensor w1, w2;
  const int32_t *offsets = b->info.offsets->t.data;
  MT_TRY(mt_array_ensure(s, &g->dgate_up, b->recipe->act, 2, dy->t.dim[0], up->out, 1));
  MT_TRY(mt_weight_compute(&up->weight[0], b->recipe, &w1));
  MT_TRY(mt_weight_compute(&down->weight[0], b->recipe, &w2));
  MT_TRY(mt_linear_experts_down_dgrad(
      &s->be, &(struct mt_experts_down_dgrad_args){.dy = dy->t,
                                                   .w = w2,
                                                   .offsets = offsets,
                                                   .gate_up = g->gate_up->t,
                                                   .row_prob = mt_array_tensor(b->info.row_scale),
                                                   .dgate_up = g->dgate_up->t,
                                                   .h = g->h->t,
                                                   .drow_prob = mt_array_tensor(drow_scale)}));
  MT_TRY(
      mt_linear_wgrad(&s->be, dy->t, g->h->t, down->weight[0].grad->t, offsets, accumulate, NULL));
  MT_TRY(mt_linear_wgrad(&s->be, g->dgate_up->t, up->x->t, up->weight[0].grad->t, offsets,
                         accumulate, NULL));
  return mt_linear_dgrad(&s->be, g->dgate_up->t, w1, dx->t, offsets);
}

/* Its blocks run under the sequence's recipe: that in force is the same. */
static mt_err forward(struct mt_block *b, const struct mt_array *x, struct mt_array *y) {
  struct sequence *q = (struct sequence *)b;
  for (int i = 0; i < q->stage_count; i++) {
    struct stage *g = &q->stage[i];
    struct mt_array *out = y;
    if (i + 1 < q->stage_count) {
      MT_TRY(mt_array_ensure(b->s, &g->y, b->recipe->act, 2, x->t.dim[0], stage_out(g), 1));
      out = g->y;
    }
    if (g->down)
      MT_TRY(chain_forward(b, g, x, out));
    else
      MT_TRY(mt_block_forward(g->block, x, &b->info, out));
    x = out;
  }
  return MT_OK;
}

static mt_err backward(struct mt_block *b, const struct mt_array *dy, struct mt_array *dx,
                       struct mt_array *drow_scale, int accumulate) {
  struct sequence *q = (struct sequence *)b;
  if (drow_scale && q->scaled_count != 1) {
    return mt_fail(MT_EINVAL, "row_scale enters a sequence at %d places: no one gradient",
                   q->scaled_count);
  }
  for (int i = q->stage_count - 1; i >= 0; i--) {
    struct stage *g = &q->stage[i], *before = i ? g - 1 : NULL;
    struct mt_array *in = dx, *scale = g->scaled ? drow_scale : NULL;
    if (before) {
      MT_TRY(mt_array_ensure(b->s, &before->dy, b->recipe->act, 2, dy->t.dim[0], stage_out(before),
                             1));
      in = before->dy;
    }
    if (g->down)
      MT_TRY(chain_backward(b, g, dy, in, scale, accumulate));
    else
      MT_TRY(mt_block_backward(g->block, dy, in, scale, accumulate));
    dy = in;
  }
  return MT_OK;
}

static void release(struct mt_block *b) {
  struct sequence *q = (struct sequence *)b;
  for (int i = 0; i < q->stage_count; i++) {
    struct stage *g = &q->stage[i];
    struct mt_array *const all[] = {g->y, g->dy, g->gate_up, g->h, g->dgate_up};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) mt_array_free(all[k]);
  }
  for (int i = 0; i < q->block_count; i++) mt_block_release(q->block[i]);
}

/* Offsets and row_scale are checked by the blocks that take them. */
const struct mt_block_kind mt_kind_sequence = {
    .name = "sequence", .forward = forward, .backward = backward, .release = release};

static bool is_chain(mt_block *const *b, int left) {
  return left >= CHAIN && b[0]->kind == &mt_kind_grouped_linear &&
         b[1]->kind == &mt_kind_scaled_swiglu && b[2]->kind == &mt_kind_grouped_linear &&
         b[0]->groups == b[1]->groups && b[1]->groups == b[2]->groups;
}

static int scaled_places(const struct mt_block *b) {
  if (b->kind == &mt_kind_sequence) return ((const struct sequence *)b)->scaled_count;
  return b->kind->takes_scale;
}

static mt_err check_blocks(const mt_space *s, mt_block *const *blocks, int count) {
  if (count < 1 || count > MOST_BLOCKS) return mt_fail(MT_EINVAL, "a sequence of %d blocks", count);
  for (int i = 0; i < count; i++) {
    if (!blocks[i] || blocks[i]->s != s || blocks[i]->owned)
      return mt_fail(MT_EINVAL, "block %d is NULL, of another space or of another sequence", i);
    for (int k = 0; k < i; k++) {
      if (blocks[k] == blocks[i]) return mt_fail(MT_EINVAL, "block %d is block %d again", i, k);
    }
    if (i && blocks[i]->in != blocks[i - 1]->out) {
      return mt_fail(MT_ESHAPE, "block %d takes %d columns, block %d gives %d", i, blocks[i]->in,
                     i - 1, blocks[i - 1]->out);
    }
  }
  return MT_OK;
}

mt_err mt_sequence_create(mt_space *s, mt_block *const *blocks, int count, int fuse,
                          mt_block **out) {
  struct mt_block *b = NULL;
  MT_TRY(check_blocks(s, blocks, count));
  MT_TRY(mt_block_make(s, &mt_kind_sequence, sizeof(struct sequence), blocks[0]->in,
                       blocks[count - 1]->out, 1, &b));
  struct sequence *q = (struct sequence *)b;
  q->block_count = count;
  for (int i = 0; i < count; i++) {
    q->block[i] = blocks[i];
    blocks[i]->owned = true;
  }
  for (int i = 0; i < count;) {
    struct stage *g = &q->stage[q->stage_count++];
    bool chain = fuse && is_chain(blocks + i, count - i);
    g->block = blocks[i];
    if (chain) g->down = blocks[i + CHAIN - 1];
    int places = chain ? 1 : scaled_places(blocks[i]);
    g->scaled = places > 0;
    q->scaled_count += places;
    i += chain ? CHAIN : 1;
  }
  *out = b;
  return MT_OK;
}

int mt_sequence_fused_count(const mt_block *b) {
  int n = 0;
  if (b->kind != &mt_kind_sequence) return 0;
  const struct sequence *q = (const struct sequence *)b;
  for (int i = 0; i < q->stage_count; i++) {
    n += q->stage[i].down ? 1 : mt_sequence_fused_count(q->stage[i].block);
  }
  return n;
}

static struct mt_weight *weight_at(struct mt_block *b, int *i) {
  if (*i < 0) return NULL;
  if (b->kind == &mt_kind_sequence) {
    struct sequence *q = (struct sequence *)b;
    for (int k = 0; k < q->block_count; k++) {
      struct mt_weight *w = weight_at(q->block[k], i);
      if (w) return w;
    }
    return NULL;
  }
  if (*i < b->weight_count) return &b->weight[*i];
  *i -= b->weight_count;
  return NULL;
}

mt_array *mt_block_parameter(mt_block *b, int i) {
  const struct mt_weight *w = weight_at(b, &i);
  return w ? w->value : NULL;
}

mt_array *mt_block_gradient(mt_block *b, int i) {
  const struct mt_weight *w = weight_at(b, &i);
  return w ? w->grad : NULL;
}
