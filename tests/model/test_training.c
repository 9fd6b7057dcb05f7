/* The run around the model: steps, accumulation, resuming, stopping, memory, and that nothing is
 * allocated once it runs. */
#include "model/run_cases.h"
#include "model/small.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/sampler.h"

#if defined(__SANITIZE_ADDRESS__)
#define COUNTS_ALLOCATIONS 0
#else
#define COUNTS_ALLOCATIONS 1
/* The program's own allocator, counted. */
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t size);
static _Atomic long allocations;
void *malloc(size_t size) {
  allocations++;
  return __libc_malloc(size);
}
void *calloc(size_t n, size_t size) {
  allocations++;
  return __libc_calloc(n, size);
}
void *realloc(void *p, size_t size) {
  allocations++;
  return __libc_realloc(p, size);
}
#endif

static struct mt_optimizer_options adam(double lr) {
  return (struct mt_optimizer_options){.lr = lr,
                                       .beta1 = 0.9,
                                       .beta2 = 0.95,
                                       .eps = 1e-8,
                                       .weight_decay = 0.1,
                                       .clip = 1,
                                       .schedule = MT_SCHEDULE_CONSTANT};
}

static const struct mt_model_options grouped = {
    .experts = MT_EXPERTS_GROUPED, .blocks = MT_BLOCKS_FUSED, .aux_coef = 0.01, .training = true};

static void nothing_allocates_after_the_first_step(void **state) {
  (void)state;
#if COUNTS_ALLOCATIONS
  char dir[MT_PATH_MAX];
  struct mt_metrics metrics;
  temp_dir(dir);
  OK(mt_metrics_open(&metrics, dir, 0, false, 8));
  for (int way = 0; way < 4; way++) {
    struct small_model s;
    struct mt_optimizer o;
    struct mt_step_queue q;
    struct small_batch b;
    struct mt_optimizer_options oo = adam(1e-3);
    struct mt_config c = small_config();
    struct mt_model_options mo = grouped;
    struct mt_step_result r;
    mo.experts = (enum mt_experts_strategy)(way & 1);
    mo.blocks = (enum mt_blocks_strategy)(way >> 1);
    small_open(&s, "cpu", way & 1 ? "fp32" : "bf16", &c, mo);
    OK(mt_optimizer_create(&o, &s.m, &oo));
    OK(mt_step_queue_create(&q, &o, true));
    struct mt_batch *micro[] = {&b.b};
    long before = 0;
    for (int step = 0; step < 4; step++) {
      small_batch(&b, c.vocab, (uint64_t)step);
      if (step == 1) before = allocations;
      OK(mt_step_run(&q, micro, 1, &r));
      OK(mt_metrics_step(&metrics, &r, &s.m, true));
    }
    assert_int_equal(allocations, before);
    mt_step_queue_destroy(&q);
    mt_optimizer_destroy(&o);
    small_close(&s);
  }
  mt_metrics_close(&metrics);
  OK(mt_dir_remove(dir));
#else
  print_message("not counted under a sanitizer's allocator\n");
#endif
}

static void memory_equals_the_plan(void **state) {
  (void)state;
  struct small_model s;
  struct mt_params params;
  struct mt_config c = small_config();
  for (int way = 0; way < 6; way++) {
    static const char *const recipes[] = {"fp32", "bf16", "bf16-states"};
    const char *recipe = recipes[way % 3];
    struct mt_model_options mo = grouped;
    struct mt_memory planned, taken;
    mo.training = way < 3;
    small_open(&s, "cpu", recipe, &c, mo);
    OK(mt_params_build(&c, NULL, &params));
    OK(mt_model_plan(&c, &params, s.m.recipe, &s.be, &s.m.options, &planned));
    taken = mt_model_memory(&s.m);
    assert_memory_equal(&planned, &taken, sizeof planned);
    assert_true(s.m.parameters.used_bytes == s.m.parameters.capacity_bytes);
    assert_true(s.m.activations.used_bytes == s.m.activations.capacity_bytes);
    assert_true((planned.gradients > 0) == mo.training);
    if (mo.training && way % 3 == 2) /* 8 bytes a parameter, but for alignment */
      assert_true(planned.optimizer == 2 * planned.gradients &&
                  planned.parameters == planned.gradients);
    mt_params_free(&params);
    small_close(&s);
  }
}

