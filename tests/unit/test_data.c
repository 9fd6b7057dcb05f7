/* Data files to batches: record kinds and their loss masks, bad lines, packing, order. */
#include "data/dataset.h"
#include "temp_dir.h"

#define TOKENIZER MT_SOURCE_DIR "/tests/golden/tokenizer-mixtral"

struct fixture {
  char dir[MT_PATH_MAX], path[MT_PATH_MAX];
  struct mt_tokenizer *t;
  struct mt_encoder *e;
  const struct mt_template *chat;
};

static int open_fixture(void **state) {
  struct fixture *f = calloc(1, sizeof *f);
  temp_dir(f->dir);
  OK(mt_path_join(f->path, f->dir, "data.jsonl"));
  OK(mt_tokenizer_load(TOKENIZER "/tokenizer.json", &f->t));
  OK(mt_encoder_create(f->t, &f->e));
  OK(mt_template_detect(TOKENIZER, &f->chat)); /* no chat_template there: Mistral's */
  *state = f;
  return 0;
}

static int close_fixture(void **state) {
  struct fixture *f = *state;
  mt_encoder_free(f->e);
  mt_tokenizer_free(f->t);
  OK(mt_dir_remove(f->dir));
  free(f);
  return 0;
}

/* The record's tokens are those of the whole text, and the learned ones spell `learned`. */
static void check_record(struct fixture *f, const char *record, const char *whole,
                         const char *learned) {
  struct mt_rendered r = {0};
  struct mt_ids want = {0}, kept = {0};
  struct mt_text text = {0};
  json_t *json = json_loads(record, 0, NULL);
  assert_non_null(json);
  OK(mt_render(f->chat, f->e, json, 2, &r));
  OK(mt_encode(f->e, whole, strlen(whole), MT_ENCODE_ADD_SPECIAL | MT_ENCODE_PARSE_SPECIAL, &want));
  assert_int_equal(r.ids.count, want.count);
  assert_memory_equal(r.ids.id, want.id, want.count * sizeof *want.id);
  for (size_t i = 0; i < r.ids.count; i++) {
    if (r.learn[i]) OK(mt_ids_append(&kept, r.ids.id[i]));
  }
  OK(mt_decode(f->t, kept.id, kept.count, false, &text));
  OK(mt_text_append(&text, "", 1));
  assert_string_equal(text.text, learned);
  json_decref(json);
  mt_rendered_free(&r);
  free(want.id);
  free(kept.id);
  free(text.text);
}

static void record_kinds(void **state) {
  struct fixture *f = *state;
  check_record(f, "{\"text\":\"Hello world\"}", "Hello world</s>", "Hello world</s>");
  check_record(f, "{\"prompt\":\"Two plus two is\",\"completion\":\" four.\"}",
               "Two plus two is four.</s>", "four.</s>");
  check_record(f, "{\"instruction\":\"Add.\",\"input\":\"2 2\",\"output\":\"4\"}",
               "[INST] Add.\n\n2 2 [/INST] 4</s>", "4</s>");
  check_record(
      f,
      "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},"
      "{\"role\":\"assistant\",\"content\":\"Yo\"},{\"role\":\"user\",\"content\":\"So?\"},"
      "{\"role\":\"assistant\",\"content\":\"Well.\"}]}",
      "[INST] Hi [/INST] Yo</s>[INST] So? [/INST] Well.</s>", "Yo</s> Well.</s>");
  check_record(
      f,
      "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},"
      "{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"assistant\",\"content\":\"Yo\"}]}",
      "[INST] Be brief.\n\nHi [/INST] Yo</s>", "Yo</s>");
}

/* A user who writes </s> writes five characters, not the end of the answer. */
static void text_holds_no_special_tokens(void **state) {
  struct fixture *f = *state;
  struct mt_rendered r = {0};
  json_t *json = json_loads("{\"messages\":[{\"role\":\"user\",\"content\":\"a</s>b\"},"
                            "{\"role\":\"assistant\",\"content\":\"c</s>d\"}]}",
                            0, NULL);
  OK(mt_render(f->chat, f->e, json, 2, &r));
  int ends = 0;
  for (size_t i = 0; i < r.ids.count; i++) ends += r.ids.id[i] == 2;
  assert_int_equal(ends, 1);
  assert_int_equal(r.ids.id[r.ids.count - 1], 2);
  json_decref(json);
  mt_rendered_free(&r);
}

