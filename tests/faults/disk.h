/* A disk that forgets: what a trace's calls made, what of it was synced, and the trees that may be
 * found after a loss of power.
 *
 * A file's bytes are safe once the file is synced; until then any of them may be found: those of
 * the last sync, a beginning of the new ones (not shorter than what was synced before, if they were
 * appended to it), the new length with zeros in it, or all. Names are
 * safe once their directory is synced; until then the directory is found as after the first k of
 * its changes since, k from 0 to all, each directory with a k of its own. Syncing a file makes no
 * name safe, syncing a directory neither the bytes nor the names below. A rename or an exchange is
 * one change. */
#ifndef MT_TESTS_FAULTS_DISK_H
#define MT_TESTS_FAULTS_DISK_H

#include <fcntl.h>

#include "base/hash.h"
#include "base/rng.h"
#include "run.h"
#include "trace.h"

enum { DISK_NODES = 8192, DISK_FDS = 4096, DISK_NAMES = 512, DISK_DEEP = 16 };

struct bytes {
  char *data;
  size_t size;
};

struct name {
  char text[128];
  int node; /* < 0: the name goes */
};

/* One or two names that change in one step. */
struct change {
  struct name name[2];
  int count;
};

struct node {
  bool dir;
  struct bytes now, safe; /* of a file */
  struct name *names;     /* of a directory: the safe ones */
  int name_count;
  struct change *changes; /* since it was synced */
  int change_count;
};

struct disk {
  struct node *node;
  int count;
  int fd[DISK_FDS]; /* nodes; -1: nothing of ours */
};

enum power_loss {
  LOSS_ALL,   /* of all that was not synced */
  LOSS_BYTES, /* names are found as they were, bytes are not */
  LOSS_NAMES, /* the other way round */
  LOSS_SOME   /* at random */
};

static inline int disk_node(struct disk *d, bool dir) {
  if (d->count == DISK_NODES) fail_msg("more than %d files", DISK_NODES);
  d->node[d->count] = (struct node){.dir = dir};
  return d->count++;
}

static inline void disk_open(struct disk *d) {
  d->node = calloc(DISK_NODES, sizeof *d->node);
  assert_non_null(d->node);
  d->count = 0;
  for (int i = 0; i < DISK_FDS; i++) d->fd[i] = -1;
  disk_node(d, true); /* home */
}

static inline void disk_close(struct disk *d) {
  for (int i = 0; i < d->count; i++) {
    struct node *n = &d->node[i];
    if (n->safe.data != n->now.data) free(n->safe.data);
    free(n->now.data);
    free(n->names);
    free(n->changes);
  }
  free(d->node);
}

/* The directory's names after k of its changes; how many. */
static inline int names_after(const struct node *dir, int k, struct name *out) {
  int count = dir->name_count;
  if (count) memcpy(out, dir->names, (size_t)count * sizeof *out);
  for (int c = 0; c < k; c++) {
    for (int i = 0; i < dir->changes[c].count; i++) {
      const struct name *x = &dir->changes[c].name[i];
      int at = 0;
      while (at < count && strcmp(out[at].text, x->text) != 0) at++;
      if (x->node < 0) {
        if (at < count) out[at] = out[--count];
        continue;
      }
      if (at == count) assert_true(++count < DISK_NAMES);
      out[at] = *x;
    }
  }
  return count;
}

static inline void dir_change(struct node *dir, struct change change) {
  dir->changes = realloc(dir->changes, (size_t)(dir->change_count + 1) * sizeof *dir->changes);
  assert_non_null(dir->changes);
  dir->changes[dir->change_count++] = change;
}

static inline void dir_sync(struct node *dir) {
  struct name *names = calloc(DISK_NAMES, sizeof *names);
  assert_non_null(names);
  dir->name_count = names_after(dir, dir->change_count, names);
  free(dir->names);
  dir->names = names;
  dir->change_count = 0;
}

static inline void file_sync(struct node *file) {
  if (file->safe.data != file->now.data) free(file->safe.data);
  file->safe = file->now;
}

static inline int dir_find(const struct node *dir, const char *text) {
  struct name names[DISK_NAMES];
  int count = dir->dir ? names_after(dir, dir->change_count, names) : 0;
  for (int i = 0; i < count; i++) {
    if (strcmp(names[i].text, text) == 0) return names[i].node;
  }
  return -1;
}

