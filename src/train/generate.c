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
  putchar('\n');
  return MT_OK;
}

static mt_err converse(struct mt_generation *g) {
  char *line = NULL;
  size_t capacity = 0;
  mt_err err = MT_OK;
  bool first = true;
  for (ssize_t n; !err; first = false) {
    if (g->o->chat) fputs("> ", stderr);
    n = getline(&line, &capacity, stdin);
    if (n < 0) {
      if (!feof(stdin)) err = mt_fail(MT_EIO, "cannot read standard input");
      break;
    }
    if (n > 0 && line[n - 1] == '\n') line[n - 1] = '\0';
    if (*line) err = ask(g, line, first);
    if (!g->o->chat) g->cache.length = 0; /* each line is a prompt of its own */
  }
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
  MT_GO(mt_session_open(&s, o->model, &o->device, o->chat_template));
  MT_GO(mt_session_load(&s, &m, NULL));
  MT_GO(mt_generation_open(&g, &s, o));
  g.show = print;
  g.context = (void *)(uintptr_t)o;
  err = o->prompt ? ask(&g, o->prompt, true) : converse(&g);
done:
  mt_generation_close(&g);
  mt_session_close(&s);
  return err;
}