/* Two micro-batches of different target counts give the gradient of one batch of both: the loss is
 * divided once, by the count of both. */
static void accumulation_counts_tokens(void **state) {
  (void)state;
  struct mt_config c = small_config();
  struct mt_model_options mo = grouped;
  struct small_model both, apart;
  struct small_batch b;
  struct mt_step_result r1, r2;
  mo.aux_coef = 0;
  small_open(&both, "ref", "fp64", &c, mo);
  small_open(&apart, "ref", "fp64", &c, mo);
  small_batch(&b, c.vocab, 1);
  struct mt_batch *whole[] = {&b.b};
  OK(mt_step_gradients(&both.m, whole, 1, &r1));
  /* The first sequence, then the other two. */
  struct mt_batch first = b.b, rest = b.b;
  int cut = b.cu[1];
  int32_t cu[3] = {0, b.cu[2] - cut, b.cu[3] - cut};
  first.token_count = first.valid_count = cut;
  first.sequence_count = 1;
  rest.ids += cut, rest.positions += cut, rest.labels += cut;
  rest.cu_seqlens = cu;
  rest.sequence_count = 2;
  rest.valid_count = rest.token_count = b.cu[3] - cut;
  first.target_count = 0;
  for (int i = 0; i < cut; i++) first.target_count += b.labels[i] >= 0;
  rest.target_count = b.b.target_count - first.target_count;
  assert_int_not_equal(first.target_count, rest.target_count);
  struct mt_batch *micro[] = {&first, &rest};
  OK(mt_step_gradients(&apart.m, micro, 2, &r2));
  assert_true(fabs(r1.loss - r2.loss) < 1e-12);
  for (int i = 0; i < both.m.params.count; i++) {
    const double *x = both.m.params.row[i].grad.data, *y = apart.m.params.row[i].grad.data;
    for (int64_t k = 0; k < mt_param_count(&both.m.params.row[i]); k++)
      assert_true(fabs(x[k] - y[k]) < 1e-7);
  }
  rest.target_count = first.target_count = 0;
  FAILS(mt_step_gradients(&apart.m, micro, 2, &r2), MT_EFORMAT, "no token");
  small_close(&both);
  small_close(&apart);
}

static double norm_of(struct mt_optimizer *o) {
  OK(mt_optimizer_norm(o));
  return sqrt(*o->grad_sumsq);
}

static double norm_by_hand(const struct mt_model *m) {
  double sum = 0;
  for (int i = 0; i < m->params.count; i++) {
    const struct mt_tensor *g = &m->params.row[i].grad;
    for (int64_t k = 0; g->data && k < mt_count(g); k++) {
      double x = g->dtype == MT_BF16 ? (double)mt_bf16_to_f32(((uint16_t *)g->data)[k])
                                     : (double)((float *)g->data)[k];
      sum += x * x;
    }
  }
  return sqrt(sum);
}

static bool nearly(double a, double b) {
  return fabs(a - b) < 1e-9 * b;
}

/* The step's norm, in part left by its last pass, is that of the gradients that it made; a norm
 * asked for afterwards is of the gradients as they are then. */
