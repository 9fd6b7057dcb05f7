/* What every command opens: checkpoint, tokenizer, chat template, backend, model. */
#ifndef MT_TRAIN_SESSION_H
#define MT_TRAIN_SESSION_H

#include "data/dataset.h"
#include "hf/checkpoint.h"
#include "par/ranks.h"
#include "train/options.h"

struct mt_session {
  struct mt_hf_checkpoint checkpoint;
  struct mt_tokenizer *tokenizer;
  const struct mt_template *chat;
  const struct mt_recipe *recipe;
  unsigned skip_8bit; /* as mt_model_options has it */
  struct mt_backend be;
  struct mt_model model;
  struct mt_params whole;  /* the table of all ranks' model, without memory */
  struct mt_world *world;  /* NULL: this process is alone */
  struct mt_ranks members; /* where there are several */
  struct mt_ranks *ranks;  /* they, or NULL */
};

/* The recipe and the backend that options name. Errors: MT_EUNSUPPORTED naming what there is not.
 */
mt_err mt_device_open(const struct mt_device_options *o, const struct mt_recipe **recipe,
                      struct mt_backend *be);

/* Before mt_device_open: of several ranks on a host (world, or NULL) each gets a GPU of its own,
 * and its share of the cores where the number of threads is left open. Errors: MT_EINVAL where
 * there are too few. */
mt_err mt_device_of_rank(const struct mt_world *world, struct mt_device_options *o);

/* The parts that fp8_skip names, as mt_model_options has them. Errors: MT_EINVAL naming the part.
 */
mt_err mt_device_skips(const struct mt_device_options *o, unsigned *skip_8bit);

/* Whether a GPU is asked for, or left to choose and there is one. */
bool mt_device_on_gpu(const struct mt_device_options *o);
/* The 8-bit precision whose products the device has, "mxfp8" on Blackwell and "fp8" on a GPU before
 * it; on a CPU, which has neither, "mxfp8". */
const char *mt_device_eight_bits(const struct mt_device_options *o);

/* Whether graphs are wanted, where they are possible. */
bool mt_device_graphs(const struct mt_device_options *o);

/* Checkpoint (weights not yet read), tokenizer and chat template (NULL: the checkpoint's), recipe
 * and backend, the device as mt_device_of_rank has it. Errors:
 * those of the rooms; a tokenizer with more ids than the model has rows; more ranks than GPUs. */
mt_err mt_session_open(struct mt_session *s, const char *model_dir,
                       const struct mt_device_options *device, const char *chat_template,
                       const struct mt_world *world);
/* The place of this process among the ranks of world (which may be NULL: alone), before anything of
 * the model is read. Collective. Errors: MT_EINVAL for sizes that do not go together, and where
 * the ranks have opened different models; MT_EUNSUPPORTED. */
mt_err mt_session_join(struct mt_session *s, struct mt_world *world, int ep_size, int pp_size);
/* Is this the rank that writes files and speaks? */
bool mt_session_speaks(const struct mt_session *s);
/* How many ranks read data, and this one's number among them. */
int mt_session_readers(const struct mt_session *s);
int mt_session_reader(const struct mt_session *s);

/* Builds the model, or this rank's part of it (options->shard is filled in), with the freeze
 * patterns applied and loads the weights. Collective. */
mt_err mt_session_load(struct mt_session *s, const struct mt_model_options *options,
                       const struct mt_string_list *freeze);
/* The memory that would take. */
mt_err mt_session_plan(struct mt_session *s, const struct mt_model_options *options,
                       const struct mt_string_list *freeze, struct mt_memory *out);
void mt_session_close(struct mt_session *s);
/* Seconds that reading or writing a model of this size with its state may take: what ranks must be
 * ready to wait for one that does. */
double mt_session_patience_s(const struct mt_session *s);

/* What a token uses of all parameters, and what learns. */
struct mt_parameter_counts {
  int64_t total, active, learning;
};
struct mt_parameter_counts mt_session_parameters(const struct mt_session *s);

/* "key: value" facts, one a line on standard error, of what was opened. */
void mt_session_describe(const struct mt_session *s);

/* Seconds of a steady clock. */
double mt_now_s(void);

#endif