static mt_err load(struct fixture *f, int most, bool skip, struct mt_dataset **d) {
  struct mt_dataset_options o = {.path = f->path,
                                 .chat = f->chat,
                                 .max_seq_length = most,
                                 .eos_id = 2,
                                 .skip_bad_lines = skip};
  MT_TRY(mt_dataset_open(f->t, &o, d));
  mt_err err = mt_dataset_wait(*d);
  if (err) mt_dataset_close(*d);
  return err;
}

static void bad_lines(void **state) {
  struct fixture *f = *state;
  static const struct {
    const char *text, *names;
  } cases[] = {
      {"{\"text\":\"a\"}\n{\"text\":\n", "data.jsonl:2"},
      {"\n{\"text\":\"a\",\"text\":\"b\"}\n", "data.jsonl:2"},
      {"[1]\n", "data.jsonl:1: is no JSON object"},
      {"{\"text\":\"\xff\"}\n", "data.jsonl:1"},
      {"{\"text\":7}\n", "data.jsonl:1"},
      {"{\"other\":\"a\"}\n", "none of 'text'"},
      {"{\"prompt\":\"a\"}\n", "'prompt' and 'completion'"},
      {"{\"instruction\":\"a\"}\n", "'instruction' and 'output'"},
      {"{\"instruction\":\"a\",\"output\":\"b\",\"input\":7}\n", "'input'"},
      {"{\"messages\":[{\"role\":\"system\",\"content\":\"a\"}]}\n", "nothing follows the system"},
      {"{\"messages\":[]}\n", "'messages' is empty"},
      {"{\"messages\":[{\"role\":\"user\"}]}\n", "message 1 needs"},
      {"{\"messages\":[{\"role\":\"robot\",\"content\":\"a\"}]}\n", "role 'robot'"},
      {"", "no usable sample"},
      {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}\n", "no usable sample"},
  };
  struct mt_dataset *d;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    temp_text(f->dir, "data.jsonl", cases[i].text);
    FAILS(load(f, 64, false, &d), MT_EFORMAT, cases[i].names);
  }
  temp_text(f->dir, "data.jsonl", "{\"text\":\"good one\"}\n{bad\n[]\n{\"text\":\"good two\"}");
  OK(load(f, 64, true, &d));
  struct mt_dataset_stats s = mt_dataset_stats(d);
  assert_int_equal(s.samples, 2);
  assert_int_equal(s.bad_lines, 2);
  assert_int_equal(s.first_bad_line, 2);
  assert_int_equal(mt_dataset_sample(d, 1).line, 4);
  mt_dataset_close(d);
  assert_int_equal(unlink(f->path), 0);
  FAILS(load(f, 64, false, &d), MT_ENOENT, "data.jsonl");
}

static void line_ends_and_lengths(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d;
  temp_text(f->dir, "data.jsonl",
            "\xef\xbb\xbf{\"text\":\"a b\"}\r\n\r\n \t\n{\"text\":\"c d\"}\r\n{\"text\":\"e f\"}");
  OK(load(f, 64, false, &d));
  assert_int_equal(mt_dataset_stats(d).samples, 3);
  static const int64_t lines[] = {1, 4, 5};
  for (int i = 0; i < 3; i++) assert_int_equal(mt_dataset_sample(d, i).line, lines[i]);
  mt_dataset_close(d);
  /* A hole of the file system's: a line longer than the limit that takes no room on the disk. */
  FILE *file = fopen(f->path, "w");
  assert_non_null(file);
  assert_true(fputs("{\"text\":\"a b\"}\n", file) >= 0);
  assert_int_equal(fseek(file, (64 << 20) + 100, SEEK_SET), 0);
  assert_true(fputs("\n{\"text\":\"c d\"}\n", file) >= 0);
  assert_int_equal(fclose(file), 0);
  FAILS(load(f, 64, false, &d), MT_EFORMAT, "data.jsonl:2: longer than");
  OK(load(f, 64, true, &d));
  assert_int_equal(mt_dataset_stats(d).bad_lines, 1);
  assert_int_equal(mt_dataset_sample(d, 1).line, 3);
  mt_dataset_close(d);
}

