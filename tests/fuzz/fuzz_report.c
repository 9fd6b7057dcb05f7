/* Any bytes as the files of a run (run.json, metrics.jsonl, samples.jsonl, divided by 0 bytes):
 * refused, or a page can be made of them. */
#include "fuzz/files.h"
#include "report/report.h"
#include "report/run.h"
#include "train/metrics.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const char *const names[] = {"run.json", "metrics.jsonl", "samples.jsonl"};
  char path[MT_PATH_MAX];
  struct mt_best best;
  for (int i = 0; i < 3; i++) {
    const uint8_t *part;
    size_t n = fuzz_part(&data, &size, &part);
    fuzz_file(names[i], part, n);
  }
  const char *dirs[] = {fuzz_dir};
  struct mt_report_options o = {.dirs = dirs, .dir_count = 1};
  (void)mt_report_write(&o, path);
  /* A resumed run reads its history too. */
  (void)mt_metrics_best(fuzz_dir, 5, 0, &best);
  (void)mt_lines_keep(fuzz_path("metrics.jsonl"), 5);
  return 0;
}
