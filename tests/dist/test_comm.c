/* Communicators over the host's memory: MPI, or one rank. */
#include "dist/comm_cases.h"

#include <sys/mman.h>
#include <unistd.h>

/* A few MiB that show again and again, as so many bytes. */
static char *many_bytes(size_t size_bytes) {
  const size_t piece = (size_t)16 << 20;
  int fd = memfd_create("many", MFD_CLOEXEC);
  assert_true(fd >= 0 && ftruncate(fd, (off_t)piece) == 0);
  char *at = mmap(NULL, size_bytes + piece, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert_true(at != MAP_FAILED);
  for (size_t i = 0; i < size_bytes; i += piece)
    assert_true(mmap(at + i, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) !=
                MAP_FAILED);
  close(fd);
  return at;
}

/* Numbers of four bytes, more than MPI's int counts and not a multiple of anything else. */
static void test_beyond_int(void **state) {
  (void)state;
  const size_t size_bytes = ((size_t)1 << 31) + 4;
  if (world.size != 2) skip();
  char *buf = many_bytes(size_bytes);
  memset(buf + size_bytes - 4, everyone.rank == 0 ? 7 : 0, 4);
  OK(mt_comm_broadcast(&everyone, buf, size_bytes, 0));
  assert_int_equal(buf[size_bytes - 1], 7);
  memset(buf + size_bytes - 4, everyone.rank == 1 ? 9 : 0, 4);
  if (everyone.rank == 1) OK(mt_comm_send(&everyone, buf, size_bytes, 0, NULL));
  if (everyone.rank == 0) OK(mt_comm_recv(&everyone, buf, size_bytes, 1, NULL));
  assert_int_equal(buf[size_bytes - 1], 9);
  munmap(buf, size_bytes + ((size_t)16 << 20));
}

/* Who fails while there is more time than the time-out, as for writing, does not give all of it to
 * others that do not come to the end. */
static void test_patience_ends(void **state) {
  (void)state;
  struct mt_config config_ = wide_config();
  struct mt_mesh m;
  static struct mt_comm c; /* stays, as in test_time_out */
  int32_t late = 0;
  if (world.size == 1) skip();
  OK(mt_mesh_make(&config_, world.size, world.rank, 1, 1, &m));
  OK(mt_world_group(&world, &m, MT_GROUP_WORLD, &c));
  mt_world_patience(&world, 1e6);
  mt_err err = world.rank == 0 ? mt_fail(MT_EIO, "a planted error") : MT_OK;
  assert_int_equal(mt_world_end(&world, err), MT_EIO);
  c.timeout_s = 0.2;
  if (c.rank == 0) assert_int_equal(mt_comm_recv(&c, &late, sizeof late, 1, NULL), MT_ECOMM);
  if (c.rank == 1) {
    nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    OK(mt_comm_send(&c, &late, sizeof late, 0, NULL));
  }
}

static const struct CMUnitTest tests[] = {COMM_CASES, cmocka_unit_test(test_beyond_int),
                                          cmocka_unit_test(test_patience_ends)};
DIST_MAIN(tests)
