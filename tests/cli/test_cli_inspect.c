/* `moetune inspect`: what it says of checkpoints whole, partial and broken, and of data; nothing in
 * a file speaks to the terminal. */
#include <math.h>

#include "cli/run.h"
#include "hf/checkpoint.h"
#include "temp_dir.h"

#define MIXTRAL MT_SOURCE_DIR "/tests/golden/tokenizer-mixtral"
#define GREEN   "\x1b[1;32m"
#define PLAIN   "\x1b[0m"
#define LEFT    "\xe2\x9f\xa6"
#define RIGHT   "\xe2\x9f\xa7"

static struct cli_result r;

struct fixture {
  char dir[MT_PATH_MAX], base[MT_PATH_MAX], model[MT_PATH_MAX], data[MT_PATH_MAX];
};

static const char config[] =
    "{\"model_type\":\"mixtral\",\"hidden_size\":16,\"intermediate_size\":24,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,"
    "\"num_local_experts\":4,\"num_experts_per_tok\":2,\"vocab_size\":32000,"
    "\"bos_token_id\":1,\"eos_token_id\":2,\"tie_word_embeddings\":true,"
    "\"output_router_logits\":true,\"router_aux_loss_coef\":0.02}";

static int open_fixture(void **state) {
  struct fixture *f = calloc(1, sizeof *f);
  temp_dir(f->dir);
  OK(mt_path_join(f->base, f->dir, "base"));
  OK(mt_path_join(f->model, f->dir, "model"));
  OK(mt_path_join(f->data, f->dir, "data.jsonl"));
  OK(mt_dir_create(f->base));
  temp_copy(MIXTRAL, "tokenizer.json", f->base);
  temp_text(f->base, "config.json", config);
  OK(mt_hf_init(f->base, f->model, 1, MT_BF16));
  OK(setenv("XDG_CACHE_HOME", f->dir, 1) ? MT_EIO : MT_OK);
  *state = f;
  return 0;
}

static int close_fixture(void **state) {
  struct fixture *f = *state;
  OK(mt_dir_remove(f->dir));
  free(f);
  return 0;
}

static void has(const char *part) {
  if (!strstr(r.out, part)) fail_msg("'%s' is missing in:\n%s%s", part, r.out, r.err);
}

static void lacks(const char *part) {
  if (strstr(r.out, part)) fail_msg("'%s' should not be in:\n%s", part, r.out);
}

static void no_control_characters(void) {
  for (const char *p = r.out; *p; p++) {
    if ((uint8_t)*p < 0x20 && *p != '\n' && *p != '\t') fail_msg("byte %d in:\n%s", *p, r.out);
  }
}

/* A changed file is told of; --verify makes it the exit status, and eval's. */
static void checksums(void **state) {
  struct fixture *f = *state;
  char dir[MT_PATH_MAX], list[MT_PATH_MAX], data[MT_PATH_MAX];
  OK(mt_path_join(dir, f->dir, "changed"));
  OK(mt_path_join(list, dir, "moetune-checksums.json"));
  OK(mt_hf_init(f->base, dir, 1, MT_BF16));
  CLI(&r, "inspect", dir, "--verify");
  assert_int_equal(r.status, 0);
  temp_text(f->dir, "one.jsonl", "{\"text\": \"one two\"}\n");
  OK(mt_path_join(data, f->dir, "one.jsonl"));
  CLI(&r, "eval", "--model", dir, "--data", data, "--verify", "--device", "cpu", "--threads", "1");
  assert_int_equal(r.status, 0);
  temp_text(dir, "generation_config.json", "{}"); /* not listed */
  temp_text(dir, "config.json", config);
  CLI(&r, "inspect", dir, "--verify");
  assert_int_equal(r.status, 0);
  char changed[sizeof config];
  memcpy(changed, config, sizeof config);
  char *theta = strstr(changed, "0.02");
  assert_non_null(theta);
  theta[3] = '3';
  temp_text(dir, "config.json", changed);
  CLI(&r, "inspect", dir);
  assert_int_equal(r.status, 0);
  has("checksums       '");
  has("config.json' is damaged");
  has("compatible      yes\n");
  CLI(&r, "inspect", dir, "--verify");
  assert_int_equal(r.status, 1);
  has("compatible      no\n");
  CLI(&r, "eval", "--model", dir, "--data", data, "--verify", "--device", "cpu", "--threads", "1");
  assert_int_equal(r.status, 1);
  assert_non_null(strstr(r.err, "config.json' is damaged"));
  assert_int_equal(unlink(list), 0);
  CLI(&r, "inspect", dir);
  assert_int_equal(r.status, 0);
  has("checksums       none\n");
  CLI(&r, "inspect", dir, "--verify");
  assert_int_equal(r.status, 1);
  has("has no moetune-checksums.json");
}

