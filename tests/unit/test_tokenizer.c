/* The tokenizer beyond ids: what is refused, time that does not explode, decoding as ids come,
 * threads. */
#include <pthread.h>
#include <time.h>

#include "data/tokenizer.h"
#include "temp_dir.h"

#define MIXTRAL MT_SOURCE_DIR "/tests/golden/tokenizer-mixtral/tokenizer.json"

static mt_err parse(const char *json) {
  struct mt_tokenizer *t;
  mt_err err = mt_tokenizer_parse(json, strlen(json), "tokenizer.json", &t);
  if (!err) mt_tokenizer_free(t);
  return err;
}

#define MODEL                                                                                      \
  "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}"

static void refused(void **state) {
  (void)state;
  static const struct {
    const char *json;
    mt_err err;
    const char *names;
  } cases[] = {
      {"{" MODEL "}", MT_OK, ""},
      {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", MT_EUNSUPPORTED, "WordPiece"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":{}}}", MT_EUNSUPPORTED, "Unigram"},
      {"{" MODEL ",\"normalizer\":{\"type\":\"Nmt\"}}", MT_EUNSUPPORTED, "Nmt"},
      {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}}", MT_EUNSUPPORTED, "Bert"},
      {"{" MODEL ",\"decoder\":{\"type\":\"CTC\"}}", MT_EUNSUPPORTED, "CTC"},
      {"{" MODEL ",\"post_processor\":{\"type\":\"BertProcessing\"}}", MT_EUNSUPPORTED, "BertProc"},
      {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},"
       "\"behavior\":\"Isolated\"}}",
       MT_EUNSUPPORTED, "pattern '('"},
      {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},"
       "\"behavior\":\"Other\"}}",
       MT_EUNSUPPORTED, "Other"},
      {"{" MODEL ",\"normalizer\":{}}", MT_EFORMAT, "normalizer"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}", MT_EFORMAT,
       "merge 0"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"ab\"]}}", MT_EFORMAT,
       "merges"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", MT_EFORMAT,
       "id 0"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", MT_EFORMAT, "-1"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":9999999},\"merges\":[]}}", MT_EFORMAT,
       "9999999"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", MT_EFORMAT,
       "duplicate"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[],\"dropout\":0.1}}", MT_EUNSUPPORTED,
       "dropout"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[],\"end_of_word_suffix\":\"_\"}}",
       MT_EUNSUPPORTED, "end_of_word_suffix"},
      {"{\"added_tokens\":[{\"id\":0}]," MODEL "}", MT_EFORMAT, "added_tokens"},
      {"{", MT_EFORMAT, "tokenizer.json"},
      {"[]", MT_EFORMAT, "no object"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (cases[i].err)
      FAILS(parse(cases[i].json), cases[i].err, cases[i].names);
    else
      OK(parse(cases[i].json));
  }
}

static struct mt_tokenizer *mixtral(void) {
  struct mt_tokenizer *t;
  OK(mt_tokenizer_load(MIXTRAL, &t));
  return t;
}

