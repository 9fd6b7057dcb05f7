#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "cli/commands.h"
#include "cli/ranks.h"
#include "report/chart.h"
#include "train/plan.h"

#define S        struct mt_plan_options
#define AT(name) offsetof(S, name)
#define RATE(name, field, what, text)                                                              \
  {                                                                                                \
    .flag = name, .type = MT_OPT_REAL, .offset = AT(field), .unit = what, .initial = "0",          \
    .initial_note = "the machine's", .min = 0, .max = 1e18, .help = text,                          \
  }

static const struct mt_option rows[] = {
    {.group = "What is planned",
     .flag = "model",
     .type = MT_OPT_TEXT,
     .offset = AT(path),
     .unit = "PATH",
     .help = "A checkpoint directory, or a config.json under any name; neither weights nor a "
             "tokenizer are read. The flag's name may be left out.",
     .required = true},
    {.flag = "gpus",
     .type = MT_OPT_INT,
     .offset = AT(gpus),
     .unit = "RANKS",
     .initial = "1",
     .min = 1,
     .max = 65536,
     .help = "Ranks, a GPU each. Data parallelism has what expert and pipeline parallelism leave."},
    {.flag = "memory",
     .type = MT_OPT_BYTES,
     .offset = AT(memory_bytes),
     .unit = "SIZE",
     .initial_note = "none: the one mesh that the options give is shown, whatever it needs",
     .min = 1,
     .max = DBL_MAX,
     .help = "Memory of a GPU (141GB). All meshes, ways of ZeRO and of recomputing that the "
             "options below leave open are listed, those that fit first, the fastest of them at "
             "the top."},
    {.flag = "reserve",
     .type = MT_OPT_BYTES,
     .offset = AT(reserve_bytes),
     .unit = "SIZE",
     .initial = "2GB",
     .min = 0,
     .max = DBL_MAX,
     .help = "Of --memory, what drivers and libraries take beside the plan."},
    {.flag = "comm-memory",
     .type = MT_OPT_BYTES,
     .offset = AT(comm_bytes),
     .unit = "SIZE",
     .initial = "1.1GB",
     .min = 0,
     .max = DBL_MAX,
     .help = "What NCCL is assumed to take of a GPU's memory for each communicator that a rank "
             "opens there (at most five: experts, data, dense, and two of a pipeline). The default "
             "is what was measured with two ranks; with NCCL_BUFFSIZE and more ranks it differs."},
    {.flag = "ep-size",
     .type = MT_OPT_INT,
     .offset = AT(ep_size),
     .unit = "RANKS",
     .initial = "1",
     .min = 1,
     .max = MT_MAX_EXPERTS,
     .help = "Ranks that share out each layer's experts."},
    MT_ROW_EP_CHUNKS(S),
    MT_ROW_DISPATCH_PRECISION(S),
    {.flag = "pp-size",
     .type = MT_OPT_INT,
     .offset = AT(pp_size),
     .unit = "RANKS",
     .initial = "1",
     .min = 1,
     .max = MT_MAX_LAYERS,
     .help = "Stages of a pipeline (one micro-batch forward, one back)."},
    {.flag = "zero",
     .type = MT_OPT_INT,
     .offset = AT(zero),
     .unit = "LEVEL",
     .initial = "0",
     .min = 0,
     .max = 2,
     .help = "What the ranks share out that hold the same parameter: 1 moments and master "
             "weights; 2 gradients too."},
    MT_ROW_RECOMPUTE(S),
    {.flag = "micro-batches",
     .type = MT_OPT_INT,
     .offset = AT(micro_batches),
     .unit = "COUNT",
     .initial = "1",
     .min = 1,
     .max = 65536,
     .help = "Micro-batches of a rank and step; a pipeline needs several to fill."},
    MT_ROW_BATCH_SIZE(S, "1"),
    {.flag = "max-seq-length",
     .type = MT_OPT_INT,
     .offset = AT(max_seq_length),
     .unit = "TOKENS",
     .initial = "4096",
     .min = 2,
     .max = 1048576,
     .help = "Length of every sample."},
    MT_ROWS_DEVICE(S),
    MT_ROW_OPTIM_STATE(S),
    MT_ROW_EXPERTS(S, .initial = "grouped"),
    MT_ROW_BLOCKS(S, .initial = "fused"),
    MT_ROW_FREEZE(S),
    {.flag = "imbalance",
     .type = MT_OPT_REAL,
     .offset = AT(imbalance),
     .unit = "FACTOR",
     .initial = "1",
     .min = 1,
     .max = 1024,
     .help = "Rows that come to the fullest rank's experts, over the mean of all."},
    {.group = "The machine",
     .flag = "machine",
     .type = MT_OPT_NAME,
     .offset = AT(machine),
     .unit = "NAME",
     .choices = "h100|h200|b300|this",
     .initial = "h100",
     .help = "Whose rates decide the times. this: the CPU or GPU at hand, measured first, as "
             "`moetune bench --ops` does, on one layer of the model."},
    RATE("flops", flops, "FLOPS", "FLOP/s of a large product alone."),
    RATE("copy-rate", copy_bytes, "RATE", "Bytes/s that a copy reads and writes."),
    RATE("link-rate", link_bytes, "RATE", "Bytes/s from a rank to ranks of its host."),
    RATE("network-rate", network_bytes, "RATE", "Bytes/s from a rank to ranks of other hosts."),
    {.flag = "host-gpus",
     .type = MT_OPT_INT,
     .offset = AT(host_gpus),
     .unit = "COUNT",
     .initial = "0",
     .initial_note = "the machine's",
     .min = 0,
     .max = 1024,
     .help = "Ranks of a host."},
    {.flag = "overlap",
     .type = MT_OPT_REAL,
     .offset = AT(overlap),
     .unit = "SHARE",
     .initial = "0",
     .min = 0,
     .max = 1,
     .help = "Share of what travels, and of the additions of sums, that is assumed to be hidden "
             "behind computing: of all of it alike, and none by default."},
    {.group = "What is shown",
     .flag = "rows",
     .type = MT_OPT_INT,
     .offset = AT(rows),
     .unit = "COUNT",
     .initial = "20",
     .min = 1,
     .max = 1e6,
     .help = "Meshes of a list to show."},
    {.flag = "sweep",
     .type = MT_OPT_INT,
     .offset = AT(sweep),
     .unit = "RANKS",
     .initial = "0",
     .initial_note = "none",
     .min = 0,
     .max = 32768,
     .help = "The best mesh for 1, 2, 4 and so on up to so many ranks, in place of --gpus; each "
             "rank's work stays the same."},
    {.flag = "svg",
     .type = MT_OPT_TEXT,
     .offset = AT(svg),
     .unit = "FILE",
     .help = "With --sweep: a plot of it."},
    MT_ROW_JSON(S),
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  S *o = options;
  o->fixed_ep = mt_parsed_given(parsed, "ep-size");
  o->fixed_pp = mt_parsed_given(parsed, "pp-size");
  o->fixed_zero = mt_parsed_given(parsed, "zero");
  o->fixed_recompute = mt_parsed_given(parsed, "recompute");
  if (o->svg && !o->sweep) return mt_fail(MT_EINVAL, "--svg goes with --sweep");
  if (o->memory_bytes && o->reserve_bytes >= o->memory_bytes) {
    return mt_fail(MT_EINVAL, "--reserve %llu is all of --memory %llu",
                   (unsigned long long)o->reserve_bytes, (unsigned long long)o->memory_bytes);
  }
  return mt_check_micro_batch(o->batch_size, o->max_seq_length);
}

