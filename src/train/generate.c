/* `moetune generate`: answers on standard output. */
#include <stdio.h>
#include <stdlib.h>

#include "train/commands.h"
#include "train/generation.h"

static bool print(void *context, const char *bytes, size_t size_bytes) {
  const struct mt_generate_options *o = context;
  fwrite(bytes, 1, size_bytes, stdout);
  if (o->stream) fflush(stdout);
  return true;
}

static mt_err ask(struct mt_generation *g, const char *text, bool first) {
  MT_TRY(mt_generation_ask(g, text, first));
  if (mt_session_speaks(g->s)) putchar('\n');
  return MT_OK;
}

/* The next line of standard input, which rank 0 alone reads, without its end; length -1: there is
 * none. */
static mt_err next_line(struct mt_generation *g, char **line, size_t *capacity, int64_t *length) {
  struct mt_world *w = g->s->world;
  mt_err err = MT_OK;
  if (mt_session_speaks(g->s)) {
    if (g->o->chat) fputs("> ", stderr);
    *length = getline(line, capacity, stdin);
    if (*length < 0 && !feof(stdin)) err = mt_fail(MT_EIO, "cannot read standard input");
    if (*length > 0 && (*line)[*length - 1] == '\n') (*line)[--*length] = '\0';
  }
  if (!w || err) return err;
  mt_world_patience(w, 1e9); /* a person types */
  MT_TRY(mt_comm_broadcast(&w->all, length, sizeof *length, 0));
  mt_world_patience(w, 0);
  if (*length < 0) return MT_OK;
  if (w->rank != 0) {
    char *room = realloc(*line, (size_t)*length + 1);
    if (!room) return mt_fail(MT_ENOMEM, "a line of %lld bytes", (long long)*length);
    *line = room;
  }
  return mt_comm_broadcast(&w->all, *line, (size_t)*length + 1, 0);
}

static mt_err converse(struct mt_generation *g) {
  char *line = NULL;
  size_t capacity = 0;
  mt_err err = MT_OK;
  bool first = true;
  for (int64_t n; !err; first = false) {
    MT_GO(next_line(g, &line, &capacity, &n));
    if (n < 0) break;
    if (*line) err = ask(g, line, first);
    if (!g->o->chat) g->cache.length = 0; /* each line is a prompt of its own */
  }
done:
  free(line);
  return err;
}

mt_err mt_generate_run(const struct mt_generate_options *o) {
  struct mt_session s = {0};
  struct mt_generation g = {0};
  struct mt_model_options m = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .token_capacity = MT_PREFILL_TOKENS,
                               .sequence_capacity = 1};
  mt_err err;
  err = mt_session_open(&s, o->model, &o->device, o->chat_template, o->world);
  MT_GO(mt_world_meet(o->world, err, NULL));
  MT_GO(mt_session_join(&s, o->world, o->ep_size, o->pp_size));
  MT_GO(mt_session_load(&s, &m, NULL));
  MT_GO(mt_world_meet(s.world, mt_generation_open(&g, &s, o), NULL));
  g.show = print;
  g.context = (void *)(uintptr_t)o;
  err = o->prompt ? ask(&g, o->prompt, true) : converse(&g);
done:
  mt_generation_close(&g);
  s.members.well = !err;
  mt_session_close(&s);
  return err;
}
