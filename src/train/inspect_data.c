/* `moetune inspect DATA`: lengths, what is cut, how samples pack, and samples with their mask. */
#include <math.h>
#include <stdlib.h>

#include "data/dataset.h"
#include "train/data.h"
#include "train/inspect.h"
#include "train/session.h"
#include "train/terminal.h"

enum { PACKED_BATCHES = 10000, BARS = 14, BAR_WIDTH = 40, SHOWN_TOKENS = 4096 };

struct view {
  const struct mt_inspect_options *o;
  struct mt_config config;
  struct mt_tokenizer *tokenizer;
  const struct mt_template *chat;
  const struct mt_recipe *recipe;
  struct mt_dataset *data;
  struct mt_dataset_stats stats;
};

static double percent(double part, double whole) {
  return whole > 0 ? 100 * part / whole : 0;
}

static int by_size(const void *a, const void *b) {
  int x = *(const int *)a, y = *(const int *)b;
  return (x > y) - (x < y);
}

/* 1, 2 or 5 times a power of ten, at least n. */
static int round_step(int n) {
  for (int64_t p = 1;; p *= 10) {
    if (n <= p) return (int)p;
    if (n <= 2 * p) return (int)(2 * p);
    if (n <= 5 * p) return (int)(5 * p);
  }
}

/* lengths: sorted. Steps as wide as the lengths up to the 99th hundredth need; one row holds the
 * rest. */
static void print_histogram(const struct view *v, const int *length, int64_t n) {
  int64_t count[BARS + 1] = {0}, highest = 1;
  int step = round_step((length[(n - 1) * 99 / 100] + BARS - 1) / BARS);
  for (int64_t i = 0; i < n; i++) count[length[i] / step < BARS ? length[i] / step : BARS]++;
  for (int b = 0; b <= BARS; b++) highest = count[b] > highest ? count[b] : highest;
  int last = BARS;
  while (last > 0 && count[last] == 0) last--;
  printf("\ntokens a sample, before cutting at %d\n", v->o->max_seq_length);
  for (int b = length[0] / step < BARS ? length[0] / step : BARS; b <= last; b++) {
    char range[48];
    if (b < BARS)
      snprintf(range, sizeof range, "%d to %d", b * step, (b + 1) * step - 1);
    else
      snprintf(range, sizeof range, "%d to %d", b * step, length[n - 1]);
    printf("%20s %9lld %6.1f%%  ", range, (long long)count[b],
           percent((double)count[b], (double)n));
    mt_print_bar(stdout, (double)count[b] / (double)highest, BAR_WIDTH);
    putchar('\n');
  }
  printf("median %d, 90%% up to %d, 99%% up to %d, longest %d\n", length[(n - 1) / 2],
         length[(n - 1) * 9 / 10], length[(n - 1) * 99 / 100], length[n - 1]);
}

static mt_err print_lengths(const struct view *v) {
  int64_t n = v->stats.samples, whole = 0;
  int *length = malloc((size_t)n * sizeof *length);
  if (!length) return mt_fail(MT_ENOMEM, "lengths of %lld samples", (long long)n);
  for (int64_t i = 0; i < n; i++) whole += length[i] = mt_dataset_whole(v->data, i);
  qsort(length, (size_t)n, sizeof *length, by_size);
  print_histogram(v, length, n);
  free(length);
  printf("truncated at %d: %lld of %lld samples (%.1f%%), %.1f%% of their tokens\n",
         v->o->max_seq_length, (long long)v->stats.truncated, (long long)n,
         percent((double)v->stats.truncated, (double)n),
         percent((double)(whole - v->stats.tokens), (double)whole));
  if (v->stats.dropped) {
    printf("left out: %lld samples without a target (%lld whose targets lie behind the cut)\n",
           (long long)v->stats.dropped, (long long)v->stats.dropped_cut);
  }
  return MT_OK;
}

