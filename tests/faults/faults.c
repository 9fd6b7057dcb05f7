/* Preloaded into the program: makes its N-th allocation or its N-th file call fail. Told by the
 * environment:
 *   FAULTS_DIR=DIR       files below this directory count, and memory files; others are left alone
 *   FAULTS_MEMORY=N      allocation N fails; FAULTS_STICKY=1: and all later ones
 *   FAULTS_FILE=N        file call N goes wrong (sticky likewise), as FAULTS_KIND says:
 *     space, io, readonly  it fails with ENOSPC, EIO, EROFS
 *     short                it reads or writes half of what was asked, which is no error
 *     kill, torn           the process is killed before the call, or half-way through a write
 *     slow                 not one but every call takes half a ms and reads or writes by halves
 *   FAULTS_LEAK=1        a block of memory is lost, to see that this is noticed
 *   FAULTS_COUNTS=FILE   at its end: the number of allocations and of file calls
 *   FAULTS_TRACE=FILE    what was done to the files, see trace.h
 * Standard output and error are nobody's files here. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "trace.h"

enum kind { NONE, SPACE, IO, READONLY, SHORT, KILL, TORN, SLOW };
enum { MAX_FD = 4096 };

static const char *below_dir, *counts_path;
static long memory_at, file_at;
static enum kind kind;
static bool sticky, ready;
static atomic_long memory_calls, file_calls;
static atomic_bool watched[MAX_FD], written[MAX_FD]; /* written: since its last TRACE_CONTENT */
static int trace_fd = -1;

