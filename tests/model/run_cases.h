/* Whole runs of `moetune train` on a small random checkpoint: the same again, and resumed. */
#ifndef TESTS_MODEL_RUN_CASES_H
#define TESTS_MODEL_RUN_CASES_H

#include "hf/checkpoint.h"
#include "temp_dir.h"
#include "train/commands.h"

/* A checkpoint of random weights with Mixtral's tokenizer, and a data file. */
static inline void make_run(const char *dir, char model[MT_PATH_MAX], char data[MT_PATH_MAX]) {
  char base[MT_PATH_MAX], tokenizer[MT_PATH_MAX], text[8192] = "";
  OK(mt_path_join(base, dir, "base"));
  OK(mt_path_join(model, dir, "model"));
  OK(mt_path_join(data, dir, "data.jsonl"));
  OK(mt_dir_create(base));
  const char *golden =
      getenv("MOETUNE_GOLDEN_DIR"); /* where this runs elsewhere than it was built */
  OK(mt_path_join(tokenizer, golden ? golden : MT_SOURCE_DIR "/tests/golden", "tokenizer-mixtral"));
  temp_copy(tokenizer, "tokenizer.json", base);
  temp_text(base, "config.json",
            "{\"model_type\":\"mixtral\",\"hidden_size\":32,\"intermediate_size\":32,"
            "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,"
            "\"num_local_experts\":4,\"num_experts_per_tok\":2,\"vocab_size\":32000,"
            "\"bos_token_id\":1,\"eos_token_id\":2,\"tie_word_embeddings\":true,"
            "\"output_router_logits\":true,\"router_aux_loss_coef\":0.02}");
  OK(mt_hf_init(base, model, 1, MT_BF16));
  for (int i = 0; i < 24; i++) {
    char line[128];
    snprintf(line, sizeof line, "{\"prompt\":\"Item %d is\",\"completion\":\" number %d of %d\"}\n",
             i, i * 7 % 11, i % 3);
    memcpy(text + strlen(text), line, strlen(line) + 1);
  }
  temp_text(dir, "data.jsonl", text);
}

static inline struct mt_train_options train_options(const char *device, const char *model,
                                                    const char *data, const char *out) {
  return (struct mt_train_options){
      .model = model,
      .data = data,
      .out = out,
      .ep_size = 1,
      .pp_size = 1,
      .batch_size = 3,
      .grad_accum = 2,
      .max_seq_length = 24,
      .warmup_steps = 2,
      .train_steps = 8,
      .epochs = 1,
      .lr = 1e-3,
      .weight_decay = 0.1,
      .adam_beta1 = 0.9,
      .adam_beta2 = 0.95,
      .adam_eps = 1e-8,
      .grad_clip = 1,
      .seed = 7,
      .device = {.device = device, .kernels = "native", .precision = "bf16", .threads = 2},
      .experts = MT_EXPERTS_GROUPED,
      .blocks = MT_BLOCKS_FUSED,
      .router_aux_coef = -1,
      .router_z_loss = 1e-2,
      .log_every = 100};
}

static inline void same_file(const char *a_dir, const char *b_dir, const char *name, bool same) {
  char a[MT_PATH_MAX], b[MT_PATH_MAX];
  struct mt_map x, y;
  OK(mt_path_join(a, a_dir, name));
  OK(mt_path_join(b, b_dir, name));
  OK(mt_map_open(a, &x));
  OK(mt_map_open(b, &y));
  assert_int_equal(x.size_bytes, y.size_bytes);
  assert_int_equal(memcmp(x.data, y.data, x.size_bytes) == 0, same);
  mt_map_close(&x);
  mt_map_close(&y);
}

/* Lines of a file that hold the text. */
static inline int count_lines(const char *dir, const char *name, const char *text) {
  char path[MT_PATH_MAX], *all;
  size_t size;
  int n = 0;
  OK(mt_path_join(path, dir, name));
  OK(mt_file_read(path, 1 << 20, &all, &size));
  for (char *at = all, *end; at < all + size && (end = strchr(at, '\n')); at = end + 1) {
    *end = '\0';
    n += strstr(at, text) != NULL;
  }
  free(all);
  return n;
}

/* Where the device has graphs, the second run is without them. */
static inline void run_repeats_and_resumes(const char *device, const char *precision,
                                           const char *states) {
  char dir[MT_PATH_MAX], model[MT_PATH_MAX], data[MT_PATH_MAX], a[MT_PATH_MAX], b[MT_PATH_MAX],
      x[MT_PATH_MAX], y[MT_PATH_MAX];
  temp_dir(dir);
  make_run(dir, model, data);
  OK(mt_path_join(a, dir, "a"));
  OK(mt_path_join(b, dir, "b"));
  struct mt_train_options o = train_options(device, model, data, a);
  o.save_every = 5;
  o.device.optim_state = states;
  o.device.precision = precision;
  if (strcmp(precision, "bf16") != 0) o.experts = MT_EXPERTS_FUSED;
  OK(mt_train_run(&o));
  OK(mt_path_join(x, a, "checkpoint-10"));
  assert_int_equal(count_lines(a, "metrics.jsonl", "{"), 10);
  bool graphs = strcmp(device, "cuda") == 0;
  int replayed = count_lines(a, "metrics.jsonl", "\"graph\":true");
  assert_true(graphs ? replayed >= 7 : replayed == 0);
  OK(mt_path_join(y, a, "checkpoint-5"));
  same_file(x, y, "moetune-state.safetensors", false); /* it does learn */
  /* The same again. */
  o.out = b;
  o.device.graphs = "off";
  OK(mt_train_run(&o));
  OK(mt_path_join(y, b, "checkpoint-10"));
  same_file(x, y, "moetune-state.safetensors", true);
  assert_int_equal(count_lines(b, "metrics.jsonl", "\"graph\":true"), 0);
  /* From the middle, in the place of what followed. */
  char middle[MT_PATH_MAX];
  OK(mt_path_join(middle, a, "checkpoint-5"));
  o.resume = middle;
  o.device.graphs = "auto";
  OK(mt_dir_remove(y));
  OK(mt_train_run(&o));
  same_file(x, y, "moetune-state.safetensors", true);
  same_file(x, y, "model.safetensors", true);
  assert_int_equal(count_lines(b, "metrics.jsonl", "{"), 10);
  /* Another seed is another run: refused by name. */
  o.seed = 8;
  FAILS(mt_train_run(&o), MT_EINVAL, "--seed");
  o.seed = 7;
  o.device.precision = "bf16";
  o.device.optim_state = strcmp(states, "fp32") == 0 ? "bf16" : "fp32";
  FAILS(mt_train_run(&o), MT_EINVAL,
        strcmp(precision, "bf16") == 0 ? "--optim-state" : "--precision");
  o.resume = "";
  o.out = model;
  FAILS(mt_train_run(&o), MT_ENOENT, "no checkpoint to resume");
  OK(mt_dir_remove(dir));
}

#endif