/* Where a path lies: its directory's node and its last name; -1: not below home, or nowhere. */
static inline int disk_parent(const struct disk *d, const char *path, char last[128]) {
  size_t skip = strlen(home);
  int at = 0;
  if (strncmp(path, home, skip) != 0 || path[skip] != '/') return -1;
  for (const char *p = path + skip + 1;; p++) {
    size_t n = strcspn(p, "/");
    assert_true(n < 128);
    snprintf(last, 128, "%.*s", (int)n, p);
    p += n;
    if (!*p) return at;
    at = dir_find(&d->node[at], last);
    if (at < 0) return -1;
  }
}

static inline int disk_find(const struct disk *d, const char *path) {
  char last[128];
  if (strcmp(path, home) == 0) return 0;
  int dir = disk_parent(d, path, last);
  return dir < 0 ? -1 : dir_find(&d->node[dir], last);
}

static inline void disk_name(struct disk *d, const char *path, int node) {
  struct change c = {.count = 1, .name[0].node = node};
  int dir = disk_parent(d, path, c.name[0].text);
  if (dir < 0) fail_msg("no directory for %s", path);
  dir_change(&d->node[dir], c);
}

/* Takes what lies there as safe. */
static inline void disk_import(struct disk *d, const char *path) {
  struct stat st;
  if (lstat(path, &st) != 0) return;
  int n = disk_node(d, S_ISDIR(st.st_mode));
  disk_name(d, path, n);
  if (!d->node[n].dir) {
    d->node[n].now.data = slurp(path, &d->node[n].now.size);
    file_sync(&d->node[n]);
    return;
  }
  DIR *list = opendir(path);
  assert_non_null(list);
  for (struct dirent *e; (e = readdir(list));) {
    char child[MT_PATH_MAX];
    if (e->d_name[0] == '.') continue;
    OK(mt_path_join(child, path, e->d_name));
    disk_import(d, child);
  }
  closedir(list);
  dir_sync(&d->node[n]);
}

static inline void disk_opened(struct disk *d, const struct trace_record *r, const char *path) {
  assert_true(r->fd >= 0 && r->fd < DISK_FDS);
  int n = -1;
  if ((r->flags & __O_TMPFILE) == __O_TMPFILE) {
    n = disk_node(d, false);
  } else {
    n = disk_find(d, path);
    if (n < 0 && (r->flags & O_CREAT)) disk_name(d, path, n = disk_node(d, false));
    if (n >= 0 && (r->flags & O_TRUNC)) {
      struct node *f = &d->node[n];
      if (f->now.data != f->safe.data) free(f->now.data);
      f->now = (struct bytes){0};
    }
  }
  d->fd[r->fd] = n;
}

static inline void disk_moved(struct disk *d, const char *a, const char *b, bool exchange) {
  struct change c = {.count = 2};
  int dir = disk_parent(d, a, c.name[0].text), other = disk_parent(d, b, c.name[1].text);
  if (dir < 0 || dir != other) fail_msg("renamed across directories: %s to %s", a, b);
  c.name[0].node = exchange ? disk_find(d, b) : -1;
  c.name[1].node = disk_find(d, a);
  if (c.name[1].node < 0 || (exchange && c.name[0].node < 0)) fail_msg("%s or %s is unknown", a, b);
  dir_change(&d->node[dir], c);
}

/* What the call did. data is taken over where it is kept: *data becomes NULL. */
static inline void disk_apply(struct disk *d, const struct trace_record *r, const char *a,
                              const char *b, char **data) {
  struct node *n =
      r->fd >= 0 && r->fd < DISK_FDS && d->fd[r->fd] >= 0 ? &d->node[d->fd[r->fd]] : NULL;
  int fd;
  switch ((enum trace_kind)r->kind) {
  case TRACE_OPEN:
    disk_opened(d, r, a);
    break;
  case TRACE_CONTENT:
    if (!n) break;
    if (n->now.data != n->safe.data) free(n->now.data);
    n->now = (struct bytes){*data, r->data_length};
    *data = NULL;
    break;
  case TRACE_SYNC:
    if (n && n->dir) dir_sync(n);
    if (n && !n->dir) file_sync(n);
    break;
  case TRACE_CLOSE:
    d->fd[r->fd] = -1;
    break;
  case TRACE_RENAME:
    disk_moved(d, a, b, false);
    break;
  case TRACE_EXCHANGE:
    disk_moved(d, a, b, true);
    break;
  case TRACE_LINK:
    if (sscanf(a, "/proc/self/fd/%d", &fd) != 1) fail_msg("linked: %s", a);
    disk_name(d, b, d->fd[fd]);
    break;
  case TRACE_UNLINK:
    disk_name(d, a, -1);
    break;
  case TRACE_MKDIR:
    disk_name(d, a, disk_node(d, true));
    break;
  }
}

