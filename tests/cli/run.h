/* Starts the program and collects what it says. */
#ifndef MT_TESTS_CLI_RUN_H
#define MT_TESTS_CLI_RUN_H

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct cli_result {
  int status; /* exit status; 128 + signal */
  char out[1 << 16], err[1 << 16];
};

static inline void cli_slurp(const char *path, char *text, size_t size_bytes) {
  FILE *f = fopen(path, "rb");
  size_t n = f ? fread(text, 1, size_bytes - 1, f) : 0;
  text[n] = 0;
  if (f) fclose(f);
  unlink(path);
}

/* argv[0] is put in front; args is ended by NULL; standard input is empty. */
static inline void cli_run(struct cli_result *r, const char *const *args) {
  char out[] = "/tmp/moetune-out-XXXXXX", err[] = "/tmp/moetune-err-XXXXXX";
  const char *argv[64] = {MT_CLI_PATH};
  for (int i = 0; i < 62 && args[i]; i++) argv[i + 1] = args[i];
  int fds[2] = {mkstemp(out), mkstemp(err)};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, fds[0], 1);
  posix_spawn_file_actions_adddup2(&actions, fds[1], 2);
  pid_t pid = -1;
  int wait_status = 0;
  int failed = posix_spawn(&pid, MT_CLI_PATH, &actions, NULL, (char *const *)argv, environ);
  if (!failed) {
    while (waitpid(pid, &wait_status, 0) < 0 && errno == EINTR) {
    }
  }
  r->status = failed                   ? -1
              : WIFEXITED(wait_status) ? WEXITSTATUS(wait_status)
                                       : 128 + WTERMSIG(wait_status);
  posix_spawn_file_actions_destroy(&actions);
  close(fds[0]);
  close(fds[1]);
  cli_slurp(out, r->out, sizeof r->out);
  cli_slurp(err, r->err, sizeof r->err);
}

#define CLI(result, ...) cli_run(result, (const char *const[]){__VA_ARGS__, NULL})

#endif
