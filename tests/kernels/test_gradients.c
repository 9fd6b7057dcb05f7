/* Every backward operation of the reference against central differences of its forward, element by
 * element, in float64, over ragged shapes. */
#include "kernels/gradient_cases.h"

typedef void (*case_fn)(struct probe *, const struct size *, int way);
static const case_fn cases[] = {
    case_embed,   case_add,       case_rmsnorm, case_linear_dense, case_linear_grouped,
    case_rope,    case_attention, case_router,  case_aux_loss,     case_dispatch,
    case_combine, case_scatter,   case_swiglu,  case_experts,      case_head_loss,
};
enum { CASES = sizeof cases / sizeof *cases };

/* Inference, what comes after the gradient, and 8 bits (test_quant.c holds those against operations
 * that are here). Every other operation must have run in a case. */
static const char *const without_gradient[] = {
    "kv_append", "attention_cache", "tally", "sumsq", "adamw", "arrival_plan", "aux_join",
    "parts_sum",
    /* What rounds to 8 bits has no derivative: */
    "pad_offsets", "quantize", "pack_rows", "unpack_rows", "quantize_weight", "qlinear_fwd",
    "qlinear_dgrad", "qlinear_wgrad", "swiglu_quantize_fwd", "swiglu_quantize_bwd"};

static bool has_gradient(const char *op) {
  for (size_t i = 0; i < sizeof without_gradient / sizeof *without_gradient; i++) {
    if (strcmp(op, without_gradient[i]) == 0) return false;
  }
  return true;
}

static void run_all(struct probe *p, int which) {
  for (int size = 0; size < SIZES; size++) {
    for (int way = 0; way < WAYS; way++) cases[which](p, &sizes[size], way);
  }
}

static void gradients_agree_with_differences(void **state) {
  (void)state;
  struct probe p;
  int calls[OP_COUNT] = {0}, failures = 0;
  for (int i = 0; i < CASES; i++) {
    probe_open(&p, 11);
    run_all(&p, i);
    print_message("  %-28s off by %.1e of %.0e\n", p.worst_name, p.worst, tolerance);
    failures += !(p.worst < tolerance);
    for (int op = 0; op < OP_COUNT; op++) calls[op] += p.calls[op];
    mt_backend_destroy(&p.be);
  }
  for (int op = 0; op < OP_COUNT; op++) {
    if (has_gradient(mt_op_name(op)) == (calls[op] > 0)) continue;
    print_error("%s: %s\n", mt_op_name(op),
                calls[op] ? "has a case but is listed as without gradient" : "has no case");
    failures++;
  }
  assert_int_equal(failures, 0);
}

/* Bugs of the kind that is made in kernels, planted in the arguments of one operation. */
static void skip_last_token(void *args) {
  static const int32_t fewer = 4;
  struct mt_embed_bwd_args *a = args;
  if (*a->valid_count > fewer) a->valid_count = &fewer;
}

static void forget_residual(void *args) {
  ((struct mt_rmsnorm_bwd_args *)args)->dresidual.data = NULL;
}

static void overwrite_dgrad(void *args) {
  ((struct mt_linear_dgrad_args *)args)->accumulate = 0;
}

static void add_wgrad(void *args) {
  ((struct mt_linear_wgrad_args *)args)->accumulate = 1;
}

static void rotate_forward(void *args) {
  ((struct mt_rope_args *)args)->inverse = 0;
}

static void mask_off_by_one(void *args) {
  struct mt_attention_bwd_args *a = args;
  if (a->fwd.window > 0) a->fwd.window++;
}

static void scale_off(void *args) {
  ((struct mt_attention_bwd_args *)args)->fwd.scale *= 1.0001f;
}

static void miss_last_sequence(void *args) {
  struct mt_attention_bwd_args *a = args;
  if (a->fwd.sequence_count > 1) a->fwd.sequence_count--;
}

static void forget_renormalization(void *args) {
  ((struct mt_router_bwd_args *)args)->renormalize = 0;
}

static void forget_aux(void *args) {
  ((struct mt_router_bwd_args *)args)->aux_grad.data = NULL;
}

static void forget_z(void *args) {
  ((struct mt_router_bwd_args *)args)->z_grad.data = NULL;
}

static void overwrite_dispatch(void *args) {
  ((struct mt_dispatch_bwd_args *)args)->accumulate = 0;
}

static void forget_prob(void *args) {
  ((struct mt_combine_bwd_args *)args)->prob.data = NULL;
}

static void forget_row_prob(void *args) {
  ((struct mt_swiglu_bwd_args *)args)->row_prob.data = NULL;
}

static void forget_experts_row_prob(void *args) {
  ((struct mt_experts_down_dgrad_args *)args)->row_prob.data = NULL;
}

static void loss_scale_off(void *args) {
  struct mt_head_loss_args *a = args;
  static float off;
  if (!a->dx.data) return;
  off = *a->loss_scale * 1.0001f;
  a->loss_scale = &off;
}

static void planted_bugs_are_seen(void **state) {
  (void)state;
  static const struct {
    const char *name;
    enum op_id op;
    case_fn run;
    void (*bug)(void *args);
  } bugs[] = {
      {"last token skipped", OP_embed_bwd, case_embed, skip_last_token},
      {"residual gradient forgotten", OP_rmsnorm_bwd, case_rmsnorm, forget_residual},
      {"dgrad overwrites", OP_linear_dgrad, case_linear_grouped, overwrite_dgrad},
      {"wgrad adds to what was there", OP_linear_wgrad, case_linear_dense, add_wgrad},
      {"rotated forward again", OP_rope, case_rope, rotate_forward},
      {"window off by one", OP_attention_bwd, case_attention, mask_off_by_one},
      {"scale off by 1e-4", OP_attention_bwd, case_attention, scale_off},
      {"last sequence missed", OP_attention_bwd, case_attention, miss_last_sequence},
      {"renormalization forgotten", OP_router_bwd, case_router, forget_renormalization},
      {"auxiliary gradient forgotten", OP_router_bwd, case_router, forget_aux},
      {"z-loss's gradient forgotten", OP_router_bwd, case_router, forget_z},
      {"dispatch overwrites", OP_dispatch_bwd, case_dispatch, overwrite_dispatch},
      {"probability forgotten", OP_combine_bwd, case_combine, forget_prob},
      {"probability forgotten", OP_combine_bwd, case_scatter, forget_prob},
      {"row probability forgotten", OP_swiglu_bwd, case_swiglu, forget_row_prob},
      {"row probability forgotten", OP_experts_down_dgrad, case_experts, forget_experts_row_prob},
      {"loss scale off by 1e-4", OP_head_loss, case_head_loss, loss_scale_off},
  };
  for (size_t i = 0; i < sizeof bugs / sizeof *bugs; i++) {
    struct probe p;
    probe_open(&p, 11);
    p.bug_op = bugs[i].op;
    p.bug = bugs[i].bug;
    for (int way = 0; way < WAYS; way++) bugs[i].run(&p, &sizes[2], way);
    if (!(p.worst > tolerance)) fail_msg("%s: %s passed", mt_op_name(bugs[i].op), bugs[i].name);
    mt_backend_destroy(&p.be);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients_agree_with_differences),
      cmocka_unit_test(planted_bugs_are_seen),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
