#include <stdlib.h>

#include "api/api.h"
#include "train/data.h"

struct mt_corpus {
  const struct mt_tuner *tuner;
  struct mt_dataset *data;
  struct mt_loader training, evaluation; /* list NULL: not made yet */
};

enum { ALL_FLAGS = MT_CORPUS_TRAIN_ON_PROMPT | MT_CORPUS_SKIP_BAD_LINES | MT_CORPUS_CACHE };

mt_err mt_corpus_open(mt_tuner *t, const char *path, int flags, mt_corpus **out) {
  const struct mt_cache_options cache = {.use = (flags & MT_CORPUS_CACHE) != 0};
  if (flags & ~ALL_FLAGS) return mt_fail(MT_EINVAL, "corpus flags %d: only 1, 2 and 4", flags);
  struct mt_corpus *c = calloc(1, sizeof *c);
  if (!c) return mt_fail(MT_ENOMEM, "a corpus");
  struct mt_dataset_options o = {.path = path,
                                 .chat = t->s.chat,
                                 .max_seq_length = t->max_seq_length,
                                 .eos_id = t->s.checkpoint.config.eos_id,
                                 .train_on_prompt = (flags & MT_CORPUS_TRAIN_ON_PROMPT) != 0,
                                 .skip_bad_lines = (flags & MT_CORPUS_SKIP_BAD_LINES) != 0,
                                 .threads = t->threads};
  mt_err err;
  c->tuner = t;
  MT_GO(mt_data_open(t->s.tokenizer, &o, &cache, &c->data));
  MT_GO(mt_dataset_wait(c->data));
done:
  if (err)
    mt_corpus_close(c);
  else
    *out = c;
  return err;
}

void mt_corpus_close(mt_corpus *c) {
  if (!c) return;
  mt_loader_destroy(&c->training);
  mt_loader_destroy(&c->evaluation);
  mt_dataset_close(c->data);
  free(c);
}

struct mt_corpus_facts mt_corpus_describe(const mt_corpus *c) {
  struct mt_dataset_stats s = mt_dataset_stats(c->data);
  int64_t a_step = (int64_t)c->tuner->batch_size * c->tuner->grad_accum;
  return (struct mt_corpus_facts){.samples = s.samples,
                                  .tokens = s.tokens,
                                  .targets = s.targets,
                                  .truncated = s.truncated,
                                  .dropped = s.dropped,
                                  .bad_lines = s.bad_lines,
                                  .steps_per_epoch = (s.samples + a_step - 1) / a_step};
}

mt_err mt_corpus_loader(struct mt_corpus *c, const struct mt_tuner *t, bool shuffled,
                        struct mt_loader **out) {
  struct mt_loader *l = shuffled ? &c->training : &c->evaluation;
  if (c->tuner != t) return mt_fail(MT_EINVAL, "the corpus was opened for another tuner");
  if (!l->list) {
    struct mt_loader_options o = mt_tuner_loader_options(t, shuffled);
    MT_TRY(mt_loader_create(l, c->data, &o));
  }
  *out = l;
  return MT_OK;
}
