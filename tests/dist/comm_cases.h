/* Communicators: every call against what arithmetic says must arrive, in every group of every mesh
 * that the ranks allow. Over the memory of `dist_be`. */
#ifndef TESTS_DIST_COMM_CASES_H
#define TESTS_DIST_COMM_CASES_H

#include "dist/dist.h"

#include <string.h>
#include <time.h>

static struct mt_config wide_config(void) {
  return (struct mt_config){.layers = 24, .experts = 24};
}

/* A buffer and its copy on the host. */
struct both {
  void *host, *dev;
  size_t size_bytes;
};

static struct both both(size_t size_bytes, int fill) {
  struct both b = {malloc(size_bytes + 1), NULL, size_bytes + 1};
  assert_non_null(b.host);
  memset(b.host, fill, b.size_bytes);
  OK(dist_be.mem_alloc(&dist_be, b.size_bytes, &b.dev));
  return b;
}
static void there(struct both b) {
  OK(dist_be.upload(&dist_be, b.dev, b.host, b.size_bytes));
}
static void here(struct both b) {
  OK(dist_be.download(&dist_be, b.host, b.dev, b.size_bytes));
}
static void done_with(struct both b) {
  dist_be.mem_free(&dist_be, b.dev, b.size_bytes);
  free(b.host);
}

/* Whether a group of as many ranks as far apart has come before; those of one are all the same. */
static bool seen_before(struct mt_group_span span) {
  static struct { int count, stride; } seen[32];
  static int n;
  int stride = span.count > 1 ? span.stride : 0;
  for (int i = 0; i < n; i++) {
    if (seen[i].count == span.count && seen[i].stride == stride) return true;
  }
  assert_true(n < 32);
  seen[n].count = span.count;
  seen[n++].stride = stride;
  return false;
}

