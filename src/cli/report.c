#include "cli/commands.h"
#include "report/report.h"
#include "train/options.h"

struct report_flags {
  struct mt_string_list dirs;
  const char *out;
  bool watch;
  double interval_s;
};

#define S        struct report_flags
#define AT(name) offsetof(S, name)

static const struct mt_option rows[] = {
    {.group = "Options",
     .flag = "run",
     .type = MT_OPT_LIST,
     .offset = AT(dirs),
     .unit = "DIR",
     .help = "Run directory (--out of `moetune train`); the flag's name may be left out. Several "
             "are laid over each other in the same plots.",
     .required = true},
    {.flag = "out",
     .type = MT_OPT_TEXT,
     .offset = AT(out),
     .unit = "FILE",
     .initial_note = "report.html in the directory; of several, comparison.html in the first",
     .help = "The page."},
    {.flag = "watch",
     .type = MT_OPT_FLAG,
     .offset = AT(watch),
     .help = "Write the page anew as the run goes on, until it ends; browsers that show it load it "
             "again by themselves."},
    {.flag = "interval",
     .type = MT_OPT_REAL,
     .offset = AT(interval_s),
     .unit = "SECONDS",
     .initial = "5",
     .min = 0.1,
     .max = 86400,
     .help = "With --watch: time between two looks at the run."},
};

static mt_err finish(void *options, const struct mt_parsed *parsed) {
  const S *o = options;
  (void)parsed;
  if (o->dirs.count <= MT_REPORT_RUNS) return MT_OK;
  return mt_fail(MT_EINVAL, "%d runs: at most %d fit one page", o->dirs.count, MT_REPORT_RUNS);
}

static mt_err run(const void *options) {
  const S *o = options;
  char path[MT_PATH_MAX];
  struct mt_report_options r = {.dirs = o->dirs.item,
                                .dir_count = o->dirs.count,
                                .out = o->out,
                                .watch = o->watch,
                                .interval_s = o->interval_s};
  MT_TRY(mt_report_write(&r, path));
  printf("%s\n", path);
  return MT_OK;
}

const struct mt_command mt_command_report = {
    .name = "report",
    .summary = "shows a run, or several side by side, as an HTML page",
    .usage = "DIR... [options]",
    .description =
        "Writes one HTML page that needs nothing else: losses, learning rate, gradient norm, "
        "speed, the time of a step by phase, memory, the load of every expert over time, samples "
        "and the run's configuration. `moetune train` writes it at the end of each run.",
    .examples = "  moetune report runs/first\n"
                "  moetune report runs/first runs/second --out both.html\n"
                "  moetune report runs/first --watch\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .positional = "run",
    .options_bytes = sizeof(S),
    .finish = finish,
    .run = run,
};
