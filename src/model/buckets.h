/* How gradients and optimizer state are cut for the ranks that share a parameter. Pure arithmetic.
 *
 * The learning parameters of a sync class, each rounded up to MT_BUCKET_UNIT elements, are one
 * stretch in the order of the table. It is cut into buckets, none of which reaches from one layer
 * into another, and a bucket into one part for each of the ranks that share the class. A rank adds
 * up the gradients of its parts, and with sharded state it alone holds m, v and (where it is memory
 * of its own) the master of their elements, one part behind the other.
 *
 * Sharded gradients: a rank keeps sums of its parts alone, and backward writes into a ring. The
 * buckets of a layer (outside of the layers, of a row) are a group, and groups have places by a
 * fixed rule: layers take two by turns, the head and the embedding share one, as the former is done
 * before the latter begins. So the place of the group that backward comes to next is free once the
 * buckets that lay there have left. */
#ifndef MT_MODEL_BUCKETS_H
#define MT_MODEL_BUCKETS_H

#include "model/params.h"

/* No block of a quantized format reaches from one part into another. */
enum { MT_BUCKET_UNIT = 128, MT_SYNC_COUNT = 2 };

/* Places of a ring: of head and embedding, of the final norm, of layers. */
enum { MT_PLACE_ENDS, MT_PLACE_NORM, MT_PLACE_LAYERS, MT_PLACE_COUNT = MT_PLACE_LAYERS + 2 };

/* Ranks that share each class's parameters, and this one's number among them; all zero: one. */
struct mt_sharers {
  int count[MT_SYNC_COUNT], index[MT_SYNC_COUNT];
};

struct mt_bucket {
  enum mt_sync sync;
  int layer;            /* -1: outside of them */
  int first, last;      /* rows of the table with elements in it: of this class, learning */
  int group, place;     /* groups of a class are numbered as backward comes to them */
  int64_t begin, count; /* elements of the class's stretch */
  int64_t own, owned;   /* this rank's part: from begin + own on */
  int64_t state;        /* where that begins in the rank's share of the class */
};

struct mt_buckets {
  struct mt_bucket *item;
  int count;
  int64_t *at; /* of each row of the table: where it begins in its class's stretch */
  int64_t total[MT_SYNC_COUNT], owned[MT_SYNC_COUNT]; /* elements of the stretch; this rank's */
  int64_t *ring_at;            /* of each row that learns: where it begins in its class's ring */
  int64_t ring[MT_SYNC_COUNT]; /* elements of that */
};

/* `most`: elements of a bucket at most, rounded up to the unit. Errors: MT_ENOMEM. */
mt_err mt_buckets_build(const struct mt_params *p, const struct mt_sharers *sharers, int64_t most,
                        struct mt_buckets *out);
void mt_buckets_free(struct mt_buckets *b); /* safe on a zeroed one */

/* n elements cut for so many ranks: equal parts, a multiple of the unit, of which the last ones may
 * be smaller or empty. Rank i's begins at the result and has *count. */
int64_t mt_bucket_part(int64_t n, int ranks, int i, int64_t *count);

/* Elements of a row that this rank keeps the state of, one run after the other: the first that lies
 * behind element `from` of the row is *begin and *count long, its state at *state of the class's
 * share. false: there is none. */
bool mt_buckets_run(const struct mt_buckets *b, const struct mt_params *p, int row, int64_t from,
                    int64_t *begin, int64_t *count, int64_t *state);

static inline int64_t mt_bucket_round(int64_t n) {
  return (n + MT_BUCKET_UNIT - 1) / MT_BUCKET_UNIT * MT_BUCKET_UNIT;
}

#endif
