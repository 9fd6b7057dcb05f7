/* Data sets as commands open them: with the cache that was asked for, and with word of how far they
 * are. */
#ifndef MT_TRAIN_DATA_H
#define MT_TRAIN_DATA_H

#include "data/dataset.h"
#include "train/session.h"

/* As mt_dataset_open, but for o->cache_dir, which `cache` decides. */
mt_err mt_data_open(const struct mt_tokenizer *tokenizer, struct mt_dataset_options *o,
                    const struct mt_cache_options *cache, struct mt_dataset **out);

/* As mt_dataset_wait. What takes longer than a moment is shown on standard error: on a terminal a
 * line that stays in place, else one now and then. */
mt_err mt_data_wait(struct mt_dataset *d, const char *path);

/* Where many ranks read the same data, the first one makes the tokens, and the others find them in
 * the cache when it has. begin: starts that, where it can be started already; *out (=) or NULL.
 * finish: waits for it, opens it where it is not open yet, and refuses ranks that see other
 * samples. Collective. On one rank: mt_data_open and mt_data_wait. */
mt_err mt_data_begin(const struct mt_session *s, struct mt_dataset_options *o,
                     const struct mt_cache_options *cache, struct mt_dataset **out);
mt_err mt_data_finish(const struct mt_session *s, struct mt_dataset_options *o,
                      const struct mt_cache_options *cache, struct mt_dataset **out);

/* Says what the file held and how its tokens came to be. */
void mt_data_describe(const char *what, const char *path, const struct mt_dataset *d);

#endif
