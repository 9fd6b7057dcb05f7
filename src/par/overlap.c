/* Sums of gradients while backward goes on: a bucket whose gradients are finished leaves at once,
 * and is added up and gathered as its parts arrive.
 *
 * Every rank must start the calls of a group in the same order. Buckets become ready in the order
 * of backward, which is the same everywhere. On a host gatherings are started in that order too,
 * whenever their parts have come, and have communicators of their own, so that neither order
 * depends on the other. Between GPUs nobody asks what has come, and backward's stream waits for
 * none of it before its end: exchanges, additions and gatherings of a class are one row on its
 * communicator's stream, where a bucket is added up once the next one has left.
 *
 * Who waits here waits for ranks of its own stage to come to the same place of the same backward,
 * and they for what comes earlier in the order that all stages' lists are cut from (pipeline.h):
 * whoever is first in that order waits for nobody.
 *
 * Sharded gradients are added up in every micro-batch, to what the rank has of its parts; and the
 * place in the ring that backward comes to next is cleared when a group has left. */
#include <stdlib.h>

#include "par/ranks.h"

enum state { WAITS, LEFT, ADDED };

struct flight {
  enum state state;
  int missing; /* gradients that are not finished */
  int stage;
  struct mt_transfer t;
};

struct mt_overlap {
  struct flight *flight; /* of each bucket */
  int *order;            /* buckets as they left */
  int left, added;
  bool accumulate; /* sharded gradients: another micro-batch came before */
  /* Places for the parts of buckets that are on their way or wait to be added up; between GPUs two
   * of each class by turns. */
  void *memory;
  size_t stage_bytes;
  int stages;
  bool used[MT_OVERLAP_BUCKETS];
  struct {
    int first, turn; /* places */
    int owed;        /* the bucket that is to be added up next; -1: none */
  } row[MT_SYNC_COUNT];
  int64_t *numbers; /* counts and starts for one call */
  mt_err err;       /* the first that a hook could not return */
};

static struct mt_comm *group_of(struct mt_ranks *r, const struct mt_bucket *k) {
  return mt_ranks_sharing(r, k->sync);
}

/* Whether additions run beside backward too, on a stream of their own. */
static bool beside(const struct mt_ranks *r) {
  return r->model->be->on_stream != NULL;
}

/* Where sums are sent around. */
static struct mt_comm *gathers_of(struct mt_ranks *r, const struct mt_bucket *k) {
  return beside(r) ? group_of(r, k) : &r->late[k->sync];
}

static enum mt_dtype format(const struct mt_ranks *r) {
  return r->model->recipe->grad;
}

static char *stage_of(const struct mt_overlap *o, int stage) {
  return (char *)o->memory + (size_t)stage * o->stage_bytes;
}

/* Where this rank's part of a bucket is added up. */
static struct mt_tensor sum_of(struct mt_ranks *r, const struct mt_bucket *k) {
  const struct mt_model *m = r->model;
  size_t item = mt_dtype_bytes(format(r));
  char *at = mt_model_grad_shared(m, k->sync)
                 ? (char *)m->share[k->sync].grad.data + (size_t)k->state * item
                 : mt_ranks_bucket(r, k, false) + (size_t)k->own * item;
  return mt_vec(at, format(r), k->owned);
}

/* Adds up the parts of bucket i, which have come. */
static mt_err add_parts(struct mt_ranks *r, int i) {
  struct mt_overlap *o = r->overlap;
  struct mt_backend *be = r->model->be;
  const struct mt_bucket *k = &r->buckets.item[i];
  struct mt_parts_sum_args a = {
      .parts = mt_mat(stage_of(o, o->flight[i].stage), format(r), group_of(r, k)->size, k->owned),
      .out = sum_of(r, k),
      .accumulate = o->accumulate && mt_model_grad_shared(r->model, k->sync)};
  return k->owned > 0 ? be->ops.parts_sum(be, &a) : MT_OK;
}

/* Sends its sums around, where whole ones are wanted. */
static mt_err send_sums(struct mt_ranks *r, int i) {
  struct mt_overlap *o = r->overlap;
  const struct mt_bucket *k = &r->buckets.item[i];
  struct mt_parts parts, places;
  if (r->model->options.zero > 0) return MT_OK;
  mt_sum_places(o->numbers, group_of(r, k), k->count, &parts, &places);
  return mt_comm_all_gather(gathers_of(r, k), mt_ranks_bucket(r, k, false), parts,
                            mt_dtype_bytes(format(r)), &o->flight[i].t);
}

