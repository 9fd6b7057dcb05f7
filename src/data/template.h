/* Chat templates: messages -> pieces of text, each learned or not. A template is a row of a table;
 * the Jinja text of tokenizer_config.json is recognised, not executed. */
#ifndef MT_DATA_TEMPLATE_H
#define MT_DATA_TEMPLATE_H

#include <jansson.h>

#include "data/tokenizer.h"

struct mt_template; /* a row of the table */

/* By name ("mistral", "chatml", ...); MT_EUNSUPPORTED naming those there are. */
mt_err mt_template_find(const char *name, const struct mt_template **out);
/* From DIR/tokenizer_config.json's chat_template; Mistral's where the file or the key is absent.
 * MT_EUNSUPPORTED for one that is not known (choose with --chat-template). */
mt_err mt_template_detect(const char *dir, const struct mt_template **out);
const char *mt_template_name(const struct mt_template *t);

/* Tokens of one sample and which of them are learned. Grows; reused by the caller. */
struct mt_rendered {
  struct mt_ids ids;
  uint8_t *learn; /* [capacity of ids] */
  size_t learn_capacity;
};
void mt_rendered_free(struct mt_rendered *r);

/* One parsed line of a data file -> tokens (r is emptied first). Kinds, by their keys:
 *   {"text"}                            all learned, then EOS
 *   {"prompt", "completion"}            the completion and EOS learned
 *   {"instruction", "input"?, "output"} as a conversation of one question and its answer
 *   {"messages": [{"role", "content"}]} answers (and what ends them) learned
 * Pieces are encoded one by one, a piece that follows another without a prefix space: with
 * templates that begin an answer with a space or behind a special token these are the ids of the
 * whole text. eos_id -1: none is added. Errors: MT_EFORMAT saying what is wrong with the record. */
mt_err mt_render(const struct mt_template *t, struct mt_encoder *e, const json_t *record,
                 int32_t eos_id, struct mt_rendered *r);

/* Messages up to where an answer begins: what a model is to be asked. with_bos: with the BOS token.
 */
mt_err mt_render_question(const struct mt_template *t, struct mt_encoder *e, const json_t *messages,
                          bool with_bos, struct mt_rendered *r);

#endif