static void long_samples_are_cut(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d;
  temp_text(f->dir, "data.jsonl",
            "{\"text\":\"one two three four five six seven eight nine ten\"}\n"
            "{\"prompt\":\"a b c d e f g h i j k l m\",\"completion\":\" z\"}\n");
  OK(load(f, 6, false, &d));
  struct mt_dataset_stats s = mt_dataset_stats(d);
  assert_int_equal(s.samples, 1);
  assert_int_equal(s.truncated, 1);
  assert_int_equal(s.dropped, 1); /* its answer lay behind the cut */
  assert_int_equal(mt_dataset_sample(d, 0).count, 6);
  assert_true(s.longest > 10);
  mt_dataset_close(d);
}

static struct mt_dataset *many(struct fixture *f, int n) {
  char *text = calloc((size_t)n, 160), line[160];
  size_t used = 0;
  struct mt_dataset *d;
  for (int i = 0; i < n; i++) {
    snprintf(line, sizeof line, "{\"prompt\":\"number %d\",\"completion\":\" is%.*s %d\"}\n", i,
             (i % 7) * 3, " a b c d e f g h i j k", i * i);
    memcpy(text + used, line, strlen(line));
    used += strlen(line);
  }
  temp_text(f->dir, "data.jsonl", text);
  free(text);
  OK(load(f, 64, false, &d));
  return d;
}

static void packing_keeps_every_sample(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d = many(f, 40);
  struct mt_loader l;
  struct mt_loader_options o = {.batch_size = 7,
                                .micro_batches = 2,
                                .max_seq_length = 64,
                                .pad_multiple = 16,
                                .seed = 5,
                                .world = 1,
                                .shuffle = true};
  OK(mt_loader_create(&l, d, &o));
  assert_int_equal(mt_loader_steps_per_epoch(&l), 3);
  int seen[41] = {0};
  for (int step = 0; step < 3; step++) {
    OK(mt_loader_next(&l));
    for (int m = 0; m < 2; m++) {
      const struct mt_batch *b = l.list[m];
      int targets = 0;
      assert_int_equal(b->sequence_count, 7);
      assert_int_equal(b->token_count % 16, 0);
      assert_int_equal(b->cu_seqlens[7], b->valid_count);
      for (int s = 0; s < 7; s++) {
        struct mt_sample want = mt_dataset_sample(d, b->lines[s] - 1);
        int at = b->cu_seqlens[s];
        seen[b->lines[s]]++;
        assert_int_equal(b->cu_seqlens[s + 1] - at, want.count);
        for (int i = 0; i < want.count; i++) {
          bool target = i + 1 < want.count && want.learn[i + 1];
          assert_int_equal(b->ids[at + i], want.ids[i]);
          assert_int_equal(b->positions[at + i], i);
          assert_int_equal(b->labels[at + i], target ? want.ids[i + 1] : MT_IGNORE);
          targets += target;
        }
      }
      for (int i = b->valid_count; i < b->token_count; i++)
        assert_int_equal(b->labels[i], MT_IGNORE);
      assert_int_equal(targets, b->target_count);
    }
  }
  /* 42 samples: the 40 of the first epoch once, two of the second again. */
  int once = 0, twice = 0;
  for (int i = 1; i <= 40; i++) once += seen[i] == 1, twice += seen[i] == 2;
  assert_int_equal(once, 38);
  assert_int_equal(twice, 2);
  mt_loader_destroy(&l);
  mt_dataset_close(d);
}

