/* What a run is asked to do: plain structs that cli/ fills from its option table and train/ reads.
 * Every field is valid when a run function gets it (ranges and names are checked by the table);
 * strings are borrowed and outlive the call. Optional paths and texts are NULL when absent. */
#ifndef MT_TRAIN_OPTIONS_H
#define MT_TRAIN_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "model/model.h"
#include "train/optimizer.h"

struct mt_world;

/* Where and in which format a command computes. */
struct mt_device_options {
  const char *device;    /* "auto" (a GPU where there is one), "cpu", "cuda" */
  int device_index;      /* which GPU, of those that are visible */
  const char *kernels;   /* of a GPU: "native", or "portable" (what every GPU from sm_80 on has) */
  const char *precision; /* name of a recipe; NULL: bf16 on a GPU, fp32 on the CPU */
  const char
      *fp8_skip; /* parts that an 8-bit one leaves out: "attn", "experts", both; NULL: none */
  int threads;   /* of the CPU backend; 0: all cores, or a rank's share */
  const char *optim_state; /* of training: "fp32" or "bf16"; NULL: fp32 */
  const char *graphs;      /* of a GPU's training: "auto" or "off"; NULL: auto */
  bool plan_only;          /* no GPU is opened: the backend plans memory and runs nothing */
};

/* Whether and where tokenised data is kept for the next time. */
struct mt_cache_options {
  bool use;
  const char *dir; /* NULL: the user's cache directory (mt_dataset_cache_dir) */
};

struct mt_string_list {
  const char *const *item;
  int count;
};

/* The order in which stages work (par/pipeline.h). */
enum mt_pp_schedule { MT_PP_1F1B, MT_PP_SEQUENTIAL };

/* `moetune train`. A run is warmup_steps + train_steps optimizer steps; the warm-up steps raise the
 * learning rate and stay out of the median step time. */
struct mt_train_options {
  const char *model; /* checkpoint directory to start from */
  const char *data;  /* JSON lines */
  const char *eval_data;
  const char *out;    /* run directory; the final checkpoint lies in it */
  const char *resume; /* NULL: fresh; "": the newest checkpoint under out; else that directory */
  int improvement;    /* 0..3, the rung that preset experts, blocks, pp_schedule, precision */
  bool *recorded;     /* (=) whether the run came to be: run.json is its own; may be NULL */
  struct mt_world *world; /* the ranks that train together; NULL: this process alone */
  int ep_size;            /* of them, those that share a layer's experts */
  int ep_chunks;          /* that a micro-batch's tokens travel in */
  int dispatch_precision; /* enum mt_dispatch_precision */
  int pp_size;            /* stages that the layers are cut into */
  int pp_schedule;        /* enum mt_pp_schedule */
  double comm_timeout_s;  /* how long they wait for each other */
  int zero;               /* what they cut among them: 1 the optimizer's state, 2 gradients too */
  int batch_size;         /* samples a rank and micro-batch */
  int max_seq_length;     /* tokens; longer samples are truncated */
  int64_t warmup_steps;   /* before train_steps */
  int64_t train_steps;    /* 0: as many as `epochs` gives, less the warm-up */
  double epochs;          /* passes over the data when train_steps is 0; may be a fraction */
  int grad_accum;         /* micro-batches a step */
  double lr;              /* peak */
  int lr_schedule;        /* enum mt_schedule */
  double weight_decay;    /* on matrices alone */
  double adam_beta1, adam_beta2, adam_eps;
  double grad_clip; /* global norm; 0: none */
  uint64_t seed;    /* order of samples */
  struct mt_device_options device;
  int experts;                  /* enum mt_experts_strategy */
  int blocks;                   /* enum mt_blocks_strategy */
  int recompute;                /* enum mt_recompute */
  struct mt_string_list freeze; /* shell patterns over parameter names: "layers.0.*", "*router" */
  double router_aux_coef;       /* < 0: as the checkpoint's config says; 0: none */
  double router_z_loss;         /* coefficient; 0: none */
  int64_t eval_every;           /* steps; 0: before the first and after the last alone */
  int patience;                 /* evaluations without improvement that end the run; 0: none do */
  double min_delta;             /* what the held-out loss must fall by to be an improvement */
  bool keep_best;               /* OUT/best: the model of the lowest held-out loss */
  int64_t save_every;           /* steps; 0: after the last alone */
  int keep_last;                /* checkpoints kept, the newest; 0: all */
  int samples;                  /* answers written at each evaluation */
  int sample_tokens;            /* of each, at most */
  struct mt_string_list sample_prompts; /* empty: questions of the held-out data */
  int64_t dead_expert_steps;            /* steps without a token after which is warned; 0: never */
  bool tensorboard;                     /* event files beside metrics.jsonl */
  int64_t log_every;                    /* steps between plain lines */
  bool train_on_prompt;                 /* loss on every token, not the answer's alone */
  bool skip_bad_lines;                  /* count malformed lines instead of stopping */
  bool dry_run;              /* show who holds what and the memory it takes, and do nothing */
  const char *chat_template; /* name of a known template; NULL: the checkpoint's */
  struct mt_cache_options cache;
  uint64_t max_shard_bytes; /* of exported weights */
};

