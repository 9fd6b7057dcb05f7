/* Values, the configuration file and what wins, through the parser that every command uses. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "cli/options.h"
#include "cli/run.h"
#include "kernels/registry.h"
#include "train/options.h"

static struct mt_parsed parsed;

static mt_err parse_list(const char *command, const char *const *args) {
  char *argv[64] = {(char *)command};
  int argc = 1;
  for (; args[argc - 1]; argc++) argv[argc] = (char *)args[argc - 1];
  mt_parsed_free(&parsed);
  return mt_options_parse(mt_command_find(command), argc, argv, &parsed);
}
#define PARSE(command, ...) parse_list(command, (const char *const[]){__VA_ARGS__, NULL})
#define TRAIN(...)          PARSE("train", "--model", "m", "--data", "d", "--out", "o", __VA_ARGS__)

static const struct mt_train_options *train(void) {
  return parsed.options;
}

static void assert_message(mt_err err, const char *part) {
  assert_int_equal(err, MT_EINVAL);
  if (!strstr(mt_error_message(), part)) {
    fail_msg("'%s' expected in '%s'", part, mt_error_message());
  }
}

static void defaults(void **state) {
  (void)state;
  assert_int_equal(PARSE("train", "--model", "m", "--data=d", "--out", "o"), MT_OK);
  const struct mt_train_options *o = train();
  assert_string_equal(o->model, "m");
  assert_string_equal(o->data, "d");
  assert_null(o->eval_data);
  assert_null(o->resume);
  assert_null(o->chat_template);
  assert_int_equal(o->batch_size, 8);
  assert_int_equal(o->warmup_steps, 5);
  assert_int_equal(o->train_steps, 0);
  assert_true(o->lr == 2e-5);
  assert_true(o->router_aux_coef == -1);
  assert_int_equal(o->lr_schedule, MT_SCHEDULE_COSINE);
  assert_null(o->device.precision);
  assert_string_equal(o->device.device, "auto");
  assert_int_equal(o->experts, MT_EXPERTS_GROUPED);
  assert_int_equal(o->blocks, MT_BLOCKS_FUSED);
  assert_int_equal(o->freeze.count, 0);
  assert_true(o->max_shard_bytes == 5000000000u);
  assert_false(mt_parsed_given(&parsed, "lr"));
  assert_true(mt_parsed_given(&parsed, "model"));
}

static void presets(void **state) {
  (void)state;
  assert_int_equal(TRAIN("--improvement", "0"), MT_OK);
  assert_int_equal(train()->experts, MT_EXPERTS_LOOP);
  assert_int_equal(train()->blocks, MT_BLOCKS_UNFUSED);
  assert_int_equal(TRAIN("--improvement", "1"), MT_OK);
  assert_int_equal(train()->experts, MT_EXPERTS_LOOP);
  assert_int_equal(train()->blocks, MT_BLOCKS_FUSED);
  assert_int_equal(TRAIN("--experts", "grouped", "--improvement", "0"), MT_OK);
  assert_int_equal(train()->experts, MT_EXPERTS_GROUPED);
  assert_int_equal(train()->blocks, MT_BLOCKS_UNFUSED);
  assert_int_equal(TRAIN("--improvement", "3", "--device", "cpu"), MT_OK);
  assert_int_equal(train()->experts, MT_EXPERTS_FUSED);
  assert_string_equal(train()->device.precision, "mxfp8");
  assert_int_equal(TRAIN("--improvement", "3", "--precision", "fp32"), MT_OK);
  assert_string_equal(train()->device.precision, "fp32");
  /* A GPU's by its chip: FP8's products are Hopper's, MXFP8's Blackwell's. */
  assert_int_equal(TRAIN("--improvement", "3", "--device", "cuda"), MT_OK);
  assert_string_equal(train()->device.precision, mt_cuda_capability() < 100 ? "fp8" : "mxfp8");
  assert_message(TRAIN("--improvement", "4"), "--improvement: 4 is out of range");
  assert_message(TRAIN("--ep-size", "0"), "--ep-size");
}

