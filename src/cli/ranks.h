/* Commands that many ranks run together: started by mpirun or srun, or alone. */
#ifndef MT_CLI_RANKS_H
#define MT_CLI_RANKS_H

#include "cli/options.h"
#include "model/exchange.h"
#include "par/world.h"
#include "train/options.h"

/* Opens the world, refuses ranks that were given other options or are another version, and runs.
 * Where there are several, rank 0 alone logs, and an error has been told and has no message left.
 * timeout_s: of any call between ranks. Errors: MT_EINVAL naming the option that differs; MT_ECOMM,
 * MT_EUNSUPPORTED; those of run. */
mt_err mt_run_on_ranks(const struct mt_command *command, const void *options, double timeout_s,
                       mt_err (*run)(const void *options, struct mt_world *world));

/* Options that could not be read (err, its message set): where there are several ranks, tells it
 * once, whichever of them have it, and no message is left. */
void mt_refuse_on_ranks(const struct mt_command *command, mt_err err);

#define MT_ROW_ZERO(S)                                                                             \
  {                                                                                                \
    .flag = "zero", .type = MT_OPT_INT, .offset = offsetof(S, zero), .unit = "LEVEL",              \
    .initial = "0", .min = 0, .max = 2,                                                            \
    .help = "What ranks that share a parameter cut among them instead of each keeping all of it: " \
            "1: the optimizer's state (the results are the same), 2: gradients too, which then "   \
            "travel once a micro-batch.",                                                          \
  }
#define MT_ROW_EP_CHUNKS(S)                                                                        \
  {                                                                                                \
    .flag = "ep-chunks", .type = MT_OPT_INT, .offset = offsetof(S, ep_chunks), .unit = "COUNT",    \
    .initial = "1", .min = 1, .max = MT_MAX_CHUNKS,                                                \
    .help = "With --ep-size, chunks that the tokens of a micro-batch travel in: while experts "    \
            "work on one, the next is on its way to them and the outputs of the one before on "    \
            "theirs back.",                                                                        \
  }
#define MT_ROW_DISPATCH_PRECISION(S)                                                               \
  {                                                                                                \
    .flag = "dispatch-precision", .type = MT_OPT_CHOICE,                                           \
    .offset = offsetof(S, dispatch_precision), .unit = "WHAT", .choices = "act|8bit|both",         \
    .initial = "act",                                                                              \
    .help = "With --ep-size and an 8-bit --precision, what travels to experts on other ranks. "    \
            "act: bf16; 8bit: tokens as the experts multiply them, in half the bytes; both: "      \
            "in backward the gradients of their outputs too.",                                     \
  }
#define MT_ROWS_RANKS(S, member)                                                                   \
  {.flag = "ep-size",                                                                              \
   .type = MT_OPT_INT,                                                                             \
   .offset = offsetof(S, member ep_size),                                                          \
   .unit = "RANKS",                                                                                \
   .initial = "1",                                                                                 \
   .min = 1,                                                                                       \
   .max = 65536,                                                                                   \
   .help = "Ranks over which the experts of a layer are spread: a divisor of their number and of " \
           "the ranks that mpirun or srun started. Every rank reads data of its own."},            \
      {.flag = "pp-size",                                                                          \
       .type = MT_OPT_INT,                                                                         \
       .offset = offsetof(S, member pp_size),                                                      \
       .unit = "STAGES",                                                                           \
       .initial = "1",                                                                             \
       .min = 1,                                                                                   \
       .max = 65536,                                                                               \
       .help = "Stages that the layers are cut into, each on ranks of its own."},                  \
  {                                                                                                \
    .flag = "comm-timeout", .type = MT_OPT_REAL, .offset = offsetof(S, member comm_timeout_s),     \
    .unit = "SECONDS", .initial = "120", .min = 1, .max = 1e6,                                     \
    .help = "How long a rank waits for another one before all of them end with a message.",        \
  }

#endif