#define NEXT(name)                                                                                 \
  static __typeof__(name) *next_##name;                                                            \
  if (!next_##name) next_##name = (__typeof__(name) *)(uintptr_t)dlsym(RTLD_NEXT, #name)

static long env_number(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

__attribute__((constructor)) static void begin(void) {
  static const char *const kinds[] = {"",      "space", "io",   "readonly",
                                      "short", "kill",  "torn", "slow"};
  const char *text = getenv("FAULTS_KIND");
  for (int i = 0; text && i < 8; i++) {
    if (strcmp(text, kinds[i]) == 0) kind = (enum kind)i;
  }
  below_dir = getenv("FAULTS_DIR");
  counts_path = getenv("FAULTS_COUNTS");
  memory_at = env_number("FAULTS_MEMORY");
  file_at = env_number("FAULTS_FILE");
  sticky = env_number("FAULTS_STICKY") != 0;
  const char *trace = getenv("FAULTS_TRACE");
  if (trace)
    trace_fd =
        (int)syscall(SYS_openat, AT_FDCWD, trace, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (env_number("FAULTS_LEAK")) {
    char *volatile lost = malloc(77);
    if (lost) lost[0] = 0;
    lost = NULL;
  }
  ready = true;
}

__attribute__((destructor)) static void end(void) {
  long memory = memory_calls, files = file_calls;
  ready = false;
  if (!counts_path) return;
  FILE *f = fopen(counts_path, "w");
  if (!f) return;
  fprintf(f, "%ld %ld\n", memory, files);
  fclose(f);
}

/* ---- memory ---- */

static bool memory_fails(void) {
  if (!ready) return false;
  long n = ++memory_calls;
  if (!memory_at || (sticky ? n < memory_at : n != memory_at)) return false;
  errno = ENOMEM;
  return true;
}

/* What dlsym itself asks for before the real functions are known. */
static char early[1 << 16];
static size_t early_used;

static void *early_take(size_t size) {
  void *p = early + early_used;
  early_used += (size + 15) / 16 * 16;
  return early_used <= sizeof early ? p : NULL;
}

static bool is_early(const void *p) {
  return (const char *)p >= early && (const char *)p < early + sizeof early;
}

static struct {
  void *(*malloc)(size_t);
  void *(*calloc)(size_t, size_t);
  void *(*realloc)(void *, size_t);
  void (*free)(void *);
  int (*posix_memalign)(void **, size_t, size_t);
  void *(*aligned_alloc)(size_t, size_t);
} real;

static void *find(const char *name) {
  return dlsym(RTLD_NEXT, name);
}

/* False while it is called by what it calls: the first call of all is before any thread. */
static bool known(void) {
  static bool inside, done;
  if (done) return true;
  if (inside) return false;
  inside = true;
  real.malloc = (void *(*)(size_t))(uintptr_t)find("malloc");
  real.calloc = (void *(*)(size_t, size_t))(uintptr_t)find("calloc");
  real.realloc = (void *(*)(void *, size_t))(uintptr_t)find("realloc");
  real.free = (void (*)(void *))(uintptr_t)find("free");
  real.posix_memalign = (int (*)(void **, size_t, size_t))(uintptr_t)find("posix_memalign");
  real.aligned_alloc = (void *(*)(size_t, size_t))(uintptr_t)find("aligned_alloc");
  return done = true;
}

void *malloc(size_t size) {
  if (!known()) return early_take(size);
  return memory_fails() ? NULL : real.malloc(size);
}

void *calloc(size_t count, size_t size) {
  if (!known()) return early_take(count * size);
  return memory_fails() ? NULL : real.calloc(count, size);
}

void *realloc(void *old, size_t size) {
  if (old && is_early(old)) {
    void *p = malloc(size);
    size_t behind = (size_t)(early + sizeof early - (char *)old);
    if (p) memcpy(p, old, size < behind ? size : behind);
    return p;
  }
  if (!known()) return early_take(size);
  return memory_fails() ? NULL : real.realloc(old, size);
}

void free(void *p) {
  if (known() && !is_early(p)) real.free(p);
}

int posix_memalign(void **out, size_t align, size_t size) {
  return !known() || memory_fails() ? ENOMEM : real.posix_memalign(out, align, size);
}

void *aligned_alloc(size_t align, size_t size) {
  return !known() || memory_fails() ? NULL : real.aligned_alloc(align, size);
}

/* ---- trace ---- */

static void put(const void *data, size_t size) {
  for (const char *p = data; size > 0;) {
    long n = syscall(SYS_write, trace_fd, p, size);
    if (n <= 0) abort(); /* half a trace says something else */
    p += n;
    size -= (size_t)n;
  }
}

static void trace(struct trace_record r, const char *a, const char *b, const void *data) {
  static atomic_flag busy = ATOMIC_FLAG_INIT;
  struct stat err;
  int why = errno;
  if (trace_fd < 0) return;
  r.a_length = a ? (uint32_t)strlen(a) : 0;
  r.b_length = b ? (uint32_t)strlen(b) : 0;
  while (atomic_flag_test_and_set(&busy)) continue;
  r.told = fstat(2, &err) == 0 ? err.st_size : 0;
  put(&r, sizeof r);
  put(a, r.a_length);
  put(b, r.b_length);
  put(data, r.data_length);
  atomic_flag_clear(&busy);
  errno = why;
}

static void trace_path(enum trace_kind what, const char *a, const char *b) {
  trace((struct trace_record){.kind = what}, a, b, NULL);
}

/* All of a file, whatever its descriptor is open for. */
static void trace_content(int fd) {
  char path[64];
  struct stat st;
  if (trace_fd < 0 || !written[fd]) return;
  written[fd] = false;
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int from = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (from < 0 || fstat(from, &st) != 0) abort();
  size_t size = (size_t)st.st_size;
  char *data = real.malloc(size + 1);
  if (!data || (size_t)syscall(SYS_pread64, from, data, size, 0) != size) abort();
  trace((struct trace_record){.kind = TRACE_CONTENT, .fd = fd, .data_length = (uint32_t)size}, NULL,
        NULL, data);
  real.free(data);
  syscall(SYS_close, from);
}

static void trace_close(int fd) {
  trace_content(fd);
  trace((struct trace_record){.kind = TRACE_CLOSE, .fd = fd}, NULL, NULL, NULL);
}

/* ---- files ---- */

static bool below(const char *path) {
  return ready && below_dir && path && strncmp(path, below_dir, strlen(below_dir)) == 0;
}

static bool seen(int fd) {
  return ready && fd >= 0 && fd < MAX_FD && watched[fd];
}

static int watch(int fd, const char *path, int flags) {
  if (fd < 0 || fd >= MAX_FD) return fd;
  watched[fd] = true;
  written[fd] = (flags & (O_CREAT | O_TRUNC)) != 0;
  if (path)
    trace((struct trace_record){.kind = TRACE_OPEN, .fd = fd, .flags = flags}, path, NULL, NULL);
  return fd;
}

/* Counts a call. False: it is not to happen, errno says why. *half: it is to do half its work. */
static bool goes_on(bool can_be_short, bool *half) {
  long n = ++file_calls;
  *half = false;
  if (kind == SLOW) {
    nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    *half = can_be_short;
    return true;
  }
  if (!file_at || (sticky ? n < file_at : n != file_at)) return true;
  if (kind == KILL || (kind == TORN && !can_be_short)) raise(SIGKILL);
  if (kind == SHORT || kind == TORN) {
    *half = can_be_short;
    return true;
  }
  errno = kind == SPACE ? ENOSPC : kind == READONLY ? EROFS : EIO;
  return false;
}

static bool whole_call_goes_on(void) {
  bool half;
  return goes_on(false, &half);
}

static size_t part(size_t size, bool half) {
  return half && size > 1 ? size / 2 : size;
}

#define MODE(flags)                                                                                \
  mode_t mode = 0;                                                                                 \
  if (flags & (O_CREAT | __O_TMPFILE)) {                                                           \
    va_list ap;                                                                                    \
    va_start(ap, flags);                                                                           \
    mode = va_arg(ap, mode_t);                                                                     \
    va_end(ap);                                                                                    \
  }

int open(const char *path, int flags, ...) {
  NEXT(open);
  MODE(flags)
  if (!below(path)) return next_open(path, flags, mode);
  return whole_call_goes_on() ? watch(next_open(path, flags, mode), path, flags) : -1;
}

int open64(const char *path, int flags, ...) {
  MODE(flags)
  return open(path, flags, mode);
}

int mkostemp(char *path, int flags) {
  NEXT(mkostemp);
  if (!below(path)) return next_mkostemp(path, flags);
  return whole_call_goes_on() ? watch(next_mkostemp(path, flags), path, flags | O_CREAT) : -1;
}

int memfd_create(const char *name, unsigned flags) {
  NEXT(memfd_create);
  return whole_call_goes_on() ? watch(next_memfd_create(name, flags), NULL, 0) : -1;
}

int close(int fd) {
  NEXT(close);
  if (!seen(fd)) return next_close(fd);
  watched[fd] = false;
  bool good = whole_call_goes_on();
  trace_close(fd);
  int why = errno, status = next_close(fd);
  if (good) return status;
  errno = why;
  return -1;
}

ssize_t read(int fd, void *data, size_t size) {
  NEXT(read);
  bool half = false;
  if (seen(fd) && !goes_on(true, &half)) return -1;
  return next_read(fd, data, part(size, half));
}

ssize_t pread(int fd, void *data, size_t size, off_t at) {
  NEXT(pread);
  bool half = false;
  if (seen(fd) && !goes_on(true, &half)) return -1;
  return next_pread(fd, data, part(size, half), at);
}

ssize_t write(int fd, const void *data, size_t size) {
  NEXT(write);
  bool half = false;
  if (seen(fd) && !goes_on(true, &half)) return -1;
  if (seen(fd)) written[fd] = true;
  ssize_t n = next_write(fd, data, part(size, half));
  if (half && kind == TORN) raise(SIGKILL);
  return n;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  NEXT(pwrite);
  bool half = false;
  if (seen(fd) && !goes_on(true, &half)) return -1;
  if (seen(fd)) written[fd] = true;
  ssize_t n = next_pwrite(fd, data, part(size, half), at);
  if (half && kind == TORN) raise(SIGKILL);
  return n;
}

int fsync(int fd) {
  NEXT(fsync);
  if (!seen(fd)) return next_fsync(fd);
  if (!whole_call_goes_on()) return -1;
  trace_content(fd);
  trace((struct trace_record){.kind = TRACE_SYNC, .fd = fd}, NULL, NULL, NULL);
  return next_fsync(fd);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
  NEXT(mmap);
  if (seen(fd) && !whole_call_goes_on()) return MAP_FAILED;
  return next_mmap(at, size, protection, flags, fd, offset);
}

int rename(const char *from, const char *to) {
  NEXT(rename);
  if (below(to) && !whole_call_goes_on()) return -1;
  int status = next_rename(from, to);
  if (below(to) && status == 0) trace_path(TRACE_RENAME, from, to);
  return status;
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
  NEXT(renameat2);
  if (below(to) && !whole_call_goes_on()) return -1;
  int status = next_renameat2(from_dir, from, to_dir, to, flags);
  if (below(to) && status == 0)
    trace_path(flags & RENAME_EXCHANGE ? TRACE_EXCHANGE : TRACE_RENAME, from, to);
  return status;
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
  NEXT(linkat);
  if (below(to) && !whole_call_goes_on()) return -1;
  int status = next_linkat(from_dir, from, to_dir, to, flags);
  if (below(to) && status == 0) trace_path(TRACE_LINK, from, to);
  return status;
}

#define PATH_CALL(name, declaration, arguments, kind)                                              \
  int name declaration {                                                                           \
    NEXT(name);                                                                                    \
    if (!below(path)) return next_##name arguments;                                                \
    if (!whole_call_goes_on()) return -1;                                                          \
    int status = next_##name arguments;                                                            \
    if (status == 0) trace_path(kind, path, NULL);                                                 \
    return status;                                                                                 \
  }
PATH_CALL(unlink, (const char *path), (path), TRACE_UNLINK)
PATH_CALL(mkdir, (const char *path, mode_t mode), (path, mode), TRACE_MKDIR)
PATH_CALL(rmdir, (const char *path), (path), TRACE_UNLINK)

DIR *opendir(const char *path) {
  NEXT(opendir);
  return below(path) && !whole_call_goes_on() ? NULL : next_opendir(path);
}

/* stdio calls the system from within the C library: its own calls are taken instead. */
static FILE *stream_open(FILE *f, const char *path, const char *mode) {
  int flags = *mode == 'w' ? O_WRONLY | O_CREAT | O_TRUNC : *mode == 'a' ? O_WRONLY | O_CREAT : 0;
  if (f) watch(fileno(f), path, flags);
  return f;
}

FILE *fopen(const char *path, const char *mode) {
  NEXT(fopen);
  if (!below(path)) return next_fopen(path, mode);
  return whole_call_goes_on() ? stream_open(next_fopen(path, mode), path, mode) : NULL;
}

static int stream_fails(FILE *f) {
  f->_flags |= 0x20; /* glibc's _IO_ERR_SEEN: what ferror looks at */
  return EOF;
}

int fflush(FILE *f) {
  NEXT(fflush);
  if (!f || !seen(fileno(f))) return next_fflush(f);
  if (!whole_call_goes_on()) return stream_fails(f);
  int status = next_fflush(f);
  written[fileno(f)] = true;
  trace_content(fileno(f));
  return status;
}

int fclose(FILE *f) {
  NEXT(fclose);
  int fd = fileno(f);
  if (!seen(fd)) return next_fclose(f);
  watched[fd] = false;
  bool good = whole_call_goes_on();
  if (trace_fd >= 0) {
    NEXT(fflush);
    written[fd] |= __fwriting(f) != 0;
    next_fflush(f);
    trace_close(fd);
  }
  int why = errno, status = next_fclose(f);
  if (good) return status;
  errno = why;
  return EOF;
}

ssize_t getline(char **line, size_t *capacity, FILE *f) {
  NEXT(getline);
  if (!seen(fileno(f)) || whole_call_goes_on()) return next_getline(line, capacity, f);
  return stream_fails(f);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *f) {
  NEXT(fwrite);
  if (!seen(fileno(f)) || whole_call_goes_on()) return next_fwrite(data, size, count, f);
  stream_fails(f);
  return 0;
}
