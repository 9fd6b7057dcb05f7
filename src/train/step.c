#include "train/step.h"

#include <math.h>

mt_err mt_step_gradients(struct mt_model *m, struct mt_batch *const *micro, int micro_count,
                         struct mt_step_result *out) {
  *out = (struct mt_step_result){0};
  for (int i = 0; i < micro_count; i++) out->target_count += micro[i]->target_count;
  if (out->target_count == 0) {
    return mt_fail(MT_EFORMAT, "no token of this step is a target of the loss");
  }
  double share = 1.0 / (double)out->target_count;
  for (int i = 0; i < micro_count; i++) {
    struct mt_pass pass = {.batch = micro[i],
                           .loss_scale = share,
                           .aux_weight = share * micro[i]->target_count,
                           .accumulate = i > 0};
    struct mt_loss loss;
    MT_TRY(mt_model_train_pass(m, &pass, &loss));
    out->cross_entropy += loss.cross_entropy_sum * share;
    out->aux += loss.aux * pass.aux_weight;
    out->correct_count += loss.correct_count;
    out->token_count += micro[i]->valid_count;
  }
  out->loss = out->cross_entropy + m->options.aux_coef * out->aux;
  return MT_OK;
}

mt_err mt_step_run(struct mt_model *m, struct mt_optimizer *o, struct mt_batch *const *micro,
                   int micro_count, struct mt_step_result *out) {
  MT_TRY(mt_step_gradients(m, micro, micro_count, out));
  MT_TRY(mt_optimizer_norm(o, &out->grad_norm));
  if (!isfinite(out->loss) || !isfinite(out->grad_norm)) {
    return mt_fail(MT_ENUMERIC, "loss %g, gradient norm %g", out->loss, out->grad_norm);
  }
  MT_TRY(mt_optimizer_update(o, &out->lr));
  MT_TRY(mt_phase_mark(m, MT_PHASE_OPTIMIZER));
  return mt_phase_collect(m);
}
