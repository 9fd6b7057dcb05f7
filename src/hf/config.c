#include "hf/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/files.h"

enum { CONFIG_LIMIT = 4 << 20 };

/* One row a model family: its names and its switches. */
struct family {
  const char *model_type;
  const char *experts_key, *top_k_key;
  enum mt_mlp_kind mlp;
  bool renormalize;
  /* Where config.json has none. */
  int kv_heads;
  double rope_theta;
};

static const struct family families[] = {
    {"mixtral", "num_local_experts", "num_experts_per_tok", MT_MLP_MOE, true, 8, 1e6},
};

struct reader {
  const char *file;
  const json_t *root;
};

static mt_err wrong(const struct reader *r, const char *key, const char *must) {
  return mt_fail(MT_EFORMAT, "%s: '%s' must be %s", r->file, key, must);
}

static bool absent(const json_t *v) {
  return !v || json_is_null(v);
}

/* Required unless fallback >= 0. */
static mt_err read_int(const struct reader *r, const char *key, int64_t fallback, int *out) {
  const json_t *v = json_object_get(r->root, key);
  if (absent(v)) {
    if (fallback < 0) return mt_fail(MT_EFORMAT, "%s: '%s' is missing", r->file, key);
    *out = (int)fallback;
    return MT_OK;
  }
  if (!json_is_integer(v)) return wrong(r, key, "an integer");
  json_int_t n = json_integer_value(v);
  if (n < 0 || n > INT32_MAX) {
    return mt_fail(MT_ESHAPE, "%s: '%s' is %lld, out of range", r->file, key, (long long)n);
  }
  *out = (int)n;
  return MT_OK;
}

static mt_err read_real(const struct reader *r, const char *key, double fallback, double *out) {
  const json_t *v = json_object_get(r->root, key);
  *out = fallback;
  if (absent(v)) return MT_OK;
  if (!json_is_number(v)) return wrong(r, key, "a number");
  *out = json_number_value(v);
  return MT_OK;
}

static mt_err read_bool(const struct reader *r, const char *key, bool *out) {
  const json_t *v = json_object_get(r->root, key);
  *out = false;
  if (absent(v)) return MT_OK;
  if (!json_is_boolean(v)) return wrong(r, key, "true or false");
  *out = json_is_true(v);
  return MT_OK;
}

static mt_err read_token(const struct reader *r, const char *key, int *out) {
  const json_t *v = json_object_get(r->root, key);
  *out = -1;
  if (json_is_array(v)) v = json_array_get(v, 0);
  if (absent(v)) return MT_OK;
  if (!json_is_integer(v)) return wrong(r, key, "a token id");
  if (json_integer_value(v) > INT32_MAX) return wrong(r, key, "a token id");
  *out = (int)json_integer_value(v);
  return MT_OK;
}

static mt_err read_rope(const struct reader *r, double theta, struct mt_config *c) {
  const json_t *scaling = json_object_get(r->root, "rope_scaling");
  const json_t *parameters = json_object_get(r->root, "rope_parameters");
  if (!absent(scaling)) {
    return mt_fail(MT_EUNSUPPORTED, "%s: 'rope_scaling' is not supported", r->file);
  }
  struct reader in = {r->file, r->root};
  MT_TRY(read_real(r, "rope_theta", theta, &c->rope_theta));
  if (!absent(parameters)) {
    if (!json_is_object(parameters)) return wrong(r, "rope_parameters", "an object");
    const json_t *type = json_object_get(parameters, "rope_type");
    if (!absent(type) && (!json_is_string(type) || strcmp(json_string_value(type), "default"))) {
      return mt_fail(MT_EUNSUPPORTED,
                     "%s: 'rope_parameters.rope_type' %s is not supported "
                     "(only \"default\" is)",
                     r->file, json_is_string(type) ? json_string_value(type) : "that is no string");
    }
    in.root = parameters;
  }
  return read_real(&in, "rope_theta", c->rope_theta, &c->rope_theta);
}

