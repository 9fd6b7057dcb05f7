/* Tokenizer speed on one core: tokenizer TOKENIZER.json TEXT [REPEATS]. Encodes the whole text as
 * one, then a repeated letter, and prints MB/s (10^6 bytes of text a second, best of REPEATS). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/files.h"
#include "data/tokenizer.h"

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static mt_err measure(struct mt_encoder *e, const char *what, const char *text, size_t size,
                      int repeats) {
  struct mt_ids ids = {0};
  double best = 1e30;
  mt_err err = MT_OK;
  for (int i = 0; i < repeats && !err; i++) {
    double begin = now_s();
    ids.count = 0;
    err = mt_encode(e, text, size, MT_ENCODE_ADD_SPECIAL, &ids);
    double s = now_s() - begin;
    best = s < best ? s : best;
  }
  if (!err) {
    printf("%-16s %10zu bytes %10zu tokens %8.1f MB/s  %.3f s\n", what, size, ids.count,
           (double)size / best * 1e-6, best);
  }
  free(ids.id);
  return err;
}

int main(int argc, char **argv) {
  struct mt_tokenizer *t = NULL;
  struct mt_encoder *e = NULL;
  char *text = NULL, *letters = NULL;
  size_t size, million = 1000000;
  mt_err err = MT_EINVAL;
  if (argc < 3) {
    fprintf(stderr, "usage: tokenizer TOKENIZER.json TEXT [REPEATS]\n");
    return 2;
  }
  int repeats = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 5;
  double begin = now_s();
  MT_GO(mt_tokenizer_load(argv[1], &t));
  printf("%-16s %.3f s\n", "load", now_s() - begin);
  MT_GO(mt_encoder_create(t, &e));
  MT_GO(mt_file_read(argv[2], (size_t)1 << 32, &text, &size));
  MT_GO(measure(e, "text", text, size, repeats));
  letters = malloc(million);
  if (!letters) {
    err = mt_fail(MT_ENOMEM, "a million letters");
    goto done;
  }
  memset(letters, 'a', million);
  err = measure(e, "one letter", letters, million, 1);
done:
  if (err) fprintf(stderr, "%s\n", mt_error_message());
  free(letters);
  free(text);
  mt_encoder_free(e);
  mt_tokenizer_free(t);
  return err != MT_OK;
}
