#include "data/tokenise.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/json.h"

enum { PIECE_BYTES = 1 << 20, LINE_LIMIT = 64 << 20, MAX_THREADS = 64 };

/* Whole lines of the file, and what became of them. */
struct piece {
  int64_t number, first_line, lines;
  size_t read_bytes; /* of the file, more than text has where a line was too long */
  struct mt_text text;
  struct mt_tokens_record *record;
  size_t record_count, record_capacity;
  struct mt_text payload;
  struct mt_dataset_stats stats;
  mt_err err;
  char why[1024];
};

struct run {
  struct mt_tokenise_job *job;
  pthread_mutex_t reading; /* guards the file and what follows */
  struct mt_text rest;     /* read, and not yet in a piece */
  XXH3_state_t *hash;
  int64_t pieces, lines;
  bool ended;
  mt_err read_err;
  char read_why[256];
  pthread_mutex_t writing; /* guards the output and what follows */
  pthread_cond_t turn;
  int64_t next; /* the piece that is to be written now */
  mt_err err;
  char why[1024];
};

/* Up to PIECE_BYTES more of the file behind text. *end: there is no more. */
static mt_err read_more(struct run *r, struct mt_text *text, bool *end) {
  if (text->capacity - text->size < PIECE_BYTES) {
    size_t capacity = text->size + text->size / 2 + 2 * PIECE_BYTES;
    char *grown = realloc(text->text, capacity);
    if (!grown)
      return mt_fail(MT_ENOMEM, "%s: a line of %zu bytes", r->job->options->path, text->size);
    text->text = grown;
    text->capacity = capacity;
  }
  ssize_t n;
  do n = read(r->job->fd, text->text + text->size, PIECE_BYTES);
  while (n < 0 && errno == EINTR);
  if (n < 0) {
    return mt_fail(MT_EIO, "cannot read '%s': %s", r->job->options->path, strerror(errno));
  }
  *end = n == 0;
  XXH3_128bits_update(r->hash, text->text + text->size, (size_t)n);
  text->size += (size_t)n;
  return MT_OK;
}

/* Of a line that is too long one byte more than is allowed is kept, and its end. */
static mt_err skip_long_line(struct run *r, struct piece *p, bool *end) {
  for (;;) {
    char *found = memchr(p->text.text + LINE_LIMIT + 1, '\n', p->text.size - LINE_LIMIT - 1);
    if (found) {
      size_t at = (size_t)(found - p->text.text);
      p->read_bytes += at - (LINE_LIMIT + 1);
      memmove(p->text.text + LINE_LIMIT + 1, found, p->text.size - at);
      p->text.size -= at - (LINE_LIMIT + 1);
      return MT_OK;
    }
    p->read_bytes += p->text.size - (LINE_LIMIT + 1);
    p->text.size = LINE_LIMIT + 1;
    if (*end) return MT_OK;
    MT_TRY(read_more(r, &p->text, end));
  }
}

static int64_t count_lines(const struct mt_text *t) {
  int64_t n = 0;
  for (size_t i = 0; i < t->size; i++) n += t->text[i] == '\n';
  return n + (t->size > 0 && t->text[t->size - 1] != '\n');
}

/* Fills the next piece up to a line's end. False: there is none. */
static mt_err next_piece(struct run *r, struct piece *p, bool *more) {
  bool end = false;
  size_t scanned = 0;
  struct mt_text swap = p->text;
  p->text = r->rest;
  r->rest = swap;
  r->rest.size = 0;
  p->read_bytes = 0;
  for (char *cut = NULL;;) {
    if (p->text.size >= PIECE_BYTES) {
      cut = memrchr(p->text.text + scanned, '\n', p->text.size - scanned);
      scanned = p->text.size;
    }
    if (cut) {
      size_t keep = (size_t)(cut - p->text.text) + 1;
      MT_TRY(mt_text_append(&r->rest, p->text.text + keep, p->text.size - keep));
      p->text.size = keep;
      break;
    }
    if (p->text.size > LINE_LIMIT) {
      MT_TRY(skip_long_line(r, p, &end));
      scanned = LINE_LIMIT;
      if (!end) continue;
    }
    if (end) break;
    MT_TRY(read_more(r, &p->text, &end));
  }
  p->read_bytes += p->text.size;
  p->number = r->pieces++;
  p->first_line = r->lines + 1;
  p->lines = count_lines(&p->text);
  r->lines += p->lines;
  *more = p->text.size > 0;
  return MT_OK;
}

