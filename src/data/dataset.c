#include "data/dataset.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_LIMIT = 64 << 20 };

struct mt_dataset {
  struct mt_dataset_options options;
  const struct mt_tokenizer *tokenizer;
  char *path;
  struct mt_dataset_stats stats;
  struct mt_ids ids; /* all samples, one behind the other */
  uint8_t *learn;
  size_t learn_capacity;
  size_t *begin; /* [samples+1] */
  int64_t *line;
  size_t sample_capacity;
  pthread_t thread;
  bool running;
  mt_err err;
  char why[1024];
};

static mt_err grow_samples(struct mt_dataset *d) {
  size_t need = (size_t)d->stats.samples + 2;
  if (need <= d->sample_capacity) return MT_OK;
  size_t capacity = need * 2;
  size_t *begin = realloc(d->begin, capacity * sizeof *begin);
  if (begin) d->begin = begin;
  int64_t *line = realloc(d->line, capacity * sizeof *line);
  if (line) d->line = line;
  if (!begin || !line) return mt_fail(MT_ENOMEM, "%s: %zu samples", d->path, need);
  d->sample_capacity = capacity;
  return MT_OK;
}

/* Cuts, counts and stores one rendered sample. */
static mt_err keep(struct mt_dataset *d, const struct mt_rendered *r, int64_t line) {
  struct mt_dataset_stats *s = &d->stats;
  size_t n = r->ids.count, most = (size_t)d->options.max_seq_length;
  int64_t targets = 0;
  if ((int64_t)n > s->longest) s->longest = (int64_t)n;
  if (n > most) n = most;
  for (size_t i = 1; i < n; i++) targets += d->options.train_on_prompt || r->learn[i];
  if (targets == 0) {
    s->dropped++;
    return MT_OK;
  }
  s->truncated += r->ids.count > most;
  MT_TRY(grow_samples(d));
  for (size_t i = 0; i < n; i++) MT_TRY(mt_ids_append(&d->ids, r->ids.id[i]));
  if (d->ids.count > d->learn_capacity) {
    uint8_t *grown = realloc(d->learn, d->ids.capacity);
    if (!grown) return mt_fail(MT_ENOMEM, "%s: %zu tokens", d->path, d->ids.count);
    d->learn = grown;
    d->learn_capacity = d->ids.capacity;
  }
  uint8_t *learn = d->learn + d->ids.count - n;
  for (size_t i = 0; i < n; i++) learn[i] = d->options.train_on_prompt || r->learn[i];
  d->line[s->samples++] = line;
  d->begin[s->samples] = d->ids.count;
  s->tokens += (int64_t)n;
  s->targets += targets;
  return MT_OK;
}

/* A line that failed with the thread's message: counted or the end of it. */
static mt_err refuse(struct mt_dataset *d, mt_err err, int64_t line) {
  if (err == MT_EFORMAT && d->options.skip_bad_lines) {
    if (d->stats.bad_lines++ == 0) d->stats.first_bad_line = line;
    return MT_OK;
  }
  return mt_context(err, "%s:%lld", d->path, (long long)line);
}

static mt_err read_line(struct mt_dataset *d, struct mt_encoder *e, struct mt_rendered *r,
                        const char *text, size_t size, int64_t line) {
  json_error_t why;
  json_t *record = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  mt_err err;
  if (!record)
    err = mt_fail(MT_EFORMAT, "%s", why.text);
  else if (!json_is_object(record))
    err = mt_fail(MT_EFORMAT, "is no JSON object");
  else
    err = mt_render(d->options.chat, e, record, d->options.eos_id, r);
  json_decref(record);
  return err ? refuse(d, err, line) : keep(d, r, line);
}

static bool blank(const char *text, size_t size) {
  for (size_t i = 0; i < size; i++) {
    if (!strchr(" \t\r\n", text[i]) || text[i] == '\0') return false;
  }
  return true;
}

/* One line without its end into text (=); *more is false behind the last. Of a line that is too
 * long only the beginning is kept, whatever its length. */
static mt_err next_line(FILE *f, struct mt_text *text, bool *more) {
  int c = EOF;
  text->size = 0;
  *more = false;
  while ((c = getc_unlocked(f)) != EOF) {
    *more = true;
    if (c == '\n') break;
    if (text->size == text->capacity) {
      char byte = (char)c;
      MT_TRY(mt_text_append(text, &byte, 1)); /* grows to twice its size */
    } else if (text->size <= LINE_LIMIT) {
      text->text[text->size++] = (char)c;
    }
  }
  return MT_OK;
}