/* An epoch's batches as the trainer packs them; the first of them tell enough. */
static mt_err print_packing(const struct view *v) {
  struct mt_loader_options o = {.batch_size = v->o->batch_size,
                                .micro_batches = 1,
                                .max_seq_length = v->o->max_seq_length,
                                .pad_multiple = v->recipe->pad_multiple,
                                .seed = 1,
                                .world = 1,
                                .shuffle = true};
  struct mt_loader l;
  double used = 0, computed = 0, rectangle = 0;
  if (mt_loader_token_capacity(&o) < 0) {
    return mt_fail(MT_EINVAL, "batch-size x max-seq-length is too large");
  }
  MT_TRY(mt_loader_create(&l, v->data, &o));
  mt_err err = MT_OK;
  int64_t steps = mt_loader_steps_per_epoch(&l);
  if (steps > PACKED_BATCHES) steps = PACKED_BATCHES;
  for (int64_t step = 0; !err && step < steps; step++) {
    err = mt_loader_next(&l);
    const struct mt_batch *b = l.list[0];
    int longest = 0;
    for (int s = 0; !err && s < b->sequence_count; s++) {
      int n = b->cu_seqlens[s + 1] - b->cu_seqlens[s];
      longest = n > longest ? n : longest;
    }
    used += b->valid_count;
    computed += b->token_count;
    rectangle += (double)longest * b->sequence_count;
  }
  double capacity = (double)mt_loader_token_capacity(&o) * (double)steps;
  mt_loader_destroy(&l);
  if (err) return err;
  printf("\npacking         %lld batches of %d samples: %.1f tokens each, %.1f%% of the %d that "
         "memory is kept for\n",
         (long long)steps, v->o->batch_size, used / (double)steps, percent(used, capacity),
         mt_loader_token_capacity(&o));
  printf("                efficiency %.1f%%: that share of the computed tokens are samples'; "
         "padding each\n                sample to its batch's longest would give %.1f%%\n",
         percent(used, computed), percent(used, rectangle));
  return MT_OK;
}

/* Prints a sample's text, learned or not, line by line behind two spaces. */
struct painter {
  bool color, learned, open;
  int column;
};

static const char green[] = "\x1b[1;32m", plain[] = "\x1b[0m";
static const char left_bracket[] = "\xe2\x9f\xa6", right_bracket[] = "\xe2\x9f\xa7"; /* U+27E6, 7 */

static void begin_line(struct painter *p) {
  if (p->column++ == 0) {
    fputs("  ", stdout);
    if (p->color && p->learned) fputs(green, stdout);
  }
}

static void set_learned(struct painter *p, bool learned) {
  if (learned == p->learned) return;
  if (p->column > 0 || !p->color) begin_line(p);
  p->learned = learned;
  if (!p->color)
    fputs(learned ? left_bracket : right_bracket, stdout);
  else if (p->column > 0)
    fputs(learned ? green : plain, stdout);
}

static bool is_bracket(const char *text, size_t n) {
  return n == 3 && (memcmp(text, left_bracket, 3) == 0 || memcmp(text, right_bracket, 3) == 0);
}

static void paint(struct painter *p, const char *text, size_t size) {
  for (size_t at = 0, skip; at < size; at += skip) {
    if (text[at] == '\n') {
      begin_line(p);
      if (p->color && p->learned) fputs(plain, stdout);
      putchar('\n');
      p->column = 0;
      skip = 1;
      continue;
    }
    size_t n = mt_printable(text + at, size - at, &skip);
    begin_line(p);
    if (text[at] == '\t' || (n && !is_bracket(text + at, n)))
      fwrite(text + at, 1, skip, stdout);
    else
      for (size_t i = 0; i < skip; i++) printf("\\x%02x", (uint8_t)text[at + i]);
  }
}

static size_t common(const struct mt_text *a, const struct mt_text *b) {
  size_t n = 0;
  while (n < a->size && n < b->size && a->text[n] == b->text[n]) n++;
  return n;
}

/* A sample's text, whose stretches end where the text of the tokens up to there does. */
static mt_err paint_sample(const struct view *v, const struct mt_sample *s, int shown,
                           struct painter *p) {
  struct mt_text whole = {0}, part = {0};
  size_t from = 0;
  mt_err err;
  MT_GO(mt_decode(v->tokenizer, s->ids, (size_t)shown, false, &whole));
  for (int i = 0; i < shown;) {
    bool learned = i > 0 && s->learn[i]; /* the first token is nobody's target */
    int end = i + 1;
    while (end < shown && (s->learn[end] != 0) == learned) end++;
    part.size = 0;
    MT_GO(mt_decode(v->tokenizer, s->ids, (size_t)end, false, &part));
    size_t till = end == shown ? whole.size : common(&whole, &part);
    set_learned(p, learned);
    if (till > from) paint(p, whole.text + from, till - from);
    from = till > from ? till : from;
    i = end;
  }
  set_learned(p, false);
done:
  free(whole.text);
  free(part.text);
  return err;
}