/* Few lengths, every row within one of them, and less padding than equal steps would add. */
static void rows_are_padded_to_few_lengths(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d = many(f, 40);
  struct mt_loader l;
  struct mt_loader_options o = {.batch_size = 7,
                                .micro_batches = 2,
                                .max_seq_length = 64,
                                .pad_multiple = 16,
                                .lengths = 3,
                                .seed = 5,
                                .world = 1,
                                .shuffle = true};
  OK(mt_loader_create(&l, d, &o));
  assert_in_range(l.length_count, 1, 3);
  assert_int_equal(l.next.index, 0);
  long padding = 0, thirds = 0, outside = 0, most = l.length[l.length_count - 1];
  for (int step = 0; step < 100; step++) {
    OK(mt_loader_next(&l));
    for (int m = 0; m < 2; m++) {
      const struct mt_batch *b = l.list[m];
      bool known = false;
      for (int i = 0; i < l.length_count; i++) known |= b->token_count == l.length[i];
      outside += !known;
      assert_true(b->token_count >= b->valid_count && b->token_count <= b->token_capacity);
      assert_int_equal(b->token_count % 16, 0);
      for (int i = b->valid_count; i < b->token_count; i++)
        assert_true(b->labels[i] == MT_IGNORE && b->ids[i] == 0 && b->positions[i] == 0);
      padding += b->token_count - b->valid_count;
      thirds += (b->valid_count + most / 3) / (most / 3 + 1) * (most / 3 + 1) - b->valid_count;
    }
  }
  assert_int_equal(outside, 0); /* they were chosen by these rows among others */
  print_message("  %d lengths, %ld tokens of padding, %ld by thirds\n", l.length_count, padding,
                thirds);
  assert_true(padding < thirds);
  mt_loader_destroy(&l);
  o.lengths = MT_LENGTHS + 1;
  FAILS(mt_loader_create(&l, d, &o), MT_EINVAL, "micro-batches");
  mt_dataset_close(d);
}

static void order_is_a_function_of_the_position(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d = many(f, 23);
  struct mt_loader a, b;
  struct mt_loader_options o = {.batch_size = 4,
                                .micro_batches = 1,
                                .max_seq_length = 64,
                                .pad_multiple = 8,
                                .seed = 5,
                                .world = 1,
                                .shuffle = true};
  OK(mt_loader_create(&a, d, &o));
  OK(mt_loader_create(&b, d, &o));
  for (int step = 0; step < 9; step++) OK(mt_loader_next(&a));
  struct mt_position p = a.next;
  OK(mt_loader_next(&a));
  b.next = p;
  OK(mt_loader_next(&b));
  assert_memory_equal(a.batch->lines, b.batch->lines, 4 * sizeof(int64_t));
  assert_int_equal(a.batch->valid_count, b.batch->valid_count);
  /* Ranks share an epoch without overlap. */
  int seen[24] = {0};
  for (int rank = 0; rank < 2; rank++) {
    struct mt_loader l;
    o.rank = rank;
    o.world = 2;
    o.batch_size = 11;
    OK(mt_loader_create(&l, d, &o));
    OK(mt_loader_next(&l));
    for (int i = 0; i < 11; i++) assert_int_equal(seen[l.batch->lines[i]]++, 0);
    mt_loader_destroy(&l);
  }
  mt_loader_destroy(&a);
  mt_loader_destroy(&b);
  mt_dataset_close(d);
}

enum { STEPS = 5, STEP_SAMPLES = 6 };

/* Lines of the samples of each step, of all ranks, sorted within a step; those of the epochs' ends
 * among them. */
static void lines_of_steps(struct mt_dataset *d, int world, int batch, int micro,
                           int64_t lines[STEPS][STEP_SAMPLES]) {
  struct mt_loader_options o = {.batch_size = batch,
                                .micro_batches = micro,
                                .max_seq_length = 64,
                                .pad_multiple = 1,
                                .seed = 9,
                                .world = world,
                                .shuffle = true};
  for (o.rank = 0; o.rank < world; o.rank++) {
    struct mt_loader l;
    OK(mt_loader_create(&l, d, &o));
    for (int step = 0; step < STEPS; step++) {
      OK(mt_loader_next(&l));
      for (int i = 0; i < batch * micro; i++)
        lines[step][i * world + o.rank] = l.batch[i / batch].lines[i % batch];
    }
    mt_loader_destroy(&l);
  }
}

/* What a step takes does not depend on how many ranks take it, not across an epoch's end either. */
static void steps_are_the_same_on_any_number_of_ranks(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d = many(f, 10);
  int64_t one[STEPS][STEP_SAMPLES], other[STEPS][STEP_SAMPLES];
  const int ways[][3] = {{2, 3, 1}, {3, 2, 1}, {6, 1, 1}, {3, 1, 2}, {2, 1, 3}, {1, 2, 3}};
  lines_of_steps(d, 1, 6, 1, one);
  for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
    lines_of_steps(d, ways[w][0], ways[w][1], ways[w][2], other);
    assert_memory_equal(one, other, sizeof one);
  }
  mt_dataset_close(d);
}

