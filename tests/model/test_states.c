/* bf16 states on the shipped model: fine-tuning at a small learning rate learns as it does with
 * float32 states, where rounding to nearest loses most steps. */
#include "model/small.h"
#include "train/session.h"
#include "train/step.h"

/* Steps over the same few batches, again and again. A sanitizer sees in one round of them and a
 * step all that it would in five: how much they learn is held to its bounds without one. */
enum { STEPS = SANITIZED ? 4 : 15, BATCHES = 3 };

/* Rounding to nearest: the same update in float32, on copies. */
static mt_err (*cpu_adamw)(struct mt_backend *be, const struct mt_adamw_args *a);

static mt_err nearest_adamw(struct mt_backend *be, const struct mt_adamw_args *a) {
  for (int i = 0; i < a->segment_count; i++) {
    struct mt_adamw_segment s = a->segments[i];
    struct mt_tensor *wide[] = {&s.master, &s.grad, &s.m, &s.v};
    size_t n = (size_t)s.master.dim[0];
    void *narrow[4];
    for (int k = 0; k < 4; k++) {
      narrow[k] = wide[k]->data;
      wide[k]->data = malloc(n * sizeof(float));
      wide[k]->dtype = MT_F32;
      mt_dtype_convert(wide[k]->data, MT_F32, narrow[k], MT_BF16, n);
    }
    struct mt_adamw_args one = *a;
    one.segments = &s;
    one.segment_count = 1;
    MT_TRY(cpu_adamw(be, &one));
    for (int k = 0; k < 4; k++) {
      mt_dtype_convert(narrow[k], MT_BF16, wide[k]->data, MT_F32, n);
      free(wide[k]->data);
    }
  }
  return MT_OK;
}

struct run {
  struct mt_session s;
  struct mt_dataset *data;
  struct mt_loader train;
};

static void open_run(struct run *r, const char *states) {
  struct mt_device_options device = {.device = "cpu",
                                     .kernels = "native",
                                     .precision = "bf16",
                                     .threads = 1,
                                     .optim_state = states};
  struct mt_loader_options l = {
      .batch_size = 2, .micro_batches = 1, .max_seq_length = 48, .seed = 1, .world = 1};
  OK(mt_session_open(&r->s, MT_SOURCE_DIR "/models/tiny", &device, NULL, NULL));
  struct mt_dataset_options d = {.path = MT_SOURCE_DIR "/data/jargon.train.jsonl",
                                 .chat = r->s.chat,
                                 .max_seq_length = l.max_seq_length,
                                 .eos_id = r->s.checkpoint.config.eos_id};
  OK(mt_dataset_open(r->s.tokenizer, &d, &r->data));
  OK(mt_dataset_wait(r->data));
  l.pad_multiple = r->s.recipe->pad_multiple;
  OK(mt_loader_create(&r->train, r->data, &l));
  struct mt_model_options o = {.experts = MT_EXPERTS_GROUPED,
                               .blocks = MT_BLOCKS_FUSED,
                               .training = true,
                               .token_capacity = mt_loader_token_capacity(&l),
                               .sequence_capacity = l.batch_size};
  OK(mt_session_load(&r->s, &o, NULL));
}

static void close_run(struct run *r) {
  mt_loader_destroy(&r->train);
  mt_dataset_close(r->data);
  mt_session_close(&r->s);
}

/* Mean loss of the first and of the last round of batches. */
static void learn(const char *states, bool nearest, double *before, double *after) {
  struct run r = {.data = NULL};
  struct mt_optimizer o;
  struct mt_step_queue q;
  struct mt_optimizer_options oo = {.lr = 5e-5,
                                    .beta1 = 0.9,
                                    .beta2 = 0.95,
                                    .eps = 1e-8,
                                    .clip = 1,
                                    .schedule = MT_SCHEDULE_CONSTANT,
                                    .seed = 1};
  open_run(&r, states);
  if (nearest) {
    cpu_adamw = r.s.be.ops.adamw;
    r.s.be.ops.adamw = nearest_adamw;
  }
  OK(mt_optimizer_create(&o, &r.s.model, &oo));
  OK(mt_step_queue_create(&q, &o, true));
  *before = *after = 0;
  for (int step = 0; step < STEPS; step++) {
    struct mt_step_result result;
    if (step % BATCHES == 0) r.train.next = (struct mt_position){0};
    OK(mt_loader_next(&r.train));
    OK(mt_step_run(&q, r.train.list, 1, &result));
    if (step < BATCHES) *before += result.loss / BATCHES;
    if (step >= STEPS - BATCHES) *after += result.loss / BATCHES;
  }
  print_message("  states %s%s: %.4f, %.4f after\n", states, nearest ? " to nearest" : "", *before,
                *after);
  mt_step_queue_destroy(&q);
  mt_optimizer_destroy(&o);
  close_run(&r);
}

static void bf16_states_learn(void **state) {
  (void)state;
  double before[3], after[3];
  learn("fp32", false, &before[0], &after[0]);
  learn("bf16", false, &before[1], &after[1]);
  learn("bf16", true, &before[2], &after[2]);
  if (SANITIZED) return;
  double learned = before[0] - after[0];
  assert_true(learned > 0.2);
  assert_true(fabs(after[1] - after[0]) < 0.03 * after[0]);
  assert_true(fabs(before[1] - after[1] - learned) < 0.1 * learned);
  assert_true(before[2] - after[2] < 0.5 * learned);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(bf16_states_learn),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