static void add_point(struct mt_chart_line *l, double x, double y) {
  l->x[l->count] = x;
  l->y[l->count++] = y;
}

static void draw_rates(const struct mt_sweep *sweep, struct mt_chart_panel *p) {
  *p = (struct mt_chart_panel){.title = "Model TFLOP/s a rank", .line_count = 2};
  p->line[0].label = "best mesh that fits";
  p->line[1].label = "ep in a host x dp";
  for (int i = 0; i < sweep->count; i++) {
    const struct mt_plan *b = &sweep->best[i], *d = &sweep->plain[i];
    add_point(&p->line[0], b->gpus, b->model_flops / b->time.step / b->gpus * 1e-12);
    add_point(&p->line[1], b->gpus,
              d->gpus ? d->model_flops / d->time.step / d->gpus * 1e-12 : NAN);
  }
}

static void draw_times(const struct mt_sweep *sweep, struct mt_chart_panel *p) {
  static const char *const labels[] = {"computing", "exchange of tokens", "sums of gradients",
                                       "bubble", "update"};
  *p = (struct mt_chart_panel){.title = "Milliseconds of a step, best mesh", .line_count = 5};
  for (int k = 0; k < 5; k++) p->line[k].label = labels[k];
  for (int i = 0; i < sweep->count; i++) {
    const struct mt_plan *b = &sweep->best[i];
    const double s[] = {b->time.compute, b->time.exchange, b->time.sums, b->time.bubble,
                        b->time.update};
    for (int k = 0; k < 5; k++) add_point(&p->line[k], b->gpus, s[k] * 1e3);
  }
}

static void draw_bytes(const struct mt_sweep *sweep, struct mt_chart_panel *p) {
  static const char *const labels[] = {"tokens", "dense gradients", "experts' gradients", "stages"};
  *p = (struct mt_chart_panel){.title = "GB that leave a rank in a step, best mesh",
                               .line_count = 4};
  for (int k = 0; k < 4; k++) p->line[k].label = labels[k];
  for (int i = 0; i < sweep->count; i++) {
    const struct mt_plan_traffic *t = &sweep->best[i].sent;
    const double b[] = {t->tokens, t->dense, t->experts, t->stages};
    for (int k = 0; k < 4; k++) add_point(&p->line[k], sweep->best[i].gpus, b[k] * 1e-9);
  }
}