/* The oldest bucket's parts have come: adds them up and sends the sums around. */
static mt_err add_up(struct mt_ranks *r) {
  struct mt_overlap *o = r->overlap;
  int i = o->order[o->added];
  struct flight *f = &o->flight[i];
  struct mt_comm *c = group_of(r, &r->buckets.item[i]);
  if (c->size > 1) {
    MT_TRY(mt_comm_wait(c, &f->t));
    MT_TRY(add_parts(r, i));
    o->used[f->stage] = false;
  }
  f->state = ADDED;
  o->added++;
  return c->size > 1 ? send_sums(r, i) : MT_OK;
}

/* The same on the communicator's stream, of the bucket that is owed; `next` (-1: none) is then. */
static mt_err add_owed(struct mt_ranks *r, enum mt_sync sync, int next) {
  struct mt_overlap *o = r->overlap;
  struct mt_backend *be = r->model->be;
  int i = o->row[sync].owed;
  o->row[sync].owed = next;
  if (i < 0) return MT_OK;
  be->on_stream(be, group_of(r, &r->buckets.item[i])->stream);
  mt_err err = add_parts(r, i);
  be->on_stream(be, NULL);
  return err ? err : send_sums(r, i);
}

/* Goes on with what has come. */
static mt_err go_on(struct mt_ranks *r) {
  struct mt_overlap *o = r->overlap;
  while (o->added < o->left) {
    int i = o->order[o->added];
    bool done = true;
    struct mt_comm *c = group_of(r, &r->buckets.item[i]);
    MT_TRY(mt_comm_test(c, &o->flight[i].t, &done));
    if (!done) return MT_OK;
    MT_TRY(add_up(r));
  }
  return MT_OK;
}

static int free_stage(const struct mt_overlap *o) {
  for (int s = 0; s < o->stages; s++) {
    if (!o->used[s]) return s;
  }
  return -1;
}

/* Once a group has left, backward writes into the next one's place. */
static mt_err make_room(struct mt_ranks *r, const struct mt_bucket *left) {
  struct mt_overlap *o = r->overlap;
  int place = -1;
  for (int i = 0; i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    if (k->sync != left->sync) continue;
    if (k->group == left->group && o->flight[i].state == WAITS) return MT_OK;
    if (k->group == left->group + 1) place = k->place;
  }
  for (int i = 0; i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    if (k->sync != left->sync || k->place != place) continue;
    while (!beside(r) && o->flight[i].state == LEFT) MT_TRY(add_up(r));
    if (beside(r)) MT_TRY(mt_comm_wait(group_of(r, k), &o->flight[i].t));
  }
  return MT_OK;
}

static mt_err take_stage(struct mt_ranks *r, enum mt_sync sync, int *stage) {
  struct mt_overlap *o = r->overlap;
  if (beside(r)) {
    *stage = o->row[sync].first + o->row[sync].turn;
    o->row[sync].turn ^= 1;
    return MT_OK;
  }
  while (free_stage(o) < 0) MT_TRY(add_up(r));
  *stage = free_stage(o);
  o->used[*stage] = true;
  return MT_OK;
}

static mt_err leave(struct mt_ranks *r, int i) {
  struct mt_overlap *o = r->overlap;
  const struct mt_bucket *k = &r->buckets.item[i];
  struct flight *f = &o->flight[i];
  struct mt_comm *c = group_of(r, k);
  size_t item = mt_dtype_bytes(format(r));
  struct mt_parts parts, places;
  f->state = LEFT;
  if (c->size > 1) {
    MT_TRY(take_stage(r, k->sync, &f->stage));
    mt_sum_places(o->numbers, c, k->count, &parts, &places);
    MT_TRY(mt_comm_all_to_all(c, mt_ranks_bucket(r, k, false), parts, stage_of(o, f->stage), places,
                              item, &f->t));
    if (beside(r)) MT_TRY(add_owed(r, k->sync, i));
  }
  o->order[o->left++] = i;
  return mt_model_grad_shared(r->model, k->sync) ? make_room(r, k) : MT_OK;
}

static mt_err ready(struct mt_ranks *r, const struct mt_param *p) {
  struct mt_overlap *o = r->overlap;
  int row = (int)(p - r->model->params.row);
  for (int i = r->buckets.count - 1; i >= 0; i--) {
    const struct mt_bucket *k = &r->buckets.item[i];
    bool inside = k->sync == p->sync && row >= k->first && row <= k->last;
    if (!inside || o->flight[i].state != WAITS || o->flight[i].missing == 0) continue;
    if (--o->flight[i].missing == 0) MT_TRY(leave(r, i));
  }
  return beside(r) ? MT_OK : go_on(r);
}

static void on_ready(void *context, struct mt_param *p) {
  struct mt_ranks *r = context;
  if (!r->overlap->err) r->overlap->err = ready(r, p);
}