static mt_err grow_records(struct piece *p) {
  if (p->record_count < p->record_capacity) return MT_OK;
  size_t capacity = p->record_capacity * 2 + 256;
  void *grown = realloc(p->record, capacity * sizeof *p->record);
  if (!grown) return mt_fail(MT_ENOMEM, "%zu samples", capacity);
  p->record = grown;
  p->record_capacity = capacity;
  return MT_OK;
}

/* Cuts, counts and stores one rendered sample. */
static mt_err keep(const struct mt_dataset_options *o, struct piece *p, const struct mt_rendered *r,
                   int64_t line) {
  struct mt_dataset_stats *s = &p->stats;
  size_t whole = r->ids.count, n = whole, most = (size_t)o->max_seq_length;
  int64_t targets = 0;
  if ((int64_t)n > s->longest) s->longest = (int64_t)n;
  if (n > most) n = most;
  for (size_t i = 1; i < n; i++) targets += o->train_on_prompt || r->learn[i];
  if (targets == 0) {
    s->dropped++;
    for (size_t i = n; i < whole; i++) {
      if (!r->learn[i]) continue;
      s->dropped_cut++;
      break;
    }
    return MT_OK;
  }
  s->truncated += whole > most;
  MT_TRY(grow_records(p));
  p->record[p->record_count++] = (struct mt_tokens_record){
      .at = p->payload.size, .line = line, .count = (int32_t)n, .whole = (int32_t)whole};
  MT_TRY(mt_text_append(&p->payload, (const char *)r->ids.id, n * sizeof *r->ids.id));
  size_t at = p->payload.size;
  MT_TRY(mt_text_append(&p->payload, (const char *)r->learn, n));
  if (o->train_on_prompt) memset(p->payload.text + at, 1, n);
  MT_TRY(mt_text_append(&p->payload, "\0\0\0", (4 - n % 4) % 4));
  s->samples++;
  s->tokens += (int64_t)n;
  s->targets += targets;
  return MT_OK;
}

/* A line that failed with the thread's message: counted or the end of it. */
static mt_err refuse(const struct mt_dataset_options *o, struct piece *p, mt_err err,
                     int64_t line) {
  if (err == MT_EFORMAT && o->skip_bad_lines) {
    if (p->stats.bad_lines++ == 0) p->stats.first_bad_line = line;
    return MT_OK;
  }
  return mt_context(err, "%s:%lld", o->path, (long long)line);
}

static mt_err read_line(const struct mt_dataset_options *o, struct piece *p, struct mt_encoder *e,
                        struct mt_rendered *r, const char *text, size_t size, int64_t line) {
  json_error_t why;
  if (!mt_json_bearable(text, size))
    return refuse(o, p, mt_fail(MT_EFORMAT, "far more brackets or commas than text"), line);
  json_t *record = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
  mt_err err;
  if (!record)
    err = mt_fail(MT_EFORMAT, "%s", why.text);
  else if (!json_is_object(record))
    err = mt_fail(MT_EFORMAT, "is no JSON object");
  else
    err = mt_render(o->chat, e, record, o->eos_id, r);
  json_decref(record);
  return err ? refuse(o, p, err, line) : keep(o, p, r, line);
}

static bool blank(const char *text, size_t size) {
  for (size_t i = 0; i < size; i++) {
    if (!strchr(" \t\r\n", text[i]) || text[i] == '\0') return false;
  }
  return true;
}

static mt_err read_lines(const struct mt_tokenise_job *job, struct piece *p, struct mt_encoder *e,
                         struct mt_rendered *r) {
  static const char byte_order_mark[3] = "\xef\xbb\xbf";
  const char *text = p->text.text, *end = text + p->text.size;
  p->record_count = p->payload.size = 0;
  p->stats = (struct mt_dataset_stats){0};
  for (int64_t line = p->first_line; text < end; line++) {
    if (*job->stop) return mt_fail(MT_EINTERRUPTED, "tokenising was given up");
    const char *stop = memchr(text, '\n', (size_t)(end - text));
    const char *next = stop ? stop + 1 : end;
    size_t size = (size_t)((stop ? stop : end) - text);
    if (line == 1 && size >= 3 && memcmp(text, byte_order_mark, 3) == 0) {
      text += 3;
      size -= 3;
    }
    if (size > LINE_LIMIT) {
      mt_fail(MT_EFORMAT, "longer than %d bytes", LINE_LIMIT);
      MT_TRY(refuse(job->options, p, MT_EFORMAT, line));
    } else if (!blank(text, size)) {
      MT_TRY(read_line(job->options, p, e, r, text, size, line));
    }
    text = next;
  }
  return MT_OK;
}

