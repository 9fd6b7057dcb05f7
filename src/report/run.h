/* What a run directory says, read line by line into bounded memory, and further as it grows. */
#ifndef MT_REPORT_RUN_H
#define MT_REPORT_RUN_H

#include <jansson.h>
#include <stdbool.h>

#include "base/files.h"
#include "report/series.h"

/* Numbers of a step and of an evaluation: X(field, key in metrics.jsonl). */
#define MT_STEP_NUMBERS(X)                                                                         \
  X(loss, "loss")                                                                                  \
  X(cross_entropy, "cross_entropy")                                                                \
  X(aux, "aux")                                                                                    \
  X(z_loss, "z_loss")                                                                              \
  X(grad_norm, "grad_norm")                                                                        \
  X(lr, "lr")                                                                                      \
  X(accuracy, "accuracy")                                                                          \
  X(tokens_per_s, "tokens_per_s")                                                                  \
  X(step_ms, "step_ms")
#define MT_EVAL_NUMBERS(X)                                                                         \
  X(eval_loss, "eval_loss")                                                                        \
  X(eval_perplexity, "eval_perplexity")                                                            \
  X(eval_accuracy, "eval_accuracy")

enum { MT_RUN_PHASES = 16, MT_RUN_MEMORY = 12, MT_RUN_WARNINGS = 64, MT_RUN_SAMPLES = 256 };

/* A file of JSON lines that may grow. */
struct mt_tail {
  char path[MT_PATH_MAX];
  int64_t offset, line; /* read so far */
  uint64_t inode;
};

struct mt_run_point {
  int64_t step;
  double loss, perplexity, accuracy;
};

struct mt_run_sample {
  int64_t step;
  int index;
  json_t *object; /* prompt, answer, expected */
};

struct mt_run {
  const char *dir;  /* as given; borrowed */
  char name[256];   /* the directory's own name */
  json_t *facts;    /* run.json; NULL: none */
  int64_t facts_id; /* of the file that was read */
  struct mt_tail metrics, samples_file;
#define X(field, key) struct mt_series field;
  MT_STEP_NUMBERS(X)
  MT_EVAL_NUMBERS(X)
#undef X
  struct mt_series process_peak;         /* bytes */
  struct mt_series phase[MT_RUN_PHASES]; /* ms */
  char phase_name[MT_RUN_PHASES][48];
  int phase_count;
  struct { /* as the last step has it */
    char name[48];
    double bytes;
  } memory[MT_RUN_MEMORY];
  int memory_count;
  /* Experts; layers 0: nothing is known of them. */
  int layers, experts;
  struct mt_series *load_entropy;                  /* [layers] in units of ln(experts) */
  struct mt_series *router_entropy;                /* [layers] likewise, at evaluations */
  struct mt_series load_evenness, router_evenness; /* means of these over the layers */
  struct mt_series idle, largest; /* share of experts without a token; the largest share */
  struct mt_frames frames;
  int32_t *load;                 /* scratch [layers,experts] */
  int64_t step_count, last_step; /* steps read; the last one's number */
  double token_sum, ms_sum;
  double last_time; /* seconds since 1970; 0: unknown */
  struct mt_run_point first_eval, last_eval, best_eval;
  int64_t eval_count;
  struct {
    int64_t step;
    char *text;
  } warning[MT_RUN_WARNINGS];
  int warning_count; /* kept; the first ones */
  int64_t warning_total;
  struct mt_run_sample sample[MT_RUN_SAMPLES];
  int sample_count;
};

/* Errors: MT_ENOENT naming dir when it holds neither metrics.jsonl nor run.json. */
mt_err mt_run_open(struct mt_run *r, const char *dir);
/* Reads what has come since; a file that was replaced is read anew. *changed (=) whether anything
 * was. Errors: MT_EFORMAT naming FILE:LINE; MT_EIO. */
mt_err mt_run_read(struct mt_run *r, bool *changed);
void mt_run_close(struct mt_run *r);

/* result.status of run.json; NULL when it says nothing. */
const char *mt_run_status(const struct mt_run *r);
/* Whether run.json says that the run has ended. */
bool mt_run_ended(const struct mt_run *r);
/* A value of run.json by section and key; NULL: absent. */
const json_t *mt_run_fact(const struct mt_run *r, const char *section, const char *key);
double mt_run_number(const struct mt_run *r, const char *section, const char *key, double none);

#endif
