/* TensorBoard event files: records (length and content, each with a masked CRC-32C) of Event
 * protocol buffers, as TensorFlow's tfrecord and event.proto define them. */
#ifndef MT_TRAIN_TENSORBOARD_H
#define MT_TRAIN_TENSORBOARD_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"

enum { MT_TB_EVENT_MAX = 1 << 17 };

struct mt_tensorboard {
  FILE *file;     /* NULL: nothing is written, every call below succeeds */
  uint8_t *event; /* the one being built, [MT_TB_EVENT_MAX] */
  size_t used;
};

/* Creates DIR/events.out.tfevents.SECONDS.HOST.PID and tells readers to drop what older files there
 * say of the steps after first_step (0: of all). Errors: MT_EIO naming the path; MT_ENOMEM. */
mt_err mt_tensorboard_open(struct mt_tensorboard *t, const char *dir, int64_t first_step);
/* One event: begin, any number of values, end. What exceeds MT_TB_EVENT_MAX is left out, values
 * that are not finite are written as they are. Allocates nothing. */
void mt_tensorboard_begin(struct mt_tensorboard *t, int64_t step);
void mt_tensorboard_scalar(struct mt_tensorboard *t, const char *tag, double value);
/* A text of the text dashboard (Markdown). */
void mt_tensorboard_text(struct mt_tensorboard *t, const char *tag, const char *text);
/* Errors: MT_EIO (disk full). */
mt_err mt_tensorboard_end(struct mt_tensorboard *t);
void mt_tensorboard_close(struct mt_tensorboard *t);

/* CRC-32C (Castagnoli; RFC 3720, appendix B.4), and as tfrecord masks it: rotated right by 15, plus
 * 0xa282ead8. */
uint32_t mt_crc32c(const void *data, size_t size_bytes);
uint32_t mt_crc32c_masked(const void *data, size_t size_bytes);

#endif
