/* What a plan takes a machine to do: rates, and how far each operation stays from them. */
#ifndef MT_TRAIN_MACHINE_H
#define MT_TRAIN_MACHINE_H

#include "quant/recipe.h"
#include "train/options.h"
#include "train/profile.h"

struct mt_machine {
  char name[128];
  /* A large product alone, FLOP/s; what is read and written by a copy, bytes/s. */
  double bf16_flops, fp32_flops, fp8_flops, mxfp8_flops, copy_bytes;
  /* Of one rank, each way: bytes/s to ranks of its host, and to others. */
  double link_bytes, network_bytes;
  double call_s, peer_s; /* a collective call takes so long, and so much more for each peer */
  double launch_s;       /* of an operation */
  int host_ranks;
  double memory_share; /* of a product's shorter time, arithmetic or memory, that adds to the other:
                          0 would be a roofline */
  double share[MT_PROFILE_OPS]; /* of the roofline that an operation reaches */
};

/* A row of the table in machine.c ("h100", "h200", "b300"). Errors: MT_EINVAL naming them. */
mt_err mt_machine_find(const char *name, struct mt_machine *out);

/* The machine at hand: product and copy as `moetune bench` measures them, and every operation in
 * further steps of a model of one layer of c's sizes on at most `tokens` tokens in samples of
 * `length`. It runs as m says, on the device and with the recipe of o. Links are those of the row
 * "h100": one process does not see them. Errors: those of a run; MT_ENOMEM. */
mt_err mt_machine_measure(const struct mt_config *c, const struct mt_device_options *o,
                          const struct mt_model_options *m, int64_t tokens, int length,
                          struct mt_machine *out);

/* Seconds of one call in this recipe. */
double mt_machine_seconds(const struct mt_machine *m, const struct mt_recipe *recipe, int op,
                          struct mt_work work);
/* Of products of activations in this format. */
double mt_machine_flops(const struct mt_machine *m, enum mt_dtype act);

#endif
