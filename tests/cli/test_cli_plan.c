/* `moetune plan` and `moetune ladder`: what they say, that memory is that of `inspect --train`,
 * that the meshes of Mixtral 8x7B come out as arithmetic says, and what they refuse. */
#include <math.h>

#include "cli/run.h"
#include "temp_dir.h"
#include "unit/well_formed.h"
#include <jansson.h>

#define TINY    MT_SOURCE_DIR "/models/tiny"
#define MIXTRAL MT_SOURCE_DIR "/models/mixtral-8x7b.json"

static struct cli_result r;

static json_t *parsed(void) {
  json_error_t why;
  json_t *all = json_loads(r.out, JSON_REJECT_DUPLICATES, &why);
  if (!all || r.status != 0) fail_msg("status %d: %s\n%s%s", r.status, why.text, r.out, r.err);
  return all;
}

static double number(const json_t *object, const char *key) {
  const json_t *value = json_object_get(object, key);
  if (!json_is_number(value)) fail_msg("no number '%s'", key);
  return json_number_value(value);
}

static double memory(const json_t *plan, const char *key) {
  return number(json_object_get(plan, "memory_bytes"), key);
}

static void refused(int status, const char *part) {
  if (r.status != status || !strstr(r.err, part))
    fail_msg("status %d, '%s' wanted in:\n%s", r.status, part, r.err);
}

/* The same bytes on one rank, whatever changes them. */
static void memory_is_what_inspect_says(void **state) {
  (void)state;
  static const char *const ways[][4] = {{"--recompute", "none", "--precision", "fp32"},
                                        {"--recompute", "full", "--precision", "bf16"},
                                        {"--experts", "loop", "--precision", "bf16"},
                                        {"--freeze", "*gate.weight", "--precision", "fp32"}};
  static const char *const kinds[] = {"parameters", "gradients", "optimizer", "activations"};
  for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
    const char *const *w = ways[i];
    static struct cli_result plan;
    CLI(&plan, "plan", TINY, "--device", "cpu", "--batch-size", "3", "--max-seq-length", "100",
        "--json", w[0], w[1], w[2], w[3]);
    CLI(&r, "inspect", TINY, "--train", "--device", "cpu", "--batch-size", "3", "--max-seq-length",
        "100", w[0], w[1], w[2], w[3]);
    assert_int_equal(r.status, 0);
    static struct cli_result said;
    said = r;
    r = plan;
    json_t *all = parsed(), *one = json_object_get(all, "plan");
    const char *table = strstr(said.out, "\nmemory ");
    assert_non_null(table);
    for (int k = 0; k < 4; k++) {
      char row[64];
      snprintf(row, sizeof row, "\n%-12s %16.0f ", kinds[k], memory(one, kinds[k]));
      if (!strstr(table, row)) fail_msg("'%s' is not in:\n%s", row, table);
    }
    json_decref(all);
  }
}

static const json_t *mesh_of(const json_t *all, int ep, int pp, int zero, const char *recompute) {
  const json_t *list = json_object_get(all, "meshes");
  for (size_t i = 0; i < json_array_size(list); i++) {
    const json_t *p = json_array_get(list, i);
    if ((int)number(p, "ep") == ep && (int)number(p, "pp") == pp &&
        (int)number(p, "zero") == zero &&
        strcmp(json_string_value(json_object_get(p, "recompute")), recompute) == 0)
      return p;
  }
  fail_msg("no mesh of ep %d, pp %d, zero %d, recompute %s", ep, pp, zero, recompute);
  return NULL;
}

static bool fits(const json_t *plan) {
  return json_is_true(json_object_get(plan, "fits"));
}

/* Float32 masters and moments of 46.7 billion parameters on 8 x 141 GB: at ep=8 they fit, at ep=2 x
 * dp=4 an expert's weights, gradients and their copies on four ranks do not, unless states are
 * bf16. Bytes a parameter by hand. */
