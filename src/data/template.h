/* Chat templates: messages -> tokens, each learned or not. A template is a row of a table; the
 * Jinja text of a checkpoint is recognised, not executed. */
#ifndef MT_DATA_TEMPLATE_H
#define MT_DATA_TEMPLATE_H

#include <jansson.h>

#include "data/tokenizer.h"

struct mt_template; /* a row of the table */

/* By name ("mistral", "chatml", ...); MT_EUNSUPPORTED naming those there are. */
mt_err mt_template_find(const char *name, const struct mt_template **out);
/* From DIR/chat_template.jinja, or chat_template in DIR/tokenizer_config.json (of a list the one
 * named "default"); Mistral's where there is neither. Recognised by the expressions that place the
 * messages, in any of Jinja's spellings. Errors: MT_EUNSUPPORTED for one that is not known (choose
 * with --chat-template); MT_EFORMAT for a file that is no JSON. */
mt_err mt_template_detect(const char *dir, const struct mt_template **out);
const char *mt_template_name(const struct mt_template *t);
/* Of what it writes, whatever its name. */
struct mt_hash mt_template_hash(const struct mt_template *t);

/* Tokens of one sample and which of them are learned. Grows; reused by the caller. */
struct mt_rendered {
  struct mt_ids ids;
  uint8_t *learn; /* [capacity of ids] */
  size_t learn_capacity;
};
void mt_rendered_free(struct mt_rendered *r);

/* One parsed line of a data file -> tokens (r is emptied first). Kinds, by their keys, the first
 * that fits:
 *   {"messages": [{"role", "content"}]} answers (and what ends them) learned
 *   {"instruction", "input"?, "output"} as a conversation of one question (instruction, blank line,
 *                                       input) and its answer
 *   {"prompt", "completion"}            the completion and EOS learned
 *   {"text"}                            all learned, then EOS
 * The last two begin with what the tokenizer puts before a text (BOS), a conversation only where
 * its template does. eos_id -1: no EOS is added.
 *
 * Everything between two learned stretches (questions and the template's words) is encoded as one
 * text, and each learned stretch as one that goes on from it: so the ids before an answer are those
 * that the model will be asked with, and the mask is exact. They are the ids of the whole text
 * wherever no token spans the seam, as with templates whose answers begin with a space, a new line
 * or behind a special token. Messages never speak for the template: a special token spelled in one
 * is encoded as plain characters.
 *
 * A system message goes where the template has it, else (Mistral's) before the first question.
 * Errors: MT_EFORMAT saying what is wrong with the record; MT_ENOMEM. */
mt_err mt_render(const struct mt_template *t, struct mt_encoder *e, const json_t *record,
                 int32_t eos_id, struct mt_rendered *r);

/* Messages up to where an answer begins: what a model is to be asked. begins: the conversation
 * starts here; otherwise the ids go on from an answer that was given, and first end it as the
 * template does (eos_id, where its answers end so; -1: none). */
mt_err mt_render_question(const struct mt_template *t, struct mt_encoder *e, const json_t *messages,
                          bool begins, int32_t eos_id, struct mt_rendered *r);

#endif