static void forms(void **state) {
  (void)state;
  assert_int_equal(TRAIN("--freeze", "a*", "--freeze=b", "--skip-bad-lines", "--resume"), MT_OK);
  assert_int_equal(train()->freeze.count, 2);
  assert_string_equal(train()->freeze.item[0], "a*");
  assert_string_equal(train()->freeze.item[1], "b");
  assert_true(train()->skip_bad_lines);
  assert_string_equal(train()->resume, "");
  assert_int_equal(TRAIN("--resume", "runs/a", "--no-skip-bad-lines"), MT_OK);
  assert_string_equal(train()->resume, "runs/a");
  assert_false(train()->skip_bad_lines);
  assert_int_equal(TRAIN("--resume=runs/b"), MT_OK);
  assert_string_equal(train()->resume, "runs/b");
  assert_int_equal(TRAIN("--resume", "--lr", "1"), MT_OK);
  assert_string_equal(train()->resume, "");
  assert_int_equal(TRAIN("--lr", "1", "--lr", "2"), MT_OK); /* the last counts */
  assert_true(train()->lr == 2);

  assert_int_equal(PARSE("inspect", "dir", "--train"), MT_OK);
  assert_string_equal(((const struct mt_inspect_options *)parsed.options)->model, "dir");
  assert_int_equal(PARSE("inspect", "--", "--dir"), MT_OK);
  assert_string_equal(((const struct mt_inspect_options *)parsed.options)->model, "--dir");
  assert_message(PARSE("inspect", "a", "b"), "unexpected argument 'b'");
  assert_message(TRAIN("stray"), "unexpected argument 'stray'");
  assert_message(TRAIN("--skip-bad-lines=3"), "--skip-bad-lines takes no value");
  assert_message(TRAIN("--lr"), "--lr needs a value");
  assert_message(TRAIN("-x"), "unknown option '-x'");
  assert_message(TRAIN("--bach-size", "3"), "'--bach-size'; did you mean --batch-size?");
  assert_message(PARSE("train", "--data", "d", "--out", "o"), "--model DIR is required");
  assert_int_equal(PARSE("train", "--help"), MT_OK);
  assert_true(parsed.common.help);
}

static void other_commands(void **state) {
  (void)state;
  assert_message(TRAIN("--patience", "2"), "--patience needs --eval-data and --eval-every");
  assert_message(TRAIN("--patience", "2", "--eval-data", "e"), "--patience needs");
  assert_int_equal(TRAIN("--patience", "2", "--eval-data", "e", "--eval-every", "5"), MT_OK);
  assert_message(TRAIN("--keep-best"), "--keep-best needs --eval-data");
  assert_int_equal(PARSE("report", "a", "--watch", "b", "--", "-c"), MT_OK);
  const struct mt_string_list *runs = parsed.options; /* the first field */
  assert_int_equal(runs->count, 3);
  assert_string_equal(runs->item[0], "a");
  assert_string_equal(runs->item[1], "b");
  assert_string_equal(runs->item[2], "-c");
  assert_message(PARSE("report", "--watch"), "--run DIR is required");
  assert_message(PARSE("report", "1", "2", "3", "4", "5", "6", "7", "8", "9"), "9 runs: at most 8");
  assert_int_equal(PARSE("generate", "--model", "m", "--greedy"), MT_OK);
  assert_true(((const struct mt_generate_options *)parsed.options)->temperature == 0);
  assert_true(((const struct mt_generate_options *)parsed.options)->stream);
  assert_int_equal(PARSE("generate", "--model", "m", "--no-stream"), MT_OK);
  assert_false(((const struct mt_generate_options *)parsed.options)->stream);
  assert_message(PARSE("generate", "--model", "m", "--greedy", "--temperature", "1"), "exclude");
  assert_message(PARSE("eval", "--model", "m"), "one of --data and --ids is required");
  assert_message(PARSE("eval", "--model", "m", "--data", "d", "--dump-logits", "f"), "needs --ids");
  assert_message(PARSE("convert", "--out", "o"), "one of --model and --init is required");
  assert_message(PARSE("convert", "--out", "o", "--init", "c", "--layout", "packed"), "--layout");
  assert_message(PARSE("convert", "--out", "o", "--model", "m", "--dtype", "int8"),
                 "--dtype: 'int8' is none of keep|fp32|bf16|fp16");
  assert_message(PARSE("bench", "--heads", "8", "--kv-heads", "3"), "no multiple");
  assert_message(PARSE("bench", "--top-k", "9"), "--top-k 9 is over --expert-count 8");
  assert_message(PARSE("bench", "--batch-size", "65536", "--max-seq-length", "1048576"),
                 "--batch-size 65536 times --max-seq-length 1048576");
}

