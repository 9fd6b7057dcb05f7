/* Any bytes as config.json: refused, or a config that the parameter table can be built from. */
#include "base/log.h"
#include "hf/config.h"
#include "model/params.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct mt_config c;
  struct mt_params p;
  mt_log_set_level(MT_LOG_ERROR);
  if (mt_hf_config_parse((const char *)data, size, "fuzz", &c, NULL)) return 0;
  if (mt_params_build(&c, NULL, &p) == MT_OK) {
    for (int i = 0; i < p.count; i++) {
      if (mt_param_count(&p.row[i]) <= 0) __builtin_trap();
    }
  }
  mt_params_free(&p);
  return 0;
}