static void the_norm_is_of_the_gradients(void **state) {
  (void)state;
  for (int way = 0; way < 16; way++) {
    struct small_model s;
    struct mt_optimizer o;
    struct mt_step_queue q;
    struct small_batch a, b;
    struct mt_optimizer_options oo = adam(1e-3);
    struct mt_config c = small_config();
    struct mt_model_options mo = grouped;
    struct mt_step_result r;
    struct mt_params params;
    static const enum mt_experts_strategy experts[] = {MT_EXPERTS_GROUPED, MT_EXPERTS_LOOP};
    mo.experts = experts[way & 1];
    c.tied_head = way >> 1 & 1;
    mo.token_capacity = SMALL_TOKENS, mo.sequence_capacity = SMALL_SEQUENCES;
    OK(mt_backend_create(&s.be, "cpu", 2));
    OK(mt_params_build(&c, NULL, &params));
    if (way & 4) mt_params_find(&params, MT_PARAM_DOWN, 1)->learns = false;
    OK(mt_model_create(&s.m, &c, &params, mt_recipe_find(way & 8 ? "bf16-states" : "fp32"), &s.be,
                       &mo));
    small_weights(&s.m, 3);
    OK(mt_optimizer_create(&o, &s.m, &oo));
    OK(mt_step_queue_create(&q, &o, true));
    small_batch(&a, c.vocab, 1), small_batch(&b, c.vocab, 2);
    struct mt_batch *micro[] = {&a.b, &b.b};
    for (int count = 2; count >= 1; count--) { /* the only pass of a step leaves squares */
      OK(mt_step_run(&q, micro, count, &r));
      double norm = norm_by_hand(&s.m);
      assert_true(nearly(r.grad_norm, norm));
      assert_true(nearly(norm_of(&o), norm));
    }

    /* A pass that leaves its squares, and gradients changed after a norm has taken them. */
    struct mt_pass pass = {.batch = &a.b, .loss_scale = 0.1, .aux_weight = 1, .sum_squares = true};
    struct mt_loss loss;
    struct mt_tensor *g = &mt_params_find(&s.m.params, MT_PARAM_GATE_UP, 0)->grad;
    OK(mt_model_train_pass(&s.m, &pass, &loss));
    assert_true(mt_params_find(&s.m.params, MT_PARAM_GATE_UP, 0)->grad_summed == !(way & 1));
    if (!(way & 1)) {
      *mt_params_find(&s.m.params, MT_PARAM_GATE_UP, 0)->grad_sumsq = 1e6; /* it is what counts */
      assert_true(norm_of(&o) > 1e3);
    }
    memset(g->data, 0x3f, mt_bytes(g));
    assert_true(nearly(norm_of(&o), norm_by_hand(&s.m)));
    /* And one that leaves none. */
    pass.sum_squares = false;
    OK(mt_model_train_pass(&s.m, &pass, &loss));
    memset(g->data, 0x3e, mt_bytes(g));
    assert_true(nearly(norm_of(&o), norm_by_hand(&s.m)));
    mt_step_queue_destroy(&q);
    mt_optimizer_destroy(&o);
    small_close(&s);
  }
}

static void not_a_number_stops_before_the_update(void **state) {
  (void)state;
  struct small_model s;
  struct mt_optimizer o;
  struct mt_step_queue q;
  struct small_batch b;
  struct mt_optimizer_options oo = adam(1e-3);
  struct mt_config c = small_config();
  struct mt_step_result r;
  small_open(&s, "cpu", "fp32", &c, grouped);
  OK(mt_optimizer_create(&o, &s.m, &oo));
  OK(mt_step_queue_create(&q, &o, true));
  small_batch(&b, c.vocab, 1);
  struct mt_batch *micro[] = {&b.b};
  float *w = mt_params_find(&s.m.params, MT_PARAM_DOWN, 1)->master.data;
  float *other = mt_params_find(&s.m.params, MT_PARAM_QKV, 0)->master.data, kept = other[3];
  for (int i = 0; i < 5 * 12 * 10; i++) w[i] = i % 3 ? w[i] : NAN;
  FAILS(mt_step_run(&q, micro, 1, &r), MT_ENUMERIC, "nan");
  assert_true(other[3] == kept);
  assert_int_equal(o.step, 0);
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
  small_close(&s);
}

