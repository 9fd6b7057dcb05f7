/* The parts of `moetune inspect`. */
#ifndef MT_TRAIN_INSPECT_H
#define MT_TRAIN_INSPECT_H

#include "hf/checkpoint.h"
#include "par/ranks.h"
#include "train/session.h"

/* Tables of a checkpoint's files. */
void mt_inspect_shards(const struct mt_hf_checkpoint *h);
/* all: every tensor; else one line for those that differ in the numbers of their names alone. */
mt_err mt_inspect_tensors(const struct mt_hf_checkpoint *h, bool all);
/* Reads all experts' weights. each: a number for every expert whatever their count. */
mt_err mt_inspect_norms(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                        bool each);

/* Who holds which layers and experts, a line a rank; and bytes, of each rank, unless NULL. */
void mt_inspect_mesh(const struct mt_mesh *mesh, const struct mt_config *c, const uint64_t *bytes);
/* Bytes by lifetime; of: what they are of, behind the heading. */
void mt_inspect_plan(const struct mt_memory *m, const char *of);

/* Both of a session's mesh, or of one rank, told by rank 0: what training so would take of each.
 * Collective. Errors: those of mt_session_plan, MT_ENOMEM, MT_ECOMM. */
mt_err mt_inspect_session(struct mt_session *s, const struct mt_model_options *o,
                          const struct mt_string_list *freeze);

/* What training on a data file would see. */
mt_err mt_inspect_data(const struct mt_inspect_options *o);

/* Text that came from a file, on standard output, made harmless (terminal.h). */
void mt_inspect_text(const char *text);

#endif