static mt_err print_samples(const struct view *v) {
  int64_t n = v->o->samples < v->stats.samples ? v->o->samples : v->stats.samples;
  bool color = mt_color_wanted((enum mt_color)v->o->color, stdout);
  if (n == 0) return MT_OK;
  if (color)
    printf("\nfirst samples, what is %slearned%s in green\n", green, plain);
  else
    printf("\nfirst samples, what is learned in %s%s\n", left_bracket, right_bracket);
  for (int64_t i = 0; i < n; i++) {
    struct mt_sample s = mt_dataset_sample(v->data, i);
    struct painter p = {.color = color};
    int learned = 0, whole = mt_dataset_whole(v->data, i);
    for (int k = 1; k < s.count; k++) learned += s.learn[k] != 0;
    int shown = s.count < SHOWN_TOKENS ? s.count : SHOWN_TOKENS;
    printf("\nline %lld: %d tokens, %d learned", (long long)s.line, s.count, learned);
    if (whole > s.count) printf(", cut from %d", whole);
    puts("");
    MT_TRY(paint_sample(v, &s, shown, &p));
    if (p.column) putchar('\n');
    if (shown < s.count) printf("  ... and %d tokens more\n", s.count - shown);
  }
  return MT_OK;
}

static mt_err open_model(struct view *v) {
  char path[MT_PATH_MAX];
  const struct mt_inspect_options *o = v->o;
  struct mt_backend be = {0};
  struct mt_device_options device = o->device;
  device.plan_only = true;
  MT_TRY(mt_hf_config_load(o->model, &v->config, NULL));
  MT_TRY(mt_path_join(path, o->model, "tokenizer.json"));
  MT_TRY(mt_tokenizer_load(path, &v->tokenizer));
  if (o->chat_template)
    MT_TRY(mt_template_find(o->chat_template, &v->chat));
  else
    MT_TRY(mt_template_detect(o->model, &v->chat));
  mt_err err = mt_device_open(&device, &v->recipe, &be); /* decides the padding */
  mt_backend_destroy(&be);
  return err;
}

static mt_err report(struct view *v) {
  const struct mt_inspect_options *o = v->o;
  struct mt_dataset_options d = {.path = o->data,
                                 .chat = v->chat,
                                 .max_seq_length = o->max_seq_length,
                                 .eos_id = v->config.eos_id,
                                 .train_on_prompt = o->train_on_prompt,
                                 .skip_bad_lines = o->skip_bad_lines,
                                 .threads = o->device.threads};
  MT_TRY(mt_data_open(v->tokenizer, &d, &o->cache, &v->data));
  MT_TRY(mt_data_wait(v->data, o->data));
  v->stats = mt_dataset_stats(v->data);
  const struct mt_dataset_stats *s = &v->stats;
  printf("data            ");
  mt_inspect_text(o->data);
  printf("\nread with       ");
  mt_inspect_text(o->model);
  printf(", chat template %s\n", mt_template_name(v->chat));
  printf("samples         %lld, %lld tokens, %lld of them targets (%.1f%%)\n",
         (long long)s->samples, (long long)s->tokens, (long long)s->targets,
         percent((double)s->targets, (double)s->tokens));
  if (s->bad_lines) {
    printf("malformed       %lld lines, the first is line %lld\n", (long long)s->bad_lines,
           (long long)s->first_bad_line);
  }
  struct mt_dataset_origin from = mt_dataset_origin(v->data);
  if (from.cache) {
    printf("tokens          %s in ", from.cached ? "found" : "kept");
    mt_inspect_text(from.cache);
    putchar('\n');
  }
  MT_TRY(print_lengths(v));
  MT_TRY(print_packing(v));
  return print_samples(v);
}

mt_err mt_inspect_data(const struct mt_inspect_options *o) {
  struct view v = {.o = o};
  mt_err err = open_model(&v);
  if (!err) err = report(&v);
  mt_dataset_close(v.data);
  mt_tokenizer_free(v.tokenizer);
  return err;
}