static void schedules(void **state) {
  (void)state;
  struct mt_optimizer_options o = {.lr = 1, .warmup_steps = 4, .total_steps = 14};
  o.schedule = MT_SCHEDULE_LINEAR;
  assert_true(fabs(mt_schedule_lr(&o, 1) - 0.2) < 1e-12);
  assert_true(mt_schedule_lr(&o, 5) == 1);
  assert_true(fabs(mt_schedule_lr(&o, 10) - 0.5) < 1e-12);
  assert_true(mt_schedule_lr(&o, 15) == 0 && mt_schedule_lr(&o, 99) == 0);
  o.schedule = MT_SCHEDULE_COSINE;
  assert_true(fabs(mt_schedule_lr(&o, 10) - 0.5) < 1e-12);
  assert_true(mt_schedule_lr(&o, 7) > 0.8);
  o.schedule = MT_SCHEDULE_CONSTANT;
  assert_true(mt_schedule_lr(&o, 14) == 1);
}

static void sampling(void **state) {
  (void)state;
  struct mt_sampler s;
  struct mt_rng rng = mt_rng_make(1, 1);
  OK(mt_sampler_create(&s, 5));
  const float logits[5] = {0, 2, 1, 2, NAN};
  memcpy(s.logits, logits, sizeof logits);
  assert_int_equal(mt_sampler_pick(&s, 0, 1, &rng), 1); /* tie: the lower id */
  int count[5] = {0};
  for (int i = 0; i < 4000; i++) count[mt_sampler_pick(&s, 1, 1, &rng)]++;
  double total = 1 + 2 * exp(2) + exp(1);
  assert_true(fabs(count[2] / 4000.0 - exp(1) / total) < 0.03);
  assert_int_equal(count[4], 0);
  memset(count, 0, sizeof count);
  for (int i = 0; i < 500; i++) count[mt_sampler_pick(&s, 1, 0.6, &rng)]++;
  assert_int_equal(count[1] + count[3], 500); /* the nucleus holds the two likeliest */
  for (int i = 0; i < 5; i++) s.logits[i] = NAN;
  assert_int_equal(mt_sampler_pick(&s, 1, 1, &rng), -1);
  mt_sampler_destroy(&s);
}

static void progress_line(void **state) {
  (void)state;
  struct mt_progress p = {.total = 100, .log_every = 1, .terminal = true, .width = 120};
  struct mt_progress_step s = {.step = 50,
                               .loss = 1.5,
                               .grad_norm = 0.25,
                               .lr = 1e-4,
                               .tokens_per_s = 12345,
                               .elapsed_s = 75};
  char line[256];
  mt_progress_line(line, sizeof line, &p, &s);
  assert_non_null(
      strstr(line, "step 50/100  loss 1.5000  grad 0.25  lr 1.00e-04  12345 tokens/s  1:15 left"));
  assert_non_null(strstr(line, "###..."));
  assert_true(strlen(line) < 120);
  p.width = 40;
  mt_progress_line(line, sizeof line, &p, &s);
  assert_int_equal(strlen(line), 39);
  p.terminal = false;
  mt_progress_line(line, sizeof line, &p, &s);
  assert_true(strncmp(line, "step 50/100", 11) == 0);
}

static void a_run_repeats_and_resumes_bit_for_bit(void **state) {
  (void)state;
  run_repeats_and_resumes("cpu", "bf16", "fp32");
  run_repeats_and_resumes("cpu", "bf16", "bf16");
  run_repeats_and_resumes("cpu", "fp8", "fp32");
}

static char *read_text(const char *dir, const char *name) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  OK(mt_path_join(path, dir, name));
  OK(mt_file_read(path, 1 << 20, &text, &size));
  return text;
}

static bool there(const char *dir, const char *name) {
  char path[MT_PATH_MAX];
  OK(mt_path_join(path, dir, name));
  return mt_path_exists(path);
}