static void a_checkpoint(void **state) {
  struct fixture *f = *state;
  CLI(&r, "inspect", f->model);
  assert_int_equal(r.status, 0);
  has("layers          2, hidden 16, ffn 24, vocabulary 32000, tied head");
  has("32000 ids up to 31999, 58980 merges, byte fallback; 3 added tokens, 3 of them special");
  has("before a text: 1 '<s>'; unknown 0 '<unk>'");
  has("BOS 1 '<s>'; EOS 2 '</s>'; padding none");
  has("chat template   mistral\n");
  has("checksums       every file is as it was written\n");
  has("compatible      yes\n");
  has("gate_up                6144\n"); /* 2 layers x 4 experts x 2 x 24 x 16 */
  has("router                  128\n");
  has("BF16 40\n");
  has("model.layers.*.block_sparse_moe.experts.*.w1.weight");
  lacks("model.layers.0.block_sparse_moe");
  lacks("\nmemory");
  CLI(&r, "inspect", "--path", f->model, "--tensors", "--train", "--device", "cpu");
  assert_int_equal(r.status, 0);
  has("model.layers.1.block_sparse_moe.experts.3.w2.weight");
  has("model.safetensors\n");
  has("\nmemory ");
}

/* The table's numbers are the norms, computed here from the files. */
static void expert_norms(void **state) {
  struct fixture *f = *state;
  struct mt_hf_checkpoint h;
  CLI(&r, "inspect", f->model);
  OK(mt_hf_open(f->model, &h));
  for (int l = 0; l < 2; l++) {
    char row[256];
    double all[4], mean = 0;
    int least = 0, most = 0;
    for (int e = 0; e < 4; e++) {
      double sum = 0;
      for (int w = 1; w <= 3; w++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.block_sparse_moe.experts.%d.w%d.weight", l, e,
                 w);
        const struct mt_st_tensor *t = mt_st_find(&h.shard[0], name);
        assert_non_null(t);
        for (size_t i = 0; i < t->size_bytes; i += 2) {
          double x = mt_bf16_to_f32((uint16_t)(t->data[i] | t->data[i + 1] << 8));
          sum += x * x;
        }
      }
      all[e] = sqrt(sum);
      mean += all[e] / 4;
      if (all[e] < all[least]) least = e;
      if (all[e] > all[most]) most = e;
    }
    snprintf(row, sizeof row, "%5d %10.4g %10.4g (%3d) %10.4g (%3d)   %9.4g %9.4g %9.4g %9.4g\n", l,
             mean, all[least], least, all[most], most, all[0], all[1], all[2], all[3]);
    has(row);
    assert_true(mean > 0.1 && least != most);
  }
  mt_hf_close(&h);
}

static void packed_is_the_same(void **state) {
  struct fixture *f = *state;
  static struct cli_result packed;
  char to[MT_PATH_MAX];
  OK(mt_path_join(to, f->dir, "packed"));
  CLI(&r, "convert", "--model", f->model, "--out", to, "--layout", "packed", "--max-shard-size",
      "200KB");
  assert_int_equal(r.status, 0);
  CLI(&packed, "inspect", to);
  CLI(&r, "inspect", f->model);
  const char *norms = strstr(r.out, "\nL2 norms");
  assert_non_null(norms);
  assert_non_null(strstr(packed.out, norms));
  r = packed;
  has("packed experts");
  has("model.layers.*.mlp.experts.gate_up_proj");
  has("model-00001-of-00002.safetensors");
  has(" 2 shards\n");
}