static void values(void **state) {
  (void)state;
  static const struct {
    const char *flag, *value, *message; /* NULL: accepted */
  } cases[] = {
      {"--batch-size", "1", NULL},
      {"--batch-size", "0", "out of range"},
      {"--batch-size", "99999999999999999999", "out of range"},
      {"--batch-size", "3000000000", "out of range"},
      {"--batch-size", "8x", "'8x' is not a whole number"},
      {"--batch-size", " 8", "' 8' is not a whole number"},
      {"--batch-size", "+8", "'+8' is not a whole number"},
      {"--batch-size", "8.0", "not a whole number"},
      {"--batch-size", "", "'' is not a whole number"},
      {"--seed", "18446744073709551615", NULL},
      {"--seed", "18446744073709551616", "out of range"},
      {"--seed", "-1", "'-1' is not a whole number of 0 or more"},
      {"--lr", "1e-5", NULL},
      {"--lr", ".5", NULL},
      {"--lr", "0", "0 is out of range: above 0"},
      {"--lr", "1e-5x", "'1e-5x' is not a number"},
      {"--lr", "nan", "'nan' is not a number"},
      {"--lr", "inf", "'inf' is not a number"},
      {"--lr", "1e999", "out of range"},
      {"--lr", "0x1p3", "not a number"},
      {"--lr", "--", "'--' is not a number"},
      {"--adam-beta1", "1", "out of range"},
      {"--lr-schedule", "Cosine", "'Cosine' is none of linear|cosine|constant"},
      {"--lr-schedule", "cos", "none of"},
      {"--precision", "fp64", "'fp64' is none of fp32|bf16|fp8|mxfp8"},
      {"--model", "", "the value is empty"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char joined[128];
    snprintf(joined, sizeof joined, "%s=%s", cases[i].flag, cases[i].value);
    mt_err err = TRAIN(joined);
    if (!cases[i].message) {
      if (err) fail_msg("%s: %s", joined, mt_error_message());
    } else {
      assert_message(err, cases[i].message);
      assert_message(err, cases[i].flag); /* names the culprit */
    }
  }
}

static void sizes(void **state) {
  (void)state;
  static const struct {
    const char *text;
    uint64_t bytes; /* 0: refused */
  } cases[] = {{"1", 1},
               {"5GB", 5000000000u},
               {"5gb", 5000000000u},
               {"500MB", 500000000u},
               {"4GiB", 1 << 30},
               {"1.5KiB", 1536},
               {"10B", 10},
               {"GB", 0},
               {"5 GB", 0},
               {"5G", 0},
               {"-1GB", 0},
               {"1.2.3MB", 0},
               {"0", 0},
               {"", 0},
               {"nanGB", 0},
               {"99999999999TB", 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    uint64_t expected = cases[i].bytes;
    if (strcmp(cases[i].text, "4GiB") == 0) expected *= 4;
    mt_err err = TRAIN("--max-shard-size", cases[i].text);
    if (expected) {
      if (err) fail_msg("%s: %s", cases[i].text, mt_error_message());
      assert_true(train()->max_shard_bytes == expected);
    } else {
      assert_message(err, "--max-shard-size");
    }
  }
}

static char config_path[64];

static void write_config(const char *text, size_t length) {
  FILE *f = fopen(config_path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(text, 1, length, f), length);
  fclose(f);
}

static void config_file(void **state) {
  (void)state;
  static const char good[] = "# a run\nmodel: m\ndata: \"d e\"\nout: o\nlr: 3e-4\nseed: 9\n"
                             "skip-bad-lines: true\nfreeze: [a, 'b*']\nlr-schedule: linear\n"
                             "max-shard-size: 1GB\nexperts: loop\nlog-level: error\n";
  write_config(good, sizeof good - 1);
  assert_int_equal(PARSE("train", "--config", config_path), MT_OK);
  assert_string_equal(train()->data, "d e");
  assert_true(train()->lr == 3e-4);
  assert_int_equal(train()->seed, 9);
  assert_true(train()->skip_bad_lines);
  assert_int_equal(train()->freeze.count, 2);
  assert_string_equal(train()->freeze.item[1], "b*");
  assert_int_equal(train()->lr_schedule, MT_SCHEDULE_LINEAR);
  assert_true(train()->max_shard_bytes == 1000000000);
  assert_int_equal(train()->experts, MT_EXPERTS_LOOP); /* not overruled by the preset */
  assert_int_equal(parsed.common.log_level, 0);
  assert_true(mt_parsed_given(&parsed, "lr"));

  /* Flags win, wherever --config stands; a list is replaced, not added to. */
  assert_int_equal(PARSE("train", "--lr", "1", "--no-skip-bad-lines", "--config", config_path,
                         "--freeze", "c", "--log-level", "debug"),
                   MT_OK);
  assert_true(train()->lr == 1);
  assert_false(train()->skip_bad_lines);
  assert_int_equal(train()->freeze.count, 1);
  assert_string_equal(train()->freeze.item[0], "c");
  assert_int_equal(train()->seed, 9);
  assert_int_equal(parsed.common.log_level, 3);

  write_config("", 0); /* an empty file says nothing */
  assert_message(PARSE("train", "--config", config_path), "--model DIR is required");
  write_config("freeze: one\n", 12);
  assert_int_equal(TRAIN("--config", config_path), MT_OK);
  assert_int_equal(train()->freeze.count, 1);
}

static void config_errors(void **state) {
  (void)state;
  static const struct {
    const char *text, *message; /* what follows the file's name */
  } cases[] = {
      {"lr: 1\nlrr: 2\n", ":2: unknown key 'lrr'; did you mean 'lr'?"},
      {"zzzzzzzzzz: 2\n", ":1: unknown key 'zzzzzzzzzz'"},
      {"lr: 1\nseed: 1\nlr: 2\n", ":3: key 'lr' is there twice"},
      {"seed: 1\nlr: fast\n", ":2: lr: 'fast' is not a number"},
      {"lr: -1\n", ":1: lr: -1 is out of range"},
      {"lr:\n", ":1: lr: '' is not a number"},
      {"lr: [1, 2]\n", ":1: lr must be a plain value"},
      {"lr: {a: 1}\n", ":1: lr must be a plain value"},
      {"freeze: {a: 1}\n", ":1: freeze must be a plain value"},
      {"freeze:\n  - a\n  - [b]\n", ":3: freeze must be a plain value"},
      {"skip-bad-lines: yes\n", ":1: skip-bad-lines: 'yes' is neither true nor false"},
      {"lr-schedule: square\n", ":1: lr-schedule: 'square' is none of"},
      {"config: x\n", ":1: 'config' is for the command line alone"},
      {"help: true\n", ":1: 'help' is for the command line alone"},
      {"- lr\n", ":1: `name: value` lines expected"},
      {"lr\n", ":1: `name: value` lines expected"},
      {"? [a]\n: 1\n", ":1: a key must be a plain value"},
      {"seed: &a 1\nlr: *a\n", ":2: lr: aliases are not supported"},
      {"lr: 1\n---\nlr: 2\n", ":2: a second document"},
      {"model: \"a\\0b\"\n", ":1: model holds a zero byte"},
      {"lr: \"1\nseed: 1\n", ":"},
      {"lr: 1\n\tseed: 2\n", ":2: "},
      {"model: \xff\xfe\n", ":"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char message[256];
    write_config(cases[i].text, strlen(cases[i].text));
    snprintf(message, sizeof message, "%s%s", config_path, cases[i].message);
    assert_message(TRAIN("--config", config_path), message);
  }
  assert_int_equal(TRAIN("--config", "/no/such/file"), MT_ENOENT);
  assert_non_null(strstr(mt_error_message(), "/no/such/file"));
}

/* The same through the program: where the message goes, and the exit status. */
static void exit_statuses(void **state) {
  (void)state;
  static struct cli_result r;
  CLI(&r, "train", "--lr", "x", "--model", "m", "--data", "d", "--out", "o");
  assert_int_equal(r.status, 2);
  assert_string_equal(r.out, "");
  assert_string_equal(r.err, "moetune: error: --lr: 'x' is not a number\n"
                             "Try 'moetune train --help'.\n");
  CLI(&r, "inspect", "/no/such/model");
  assert_int_equal(r.status, 1);
  assert_string_equal(r.out, "");
  assert_non_null(strstr(r.err, "moetune: error: "));
  assert_non_null(strstr(r.err, "/no/such/model"));
}

static int make_path(void **state) {
  (void)state;
  snprintf(config_path, sizeof config_path, "/tmp/moetune-config-XXXXXX");
  int fd = mkstemp(config_path);
  return fd < 0 ? -1 : close(fd);
}

static int remove_path(void **state) {
  (void)state;
  mt_parsed_free(&parsed);
  return unlink(config_path);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(defaults),      cmocka_unit_test(presets),
      cmocka_unit_test(forms),         cmocka_unit_test(other_commands),
      cmocka_unit_test(values),        cmocka_unit_test(sizes),
      cmocka_unit_test(config_file),   cmocka_unit_test(config_errors),
      cmocka_unit_test(exit_statuses),
  };
  return cmocka_run_group_tests(tests, make_path, remove_path);
}
