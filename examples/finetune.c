/* Fine-tunes a checkpoint and asks the result a question.
 *   finetune MODEL_DIR TRAIN.jsonl HELD_OUT.jsonl OUT_DIR [STEPS]
 * cc finetune.c $(pkg-config --cflags --libs moetune) */
#include <moetune/moetune.h>

#include <stdio.h>
#include <stdlib.h>

static void check(mt_err err) {
  if (!err) return;
  fprintf(stderr, "finetune: %s: %s\n", mt_err_name(err), mt_error_message());
  exit(1);
}

static double held_out_loss(mt_tuner *tuner, const char *path) {
  struct mt_tuner_eval_result e;
  mt_corpus *corpus;
  check(mt_corpus_open(tuner, path, 0, &corpus));
  check(mt_tuner_evaluate(tuner, corpus, &e));
  mt_corpus_close(corpus);
  return e.loss;
}

int main(int argc, char **argv) {
  if (argc < 5) {
    fprintf(stderr, "usage: finetune MODEL_DIR TRAIN.jsonl HELD_OUT.jsonl OUT_DIR [STEPS]\n");
    return 2;
  }
  long steps = argc > 5 ? atol(argv[5]) : 100;
  struct mt_tuner_options options = mt_tuner_defaults(argv[1]);
  options.max_seq_length = 192;
  options.lr = 5e-4;
  mt_tuner *tuner;
  mt_corpus *corpus;
  check(mt_tuner_open(&options, &tuner));
  check(mt_corpus_open(tuner, argv[2], 0, &corpus));
  printf("held-out loss %.4f before\n", held_out_loss(tuner, argv[3]));
  for (long i = 0; i < steps; i++) {
    struct mt_tuner_step_result step;
    check(mt_tuner_step(tuner, corpus, &step));
    if (step.step % 10 == 0) printf("step %lld loss %.4f\n", (long long)step.step, step.loss);
  }
  printf("held-out loss %.4f after\n", held_out_loss(tuner, argv[3]));
  check(mt_tuner_save(tuner, argv[4]));
  mt_corpus_close(corpus);
  mt_tuner_close(tuner);

  options.model = argv[4];
  options.training = 0;
  check(mt_tuner_open(&options, &tuner));
  printf("held-out loss %.4f reopened\n", held_out_loss(tuner, argv[3]));
  struct mt_prompt prompt = mt_prompt_defaults("What is a brick?");
  char *answer;
  prompt.chat = 1;
  check(mt_tuner_generate(tuner, &prompt, &answer));
  printf("%s\n", answer);
  mt_text_free(answer);
  mt_tuner_close(tuner);
  return 0;
}
