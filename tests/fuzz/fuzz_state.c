/* Any bytes as a checkpoint's training state, moetune-state.json and behind a 0 byte
 * moetune-state.safetensors: refused, or loaded into a model of one parameter. */
#include <math.h>

#include "fuzz/files.h"
#include "quant/recipe.h"
#include "train/state.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static mt_err upload(struct mt_backend *be, void *to, const void *from, size_t size) {
  (void)be;
  memcpy(to, from, size);
  return MT_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static float value[4][2];
  const uint8_t *part;
  size_t n = fuzz_part(&data, &size, &part);
  fuzz_file("moetune-state.json", part, n);
  fuzz_file("moetune-state.safetensors", data, size);
  struct mt_param p = {.name = "w", .rank = 1, .dim = {2}, .learns = true};
  struct mt_tensor *form[] = {&p.compute, &p.master, &p.m, &p.v};
  for (int i = 0; i < 4; i++)
    *form[i] = (struct mt_tensor){.data = value[i], .dtype = MT_F32, .rank = 1, .dim = {2}};
  struct mt_session s = {.recipe = mt_recipe_choose("fp32", "fp32"), .be = {.upload = upload}};
  s.model.params = s.whole = (struct mt_params){.row = &p, .count = 1};
  struct mt_dataset *none = calloc(1, 1 << 16); /* its statistics are all 0 */
  struct mt_loader l = {.data = none};
  struct mt_optimizer o = {0};
  struct mt_train_options options = {
      .seed = 1, .batch_size = 2, .grad_accum = 1, .max_seq_length = 32};
  if (!none) abort();
  if (mt_state_load(fuzz_dir, &s, &o, &l, &options) == MT_OK &&
      (o.step < 0 || l.next.epoch < 0 || l.next.index < 0))
    __builtin_trap();
  free(none);
  return 0;
}