static int places_of(struct mt_ranks *r) {
  int n = 0, classes[MT_SYNC_COUNT] = {0};
  for (int i = 0; i < r->buckets.count; i++) {
    enum mt_sync sync = r->buckets.item[i].sync;
    int more = mt_ranks_sharing(r, sync)->size > 1;
    n += more;
    classes[sync] |= more;
  }
  if (beside(r)) {
    r->overlap->row[MT_SYNC_EXPERT].first = 2 * classes[MT_SYNC_DENSE];
    return 2 * (classes[MT_SYNC_DENSE] + classes[MT_SYNC_EXPERT]);
  }
  return n < MT_OVERLAP_BUCKETS ? n : MT_OVERLAP_BUCKETS;
}

static mt_err open_overlap(struct mt_ranks *r) {
  size_t n = (size_t)r->buckets.count + 1, ranks = (size_t)r->tensor[MT_GROUP_DENSE]->size;
  struct mt_overlap *o = calloc(1, sizeof *o);
  r->overlap = o; /* which mt_ranks_end_overlap frees, however much of it there is */
  if (o) o->flight = calloc(n, sizeof *o->flight);
  if (o) o->order = calloc(n, sizeof *o->order);
  if (o) o->numbers = calloc(4 * ranks, sizeof *o->numbers);
  if (!o || !o->flight || !o->order || !o->numbers)
    return mt_fail(MT_ENOMEM, "%d buckets", r->buckets.count);
  for (int i = 0; i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    size_t size = (size_t)group_of(r, k)->size, bytes = (size_t)k->owned * size;
    if (size == 1) continue;
    bytes *= mt_dtype_bytes(format(r));
    if (bytes > o->stage_bytes) o->stage_bytes = bytes;
  }
  o->stages = places_of(r);
  size_t all = (size_t)o->stages * o->stage_bytes;
  return all ? r->model->be->mem_alloc(r->model->be, all, &o->memory) : MT_OK;
}

size_t mt_ranks_sum_bytes(const struct mt_ranks *r) {
  const struct mt_overlap *o = r->overlap;
  return r->sum.parts_bytes + (o ? (size_t)o->stages * o->stage_bytes : 0);
}

/* All that backward has finished is added up, and whatever is launched next comes behind it. */
static mt_err settle(struct mt_ranks *r) {
  struct mt_overlap *o = r->overlap;
  r->model->grad_ready = NULL;
  if (o->err) return o->err;
  for (int i = r->buckets.count - 1; i >= 0; i--) {
    if (o->flight[i].state == WAITS) MT_TRY(leave(r, i));
  }
  while (!beside(r) && o->added < o->left) MT_TRY(add_up(r));
  for (int sync = 0; beside(r) && sync < MT_SYNC_COUNT; sync++) {
    MT_TRY(add_owed(r, (enum mt_sync)sync, -1));
    MT_TRY(mt_comm_join(mt_ranks_sharing(r, (enum mt_sync)sync)));
  }
  return MT_OK;
}

mt_err mt_ranks_begin(struct mt_ranks *r, int micro, int micro_count) {
  struct mt_model *m = r->model;
  bool every = m->options.zero > 1;
  if (!every && (r->behind || micro + 1 < micro_count)) return MT_OK;
  mt_err err = r->overlap ? MT_OK : open_overlap(r);
  if (err) mt_ranks_end_overlap(r);
  MT_TRY(err);
  if (r->begun) MT_TRY(settle(r));
  struct mt_overlap *o = r->overlap;
  o->left = o->added = 0;
  for (int sync = 0; sync < MT_SYNC_COUNT; sync++) o->row[sync].owed = -1;
  o->accumulate = micro > 0;
  o->err = MT_OK;
  for (int i = 0; i < r->buckets.count; i++) {
    const struct mt_bucket *k = &r->buckets.item[i];
    o->flight[i] = (struct flight){0};
    for (int row = k->first; row <= k->last; row++) {
      const struct mt_param *p = &m->params.row[row];
      o->flight[i].missing += p->sync == k->sync && p->learns;
    }
  }
  m->grad_ready = on_ready;
  m->grad_ready_context = r;
  r->begun = true;
  return MT_OK;
}

mt_err mt_ranks_finish(struct mt_ranks *r) {
  struct mt_overlap *o = r->overlap;
  r->begun = false;
  MT_TRY(settle(r));
  for (int i = 0; !beside(r) && i < o->left; i++) {
    const struct mt_bucket *k = &r->buckets.item[o->order[i]];
    MT_TRY(mt_comm_wait(gathers_of(r, k), &o->flight[o->order[i]].t));
  }
  return MT_OK;
}

void mt_ranks_end_overlap(struct mt_ranks *r) {
  struct mt_overlap *o = r->overlap;
  if (!o) return;
  r->model->be->mem_free(r->model->be, o->memory, (size_t)o->stages * o->stage_bytes);
  free(o->flight);
  free(o->order);
  free(o->numbers);
  free(o);
  r->overlap = NULL;
}