/* Evaluations, the best model, checkpoints kept, samples; and the samples change nothing. */
static void held_out_data_decides(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], model[MT_PATH_MAX], data[MT_PATH_MAX], a[MT_PATH_MAX], b[MT_PATH_MAX];
  temp_dir(dir);
  make_run(dir, model, data);
  OK(mt_path_join(a, dir, "a"));
  OK(mt_path_join(b, dir, "b"));
  struct mt_train_options o = train_options("cpu", model, data, a);
  o.eval_data = data;
  o.eval_every = 2;
  o.save_every = 3;
  o.keep_last = 2;
  o.keep_best = o.tensorboard = true;
  o.samples = 2;
  o.sample_tokens = 5;
  o.dead_expert_steps = 1;
  OK(mt_train_run(&o));
  assert_int_equal(count_lines(a, "samples.jsonl", "{"), 2 * 6); /* at 0, 2, ..., 10 */
  char *text = read_text(a, "samples.jsonl");
  assert_non_null(strstr(text, "{\"step\":10,\"index\":1,\"prompt\":\"Item "));
  assert_non_null(strstr(text, "\"expected\":\"number 0 of 0\""));
  free(text);
  text = read_text(a, "metrics.jsonl");
  assert_non_null(strstr(text, "\"eval_router_entropy\":["));
  assert_non_null(strstr(text, "\"eval_expert_load\":[["));
  assert_null(strstr(text, "null"));
  free(text);
  text = read_text(a, "run.json");
  assert_non_null(strstr(text, "\"status\": \"finished\""));
  assert_non_null(strstr(text, "\"best_step\": 10")); /* it learns what it is asked */
  free(text);
  assert_true(there(a, "best/model.safetensors"));
  assert_true(there(a, "checkpoint-9") && there(a, "checkpoint-10"));
  assert_false(there(a, "checkpoint-3") || there(a, "checkpoint-6"));
  /* The same without looking: the same model. */
  o.out = b;
  o.eval_every = o.save_every = 0;
  o.samples = 0;
  o.keep_best = o.tensorboard = false;
  OK(mt_train_run(&o));
  char x[MT_PATH_MAX], y[MT_PATH_MAX];
  OK(mt_path_join(x, a, "model"));
  OK(mt_path_join(y, b, "model"));
  same_file(x, y, "model.safetensors", true);
  assert_false(there(b, "samples.jsonl") || there(b, "best"));
  /* Nothing improves by that much: the second evaluation after the first ends the run, and so it
   * does where it goes on from between them, where it looks too. */
  o.eval_every = 2;
  o.save_every = 3;
  o.min_delta = 1e6;
  o.patience = 2;
  OK(mt_train_run(&o));
  text = read_text(b, "run.json");
  assert_non_null(strstr(text, "\"status\": \"stopped early\""));
  assert_non_null(strstr(text, "\"step\": 4,"));
  free(text);
  OK(mt_path_join(x, b, "checkpoint-3"));
  o.resume = x;
  OK(mt_train_run(&o));
  text = read_text(b, "metrics.jsonl");
  assert_null(strstr(text, "{\"step\":3,\"eval_loss"));
  free(text);
  text = read_text(b, "run.json");
  assert_non_null(strstr(text, "\"first_step\": 3,"));
  assert_non_null(strstr(text, "\"step\": 4,"));
  free(text);
  OK(mt_dir_remove(dir));
}

static void flip_byte(const char *dir, const char *name, size_t at) {
  char path[MT_PATH_MAX], *data;
  size_t size;
  OK(mt_path_join(path, dir, name));
  OK(mt_file_read(path, 1 << 30, &data, &size));
  data[at < size ? at : size - 1] ^= 0x01;
  temp_file(dir, name, data, size);
  free(data);
}

