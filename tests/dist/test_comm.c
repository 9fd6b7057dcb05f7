/* Communicators: every call against what arithmetic says must arrive, in every group of every mesh
 * that the ranks allow. */
#include "dist/dist.h"

#include <string.h>
#include <time.h>

static struct mt_config config(void) {
  return (struct mt_config){.layers = 24, .experts = 24};
}

/* Runs a check in each group of each mesh. */
static void in_every_group(void (*check)(struct mt_comm *c, const struct mt_mesh *m)) {
  struct mt_config c = config();
  for (int ep = 1; ep <= world.size; ep++) {
    for (int pp = 1; pp <= world.size; pp++) {
      struct mt_mesh m;
      if (world.size % (ep * pp) != 0) continue;
      OK(mt_mesh_make(&c, world.size, world.rank, ep, pp, &m));
      for (int g = 0; g < MT_GROUP_COUNT; g++) {
        struct mt_comm comm;
        OK(mt_world_group(&world, &m, (enum mt_group)g, &comm));
        struct mt_group_span span = mt_mesh_group(&m, (enum mt_group)g);
        assert_int_equal(comm.size, span.count);
        assert_int_equal(comm.rank, span.index);
        check(&comm, &m);
        mt_comm_destroy(&comm);
      }
    }
  }
}

/* What member `from` sends to member `to`, uneven and sometimes nothing; and its values. */
static int64_t amount(int from, int to) {
  return (from * 7 + to * 3) % 5 * 11;
}
static int32_t value(int from, int to, int64_t i) {
  return from * 1000003 + to * 1009 + (int32_t)i;
}

static void exchanges(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  enum { MOST = 16, PAD = 3 };
  int64_t count[MOST], start[MOST], from_count[MOST], from_start[MOST], all = PAD, from_all = PAD;
  for (int p = 0; p < c->size; p++) {
    count[p] = amount(c->rank, p), from_count[p] = amount(p, c->rank);
    start[p] = all, from_start[p] = from_all;
    all += count[p] + PAD, from_all += from_count[p] + PAD;
  }
  int32_t *send = calloc((size_t)all, 2 * sizeof *send),
          *recv = calloc((size_t)from_all, 2 * sizeof *recv);
  assert_non_null(send);
  assert_non_null(recv);
  memset(recv, 0x5a, (size_t)from_all * 2 * sizeof *recv);
  for (int p = 0; p < c->size; p++) {
    for (int64_t i = 0; i < 2 * count[p]; i++) send[2 * start[p] + i] = value(c->rank, p, i);
  }
  struct mt_transfer t;
  int64_t before = c->sent[MT_COMM_ALL_TO_ALL].bytes, expected = 0;
  OK(mt_comm_all_to_all(c, send, (struct mt_parts){count, start}, recv,
                        (struct mt_parts){from_count, from_start}, 2 * sizeof *send, &t));
  OK(mt_comm_wait(c, &t));
  int64_t at = 0;
  for (int p = 0; p < c->size; p++) {
    if (p != c->rank) expected += count[p] * 8;
    for (; at < 2 * from_start[p]; at++) assert_int_equal(recv[at], 0x5a5a5a5a);
    for (int64_t i = 0; i < 2 * from_count[p]; i++, at++)
      assert_int_equal(recv[at], value(p, c->rank, i));
  }
  for (; at < 2 * from_all; at++) assert_int_equal(recv[at], 0x5a5a5a5a);
  assert_int_equal(c->sent[MT_COMM_ALL_TO_ALL].bytes - before, expected);
  free(send);
  free(recv);
}

static void gathers(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  enum { MOST = 16 };
  int64_t count[MOST], start[MOST], all = 0;
  for (int p = 0; p < c->size; p++) {
    count[p] = amount(p, p + 1), start[p] = all;
    all += count[p];
  }
  int64_t *buf = calloc((size_t)all + 1, sizeof *buf);
  assert_non_null(buf);
  for (int64_t i = 0; i < count[c->rank]; i++) buf[start[c->rank] + i] = value(c->rank, 0, i);
  OK(mt_comm_all_gather(c, buf, (struct mt_parts){count, start}, sizeof *buf, NULL));
  for (int p = 0; p < c->size; p++) {
    for (int64_t i = 0; i < count[p]; i++) assert_int_equal(buf[start[p] + i], value(p, 0, i));
  }
  free(buf);
}

static void broadcasts(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  for (int root = 0; root < c->size; root++) {
    char text[32] = "";
    if (c->rank == root) snprintf(text, sizeof text, "from %d", root);
    OK(mt_comm_broadcast(c, text, sizeof text, root));
    char want[32];
    snprintf(want, sizeof want, "from %d", root);
    assert_string_equal(text, want);
  }
}

/* Around the ring, two messages a neighbour, in order, all under way at once. */
static void messages(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  if (c->size == 1) return;
  int to = (c->rank + 1) % c->size, from = (c->rank + c->size - 1) % c->size;
  int32_t out[2] = {c->rank * 10, c->rank * 10 + 1}, in[2] = {-1, -1};
  struct mt_transfer t[4];
  for (int i = 0; i < 2; i++) {
    OK(mt_comm_recv(c, &in[i], sizeof in[i], from, &t[2 + i]));
    OK(mt_comm_send(c, &out[i], sizeof out[i], to, &t[i]));
  }
  for (int i = 0; i < 4; i++) OK(mt_comm_wait(c, &t[i]));
  assert_int_equal(in[0], from * 10);
  assert_int_equal(in[1], from * 10 + 1);
  OK(mt_comm_barrier(c));
}

#define IN_EVERY_GROUP(name)                                                                       \
  static void test_##name(void **state) {                                                          \
    (void)state;                                                                                   \
    in_every_group(name);                                                                          \
  }
IN_EVERY_GROUP(exchanges)
IN_EVERY_GROUP(gathers)
IN_EVERY_GROUP(broadcasts)
IN_EVERY_GROUP(messages)

/* A peer that never comes is named after the time-out, not waited for. */
static void test_time_out(void **state) {
  (void)state;
  struct mt_config config_ = config();
  struct mt_mesh m;
  static struct mt_comm c; /* stays, see below */
  if (world.size == 1) skip();
  OK(mt_mesh_make(&config_, world.size, world.rank, 1, 1, &m));
  OK(mt_world_group(&world, &m, MT_GROUP_WORLD, &c));
  c.timeout_s = 0.2;
  if (c.rank == 0) {
    int32_t nothing;
    assert_int_equal(mt_comm_recv(&c, &nothing, sizeof nothing, 1, NULL), MT_ECOMM);
    assert_non_null(strstr(mt_error_message(), "world group, member 0 of"));
    assert_non_null(strstr(mt_error_message(), "receive not done"));
  }
  if (c.rank == 1) {
    nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    OK(mt_comm_send(&c, &(int32_t){1}, sizeof(int32_t), 0, NULL));
  }
  /* The communicator is left as it is: freeing it would wait for the message. */
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_exchanges),  cmocka_unit_test(test_gathers),
    cmocka_unit_test(test_broadcasts), cmocka_unit_test(test_messages),
    cmocka_unit_test(test_time_out),
};
DIST_MAIN(tests)
