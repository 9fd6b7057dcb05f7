#include "par/comm.h"

#include <stdlib.h>
#include <string.h>

void mt_comm_destroy(struct mt_comm *c) {
  if (c->destroy) c->destroy(c);
  *c = (struct mt_comm){0};
}

mt_err mt_comm_failed(struct mt_comm *c) {
  return c->failed ? c->failed(c) : MT_OK;
}

mt_err mt_comm_settle(struct mt_comm *c, double limit_s, bool *over) {
  *over = true;
  return c->settle ? c->settle(c, limit_s, over) : MT_OK;
}

/* Units that leave for others, of the parts that go to each. */
static int64_t leaving(const struct mt_comm *c, const int64_t *count) {
  int64_t units = 0;
  for (int p = 0; p < c->size; p++) {
    if (p != c->rank) units += count[p];
  }
  return units;
}

static void note(struct mt_comm *c, enum mt_comm_kind kind, int64_t bytes) {
  c->sent[kind].calls++;
  c->sent[kind].bytes += bytes;
}

/* Waits here and now where the caller does not want to do so later. */
static mt_err finish(struct mt_comm *c, struct mt_transfer *mine, struct mt_transfer *callers) {
  if (!callers) return mt_comm_wait(c, mine);
  *callers = *mine;
  return MT_OK;
}

mt_err mt_comm_all_to_all(struct mt_comm *c, const void *send, struct mt_parts parts, void *recv,
                          struct mt_parts places, size_t unit_bytes, struct mt_transfer *t) {
  struct mt_transfer mine = {.what = "all_to_all"};
  note(c, MT_COMM_ALL_TO_ALL, leaving(c, parts.count) * (int64_t)unit_bytes);
  MT_TRY(c->all_to_all(c, send, parts, recv, places, unit_bytes, &mine));
  return finish(c, &mine, t);
}

mt_err mt_comm_all_gather(struct mt_comm *c, void *buf, struct mt_parts parts, size_t unit_bytes,
                          struct mt_transfer *t) {
  struct mt_transfer mine = {.what = "all_gather"};
  if (c->size == 1) return finish(c, &mine, t);
  note(c, MT_COMM_ALL_GATHER, parts.count[c->rank] * (int64_t)unit_bytes * (c->size - 1));
  MT_TRY(c->all_gather(c, buf, parts, unit_bytes, &mine));
  return finish(c, &mine, t);
}

mt_err mt_comm_gather_each(struct mt_comm *c, void *buf, size_t record_bytes) {
  if (c->size == 1) return MT_OK;
  int64_t *parts = calloc(2 * (size_t)c->size, sizeof *parts);
  if (!parts) return mt_fail(MT_ENOMEM, "records of %d ranks", c->size);
  for (int i = 0; i < c->size; i++) parts[i] = 1, parts[c->size + i] = i;
  mt_err err =
      mt_comm_all_gather(c, buf, (struct mt_parts){parts, parts + c->size}, record_bytes, NULL);
  free(parts);
  return err;
}

mt_err mt_comm_broadcast(struct mt_comm *c, void *buf, size_t size_bytes, int root) {
  struct mt_transfer mine = {.what = "broadcast"};
  if (c->size == 1) return MT_OK;
  note(c, MT_COMM_BROADCAST, c->rank == root ? (int64_t)size_bytes * (c->size - 1) : 0);
  MT_TRY(c->broadcast(c, buf, size_bytes, root, &mine));
  return mt_comm_wait(c, &mine);
}

mt_err mt_comm_send(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                    struct mt_transfer *t) {
  struct mt_transfer mine = {.what = "send"};
  note(c, MT_COMM_SEND, (int64_t)size_bytes);
  MT_TRY(c->send(c, buf, size_bytes, to, &mine));
  return finish(c, &mine, t);
}

mt_err mt_comm_recv(struct mt_comm *c, void *buf, size_t size_bytes, int from,
                    struct mt_transfer *t) {
  struct mt_transfer mine = {.what = "receive"};
  MT_TRY(c->recv(c, buf, size_bytes, from, &mine));
  return finish(c, &mine, t);
}

mt_err mt_comm_wait(struct mt_comm *c, struct mt_transfer *t) {
  if (!t->impl) return MT_OK;
  mt_err err = c->wait(c, t);
  *t = (struct mt_transfer){0};
  return err;
}

mt_err mt_comm_set_out(struct mt_comm *c) {
  return c->set_out ? c->set_out(c) : MT_OK;
}

mt_err mt_comm_join(struct mt_comm *c) {
  return c->join ? c->join(c) : MT_OK;
}

mt_err mt_comm_test(struct mt_comm *c, struct mt_transfer *t, bool *done) {
  *done = !t->impl;
  return t->impl && c->test ? c->test(c, t, done) : MT_OK;
}

mt_err mt_comm_barrier(struct mt_comm *c) {
  struct mt_transfer mine = {.what = "barrier"};
  if (c->size == 1) return MT_OK;
  MT_TRY(c->barrier(c, &mine));
  return mt_comm_wait(c, &mine);
}

static mt_err self_all_to_all(struct mt_comm *c, const void *send, struct mt_parts parts,
                              void *recv, struct mt_parts places, size_t unit_bytes,
                              struct mt_transfer *t) {
  (void)c, (void)t;
  memcpy((char *)recv + (size_t)places.start[0] * unit_bytes,
         (const char *)send + (size_t)parts.start[0] * unit_bytes,
         (size_t)parts.count[0] * unit_bytes);
  return MT_OK;
}

static mt_err self_message(struct mt_comm *c, size_t size_bytes) {
  return mt_fail(MT_ECOMM, "%s group of one rank: a message of %zu bytes to nobody", c->name,
                 size_bytes);
}

static mt_err self_send(struct mt_comm *c, const void *buf, size_t size_bytes, int to,
                        struct mt_transfer *t) {
  (void)buf, (void)to, (void)t;
  return self_message(c, size_bytes);
}

static mt_err self_recv(struct mt_comm *c, void *buf, size_t size_bytes, int from,
                        struct mt_transfer *t) {
  (void)buf, (void)from, (void)t;
  return self_message(c, size_bytes);
}

struct mt_comm mt_comm_self(const char *name) {
  return (struct mt_comm){
      .name = name, .size = 1, .all_to_all = self_all_to_all, .send = self_send, .recv = self_recv};
}