static void mixtral_on_eight_gpus(void **state) {
  (void)state;
  const double dense = 1605640192, experts = 45097156608;
  CLI(&r, "plan", MIXTRAL, "--gpus", "8", "--memory", "141GB", "--max-seq-length", "8192",
      "--precision", "bf16", "--device", "cpu", "--json", "--rows", "50");
  json_t *all = parsed();
  const json_t *p = mesh_of(all, 8, 1, 1, "mlp");
  assert_true(fits(p));
  double want[] = {2 * (dense + experts / 8) + 4 * (dense / 8 + experts / 8),
                   4 * (dense + experts / 8), 8 * (dense / 8 + experts / 8)};
  const char *const kinds[] = {"parameters", "gradients", "optimizer"};
  for (int k = 0; k < 3; k++) {
    double have = memory(p, kinds[k]);
    if (!(fabs(have - want[k]) < 1e-4 * want[k]))
      fail_msg("%s: %g, not %g", kinds[k], have, want[k]);
  }
  /* Those that fit come first, the fastest at the top. */
  const json_t *list = json_object_get(all, "meshes");
  double before = INFINITY;
  bool end = false;
  assert_true(json_array_size(list) == 50);
  for (size_t i = 0; i < json_array_size(list); i++) {
    const json_t *one = json_array_get(list, i);
    assert_false(end && fits(one));
    end |= !fits(one);
    if (fits(one)) assert_true(number(one, "tokens_per_s") <= before);
    before = number(one, "tokens_per_s");
    assert_true(fits(one) == (memory(one, "total") + 2e9 <= 141e9));
  }
  json_decref(all);
  CLI(&r, "plan", MIXTRAL, "--gpus", "8", "--memory", "141GB", "--max-seq-length", "8192",
      "--precision", "bf16", "--device", "cpu", "--json", "--ep-size", "2", "--pp-size", "1",
      "--zero", "2");
  all = parsed();
  assert_false(fits(mesh_of(all, 2, 1, 2, "full")));
  json_decref(all);
  CLI(&r, "plan", MIXTRAL, "--gpus", "8", "--memory", "141GB", "--max-seq-length", "8192",
      "--precision", "bf16", "--device", "cpu", "--json", "--optim-state", "bf16", "--ep-size", "2",
      "--pp-size", "1", "--zero", "2");
  all = parsed();
  p = mesh_of(all, 2, 1, 2, "none");
  assert_true(fits(p));
  assert_true((int)number(p, "dp") == 4);
  json_decref(all);
}

/* What stands beside the arenas on GPUs is what the options say, for each communicator of the mesh:
 * experts, data, dense, and two of a pipeline. */
static void communicators_take_memory(void **state) {
  (void)state;
  static const struct {
    const char *gpus, *ep, *pp;
    int comms;
  } meshes[] = {{"1", "1", "1", 0}, {"8", "8", "1", 2}, {"8", "1", "1", 2},
                {"8", "2", "1", 3}, {"8", "1", "8", 2}, {"8", "2", "2", 5}};
  for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
    double total[3];
    static const char *const each[] = {"0", "3GB"};
    for (int k = 0; k < 2; k++) {
      CLI(&r, "plan", MIXTRAL, "--gpus", meshes[i].gpus, "--ep-size", meshes[i].ep, "--pp-size",
          meshes[i].pp, "--max-seq-length", "64", "--comm-memory", each[k], "--json");
      json_t *all = parsed();
      const json_t *plan = json_object_get(all, "plan");
      total[k] = memory(plan, "total");
      assert_int_equal((int)number(plan, "communicators"), meshes[i].comms);
      assert_true(memory(plan, "communicators") == k * 3e9 * meshes[i].comms);
      json_decref(all);
    }
    assert_true(total[1] - total[0] == 3e9 * meshes[i].comms);
  }
  CLI(&r, "plan", TINY, "--gpus", "2", "--ep-size", "2", "--device", "cpu", "--json"); /* MPI's */
  json_t *all = parsed();
  assert_int_equal((int)number(json_object_get(all, "plan"), "communicators"), 0);
  json_decref(all);
  CLI(&r, "plan", MIXTRAL, "--gpus", "8", "--ep-size", "2", "--max-seq-length", "64");
  assert_int_equal(r.status, 0);
  assert_non_null(strstr(r.out, "  3 communicators, assumed           3300000000 "));
}