static void add_stats(struct mt_dataset_stats *sum, const struct mt_dataset_stats *s) {
  if (sum->bad_lines == 0) sum->first_bad_line = s->first_bad_line;
  if (s->longest > sum->longest) sum->longest = s->longest;
  sum->samples += s->samples;
  sum->tokens += s->tokens;
  sum->targets += s->targets;
  sum->truncated += s->truncated;
  sum->dropped += s->dropped;
  sum->dropped_cut += s->dropped_cut;
  sum->bad_lines += s->bad_lines;
}

/* Waits for the piece's turn and writes it; false when all is over. */
static bool hand_in(struct run *r, struct piece *p) {
  pthread_mutex_lock(&r->writing);
  while (r->next != p->number && !r->err) pthread_cond_wait(&r->turn, &r->writing);
  if (!r->err) {
    if (!p->err) {
      p->err = mt_tokens_append(r->job->out, p->record, p->record_count, p->payload.text,
                                p->payload.size);
      if (p->err) snprintf(p->why, sizeof p->why, "%s", mt_error_message());
    }
    if (p->err) {
      r->err = p->err;
      memcpy(r->why, p->why, sizeof r->why);
    } else {
      add_stats(&r->job->stats, &p->stats);
      *r->job->done_bytes += (int64_t)p->read_bytes;
    }
    r->next++;
    pthread_cond_broadcast(&r->turn);
  }
  bool go_on = !r->err;
  pthread_mutex_unlock(&r->writing);
  return go_on;
}

static bool take(struct run *r, struct piece *p) {
  bool more = false;
  pthread_mutex_lock(&r->reading);
  if (!r->ended) {
    r->read_err = next_piece(r, p, &more);
    if (r->read_err) snprintf(r->read_why, sizeof r->read_why, "%s", mt_error_message());
    r->ended = r->read_err || !more;
  }
  pthread_mutex_unlock(&r->reading);
  return more && !r->read_err;
}

static void *work(void *arg) {
  struct run *r = arg;
  struct piece p = {0};
  struct mt_rendered rendered = {0};
  struct mt_encoder *e = NULL;
  mt_err made = mt_encoder_create(r->job->tokenizer, &e);
  while (take(r, &p)) {
    p.err = made ? made : read_lines(r->job, &p, e, &rendered);
    if (p.err) snprintf(p.why, sizeof p.why, "%s", mt_error_message());
    if (!hand_in(r, &p)) break;
  }
  mt_encoder_free(e);
  mt_rendered_free(&rendered);
  free(p.text.text);
  free(p.payload.text);
  free(p.record);
  return NULL;
}

mt_err mt_tokenise(struct mt_tokenise_job *job) {
  struct run r = {.job = job,
                  .reading = PTHREAD_MUTEX_INITIALIZER,
                  .writing = PTHREAD_MUTEX_INITIALIZER,
                  .turn = PTHREAD_COND_INITIALIZER,
                  .hash = XXH3_createState()};
  pthread_t thread[MAX_THREADS];
  int started = 0, most = job->threads < MAX_THREADS ? job->threads : MAX_THREADS;
  if (!r.hash) return mt_fail(MT_ENOMEM, "tokenising");
  XXH3_128bits_reset(r.hash);
  job->stats = (struct mt_dataset_stats){0};
  *job->done_bytes = 0;
  while (started < most - 1 && pthread_create(&thread[started], NULL, work, &r) == 0) started++;
  work(&r);
  for (int i = 0; i < started; i++) pthread_join(thread[i], NULL);
  XXH128_hash_t h = XXH3_128bits_digest(r.hash);
  job->content = (struct mt_hash){h.low64, h.high64};
  job->lines = r.lines;
  XXH3_freeState(r.hash);
  free(r.rest.text);
  if (r.err) return mt_fail(r.err, "%s", r.why);
  return r.read_err ? mt_fail(r.read_err, "%s", r.read_why) : MT_OK;
}