static double seconds(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Quadratic time would take hours on the first, n log n takes a second, sanitized some. */
static void no_text_is_slow(void **state) {
  (void)state;
  struct mt_tokenizer *t = mixtral();
  struct mt_encoder *e;
  struct mt_ids ids = {0};
  size_t n = 1000000;
  char *text = malloc(n);
  OK(mt_encoder_create(t, &e));
  for (int kind = 0; kind < 3; kind++) {
    for (size_t i = 0; i < n; i++) text[i] = "a a\n"[kind == 1 ? i % 2 : kind == 2 ? 3 : 0];
    double begin = seconds(CLOCK_THREAD_CPUTIME_ID);
    ids.count = 0;
    OK(mt_encode(e, text, n, 0, &ids));
    assert_true(seconds(CLOCK_THREAD_CPUTIME_ID) - begin < 20);
    assert_true(ids.count > 1000 && ids.count <= n + 1);
  }
  free(text);
  free(ids.id);
  mt_encoder_free(e);
  mt_tokenizer_free(t);
}

static void flags(void **state) {
  (void)state;
  struct mt_tokenizer *t = mixtral();
  struct mt_encoder *e;
  struct mt_ids whole = {0}, parts = {0};
  OK(mt_encoder_create(t, &e));
  OK(mt_encode(e, "one two", 7, MT_ENCODE_ADD_SPECIAL, &whole));
  OK(mt_encode(e, "one", 3, MT_ENCODE_ADD_SPECIAL, &parts));
  OK(mt_encode(e, " two", 4, MT_ENCODE_CONTINUE, &parts));
  assert_int_equal(whole.count, parts.count);
  assert_memory_equal(whole.id, parts.id, whole.count * sizeof *whole.id);
  assert_int_equal(whole.id[0], mt_tokenizer_id(t, "<s>"));
  whole.count = 0;
  OK(mt_encode(e, "</s>", 4, MT_ENCODE_PARSE_SPECIAL, &whole));
  assert_int_equal(whole.count, 1);
  assert_true(mt_tokenizer_is_special(t, whole.id[0]));
  whole.count = 0;
  OK(mt_encode(e, "</s>", 4, 0, &whole));
  assert_true(whole.count > 1);
  FAILS(mt_encode(e, "ab\xc3(", 4, 0, &whole), MT_EFORMAT, "byte 2");
  FAILS(mt_encode(e, "ab\xed\xa0\x80", 5, 0, &whole), MT_EFORMAT, "byte 2");
  assert_null(mt_tokenizer_token(t, mt_tokenizer_vocab(t)));
  assert_int_equal(mt_tokenizer_id(t, "no such token"), -1);
  free(whole.id);
  free(parts.id);
  mt_encoder_free(e);
  mt_tokenizer_free(t);
}

/* Text comes out as soon as it is certain, whole characters only, and all of it in the end. */
static void a_stream_says_what_decoding_says(void **state) {
  (void)state;
  static const char text[] = "Grüße, 世界! \xf0\x9f\xa6\x84\xf0\x9f\xa6\x84 done";
  struct mt_tokenizer *t = mixtral();
  struct mt_encoder *e;
  struct mt_ids ids = {0};
  struct mt_text whole = {0}, streamed = {0};
  struct mt_decode_stream s = {0};
  OK(mt_encoder_create(t, &e));
  OK(mt_encode(e, text, strlen(text), MT_ENCODE_ADD_SPECIAL, &ids));
  OK(mt_decode(t, ids.id, ids.count, true, &whole));
  size_t pieces = 0;
  for (size_t i = 0; i < ids.count; i++) {
    size_t before = streamed.size;
    OK(mt_decode_next(t, &s, ids.id[i], &streamed));
    pieces += streamed.size > before;
    /* Never a cut character: a byte that begins one follows every stop. */
    assert_true(streamed.size == 0 || streamed.size == whole.size ||
                ((uint8_t)whole.text[streamed.size] & 0xc0) != 0x80);
  }
  assert_int_equal(streamed.size, strlen(text));
  assert_memory_equal(streamed.text, text, strlen(text));
  assert_true(pieces > 6);
  mt_decode_stream_free(&s);
  free(ids.id);
  free(whole.text);
  free(streamed.text);
  mt_encoder_free(e);
  mt_tokenizer_free(t);
}

struct worker {
  const struct mt_tokenizer *t;
  struct mt_ids ids;
  mt_err err;
};

static void *encode_much(void *arg) {
  struct worker *w = arg;
  struct mt_encoder *e;
  char text[64];
  w->err = mt_encoder_create(w->t, &e);
  for (int i = 0; i < 2000 && !w->err; i++) {
    int n = snprintf(text, sizeof text, "Thread %d writes number %d again", i % 17, i * 7919);
    w->err = mt_encode(e, text, (size_t)n, MT_ENCODE_ADD_SPECIAL, &w->ids);
  }
  mt_encoder_free(e);
  return NULL;
}

static void threads_share_a_tokenizer(void **state) {
  (void)state;
  struct worker w[2] = {0};
  pthread_t thread[2];
  struct mt_tokenizer *t = mixtral();
  for (int i = 0; i < 2; i++) {
    w[i].t = t;
    assert_int_equal(pthread_create(&thread[i], NULL, encode_much, &w[i]), 0);
  }
  for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
  assert_int_equal(w[0].err | w[1].err, 0);
  assert_int_equal(w[0].ids.count, w[1].ids.count);
  assert_memory_equal(w[0].ids.id, w[1].ids.id, w[0].ids.count * sizeof *w[0].ids.id);
  for (int i = 0; i < 2; i++) free(w[i].ids.id);
  mt_tokenizer_free(t);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(refused),
      cmocka_unit_test(no_text_is_slow),
      cmocka_unit_test(flags),
      cmocka_unit_test(a_stream_says_what_decoding_says),
      cmocka_unit_test(threads_share_a_tokenizer),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