/* Buckets end where a layer does (model/buckets.h): of Mixtral's 32 layers each has 42 M dense and,
 * of one expert, 176 M elements; embedding and head 131 M each; the last norm. Two calls each. They
 * hold 8 M elements on a host, 64 M on GPUs, which a build without CUDA knows nothing of. */
static void calls_are_counted(void **state) {
  (void)state;
  for (int gpu = 0; gpu < 2; gpu++) {
    CLI(&r, "plan", MIXTRAL, "--gpus", "16", "--ep-size", "8", "--max-seq-length", "64", "--json",
        gpu ? "--json" : "--device=cpu");
    json_t *all = parsed();
    const char *of = json_string_value(json_object_get(all, "workspace_of"));
    bool large = gpu && of && strcmp(of, "cuda") == 0;
    int dense = large ? 32 * 1 + 2 * 2 + 1 : 32 * 6 + 2 * 16 + 1, experts = 32 * (large ? 3 : 21);
    const json_t *plan = json_object_get(all, "plan");
    assert_int_equal((int)number(plan, "dense_sum_calls"), 2 * dense);
    assert_int_equal((int)number(plan, "expert_sum_calls"), 2 * experts);
    json_decref(all);
  }
}

/* One of two stages learns nothing: the step ends when the other has summed and updated, which is
 * as large (embedding and head are), but for the last norm. */
static void the_slowest_stage_counts(void **state) {
  (void)state;
  static const char *const freeze[][3] = {
      {"--json", "--json", "--json"},
      {"--freeze=model.embed*", "--freeze=model.layers.[0-9].*", "--freeze=model.layers.1[0-5].*"},
      {"--freeze=lm_head*", "--freeze=model.layers.1[6-9].*", "--freeze=model.layers.[23][0-9].*"}};
  double ms[3][2];
  for (int i = 0; i < 3; i++) {
    CLI(&r, "plan", MIXTRAL, "--gpus", "4", "--pp-size", "2", "--device", "cpu", "--max-seq-length",
        "64", "--json", freeze[i][0], freeze[i][1], freeze[i][2]);
    json_t *all = parsed();
    const json_t *plan = json_object_get(all, "plan"), *times = json_object_get(plan, "ms");
    ms[i][0] = number(times, "sums");
    ms[i][1] = number(times, "update");
    json_decref(all);
  }
  for (int k = 0; k < 2; k++) {
    assert_true(ms[0][k] > 0 && ms[1][k] == ms[0][k]);
    assert_true(fabs(ms[2][k] / ms[0][k] - 1) < 1e-3);
  }
}

/* Over links that take no time a call is what is left of an exchange, and of sums what is added up:
 * --zero 2 does that in each micro-batch, and takes the norm once. */
