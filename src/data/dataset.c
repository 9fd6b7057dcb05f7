#include "data/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "data/tokenise.h"

enum { SMALL_FILE = 16 << 20 };
/* Mapped pages are let go after samples that may have touched this much: the kernel maps far more
 * around a page than was asked for. Records lie together, a sample's share of them is small. */
enum { RESIDENT_LIMIT = 256 << 20, FAULT_BYTES = 1 << 20, RECORD_BYTES = 4 << 10 };

struct mt_dataset {
  struct mt_dataset_options options;
  const struct mt_tokenizer *tokenizer;
  char *path, *cache_dir;
  char cache_path[MT_PATH_MAX]; /* "": none */
  struct mt_tokens tokens;
  bool cached;
  double seconds;
  _Atomic int64_t file_bytes; /* -1: not known */
  _Atomic int64_t done_bytes;
  _Atomic int64_t *touched_bytes;
  atomic_bool stop;
  pthread_t thread;
  bool running;
  pthread_mutex_t lock;
  pthread_cond_t finished_now;
  bool finished;
  mt_err err;
  char why[1024];
};

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int thread_count(const struct mt_dataset *d) {
  cpu_set_t set;
  if (d->options.threads > 0) return d->options.threads;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void mt_dataset_cache_dir(char *out, size_t size_bytes) {
  const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  int n = -1;
  if (base && *base == '/') /* others are to be ignored, says the specification */
    n = snprintf(out, size_bytes, "%s/moetune", base);
  else if (home && *home)
    n = snprintf(out, size_bytes, "%s/.cache/moetune", home);
  if (n < 0 || (size_t)n >= size_bytes) *out = '\0';
}

/* All that decides the tokens. */
static struct mt_hash cache_key(const struct mt_dataset *d, struct mt_hash content) {
  char text[512], part[3][MT_HASH_TEXT];
  mt_hash_text(content, part[0]);
  mt_hash_text(mt_tokenizer_hash(d->tokenizer), part[1]);
  mt_hash_text(mt_template_hash(d->options.chat), part[2]);
  int n = snprintf(text, sizeof text, "%d data %s tokenizer %s template %s most %d eos %d %d %d",
                   MT_TOKENS_VERSION, part[0], part[1], part[2], d->options.max_seq_length,
                   (int)d->options.eos_id, d->options.train_on_prompt, d->options.skip_bad_lines);
  return mt_hash_bytes(text, (size_t)n);
}

/* DIR/NAME-KEY.tokens; the data's name is for people, without what could trouble a shell. */
static mt_err cache_path(struct mt_dataset *d, struct mt_hash key) {
  char name[48 + MT_HASH_TEXT + 16], hex[MT_HASH_TEXT];
  const char *slash = strrchr(d->path, '/'), *base = slash ? slash + 1 : d->path;
  size_t n = 0;
  for (; base[n] && n < 48; n++) {
    bool plain = (base[n] >= 'a' && base[n] <= 'z') || (base[n] >= 'A' && base[n] <= 'Z') ||
                 (base[n] >= '0' && base[n] <= '9') || (base[n] == '.' && n > 0) || base[n] == '-';
    name[n] = plain && !(base[n] == '-' && n == 0) ? base[n] : '_';
  }
  mt_hash_text(key, hex);
  snprintf(name + n, sizeof name - n, "-%s.tokens", hex);
  return mt_path_join(d->cache_path, d->cache_dir, name);
}

/* Looks for the tokens of a regular file. MT_ENOENT: there are none. */
static mt_err find_cached(struct mt_dataset *d, struct mt_hash *content) {
  MT_TRY(mt_hash_file(d->path, content, NULL));
  struct mt_hash key = cache_key(d, *content);
  MT_TRY(cache_path(d, key));
  mt_err err = mt_tokens_open(&d->tokens, d->cache_path, key, mt_tokenizer_vocab(d->tokenizer),
                              thread_count(d));
  if (err == MT_EFORMAT) mt_warn("%s: the data is tokenised again", mt_error_message());
  d->cached = !err;
  return err == MT_OK || err == MT_ENOMEM ? err : MT_ENOENT;
}

static mt_err open_data(const struct mt_dataset *d, int *fd) {
  *fd = open(d->path, O_RDONLY | O_CLOEXEC);
  if (*fd >= 0) return MT_OK;
  return mt_fail(errno == ENOENT ? MT_ENOENT : MT_EIO, "cannot open '%s': %s", d->path,
                 strerror(errno));
}

/* Once, into a file in dir (NULL: in memory). */
static mt_err tokenise_into(struct mt_dataset *d, const char *dir, struct mt_tokens_writer *w,
                            struct mt_tokenise_job *job) {
  mt_err err;
  int fd = -1;
  MT_GO(open_data(d, &fd));
  err = mt_tokens_create(w, dir);
  if (err) {
    w->failed = true;
    goto done;
  }
  *job = (struct mt_tokenise_job){.tokenizer = d->tokenizer,
                                  .options = &d->options,
                                  .fd = fd,
                                  .threads = thread_count(d),
                                  .out = w,
                                  .done_bytes = &d->done_bytes,
                                  .stop = &d->stop};
  MT_GO(mt_tokenise(job));
  if (job->stats.samples == 0) {
    err = mt_fail(MT_EFORMAT, "%s: no usable sample in %lld lines (%lld without a target)", d->path,
                  (long long)job->lines, (long long)job->stats.dropped);
    goto done;
  }
  MT_GO(mt_tokens_finish(w, cache_key(d, job->content), &job->stats, &d->tokens));
done:
  if (fd >= 0) close(fd);
  return err;
}

/* Gives the tokens their place in the cache; that this fails is no reason to stop. */
static void keep_cached(struct mt_dataset *d, struct mt_tokens_writer *w, struct mt_hash expected,
                        struct mt_hash content) {
  mt_err err = MT_OK;
  if (!mt_hash_equal(expected, content)) {
    mt_warn("%s was written to while it was read", d->path);
    d->cache_path[0] = '\0';
    return;
  }
  err = mt_tokens_publish(w, d->cache_path);
  if (!err) return;
  mt_warn("the tokens of %s are not kept: %s", d->path, mt_error_message());
  d->cache_path[0] = '\0';
}

static mt_err tokenise(struct mt_dataset *d, bool keep, bool regular, struct mt_hash content) {
  const char *temporary = getenv("TMPDIR");
  const char *places[3];
  struct mt_tokenise_job job;
  int count = 0;
  if (!temporary || !*temporary) temporary = "/tmp";
  if (keep) places[count++] = d->cache_dir;
  if (!keep && regular && d->file_bytes < SMALL_FILE) places[count++] = NULL;
  places[count++] = temporary;
  if (count < 3 && places[0]) places[count++] = NULL;
  for (int i = 0;; i++) {
    struct mt_tokens_writer w = {.fd = -1};
    mt_err err = keep && i == 0 ? mt_dir_create(d->cache_dir) : MT_OK;
    bool failed = err != MT_OK;
    if (!err) err = tokenise_into(d, places[i], &w, &job);
    failed |= w.failed;
    if (!err && keep && i == 0) keep_cached(d, &w, content, job.content);
    if (err && keep && i == 0) d->cache_path[0] = '\0';
    mt_tokens_release(&w);
    /* A pipe that has been read cannot be read again. */
    if (!err || !failed || i + 1 == count || (!regular && d->done_bytes > 0)) return err;
    if (keep && i == 0) {
      mt_warn("the tokens of %s are not kept: %s", d->path, mt_error_message());
    }
  }
}

static mt_err read_all(struct mt_dataset *d) {
  struct stat st;
  struct mt_hash content = {0};
  double begin = now_s();
  mt_err err = MT_ENOENT;
  bool regular = stat(d->path, &st) == 0 && S_ISREG(st.st_mode);
  if (regular) d->file_bytes = st.st_size;
  bool keep = regular && d->cache_dir;
  if (keep) err = find_cached(d, &content);
  if (err == MT_ENOENT) err = tokenise(d, keep, regular, content);
  d->seconds = now_s() - begin;
  return err;
}

static void *reader(void *arg) {
  struct mt_dataset *d = arg;
  mt_err err = read_all(d);
  pthread_mutex_lock(&d->lock);
  d->err = err;
  if (err) snprintf(d->why, sizeof d->why, "%s", mt_error_message());
  d->finished = true;
  pthread_cond_broadcast(&d->finished_now);
  pthread_mutex_unlock(&d->lock);
  return NULL;
}

static mt_err start(struct mt_dataset *d) {
  pthread_condattr_t steady;
  pthread_mutex_init(&d->lock, NULL);
  pthread_condattr_init(&steady);
  pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
  pthread_cond_init(&d->finished_now, &steady);
  pthread_condattr_destroy(&steady);
  if (pthread_create(&d->thread, NULL, reader, d) != 0) {
    return mt_fail(MT_EIO, "cannot start the tokenising thread");
  }
  d->running = true;
  return MT_OK;
}

mt_err mt_dataset_open(const struct mt_tokenizer *tokenizer,
                       const struct mt_dataset_options *options, struct mt_dataset **out) {
  *out = NULL;
  if (options->max_seq_length < 2) {
    return mt_fail(MT_EINVAL, "max-seq-length %d: at least 2 tokens", options->max_seq_length);
  }
  struct mt_dataset *d = calloc(1, sizeof *d);
  if (!d) return mt_fail(MT_ENOMEM, "dataset");
  const char *dir = options->cache_dir && *options->cache_dir ? options->cache_dir : NULL;
  d->path = strdup(options->path);
  d->cache_dir = dir ? strdup(dir) : NULL;
  d->touched_bytes = calloc(1, sizeof *d->touched_bytes);
  d->options = *options;
  d->options.path = d->path;
  d->tokenizer = tokenizer;
  d->file_bytes = -1;
  mt_err err = MT_OK;
  if (!d->path || (dir && !d->cache_dir) || !d->touched_bytes) err = mt_fail(MT_ENOMEM, "dataset");
  if (!err) err = start(d);
  if (err)
    mt_dataset_close(d);
  else
    *out = d;
  return err;
}

mt_err mt_dataset_wait(struct mt_dataset *d) {
  if (d->running) pthread_join(d->thread, NULL);
  d->running = false;
  return d->err ? mt_fail(d->err, "%s", d->why) : MT_OK;
}

bool mt_dataset_wait_ms(struct mt_dataset *d, int ms, double *share) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_sec += ms / 1000;
  until.tv_nsec += ms % 1000 * 1000000L;
  if (until.tv_nsec >= 1000000000L) {
    until.tv_nsec -= 1000000000L;
    until.tv_sec++;
  }
  pthread_mutex_lock(&d->lock);
  while (!d->finished && pthread_cond_timedwait(&d->finished_now, &d->lock, &until) == 0) {
  }
  bool finished = d->finished;
  pthread_mutex_unlock(&d->lock);
  double total = (double)d->file_bytes;
  *share = finished ? 1 : total > 0 ? (double)d->done_bytes / total : -1;
  if (*share > 1) *share = 1; /* the file grows */
  return finished;
}