static mt_err draw(const struct mt_planner *p, const struct mt_sweep *sweep) {
  const S *o = p->options;
  const struct mt_machine *m = &p->machine;
  struct mt_chart c = {.x_title = "ranks", .panel_count = 3};
  char title[256], work[256], rates[256], memory[96], hidden[256];
  snprintf(title, sizeof title, "moetune plan: %s, %d layers, hidden %d, %d experts, on %s",
           p->config.model_type, p->config.layers, p->config.hidden, p->config.experts, m->name);
  snprintf(work, sizeof work,
           "Assumed: %d x %d x %d tokens a rank whatever their number, %s with %s states, rows "
           "shared evenly over the experts.",
           o->micro_batches, o->batch_size, o->max_seq_length, p->recipe->precision,
           p->recipe->states);
  snprintf(rates, sizeof rates,
           "Product %.0f TFLOP/s, copy %.2f TB/s; from a rank %.0f GB/s to the %d of its host, "
           "%.0f GB/s to others; a call %.0f us, each peer %.1f us more.",
           mt_machine_flops(m, p->recipe->act) * 1e-12, m->copy_bytes * 1e-12, m->link_bytes * 1e-9,
           m->host_ranks, m->network_bytes * 1e-9, m->call_s * 1e6, m->peer_s * 1e6);
  if (o->memory_bytes) {
    snprintf(memory, sizeof memory, "A mesh fits in %.0f GB less %.1f, a communicator takes %.1f.",
             (double)o->memory_bytes * 1e-9, (double)o->reserve_bytes * 1e-9,
             (double)o->comm_bytes * 1e-9);
  } else {
    snprintf(memory, sizeof memory, "Memory is not bounded.");
  }
  snprintf(hidden, sizeof hidden, "%s %.0f%% of what travels is hidden behind computing.", memory,
           100 * o->overlap);
  c.title = title;
  c.note[0] = work;
  c.note[1] = rates;
  c.note[2] = hidden;
  c.note[3] = "None of it was measured on many ranks.";
  draw_rates(sweep, &c.panel[0]);
  draw_times(sweep, &c.panel[1]);
  draw_bytes(sweep, &c.panel[2]);
  return mt_chart_write(o->svg, &c);
}

static mt_err run_sweep(struct mt_planner *p) {
  struct mt_sweep sweep;
  MT_TRY(mt_plan_sweep(p, p->options->sweep, &sweep));
  MT_TRY(mt_plan_print_sweep(p, &sweep));
  return p->options->svg ? draw(p, &sweep) : MT_OK;
}

static mt_err run_list(struct mt_planner *p) {
  struct mt_plan *plans;
  int count;
  MT_TRY(mt_plan_meshes(p, p->options->gpus, &plans, &count));
  if (count == 0) {
    return mt_fail(MT_EINVAL, "no mesh of %d ranks is what the options ask for", p->options->gpus);
  }
  mt_err err = count == 1 && !p->options->json ? mt_plan_print(p, plans)
                                               : mt_plan_print_list(p, plans, count);
  free(plans);
  return err;
}

static mt_err run_one(struct mt_planner *p) {
  const S *o = p->options;
  struct mt_plan plan = {.gpus = o->gpus,
                         .ep = o->ep_size,
                         .pp = o->pp_size,
                         .zero = o->zero,
                         .recompute = o->recompute,
                         .micro = o->micro_batches};
  MT_TRY(mt_plan_mesh(p, &plan));
  return mt_plan_print(p, &plan);
}

static mt_err run(const void *options) {
  const S *o = options;
  struct mt_planner p;
  mt_err err = mt_planner_open(&p, o);
  if (!err) err = o->sweep ? run_sweep(&p) : o->memory_bytes ? run_list(&p) : run_one(&p);
  mt_planner_close(&p);
  return err;
}

const struct mt_command mt_command_plan = {
    .name = "plan",
    .summary = "says what training takes on any mesh of GPUs: memory, traffic, time",
    .usage = "MODEL [options]",
    .description =
        "Works out, from a config.json alone, what every rank of a mesh would hold, to the byte "
        "(by the code that lays training's memory out, run without memory), what would leave it in "
        "a step, and how long a step would take on a machine of stated rates. With --memory it "
        "lists the meshes that fit, the fastest first; with --sweep it goes from one rank to "
        "thousands.\n\n"
        "Memory is a promise where rows are shared as --imbalance says; times are predictions: "
        "docs/parallelism.md has the formulas, and what has been measured of them.",
    .examples =
        "  moetune plan mixtral --gpus 8 --memory 141GB\n"
        "  moetune plan config.json --gpus 8 --ep-size 2 --zero 1 --optim-state bf16\n"
        "  moetune plan mixtral --machine this --batch-size 2 --max-seq-length 2048\n"
        "  moetune plan mixtral --memory 141GB --machine h200 --sweep 4096 --svg sweep.svg\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .positional = "model",
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
};
