/* What a person watching a run sees: on a terminal one line that updates itself, else plain lines.
 */
#ifndef MT_TRAIN_PROGRESS_H
#define MT_TRAIN_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct mt_progress {
  int64_t total, log_every;
  bool terminal;
  int width; /* columns */
  double begin_s;
  int64_t begin_step;
  bool open; /* an unfinished line stands on the terminal */
};

struct mt_progress_step {
  int64_t step;
  double loss, grad_norm, lr, tokens_per_s;
  double elapsed_s; /* since begin */
};

/* fd is asked whether it is a terminal, and how wide. first_step: steps done before (resume). */
void mt_progress_begin(struct mt_progress *p, int fd, int64_t first_step, int64_t total,
                       int64_t log_every);
/* Shows a finished step on standard error. */
void mt_progress_show(struct mt_progress *p, const struct mt_progress_step *s);
/* Ends the updating line, so that something else can be printed. */
void mt_progress_break(struct mt_progress *p);

/* The line itself, without line end, at most `width` columns; for tests. */
void mt_progress_line(char *out, size_t size, const struct mt_progress *p,
                      const struct mt_progress_step *s);

#endif