void mt_dataset_close(struct mt_dataset *d) {
  if (!d) return;
  d->stop = true;
  if (d->running) pthread_join(d->thread, NULL);
  mt_tokens_close(&d->tokens);
  free(d->touched_bytes);
  free(d->cache_dir);
  free(d->path);
  free(d);
}

struct mt_dataset_stats mt_dataset_stats(const struct mt_dataset *d) {
  return d->tokens.stats;
}

struct mt_dataset_origin mt_dataset_origin(const struct mt_dataset *d) {
  return (struct mt_dataset_origin){.cached = d->cached,
                                    .cache = *d->cache_path ? d->cache_path : NULL,
                                    .seconds = d->seconds,
                                    .bytes = d->cached ? 0 : d->done_bytes};
}

/* The kernel may take mapped pages back whenever it likes; that they do not count as the process's
 * memory until then, they are let go from time to time. */
static void touch(const struct mt_dataset *d, int64_t bytes) {
  if (atomic_fetch_add(d->touched_bytes, bytes) + bytes < RESIDENT_LIMIT) return;
  atomic_store(d->touched_bytes, 0);
  mt_map_forget(d->tokens.data, d->tokens.size_bytes);
}

struct mt_sample mt_dataset_sample(const struct mt_dataset *d, int64_t i) {
  const uint8_t *block;
  const struct mt_tokens_record *r = mt_tokens_find(&d->tokens, i, &block);
  const int32_t *ids = (const int32_t *)(block + r->at);
  touch(d, (int64_t)r->count * 5 + FAULT_BYTES);
  return (struct mt_sample){ids, (const uint8_t *)(ids + r->count), r->count, r->line};
}

int mt_dataset_whole(const struct mt_dataset *d, int64_t i) {
  const uint8_t *block;
  touch(d, RECORD_BYTES);
  return mt_tokens_find(&d->tokens, i, &block)->whole;
}