/* Ranks share a pass without overlap and come to its end after as many batches, the last of which
 * may be padding. */
static void once_through_on_ranks(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d = many(f, 10);
  for (int world = 1; world <= 4; world++) {
    int seen[11] = {0}, rounds = (10 + 3 * world - 1) / (3 * world);
    for (int rank = 0; rank < world; rank++) {
      struct mt_loader l;
      struct mt_batch *b;
      struct mt_loader_options o = {.batch_size = 3,
                                    .micro_batches = 1,
                                    .max_seq_length = 64,
                                    .pad_multiple = 2,
                                    .rank = rank,
                                    .world = world};
      int count = 0;
      OK(mt_loader_create(&l, d, &o));
      for (; mt_loader_next_once(&l, &b) == MT_OK; count++) {
        for (int i = 0; i < b->sequence_count; i++) seen[b->lines[i]]++;
        if (b->sequence_count == 0) assert_int_equal(b->target_count + b->valid_count, 0);
        assert_true(b->token_count >= 2);
      }
      assert_int_equal(count, rounds);
      mt_loader_destroy(&l);
    }
    for (int i = 1; i <= 10; i++) assert_int_equal(seen[i], 1);
  }
  mt_dataset_close(d);
}

static void once_through(void **state) {
  struct fixture *f = *state;
  struct mt_dataset *d = many(f, 10);
  struct mt_loader l;
  struct mt_batch *b;
  struct mt_loader_options o = {
      .batch_size = 4, .micro_batches = 1, .max_seq_length = 64, .pad_multiple = 8, .world = 1};
  OK(mt_loader_create(&l, d, &o));
  int64_t line = 1;
  while (mt_loader_next_once(&l, &b) == MT_OK) {
    for (int i = 0; i < b->sequence_count; i++) assert_int_equal(b->lines[i], line++);
  }
  assert_int_equal(line, 11);
  struct mt_sample long_one = {.ids = (int32_t[300]){0}, .learn = (uint8_t[300]){0}, .count = 300};
  mt_batch_begin(b);
  FAILS(mt_batch_add(b, &long_one), MT_ESHAPE, "300 tokens");
  mt_loader_destroy(&l);
  o.world = 11;
  FAILS(mt_loader_create(&l, d, &o), MT_EINVAL, "11 data-parallel ranks");
  o.world = o.rank = 1;
  FAILS(mt_loader_create(&l, d, &o), MT_EINVAL, "rank 1/1");
  o.rank = o.batch_size = 0;
  FAILS(mt_loader_create(&l, d, &o), MT_EINVAL, "batch size 0");
  mt_dataset_close(d);
}

static void templates(void **state) {
  struct fixture *f = *state;
  const struct mt_template *t;
  FAILS(mt_template_find("none", &t), MT_EUNSUPPORTED, "mistral, ");
  temp_text(f->dir, "tokenizer_config.json", "{\"chat_template\":\"{{ '<|im_start|>' }}\"}");
  OK(mt_template_detect(f->dir, &t));
  assert_string_equal(mt_template_name(t), "chatml");
  temp_text(f->dir, "tokenizer_config.json", "{\"chat_template\":\"{{ something else }}\"}");
  FAILS(mt_template_detect(f->dir, &t), MT_EUNSUPPORTED, "chat_template");
  temp_text(f->dir, "tokenizer_config.json",
            "{\"model_max_length\":1000000000000000019884624838656}");
  OK(mt_template_detect(f->dir, &t));
  assert_string_equal(mt_template_name(t), "mistral");
  temp_text(f->dir, "tokenizer_config.json", "{");
  FAILS(mt_template_detect(f->dir, &t), MT_EFORMAT, "tokenizer_config.json");
}

#define T(f) cmocka_unit_test_setup_teardown(f, open_fixture, close_fixture)
int main(void) {
  const struct CMUnitTest tests[] = {
      T(record_kinds),
      T(text_holds_no_special_tokens),
      T(bad_lines),
      T(line_ends_and_lengths),
      T(long_samples_are_cut),
      T(packing_keeps_every_sample),
      T(rows_are_padded_to_few_lengths),
      T(order_is_a_function_of_the_position),
      T(once_through),
      T(once_through_on_ranks),
      T(steps_are_the_same_on_any_number_of_ranks),
      T(templates),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
