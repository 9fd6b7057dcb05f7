/* A chat template as a row of strings, shared by its table and the renderer. */
#ifndef MT_DATA_TEMPLATE_IMPL_H
#define MT_DATA_TEMPLATE_IMPL_H

#include "data/template.h"

enum { TEMPLATE_MARKERS = 3 };

struct mt_template {
  const char *name;
  /* What its Jinja text holds, all of them, once squeezed (template_table.c), and what it must not
   * hold. The first row that fits is taken. */
  const char *marker[TEMPLATE_MARKERS], *never[2];
  bool bos;                   /* begins with what the tokenizer puts before a text */
  const char *default_system; /* for a conversation that begins without one; NULL: none */
  /* Around a system message. NULL: it goes before the first question, a blank line between. */
  const char *system_begin, *system_end;
  const char *user_begin, *user_end;
  const char *answer_begin; /* not learned */
  const char *answer_lead;  /* learned, before the answer */
  /* The same before a conversation's last message unless that holds </think>; NULL: answer_lead. */
  const char *last_lead;
  const char *answer_tail; /* learned, behind the answer */
  const char *answer_end;  /* learned, behind that, may spell a special token; NULL: EOS */
  const char *after;       /* not learned */
  bool after_last;         /* also behind the last message */
};

#endif
