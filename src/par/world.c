/* What all ranks of a run settle with each other, whatever the communicators are. */
#include "par/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_BYTES = 1024, LONGEST_LINES = 1 << 20, GRACE_S = 5 };

/* The lowest rank's error, with its text. */
static mt_err share_error(struct mt_world *w, const int32_t *brought, const char *mine) {
  char *texts = calloc((size_t)w->size, TEXT_BYTES);
  if (!texts) return mt_fail(MT_ENOMEM, "messages of %d ranks", w->size);
  memcpy(texts + (size_t)w->rank * TEXT_BYTES, mine, TEXT_BYTES);
  mt_err err = mt_comm_gather_each(&w->all, texts, TEXT_BYTES);
  bool same = true;
  int first = -1;
  for (int i = 0; !err && i < w->size; i++) {
    if (first < 0 && brought[2 * i]) first = i;
    same &= brought[2 * i] == brought[0] && strcmp(texts, texts + (size_t)i * TEXT_BYTES) == 0;
  }
  if (first >= 0) {
    const char *text = texts + (size_t)first * TEXT_BYTES;
    err = (mt_err)brought[2 * first];
    err = same ? mt_fail(err, "%s", text) : mt_fail(err, "rank %d: %s", first, text);
  }
  free(texts);
  return err;
}

mt_err mt_world_meet(struct mt_world *w, mt_err err, int *wish) {
  char mine[TEXT_BYTES] = "";
  if (!w || w->size == 1 || err == MT_ECOMM) return err;
  if (err) strncpy(mine, mt_error_message(), sizeof mine - 1);
  int32_t *brought = calloc((size_t)w->size, 2 * sizeof *brought);
  if (!brought) return mt_fail(MT_ENOMEM, "errors of %d ranks", w->size);
  brought[2 * w->rank] = (int32_t)err;
  brought[2 * w->rank + 1] = wish ? *wish : 0;
  err = mt_comm_gather_each(&w->all, brought, 2 * sizeof *brought);
  bool failed = false;
  for (int i = 0; !err && i < w->size; i++) {
    failed |= brought[2 * i] != 0;
    if (wish && brought[2 * i + 1] > *wish) *wish = brought[2 * i + 1];
  }
  if (failed) err = share_error(w, brought, mine);
  w->settled = failed;
  free(brought);
  return err;
}

/* The first line of which the two texts differ. */
static mt_err compare(const char *what, const char *mine, const char *theirs) {
  while (*mine && *theirs) {
    int n = (int)strcspn(mine, "\n"), k = (int)strcspn(theirs, "\n");
    if (n != k || strncmp(mine, theirs, (size_t)n) != 0) {
      return mt_fail(MT_EINVAL, "another %s than rank 0: '%.*s', there '%.*s'", what,
                     n < 300 ? n : 300, mine, k < 300 ? k : 300, theirs);
    }
    mine += n + (mine[n] == '\n');
    theirs += k + (theirs[k] == '\n');
  }
  if (!*mine && !*theirs) return MT_OK;
  return mt_fail(MT_EINVAL, "another %s than rank 0: '%.300s' is on one of them alone", what,
                 *mine ? mine : theirs);
}

mt_err mt_world_same(struct mt_world *w, const char *what, const char *lines) {
  if (!w || w->size == 1) return MT_OK;
  size_t size = strlen(lines) + 1;
  char *theirs = NULL;
  MT_TRY(mt_comm_broadcast(&w->all, &size, sizeof size, 0));
  if (size > LONGEST_LINES) return mt_fail(MT_EINVAL, "%s: %zu bytes to compare", what, size);
  theirs = calloc(1, size);
  if (!theirs) return mt_fail(MT_ENOMEM, "%s", what);
  if (w->rank == 0) memcpy(theirs, lines, size);
  mt_err err = mt_comm_broadcast(&w->all, theirs, size, 0);
  if (!err) err = mt_world_meet(w, compare(what, lines, theirs), NULL);
  free(theirs);
  return err;
}

mt_err mt_world_end(struct mt_world *w, mt_err err) {
  char why[TEXT_BYTES];
  if (!w || w->size == 1) return err;
  snprintf(why, sizeof why, "%s", mt_error_message());
  double limit = w->all.timeout_s;
  if (err && limit > GRACE_S) w->all.timeout_s = GRACE_S;
  mt_world_doing(w, "at the end");
  mt_world_patience(w,
                    0); /* what others read or write may take longer: who has failed is not in it */
  /* Where all have settled on it already, the others do not come to a meeting either. */
  mt_err met = err && w->settled ? err : mt_world_meet(w, err, NULL);
  w->all.timeout_s = limit;
  if (met == MT_ECOMM) {
    mt_world_abort(w, err ? why : mt_error_message());
    return met;
  }
  if (!met) return MT_OK;
  /* Before anyone ends with a status: a launcher would end the teller with it. */
  if (w->rank == 0) {
    fflush(stdout);
    fprintf(stderr, "moetune: error: %s\n", mt_error_message());
    fflush(stderr);
  }
  (void)mt_comm_barrier(&w->all);
  return mt_fail(met, "%s", "");
}