static void a_config_alone(void **state) {
  struct fixture *f = *state;
  char only[MT_PATH_MAX], file[MT_PATH_MAX];
  static struct cli_result whole;
  OK(mt_path_join(only, f->dir, "only"));
  OK(mt_path_join(file, only, "config.json"));
  OK(mt_dir_create(only));
  temp_text(only, "config.json", config);
  CLI(&whole, "inspect", f->model, "--train", "--device", "cpu");
  CLI(&r, "inspect", only, "--train", "--device", "cpu");
  assert_int_equal(r.status, 0);
  has("to train, it still needs model.safetensors or model.safetensors.index.json with its "
      "shards and tokenizer.json\n");
  const char *plan = strstr(r.out, "\nmemory");
  assert_non_null(plan);
  assert_non_null(strstr(whole.out, plan)); /* the same plan */
  CLI(&whole, "inspect", file, "--train", "--device", "cpu");
  assert_int_equal(whole.status, 0);
  assert_string_equal(whole.out, r.out);
}

static void why_not(void **state) {
  struct fixture *f = *state;
  char path[MT_PATH_MAX];
  temp_text(f->model, "config.json", "{\"model_type\":\"llama\\u001b[31m\",\"hidden_size\":16}");
  CLI(&r, "inspect", f->model, "--train");
  assert_int_equal(r.status, 1);
  has("compatible      no\n                - ");
  has("model_type 'llama\\x1b[31m' is not supported");
  has("BF16 40"); /* the files are shown all the same */
  no_control_characters();
  /* Another shape than the config's. */
  char other[sizeof config];
  memcpy(other, config, sizeof config);
  memcpy(strstr(other, "24"), "25", 2);
  temp_text(f->model, "config.json", other);
  CLI(&r, "inspect", f->model);
  assert_int_equal(r.status, 1);
  has("compatible      no\n                - ");
  has(".experts.0.w1.weight' is [24,16], the config needs [25,16]");
  lacks("L2 norms");
  /* Too small a vocabulary, no such template, a broken tokenizer. */
  memcpy(other, config, sizeof config);
  memcpy(strstr(other, "32000"), "31999", 5);
  temp_text(f->model, "config.json", other);
  CLI(&r, "inspect", f->model, "--chat-template", "none");
  assert_int_equal(r.status, 1);
  has("has ids up to 31999, the model's vocab_size is 31999");
  has("no chat template 'none'");
  temp_text(f->model, "tokenizer.json", "{");
  CLI(&r, "inspect", f->model);
  assert_int_equal(r.status, 1);
  has("tokenizer       cannot be used");
  has("tokenizer.json: line");
  /* Weights without a config. */
  OK(mt_path_join(path, f->model, "config.json"));
  assert_int_equal(unlink(path), 0);
  CLI(&r, "inspect", f->model);
  assert_int_equal(r.status, 1);
  has("config.json");
  has("model.embed_tokens.weight");
  CLI(&r, "inspect", "/no/such/model");
  assert_int_equal(r.status, 1);
  assert_string_equal(r.out, "");
  assert_non_null(strstr(r.err, "'/no/such/model' is no directory"));
}

/* A tensor's name from who knows where. */
static void hostile_tensors(void **state) {
  struct fixture *f = *state;
  char path[MT_PATH_MAX];
  struct mt_st_writer w;
  static const char *const names[] = {
      "a\x1b]0;title\x07", "\xe2\x80\xaetxt.exe", "0", "..", "1.2.3", ""};
  struct mt_st_entry e[6];
  for (int i = 0; i < 6; i++) e[i] = (struct mt_st_entry){names[i], "U8", 1, {1}, 1};
  OK(mt_path_join(path, f->model, "model.safetensors"));
  OK(mt_st_create(&w, path, e, 6));
  OK(mt_st_write(&w, "123456", 6));
  OK(mt_st_finish(&w));
  for (int all = 0; all < 2; all++) {
    CLI(&r, "inspect", f->model, all ? "--tensors" : "--norms");
    assert_int_equal(r.status, 1);
    has("a\\x1b]0;title\\x07");
    has("\\xe2\\x80\\xaetxt.exe");
    has(all ? "1.2.3 " : "*.*.* ");
    no_control_characters();
  }
}

