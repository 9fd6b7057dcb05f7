/* Packing samples into rows, and the order in which they come. */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "data/dataset.h"

mt_err mt_batch_create(struct mt_batch *b, int token_capacity, int sequence_capacity) {
  *b = (struct mt_batch){.token_capacity = token_capacity, .sequence_capacity = sequence_capacity};
  size_t t = (size_t)token_capacity, s = (size_t)sequence_capacity;
  b->ids = calloc(t, sizeof *b->ids);
  b->positions = calloc(t, sizeof *b->positions);
  b->labels = calloc(t, sizeof *b->labels);
  b->cu_seqlens = calloc(s + 1, sizeof *b->cu_seqlens);
  b->lines = calloc(s, sizeof *b->lines);
  if (b->ids && b->positions && b->labels && b->cu_seqlens && b->lines) return MT_OK;
  mt_batch_destroy(b);
  return mt_fail(MT_ENOMEM, "a batch of %d tokens", token_capacity);
}

void mt_batch_destroy(struct mt_batch *b) {
  free(b->ids);
  free(b->positions);
  free(b->labels);
  free(b->cu_seqlens);
  free(b->lines);
  *b = (struct mt_batch){0};
}

void mt_batch_begin(struct mt_batch *b) {
  b->token_count = b->valid_count = b->sequence_count = b->target_count = 0;
  b->cu_seqlens[0] = 0;
}

mt_err mt_batch_add(struct mt_batch *b, const struct mt_sample *s) {
  if (s->count > b->token_capacity - b->valid_count || b->sequence_count == b->sequence_capacity) {
    return mt_fail(MT_ESHAPE, "a sample of %d tokens does not fit a batch of %d tokens, %d samples",
                   s->count, b->token_capacity, b->sequence_capacity);
  }
  int at = b->valid_count;
  for (int i = 0; i < s->count; i++) {
    bool target = i + 1 < s->count && s->learn[i + 1];
    b->ids[at + i] = s->ids[i];
    b->positions[at + i] = i;
    b->labels[at + i] = target ? s->ids[i + 1] : MT_IGNORE;
    b->target_count += target;
  }
  b->lines[b->sequence_count++] = s->line;
  b->valid_count += s->count;
  b->token_count = b->valid_count;
  b->cu_seqlens[b->sequence_count] = b->valid_count;
  return MT_OK;
}

static void pad(struct mt_batch *b, int padded) {
  if (padded > b->token_capacity) padded = b->token_capacity;
  for (int i = b->valid_count; i < padded; i++) {
    b->ids[i] = b->positions[i] = 0;
    b->labels[i] = MT_IGNORE;
  }
  b->token_count = padded;
}

void mt_batch_finish(struct mt_batch *b, int pad_multiple) {
  pad(b, (b->valid_count + pad_multiple - 1) / pad_multiple * pad_multiple);
}

void mt_batch_pad(struct mt_batch *b, int pad_multiple) {
  pad(b, pad_multiple);
}

int mt_loader_token_capacity(const struct mt_loader_options *o) {
  int64_t tokens = (int64_t)o->batch_size * o->max_seq_length;
  tokens = (tokens + o->pad_multiple - 1) / o->pad_multiple * o->pad_multiple;
  return tokens > INT_MAX ? -1 : (int)tokens;
}

/* The epochs' samples are one endless row, of which each round takes one for every rank: so the
 * samples of a step depend on how many it takes alone, not on the number of ranks. */
static struct mt_sample take(struct mt_loader *l) {
  uint32_t n = (uint32_t)mt_dataset_stats(l->data).samples;
  while (l->next.index >= n) l->next = (struct mt_position){l->next.epoch + 1, l->next.index - n};
  struct mt_position at = {l->next.epoch, l->next.index + l->options.rank};
  if (at.index >= n) at = (struct mt_position){at.epoch + 1, at.index - n};
  if (l->order_epoch != at.epoch) {
    for (uint32_t i = 0; i < n; i++) l->order[i] = i;
    struct mt_rng rng = mt_rng_make(l->options.seed, 0x64617461u + (uint64_t)at.epoch);
    if (l->options.shuffle) mt_rng_shuffle(&rng, l->order, n);
    l->order_epoch = at.epoch;
  }
  l->next.index += l->options.world;
  return mt_dataset_sample(l->data, l->order[at.index]);
}

