#include "train/progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "train/session.h"

void mt_progress_begin(struct mt_progress *p, int fd, int64_t first_step, int64_t total,
                       int64_t log_every) {
  struct winsize w;
  *p = (struct mt_progress){.total = total,
                            .log_every = log_every > 0 ? log_every : 1,
                            .terminal = isatty(fd) == 1,
                            .width = 80,
                            .begin_s = mt_now_s(),
                            .begin_step = first_step};
  if (p->terminal && ioctl(fd, TIOCGWINSZ, &w) == 0 && w.ws_col > 20) p->width = w.ws_col;
}

static void duration(char out[32], double s) {
  long t = s < 0 || s > 1e8 ? 0 : (long)(s + 0.5);
  if (t >= 3600)
    snprintf(out, 32, "%ld:%02ld:%02ld", t / 3600, t / 60 % 60, t % 60);
  else
    snprintf(out, 32, "%ld:%02ld", t / 60, t % 60);
}

void mt_progress_line(char *out, size_t size, const struct mt_progress *p,
                      const struct mt_progress_step *s) {
  char eta[32], text[256];
  double done = (double)(s->step - p->begin_step);
  duration(eta, done > 0 ? s->elapsed_s / done * (double)(p->total - s->step) : 0);
  snprintf(
      text, sizeof text, "step %lld/%lld  loss %.4f  grad %.2f  lr %.2e  %.0f tokens/s  %s left",
      (long long)s->step, (long long)p->total, s->loss, s->grad_norm, s->lr, s->tokens_per_s, eta);
  if (!p->terminal) {
    snprintf(out, size, "%s", text);
    return;
  }
  int room = p->width - (int)strlen(text) - 4, bar = room > 30 ? 30 : room;
  if (bar < 5) {
    snprintf(out, size, "%.*s", p->width - 1, text);
    return;
  }
  char cells[31] = {0};
  int full = p->total > 0 ? (int)((int64_t)bar * s->step / p->total) : bar;
  for (int i = 0; i < bar; i++) cells[i] = i < full ? '#' : '.';
  snprintf(out, size, "[%s] %s", cells, text);
}

void mt_progress_show(struct mt_progress *p, const struct mt_progress_step *s) {
  char line[512];
  bool due = s->step % p->log_every == 0 || s->step == p->total || s->step == p->begin_step + 1;
  if (!p->terminal && !due) return;
  mt_progress_line(line, sizeof line, p, s);
  if (p->terminal)
    fprintf(stderr, "\r\033[K%s", line);
  else
    fprintf(stderr, "%s\n", line);
  fflush(stderr);
  p->open = p->terminal;
}

void mt_progress_break(struct mt_progress *p) {
  if (p->open) fputc('\n', stderr);
  p->open = false;
}