static mt_err read_family(const struct reader *r, struct mt_config *c, const struct family **out) {
  const char *type = json_string_value(json_object_get(r->root, "model_type"));
  if (!type) return mt_fail(MT_EFORMAT, "%s: 'model_type' is missing", r->file);
  for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
    if (strcmp(families[i].model_type, type) == 0) *out = &families[i];
  }
  if (!*out) {
    return mt_fail(MT_EUNSUPPORTED, "%s: model_type '%.64s' is not supported (mixtral is)", r->file,
                   type);
  }
  snprintf(c->model_type, sizeof c->model_type, "%s", type);
  const json_t *act = json_object_get(r->root, "hidden_act");
  if (!absent(act) && (!json_is_string(act) || strcmp(json_string_value(act), "silu"))) {
    return mt_fail(MT_EUNSUPPORTED, "%s: 'hidden_act' must be \"silu\"", r->file);
  }
  const char *const dropped[] = {"router_jitter_noise", "attention_dropout"};
  for (int i = 0; i < 2; i++) {
    double x;
    MT_TRY(read_real(r, dropped[i], 0, &x));
    if (x != 0) mt_warn("%s: '%s' %g is ignored", r->file, dropped[i], x);
  }
  return MT_OK;
}

static mt_err read_config(const struct reader *r, struct mt_config *c) {
  const struct family *family = NULL;
  int window;
  MT_TRY(read_family(r, c, &family));
  MT_TRY(read_int(r, "hidden_size", -1, &c->hidden));
  MT_TRY(read_int(r, "intermediate_size", -1, &c->ffn));
  MT_TRY(read_int(r, "num_hidden_layers", -1, &c->layers));
  MT_TRY(read_int(r, "num_attention_heads", -1, &c->heads));
  bool null = json_object_get(r->root, "num_key_value_heads"); /* stands for as many as heads */
  MT_TRY(read_int(r, "num_key_value_heads", null ? c->heads : family->kv_heads, &c->kv_heads));
  MT_TRY(read_int(r, "head_dim", c->heads > 0 ? c->hidden / c->heads : 0, &c->head_dim));
  MT_TRY(read_int(r, family->experts_key, -1, &c->experts));
  MT_TRY(read_int(r, family->top_k_key, -1, &c->top_k));
  MT_TRY(read_int(r, "vocab_size", -1, &c->vocab));
  MT_TRY(read_int(r, "max_position_embeddings", 0, &c->max_positions));
  MT_TRY(read_int(r, "sliding_window", 0, &window));
  MT_TRY(read_real(r, "rms_norm_eps", 1e-5, &c->rms_eps));
  MT_TRY(read_rope(r, family->rope_theta, c));
  MT_TRY(read_bool(r, "tie_word_embeddings", &c->tied_head));
  MT_TRY(read_bool(r, "output_router_logits", &c->aux_in_loss));
  MT_TRY(read_real(r, "router_aux_loss_coef", 0.001, &c->aux_coef));
  MT_TRY(read_token(r, "bos_token_id", &c->bos_id));
  MT_TRY(read_token(r, "eos_token_id", &c->eos_id));
  MT_TRY(read_token(r, "pad_token_id", &c->pad_id));
  MT_TRY(mt_context(mt_config_check(c), "%s", r->file));
  for (int l = 0; l < c->layers; l++) {
    c->layer[l] = (struct mt_layer_spec){family->mlp, family->renormalize, window};
  }
  return MT_OK;
}

mt_err mt_hf_config_parse(const char *text, size_t size_bytes, const char *name,
                          struct mt_config *out, json_t **json) {
  json_error_t why;
  *out = (struct mt_config){0};
  json_t *root = json_loadb(text, size_bytes, JSON_REJECT_DUPLICATES, &why);
  if (!json_is_object(root)) {
    json_decref(root);
    if (root) return mt_fail(MT_EFORMAT, "%s: is no JSON object", name);
    return mt_fail(MT_EFORMAT, "%s: line %d: %s", name, why.line, why.text);
  }
  struct reader r = {name, root};
  mt_err err = read_config(&r, out);
  if (!err && json)
    *json = root;
  else
    json_decref(root);
  return err;
}

mt_err mt_hf_config_load_file(const char *path, struct mt_config *out, json_t **json) {
  char *text;
  size_t size;
  MT_TRY(mt_file_read(path, CONFIG_LIMIT, &text, &size));
  mt_err err = mt_hf_config_parse(text, size, path, out, json);
  free(text);
  return err;
}

mt_err mt_hf_config_load(const char *dir, struct mt_config *out, json_t **json) {
  char path[MT_PATH_MAX];
  MT_TRY(mt_path_join(path, dir, "config.json"));
  return mt_hf_config_load_file(path, out, json);
}