/* `moetune eval`: mean cross-entropy, perplexity and accuracy of a file's targets. */
struct mt_eval_options {
  const char *model, *data;
  struct mt_world *world; /* as in training */
  int ep_size, pp_size;
  double comm_timeout_s;
  bool verify; /* the checkpoint's files are compared with its checksums first */
  int batch_size, max_seq_length;
  struct mt_device_options device;
  bool train_on_prompt, skip_bad_lines;
  const char *chat_template;
  struct mt_cache_options cache;
  bool json;               /* one JSON object on stdout instead of lines */
  const char *ids;         /* "1,2,3": run these instead of a file's samples */
  const char *dump_logits; /* with ids: write "logits" F32 [T,V] to this safetensors file */
};

/* `moetune generate`. */
struct mt_generate_options {
  const char *model;
  struct mt_world *world; /* as in training */
  int ep_size, pp_size;
  double comm_timeout_s;
  const char *prompt;        /* NULL: standard input (chat: a conversation, line by line) */
  bool chat;                 /* wrap in the chat template */
  const char *system;        /* system message of a chat, or NULL */
  const char *chat_template; /* NULL: the checkpoint's */
  int max_new_tokens;
  double temperature; /* 0: greedy */
  double top_p;       /* (0, 1] */
  uint64_t seed;
  struct mt_string_list stop; /* texts that end the answer, not printed */
  struct mt_device_options device;
  bool stream; /* print as tokens come */
};

/* `moetune inspect`. With data, that file as training with `model`'s tokenizer would see it; else
 * the checkpoint. The memory plan is printed when `train` is set; the fields after it are the flags
 * of `moetune train` that decide it, and what is seen of data. */
struct mt_inspect_options {
  const char *path; /* what the command line names, from which cli/ fills in model or data */
  const char *model, *data;
  bool verify;  /* compare the checkpoint's files with its checksums, however large they are */
  bool tensors; /* list every tensor */
  bool norms;   /* read all experts' weights, however many there are */
  int mesh;     /* show what each of so many ranks would hold; 0: not */
  int ep_size, ep_chunks, dispatch_precision, pp_size, zero;
  int samples; /* of data, to show */
  int color;   /* enum mt_color */
  bool train_on_prompt, skip_bad_lines;
  const char *chat_template; /* NULL: the checkpoint's */
  struct mt_cache_options cache;
  bool train;
  int batch_size, max_seq_length;
  struct mt_device_options device;
  int experts, blocks, recompute;
  struct mt_string_list freeze;
  double router_aux_coef;
};

/* `moetune bench`: a training step of a model of these sizes, beside the bare matrix product. */
struct mt_bench_options {
  bool cpu;
  int hidden, ffn, layers, heads, kv_heads, expert_count, top_k, vocab;
  int batch_size, max_seq_length;
  int64_t warmup_steps, train_steps;
  struct mt_device_options device;
  int experts, blocks, recompute;
  uint64_t seed;
  bool ops;  /* a table of the operations too, from steps of their own */
  bool json; /* one JSON object on stdout instead of lines */
};

/* `moetune plan`: what training would take on a mesh, or on every mesh of so many GPUs. */
struct mt_plan_options {
  const char *path; /* a checkpoint's directory, or a config.json under any name */
  int gpus;         /* ranks */
  int ep_size, ep_chunks, dispatch_precision, pp_size, zero, recompute;
  bool fixed_ep, fixed_pp, fixed_zero, fixed_recompute; /* given: a list leaves no choice there */
  int micro_batches;                                    /* of a rank and step */
  int batch_size, max_seq_length;
  uint64_t memory_bytes;  /* of a GPU; 0: one mesh, the one that is given */
  uint64_t reserve_bytes; /* of it, for what is beside the plan */
  struct mt_device_options device;
  int experts, blocks;
  struct mt_string_list freeze;
  double imbalance;    /* rows of the fullest rank over the mean */
  const char *machine; /* "h100", "h200", "b300", or "this": measured */
  double flops, copy_bytes, link_bytes, network_bytes; /* a second; 0: the machine's */
  int host_gpus;                                       /* of a host; 0: the machine's */
  double overlap;      /* share of what travels that is hidden behind computing */
  uint64_t comm_bytes; /* that a communicator takes of its GPU's memory */
  int rows;            /* of a list, to show */
  int sweep;           /* up to so many ranks; 0: none */
  const char *svg;
  bool json;
};

/* `moetune ladder`: every rung on the same work. */
struct mt_ladder_options {
  const char *model;      /* a checkpoint, or */
  const char *random;     /* a config.json, or a directory with one: random weights */
  int layers;             /* of random weights; 0: the config's */
  struct mt_world *world; /* the ranks that climb together; NULL: this process alone */
  int ep_size, pp_size;   /* of them, on rungs above 0 */
  double comm_timeout_s;
  int batch_size; /* samples of a step, for each rank */
  int max_seq_length;
  int64_t warmup_steps, train_steps;
  struct mt_device_options device;
  int recompute;
  uint64_t seed;
  bool ops; /* a table of operations for each rung */
  const char *svg;
  bool json;
};

#endif
