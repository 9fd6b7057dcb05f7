/* Loss of power: a run's file calls are written down, and after each of them the directory is made
 * as it might be found had the power failed there (disk.h says what is lost). Every checkpoint that
 * is found must be whole, the newest that the run had announced must be among them, and the run
 * that goes on from there must end as the one that never was disturbed.
 *   test_faults_power [EVERY [SEED]]   after each EVERY-th call; 1: all */
#include "disk.h"
#include "io/checksums.h"

enum { SEEN_MAX = 1 << 16, SOME_TIMES = 2 };

static struct mt_hash seen[SEEN_MAX];
static int seen_count;

/* The same directory is another case where more was announced. */
static bool seen_before(struct found *f, long told) {
  found_add(f, &told, sizeof told);
  struct mt_hash h = mt_hash_bytes(f->text, f->size);
  f->size -= sizeof told;
  for (int i = 0; i < seen_count; i++) {
    if (mt_hash_equal(seen[i], h)) return true;
  }
  assert_true(seen_count < SEEN_MAX);
  seen[seen_count++] = h;
  return false;
}

/* The newest checkpoint that these bytes of standard error announce; `before` where they do not. */
static long announced(const char *err, int64_t told, long before) {
  for (const char *p = err; (p = strstr(p, "saved    ")) && p - err < told;) {
    const char *end = strchr(p, '\n'), *name = strstr(p, "/checkpoint-");
    if (!end || end - err >= told) break; /* not wholly said yet */
    if (name && name < end) before = strtol(name + 12, NULL, 10);
    p = end;
  }
  return before;
}

static void check_found(const char *what, long told) {
  static const char *const others[] = {"best", "model"};
  char run[MT_PATH_MAX], path[MT_PATH_MAX];
  long most = newest();
  snprintf(run, sizeof run, "%s/run", home);
  if (most < told)
    BAD("%s: checkpoint-%ld was announced, the newest found is %ld", what, told, most);
  DIR *d = opendir(run);
  for (struct dirent *e; d && (e = readdir(d));) {
    long n;
    char end;
    bool whole = sscanf(e->d_name, "checkpoint-%ld%c", &n, &end) == 1;
    for (int i = 0; i < 2; i++) whole |= strcmp(e->d_name, others[i]) == 0;
    if (!whole || mt_path_join(path, run, e->d_name)) continue;
    if (mt_checksums_demand(path)) BAD("%s: %s", what, mt_error_message());
  }
  if (d) closedir(d);
}

struct trace {
  char *text, *err;
  size_t size, err_size;
};

static const char *const losses[] = {"all that was not synced", "bytes", "names", "some"};

static int check_moment(const struct disk *d, const char *name, int call, long told,
                        struct mt_rng *rng) {
  int states = 0;
  for (int i = 0; i < LOSS_SOME + SOME_TIMES && failures < 10; i++) {
    enum power_loss loss = i < LOSS_SOME ? (enum power_loss)i : LOSS_SOME;
    struct found f = {0};
    char what[256];
    disk_find_tree(d, 0, home, loss, rng, &f);
    if (!seen_before(&f, told)) {
      snprintf(what, sizeof what, "%s, power lost after call %d, %s", name, call, losses[loss]);
      found_write(&f);
      check_found(what, told);
      recover(what);
      states++;
    }
    free(f.text);
  }
  return states;
}

/* Walks through a trace on a disk that holds what lay there before. */
static void replay(struct disk *d, const char *name, const struct trace *t, long told, int every,
                   struct mt_rng *rng) {
  int calls = 0, states = 0;
  size_t at = 0;
  while (at < t->size && failures < 10) {
    struct trace_record r;
    char a[MT_PATH_MAX], b[MT_PATH_MAX];
    memcpy(&r, t->text + at, sizeof r);
    at += sizeof r;
    snprintf(a, sizeof a, "%.*s", (int)r.a_length, t->text + at);
    snprintf(b, sizeof b, "%.*s", (int)r.b_length, t->text + at + r.a_length);
    at += r.a_length + r.b_length;
    char *data = malloc(r.data_length + 1);
    assert_non_null(data);
    memcpy(data, t->text + at, r.data_length);
    at += r.data_length;
    disk_apply(d, &r, a, b, &data);
    free(data);
    if (r.kind == TRACE_OPEN && !(r.flags & (O_CREAT | O_TRUNC))) continue; /* nothing changed */
    bool last = at == t->size;
    if (++calls % every == 0 || last)
      states += check_moment(d, name, calls, announced(t->err, r.told, told), rng);
  }
  printf("%s: %d calls, %d directories found after every %d, %d failures\n", name, calls, states,
         every, failures);
  if (states < 10) BAD("%s: only %d directories", name, states);
}

/* One run with its calls written down. from: what lies there before, "" for nothing. */
static void lose_power(const char *name, const char *from, int every, uint64_t seed) {
  struct faults_run r = {.resume = *from != '\0'};
  struct mt_rng rng = mt_rng_make(seed, *from != '\0');
  struct disk d;
  struct trace t;
  char preload[MT_PATH_MAX + 16], to[MT_PATH_MAX + 32];
  snprintf(preload, sizeof preload, "LD_PRELOAD=%s", MT_FAULTS_PATH);
  snprintf(to, sizeof to, "FAULTS_TRACE=%s/trace", home);
  set_run(from);
  disk_open(&d);
  disk_import(&d, at_home("run"));
  dir_sync(&d.node[0]);
  long told = newest();
  r.env[0] = preload;
  r.env[1] = to;
  start(&r);
  if (r.status != 0) fail_msg("%s: %d: %s", name, r.status, r.err);
  t.text = slurp(at_home("trace"), &t.size);
  char err_path[MT_PATH_MAX + 8];
  snprintf(err_path, sizeof err_path, "%s.err", home);
  t.err = slurp(err_path, &t.err_size);
  assert_true(t.text && t.err && t.size > sizeof(struct trace_record));
  if (unlink(at_home("trace")) != 0) fail_msg("no trace");
  replay(&d, name, &t, told, every, &rng);
  free(t.text);
  free(t.err);
  disk_close(&d);
}

int main(int argc, char **argv) {
  int every = argc > 1 ? atoi(argv[1]) : SANITIZED ? 61 : 7;
  uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  if (every < 1) every = 1;
  set_up();
  lose_power("fresh run", "", every, seed);
  lose_power("resumed run", "first", every, seed);
  printf("%d different directories, %d failures\n", seen_count, failures);
  if (failures == 0) tear_down();
  return failures != 0;
}
