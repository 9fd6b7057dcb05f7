/* A run's state on disk: checkpoint-N/ holds the model as a Hugging Face checkpoint, and beside it
 * what a resumed run needs to go on bit for bit. */
#ifndef MT_TRAIN_STATE_H
#define MT_TRAIN_STATE_H

#include "train/session.h"

/* Writes the model as it is to DIR (mt_hf_export). Collective: rank 0 writes, the others hand over
 * what they hold, and none holds all of it. Errors: those of mt_hf_export, on the rank they befall;
 * MT_ECOMM. */
mt_err mt_state_export(struct mt_session *s, const char *dir, uint64_t max_shard_bytes);

/* Writes OUT/checkpoint-STEP, which appears whole, with the checksums of its files. path (=) its
 * name. Later exports take the checkpoint's small files from there. Collective, as mt_state_export;
 * the same file on any mesh. */
mt_err mt_state_save(struct mt_session *s, const struct mt_optimizer *o, const struct mt_loader *l,
                     const struct mt_train_options *options, char path[MT_PATH_MAX]);

/* Removes OUT/checkpoint-N of N below the `keep` largest up to `step`; keep 0: none. Whoever looks
 * sees a checkpoint whole or not at all. Errors: MT_EIO naming the path. */
mt_err mt_state_retain(const char *out, int64_t step, int keep);

/* Removes what killed runs left in out: their temporary files and directories, as long as no
 * process of that number lives. What cannot be removed is told of. */
void mt_state_sweep(const char *out);

/* The checkpoint to resume from: `resume` itself, or the newest under out when it is "".
 * MT_ENOENT when there is none. */
mt_err mt_state_find(const struct mt_train_options *options, char path[MT_PATH_MAX]);

/* Of a fresh run: warns where OUT holds checkpoints already. */
void mt_state_warn_of_earlier(const char *out);

/* Compares a checkpoint's files with their checksums; one of an earlier version, which has none, is
 * let through with a note. Errors: MT_EFORMAT naming the damaged file. */
mt_err mt_state_verify(const char *path);

/* Step, data position, masters and moments, as far as they are here, from a checkpoint written by
 * mt_state_save on whatever mesh. --batch-size and --grad-accum may differ where the number of
 * ranks does; a warning tells when a step takes another number of samples. Errors: MT_EFORMAT;
 * MT_EINVAL naming an option that differs and would change the run. */
mt_err mt_state_load(const char *path, struct mt_session *s, struct mt_optimizer *o,
                     struct mt_loader *l, const struct mt_train_options *options);

#endif