static void data(void **state) {
  struct fixture *f = *state;
  char text[4096] = "";
  for (int i = 0; i < 40; i++) {
    char line[96];
    snprintf(line, sizeof line, "{\"prompt\":\"%d is\",\"completion\":\" a number%.*s\"}\n", i,
             i % 5 * 4, " and a 1 and a 2");
    memcpy(text + strlen(text), line, strlen(line) + 1);
  }
  temp_text(f->dir, "data.jsonl", text);
  CLI(&r, "inspect", f->data, "--model", f->model, "--max-seq-length", "14", "--batch-size", "4",
      "--samples", "2", "--device", "cpu");
  if (r.status) fail_msg("%s", r.err);
  has("samples         40, ");
  has("tokens          kept in ");
  has("tokens a sample, before cutting at 14\n");
  has("####");
  has("\nmedian ");
  has("packing         10 batches of 4 samples: ");
  has("efficiency ");
  /* Not a terminal: brackets. The answers of the first two, and where they end. */
  has("  <s> 0 is" LEFT " a number</s>" RIGHT "\n");
  has("  <s> 1 is" LEFT " a number and</s>" RIGHT "\n");
  lacks("<s> 2 is");
  no_control_characters();
  /* Counted by hand: sizes of the histogram add up, and what is longer than 14 is cut. */
  int rows = 0, sum = 0, cut = 0;
  for (const char *p = strstr(r.out, " to "); p && p < strstr(r.out, "median"); p++) {
    int low, high, n;
    while (p > r.out && p[-1] != '\n') p--;
    if (sscanf(p, "%d to %d %d", &low, &high, &n) == 3) rows++, sum += n;
    p = strchr(p, '\n');
  }
  assert_true(rows > 2);
  assert_int_equal(sum, 40);
  const char *truncated = strstr(r.out, "truncated at 14: ");
  assert_non_null(truncated);
  assert_int_equal(sscanf(truncated, "truncated at 14: %d of 40", &cut), 1);
  assert_true(cut == 8); /* the longest of the five lengths */
  CLI(&r, "inspect", f->data, "--model", f->model, "--max-seq-length", "14", "--samples", "0",
      "--no-cache");
  assert_int_equal(r.status, 0);
  lacks("<s>");
  lacks("kept in");
  CLI(&r, "inspect", f->data, "--model", f->model, "--max-seq-length", "14");
  has("tokens          found in ");
}

static void colours(void **state) {
  struct fixture *f = *state;
  temp_text(
      f->dir, "data.jsonl",
      "{\"prompt\":\"a \\u001b[2J \xe2\x80\xae \xe2\x9f\xa6 b\",\"completion\":\" one\\ntwo\"}\n"
      "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},"
      "{\"role\":\"assistant\",\"content\":\"Yo \xf0\x9f\xa6\x99\"},"
      "{\"role\":\"user\",\"content\":\"So?\"},"
      "{\"role\":\"assistant\",\"content\":\"Well.\"}]}\n");
  CLI(&r, "inspect", f->data, "--model", f->model, "--color", "always");
  assert_int_equal(r.status, 0);
  has("  <s> a \\x1b[2J \\xe2\\x80\\xae \\xe2\\x9f\\xa6 b" GREEN " one" PLAIN "\n  " GREEN
      "two</s>" PLAIN "\n");
  has("<s> [INST] Hi [/INST]" GREEN " Yo \xf0\x9f\xa6\x99</s>" PLAIN);
  has("[INST] So? [/INST]" GREEN " Well.</s>" PLAIN "\n");
  lacks(LEFT);
  lacks("\x1b[2J");
  CLI(&r, "inspect", f->data, "--model", f->model);
  has("b" LEFT " one\n  two</s>" RIGHT "\n");
  no_control_characters();
  /* Every token is a target: all but the first. */
  CLI(&r, "inspect", f->data, "--model", f->model, "--train-on-prompt");
  has("<s>" LEFT " a ");
}

