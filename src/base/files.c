#include "base/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static mt_err system_error(const char *what, const char *path) {
  int e = errno;
  return mt_fail(e == ENOENT ? MT_ENOENT : MT_EIO, "%s '%s': %s", what, path, strerror(e));
}

mt_err mt_path_join(char out[MT_PATH_MAX], const char *dir, const char *name) {
  int n = snprintf(out, MT_PATH_MAX, "%s/%s", dir, name);
  if (n >= 0 && n < MT_PATH_MAX) return MT_OK;
  return mt_fail(MT_EINVAL, "path too long: '%.100s.../%s'", dir, name);
}

bool mt_path_exists(const char *path) {
  return access(path, F_OK) == 0;
}

bool mt_path_is_dir(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static mt_err open_regular(const char *path, int *fd, size_t *size_bytes) {
  struct stat st;
  *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe nobody writes to: no waiting */
  if (*fd < 0) return system_error("cannot open", path);
  if (fstat(*fd, &st) != 0) {
    mt_err err = system_error("cannot stat", path);
    close(*fd);
    return err;
  }
  if (!S_ISREG(st.st_mode)) {
    close(*fd);
    return mt_fail(MT_EIO, "'%s' is not a regular file", path);
  }
  *size_bytes = (size_t)st.st_size;
  return MT_OK;
}

mt_err mt_file_read(const char *path, size_t limit_bytes, char **data, size_t *size_bytes) {
  int fd;
  size_t size, have = 0;
  *data = NULL;
  MT_TRY(open_regular(path, &fd, &size));
  mt_err err = MT_OK;
  char *buffer = NULL;
  if (size > limit_bytes) {
    err = mt_fail(MT_EFORMAT, "'%s' has %zu bytes, more than the %zu allowed", path, size,
                  limit_bytes);
    goto done;
  }
  buffer = malloc(size + 1);
  if (!buffer) {
    err = mt_fail(MT_ENOMEM, "'%s': %zu bytes", path, size);
    goto done;
  }
  while (have < size) {
    ssize_t n = read(fd, buffer + have, size - have);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      err = system_error("cannot read", path);
      goto done;
    }
    if (n == 0) break;
    have += (size_t)n;
  }
  buffer[have] = '\0';
  *data = buffer;
  *size_bytes = have;
  buffer = NULL;
done:
  free(buffer);
  close(fd);
  return err;
}

mt_err mt_map_open(const char *path, struct mt_map *map) {
  int fd;
  *map = (struct mt_map){0};
  MT_TRY(open_regular(path, &fd, &map->size_bytes));
  mt_err err = MT_OK;
  if (map->size_bytes) {
    void *p = mmap(NULL, map->size_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
      err = system_error("cannot map", path);
    else
      map->data = p;
  }
  close(fd);
  return err;
}

void mt_map_close(struct mt_map *map) {
  if (map->data) munmap((void *)(uintptr_t)map->data, map->size_bytes);
  *map = (struct mt_map){0};
}

void mt_map_forget(const void *data, size_t size_bytes) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  uintptr_t begin = ((uintptr_t)data + page - 1) / page * page;
  uintptr_t end = ((uintptr_t)data + size_bytes) / page * page;
  if (end > begin) (void)madvise((void *)begin, end - begin, MADV_DONTNEED);
}