static mt_err read_lines(struct mt_dataset *d, struct mt_encoder *e, FILE *f, struct mt_rendered *r,
                         struct mt_text *text, int64_t *line) {
  static const char byte_order_mark[3] = "\xef\xbb\xbf";
  for (bool more;;) {
    MT_TRY(next_line(f, text, &more));
    if (!more) break;
    size_t from = 0;
    ++*line;
    if (text->size == 0) continue;
    if (*line == 1 && text->size >= 3 && memcmp(text->text, byte_order_mark, 3) == 0) from = 3;
    if (text->size > LINE_LIMIT) {
      mt_fail(MT_EFORMAT, "longer than %d bytes", LINE_LIMIT);
      MT_TRY(refuse(d, MT_EFORMAT, *line));
    } else if (!blank(text->text + from, text->size - from)) {
      MT_TRY(read_line(d, e, r, text->text + from, text->size - from, *line));
    }
  }
  if (ferror(f)) return mt_fail(MT_EIO, "cannot read '%s': %s", d->path, strerror(errno));
  return MT_OK;
}

static mt_err read_all(struct mt_dataset *d) {
  struct mt_rendered r = {0};
  struct mt_encoder *e = NULL;
  struct mt_text text = {0};
  int64_t line = 0;
  mt_err err = MT_OK;
  FILE *f = fopen(d->path, "rbe");
  if (!f) {
    return mt_fail(errno == ENOENT ? MT_ENOENT : MT_EIO, "cannot open '%s': %s", d->path,
                   strerror(errno));
  }
  MT_GO(mt_encoder_create(d->tokenizer, &e));
  MT_GO(grow_samples(d));
  d->begin[0] = 0;
  MT_GO(read_lines(d, e, f, &r, &text, &line));
  if (d->stats.samples == 0) {
    err = mt_fail(MT_EFORMAT, "%s: no usable sample in %lld lines (%lld without a target)", d->path,
                  (long long)line, (long long)d->stats.dropped);
  }
done:
  free(text.text);
  mt_encoder_free(e);
  mt_rendered_free(&r);
  fclose(f);
  return err;
}

static void *reader(void *arg) {
  struct mt_dataset *d = arg;
  d->err = read_all(d);
  if (d->err) snprintf(d->why, sizeof d->why, "%s", mt_error_message());
  return NULL;
}

mt_err mt_dataset_open(const struct mt_tokenizer *tokenizer,
                       const struct mt_dataset_options *options, struct mt_dataset **out) {
  *out = NULL;
  if (options->max_seq_length < 2) {
    return mt_fail(MT_EINVAL, "max-seq-length %d: at least 2 tokens", options->max_seq_length);
  }
  struct mt_dataset *d = calloc(1, sizeof *d);
  if (d) d->path = strdup(options->path);
  if (!d || !d->path) {
    free(d);
    return mt_fail(MT_ENOMEM, "dataset");
  }
  d->options = *options;
  d->tokenizer = tokenizer;
  if (pthread_create(&d->thread, NULL, reader, d) != 0) {
    mt_dataset_close(d);
    return mt_fail(MT_EIO, "cannot start the tokenising thread");
  }
  d->running = true;
  *out = d;
  return MT_OK;
}

mt_err mt_dataset_wait(struct mt_dataset *d) {
  if (d->running) pthread_join(d->thread, NULL);
  d->running = false;
  return d->err ? mt_fail(d->err, "%s", d->why) : MT_OK;
}

void mt_dataset_close(struct mt_dataset *d) {
  if (!d) return;
  if (d->running) pthread_join(d->thread, NULL);
  free(d->path);
  free(d->ids.id);
  free(d->learn);
  free(d->begin);
  free(d->line);
  free(d);
}

struct mt_dataset_stats mt_dataset_stats(const struct mt_dataset *d) {
  return d->stats;
}

struct mt_sample mt_dataset_sample(const struct mt_dataset *d, int64_t i) {
  size_t at = d->begin[i];
  return (struct mt_sample){d->ids.id + at, d->learn + at, (int)(d->begin[i + 1] - at), d->line[i]};
}
