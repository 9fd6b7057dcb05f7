/* The safetensors format: 8 bytes of little-endian header length, a JSON header, then the tensors'
 * bytes without gaps (https://huggingface.co/docs/safetensors, "Format"). Files are untrusted. */
#ifndef MT_IO_SAFETENSORS_H
#define MT_IO_SAFETENSORS_H

#include "base/dtype.h"
#include "base/files.h"

enum { MT_ST_MAX_RANK = 8 };

struct mt_st_tensor {
  char *name;
  enum mt_dtype dtype; /* MT_DTYPE_COUNT: one we do not compute with */
  char dtype_name[16]; /* as the file spells it */
  int rank;
  int64_t dim[MT_ST_MAX_RANK];
  const uint8_t *data; /* into the mapping */
  size_t size_bytes;
};

struct mt_st_file {
  char *path; /* for messages */
  struct mt_map map;
  struct mt_st_tensor *tensor; /* sorted by name */
  size_t count;
};

/* Maps a file and reads its header. Refused (MT_EFORMAT naming file and tensor): truncated, header
 * over 100 MB or past the end, bad JSON, duplicate keys, offsets outside, overlapping or leaving
 * holes, sizes that do not match shape and dtype. */
mt_err mt_st_open(const char *path, struct mt_st_file *file);
/* The same on memory that outlives `file`; name is for messages. */
mt_err mt_st_parse(const uint8_t *data, size_t size_bytes, const char *name,
                   struct mt_st_file *file);
void mt_st_close(struct mt_st_file *file);
/* NULL when absent. */
const struct mt_st_tensor *mt_st_find(const struct mt_st_file *file, const char *name);

/* Writing: declare every tensor, then stream their bytes in that order. */
struct mt_st_entry {
  const char *name;
  const char *dtype_name;
  int rank;
  int64_t dim[MT_ST_MAX_RANK];
  size_t size_bytes;
};

struct mt_st_writer {
  char path[MT_PATH_MAX], temp[MT_PATH_MAX];
  int fd; /* -1 when closed */
  size_t expected_bytes, written_bytes;
};

/* Creates the temporary file and writes the header; the metadata is {"format": "pt"}, which
 * transformers asks for. */
mt_err mt_st_create(struct mt_st_writer *w, const char *path, const struct mt_st_entry *entries,
                    size_t count);
mt_err mt_st_write(struct mt_st_writer *w, const void *data, size_t size_bytes);
/* Checks that all declared bytes came, fsyncs and renames into place. */
mt_err mt_st_finish(struct mt_st_writer *w);
/* Removes what was written; safe after finish. */
void mt_st_abort(struct mt_st_writer *w);

#endif