static void calls_and_sums_take_their_time(void **state) {
  (void)state;
  static const char *const ways[][4] = {
      {"--ep-chunks=1", "--zero=1", "--micro-batches=4", "exchange"},
      {"--ep-chunks=8", "--zero=1", "--micro-batches=4", "exchange"},
      {"--ep-chunks=1", "--zero=2", "--micro-batches=1", "sums"},
      {"--ep-chunks=1", "--zero=2", "--micro-batches=2", "sums"},
      {"--ep-chunks=1", "--zero=2", "--micro-batches=4", "sums"}};
  double ms[5];
  for (int i = 0; i < 5; i++) {
    CLI(&r, "plan", MIXTRAL, "--gpus", "16", "--ep-size", "8", "--device", "cpu",
        "--max-seq-length", "64", "--host-gpus", "16", "--link-rate", "1e18", "--copy-rate", "1e9",
        "--json", ways[i][0], ways[i][1], ways[i][2]);
    json_t *all = parsed();
    ms[i] = number(json_object_get(json_object_get(all, "plan"), "ms"), ways[i][3]);
    json_decref(all);
  }
  if (!(ms[1] > 7 * ms[0] && ms[1] < 8 * ms[0])) fail_msg("8 chunks %g, one %g ms", ms[1], ms[0]);
  double added = ms[3] - ms[2], norm = ms[2] - added;
  if (!(fabs(ms[4] - ms[2] - 3 * added) < 0.01 * added && norm > 0.1 * added && norm < added))
    fail_msg("sums of 1, 2 and 4 micro-batches %g, %g, %g ms", ms[2], ms[3], ms[4]);
}

/* What nobody asked for is all that training has. */
/* Products in 8 bits are made in 8 bits where the chip has them, elsewhere in bf16. */
static void eight_bits_by_the_chip(void **state) {
  (void)state;
  static const char *const precisions[] = {"bf16", "fp8", "mxfp8"};
  double h100[3], b300[3];
  for (int i = 0; i < 3; i++) {
    for (int k = 0; k < 2; k++) {
      CLI(&r, "plan", MIXTRAL, "--device", "cpu", "--max-seq-length", "8192", "--precision",
          precisions[i], "--machine", k ? "b300" : "h100", "--json");
      json_t *all = parsed();
      const json_t *ms = json_object_get(json_object_get(all, "plan"), "ms");
      (k ? b300 : h100)[i] = number(ms, "compute");
      json_decref(all);
    }
  }
  assert_true(h100[1] < 0.9 * h100[0] && h100[2] > h100[0]);
  assert_true(b300[2] < 0.9 * b300[0] && b300[1] > b300[0]);
}

static void all_that_trains_is_listed(void **state) {
  (void)state;
  CLI(&r, "plan", TINY, "--gpus", "4", "--memory", "1GB", "--reserve", "0", "--device", "cpu",
      "--json", "--rows", "1000");
  json_t *all = parsed();
  const json_t *list = json_object_get(all, "meshes");
  int seen[3] = {0};
  for (size_t i = 0; i < json_array_size(list); i++) {
    int zero = (int)number(json_array_get(list, i), "zero");
    assert_in_range(zero, 0, 2);
    seen[zero]++;
  }
  assert_true(seen[0] > 0 && seen[1] > 0 && seen[2] > 0);
  json_decref(all);
  CLI(&r, "plan", TINY, "--memory", "1GB", "--reserve", "0", "--device", "cpu", "--sweep", "8",
      "--ep-size", "2", "--json");
  all = parsed();
  list = json_object_get(all, "sweep");
  assert_int_equal(json_array_size(list), 3); /* 2, 4 and 8 ranks */
  json_decref(all);
}

static void words(void **state) {
  (void)state;
  CLI(&r, "plan", TINY, "--gpus", "4", "--ep-size", "2", "--zero", "2", "--device", "cpu");
  assert_int_equal(r.status, 0);
  assert_non_null(strstr(r.out, "mesh        4 ranks: ep 2, dp 2, pp 1; ZeRO 2"));
  assert_non_null(strstr(r.out, "tokens to experts and back"));
  CLI(&r, "plan", TINY, "--gpus", "2", "--memory", "1MB", "--reserve", "0", "--device", "cpu");
  assert_int_equal(r.status, 0);
  assert_non_null(strstr(r.out, "0 of "));
  assert_non_null(strstr(r.out, "too large"));
  CLI(&r, "plan", TINY, "--gpus", "2", "--memory", "1GB", "--reserve", "0", "--device", "cpu",
      "--ep-size", "2", "--pp-size", "1", "--zero", "1", "--recompute", "mlp");
  assert_int_equal(r.status, 0);
  assert_non_null(strstr(r.out, "GB: fits"));
}