/* Runs a check in each group of each mesh. */
static void in_every_group(void (*check)(struct mt_comm *c, const struct mt_mesh *m)) {
  struct mt_config c = wide_config();
  for (int ep = 1; ep <= world.size; ep++) {
    for (int pp = 1; pp <= world.size; pp++) {
      struct mt_mesh m;
      if (world.size % (ep * pp) != 0) continue;
      OK(mt_mesh_make(&c, world.size, world.rank, ep, pp, &m));
      for (int g = 0; g < MT_GROUP_COUNT; g++) {
        struct mt_comm host, comm;
        struct mt_group_span span = mt_mesh_group(&m, (enum mt_group)g);
        if (brief && seen_before(span)) continue;
        open_comms(&m, (enum mt_group)g, &host, &comm);
        assert_int_equal(comm.size, span.count);
        assert_int_equal(comm.rank, span.index);
        check(&comm, &m);
        OK(mt_comm_failed(&comm));
        close_comms(&host, &comm);
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
  struct both out = both((size_t)all * 2 * sizeof(int32_t), 0),
              in = both((size_t)from_all * 2 * sizeof(int32_t), 0x5a);
  int32_t *send = out.host, *recv = in.host;
  for (int p = 0; p < c->size; p++) {
    for (int64_t i = 0; i < 2 * count[p]; i++) send[2 * start[p] + i] = value(c->rank, p, i);
  }
  there(out);
  there(in);
  struct mt_transfer t;
  int64_t before = c->sent[MT_COMM_ALL_TO_ALL].bytes, expected = 0;
  OK(mt_comm_all_to_all(c, out.dev, (struct mt_parts){count, start}, in.dev,
                        (struct mt_parts){from_count, from_start}, 2 * sizeof *send, &t));
  OK(mt_comm_wait(c, &t));
  here(in);
  int64_t at = 0;
  for (int p = 0; p < c->size; p++) {
    if (p != c->rank) expected += count[p] * 8;
    for (; at < 2 * from_start[p]; at++) assert_int_equal(recv[at], 0x5a5a5a5a);
    for (int64_t i = 0; i < 2 * from_count[p]; i++, at++)
      assert_int_equal(recv[at], value(p, c->rank, i));
  }
  for (; at < 2 * from_all; at++) assert_int_equal(recv[at], 0x5a5a5a5a);
  assert_int_equal(c->sent[MT_COMM_ALL_TO_ALL].bytes - before, expected);
  done_with(out);
  done_with(in);
}

static void gathers(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  enum { MOST = 16 };
  int64_t count[MOST], start[MOST], all = 0;
  for (int p = 0; p < c->size; p++) {
    count[p] = amount(p, p + 1), start[p] = all;
    all += count[p];
  }
  struct both b = both((size_t)all * sizeof(int64_t), 0);
  int64_t *buf = b.host;
  for (int64_t i = 0; i < count[c->rank]; i++) buf[start[c->rank] + i] = value(c->rank, 0, i);
  there(b);
  OK(mt_comm_all_gather(c, b.dev, (struct mt_parts){count, start}, sizeof *buf, NULL));
  here(b);
  for (int p = 0; p < c->size; p++) {
    for (int64_t i = 0; i < count[p]; i++) assert_int_equal(buf[start[p] + i], value(p, 0, i));
  }
  done_with(b);
}

static void broadcasts(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  for (int root = 0; root < c->size; root++) {
    struct both b = both(32, 0);
    char want[32], *text = b.host;
    snprintf(want, sizeof want, "from %d", root);
    if (c->rank == root) memcpy(text, want, sizeof want);
    there(b);
    OK(mt_comm_broadcast(c, b.dev, 32, root));
    here(b);
    assert_string_equal(text, want);
    done_with(b);
  }
}

/* Around the ring, two messages a neighbour, in order, all under way at once; one of them larger
 * than what any buffer between holds. */
static void messages(struct mt_comm *c, const struct mt_mesh *m) {
  (void)m;
  enum { N = 700001 };
  if (c->size == 1) return;
  int to = (c->rank + 1) % c->size, from = (c->rank + c->size - 1) % c->size;
  struct both out = both((N + 1) * sizeof(int32_t), 0), in = both((N + 1) * sizeof(int32_t), -1);
  int32_t *sent = out.host, *got = in.host;
  for (int i = 0; i <= N; i++) sent[i] = value(c->rank, 0, i);
  there(out);
  there(in);
  struct mt_transfer t[4];
  const size_t at[2] = {0, sizeof(int32_t)}, bytes[2] = {sizeof(int32_t), N * sizeof(int32_t)};
  for (int i = 0; i < 2; i++) {
    OK(mt_comm_recv(c, (char *)in.dev + at[i], bytes[i], from, &t[2 + i]));
    OK(mt_comm_send(c, (char *)out.dev + at[i], bytes[i], to, &t[i]));
  }
  for (int i = 0; i < 4; i++) OK(mt_comm_wait(c, &t[i]));
  here(in);
  for (int i = 0; i <= N; i++) assert_int_equal(got[i], value(from, 0, i));
  OK(mt_comm_barrier(c));
  done_with(out);
  done_with(in);
}

/* As many gatherings under way as somebody likes, and each brings its own. */
static void many_at_once(struct mt_comm *c, const struct mt_mesh *m) {
  enum { MANY = 150 };
  (void)m;
  if (dist_be.memory_used || c->size == 1) return; /* a GPU's wait for room themselves */
  int64_t *parts = calloc(2 * (size_t)c->size, sizeof *parts);
  int32_t *got = calloc((size_t)(MANY * c->size), sizeof *got);
  struct mt_transfer t[MANY];
  assert_true(parts && got);
  for (int i = 0; i < c->size; i++) parts[i] = 1, parts[c->size + i] = i;
  for (int k = 0; k < MANY; k++) {
    got[k * c->size + c->rank] = value(c->rank, k, 1);
    OK(mt_comm_all_gather(c, got + (size_t)(k * c->size), (struct mt_parts){parts, parts + c->size},
                          sizeof *got, &t[k]));
  }
  for (int k = 0; k < MANY; k++) OK(mt_comm_wait(c, &t[k]));
  for (int k = 0; k < MANY; k++) {
    for (int p = 0; p < c->size; p++) assert_int_equal(got[k * c->size + p], value(p, k, 1));
  }
  free(parts);
  free(got);
}

static void every_call(struct mt_comm *c, const struct mt_mesh *m) {
  exchanges(c, m);
  gathers(c, m);
  broadcasts(c, m);
  messages(c, m);
  many_at_once(c, m);
}

static void test_every_call(void **state) {
  (void)state;
  in_every_group(every_call);
}

/* A peer that never comes is named after the time-out, not waited for. */
static void test_time_out(void **state) {
  (void)state;
  struct mt_config config_ = wide_config();
  struct mt_mesh m;
  static struct mt_comm host, c; /* stay, see below */
  if (world.size == 1) skip();
  OK(mt_mesh_make(&config_, world.size, world.rank, 1, 1, &m));
  open_comms(&m, MT_GROUP_WORLD, &host, &c);
  OK(mt_comm_barrier(&c));
  struct both b = both(sizeof(int32_t), 0);
  c.timeout_s = 0.2;
  if (c.rank == 0) {
    mt_err err = mt_comm_recv(&c, b.dev, sizeof(int32_t), 1, NULL);
    if (dist_be.memory_used && !err) {
      /* The host did not wait; who waits for the stream gets through. */
      OK(dist_be.sync(&dist_be));
      err = mt_comm_failed(&c);
    }
    assert_int_equal(err, MT_ECOMM);
    char who[64];
    snprintf(who, sizeof who, "%s group, member 0 of", c.name);
    assert_non_null(strstr(mt_error_message(), who));
    assert_non_null(strstr(mt_error_message(), "receive not done"));
    if (dist_be.memory_used)
      assert_int_equal(mt_comm_recv(&c, b.dev, sizeof(int32_t), 1, NULL), MT_ECOMM);
  }
  if (c.rank == 1) {
    nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    if (!dist_be.memory_used) OK(mt_comm_send(&c, b.dev, sizeof(int32_t), 0, NULL));
  }
  /* The communicators are left as they are: freeing them would wait for the message. */
}

#define COMM_CASES cmocka_unit_test(test_every_call), cmocka_unit_test(test_time_out)

#endif
