/* Answers of a loaded model: a prompt or a conversation, continued token by token. */
#ifndef MT_TRAIN_GENERATION_H
#define MT_TRAIN_GENERATION_H

#include "model/decode.h"
#include "train/sampler.h"
#include "train/session.h"

enum { MT_PREFILL_TOKENS = 256 }; /* of a prompt that go through the model at once, at most */

struct mt_generation {
  const struct mt_generate_options *o; /* system, chat, lengths, drawing and stop texts; stream */
  struct mt_session *s;
  /* Gets the answer's bytes: as they become certain where o->stream is set, else all at its end.
   * Returns false to end the answer. */
  bool (*show)(void *context, const char *bytes, size_t size_bytes);
  void *context;
  struct mt_kv_cache cache;
  struct mt_encoder *encoder;
  struct mt_sampler sampler;
  struct mt_rng rng;
  struct mt_rendered prompt;
  struct mt_text said; /* the answer so far */
  size_t shown;        /* bytes of it */
};

/* For a session that is loaded, for training or not; both outlive g. Set g->show next. Closed with
 * mt_generation_close, also after an error. Errors: MT_ENOMEM. */
mt_err mt_generation_open(struct mt_generation *g, struct mt_session *s,
                          const struct mt_generate_options *o);
void mt_generation_close(struct mt_generation *g);

/* Asks one thing and shows the answer (rank 0 does; where there are others, all ask the same). In a
 * conversation (o->chat; first: its beginning) the cache holds what was said before; otherwise set
 * g->cache.length to 0 before asking again. Errors: MT_EINVAL for a prompt that is empty or does
 * not fit; MT_EFORMAT for one that is no UTF-8; MT_ENUMERIC. */
mt_err mt_generation_ask(struct mt_generation *g, const char *text, bool first);

#endif