static void what_is_wrong_is_named(void **state) {
  (void)state;
  CLI(&r, "plan", TINY, "--ep-size", "3", "--gpus", "3");
  refused(1, "--ep-size 3 does not divide the model's 8 experts");
  CLI(&r, "plan", TINY, "--ep-size", "2", "--gpus", "3");
  refused(1, "3 ranks cannot be cut");
  CLI(&r, "plan", TINY, "--pp-size", "5", "--gpus", "5");
  refused(1, "--pp-size 5 is more than the model's 4 layers");
  CLI(&r, "plan", TINY, "--memory", "9GB", "--gpus", "3", "--ep-size", "4");
  refused(1, "no mesh of 3 ranks");
  CLI(&r, "plan", "/nowhere/config.json");
  refused(1, "/nowhere/config.json");
  CLI(&r, "plan");
  refused(2, "--model PATH is required");
  CLI(&r, "plan", TINY, "--svg", "x.svg");
  refused(2, "--svg goes with --sweep");
  CLI(&r, "plan", TINY, "--memory", "1GB");
  refused(2, "--reserve 2000000000 is all of --memory 1000000000");
  CLI(&r, "plan", TINY, "--machine", "abacus");
  refused(2, "'abacus'");
  CLI(&r, "plan", TINY, "--precision", "fp32", "--optim-state", "bf16");
  refused(1, "--optim-state bf16 goes with --precision bf16");
  CLI(&r, "ladder");
  refused(2, "a checkpoint (--model) or a config (--random) is required");
  CLI(&r, "ladder", TINY, "--random", MIXTRAL);
  refused(2, "one of them");
  CLI(&r, "ladder", TINY, "--layers", "2");
  refused(2, "--layers goes with --random");
  CLI(&r, "ladder", "--random", TINY, "--layers", "7");
  refused(1, "--layers 7 is more than the 4");
  CLI(&r, "ladder", "/nowhere");
  refused(1, "/nowhere");
}

static void drawn(const char *dir, const char *name, const char *part) {
  char path[MT_PATH_MAX], *text;
  size_t size;
  OK(mt_path_join(path, dir, name));
  OK(mt_file_read(path, 1 << 20, &text, &size));
  char *page = malloc(size + 32);
  assert_non_null(page);
  snprintf(page, size + 32, "<!DOCTYPE html>\n%s", text); /* what it would lie in */
  assert_well_formed(page);
  free(page);
  if (!strstr(text, part)) fail_msg("'%s' is missing in %s", part, text);
  /* A letter is some 5.6 pixels wide, and the page 800. */
  for (const char *at = text; (at = strstr(at, "font-size=\"11\"")); at++) {
    int letters = (int)strcspn(strchr(at, '>') + 1, "<");
    if (letters > 138) fail_msg("%d letters do not fit: %.300s", letters, at);
  }
  free(text);
}

static void a_sweep(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], svg[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(svg, dir, "sweep.svg"));
  CLI(&r, "plan", TINY, "--sweep", "64", "--memory", "10GB", "--device", "cpu", "--json", "--svg",
      svg);
  json_t *all = parsed();
  const json_t *list = json_object_get(all, "sweep");
  assert_int_equal(json_array_size(list), 7);
  for (size_t i = 0; i < 7; i++) assert_true(number(json_array_get(list, i), "gpus") == 1 << i);
  json_decref(all);
  drawn(dir, "sweep.svg", "best mesh that fits");
  CLI(&r, "plan", TINY, "--sweep", "8", "--memory", "1MB", "--reserve", "0", "--device", "cpu");
  refused(1, "no mesh of up to 8 ranks fits");
  OK(mt_dir_remove(dir));
}