static void finish(const struct mt_loader *l, struct mt_batch *b) {
  int multiple = l->options.pad_multiple;
  for (int i = 0; i < l->length_count; i++) {
    if (b->valid_count <= l->length[i]) {
      multiple = l->length[i];
      break;
    }
  }
  mt_batch_finish(b, multiple);
}

/* Valid tokens of the rows to come from the beginning on, as they will be packed. */
static void row_lengths(struct mt_loader *l, int *rows, int count) {
  for (int i = 0; i < count; i++) {
    rows[i] = 0;
    for (int k = 0; k < l->options.batch_size; k++) rows[i] += take(l).count;
  }
  l->next = (struct mt_position){0};
}

static int ascending(const void *a, const void *b) {
  return *(const int *)a - *(const int *)b;
}

/* The few of n ascending candidates, the last among them, that cost the least when each row is
 * padded to the next of them. rows[i]: how many rows are rounded up to candidate[i]. best[k][j]:
 * the cost of all rows up to j with k + 1 lengths of which j is the largest. */
static mt_err best_lengths(struct mt_loader *l, const int *candidate, const int *rows, int n) {
  int most = l->options.lengths < n ? l->options.lengths : n;
  size_t cells = (size_t)most * (size_t)n;
  double *best = calloc(cells, sizeof *best), *sum = calloc((size_t)n + 1, sizeof *sum);
  int *from = calloc(cells, sizeof *from), *count = calloc((size_t)n + 1, sizeof *count);
  mt_err err = best && sum && from && count ? MT_OK : mt_fail(MT_ENOMEM, "lengths of rows");
  for (int i = 0; !err && i < n; i++) {
    count[i + 1] = count[i] + rows[i];
    sum[i + 1] = sum[i] + (double)rows[i] * candidate[i];
  }
  for (int k = 0; !err && k < most; k++) {
    for (int j = 0; j < n; j++) {
      double *cell = &best[k * n + j];
      *cell = k ? INFINITY : (double)count[j + 1] * candidate[j] - sum[j + 1];
      for (int i = k - 1; k && i < j; i++) {
        double cost = best[(k - 1) * n + i] + (double)(count[j + 1] - count[i + 1]) * candidate[j] -
                      (sum[j + 1] - sum[i + 1]);
        if (cost < *cell) *cell = cost, from[k * n + j] = i;
      }
    }
  }
  l->length_count = err ? 0 : most;
  for (int k = most - 1, j = n - 1; !err && k >= 0; j = from[k * n + j], k--) {
    l->length[k] = candidate[j];
  }
  free(best), free(sum), free(from), free(count);
  return err;
}

static mt_err choose_lengths(struct mt_loader *l) {
  enum { ROWS = 4096, CANDIDATES = 1024, STEP = 16 };
  int capacity = l->batch[0].token_capacity, pad = l->options.pad_multiple;
  /* Few enough to compare all, and the recipe's multiple. */
  int step = capacity / CANDIDATES > STEP ? capacity / CANDIDATES : STEP;
  step = (step + pad - 1) / pad * pad;
  int *row = calloc(3 * ROWS, sizeof *row), *candidate = row + ROWS, *rows = candidate + ROWS,
      n = 0;
  if (!row) return mt_fail(MT_ENOMEM, "lengths of rows");
  row_lengths(l, row, ROWS);
  qsort(row, ROWS, sizeof *row, ascending);
  for (int i = 0; i < ROWS; i++) {
    int length = (row[i] + step - 1) / step * step;
    if (length > capacity) length = capacity;
    if (n == 0 || candidate[n - 1] != length) candidate[n++] = length;
    rows[n - 1]++;
  }
  mt_err err = best_lengths(l, candidate, rows, n);
  free(row);
  return err;
}

