#include "train/tensorboard.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/files.h"

uint32_t mt_crc32c(const void *data, size_t size_bytes) {
  const uint8_t *p = data;
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size_bytes; i++) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

uint32_t mt_crc32c_masked(const void *data, size_t size_bytes) {
  uint32_t crc = mt_crc32c(data, size_bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

/* Protocol buffers: a field's key is its number and wire type; lengths come before contents. */
enum wire { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };
/* event.proto, summary.proto, tensor.proto. */
enum {
  EVENT_WALL_TIME = 1,
  EVENT_STEP = 2,
  EVENT_FILE_VERSION = 3,
  EVENT_SUMMARY = 5,
  EVENT_SESSION_LOG = 7,
  SESSION_LOG_STATUS = 1,
  SESSION_LOG_START = 1,
  SUMMARY_VALUE = 1,
  VALUE_TAG = 1,
  VALUE_SIMPLE = 2,
  VALUE_TENSOR = 8,
  VALUE_METADATA = 9,
  METADATA_PLUGIN = 1,
  PLUGIN_NAME = 1,
  TENSOR_DTYPE = 1,
  TENSOR_SHAPE = 2,
  TENSOR_STRING = 8,
  DT_STRING = 7
};

static size_t varint(uint8_t *out, uint64_t x) {
  size_t n = 0;
  for (; x >= 0x80; x >>= 7) out[n++] = (uint8_t)(x | 0x80);
  out[n++] = (uint8_t)x;
  return n;
}

static size_t varint_size(uint64_t x) {
  size_t n = 1;
  for (; x >= 0x80; x >>= 7) n++;
  return n;
}

static void little(uint8_t *out, uint64_t x, int bytes) {
  for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(x >> 8 * i);
}

static void put(struct mt_tensorboard *t, const void *data, size_t size) {
  memcpy(t->event + t->used, data, size);
  t->used += size;
}

static void put_key(struct mt_tensorboard *t, int field, enum wire wire) {
  t->used += varint(t->event + t->used, (uint64_t)field << 3 | wire);
}

static void put_varint(struct mt_tensorboard *t, int field, uint64_t x) {
  put_key(t, field, VARINT);
  t->used += varint(t->event + t->used, x);
}

static void put_bytes(struct mt_tensorboard *t, int field, const void *data, size_t size) {
  put_key(t, field, BYTES);
  t->used += varint(t->event + t->used, size);
  if (data) put(t, data, size); /* NULL: the caller writes them behind */
}

static size_t bytes_size(size_t size) { /* of a field with a number below 16 */
  return 1 + varint_size(size) + size;
}

static bool fits(const struct mt_tensorboard *t, size_t size) {
  return t->file && size <= MT_TB_EVENT_MAX - t->used;
}

static mt_err write_record(struct mt_tensorboard *t) {
  uint8_t head[12], tail[4];
  little(head, t->used, 8);
  little(head + 8, mt_crc32c_masked(head, 8), 4);
  little(tail, mt_crc32c_masked(t->event, t->used), 4);
  fwrite(head, 1, sizeof head, t->file);
  fwrite(t->event, 1, t->used, t->file);
  fwrite(tail, 1, sizeof tail, t->file);
  if (fflush(t->file) == 0 && !ferror(t->file)) return MT_OK;
  return mt_fail(MT_EIO, "cannot write TensorBoard's events: %s", strerror(errno));
}

void mt_tensorboard_begin(struct mt_tensorboard *t, int64_t step) {
  struct timespec now;
  uint8_t time_bits[8];
  uint64_t bits;
  if (!t->file) return;
  clock_gettime(CLOCK_REALTIME, &now);
  double seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
  memcpy(&bits, &seconds, 8);
  little(time_bits, bits, 8);
  t->used = 0;
  put_key(t, EVENT_WALL_TIME, FIXED64);
  put(t, time_bits, 8);
  if (step) put_varint(t, EVENT_STEP, (uint64_t)step);
}

/* An event's summary may come in parts: protocol buffers merge them, so each value is one. */
static void put_summary_value(struct mt_tensorboard *t, const char *tag, size_t rest) {
  size_t tag_size = strlen(tag), size = bytes_size(tag_size) + rest;
  put_bytes(t, EVENT_SUMMARY, NULL, bytes_size(size));
  put_bytes(t, SUMMARY_VALUE, NULL, size);
  put_bytes(t, VALUE_TAG, tag, tag_size);
}

enum { VALUE_ROOM = 64 }; /* keys and lengths of a value, and its small parts */

void mt_tensorboard_scalar(struct mt_tensorboard *t, const char *tag, double value) {
  float x = (float)value;
  uint32_t bits;
  uint8_t raw[4];
  if (!fits(t, strlen(tag) + VALUE_ROOM)) return;
  memcpy(&bits, &x, 4);
  little(raw, bits, 4);
  put_summary_value(t, tag, 1 + 4);
  put_key(t, VALUE_SIMPLE, FIXED32);
  put(t, raw, 4);
}

void mt_tensorboard_text(struct mt_tensorboard *t, const char *tag, const char *text) {
  static const char plugin[] = "text";
  size_t text_size = strlen(text), name = bytes_size(sizeof plugin - 1);
  size_t metadata = bytes_size(name), tensor = 2 + 2 + bytes_size(text_size);
  if (!fits(t, strlen(tag) + text_size + 2 * VALUE_ROOM)) return;
  put_summary_value(t, tag, bytes_size(tensor) + bytes_size(metadata));
  put_bytes(t, VALUE_TENSOR, NULL, tensor);
  put_varint(t, TENSOR_DTYPE, DT_STRING);
  put_bytes(t, TENSOR_SHAPE, "", 0); /* a scalar */
  put_bytes(t, TENSOR_STRING, text, text_size);
  put_bytes(t, VALUE_METADATA, NULL, metadata);
  put_bytes(t, METADATA_PLUGIN, NULL, name);
  put_bytes(t, PLUGIN_NAME, plugin, sizeof plugin - 1);
}

mt_err mt_tensorboard_end(struct mt_tensorboard *t) {
  return t->file ? write_record(t) : MT_OK;
}

static mt_err write_opening(struct mt_tensorboard *t, int64_t first_step) {
  static const char version[] = "brain.Event:2";
  mt_tensorboard_begin(t, 0);
  put_bytes(t, EVENT_FILE_VERSION, version, sizeof version - 1);
  MT_TRY(write_record(t));
  mt_tensorboard_begin(t, first_step > 0 ? first_step + 1 : 0);
  put_bytes(t, EVENT_SESSION_LOG, NULL, 2);
  put_varint(t, SESSION_LOG_STATUS, SESSION_LOG_START);
  return write_record(t);
}

mt_err mt_tensorboard_open(struct mt_tensorboard *t, const char *dir, int64_t first_step) {
  char host[128] = "host", name[256], path[MT_PATH_MAX];
  *t = (struct mt_tensorboard){0};
  if (gethostname(host, sizeof host - 1) != 0 || strchr(host, '/'))
    snprintf(host, sizeof host, "host");
  snprintf(name, sizeof name, "events.out.tfevents.%010lld.%s.%d", (long long)time(NULL), host,
           (int)getpid());
  MT_TRY(mt_path_join(path, dir, name));
  t->event = malloc(MT_TB_EVENT_MAX);
  if (!t->event) return mt_fail(MT_ENOMEM, "TensorBoard's events");
  t->file = fopen(path, "wbe");
  mt_err err = t->file ? write_opening(t, first_step)
                       : mt_fail(MT_EIO, "cannot write '%s': %s", path, strerror(errno));
  if (err) mt_tensorboard_close(t);
  return err;
}

void mt_tensorboard_close(struct mt_tensorboard *t) {
  if (t->file) fclose(t->file);
  free(t->event);
  *t = (struct mt_tensorboard){0};
}