/* ---- what is found ---- */

/* A tree as text: paths, sizes, bytes; to tell whether it has been seen, and to write it. */
struct found {
  char *text;
  size_t size, capacity;
};

static inline void found_add(struct found *f, const void *data, size_t size) {
  if (f->size + size > f->capacity) {
    f->capacity = 2 * (f->size + size);
    f->text = realloc(f->text, f->capacity);
    assert_non_null(f->text);
  }
  if (size) memcpy(f->text + f->size, data, size);
  f->size += size;
}

static inline struct bytes file_found(const struct node *f, enum power_loss loss,
                                      struct mt_rng *rng, char **made) {
  if (f->now.data == f->safe.data && f->now.size == f->safe.size) return f->now;
  uint32_t how = loss == LOSS_SOME ? mt_rng_below(rng, 4) : loss == LOSS_NAMES ? 0 : 1;
  if (how == 0) return f->now;
  if (how == 1) return f->safe;
  /* A beginning; with zeros behind it, or without. What was appended to is there at least. */
  size_t least = f->safe.size, more = f->now.size;
  if (least > more || (least > 0 && memcmp(f->safe.data, f->now.data, least) != 0)) least = 0;
  size_t keep = least + (more > least ? mt_rng_below(rng, (uint32_t)(more - least)) : 0);
  *made = calloc(1, f->now.size + 1);
  assert_non_null(*made);
  if (keep) memcpy(*made, f->now.data, keep);
  return (struct bytes){*made, how == 2 ? keep : f->now.size};
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const struct name *)a)->text, ((const struct name *)b)->text);
}

/* Appends the directory's tree. */
static inline void disk_find_tree(const struct disk *d, int dir, const char *path,
                                  enum power_loss loss, struct mt_rng *rng, struct found *out) {
  const struct node *n = &d->node[dir];
  struct name names[DISK_NAMES];
  int k = n->change_count;
  if (loss == LOSS_ALL || loss == LOSS_NAMES) k = 0;
  if (loss == LOSS_SOME) k = (int)mt_rng_below(rng, (uint32_t)k + 1);
  int count = names_after(n, k, names);
  qsort(names, (size_t)count, sizeof *names, by_name);
  for (int i = 0; i < count; i++) {
    const struct node *x = &d->node[names[i].node];
    char child[MT_PATH_MAX], head[MT_PATH_MAX + 64], *made = NULL;
    struct bytes b = {0};
    OK(mt_path_join(child, path, names[i].text));
    if (!x->dir) b = file_found(x, loss, rng, &made);
    int length = snprintf(head, sizeof head, "%c %zu %s\n", x->dir ? 'd' : 'f', b.size, child);
    found_add(out, head, (size_t)length);
    found_add(out, b.data, b.size);
    free(made);
    if (x->dir) disk_find_tree(d, names[i].node, child, loss, rng, out);
  }
}

/* Makes the tree in place of home's run and cache. */
static inline void found_write(const struct found *f) {
  set_run("");
  for (size_t at = 0; at < f->size;) {
    char kind, path[MT_PATH_MAX];
    size_t size;
    int used;
    const char *line = f->text + at;
    size_t length = strcspn(line, "\n");
    char head[MT_PATH_MAX + 64];
    snprintf(head, sizeof head, "%.*s", (int)length, line);
    if (sscanf(head, "%c %zu %n", &kind, &size, &used) != 2) fail_msg("%s", head);
    snprintf(path, sizeof path, "%s", head + used);
    at += length + 1;
    if (kind == 'd') {
      if (mkdir(path, 0777) != 0) fail_msg("cannot make %s", path);
      continue;
    }
    FILE *to = fopen(path, "we");
    if (!to || fwrite(f->text + at, 1, size, to) != size || fclose(to) != 0)
      fail_msg("cannot write %s", path);
    at += size;
  }
}

#endif