/* The same loss on every rung, to rounding: it is the same work. */
static void a_ladder(void **state) {
  (void)state;
  char dir[MT_PATH_MAX], svg[MT_PATH_MAX];
  temp_dir(dir);
  OK(mt_path_join(svg, dir, "ladder.svg"));
  for (int random = 0; random < 2; random++) {
    CLI(&r, "ladder", random ? "--random" : "--model", TINY, "--device", "cpu", "--batch-size", "2",
        "--max-seq-length", "16", "--warmup-steps", "1", "--train-steps", "2", "--json", "--svg",
        svg, "--log-level", "error");
    json_t *all = parsed();
    const json_t *list = json_object_get(all, "rungs");
    assert_true(json_array_size(list) >= 3);
    double first = number(json_array_get(list, 0), "loss");
    assert_true(first > 1 && number(json_array_get(list, 0), "speedup") == 1);
    for (size_t i = 0; i < 3; i++) {
      const json_t *one = json_array_get(list, i);
      assert_true(number(one, "rung") == (double)i && number(one, "step_ms") > 0);
      assert_true(fabs(number(one, "loss") - first) < 1e-4);
      assert_true(fabs(number(one, "tokens_per_s") * number(one, "step_ms") / 32e3 - 1) < 1e-6);
      const json_t *phases = json_object_get(one, "phase_ms");
      assert_true(number(phases, "moe_forward") > 0 && number(phases, "moe_backward") > 0);
    }
    json_decref(all);
    drawn(dir, "ladder.svg", "2: experts grouped, blocks fused");
  }
  CLI(&r, "ladder", TINY, "--device", "cpu", "--max-seq-length", "8", "--train-steps", "1",
      "--log-level", "error");
  assert_int_equal(r.status, 0);
  assert_non_null(strstr(r.out, "speedup"));
  assert_non_null(strstr(r.out, "\n  moe_backward "));
  assert_null(strstr(r.out, "rmsnorm_bwd"));
  assert_string_equal(r.err, "");
  CLI(&r, "ladder", TINY, "--device", "cpu", "--max-seq-length", "8", "--train-steps", "1", "--ops",
      "--log-level", "error");
  assert_int_equal(r.status, 0);
  const char *rung = r.out;
  for (int i = 0; i < 3; i++) { /* a table each, with what every rung does */
    char title[64];
    snprintf(title, sizeof title, "\nrung %d, operations of rank 0", i);
    rung = strstr(rung, title);
    assert_non_null(rung);
    rung = strstr(rung, "\nrmsnorm_bwd ");
    assert_non_null(rung);
  }
  CLI(&r, "ladder", TINY, "--ops", "--json");
  assert_int_equal(r.status, 2);
  assert_non_null(strstr(r.err, "--ops is a table: it does not go with --json"));
  OK(mt_dir_remove(dir));
}

/* Rates of the machine at hand are measured, not taken from the table. */
static void this_machine(void **state) {
  (void)state;
  CLI(&r, "plan", TINY, "--machine", "this", "--device", "cpu", "--max-seq-length", "32", "--json");
  json_t *all = parsed();
  const json_t *machine = json_object_get(all, "machine");
  assert_non_null(strstr(json_string_value(json_object_get(machine, "name")), "this (cpu)"));
  double flops = number(machine, "flops_per_s");
  assert_true(flops > 1e8 && flops < 1e14);
  json_decref(all);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(memory_is_what_inspect_says),
      cmocka_unit_test(mixtral_on_eight_gpus),
      cmocka_unit_test(communicators_take_memory),
      cmocka_unit_test(calls_are_counted),
      cmocka_unit_test(the_slowest_stage_counts),
      cmocka_unit_test(calls_and_sums_take_their_time),
      cmocka_unit_test(eight_bits_by_the_chip),
      cmocka_unit_test(all_that_trains_is_listed),
      cmocka_unit_test(words),
      cmocka_unit_test(what_is_wrong_is_named),
      cmocka_unit_test(a_sweep),
      cmocka_unit_test(a_ladder),
      cmocka_unit_test(this_machine),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