mt_err mt_fd_write(int fd, const char *path, const void *data, size_t size_bytes) {
  const char *p = data;
  while (size_bytes > 0) {
    ssize_t n = write(fd, p, size_bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return system_error("cannot write", path);
    p += n;
    size_bytes -= (size_t)n;
  }
  return MT_OK;
}

mt_err mt_path_sync(const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return system_error("cannot open", path);
  mt_err err = fsync(fd) == 0 ? MT_OK : system_error("cannot sync", path);
  close(fd);
  return err;
}

/* The directory that holds path. */
static void parent_of(const char *path, char parent[MT_PATH_MAX]) {
  snprintf(parent, MT_PATH_MAX, "%s", path);
  char *slash = strrchr(parent, '/');
  if (slash)
    slash[slash == parent] = '\0';
  else
    snprintf(parent, MT_PATH_MAX, ".");
}

/* A rename is durable once the directory that holds path is synced. */
static mt_err sync_parent(const char *path) {
  char parent[MT_PATH_MAX];
  parent_of(path, parent);
  return mt_path_sync(parent);
}

/* mkdir, durable where the parent may be read; one that is there already is left as it is. */
static mt_err make_dir(const char *path) {
  char parent[MT_PATH_MAX];
  if (mkdir(path, 0777) != 0)
    return errno == EEXIST ? MT_OK : system_error("cannot create directory", path);
  parent_of(path, parent);
  return access(parent, R_OK) == 0 ? mt_path_sync(parent) : MT_OK;
}

mt_err mt_file_write_atomic(const char *path, const void *data, size_t size_bytes) {
  char temp[MT_PATH_MAX];
  int n = snprintf(temp, sizeof temp, "%s.tmp-%d", path, (int)getpid());
  if (n < 0 || n >= MT_PATH_MAX) return mt_fail(MT_EINVAL, "path too long: '%.200s'", path);
  int fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return system_error("cannot create", temp);
  mt_err err = mt_fd_write(fd, path, data, size_bytes);
  if (!err && fsync(fd) != 0) err = system_error("cannot sync", path);
  if (close(fd) != 0 && !err) err = system_error("cannot close", path);
  if (!err && rename(temp, path) != 0) err = system_error("cannot rename to", path);
  if (err) unlink(temp);
  return err ? err : sync_parent(path);
}

mt_err mt_file_copy(const char *from, const char *to) {
  struct mt_map map;
  MT_TRY(mt_map_open(from, &map));
  mt_err err = mt_file_write_atomic(to, map.data, map.size_bytes);
  mt_map_close(&map);
  return err;
}

mt_err mt_dir_create(const char *path) {
  char part[MT_PATH_MAX];
  if (strlen(path) >= sizeof part) return mt_fail(MT_EINVAL, "path too long: '%.200s'", path);
  for (size_t i = 0;; i++) {
    part[i] = path[i];
    if (i > 0 && (path[i] == '/' || path[i] == '\0')) {
      part[i] = '\0';
      MT_TRY(make_dir(part));
      part[i] = path[i];
    }
    if (path[i] == '\0') break;
  }
  if (mt_path_is_dir(path)) return MT_OK;
  return mt_fail(MT_EIO, "'%s' exists and is no directory", path);
}

mt_err mt_dir_remove(const char *path) {
  DIR *d = opendir(path);
  if (!d) return errno == ENOENT ? MT_OK : system_error("cannot open directory", path);
  mt_err err = MT_OK;
  for (struct dirent *e; !err && (e = readdir(d));) {
    char child[MT_PATH_MAX];
    struct stat st;
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    err = mt_path_join(child, path, e->d_name);
    if (err) break;
    if (lstat(child, &st) == 0 && S_ISDIR(st.st_mode))
      err = mt_dir_remove(child);
    else if (unlink(child) != 0)
      err = system_error("cannot remove", child);
  }
  closedir(d);
  if (!err && rmdir(path) != 0) err = system_error("cannot remove", path);
  return err;
}

mt_err mt_dir_begin(struct mt_dir_txn *t, const char *path) {
  *t = (struct mt_dir_txn){0};
  size_t length = strlen(path);
  while (length > 1 && path[length - 1] == '/') length--;
  int n = snprintf(t->temp, sizeof t->temp, "%.*s.tmp-%d", (int)length, path, (int)getpid());
  if (n < 0 || n >= MT_PATH_MAX) return mt_fail(MT_EINVAL, "path too long: '%.200s'", path);
  snprintf(t->path, sizeof t->path, "%.*s", (int)length, path);
  MT_TRY(mt_dir_remove(t->temp));
  MT_TRY(mt_dir_create(t->temp));
  t->open = true;
  return MT_OK;
}

mt_err mt_dir_commit(struct mt_dir_txn *t) {
  mt_err err = mt_path_sync(t->temp);
  if (!err && rename(t->temp, t->path) != 0) {
    /* A directory that is not empty stands there: exchange the two names in one step. */
    if (renameat2(AT_FDCWD, t->temp, AT_FDCWD, t->path, RENAME_EXCHANGE) == 0) {
      /* Should the power fail, the old one must not be found without its files. */
      err = sync_parent(t->path);
      if (!err) err = mt_dir_remove(t->temp);
    } else {
      err = system_error("cannot rename to", t->path);
    }
  }
  if (err) {
    mt_dir_abort(t);
    return err;
  }
  t->open = false;
  return sync_parent(t->path);
}

void mt_dir_abort(struct mt_dir_txn *t) {
  if (t->open) (void)mt_dir_remove(t->temp);
  t->open = false;
}
