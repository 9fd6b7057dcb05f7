/* Packing samples into rows, and the order in which they come. */
#include <limits.h>
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

void mt_batch_finish(struct mt_batch *b, int pad_multiple) {
  int padded = (b->valid_count + pad_multiple - 1) / pad_multiple * pad_multiple;
  if (padded > b->token_capacity) padded = b->token_capacity;
  for (int i = b->valid_count; i < padded; i++) {
    b->ids[i] = b->positions[i] = 0;
    b->labels[i] = MT_IGNORE;
  }
  b->token_count = padded;
}

int mt_loader_token_capacity(const struct mt_loader_options *o) {
  int64_t tokens = (int64_t)o->batch_size * o->max_seq_length;
  tokens = (tokens + o->pad_multiple - 1) / o->pad_multiple * o->pad_multiple;
  return tokens > INT_MAX ? -1 : (int)tokens;
}

mt_err mt_loader_create(struct mt_loader *l, const struct mt_dataset *d,
                        const struct mt_loader_options *options) {
  *l = (struct mt_loader){.options = *options, .data = d, .order_epoch = -1};
  if (options->batch_size < 1 || options->micro_batches < 1 || options->max_seq_length < 1 ||
      options->pad_multiple < 1 || options->rank < 0 || options->rank >= options->world) {
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
  err = MT_OK;
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

/* Samples of an epoch that are this rank's: a world's last incomplete round is left out, so that
 * all ranks have the same number. */
static int64_t share(const struct mt_loader *l) {
  return mt_dataset_stats(l->data).samples / l->options.world;
}

static struct mt_sample take(struct mt_loader *l) {
  uint32_t n = (uint32_t)mt_dataset_stats(l->data).samples;
  if (l->next.index >= share(l)) l->next = (struct mt_position){l->next.epoch + 1, 0};
  if (l->order_epoch != l->next.epoch) {
    for (uint32_t i = 0; i < n; i++) l->order[i] = i;
    struct mt_rng rng = mt_rng_make(l->options.seed, 0x64617461u + (uint64_t)l->next.epoch);
    if (l->options.shuffle) mt_rng_shuffle(&rng, l->order, n);
    l->order_epoch = l->next.epoch;
  }
  int64_t i = l->next.index++ * l->options.world + l->options.rank;
  return mt_dataset_sample(l->data, l->order[i]);
}

mt_err mt_loader_next(struct mt_loader *l) {
  for (int m = 0; m < l->options.micro_batches; m++) {
    mt_batch_begin(&l->batch[m]);
    for (int i = 0; i < l->options.batch_size; i++) {
      struct mt_sample s = take(l);
      MT_TRY(mt_batch_add(&l->batch[m], &s));
    }
    mt_batch_finish(&l->batch[m], l->options.pad_multiple);
  }
  return MT_OK;
}

mt_err mt_loader_next_once(struct mt_loader *l, struct mt_batch **out) {
  *out = &l->batch[0];
  mt_batch_begin(*out);
  for (int i = 0; i < l->options.batch_size && l->next.index < share(l); i++) {
    struct mt_sample s = take(l);
    MT_TRY(mt_batch_add(*out, &s));
  }
  mt_batch_finish(*out, l->options.pad_multiple);
  return (*out)->sequence_count > 0 ? MT_OK : MT_EEND;
}

int64_t mt_loader_steps_per_epoch(const struct mt_loader *l) {
  int64_t step = (int64_t)l->options.batch_size * l->options.micro_batches;
  return (share(l) + step - 1) / step;
}