/* Whether a terminal gets colours: through one. */
static void terminals(void **state) {
  struct fixture *f = *state;
  if (access("/usr/bin/script", X_OK) != 0) skip();
  temp_text(f->dir, "data.jsonl", "{\"text\":\"a b\"}\n");
  static const struct {
    const char *set;
    int colour;
  } cases[] = {{"TERM=xterm", 1},
               {"TERM=dumb", 0},
               {"TERM=xterm NO_COLOR=1", 0},
               {"TERM=xterm NO_COLOR=", 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char line[4 * MT_PATH_MAX], seen[1 << 14];
    snprintf(line, sizeof line,
             "env -u NO_COLOR %s script -qec '%s inspect %s --model %s --device cpu' /dev/null "
             "</dev/null",
             cases[i].set, MT_CLI_PATH, f->data, f->model);
    FILE *p = popen(line, "r");
    assert_non_null(p);
    seen[fread(seen, 1, sizeof seen - 1, p)] = '\0';
    assert_int_equal(pclose(p), 0);
    if (!strstr(seen, "a b")) fail_msg("%s", seen);
    assert_int_equal(strstr(seen, GREEN) != NULL, cases[i].colour);
    assert_int_equal(strstr(seen, LEFT) != NULL, !cases[i].colour);
  }
}

static void names_and_usage(void **state) {
  struct fixture *f = *state;
  char odd[MT_PATH_MAX];
  OK(mt_path_join(odd, f->dir, "-x \x1b[31m'$(id)\n.jsonl"));
  temp_text(f->dir, "-x \x1b[31m'$(id)\n.jsonl", "{\"text\":\"a b\"}\n");
  CLI(&r, "inspect", odd, "--model", f->model);
  if (r.status) fail_msg("%s", r.err);
  has("-x \\x1b[31m'$(id)\\x0a.jsonl");
  no_control_characters();
  CLI(&r, "inspect");
  assert_int_equal(r.status, 2);
  assert_non_null(strstr(r.err, "a checkpoint or a data file is required"));
  CLI(&r, "inspect", odd);
  assert_int_equal(r.status, 2);
  assert_non_null(strstr(r.err, "--model DIR says whose tokenizer reads it"));
  CLI(&r, "inspect", f->model, "--model", f->model);
  assert_int_equal(r.status, 2);
  assert_non_null(strstr(r.err, "two checkpoints"));
  CLI(&r, "inspect", odd, "--model", f->model, "--train");
  assert_int_equal(r.status, 2);
  CLI(&r, "inspect", "/no/data.jsonl", "--model", f->model);
  assert_int_equal(r.status, 1);
  assert_non_null(strstr(r.err, "/no/data.jsonl"));
  temp_text(f->dir, "data.jsonl", "{\"text\":\"a b\"}\nbad\n");
  CLI(&r, "inspect", f->data, "--model", f->model);
  assert_int_equal(r.status, 1);
  assert_non_null(strstr(r.err, "data.jsonl:2"));
  CLI(&r, "inspect", f->data, "--model", f->model, "--skip-bad-lines");
  assert_int_equal(r.status, 0);
  has("malformed       1 lines, the first is line 2\n");
}

/* A row of the table of memory, as inspect and plan both print it. */
static double row(const char *text, const char *name) {
  char key[32];
  snprintf(key, sizeof key, "\n%s ", name);
  const char *at = strstr(text, key);
  if (!at) at = strstr(text, (snprintf(key, sizeof key, "\n  %s ", name), key));
  if (!at) fail_msg("no '%s' in:\n%s", name, text);
  return strtod(at + strlen(key), NULL);
}

static const char *memory_of(const struct cli_result *said) {
  const char *table = strstr(said->out, "\nmemory ");
  if (!table) fail_msg("no memory in:\n%s%s", said->out, said->err);
  return table;
}

/* Ranks, layers and experts of a mesh with stages, and what rank 0 would hold of them in training:
 * its parameters by hand, all of it as `plan` says of the fullest stage, which is the first. */
static void a_mesh_of_stages(void **state) {
  struct fixture *f = *state;
  static struct cli_result planned;
  static const char *const kinds[] = {"parameters", "gradients", "optimizer", "activations"};
  char only[MT_PATH_MAX], text[1024];
  const char *tied = strstr(config, "\"tie"), *layers = strstr(config, "2,\"num_attention_heads");
  assert_true(tied && layers);
  snprintf(text, sizeof text, "%.*s5%.*s\"tie_word_embeddings\":false}", (int)(layers - config),
           config, (int)(tied - layers - 1), layers + 1);
  OK(mt_path_join(only, f->dir, "only"));
  OK(mt_dir_create(only));
  temp_text(only, "config.json", text);
  for (int zero = 0; zero < 2; zero++) {
    const char *z = zero ? "--zero=1" : "--zero=0";
    CLI(&r, "inspect", only, "--mesh", "8", "--ep-size", "2", "--pp-size", "2", "--train",
        "--device", "cpu", "--precision", "fp32", "--max-seq-length", "64", "--batch-size", "2", z);
    assert_int_equal(r.status, 0);
    has("\nmesh            8 ranks: 2 x data, 2 x expert, 2 x pipeline\n");
    has("\n     0      0      0      0  0-2         0-1\n"
        "     1      0      1      0  0-2         2-3\n"
        "     2      1      0      0  0-2         0-1\n"
        "     3      1      1      0  0-2         2-3\n"
        "     4      0      0      1  3-4         0-1\n"
        "     5      0      1      1  3-4         2-3\n"
        "     6      1      0      1  3-4         0-1\n"
        "     7      1      1      1  3-4         2-3\n");
    has("  of rank 0\n");
    CLI(&planned, "plan", only, "--gpus", "8", "--ep-size", "2", "--pp-size", "2", "--device",
        "cpu", "--precision", "fp32", "--max-seq-length", "64", "--batch-size", "2",
        "--micro-batches", "2", z);
    const char *memory = memory_of(&planned);
    for (int k = 0; k < 4; k++) {
      double is = row(memory_of(&r), kinds[k]), want = row(memory, kinds[k]);
      if (is != want) fail_msg("zero %d: %s: %.0f, planned %.0f", zero, kinds[k], is, want);
    }
    /* Norms, attention, router and two of four experts of three layers, and the embedding; each
     * begins at a multiple of a cache line or more. */
    enum { LAYER = 2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 4 * 16 + 2 * 3 * 24 * 16, ROWS = 3 * 8 + 1 };
    double elements = 32000 * 16 + 3 * LAYER, bytes = row(memory_of(&r), "parameters");
    if (bytes < 4 * elements || bytes > 4 * elements + ROWS * 512.0)
      fail_msg("%.0f bytes for %.0f parameters", bytes, elements);
  }
  double cut = row(memory_of(&r), "optimizer");
  CLI(&r, "inspect", only, "--mesh", "2", "--pp-size", "2", "--train", "--device", "cpu",
      "--precision", "fp32", "--zero", "0");
  assert_true(cut < 0.5 * row(memory_of(&r), "optimizer")); /* of four ranks that share it */
  CLI(&r, "inspect", only, "--mesh", "8", "--pp-size", "8", "--train", "--device", "cpu");
  assert_int_not_equal(r.status, 0); /* five layers */
  assert_non_null(strstr(r.err, "--pp-size 8"));
  CLI(&r, "inspect", f->model, "--mesh", "2", "--pp-size", "2", "--train", "--device", "cpu");
  assert_int_not_equal(r.status, 0);
  assert_non_null(strstr(r.err, "tie_word_embeddings"));
}

#define T(f) cmocka_unit_test_setup_teardown(f, open_fixture, close_fixture)
int main(void) {
  const struct CMUnitTest tests[] = {
      T(a_checkpoint),   T(checksums), T(expert_norms),    T(packed_is_the_same),
      T(a_config_alone), T(why_not),   T(hostile_tensors), T(data),
      T(colours),        T(terminals), T(names_and_usage), T(a_mesh_of_stages),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
