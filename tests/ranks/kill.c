/* Preloaded into ranks: RANKS_KILL=RANK,CALL,N,HOW kills rank RANK (HOW: KILL), stops it (STOP) or
 * lets the call fail (FAIL, of fsync and MPI_Ialltoallv) at its Nth call of a function;
 * RANKS_COUNT=DIR writes each rank's numbers of calls to DIR/count-RANK at its end;
 * RANKS_SLOW=RANK,NAME lets rank RANK take five seconds to open a file NAME for the first time. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <mpi.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CALLS(X) X(MPI_Ialltoallv) X(MPI_Iallgatherv) X(MPI_Isend) X(fsync)
enum call {
#define X(name) CALL_##name,
  CALLS(X)
#undef X
      CALL_COUNT
};
static const char *const names[] = {
#define X(name) #name,
    CALLS(X)
#undef X
};
static long count[CALL_COUNT];

/* Whether the call is to fail. */
static int note(enum call call) {
  const char *ask = getenv("RANKS_KILL"), *mine = getenv("OMPI_COMM_WORLD_RANK");
  char name[32] = "", how[8] = "KILL";
  int rank;
  long n;
  count[call]++;
  if (!ask || !mine || sscanf(ask, "%d,%31[^,],%ld,%7s", &rank, name, &n, how) < 4) return 0;
  if (rank != atoi(mine) || strcmp(name, names[call]) != 0 || n != count[call]) return 0;
  if (strcmp(how, "FAIL") == 0) return 1;
  kill(getpid(), strcmp(how, "STOP") == 0 ? SIGSTOP : SIGKILL);
  return 0;
}

__attribute__((destructor)) static void tell(void) {
  const char *dir = getenv("RANKS_COUNT"), *mine = getenv("OMPI_COMM_WORLD_RANK");
  char path[4096];
  if (!dir || !mine) return;
  snprintf(path, sizeof path, "%s/count-%s", dir, mine);
  FILE *f = fopen(path, "w");
  for (int i = 0; f && i < CALL_COUNT; i++) fprintf(f, "%s %ld\n", names[i], count[i]);
  if (f) fclose(f);
}

static void *next(const char *name) {
  return dlsym(RTLD_NEXT, name);
}

int MPI_Ialltoallv(const void *a, const int b[], const int c[], MPI_Datatype d, void *e,
                   const int f[], const int g[], MPI_Datatype h, MPI_Comm i, MPI_Request *j) {
  int (*real)(const void *, const int *, const int *, MPI_Datatype, void *, const int *,
              const int *, MPI_Datatype, MPI_Comm, MPI_Request *);
  *(void **)&real = next("MPI_Ialltoallv");
  if (note(CALL_MPI_Ialltoallv)) return MPI_ERR_OTHER;
  return real(a, b, c, d, e, f, g, h, i, j);
}

int MPI_Iallgatherv(const void *a, int b, MPI_Datatype c, void *d, const int e[], const int f[],
                    MPI_Datatype g, MPI_Comm h, MPI_Request *i) {
  int (*real)(const void *, int, MPI_Datatype, void *, const int *, const int *, MPI_Datatype,
              MPI_Comm, MPI_Request *);
  *(void **)&real = next("MPI_Iallgatherv");
  note(CALL_MPI_Iallgatherv);
  return real(a, b, c, d, e, f, g, h, i);
}

int MPI_Isend(const void *a, int b, MPI_Datatype c, int d, int e, MPI_Comm f, MPI_Request *g) {
  int (*real)(const void *, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request *);
  *(void **)&real = next("MPI_Isend");
  note(CALL_MPI_Isend);
  return real(a, b, c, d, e, f, g);
}

int fsync(int fd) {
  int (*real)(int);
  *(void **)&real = next("fsync");
  if (!note(CALL_fsync)) return real(fd);
  errno = EIO;
  return -1;
}

static void maybe_slow(const char *path) {
  static int slept;
  const char *ask = getenv("RANKS_SLOW"), *mine = getenv("OMPI_COMM_WORLD_RANK");
  const char *slash = strrchr(path, '/');
  int rank, used = 0;
  if (slept || !ask || !mine || sscanf(ask, "%d,%n", &rank, &used) < 1 || rank != atoi(mine))
    return;
  if (!used || strcmp(slash ? slash + 1 : path, ask + used) != 0) return;
  slept = 1;
  sleep(5);
}

int open(const char *path, int flags, ...) {
  int (*real)(const char *, int, ...);
  va_list rest;
  va_start(rest, flags);
  bool creates = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
  int mode = creates ? va_arg(rest, int) : 0;
  va_end(rest);
  *(void **)&real = next("open");
  maybe_slow(path);
  return real(path, flags, mode);
}