static void a_damaged_checkpoint_is_named(void **state) {
  (void)state;
  static const char *const names[] = {"model.safetensors", "moetune-state.safetensors",
                                      "moetune-state.json", "tokenizer.json", "config.json"};
  char dir[MT_PATH_MAX], model[MT_PATH_MAX], data[MT_PATH_MAX], a[MT_PATH_MAX], middle[MT_PATH_MAX],
      list[MT_PATH_MAX];
  temp_dir(dir);
  make_run(dir, model, data);
  OK(mt_path_join(a, dir, "a"));
  OK(mt_path_join(middle, a, "checkpoint-5"));
  OK(mt_path_join(list, middle, "moetune-checksums.json"));
  struct mt_train_options o = train_options("cpu", model, data, a);
  o.save_every = 5;
  OK(mt_train_run(&o));
  o.resume = middle;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    flip_byte(middle, names[i], SIZE_MAX); /* in the last tensor, or behind the last brace */
    FAILS(mt_train_run(&o), MT_EFORMAT, names[i]);
    if (!strstr(mt_error_message(), "damaged")) fail_msg("%s", mt_error_message());
    flip_byte(middle, names[i], SIZE_MAX);
  }
  OK(mt_train_run(&o));
  /* A run that would have ended before it; the step it ends with itself is none of those. */
  o.warmup_steps = 0;
  o.train_steps = 4;
  FAILS(mt_train_run(&o), MT_EINVAL, "is of step 5, the run would end after 4");
  o = train_options("cpu", model, data, a);
  o.save_every = 5;
  o.resume = middle;
  /* One of an earlier version has no list. */
  assert_int_equal(unlink(list), 0);
  OK(mt_train_run(&o));
  OK(mt_dir_remove(dir));
}

static void refusals(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], model[MT_PATH_MAX], data[MT_PATH_MAX];
  temp_dir(dir);
  make_run(dir, model, data);
  struct mt_train_options o = train_options("cpu", model, data, "/proc/no/out");
  FAILS(mt_train_run(&o), MT_ENOENT, "/proc/no");
  o = train_options("cpu", model, "/no/data.jsonl", dir);
  FAILS(mt_train_run(&o), MT_ENOENT, "/no/data.jsonl");
  o = train_options("cpu", "/no/model", data, dir);
  FAILS(mt_train_run(&o), MT_ENOENT, "/no/model");
  o = train_options("cpu", model, data, dir);
  o.ep_size = 2;
  FAILS(mt_train_run(&o), MT_EINVAL, "on one rank");
  o = train_options("cpu", model, data, dir);
  o.ep_size = o.pp_size = 1 << 16;
  FAILS(mt_train_run(&o), MT_EINVAL, "on one rank: start it on a multiple of 4294967296");
  o = train_options("cpu", model, data, dir);
  o.device.optim_state = "bf16";
  o.device.precision = "fp32";
  FAILS(mt_train_run(&o), MT_EINVAL, "--optim-state bf16 goes with --precision bf16");
  o = train_options("cpu", model, data, dir);
  const char *all[] = {"*"};
  o.freeze = (struct mt_string_list){all, 1};
  FAILS(mt_train_run(&o), MT_EINVAL, "frozen");
  o = train_options("cpu", model, data, dir);
  o.lr = 1e30; /* the second step sees infinities */
  FAILS(mt_train_run(&o), MT_ENUMERIC, "data.jsonl");
  OK(mt_dir_remove(dir));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(nothing_allocates_after_the_first_step),
      cmocka_unit_test(memory_equals_the_plan),
      cmocka_unit_test(accumulation_counts_tokens),
      cmocka_unit_test(the_norm_is_of_the_gradients),
      cmocka_unit_test(not_a_number_stops_before_the_update),
      cmocka_unit_test(schedules),
      cmocka_unit_test(sampling),
      cmocka_unit_test(progress_line),
      cmocka_unit_test(a_run_repeats_and_resumes_bit_for_bit),
      cmocka_unit_test(held_out_data_decides),
      cmocka_unit_test(a_damaged_checkpoint_is_named),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