mt_err mt_loader_create(struct mt_loader *l, const struct mt_dataset *d,
                        const struct mt_loader_options *options) {
  *l = (struct mt_loader){.options = *options, .data = d, .order_epoch = -1};
  if (options->batch_size < 1 || options->micro_batches < 1 || options->max_seq_length < 1 ||
      options->pad_multiple < 1 || options->lengths < 0 || options->lengths > MT_LENGTHS ||
      options->rank < 0 || options->rank >= options->world) {
    return mt_fail(MT_EINVAL, "batch size %d, %d micro-batches, %d tokens padded to %d, rank %d/%d",
                   options->batch_size, options->micro_batches, options->max_seq_length,
                   options->pad_multiple, options->rank, options->world);
  }
  int64_t samples = mt_dataset_stats(d).samples;
  int capacity = mt_loader_token_capacity(options);
  if (capacity < 0 || samples > UINT32_MAX) {
    return mt_fail(MT_EINVAL, "%d samples of %d tokens a batch are too many", options->batch_size,
                   options->max_seq_length);
  }
  if (samples < options->world) {
    return mt_fail(MT_EINVAL, "%lld samples for %d data-parallel ranks", (long long)samples,
                   options->world);
  }
  mt_err err = MT_ENOMEM;
  size_t micro = (size_t)options->micro_batches;
  l->order = calloc((size_t)samples, sizeof *l->order);
  l->batch = calloc(micro, sizeof *l->batch);
  l->list = calloc(micro, sizeof *l->list);
  if (!l->order || !l->batch || !l->list) {
    mt_fail(MT_ENOMEM, "order of %lld samples", (long long)samples);
    goto done;
  }
  for (size_t i = 0; i < micro; i++) {
    MT_GO(mt_batch_create(&l->batch[i], capacity, options->batch_size));
    l->list[i] = &l->batch[i];
  }
  err = options->lengths ? choose_lengths(l) : MT_OK;
done:
  if (err) mt_loader_destroy(l);
  return err;
}

void mt_loader_destroy(struct mt_loader *l) {
  for (int i = 0; l->batch && i < l->options.micro_batches; i++) mt_batch_destroy(&l->batch[i]);
  free(l->order);
  free(l->batch);
  free(l->list);
  *l = (struct mt_loader){0};
}

mt_err mt_loader_next(struct mt_loader *l) {
  for (int m = 0; m < l->options.micro_batches; m++) {
    mt_batch_begin(&l->batch[m]);
    for (int i = 0; i < l->options.batch_size; i++) {
      struct mt_sample s = take(l);
      MT_TRY(mt_batch_add(&l->batch[m], &s));
    }
    finish(l, &l->batch[m]);
  }
  return MT_OK;
}

mt_err mt_loader_next_once(struct mt_loader *l, struct mt_batch **out) {
  int64_t n = mt_dataset_stats(l->data).samples;
  *out = &l->batch[0];
  mt_batch_begin(*out);
  if (l->next.index >= n) return MT_EEND;
  for (int i = 0; i < l->options.batch_size && l->next.index < n; i++) {
    if (l->next.index + l->options.rank >= n) {
      l->next.index = n;
      break;
    }
    struct mt_sample s = take(l);
    MT_TRY(mt_batch_add(*out, &s));
  }
  finish(l, *out);
  /* Other ranks have some: padding joins them. */
  if ((*out)->sequence_count == 0) mt_batch_pad(*out, l->options.pad_multiple);
  return MT_OK;
}

int64_t mt_loader_steps_per_epoch(const struct mt_loader *l) {
  int64_t step = (int64_t)l->options.batch_size * l->options.micro_batches * l->options.world;
  return (mt_dataset_stats(l->data).samples + step - 1) / step;
}
