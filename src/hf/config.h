/* config.json of Hugging Face transformers -> struct mt_config. */
#ifndef MT_HF_CONFIG_H
#define MT_HF_CONFIG_H

#include <jansson.h>

#include "model/config.h"

/* Reads DIR/config.json. *json (=) is the parsed file, for export; released with json_decref; may
 * be NULL when not wanted. Supported model types are rows of a table in config.c. Both spellings of
 * the rotary base (`rope_theta`, `rope_parameters.rope_theta`), head_dim absent or null
 * (hidden_size / num_attention_heads), sliding_window null or a number, eos_token_id a number or a
 * list (its first entry counts).
 * Errors: MT_ENOENT, MT_EFORMAT (bad JSON, duplicate key, wrong type, missing key), MT_EUNSUPPORTED
 * (model_type, hidden_act, rope scaling), MT_ESHAPE; all name the file and the key. */
mt_err mt_hf_config_load(const char *dir, struct mt_config *out, json_t **json);
mt_err mt_hf_config_load_file(const char *path, struct mt_config *out, json_t **json);
/* The same on memory; name is for messages. */
mt_err mt_hf_config_parse(const char *text, size_t size_bytes, const char *name,
                          struct mt_config *out, json_t **json);

#endif
