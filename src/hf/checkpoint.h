/* A Hugging Face checkpoint directory: opened, loaded into a model, written from one, converted. */
#ifndef MT_HF_CHECKPOINT_H
#define MT_HF_CHECKPOINT_H

#include "backend/device.h"
#include "hf/config.h"
#include "hf/names.h"
#include "io/safetensors.h"

struct mt_hf_checkpoint {
  char dir[MT_PATH_MAX];
  struct mt_config config;
  json_t *json; /* config.json */
  enum mt_hf_layout layout;
  struct mt_st_file *shard; /* all mapped */
  char (*shard_name)[256];
  int shard_count;
};

/* Opens config.json and model.safetensors or the shards of model.safetensors.index.json (a shard's
 * name must be a plain file name), and checks every tensor that the config asks for: there, once,
 * of the right shape, in F32, BF16 or F16. Reads no weight.
 * Errors: MT_ENOENT, MT_EFORMAT, MT_ESHAPE, MT_EUNSUPPORTED naming file, tensor and shapes. */
mt_err mt_hf_open(const char *dir, struct mt_hf_checkpoint *out);
/* Its three parts, for who wants to see what there is although something is missing or does not
 * fit. The first begins *out, and the second may follow it even where it failed; the third needs
 * both. Each leaves *out to be closed with mt_hf_close, also after an error. */
mt_err mt_hf_open_config(const char *dir, struct mt_hf_checkpoint *out);
mt_err mt_hf_open_shards(struct mt_hf_checkpoint *h);
mt_err mt_hf_check(const struct mt_hf_checkpoint *h);
/* Is there a file of weights, of either name, to open at all? */
bool mt_hf_has_weights(const char *dir);
void mt_hf_close(struct mt_hf_checkpoint *h);

/* Fills `compute`, and `master` where it is memory of its own, of every row of params, which may be
 * a shard's: then no more is read than that. Each byte of the files is read once, through a staging
 * buffer of at most 8 MiB, and its pages let go. */
mt_err mt_hf_load(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                  struct mt_backend *be);

/* Fills to [n] with the elements of a row from `first` on: for what is kept of a part of a row. */
mt_err mt_hf_load_run(const struct mt_hf_checkpoint *h, const struct mt_param *p, int64_t first,
                      const struct mt_tensor *to, struct mt_backend *be);

/* Frobenius norms of one expert's matrices. */
struct mt_hf_expert_norms {
  double gate, up, down;
};
/* Of all experts of a layer, out[experts] (=), from the files; the same bits on any number of
 * threads. params: the table of h->config. Errors: those of mt_hf_check. */
mt_err mt_hf_expert_norms(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                          int layer, struct mt_hf_expert_norms *out);

enum { MT_HF_KEEP = -1 };

/* Where the rows come from when many ranks hold the model. All of them export together; one writes,
 * the others hand over what they hold, piece by piece. */
struct mt_hf_gather {
  bool writes; /* this rank makes the directory */
  /* Rows [row, row + count) of a learning parameter of the whole model: *dtype (=), and on the rank
   * that writes out (=); elsewhere out is scratch. */
  mt_err (*rows)(void *context, const struct mt_param *whole, int64_t row, int64_t count, void *out,
                 enum mt_dtype *dtype);
  void *context;
};

struct mt_hf_export_options {
  int layout;               /* enum mt_hf_layout, or MT_HF_KEEP */
  int dtype;                /* MT_F32, MT_BF16, MT_F16, or MT_HF_KEEP: each tensor as its source */
  uint64_t max_shard_bytes; /* 0: 5 GB */
  const struct mt_hf_gather *gather; /* NULL: params holds all */
};

/* Writes a checkpoint directory, which appears whole under its name: weights (learning rows of
 * params from the backend, all others byte for byte from the source), tensors we do not know as
 * they are, config, tokenizer and other small files, and the checksums of all. params NULL: all
 * from the source (conversion). With options->gather params is the table of the whole model, whose
 * rows need no memory. Errors: MT_EIO (disk full, not writable) naming the path; the source and an
 * existing out_dir stay whole. */
mt_err mt_hf_export(const struct mt_hf_checkpoint *h, const struct mt_params *params,
                    struct mt_backend *be, const char *out_dir,
                    const struct mt_hf_export_options *options);

/* Makes a checkpoint of random weights from a config alone: matrices normal with the config's
 * initializer_range (0.02), norms 1, deterministic in seed, per-expert names, files beside
 * config.json copied along. dtype: MT_F32, MT_BF16, MT_F16 or MT_HF_KEEP (F32). */
mt_err mt_hf_init(const char *config_dir, const char *out_dir, uint64_t seed, int dtype);

#endif
