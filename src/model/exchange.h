/* Moving tokens to their experts and back: the one seam where expert parallelism enters the model.
 * On one rank it is a permutation of local rows (mt_exchange_local); over ranks par/ supplies the
 * all-to-all behind the same calls. A route is made once per layer and micro-batch and serves
 * forward and backward. */
#ifndef MT_MODEL_EXCHANGE_H
#define MT_MODEL_EXCHANGE_H

#include "backend/device.h"

/* Chunks that a micro-batch's tokens may be cut into at most. */
enum { MT_MAX_CHUNKS = 16 };

/* Consecutive tokens of the micro-batch, which travel together and are computed by themselves, so
 * that the next ones are on their way meanwhile. Each rank cuts its own tokens, into as many chunks
 * as all others do; some may be empty. */
struct mt_route_chunk {
  int token_begin, token_count;
  int64_t row_begin, row_count; /* of the rows that come to this rank's experts */
};

/* One layer's routing of one micro-batch; device memory. Everything here that counts tokens or rows
 * is chunk by chunk, from the chunk's first one on. */
struct mt_route {
  int layer;
  int plan; /* number of the exchange's plan: of a layer and of a micro-batch under way */
  int token_count, top_k;
  int chunk_count; /* 1 where all experts are here */
  struct mt_route_chunk chunk[MT_MAX_CHUNKS];
  int64_t row_count; /* R, the host's bound on rows here: exact over ranks, else T*K */
  int expert_count;  /* experts held here */
  int32_t *index;    /* [T,K] expert of each choice, -1 none: the router's output */
  int32_t *offsets;  /* [chunk_count,expert_count+1] rows of each local expert */
  int32_t *padded;   /* likewise, pad_offsets of them (not of plan's making), or NULL */
  /* The choices of this rank's tokens in the order of their experts, wherever those are. */
  int32_t *row_source; /* [T*K] */
  int32_t *token_row;  /* [T*K] */
};

/* One chunk's way there or back: it departs, and it arrives. What a call reads may not be changed,
 * and what it writes not be used, between the two; other chunks and other calls may come between.
 * Every rank makes the same calls in the same order, whatever rows it has. */
enum mt_leg { MT_DEPART = 1, MT_ARRIVE = 2 };
struct mt_trip {
  const struct mt_route *route;
  int chunk;
  enum mt_leg leg;
};

/* Tensors are those of all tokens and rows: a trip is about its chunk's. */
struct mt_exchange {
  /* Fills what route has of chunks, offsets, row_source, token_row and row_count from index,
   * token_count and chunk_count. Where no row comes, the first chunk has one that belongs to no
   * expert, since no operation sees a shape of nothing. tokens [T,H]: what the next dispatch will
   * be given, so that it can be prepared while the host waits for counts; or NULL. */
  mt_err (*plan)(struct mt_exchange *x, struct mt_backend *be, struct mt_route *route,
                 const struct mt_tensor *tokens);
  /* xs (=) [R,H]: rows in expert order. */
  mt_err (*dispatch)(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                     const struct mt_tensor *tokens, struct mt_tensor *xs);
  /* dtokens (=) [T,H]: gradient of dispatch. */
  mt_err (*dispatch_bwd)(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                         const struct mt_tensor *dxs, struct mt_tensor *dtokens);
  /* row_prob (=) [R]: each row's routing probability, prob being [T,K]; rows past the last are
   * left as they are. And back: dprob (=) [T,K], 0 where a choice has no row. */
  mt_err (*dispatch_prob)(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                          const struct mt_tensor *prob, struct mt_tensor *row_prob);
  mt_err (*dispatch_prob_bwd)(struct mt_exchange *x, struct mt_backend *be,
                              const struct mt_trip *trip, const struct mt_tensor *drow_prob,
                              struct mt_tensor *dprob);
  /* y (=) [T,H]: expert outputs weighted by prob [T,K], or summed where prob is NULL. */
  mt_err (*combine)(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                    const struct mt_tensor *ys, const struct mt_tensor *prob, struct mt_tensor *y);
  /* ys becomes dys in place; dprob [T,K] (=), 0 where a choice has no row. Without prob (NULL, and
   * dprob NULL): dys is the tokens' gradient alone, and ys is not read. */
  mt_err (*combine_bwd)(struct mt_exchange *x, struct mt_backend *be, const struct mt_trip *trip,
                        const struct mt_tensor *dy, const struct mt_tensor *prob,
                        struct mt_tensor *ys, struct mt_tensor *dprob);
  /* Lets what is under way go on, where somebody must look after it; NULL: nobody need. */
  mt_err (*advance)(struct mt_exchange *x);
  /* What the auxiliary losses are made of, added up over all ranks whose tokens are one
   * micro-batch: aux_sums [E+1] (mt_acts) and aux_count [E] in place; *valid_count becomes another
   * pointer to one number. NULL: this rank's tokens are all. */
  mt_err (*share_aux)(struct mt_exchange *x, struct mt_backend *be, struct mt_tensor *aux_sums,
                      int32_t *aux_count, const int32_t **valid_count);
  void *impl;
};

/* The tokens of route's chunks (=) from token_count and chunk_count; rows are none. */
void mt_route_cut(struct mt_route *route);

/* All experts are here: dispatch is a gather, combine a weighted sum in order of k. All is done at
 * departure. */
struct mt_exchange mt_exchange_local(void);

#endif
