#include "train/data.h"

#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/files.h"
#include "base/hash.h"
#include "base/log.h"

mt_err mt_data_open(const struct mt_tokenizer *tokenizer, struct mt_dataset_options *o,
                    const struct mt_cache_options *cache, struct mt_dataset **out) {
  char dir[MT_PATH_MAX] = "";
  if (cache->use && cache->dir)
    snprintf(dir, sizeof dir, "%s", cache->dir);
  else if (cache->use)
    mt_dataset_cache_dir(dir, sizeof dir);
  o->cache_dir = dir;
  mt_err err = mt_dataset_open(tokenizer, o, out); /* copies the name */
  o->cache_dir = NULL;
  return err;
}

mt_err mt_data_wait(struct mt_dataset *d, const char *path) {
  enum { TERMINAL_MS = 200, LINE_MS = 10000 };
  double share, begin = mt_now_s();
  bool shown = false, terminal = isatty(2) == 1;
  bool silent = mt_log_get_level() < MT_LOG_INFO;
  while (!silent && !mt_dataset_wait_ms(d, terminal ? TERMINAL_MS : LINE_MS, &share)) {
    if (terminal) fputs("\r\033[K", stderr);
    if (share > 0) {
      double s = mt_now_s() - begin;
      fprintf(stderr, "tokenising %.200s  %.0f%%  %.0f s left", path, 100 * share,
              s / share * (1 - share));
    } else {
      fprintf(stderr, "tokenising %.200s", path);
    }
    if (!terminal) fputc('\n', stderr);
    fflush(stderr);
    shown = terminal;
  }
  if (shown) fputs("\r\033[K", stderr);
  return mt_dataset_wait(d);
}

mt_err mt_data_begin(const struct mt_session *s, struct mt_dataset_options *o,
                     const struct mt_cache_options *cache, struct mt_dataset **out) {
  *out = NULL;
  return mt_session_speaks(s) ? mt_data_open(s->tokenizer, o, cache, out) : MT_OK;
}

/* A line that tells data sets apart: every token of every sample counts. */
static void fingerprint(const struct mt_dataset *d, const char *path, char *out, size_t size) {
  struct mt_dataset_stats n = mt_dataset_stats(d);
  struct mt_hash h[3] = {{0}};
  char text[MT_HASH_TEXT];
  for (int64_t i = 0; i < n.samples; i++) {
    struct mt_sample one = mt_dataset_sample(d, i);
    h[1] = mt_hash_bytes(one.ids, (size_t)one.count * sizeof *one.ids);
    h[2] = mt_hash_bytes(one.learn, (size_t)one.count);
    h[0] = mt_hash_bytes(h, sizeof h);
  }
  mt_hash_text(h[0], text);
  snprintf(out, size, "%.200s: %lld samples, %lld tokens, hash %s\n", path, (long long)n.samples,
           (long long)n.tokens, text);
}

/* Seconds that tokenising may take. */
static double tokenising_s(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISREG(st.st_mode) ? 60 + (double)st.st_size / 1e6 : 1e6;
}

mt_err mt_data_finish(const struct mt_session *s, struct mt_dataset_options *o,
                      const struct mt_cache_options *cache, struct mt_dataset **out) {
  char line[512] = "";
  mt_world_doing(s->world, "reading data");
  mt_world_patience(s->world, tokenising_s(o->path));
  mt_err err = *out ? mt_data_wait(*out, o->path) : MT_OK;
  err = mt_world_meet(s->world, err, NULL);
  if (!err && !*out) {
    err = mt_data_open(s->tokenizer, o, cache, out);
    if (!err) err = mt_dataset_wait(*out);
  }
  if (s->world && !err) fingerprint(*out, o->path, line, sizeof line);
  err = mt_world_meet(s->world, err, NULL);
  mt_world_patience(s->world, 0);
  return err ? err : mt_world_same(s->world, "data file", line);
}

static void describe_origin(const struct mt_dataset *d) {
  struct mt_dataset_origin o = mt_dataset_origin(d);
  double megabytes = (double)o.bytes / 1e6;
  if (o.cached) {
    mt_info("         tokens found in %s after %.2f s", o.cache, o.seconds);
  } else if (o.seconds > 0) {
    mt_info("         tokenised %.*f MB in %.2f s (%.1f MB/s)%s%s", megabytes < 1 ? 3 : 1,
            megabytes, o.seconds, megabytes / o.seconds, o.cache ? ", kept in " : "",
            o.cache ? o.cache : "");
  }
}

void mt_data_describe(const char *what, const char *path, const struct mt_dataset *d) {
  struct mt_dataset_stats s = mt_dataset_stats(d);
  mt_info("%-8s %s: %lld samples, %lld tokens, %lld of them targets; longest %lld", what, path,
          (long long)s.samples, (long long)s.tokens, (long long)s.targets, (long long)s.longest);
  describe_origin(d);
  if (s.truncated) mt_info("         %lld samples cut at max-seq-length", (long long)s.truncated);
  if (s.dropped) mt_info("         %lld samples without a target left out", (long long)s.dropped);
  if (s.bad_lines) {
    mt_warn("%s: %lld malformed lines skipped, the first is line %lld", path,
            (long long)s.bad_lines, (long long)s.first_bad_line);
  }
}
