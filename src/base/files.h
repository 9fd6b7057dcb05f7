/* Files as a whole: mapped, read, copied, and written so that a reader sees the old one or the new
 * one, never a part. */
#ifndef MT_BASE_FILES_H
#define MT_BASE_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

enum { MT_PATH_MAX = 4096 };

/* dir + "/" + name in out[MT_PATH_MAX]. Errors: MT_EINVAL when it does not fit. */
mt_err mt_path_join(char out[MT_PATH_MAX], const char *dir, const char *name);
bool mt_path_exists(const char *path);
bool mt_path_is_dir(const char *path);

/* The whole file and a terminating 0 byte that size_bytes does not count; freed by the caller.
 * Errors: MT_ENOENT, MT_EIO, MT_EFORMAT when larger than limit_bytes; all name the path. */
mt_err mt_file_read(const char *path, size_t limit_bytes, char **data, size_t *size_bytes);

/* A file mapped read-only. An empty file has data NULL. */
struct mt_map {
  const uint8_t *data;
  size_t size_bytes;
};
mt_err mt_map_open(const char *path, struct mt_map *map);
void mt_map_close(struct mt_map *map);
/* Tells the kernel that [data, data+size) will not be needed again: its pages need not stay. */
void mt_map_forget(const void *data, size_t size_bytes);

/* Writes, fsyncs and renames over path; an existing file stays whole until then.
 * Errors: MT_EIO naming the path and the system's reason. */
mt_err mt_file_write_atomic(const char *path, const void *data, size_t size_bytes);
mt_err mt_file_copy(const char *from, const char *to); /* atomic likewise */

/* Creates a directory and its parents. */
mt_err mt_dir_create(const char *path);
/* Removes a directory with the plain files and directories in it; absent is no error. */
mt_err mt_dir_remove(const char *path);

/* A directory that appears whole: fill `temp`, then commit renames it to `path`, exchanging with an
 * existing one in one step and removing that afterwards. abort removes temp; both are safe twice.
 */
struct mt_dir_txn {
  char path[MT_PATH_MAX], temp[MT_PATH_MAX];
  bool open;
};
mt_err mt_dir_begin(struct mt_dir_txn *t, const char *path);
mt_err mt_dir_commit(struct mt_dir_txn *t);
void mt_dir_abort(struct mt_dir_txn *t);

/* fsync of a file or directory by path. */
mt_err mt_path_sync(const char *path);

/* write(2) until all is written. */
mt_err mt_fd_write(int fd, const char *path, const void *data, size_t size_bytes);

#endif
